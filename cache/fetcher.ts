/**
 * Chunks from the source, each once: equal requests share one fetch, requests of one turn of the event loop share
 * one call, what arrives is decoded and checked before anybody gets it. It does not know that it feeds a cache.
 *
 * Two queues. Demand goes out at once. Prefetch goes out behind it, in calls of some chunks, as many bytes at a time
 * as keep the way to the source full and as fast as the ceiling allows, the lowest rank first. A demand for a chunk
 * whose prefetch is still queued here takes it over; one whose prefetch is under way joins it: little is, and asking
 * twice would be slower.
 *
 * A chunk that does not match its digest is asked for once more, alone. A batch that fails because of one of its
 * chunks (not-found, say) is asked for again chunk by chunk, so that no reader fails for another's chunk.
 */
import { decodeChunk } from '../src/core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { ChunkDecoder } from '../src/core/decoder.ts';
import { asGridError, GridError } from '../src/core/errors.ts';
import { BATCH_CHUNKS_MAX, CACHE_BATCHES_MAX, MIB } from '../src/core/limits.ts';
import type { ChunkSource, Priority, WayFigures } from '../src/core/source.ts';
import { RankedQueue } from './ranked-queue.ts';
import { RateCeiling } from './rate-ceiling.ts';

/** What was fetched on whose behalf. */
export interface FetchTally {
  fetchedChunks: number;
  fetchedPlainBytes: number;
  fetchedStoredBytes: number;
}

/** Chunks in one call of prefetch: several calls share what may be under way. */
const PREFETCH_CHUNKS_MAX = 32;
/**
 * While a machine is being started, prefetch goes no faster than this. At full speed it takes all of the main thread, in
 * which the steps of the start then stand behind it: on a link of 1 Gbit/s a QEMU was begun after 0.4 s instead of 0.1.
 * It is what a link of 100 Mbit/s carries.
 */
const STARTING_BYTES_PER_SECOND = 12 * MIB;
const STARTING_BURST_SECONDS = 0.04;
/** Of what such a link has under way in a round trip, so much at once: some of it waits at either end. */
const STARTING_ROUND_TRIPS = 1.3;
/** Stored bytes of prefetch under way at a source that cannot say how many it wants. */
const PREFETCH_BYTES = 1 * MIB;

interface Wanted {
  readonly key: string;
  readonly ref: ChunkRef;
  readonly tally: FetchTally;
  priority: Priority;
  /** Among what is prefetched. */
  rank: number;
  /** How many asked for it. */
  waiters: number;
  /** Asked for a second time; the next failure is final. */
  again: boolean;
  /** Its bytes are given out. */
  arrived: boolean;
  readonly promise: Promise<Buffer>;
  resolve(plain: Buffer): void;
  reject(error: GridError): void;
}

export class Fetcher {
  readonly #source: ChunkSource;
  readonly #log: (message: string) => void;
  readonly #abort = new AbortController();
  readonly #flights = new Map<string, Wanted>();
  #demand: Wanted[] = [];
  readonly #prefetch = new RankedQueue<Wanted>();
  readonly #ceiling: RateCeiling;
  readonly #startingCeiling = new RateCeiling(STARTING_BYTES_PER_SECOND, STARTING_BURST_SECONDS);
  /** Machines that are being started. */
  #starting = 0;
  readonly #readAround: boolean;
  /** For what nobody waits for: see decoder.ts. */
  readonly #decoder = new ChunkDecoder();
  #callsUnderWay = 0;
  #prefetchBytesUnderWay = 0;
  #scheduled = false;
  #timer: NodeJS.Timeout | undefined;
  /** Chunks that did not match their digest when they arrived. */
  corruptChunks = 0;

  constructor(
    source: ChunkSource,
    log: (message: string) => void,
    options: { prefetchBytesPerSecond?: number; readAround?: boolean } = {},
  ) {
    this.#source = source;
    this.#log = log;
    this.#readAround = options.readAround ?? true;
    this.#ceiling = new RateCeiling(options.prefetchBytesPerSecond ?? Infinity);
  }

