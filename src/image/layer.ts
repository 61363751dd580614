/**
 * A difference layer: the private writes over a base image, in 4 KiB blocks that are absent, data or zero.
 *
 * Writes go through `DirectFile` (src/core/direct-io.ts) in any thread; here is what the main thread alone does.
 *
 * flush, in this order: 1. clear the dirty marks and copy the marked pages of `states` (BUSY counts as what it was
 * before); 2. fdatasync(data); 3. write the copy to the durable map; 4. fdatasync it. Every block that the copy
 * calls DATA had its bytes in the kernel before 2. A copy taken after 2 would also name blocks whose bytes came
 * during the sync: after power loss the map would point at whatever the disk held there, neither old nor new.
 *
 * trim, in steps of one map page, each synchronous (so a flush never sees a half one): 1. claim the blocks
 * (DATA → BUSY_ZERO, ABSENT and FROZEN → their BUSY value); 2. write ZERO to the working map; 3. punch the hole; 4. store ZERO.
 * ZERO is recorded before the hole is punched and covers what lies below, so kill -9 at any point shows either
 * the old block or zeros, and zeros once the trim is acknowledged. The claim is held until the hole is punched, or
 * the punch would hit a write that came after.
 */
import { closeSync, fdatasync, fstatSync, write } from 'node:fs';
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { Digest } from '../core/bytes.ts';
import { busyState, isBusy, mapByteOf, markDirty, pwriteExact, visibleState } from '../core/direct-io.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { BLOCK_ABSENT, BLOCK_BUSY_ZERO, BLOCK_DATA, BLOCK_ZERO } from '../core/image.ts';
import type { DirectLayer, FrozenFile } from '../core/image.ts';
import { LAYER_BLOCK_BYTES } from '../core/limits.ts';
import { nextData, punchHole } from '../core/linux.ts';
import { blockCountOf, HEADER_BYTES, PAGE_BLOCKS } from './layer-format.ts';
import type { LayerHeader } from './layer-format.ts';
import { Snapshot } from './snapshot.ts';

const fdatasyncAsync = promisify(fdatasync);
const writeAsync = promisify(write);

/** Pages of map in one write of a flush: 1 MiB. */
const FLUSH_PAGES_MAX = 256;
/** A block is BUSY while one thread is within a pwrite; a disk that takes longer than this is taken for dead. */
const BUSY_TIMEOUT_MS = 60_000;

/** 8 TiB: what the budget's Int32 holds. A layer with more data than that cannot have a quota that counts right. */
const BLOCKS_UNBOUNDED = 0x7fffffff;

/** In `#prior`: this trim did not claim the block. */
const NOT_CLAIMED = 255;
const ZERO_BYTES = Buffer.alloc(PAGE_BLOCKS, BLOCK_ZERO);

/** The descriptors of an open layer; the data file's carries the lock. */
export interface LayerFiles {
  readonly dataFd: number;
  readonly mapFd: number;
  readonly durableFd: number;
}

/** What of a layer's map is in memory when it is opened. */
export interface LayerMaps {
  readonly states: SharedArrayBuffer;
  readonly dirtyPages: SharedArrayBuffer;
  /** Blocks in state DATA. */
  readonly dataBlocks: number;
  /** Merged into `states` already; their descriptors are closed with the layer. */
  readonly frozen: readonly FrozenFile[];
}

export interface LayerStatistics {
  readonly dataBlocks: number;
  readonly zeroBlocks: number;
  /** What the layer takes on the disk, maps included, as du counts it; without the frozen ones below it. */
  readonly allocatedBytes: number;
}

/** An open layer; `openLayer` in layer-files.ts makes it. Methods are for the main thread. */
export class Layer {
  readonly folder: string;
  /** 32 hexadecimal digits, made with the layer. */
  readonly id: string;
  readonly baseDigest: Digest;
  readonly sizeBytes: number;
  readonly createdMs: number;
  readonly direct: DirectLayer;
  readonly #files: LayerFiles;
  readonly #states: Uint8Array;
  readonly #dirtyPages: Uint8Array;
  readonly #blockCount: number;
  /** What the blocks of the trim step under way were before, by block within the step. */
  readonly #prior = new Uint8Array(PAGE_BLOCKS);
  #runningFlush: Promise<void> | undefined;
  #nextFlush: Promise<void> | undefined;
  readonly #budget: Int32Array;
  #quotaBlocks = BLOCKS_UNBOUNDED;
  #snapshot: Snapshot | undefined;
  #syncFailure: GridError | undefined;
  #closing: Promise<void> | undefined;

