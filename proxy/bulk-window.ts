/**
 * How many stored bytes of bulk may be under way: twice bandwidth × delay, measured as BBR does (the best delivery
 * rate and the shortest round trip of late), so that bulk keeps the link full and a demand read that comes behind it
 * waits at most about one more round trip.
 *
 * Start: from WINDOW_BYTES_START, each chunk that comes makes it larger by itself (TCP's slow start), until the first
 * rate is known or START_GROWTH is reached. Then: while the window is what holds the rate down, twice the rate's
 * worth is twice the window, so it doubles with each sample until the link is what holds it down. A sample is the mean
 * of a time in which the window grew, so while rates still grow the window is half as large again (BBR's startup, which
 * ends likewise: FLAT_SAMPLES without growth).
 *
 * A sample counts when bulk waited for the window meanwhile, or when it is better than those before: a link on which
 * little was asked for did not become slower. Chunks of one answer that come one behind the other for TRAIN_MS are a
 * sample too: they say what the link carries even where little was asked for.
 */
import type { ChunkRef } from '../src/core/chunk.ts';
import { KIB, MIB } from '../src/core/limits.ts';

/** Enough for two chunks of the default size at zstd's usual ratio, whatever the link. */
const WINDOW_BYTES_MIN = 256 * KIB;
/** Until the first rate is known: about bandwidth × delay of 100 Mbit/s at 40 ms, 40 ms of such a link. */
const WINDOW_BYTES_START = 512 * KIB;
/** 1.5 MiB more before the first sample: twice bandwidth × delay of 50 Mbit/s at 150 ms. */
const START_GROWTH = 4;
/** 1 Gbit/s at 130 ms; also the bound of memory for it. */
const WINDOW_BYTES_MAX = 32 * MIB;
/** On a short link the queue may be this long: batches of a few chunks instead of one. */
const QUEUE_MS = 20;
/** A sample is at least this long, so that a burst after a pause of this process does not pass for a fast link. */
const SAMPLE_MS_MIN = 100;
const SAMPLE_MS_MAX = 1000;
/** Long enough for the same, and on a link that is faster nothing hangs on its rate. */
const TRAIN_MS = 50;
/** A rate grows still when it is better than the best before by this. */
const GROWTH_MIN = 1.25;
const GROWING_GAIN = 1.5;
/** So many samples without growth: the link is what holds the rate down. */
const FLAT_SAMPLES = 3;
/** Free before more bulk goes out. Without it each chunk that comes in would send for one more, in a batch of its own. */
const ROOM_SHARE = 1 / 10;
/** Samples that the best rate is taken from. */
const SAMPLES = 10;
/** How long the shortest round trip counts: a route may change, a queue of our own making passes. */
const ROUND_TRIP_KEPT_MS = 30_000;

/** The chunks of one answer to bulk. */
export interface Train {
  startMs?: number;
  startBytes: number;
}

export class BulkWindow {
  #rtMs = Infinity;
  #rtSeenMs = 0;
  /** Stored bytes per millisecond. */
  #rates: number[] = [];
  /** The last rate that was growth, and samples since. */
  #grownTo = 0;
  #flatSamples = 0;
  #bytes = 0;
  /** A sample begins with a chunk, whose own bytes came before it. */
  #sampleStartMs = -Infinity;
  #sampleBytes = 0;
  #lastChunkMs = -Infinity;
  #heldBack = false;
  /** Stored bytes per plain byte, so far; zstd's usual one is a third. */
  #ratio = 0.5;
  #chunks = 0;

  /** Bytes that may be under way, as estimated by `estimate`. */
  get bytes(): number {
    const best = this.#best;
    if (best === undefined) {
      return Math.min(WINDOW_BYTES_START + this.#bytes, START_GROWTH * WINDOW_BYTES_START);
    }
    const heldMs = this.#rtMs + Math.max(this.#rtMs, QUEUE_MS);
    const gain = this.#flatSamples < FLAT_SAMPLES ? GROWING_GAIN : 1;
    return Math.min(WINDOW_BYTES_MAX, Math.max(WINDOW_BYTES_MIN, best * heldMs * gain));
  }

  /** Whether bulk waits while so much of it is under way. */
  isFull(underWayBytes: number): boolean {
    return underWayBytes > 0 && underWayBytes >= this.bytes * (1 - ROOM_SHARE);
  }

  get #best(): number | undefined {
    return this.#rates.length === 0 ? undefined : Math.max(...this.#rates);
  }

  /** Shortest time from a request to the first byte of its answer, of late; undefined before the first answer. */
  get roundTripMs(): number | undefined {
    return this.#rtMs === Infinity ? undefined : this.#rtMs;
  }

  /** Stored bytes per second of late; undefined while too little came to say. */
  get bytesPerSecond(): number | undefined {
    const best = this.#best;
    return best === undefined ? undefined : best * 1000;
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

  /** Bulk waits because the window is full. */
  onHeldBack(): void {
    this.#heldBack = true;
  }

  /** A chunk came; of bulk, in the answer `train`. */
  onChunk(storedBytes: number, plainBytes: number, nowMs: number, train?: Train): void {
    // The mean of the first ones, then of late: a first guess should not be held to.
    this.#chunks = Math.min(this.#chunks + 1, 16);
    this.#ratio += (storedBytes / plainBytes - this.#ratio) / this.#chunks;
    this.#bytes += storedBytes;
    if (train) this.#onTrain(train, nowMs);
    const roundTripMs = this.roundTripMs ?? 0;
    const sampleMs = Math.min(SAMPLE_MS_MAX, Math.max(SAMPLE_MS_MIN, 2 * roundTripMs));
    // After a pause (nothing was asked for) a sample would say nothing of the link.
    const pausedMs = nowMs - this.#lastChunkMs;
    this.#lastChunkMs = nowMs;
    const elapsedMs = nowMs - this.#sampleStartMs;
    this.#sampleBytes += storedBytes;
    const paused = pausedMs > Math.max(sampleMs, 2 * SAMPLE_MS_MIN);
    if (!paused && elapsedMs < sampleMs) return;
    const rate = this.#sampleBytes / elapsedMs;
    if (!paused && (this.#heldBack || rate > (this.#best ?? Infinity))) this.#keep(rate);
    this.#sampleStartMs = nowMs;
    this.#sampleBytes = 0;
    this.#heldBack = false;
  }

  /** All that came meanwhile counts, for other answers share the link. */
  #onTrain(train: Train, nowMs: number): void {
    const elapsedMs = nowMs - (train.startMs ?? nowMs);
    if (train.startMs !== undefined && elapsedMs < TRAIN_MS) return;
    const rate = (this.#bytes - train.startBytes) / elapsedMs;
    // Many trains at once must not push out what was known.
    if (elapsedMs > 0 && rate > (this.#best ?? 0)) this.#keep(rate);
    train.startMs = nowMs;
    train.startBytes = this.#bytes;
  }

  #keep(rate: number): void {
    // Once the link was found its rates only vary: there is no second startup.
    if (this.#flatSamples < FLAT_SAMPLES && rate > this.#grownTo * GROWTH_MIN) {
      this.#grownTo = rate;
      this.#flatSamples = 0;
    } else this.#flatSamples++;
    this.#rates.push(rate);
    if (this.#rates.length > SAMPLES) this.#rates.shift();
  }
}
