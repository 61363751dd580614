/**
 * Reading and writing through a `DirectMap`: synchronous system calls only, so that the worker threads of a
 * frontend and the main thread run the very same code. `false` means "not here": the caller hands the request
 * to `Image.read`/`Image.write` in the main thread. Nothing is allocated per request; one READ that is all in one
 * file costs one pread, runs of different origin one each; a write costs one pwrite, and one more for the map
 * when it fills blocks for the first time.
 *
 * Why concurrent writers are safe (steps of a write: at `DirectLayer` in image.ts; trim: src/image/layer.ts):
 *  - Whoever turns a block into DATA, or DATA into ZERO, holds its BUSY value first. It remembers which blocks it
 *    claimed and publishes or releases exactly these: a block that was DATA when looked at may have been trimmed
 *    and claimed by another since.
 *  - Claims are held over synchronous code only, and nobody waits while holding one: no deadlock, no claim that
 *    outlives a slow network.
 *  - The bytes are in the kernel before the map byte, the map byte before `states` says DATA: whoever sees DATA
 *    (to read, to overwrite without a map write, to flush) may rely on both. So kill -9 loses nothing that was
 *    acknowledged, and a flush that copies `states` first and syncs the data next never records a block whose
 *    bytes were not yet there.
 *  - A first write covers its whole block, so what a trim, a failed write or a lost power left in the data file
 *    below an ABSENT or ZERO block is never seen.
 *  - A write that saw DATA and runs while a trim of that block does: either order is right, they overlap.
 *
 * A failing system call throws Node's error with its errno in `code`; our own refusals are GridErrors.
 */
import { fstatSync, readSync, writeSync } from 'node:fs';
import {
  BLOCK_ABSENT,
  BLOCK_BUSY_ABSENT,
  BLOCK_BUSY_FROZEN,
  BLOCK_BUSY_ZERO,
  BLOCK_DATA,
  BLOCK_FROZEN,
  BLOCK_ZERO,
  UNIT_PRESENT,
  UNIT_UNVERIFIED,
} from './image.ts';
import type { DirectLayer, DirectMap } from './image.ts';
import { chunkHash } from './chunk-hash.ts';
import { DiskAhead } from './disk-ahead.ts';
import { noteRange } from './unit-notes.ts';
import { Usage } from './usage.ts';
import { GridError } from './errors.ts';
import { FUSE_REQUEST_BYTES_MAX, LAYER_BLOCK_BYTES, WRITE_PIECE_BYTES } from './limits.ts';

/** Most blocks that one direct write touches: a largest request that starts in the middle of a block. */
const WRITE_BLOCKS_MAX = FUSE_REQUEST_BYTES_MAX / LAYER_BLOCK_BYTES + 1;

/** A unit while this thread hashes it: one for all files, as large as the largest unit so far. */
let scratch = Buffer.alloc(0);

const DATA_BYTES = Buffer.alloc(WRITE_BLOCKS_MAX, BLOCK_DATA);

/** Writes a range of a layer's data file. */
export type PutRange = (offsetBytes: number, lengthBytes: number) => void;

/** The views a thread needs on a map's shared arrays: made once per open, not per request. Not reentrant, and
 * need not be: its methods never wait for another. */
export class DirectFile {
  readonly map: DirectMap;
  /** Where the caller counts what it answers. */
  readonly usage: Usage | undefined;
  readonly #unitStates: Uint8Array;
  readonly #touched: Uint8Array;
  readonly #notes: Uint8Array | undefined;
  /** Undefined where nobody reads ahead. */
  readonly #ahead: DiskAhead | undefined;
  /** What UNVERIFIED units are hashed against; undefined where this object leaves that to the main thread. */
  readonly #hashes: BigUint64Array | undefined;
  /** Where the base's own file ends: beyond it a read is zeros, before it a short read is damage. */
  readonly #baseFileBytes: number;
  readonly #blockStates: Uint8Array | undefined;
  readonly #dirtyPages: Uint8Array | undefined;
  readonly #budget: Int32Array | undefined;
  readonly #obeysHold: boolean;
  readonly #frozenFds: Int32Array;
  readonly #frozenBytes: Float64Array;
  /** 1 for each block of the write under way that this object claimed. */
  readonly #claims = new Uint8Array(WRITE_BLOCKS_MAX);