  /** Takes the descriptors over. `states` is loaded; nothing is dirty unless `dirtyPages` says so. */
  constructor(folder: string, header: LayerHeader, files: LayerFiles, maps: LayerMaps) {
    const { states, dirtyPages, frozen, dataBlocks } = maps;
    this.folder = folder;
    this.id = header.id;
    this.baseDigest = header.baseDigest;
    this.sizeBytes = header.sizeBytes;
    this.createdMs = header.createdMs;
    this.#files = files;
    this.#states = new Uint8Array(states);
    this.#dirtyPages = new Uint8Array(dirtyPages);
    this.#blockCount = blockCountOf(header.sizeBytes);
    const budget = new SharedArrayBuffer(3 * Int32Array.BYTES_PER_ELEMENT);
    this.#budget = new Int32Array(budget);
    this.#budget[0] = BLOCKS_UNBOUNDED - dataBlocks;
    this.direct = {
      dataFd: files.dataFd,
      mapFd: files.mapFd,
      mapOffsetBytes: HEADER_BYTES,
      blockBytes: LAYER_BLOCK_BYTES,
      states,
      dirtyPages,
      frozen,
      budget,
    };
  }

  /** Bounds the data that the layer may hold, in bytes; undefined: no bound. What is there already stays, also
   * above it. Takes effect at once, in every thread. */
  setQuota(quotaBytes: number | undefined): void {
    const blocks =
      quotaBytes === undefined
        ? BLOCKS_UNBOUNDED
        : Math.min(BLOCKS_UNBOUNDED, Math.floor(quotaBytes / LAYER_BLOCK_BYTES));
    Atomics.add(this.#budget, 0, blocks - this.#quotaBlocks);
    this.#quotaBlocks = blocks;
    Atomics.store(this.#budget, 1, quotaBytes === undefined ? 0 : 1);
  }

  /**
   * The layer's disk as it is now, which includes every write and trim acknowledged before the call and is durable
   * here too when it resolves; until it is closed, direct writes come to the main thread. See snapshot.ts. Throws
   * in-use while there is another, and what `flush` throws.
   */
  async snapshot(quiet: () => Promise<void>, readBase: Snapshot['readOnce']): Promise<Snapshot> {
    this.checkOpen();
    if (Atomics.exchange(this.#budget, 2, 1) === 1) {
      throw new GridError('in-use', `layer ${this.folder} is being read as of a moment already`);
    }
    const release = () => {
      this.#snapshot = undefined;
      Atomics.store(this.#budget, 2, 0);
    };
    let snapshot: Snapshot | undefined;
    try {
      await quiet();
      this.checkOpen();
      this.#snapshot = snapshot = new Snapshot(this, readBase, release);
      await this.flush();
      return snapshot;
    } catch (error) {
      if (snapshot) snapshot.close();
      else release();
      throw error;
    }
  }

  /** Called in the main thread right before it changes blocks `first` to `last`, within the same turn. */
  beforeChange(first: number, last: number): void {
    this.#snapshot?.keep(first, last);
  }

  /**
   * Resolved means: every write and trim acknowledged before the call survives power loss. Calls that come while
   * one runs share the next one. Throws no-space (try again when there is space) and local-io; after a failed sync
   * of the data the kernel may have dropped it, so every later flush of this open fails too.
   */
  flush(): Promise<void> {
    if (this.#closing) return Promise.reject(this.#closedError());
    // A flush that waits has not looked at the marks yet: it covers whatever was acknowledged until now.
    if (this.#nextFlush) return this.#nextFlush;
    if (!this.#runningFlush) return this.#startFlush();
    const startNext = () => {
      this.#nextFlush = undefined;
      return this.#startFlush();
    };
    this.#nextFlush = this.#runningFlush.then(startNext, startNext);
    return this.#nextFlush;
  }

  #startFlush(): Promise<void> {
    this.#runningFlush = this.#flushOnce().finally(() => {
      this.#runningFlush = undefined;
    });
    return this.#runningFlush;
  }

  async #flushOnce(): Promise<void> {
    if (this.#syncFailure) throw this.#syncFailure;
    const runs = this.#takeDirtyRuns();
    try {
      await fdatasyncAsync(this.#files.dataFd);
    } catch (error) {
      this.#syncFailure = asGridError(
        error,
        `cannot sync the data of layer ${this.folder}; what was written since the last flush may be lost`,
      );
      throw this.#syncFailure;
    }
    if (runs.length === 0) return;
    try {
      for (const { page, bytes } of runs) {
        let done = 0;
        while (done < bytes.length) {
          const at = HEADER_BYTES + page * PAGE_BLOCKS + done;
          done += (await writeAsync(this.#files.durableFd, bytes, done, bytes.length - done, at))
            .bytesWritten;
        }
      }
      await fdatasyncAsync(this.#files.durableFd);
    } catch (error) {
      // The next flush writes these pages again, whatever became of them now.
      for (const { page, bytes } of runs) {
        markDirty(this.#dirtyPages, page * PAGE_BLOCKS, page * PAGE_BLOCKS + bytes.length - 1);
      }
      throw asGridError(error, `cannot write the durable map of layer ${this.folder}`);
    }
  }

  /** Step 1 of a flush: neighbouring dirty pages as one copy each, their marks cleared. Synchronous. */
  #takeDirtyRuns(): { page: number; bytes: Buffer }[] {
    const dirty = this.#dirtyPages;
    const runs: { page: number; bytes: Buffer }[] = [];
    for (let page = 0; page < dirty.length; page++) {
      const start = page;
      // The mark goes before the copy is made: a block published in between sets it again.
      while (
        page < dirty.length &&
        page - start < FLUSH_PAGES_MAX &&
        Atomics.load(dirty, page) === 1 &&
        Atomics.exchange(dirty, page, 0) === 1
      ) {
        page++;
      }
      if (page === start) continue;
      const end = Math.min(page * PAGE_BLOCKS, this.#blockCount);
      const bytes = Buffer.from(this.#states.slice(start * PAGE_BLOCKS, end).buffer);
      for (let i = 0; i < bytes.length; i++) {
        if (bytes[i]! > BLOCK_ZERO) bytes[i] = mapByteOf(bytes[i]!);
      }
      runs.push({ page: start, bytes });
      page--;
    }
    return runs;
  }

  /**
   * Blocks `first` to `last` read as zeros from now on and give their space back. Absent blocks from number
   * `zeroBaseFrom` on, where the base has ended, are zeros already and stay as they are. Throws no-space (of the
   * map; blocks of the failed step are as before).
   */
  async trimBlocks(first: number, last: number, zeroBaseFrom: number): Promise<void> {
    let at = first;
    while (at <= last) {
      this.checkOpen();
      const stepLast = Math.min(last, at - (at % PAGE_BLOCKS) + PAGE_BLOCKS - 1);
      at = this.#trimStep(at, stepLast, zeroBaseFrom);
      if (at <= stepLast) await this.waitWhileBusy(at);
      else if (at <= last) await nextTurn();
    }
  }

  /** One step within one map page; returns the block to go on with: that which another thread has, or last + 1. */
  #trimStep(first: number, last: number, zeroBaseFrom: number): number {
    const states = this.#states;
    const prior = this.#prior;
    let next = first;
    let claimed = 0;
    for (; next <= last; next++) {
      let was = NOT_CLAIMED;
      const state = Atomics.load(states, next);
      if (isBusy(state)) break;
      if (state !== BLOCK_ZERO && (state !== BLOCK_ABSENT || next < zeroBaseFrom)) {
        const busy = state === BLOCK_DATA ? BLOCK_BUSY_ZERO : busyState(state);
        if (Atomics.compareExchange(states, next, state, busy) !== state) break;
        was = state;
        claimed++;
      }
      prior[next - first] = was;
    }
    if (claimed === 0) return next;
    this.beforeChange(first, next - 1);
    const count = next - first;
    const { mapFd, dataFd } = this.#files;
    try {
      eachRun(prior, count, isClaimed, (start, length) =>
        pwriteExact(mapFd, ZERO_BYTES, length, HEADER_BYTES + first + start),
      );
    } catch (error) {
      this.#undoTrim(first, count);
      throw asGridError(error, `cannot write the map of layer ${this.folder}`);
    }
    eachRun(prior, count, wasData, (start, length) => {
      try {
        punchHole(dataFd, (first + start) * LAYER_BLOCK_BYTES, length * LAYER_BLOCK_BYTES);
      } catch {
        // The blocks are zeros by the map; a file system that cannot punch only keeps the space.
      }
    });
    let freed = 0;
    for (let i = 0; i < count; i++) {
      if (!isClaimed(prior[i]!)) continue;
      Atomics.store(states, first + i, BLOCK_ZERO);
      if (wasData(prior[i]!)) freed++;
    }
    Atomics.add(this.#budget, 0, freed);
    markDirty(this.#dirtyPages, first, next - 1);
    return next;
  }

  /** States and, as far as the full disk lets us, map bytes as they were before the step. */
  #undoTrim(first: number, count: number): void {
    const before = Buffer.alloc(1);
    for (let i = 0; i < count; i++) {
      if (!isClaimed(this.#prior[i]!)) continue;
      before[0] = mapByteOf(this.#prior[i]!);
      try {
        pwriteExact(this.#files.mapFd, before, 1, HEADER_BYTES + first + i);
      } catch {
        // After a crash this block shows zeros: the trim failed half done.
      }
      Atomics.store(this.#states, first + i, this.#prior[i]!);
    }
  }

  /** Resolves when no thread is filling `block`. The caller holds no claim. Throws timeout. */
  async waitWhileBusy(block: number): Promise<void> {
    const deadline = performance.now() + BUSY_TIMEOUT_MS;
    for (let round = 0; isBusy(Atomics.load(this.#states, block)); round++) {
      if (performance.now() > deadline) {
        throw new GridError(
          'timeout',
          `block ${block} of layer ${this.folder} has been in the middle of a write for ${BUSY_TIMEOUT_MS / 1000} s; check the disk`,
        );
      }
      // A pwrite into the page cache is over in microseconds; one that waits for the disk is not.
      if (round < 100) await nextTurn();
      else await sleep(1);
      this.checkOpen();
    }
  }

  /** Counts and space as of now. Cost: the parts of the map that are in use. */
  statistics(): LayerStatistics {
    this.checkOpen();
    let dataBlocks = 0;
    let zeroBlocks = 0;
    // By the file's extents: where the map is a hole, every block is absent.
    for (let at = HEADER_BYTES; ;) {
      const extent = nextData(this.#files.mapFd, at);
      if (!extent) break;
      for (let block = extent.start - HEADER_BYTES; block < extent.end - HEADER_BYTES; block++) {
        const state = visibleState(this.#states[block]!);
        if (state === BLOCK_DATA) dataBlocks++;
        else if (state === BLOCK_ZERO) zeroBlocks++;
      }
      at = extent.end;
    }
    let allocatedBytes = 0;
    for (const fd of Object.values(this.#files) as number[]) allocatedBytes += fstatSync(fd).blocks * 512;
    return { dataBlocks, zeroBlocks, allocatedBytes };
  }

  /** Throws closed after `close`: the descriptors' numbers may belong to other files by then. */
  checkOpen(): void {
    if (this.#closing) throw this.#closedError();
  }

  #closedError(): GridError {
    return new GridError('closed', `layer ${this.folder} is closed`);
  }

  /** Waits for the flush under way and releases files and lock. Does not flush. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      await Promise.allSettled([this.#runningFlush, this.#nextFlush]);
      for (const fd of Object.values(this.#files) as number[]) closeSync(fd);
      for (const { fd } of this.direct.frozen ?? []) closeSync(fd);
    })();
    return this.#closing;
  }
}

const isClaimed = (was: number): boolean => was !== NOT_CLAIMED;
const wasData = (was: number): boolean => was === BLOCK_DATA;

/** Calls `visit` for each longest run of the first `count` bytes that `matches`. */
function eachRun(
  bytes: Uint8Array,
  count: number,
  matches: (byte: number) => boolean,
  visit: (start: number, length: number) => void,
): void {
  for (let i = 0; i < count; i++) {
    const start = i;
    while (i < count && matches(bytes[i]!)) i++;
    if (i > start) visit(start, i - start);
  }
}