  /** Plain, verified bytes of a chunk, shared by all who ask until `settled` is called. Throws corrupt, not-found, closed and what the source throws. */
  fetch(ref: ChunkRef, tally: FetchTally, priority: Priority = 'demand', rank = 0): Promise<Buffer> {
    const key = keyOf(ref);
    let wanted = this.#flights.get(key);
    if (wanted) {
      wanted.waiters++;
      if (priority === 'demand') this.promote(ref);
      else this.hasten(ref, rank);
      return wanted.promise;
    }
    wanted = {
      key,
      ref,
      tally,
      priority,
      rank,
      waiters: 1,
      again: false,
      arrived: false,
      ...Promise.withResolvers<Buffer>(),
    };
    this.#flights.set(key, wanted);
    if (priority === 'demand') this.#demand.push(wanted);
    else this.#prefetch.add(wanted);
    this.#schedule();
    return wanted.promise;
  }

  /** Somebody waits for this chunk now: if its prefetch is queued, it goes out as demand. */
  promote(ref: ChunkRef): void {
    const wanted = this.#flights.get(keyOf(ref));
    if (!wanted) return;
    wanted.priority = 'demand';
    if (!this.#prefetch.delete(wanted)) return;
    this.#demand.push(wanted);
    this.#schedule();
  }

  /** Somebody wants this chunk sooner than who asked for it first. */
  hasten(ref: ChunkRef, rank: number): void {
    const wanted = this.#flights.get(keyOf(ref));
    if (!wanted || wanted.rank <= rank || !this.#prefetch.delete(wanted)) return;
    wanted.rank = rank;
    this.#prefetch.add(wanted);
  }

  /** One who asked for this prefetch does not want it any more: if nobody else does and it has not gone out, it
   * fails with `closed`. */
  drop(ref: ChunkRef): void {
    const wanted = this.#flights.get(keyOf(ref));
    if (!wanted || !this.#prefetch.has(wanted) || --wanted.waiters > 0) return;
    this.#prefetch.delete(wanted);
    this.#reject(wanted, new GridError('closed', 'the prefetch was cancelled'));
  }

  /** One who dropped it wants it again. */
  keep(ref: ChunkRef): void {
    const wanted = this.#flights.get(keyOf(ref));
    if (wanted) wanted.waiters++;
  }

  /** Whoever fetched a chunk has put it where others find it (or could not): who wants it now asks again. One of several
   * who had it may say so late, when it is on its way again. */
  settled(ref: ChunkRef): void {
    const key = keyOf(ref);
    if (this.#flights.get(key)?.arrived) this.#flights.delete(key);
  }

  /** Chunks asked for and not there yet. */
  get inFlight(): number {
    return this.#flights.size;
  }

  /** The way, for those who would fetch around what is missed; undefined where nobody should. */
  get way(): WayFigures | undefined {
    return this.#readAround ? this.#source.way?.() : undefined;
  }

  /** What will be prefetched sooner or later need not wait for a thread then: it takes 0.1 s of a processor. */
  prepare(): void {
    this.#decoder.prepare();
  }

  /** A machine is being started, until what is returned is called (again and again does not hurt). */
  starting(): () => void {
    this.#starting++;
    let isOver = false;
    return () => {
      if (isOver) return;
      isOver = true;
      this.#starting--;
      if (this.#prefetch.size > 0) this.#schedule();
    };
  }

  get #ceilings(): readonly RateCeiling[] {
    return this.#starting > 0 ? [this.#ceiling, this.#startingCeiling] : [this.#ceiling];
  }

  /** Stored bytes of prefetch that may be under way. */
  #bytesAtOnce(): number {
    const way = this.#source.way?.();
    const bytes = Math.min(way?.prefetchBytes ?? PREFETCH_BYTES, this.#ceiling.burstBytes);
    if (this.#starting === 0) return bytes;
    const seconds = (STARTING_ROUND_TRIPS * (way?.roundTripMs ?? 0)) / 1000;
    return Math.min(bytes, STARTING_BYTES_PER_SECOND * Math.max(STARTING_BURST_SECONDS, seconds));
  }

  /** Stored bytes of prefetch that are queued or under way. */
  get prefetchBytes(): number {
    let bytes = this.#prefetchBytesUnderWay;
    for (const { ref } of this.#prefetch) bytes += weightOf(ref);
    return bytes;
  }

  /** Ends what is under way: it rejects with `closed`. */
  close(): void {
    this.#abort.abort();
    clearTimeout(this.#timer);
    void this.#decoder.close();
    const queued = [...this.#demand.splice(0), ...this.#prefetch];
    this.#prefetch.clear();
    for (const wanted of queued) this.#reject(wanted, this.#closedError());
  }

  #closedError(): GridError {
    return new GridError('closed', `the cache in front of ${this.#source.name} was closed`);
  }

  /** setImmediate: after every request that this turn of the event loop brings. */
  #schedule(): void {
    if (this.#scheduled) return;
    this.#scheduled = true;
    setImmediate(() => {
      this.#scheduled = false;
      this.#pump();
    });
  }

  #pump(): void {
    while (this.#demand.length > 0 && this.#callsUnderWay < CACHE_BATCHES_MAX) {
      this.#callsUnderWay++;
      void this.#call(this.#nextDemand(), 'demand').finally(() => {
        this.#callsUnderWay--;
        if (this.#demand.length > 0) this.#schedule();
      });
    }
    while (this.#prefetch.size > 0) {
      const bytes = this.#bytesAtOnce();
      // Not chunk by chunk as the last one comes in: a call should be worth its way.
      if (this.#prefetchBytesUnderWay > 0 && this.#prefetchBytesUnderWay > (bytes * 3) / 4) return;
      const nowMs = performance.now();
      const waitMs = Math.max(...this.#ceilings.map((ceiling) => ceiling.waitMs(nowMs)));
      if (waitMs > 0) {
        this.#timer ??= setTimeout(() => {
          this.#timer = undefined;
          this.#pump();
        }, waitMs);
        return;
      }
      const batch = this.#nextPrefetch(bytes - this.#prefetchBytesUnderWay);
      void this.#callPrefetch(batch);
    }
  }

  /** The longest run of first-time requests, or one that goes alone. */
  #nextDemand(): Wanted[] {
    let length = this.#demand.findIndex((wanted) => wanted.again);
    if (length === 0) length = 1;
    else if (length < 0) length = this.#demand.length;
    return this.#demand.splice(0, Math.min(length, BATCH_CHUNKS_MAX));
  }

  /** About `room` bytes, one chunk at least; one that goes alone goes alone. */
  #nextPrefetch(room: number): Wanted[] {
    const batch: Wanted[] = [];
    let bytes = 0;
    for (const wanted of this.#prefetch) {
      if (batch.length > 0 && (wanted.again || bytes + weightOf(wanted.ref) > room)) break;
      batch.push(wanted);
      bytes += weightOf(wanted.ref);
      this.#prefetch.delete(wanted);
      if (wanted.again || batch.length === PREFETCH_CHUNKS_MAX) break;
    }
    return batch;
  }

  async #callPrefetch(batch: Wanted[]): Promise<void> {
    const bytes = batch.reduce((sum, { ref }) => sum + weightOf(ref), 0);
    this.#prefetchBytesUnderWay += bytes;
    let left = bytes;
    await this.#call(batch, 'prefetch', ({ ref }, storedBytes) => {
      for (const ceiling of this.#ceilings) ceiling.spend(storedBytes, performance.now());
      left -= weightOf(ref);
      this.#prefetchBytesUnderWay -= weightOf(ref);
      if (this.#prefetch.size > 0) this.#schedule();
    });
    this.#prefetchBytesUnderWay -= left;
    if (this.#prefetch.size > 0) this.#schedule();
  }

  async #call(
    batch: Wanted[],
    priority: Priority,
    received?: (wanted: Wanted, storedBytes: number) => void,
  ): Promise<void> {
    if (this.#abort.signal.aborted) {
      for (const wanted of batch) this.#reject(wanted, this.#closedError());
      return;
    }
    const waiting: (Wanted | undefined)[] = [...batch];
    let failure: GridError | undefined;
    try {
      await this.#source.readChunks(
        batch.map((wanted) => wanted.ref),
        { priority, signal: this.#abort.signal },
        (index, chunk) => {
          const wanted = waiting[index];
          if (!wanted) return;
          waiting[index] = undefined;
          this.#receive(wanted, chunk);
          received?.(wanted, chunk.bytes.length);
        },
      );
    } catch (error) {
      failure = this.#abort.signal.aborted
        ? this.#closedError()
        : asGridError(error, `cannot read chunks from ${this.#source.name}`, 'origin-failed');
    }
    for (const wanted of waiting) {
      if (!wanted) continue;
      failure ??= new GridError(
        'origin-failed',
        `${this.#source.name} did not send chunk ${wanted.ref.digest.slice(0, 12)}`,
      );
      // One chunk's failure ends a batch; only trouble with the way or a close is everybody's.
      const mayBeAnothers = batch.length > 1 && failure.blame !== 'tunnel' && failure.code !== 'closed';
      if (mayBeAnothers && !wanted.again) this.#askAgain(wanted);
      else this.#reject(wanted, failure);
    }
  }

  #receive(wanted: Wanted, chunk: StoredChunk): void {
    if (wanted.priority === 'prefetch') {
      this.#decoder.decode(chunk, wanted.ref).then(
        (plain) => this.#arrived(wanted, chunk, plain),
        (error: unknown) => this.#undecoded(wanted, chunk, error),
      );
      return;
    }
    let plain: Buffer;
    try {
      plain = decodeChunk(chunk, wanted.ref);
    } catch (error) {
      this.#undecoded(wanted, chunk, error);
      return;
    }
    this.#arrived(wanted, chunk, plain);
  }

