/**
 * How many bytes of bulk may be under way: about twice bandwidth × delay, measured as BBR does (the best delivery rate
 * and the shortest round trip of late), so that bulk keeps the link full and a demand read that comes behind it
 * waits at most about one more round trip. It starts small and doubles while the rate still grows with it.
 */
import type { ChunkRef } from '../src/core/chunk.ts';
import { KIB, MIB } from '../src/core/limits.ts';

/** Enough for two chunks of the default size at zstd's usual ratio, whatever the link. */
const WINDOW_BYTES_MIN = 256 * KIB;
/** Until the first rate is known: about bandwidth × delay of 100 Mbit/s at 40 ms, 40 ms of such a link. */
const WINDOW_BYTES_START = 512 * KIB;
/** 1 Gbit/s at 130 ms; also the bound of memory for it. */
const WINDOW_BYTES_MAX = 32 * MIB;
/** On a short link the queue may be this long: batches of a few chunks instead of one. */
const QUEUE_MS = 20;
/** Long enough that a burst after a pause of this process does not pass for a fast link. */
const SAMPLE_MS = 100;
/** Samples that the best rate is taken from. */
const SAMPLES = 10;
/** How long the shortest round trip counts: a route may change, a queue of our own making passes. */
const ROUND_TRIP_KEPT_MS = 30_000;

export class BulkWindow {
  #rtMs = Infinity;
  #rtSeenMs = 0;
  #rates: number[] = [];
  #sampleStartMs = 0;
  #sampleBytes = 0;
  #previous = { bytes: 0, ms: 0 };
  /** Stored bytes per plain byte, so far; zstd's usual one is a third. */
  #ratio = 0.5;
  #chunks = 0;

  /** Bytes that may be under way, as estimated by `estimate`. */
  get bytes(): number {
    const best = Math.max(0, ...this.#rates);
    if (best === 0) return WINDOW_BYTES_START;
    const heldMs = this.#rtMs + Math.max(this.#rtMs, QUEUE_MS);
    return Math.min(WINDOW_BYTES_MAX, Math.max(WINDOW_BYTES_MIN, best * heldMs));
  }

  /** What a chunk will weigh on the wire: known, or probable. */
  estimate({ plainBytes, storedBytes }: ChunkRef): number {
    if (storedBytes !== undefined) return storedBytes;
    return Math.ceil(plainBytes * this.#ratio);
  }

  /** The first byte of an answer came `elapsedMs` after its request went out. */
  onRoundTrip(elapsedMs: number, nowMs: number): void {
    if (elapsedMs > this.#rtMs && nowMs - this.#rtSeenMs < ROUND_TRIP_KEPT_MS) return;
    this.#rtMs = elapsedMs;
    this.#rtSeenMs = nowMs;
  }

  onChunk(storedBytes: number, plainBytes: number, nowMs: number): void {
    // The mean of the first ones, then of late: a first guess should not be held to.
    this.#chunks = Math.min(this.#chunks + 1, 16);
    this.#ratio += (storedBytes / plainBytes - this.#ratio) / this.#chunks;
    const elapsedMs = nowMs - this.#sampleStartMs;
    const sampleMs = Math.max(SAMPLE_MS, Math.min(2 * this.#rtMs, 1000));
    this.#sampleBytes += storedBytes;
    if (elapsedMs < sampleMs) return;
    // After a pause (nothing was asked for) the sample says nothing of the link.
    if (elapsedMs < 4 * sampleMs) {
      // Two together: when this process stood still, one sample is too low and the burst after it too high.
      const { bytes, ms } = this.#previous;
      this.#rates.push((this.#sampleBytes + bytes) / (elapsedMs + ms));
      if (this.#rates.length > SAMPLES) this.#rates.shift();
      this.#previous = { bytes: this.#sampleBytes, ms: elapsedMs };
    } else this.#previous = { bytes: 0, ms: 0 };
    this.#sampleStartMs = nowMs;
    this.#sampleBytes = 0;
  }
}
