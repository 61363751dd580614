/**
 * One image of the cache while it is in use: which chunks can be read where, and how a missing one gets there.
 *
 * States of a chunk (chunk-states.ts; one byte each, read by worker threads without asking):
 *   ABSENT      not here; fetched on its first read
 *   UNVERIFIED  the map has a record from an earlier run, or a chunk of zeros has data on the disk; hashed on its
 *               first read, by the worker that has it → PRESENT, or here: counted, and fetched (zeroed) again
 *   PRESENT     the kernel has the right bytes in `data`; chunks of zeros are PRESENT holes from the start
 *   AHEAD       as PRESENT; its first reader comes here and more is read ahead → PRESENT
 *   EVICTING    no longer readable, its space is being given back → ABSENT
 *
 * The life of a miss: one flight per chunk, for demand and prefetch alike → a sibling image on this disk, or the
 * Fetcher (one call per turn, decoded, checked) → readers have their bytes → written to `data` → PRESENT → recorded
 * in the map by the next commit (commits.ts), after an fdatasync.
 *
 * When storing fails (disk full, quota, I/O error) readers still have their bytes; the chunk stays ABSENT and is
 * kept in memory for a while. When an fdatasync fails, the kernel may have dropped what was written since the last
 * one: all of that becomes ABSENT again. Files that cannot even be created are tried again with a later chunk.
 *
 * Eviction, in this order: EVICTING (from here on nobody starts to read it), quiet point (nobody reads it any more),
 * record cleared and the map synced, hole punched. After a crash in between the map knows less than the disk has,
 * and if even that failed, the hash finds the hole: a chunk that was evicted is never taken for one that is here.
 * Chunks in flight, chunks not yet recorded, pinned ones and all of a claimed image are left alone.
 */
import type { Digest } from '../src/core/bytes.ts';
import type { ChunkRef } from '../src/core/chunk.ts';
import type { ChunkTable } from '../src/core/chunk-table.ts';
import { GridError } from '../src/core/errors.ts';
import { UNIT_ABSENT, UNIT_PRESENT, UNIT_UNVERIFIED } from '../src/core/image.ts';
import type { DirectMap } from '../src/core/image.ts';
import { CACHE_WRITE_BEHIND_BYTES_MAX } from '../src/core/limits.ts';
import { chunkLengthOf } from '../src/core/manifest.ts';
import type { Manifest } from '../src/core/manifest.ts';
import type { QuietPoints } from '../src/core/quiet.ts';
import { ChunkWay } from './chunk-way.ts';
import type { WayContext } from './chunk-way.ts';
import { ChunkStates, UNIT_AHEAD, UNIT_EVICTING } from './chunk-states.ts';
import type { UseListener } from './chunk-states.ts';
import type { ImageFigures } from './figures.ts';
import { diskBytesOf, ImageDisk } from './image-disk.ts';
import { ReadAhead } from './read-ahead.ts';
import { ReadAround } from './read-around.ts';
import type { Sibling } from './siblings.ts';

/** What an ImageFile needs of its cache. */
export interface ImageContext extends WayContext {
  readonly quiet: QuietPoints;
  /** Whether this chunk is pinned. */
  isPinned(index: number): boolean;
  readonly log: (message: string) => void;
}

/** One chunk on its way. */
interface Flight {
  plain: Promise<Buffer>;
  /** Settles when the chunk is on the disk or will not be. */
  stored: Promise<void>;
  /** Somebody waits for it, or it is for later. */
  demanded: boolean;
  /** Its first reader calls for more. */
  marked: boolean;
}

const DONE = Promise.resolve();

export class ImageFile {
  readonly manifestDigest: Digest;
  readonly manifest: Manifest;
  readonly table: ChunkTable;
  readonly states: ChunkStates;
  readonly figures: ImageFigures;

  /** Rounds of eviction so far. */
  evictions = 0;
  /** Recordings of starts. */
  readonly recordings = new Set<UseListener>();