  #arrived(wanted: Wanted, chunk: StoredChunk, plain: Buffer): void {
    wanted.tally.fetchedChunks++;
    wanted.tally.fetchedPlainBytes += plain.length;
    wanted.tally.fetchedStoredBytes += chunk.bytes.length;
    wanted.arrived = true;
    wanted.resolve(plain);
  }

  #undecoded(wanted: Wanted, chunk: StoredChunk, cause: unknown): void {
    if (this.#abort.signal.aborted) {
      this.#reject(wanted, this.#closedError());
      return;
    }
    this.corruptChunks++;
    this.#source.reportCorrupt?.(wanted.ref, chunk); // another source of several is asked next time
    const what = `chunk ${wanted.ref.digest.slice(0, 12)} from ${this.#source.name} is corrupt`;
    this.#log(`cache: ${what}${wanted.again ? '' : ', asking once more'}`);
    if (!wanted.again) {
      this.#askAgain(wanted);
      return;
    }
    const text = `${what}; run \`gridvfs store verify\` at its store`;
    this.#reject(wanted, new GridError('corrupt', text, { cause }));
  }

  #askAgain(wanted: Wanted): void {
    wanted.again = true;
    if (wanted.priority === 'demand') this.#demand.push(wanted);
    else this.#prefetch.add(wanted);
    this.#schedule();
  }

  #reject(wanted: Wanted, error: GridError): void {
    if (this.#flights.get(wanted.key) === wanted) this.#flights.delete(wanted.key);
    wanted.reject(error);
  }
}

/** What a chunk takes of the way to the source. */
function weightOf(ref: ChunkRef): number {
  return ref.storedBytes ?? ref.plainBytes;
}

/** The length is part of the key: a manifest that lies about it must not be answered by one that does not. */
function keyOf(ref: ChunkRef): string {
  return `${ref.digest}:${ref.plainBytes}`;
}