  /**
   * `met`: of disk-ahead.ts, a byte for each unit of the base.
   * `verifies`: units not yet checked are read and hashed here, which takes as long as their disk does; not for a
   * main thread. `obeysHold` false: whoever holds writes (`budget` of `DirectLayer`) uses this very object for those
   * that come to it. Throws EBADF when the base's descriptor is closed.
   */
  constructor(
    map: DirectMap,
    {
      verifies = false,
      obeysHold = true,
      met,
    }: { verifies?: boolean; obeysHold?: boolean; met?: SharedArrayBuffer | undefined } = {},
  ) {
    this.map = map;
    this.#obeysHold = obeysHold;
    if (map.usage) this.usage = new Usage(map.usage);
    this.#unitStates = new Uint8Array(map.base.states);
    this.#touched = new Uint8Array(map.base.touched);
    if (map.base.notes) this.#notes = new Uint8Array(map.base.notes);
    if (met) this.#ahead = new DiskAhead(map.base, met);
    if (verifies && map.base.hashes) this.#hashes = new BigUint64Array(map.base.hashes);
    const frozen = map.layer?.frozen ?? [];
    this.#frozenFds = Int32Array.from(frozen, ({ fd }) => fd);
    this.#frozenBytes = Float64Array.from(frozen, ({ sizeBytes }) => sizeBytes);
    this.#baseFileBytes = map.base.fd < 0 ? 0 : fstatSync(map.base.fd).size;
    if (map.layer) {
      this.#blockStates = new Uint8Array(map.layer.states);
      this.#dirtyPages = new Uint8Array(map.layer.dirtyPages);
      if (map.layer.budget) this.#budget = new Int32Array(map.layer.budget);
    }
  }