  readonly #context: ImageContext;
  readonly #disk: ImageDisk;
  readonly #way: ChunkWay;
  readonly #readAhead: ReadAhead;
  readonly readAround: ReadAround;
  readonly #flights = new Map<number, Flight>();
  readonly #stores = new Set<Promise<void>>();
  readonly #loans = new Set<Promise<unknown>>();
  #storingBytes = 0;
  #evicting: Promise<void> = DONE;
  #claims = 0;
  #verifyingAll: Promise<void> | undefined;
  #closed = false;

  /**
   * Opens what is cached of an image, or starts with nothing. Cached files that are not exactly right throw
   * bad-format, and the caller drops them; a table that does not fit its manifest throws bad-format too.
   */
  constructor(
    folder: string,
    manifestDigest: Digest,
    manifest: Manifest,
    table: ChunkTable,
    context: ImageContext,
  ) {
    this.manifestDigest = manifestDigest;
    this.manifest = manifest;
    this.table = table;
    this.figures = context.figures;
    this.states = new ChunkStates(manifest, table, context.figures.notes);
    this.#context = context;
    this.#way = new ChunkWay(this, manifest, table, context);
    this.#readAhead = new ReadAhead(manifest.kind, table.count, (index) => table.entryOf(index) < 0);
    this.readAround = new ReadAround(this, context.fetcher, {
      underWay: (index) => this.#flights.has(index),
      room: () => context.space.degraded === undefined,
    });
    this.#disk = new ImageDisk(folder, manifestDigest, this.states, {
      space: context.space,
      usage: context.figures.usage,
      isQuiescent: () => this.#storingBytes === 0,
      log: context.log,
    });
  }

  /** Of the present chunks, those that the map on disk knows. */
  get recordedChunks(): number {
    return this.states.presentChunks - this.#disk.unrecordedChunks;
  }

  /** For threads that serve reads themselves; undefined while a full disk keeps the files from being made. */
  get direct(): DirectMap | undefined {
    return this.#disk.direct;
  }

  get dataFd(): number | undefined {
    return this.#disk.dataFd;
  }

  get claimed(): boolean {
    return this.#claims > 0;
  }

  /** Fills `target`; what is not here is fetched first. Throws bad-request, closed, and what a fetch throws. */
  read(target: Uint8Array, offsetBytes: number): Promise<void> {
    const { sizeBytes } = this.manifest;
    if (!Number.isSafeInteger(offsetBytes) || offsetBytes < 0 || offsetBytes + target.length > sizeBytes) {
      return Promise.reject(
        new GridError(
          'bad-request',
          `read of ${target.length} bytes at ${offsetBytes} leaves the image of ${sizeBytes} bytes`,
        ),
      );
    }
    if (this.#closed) return Promise.reject(this.#closedError());
    if (target.length === 0 || this.#readHere(target, offsetBytes)) return DONE;
    return this.#readMissing(target, offsetBytes);
  }

  /** True when the whole range was PRESENT and has been read. */
  #readHere(target: Uint8Array, offsetBytes: number): boolean {
    try {
      return this.#disk.read(target, offsetBytes);
    } catch (error) {
      // The disk cannot give back what it took: the chunks go the way of damaged ones.
      this.#context.log(`cache: cannot read ${this.#disk.folder}/data: ${String(error)}; fetching again`);
      const { chunkBytes } = this.manifest;
      const last = Math.floor((offsetBytes + target.length - 1) / chunkBytes);
      for (let index = Math.floor(offsetBytes / chunkBytes); index <= last; index++) {
        if (this.states.get(index) === UNIT_PRESENT) this.states.set(index, UNIT_UNVERIFIED);
      }
      return false;
    }
  }

  async #readMissing(target: Uint8Array, offsetBytes: number): Promise<void> {
    const { chunkBytes } = this.manifest;
    const end = offsetBytes + target.length;
    const parts: Promise<void>[] = [];
    for (let index = Math.floor(offsetBytes / chunkBytes); index * chunkBytes < end; index++) {
      const start = index * chunkBytes;
      const from = Math.max(offsetBytes, start);
      const part = target.subarray(from - offsetBytes, Math.min(end, start + chunkBytes) - offsetBytes);
      this.states.touch(index, from - start, from - start + part.length);
      if (this.states.get(index) === UNIT_AHEAD) {
        this.states.set(index, UNIT_PRESENT);
        this.#readOn(index);
      }
      if (this.states.get(index) === UNIT_PRESENT) {
        if (this.#disk.direct === undefined) {
          part.fill(0); // no files yet: only chunks of zeros are PRESENT
          continue;
        }
        if (this.#readHere(part, from)) continue;
      }
      if (!this.#flights.has(index)) this.readAround.onMiss(index, from - start, part.length);
      parts.push(
        this.#obtain(index, true).plain.then((plain) => {
          part.set(plain.subarray(from - start, from - start + part.length));
        }),
      );
    }
    // Settled, not just failed: nothing may write to `target` after the caller has it back.
    for (const result of await Promise.allSettled(parts))
      if (result.status === 'rejected') throw result.reason;
  }

  /** A reader came to `index` and had to come here for it: perhaps it goes on. */
  #readOn(index: number): void {
    const piece = this.#readAhead.onRead(index);
    if (!piece || this.#context.space.degraded !== undefined) return;
    for (let ahead = piece.first; ahead < piece.first + piece.count; ahead++) {
      const marked = ahead === piece.first;
      const state = this.states.get(ahead);
      if (state === UNIT_ABSENT) {
        const flight = this.#obtain(ahead, false);
        if (marked && !flight.demanded) flight.marked = true;
        // Whoever reads it asks again and hears why.
        flight.plain.catch(() => undefined);
      } else if (marked && state === UNIT_PRESENT && this.#disk.direct) {
        this.states.set(ahead, UNIT_AHEAD);
      }
    }
  }

  /** Fetches a chunk before it is asked for. Resolves when it is stored (or could not be); throws what a fetch
   * throws. False when it is here already. */
  async prefetch(index: number, rank = 0): Promise<boolean> {
    if (this.states.get(index) !== UNIT_ABSENT) return false;
    if (this.#flights.has(index) && this.table.entryOf(index) >= 0) this.#way.hasten(index, rank);
    const flight = this.#obtain(index, false, rank);
    await flight.plain;
    await flight.stored;
    return true;
  }

  /** A prefetch that nobody wants any more; ends it if it has not gone out. */
  cancelPrefetch(index: number): void {
    if (this.#flights.get(index)?.demanded === false) this.#way.drop(index);
  }

  /** Hashes a chunk that is here; a damaged one is fetched again and counted. Throws what the fetch throws. */
  async check(index: number): Promise<void> {
    if (!this.states.isHere(index)) return;
    if (!this.#flights.has(index)) this.states.set(index, UNIT_UNVERIFIED);
    const flight = this.#obtain(index, false);
    await flight.plain;
    await flight.stored;
  }

  /** A chunk that is not PRESENT. All who want it share one flight, until it is stored. */
  #obtain(index: number, demanded: boolean, rank = 0): Flight {
    let flight = this.#flights.get(index);
    if (!flight) {
      const started: Flight = { plain: undefined!, stored: DONE, demanded, marked: false };
      started.plain = this.#fly(index, started, rank);
      started.plain.catch(() => this.#flights.delete(index));
      this.#flights.set(index, started);
      flight = started;
    } else if (!demanded || flight.demanded) return flight;
    if (!demanded) return flight;
    // The first who waits for it.
    flight.demanded = true;
    flight.marked = false;
    if (this.table.entryOf(index) >= 0) {
      if (!this.states.isHere(index)) this.figures.missedChunks++;
      this.#way.promote(index);
    }
    this.#readOn(index);
    return flight;
  }

  async #fly(index: number, flight: Flight, rank: number): Promise<Buffer> {
    if (this.#closed) throw this.#closedError();
    // UNVERIFIED, or a worker has just hashed it.
    if (this.states.isHere(index)) {
      const plain = await this.#verify(index);
      if (plain) {
        this.#flights.delete(index);
        return plain;
      }
    }
    const ref = this.#way.refOf(index);
    const priority = () => (flight.demanded ? 'demand' : 'prefetch');
    const { plain, sibling, fetched } = await this.#way.obtain(index, ref, priority, rank);
    if (fetched === 'prefetch') {
      this.figures.prefetchedChunks++;
      this.figures.prefetchedBytes += plain.length;
      this.states.notePrefetched(index);
    }
    const storing = this.#store(index, ref, plain, flight, sibling).finally(() => {
      this.#way.settled(ref);
      this.#flights.delete(index);
      this.#stores.delete(storing);
    });
    flight.stored = storing;
    this.#stores.add(storing);
    if (this.#storingBytes > CACHE_WRITE_BEHIND_BYTES_MAX) await storing;
    return plain;
  }

  /** Bytes of a chunk that is here, which becomes PRESENT; undefined when it is wrong and has to be fetched. */
  async #verify(index: number): Promise<Buffer | undefined> {
    try {
      const plain = await this.#disk.readChecked(index);
      if (plain) {
        this.states.set(index, UNIT_PRESENT);
        return plain;
      }
    } catch (error) {
      this.#context.log(`cache: cannot read chunk ${index} of ${this.#disk.folder}: ${String(error)}`);
    }
    this.figures.refetchedChunks++;
    this.#context.log(`cache: chunk ${index} of ${this.#disk.folder} is damaged on this disk, making it new`);
    if (this.table.entryOf(index) >= 0) {
      this.states.lost(index);
      return undefined;
    }
    const zeros = Buffer.alloc(chunkLengthOf(this.manifest, index));
    if (await this.#disk.writeZeros(index, zeros)) this.states.set(index, UNIT_PRESENT);
    return zeros;
  }

  /** Never rejects: a chunk that cannot be stored is kept in memory. */
  async #store(
    index: number,
    { digest }: ChunkRef,
    plain: Buffer,
    flight: Flight,
    sibling: Sibling | undefined,
  ): Promise<void> {
    const { space } = this.#context;
    const bytes = diskBytesOf(plain.length);
    this.#storingBytes += plain.length;
    try {
      if (this.states.get(index) === UNIT_EVICTING) await this.#evicting;
      while (!this.#mayStore(bytes)) {
        if (!this.#closed && (await space.reclaim(bytes))) continue;
        space.keep(digest, plain);
        return;
      }
      await this.#disk.write(index, plain, sibling?.copyTo, () => {
        space.succeeded();
        space.memory.delete(digest);
        this.states.arrived(index, flight.marked, space.generation);
      });
    } catch (error) {
      space.failed(error, `cannot write ${this.#disk.folder}/data`);
      space.keep(digest, plain);
    } finally {
      this.#storingBytes -= plain.length;
    }
  }

  #mayStore(bytes: number): boolean {
    return !this.#closed && this.#disk.ensure() && this.#context.space.take(this.manifestDigest, bytes);
  }

  /** Whether the chunk may be taken away now. */
  isEvictable(index: number): boolean {
    return (
      this.#claims === 0 &&
      this.states.isHere(index) &&
      !this.#flights.has(index) &&
      !this.#disk.isUnrecorded(index) &&
      !this.#context.isPinned(index)
    );
  }

  /** Takes chunks of data away, as far as they are evictable; resolves to the bytes that became free. */
  async evict(indexes: readonly number[]): Promise<number> {
    await this.#evicting;
    if (this.#closed || !this.#disk.direct) return 0;
    const victims = indexes.filter((index) => this.isEvictable(index));
    if (victims.length === 0) return 0;
    this.evictions++;
    for (const index of victims) this.states.lost(index, UNIT_EVICTING);
    this.#evicting = this.#takeAway(victims);
    await this.#evicting;
    const bytes = victims.reduce((sum, index) => sum + diskBytesOf(chunkLengthOf(this.manifest, index)), 0);
    this.#context.space.giveBack(this.manifestDigest, bytes);
    this.figures.evictedChunks += victims.length;
    return bytes;
  }

  async #takeAway(victims: readonly number[]): Promise<void> {
    await this.#context.quiet.quiet();
    await this.#disk.takeAway(victims);
    for (const index of victims) this.states.evicted(index);
  }

  /** A descriptor of a file that is this whole image, checked; nothing of it is evicted until `release`. Undefined
   * when something is missing; what is here and not checked is then checked in the background. `held`: only the
   * promise about eviction, to the kernel that reads the file since before this process. */
  claimWhole(held = false): { readonly fd: number; release(): void } | undefined {
    if (this.#closed || !this.#disk.direct || !(held || this.#isWholeAndChecked())) return undefined;
    this.#claims++;
    let claims = 1;
    const release = () => {
      this.#claims -= claims;
      claims = 0;
      this.states.usedWhole(this.#context.space.generation);
    };
    return { fd: this.#disk.readOnlyFd(), release };
  }

  #isWholeAndChecked(): boolean {
    const { states, recordings } = this;
    // A reader that leaves no marks would be missing in what is being recorded.
    if (recordings.size > 0 || states.firstIn(UNIT_ABSENT) >= 0 || states.firstIn(UNIT_EVICTING) >= 0)
      return false;
    if (states.firstIn(UNIT_UNVERIFIED) < 0) return true;
    this.#verifyingAll ??= this.#verifyAll().finally(() => (this.#verifyingAll = undefined));
    return false;
  }

  async #verifyAll(): Promise<void> {
    for (let at = this.states.firstIn(UNIT_UNVERIFIED); at >= 0 && !this.#closed;) {
      try {
        await this.#obtain(at, false).plain;
      } catch {
        return; // damaged and not to be had again now: its reader hears why
      }
      at = this.states.firstIn(UNIT_UNVERIFIED);
    }
  }

  /** Reads the marks of use. */
  harvest(): void {
    this.states.harvest(this.#context.space.generation, (index) => {
      for (const recording of this.recordings) recording.used(index);
    });
  }

  /** Gives the data file to `work`, which the close waits for; undefined when it is closed or `work` failed. */
  async lend<T>(work: (fd: number) => Promise<T>): Promise<T | undefined> {
    const fd = this.#disk.dataFd;
    if (this.#closed || fd === undefined) return undefined;
    const loan = work(fd).catch(() => undefined);
    this.#loans.add(loan);
    return loan.finally(() => this.#loans.delete(loan));
  }

  /** Bytes of a chunk that is here, when they are what its record says. */
  readChecked(index: number): Promise<Buffer | undefined> {
    return this.lend(() => this.#disk.readChecked(index));
  }

  /** What is written so far is on the disk and in the map, if the disk takes it. */
  commit(): Promise<void> {
    return this.#disk.flush();
  }

  /** Everything that readers have been given so far is on the disk and in the map, if the disk takes it. */
  async flush(): Promise<void> {
    await Promise.all(this.#stores);
    await this.#disk.flush();
  }

  /** Ends flights (they reject with `closed`), commits everything, closes the files. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#disk.stop();
    await Promise.allSettled([...this.#flights.values()].map(({ plain }) => plain));
    await this.#verifyingAll;
    await this.#evicting;
    await this.flush();
    await Promise.all(this.#loans);
    this.states.usage();
    await this.#disk.close();
  }

  #closedError(): GridError {
    return new GridError('closed', `image ${this.manifestDigest.slice(0, 12)} is closed in the cache`);
  }
}
