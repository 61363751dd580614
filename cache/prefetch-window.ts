/**
 * How much prefetch may be under way at a time, in plain bytes, and how fast it may go.
 *
 * The window follows how long calls take: a call that was answered in about a round trip says that the link had
 * room, one that took much longer says that it stood in a queue of our own making (TCP Vegas's signal). So bulk
 * keeps the link full, and a demand read that joins a prefetch under way waits a round trip more at most.
 */
import { MIB } from '../src/core/limits.ts';

/** Enough for a batch of chunks of the default size, 55 ms of a 100 Mbit/s link at zstd's usual ratio. */
const WINDOW_BYTES_MIN = 2 * MIB;
/** 1 Gbit/s at 100 ms, at the same ratio; also the bound of memory for it. */
const WINDOW_BYTES_MAX = 32 * MIB;
/** On a short link the queue may be this long: the source itself reads and hashes for a while. */
const QUEUE_MS = 50;
/** How long the shortest round trip counts: a route may change, a queue passes. */
const ROUND_TRIP_KEPT_MS = 30_000;

export class PrefetchWindow {
  bytes = WINDOW_BYTES_MIN;
  #roundTripMs = Infinity;
  #roundTripSeenMs = 0;

  /** A call was answered: its first and last chunk came so long after it went out; more was `queued` behind it. */
  onCall(call: { firstMs: number; lastMs: number; nowMs: number; queued: boolean }): void {
    if (call.firstMs <= this.#roundTripMs || call.nowMs - this.#roundTripSeenMs > ROUND_TRIP_KEPT_MS) {
      this.#roundTripMs = call.firstMs;
      this.#roundTripSeenMs = call.nowMs;
    }
    const aimMs = this.#roundTripMs + Math.max(this.#roundTripMs, QUEUE_MS);
    const factor = aimMs / Math.max(1, call.lastMs);
    // A window that was not used up says nothing of what it could be.
    if (factor > 1 && !call.queued) return;
    const next = this.bytes * Math.min(1.5, Math.max(0.7, factor));
    this.bytes = Math.min(WINDOW_BYTES_MAX, Math.max(WINDOW_BYTES_MIN, next));
  }
}

/** At most so many bytes per second over any second or two: a bucket that holds half a second's worth. */
export class RateCeiling {
  readonly #bytesPerSecond: number;
  #tokens = 0;
  #atMs = 0;

  constructor(bytesPerSecond: number) {
    this.#bytesPerSecond = bytesPerSecond;
  }

  /** What may be under way at once without an overdraft that is felt. */
  get burstBytes(): number {
    return this.#bytesPerSecond / 2;
  }

  /** How long the next request has to wait. */
  waitMs(nowMs: number): number {
    if (this.#bytesPerSecond === Infinity) return 0;
    const gained = ((nowMs - this.#atMs) / 1000) * this.#bytesPerSecond;
    this.#tokens = Math.min(this.#bytesPerSecond / 2, this.#tokens + gained);
    this.#atMs = nowMs;
    return this.#tokens > 0 ? 0 : Math.max(1, (-this.#tokens / this.#bytesPerSecond) * 1000);
  }

  /** What came counts, so a request may overdraw by what was under way; the next ones wait for it. */
  spend(bytes: number, nowMs: number): void {
    this.waitMs(nowMs);
    this.#tokens -= bytes;
  }
}