  /** Fills `target` from `offsetBytes` when all of it is on this host; false leaves `target` in any state.
   * Throws bad-request outside the image, local-io when a file is shorter than it must be. */
  read(target: Uint8Array, offsetBytes: number): boolean {
    this.#checkRange(target.length, offsetBytes);
    const layer = this.map.layer;
    if (!layer) return this.#readBase(target, 0, target.length, offsetBytes);
    const states = this.#blockStates!;
    const { blockBytes, dataFd } = layer;
    const end = offsetBytes + target.length;
    let at = offsetBytes;
    while (at < end) {
      let block = Math.floor(at / blockBytes);
      const kind = visibleState(Atomics.load(states, block));
      let runEnd = ++block * blockBytes;
      while (runEnd < end && visibleState(Atomics.load(states, block)) === kind)
        runEnd = ++block * blockBytes;
      if (runEnd > end) runEnd = end;
      const targetAt = at - offsetBytes;
      if (kind === BLOCK_DATA) preadExact(dataFd, target, targetAt, runEnd - at, at);
      else if (kind === BLOCK_ZERO) target.fill(0, targetAt, targetAt + runEnd - at);
      else if (kind >= BLOCK_FROZEN) {
        const fd = this.#frozenFds[kind - BLOCK_FROZEN]!;
        const fileBytes = this.#frozenBytes[kind - BLOCK_FROZEN]!;
        if (runEnd <= fileBytes) preadExact(fd, target, targetAt, runEnd - at, at);
        else preadThenZeros(fd, fileBytes, target, targetAt, runEnd - at, at);
      } else if (!this.#readBase(target, targetAt, runEnd - at, at)) return false;
      at = runEnd;
    }
    return true;
  }

  /** The one file that the whole range can be read from at its own offset, for a caller that moves bytes without
   * looking at them; -1 when it is not that simple: then `read` it. */
  sourceOf(offsetBytes: number, lengthBytes: number): number {
    this.#checkRange(lengthBytes, offsetBytes);
    const end = offsetBytes + lengthBytes;
    let kind = BLOCK_ABSENT;
    const layer = this.map.layer;
    if (layer) {
      const states = this.#blockStates!;
      let block = Math.floor(offsetBytes / layer.blockBytes);
      kind = visibleState(Atomics.load(states, block));
      while (++block * layer.blockBytes < end) {
        if (visibleState(Atomics.load(states, block)) !== kind) return -1;
      }
    }
    if (kind === BLOCK_DATA) return layer!.dataFd;
    if (kind === BLOCK_ZERO) return -1;
    if (kind >= BLOCK_FROZEN) {
      return end <= this.#frozenBytes[kind - BLOCK_FROZEN]! ? this.#frozenFds[kind - BLOCK_FROZEN]! : -1;
    }
    return end <= this.#baseFileBytes && this.#isPresent(offsetBytes, lengthBytes) ? this.map.base.fd : -1;
  }

  #readBase(target: Uint8Array, targetAt: number, lengthBytes: number, offsetBytes: number): boolean {
    if (lengthBytes === 0) return true;
    if (!this.#isPresent(offsetBytes, lengthBytes)) return false;
    preadThenZeros(this.map.base.fd, this.#baseFileBytes, target, targetAt, lengthBytes, offsetBytes);
    return true;
  }

  /** Whether all units of a range of the base that is not empty are here; they count as touched then. */
  #isPresent(offsetBytes: number, lengthBytes: number): boolean {
    const { unitBytes } = this.map.base;
    const states = this.#unitStates;
    const last = Math.min(Math.floor((offsetBytes + lengthBytes - 1) / unitBytes), states.length - 1);
    for (let unit = Math.floor(offsetBytes / unitBytes); unit <= last; unit++) {
      const state = Atomics.load(states, unit);
      if (state !== UNIT_PRESENT && !(state === UNIT_UNVERIFIED && this.#verify(unit))) return false;
      this.#touched[unit] = 1;
      if (this.#notes) {
        const start = unit * unitBytes;
        const from = Math.max(0, offsetBytes - start);
        noteRange(this.#notes, unit, unitBytes, from, Math.min(unitBytes, offsetBytes + lengthBytes - start));
      }
      this.#ahead?.note(unit);
    }
    return true;
  }

  /** For the owner to call when whoever asked has what was read: see disk-ahead.ts. */
  readAhead(): void {
    this.#ahead?.go();
  }

  /** Makes an UNVERIFIED unit PRESENT if its bytes are right; true when it is PRESENT now, whoever did it. */
  #verify(unit: number): boolean {
    const expected = this.#hashes === undefined ? 0n : Atomics.load(this.#hashes, unit);
    if (expected === 0n) return false;
    const { unitBytes, fd } = this.map.base;
    const start = unit * unitBytes;
    const lengthBytes = Math.min(unitBytes, this.#baseFileBytes - start);
    if (scratch.length < lengthBytes) scratch = Buffer.alloc(unitBytes);
    preadExact(fd, scratch, 0, lengthBytes, start);
    if (chunkHash(scratch.subarray(0, lengthBytes)) !== expected) return false;
    // Not a store: it may be EVICTING by now, or found damaged by the main thread.
    Atomics.compareExchange(this.#unitStates, unit, UNIT_UNVERIFIED, UNIT_PRESENT);
    return Atomics.load(this.#unitStates, unit) === UNIT_PRESENT;
  }

  /** Writes `source` when no block needs bytes of the base, no other thread is filling one of its blocks and it
   * is at most one FUSE request long. When it throws, blocks seen for the first time are as before; blocks that
   * already had data may hold any part of `source`, as on a disk. Throws read-only, bad-request, ENOSPC, … */
  write(source: Uint8Array, offsetBytes: number): boolean {
    const layer = this.map.layer;
    if (!layer) throw new GridError('read-only', 'write to an image; write to a clone of it instead');
    this.#checkRange(source.length, offsetBytes);
    if (source.length === 0) return true;
    if (this.#obeysHold && this.#budget && Atomics.load(this.#budget, 2) === 1) return false;
    const states = this.#blockStates!;
    const { blockBytes } = layer;
    const end = offsetBytes + source.length;
    const first = Math.floor(offsetBytes / blockBytes);
    const last = Math.floor((end - 1) / blockBytes);
    if (last - first >= WRITE_BLOCKS_MAX) return false;
    let claimed = 0;
    for (let block = first; block <= last; block++) {
      const isData = Atomics.load(states, block) === BLOCK_DATA;
      this.#claims[block - first] = isData ? 0 : 1;
      if (isData) continue;
      const partial =
        (block === first && offsetBytes % blockBytes !== 0) ||
        (block === last && end % blockBytes !== 0 && end !== this.map.sizeBytes);
      if (partial || !claimBlock(states, block)) {
        this.#release(first, block - first);
        return false;
      }
      claimed++;
    }
    if (claimed > 0) this.#charge(first, last - first + 1, claimed);
    this.#commit(layer, source, offsetBytes, first, last - first + 1, claimed);
    return true;
  }

  /**
   * The first write of one block, whole: `bytes` is the block's content (short only at the image's end). Done
   * only if the block still is `expected` (ABSENT, ZERO or FROZEN) when it is claimed; else false, and the
   * caller looks again. For partly covered blocks, whose other bytes the caller took from what it expects.
   * Throws no-space and what the disk says; the block is as before then.
   */
  fillBlock(block: number, expected: number, bytes: Uint8Array): boolean {
    const layer = this.map.layer!;
    const busy = busyState(expected);
    if (Atomics.compareExchange(this.#blockStates!, block, expected, busy) !== expected) return false;
    this.#claims[0] = 1;
    this.#charge(block, 1, 1);
    this.#commit(layer, bytes, block * layer.blockBytes, block, 1, 1);
    return true;
  }

  /**
   * Copies what lies below up: each of the `count` blocks from `first` on that is ABSENT or FROZEN becomes DATA, the
   * others stay as they are. `put` writes the given range of the data file, with what such blocks show there, while
   * they are claimed; it is synchronous. At most one FUSE request. False when another thread was filling a block:
   * it may be as it was before, so the caller comes again. Throws no-space and what `put` throws; runs of blocks
   * before that are done.
   */
  copyUp(first: number, count: number, put: PutRange): boolean {
    const layer = this.map.layer!;
    const states = this.#blockStates!;
    const { blockBytes } = layer;
    let complete = true;
    for (let i = 0; i < count; i++) {
      const start = i;
      while (i < count) {
        const state = Atomics.load(states, first + i);
        // Exactly what was looked at: a block that was trimmed in between is zeros now.
        if (isBusy(state)) complete = false;
        if (!isBelow(state)) break;
        if (Atomics.compareExchange(states, first + i, state, busyState(state)) !== state) {
          complete = false;
          break;
        }
        this.#claims[i++ - start] = 1;
      }
      if (i === start) continue;
      this.#charge(first + start, i - start, i - start);
      this.#commit(layer, put, (first + start) * blockBytes, first + start, i - start, i - start);
    }
    return complete;
  }

  /** Takes claimed blocks from the budget; undoes the claims when it does not have them. */
  #charge(first: number, count: number, claimed: number): void {
    const budget = this.#budget;
    if (!budget) return;
    if (Atomics.sub(budget, 0, claimed) >= claimed || Atomics.load(budget, 1) === 0) return;
    Atomics.add(budget, 0, claimed);
    this.#release(first, count);
    throw new GridError(
      'no-space',
      'the quota of the clone is full; raise it with `gridvfs clone set --quota`, or trim what is not needed',
    );
  }

  /** Steps 2 to 5 of a write whose claims are taken; undoes the claims when one fails. */
  #commit(
    layer: DirectLayer,
    source: Uint8Array | PutRange,
    offsetBytes: number,
    first: number,
    count: number,
    claimed: number,
  ): void {
    let mapTouched = false;
    try {
      if (typeof source === 'function') {
        source(offsetBytes, Math.min(count * layer.blockBytes, this.map.sizeBytes - offsetBytes));
      } else pwriteExact(layer.dataFd, source, source.length, offsetBytes);
      if (claimed === 0) return;
      mapTouched = true;
      this.#writeMap(layer, first, count);
    } catch (error) {
      if (mapTouched) this.#restoreMap(layer, first, count);
      this.#release(first, count);
      if (this.#budget) Atomics.add(this.#budget, 0, claimed);
      throw error;
    }
    for (let i = 0; i < count; i++) {
      if (this.#claims[i] === 1) Atomics.store(this.#blockStates!, first + i, BLOCK_DATA);
    }
    // After the states: a flush that clears a mark too early finds it set again.
    markDirty(this.#dirtyPages!, first, first + count - 1);
  }

  /** One pwrite for each run of blocks that were claimed. */
  #writeMap(layer: DirectLayer, first: number, count: number): void {
    for (let i = 0; i < count; i++) {
      const start = i;
      while (i < count && this.#claims[i] === 1) i++;
      if (i > start) pwriteExact(layer.mapFd, DATA_BYTES, i - start, layer.mapOffsetBytes + first + start);
    }
  }

  /** Part of the map bytes may be written when a disk is full: put them back, as far as it lets us. Those that
   * resist show the new bytes after a crash, which a failed write may. */
  #restoreMap(layer: DirectLayer, first: number, count: number): void {
    const before = Buffer.alloc(1);
    for (let i = 0; i < count; i++) {
      if (this.#claims[i] !== 1) continue;
      before[0] = mapByteOf(Atomics.load(this.#blockStates!, first + i));
      try {
        pwriteExact(layer.mapFd, before, 1, layer.mapOffsetBytes + first + i);
      } catch {
        // As said above.
      }
    }
  }

  #release(first: number, count: number): void {
    for (let i = 0; i < count; i++) {
      if (this.#claims[i] === 1) releaseBlock(this.#blockStates!, first + i);
    }
  }

  #checkRange(lengthBytes: number, offsetBytes: number): void {
    const { sizeBytes } = this.map;
    if (Number.isSafeInteger(offsetBytes) && offsetBytes >= 0 && lengthBytes <= sizeBytes - offsetBytes)
      return;
    throw outOfRange(offsetBytes, lengthBytes, sizeBytes);
  }
}

/** The bad-request of a range that is not within the image. */
export function outOfRange(offsetBytes: number, lengthBytes: number, sizeBytes: number): GridError {
  return new GridError(
    'bad-request',
    `${lengthBytes} bytes at offset ${offsetBytes} are not within the image of ${sizeBytes} bytes`,
  );
}

/** What a reader (and a flush) sees of a state: a block being filled still has its old content. */
export function visibleState(state: number): number {
  if (state <= BLOCK_ZERO) return state;
  if (state >= BLOCK_BUSY_FROZEN) return state - BLOCK_BUSY_FROZEN;
  if (state === BLOCK_BUSY_ABSENT) return BLOCK_ABSENT;
  if (state === BLOCK_BUSY_ZERO) return BLOCK_ZERO;
  return state;
}

/** Whether some thread is filling the block. */
export function isBusy(state: number): boolean {
  return state === BLOCK_BUSY_ABSENT || state === BLOCK_BUSY_ZERO || state >= BLOCK_BUSY_FROZEN;
}

/** Whether the layer itself says nothing of the block: its content is a frozen layer's or the base's. */
export function isBelow(state: number): boolean {
  return state === BLOCK_ABSENT || (state >= BLOCK_FROZEN && state < BLOCK_BUSY_FROZEN);
}

/** What the map file of the layer says of a block: what lies in frozen layers is absent from it. */
export function mapByteOf(state: number): number {
  const visible = visibleState(state);
  return visible >= BLOCK_FROZEN ? BLOCK_ABSENT : visible;
}

/** The BUSY value of ABSENT, ZERO or FROZEN. */
export function busyState(state: number): number {
  if (state >= BLOCK_FROZEN) return state + BLOCK_BUSY_FROZEN;
  return state === BLOCK_ABSENT ? BLOCK_BUSY_ABSENT : BLOCK_BUSY_ZERO;
}

/** ABSENT, ZERO or FROZEN → its BUSY value; false when the block is DATA, another has it or changed it. */
export function claimBlock(states: Uint8Array, block: number): boolean {
  const state = Atomics.load(states, block);
  if (state === BLOCK_DATA || isBusy(state)) return false;
  return Atomics.compareExchange(states, block, state, busyState(state)) === state;
}

/** Undoes `claimBlock`; only for a block that the caller claimed. */
export function releaseBlock(states: Uint8Array, block: number): void {
  Atomics.store(states, block, visibleState(Atomics.load(states, block)));
}

/** Marks the map pages of blocks `first` to `last` as changed since the last flush. */
export function markDirty(dirtyPages: Uint8Array, first: number, last: number): void {
  for (let page = first >>> 12; page <= last >>> 12; page++) Atomics.store(dirtyPages, page, 1);
}

/** The range of a file of `fileBytes` that may end before it: what lies beyond reads as zeros. */
function preadThenZeros(
  fd: number,
  fileBytes: number,
  target: Uint8Array,
  targetAt: number,
  lengthBytes: number,
  offsetBytes: number,
): void {
  const inFile = Math.max(0, Math.min(lengthBytes, fileBytes - offsetBytes));
  if (inFile > 0) preadExact(fd, target, targetAt, inFile, offsetBytes);
  if (inFile < lengthBytes) target.fill(0, targetAt + inFile, targetAt + lengthBytes);
}

/** pread(2) of exactly `lengthBytes` into `target` from `targetAt`; local-io when the file ends before that.
 * (libuv repeats calls that a signal interrupted.) */
export function preadExact(
  fd: number,
  target: Uint8Array,
  targetAt: number,
  lengthBytes: number,
  offsetBytes: number,
): void {
  let done = 0;
  while (done < lengthBytes) {
    const count = readSync(fd, target, targetAt + done, lengthBytes - done, offsetBytes + done);
    if (count === 0) {
      throw new GridError(
        'local-io',
        `a file of the image ends at ${offsetBytes + done}, before its data does`,
      );
    }
    done += count;
  }
}

/** pwrite(2) until the first `lengthBytes` of `source` are written, in pieces (WRITE_PIECE_BYTES). */
export function pwriteExact(fd: number, source: Uint8Array, lengthBytes: number, offsetBytes: number): void {
  let done = 0;
  while (done < lengthBytes) {
    const at = offsetBytes + done;
    const piece = Math.min(lengthBytes - done, WRITE_PIECE_BYTES - (at % WRITE_PIECE_BYTES));
    done += writeSync(fd, source, done, piece, at);
  }
}

/** pread(2) until `target` is full; what lies beyond the end of the file reads as zeros. */
export function preadFull(fd: number, target: Uint8Array, offsetBytes: number): void {
  let done = 0;
  while (done < target.length) {
    const count = readSync(fd, target, done, target.length - done, offsetBytes + done);
    if (count === 0) {
      target.fill(0, done);
      return;
    }
    done += count;
  }
}

/** pwrite(2) until all of `source` is written. */
export function pwriteFull(fd: number, source: Uint8Array, offsetBytes: number): void {
  pwriteExact(fd, source, source.length, offsetBytes);
}
