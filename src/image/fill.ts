/**
 * Filling a layer: everything that its disk shows of frozen layers and the base is copied into it, until it needs
 * neither. The disk is in use meanwhile: `DirectFile.copyUp` takes only blocks that nobody wrote, one claim each.
 *
 * Where the whole base is one local file on a file system that shares extents (XFS, btrfs), ranges are shared
 * (FICLONERANGE) and nothing is copied. Zeros are not copied: a filled layer lies over zeros, so it is opened over
 * an empty base from then on.
 */
import { isAllZero } from '../core/bytes.ts';
import type { DirectFile } from '../core/direct-io.ts';
import { isBelow, pwriteExact, visibleState } from '../core/direct-io.ts';
import { GridError } from '../core/errors.ts';
import { BLOCK_ABSENT } from '../core/image.ts';
import type { Image } from '../core/image.ts';
import { FUSE_REQUEST_BYTES_MAX, LAYER_BLOCK_BYTES } from '../core/limits.ts';
import { ioctl, nextData } from '../core/linux.ts';

const BLOCK = LAYER_BLOCK_BYTES;
const UNIT_BYTES = FUSE_REQUEST_BYTES_MAX;
/** Units read at once: on a long link the next ones are on their way while one is written. */
const READS_MAX = 4;
const FICLONERANGE = 0x4020940d;

export interface FillOptions {
  readonly signal?: AbortSignal;
  /** Where the base is not zeros: [start, end) in bytes, rising. Everywhere when left out. */
  readonly baseRanges?: readonly (readonly [start: number, end: number])[];
  readonly onProgress?: (doneBytes: number, totalBytes: number) => void;
}

/** The part of a clone that is needed here. */
interface FillableDisk {
  readonly sizeBytes: number;
  read(target: Uint8Array, offsetBytes: number): Promise<void>;
  flush(): Promise<void>;
}

/** Throws no-space (also of a quota), closed (cancelled) and what reads of the base throw; what is filled stays. */
export async function fillLayer(
  disk: FillableDisk,
  file: DirectFile,
  base: Image,
  options: FillOptions,
): Promise<void> {
  const states = new Uint8Array(file.map.layer!.states);
  const units = unitsToFill(states, disk.sizeBytes, options.baseRanges);
  const totalBytes = units.length * UNIT_BYTES;
  let doneBytes = 0;
  const whole = await base.claimWhole?.();
  try {
    const fillUnit = whole ? sharing(file, base, whole.fd) : undefined;
    let next = 0;
    const lane = async () => {
      const buffer = Buffer.allocUnsafeSlow(UNIT_BYTES);
      while (next < units.length) {
        if (options.signal?.aborted) throw new GridError('closed', 'the filling of the clone was cancelled');
        const offsetBytes = units[next++]! * UNIT_BYTES;
        const lengthBytes = Math.min(UNIT_BYTES, disk.sizeBytes - offsetBytes);
        if (!fillUnit?.(offsetBytes, lengthBytes)) {
          const bytes = buffer.subarray(0, lengthBytes);
          await disk.read(bytes, offsetBytes);
          // What lies below a block does not change: the same bytes are good for another try.
          while (!copyUnit(file, bytes, offsetBytes)) await new Promise(setImmediate);
        }
        doneBytes += UNIT_BYTES;
        options.onProgress?.(doneBytes, totalBytes);
        // One unit per turn: others' requests come in between.
        await new Promise(setImmediate);
      }
    };
    const lanes = await Promise.allSettled(Array.from({ length: READS_MAX }, lane));
    for (const result of lanes) if (result.status === 'rejected') throw result.reason;
  } finally {
    whole?.release();
  }
  await disk.flush();
}

/** Numbers of units that have something to copy. */
function unitsToFill(
  states: Uint8Array,
  sizeBytes: number,
  baseRanges: FillOptions['baseRanges'] = [[0, sizeBytes]],
): number[] {
  const unitBlocks = UNIT_BYTES / BLOCK;
  const units = new Set<number>();
  for (const [start, end] of baseRanges) {
    for (let unit = Math.floor(start / UNIT_BYTES); unit * UNIT_BYTES < end; unit++) units.add(unit);
  }
  // Frozen blocks are no zeros of the base.
  for (let unit = 0; unit * UNIT_BYTES < sizeBytes; unit++) {
    const part = states.subarray(unit * unitBlocks, (unit + 1) * unitBlocks);
    if (
      !isAllZero(part) &&
      part.some((state) => visibleState(state) !== BLOCK_ABSENT && isBelow(visibleState(state)))
    ) {
      units.add(unit);
    }
  }
  return [...units].toSorted((a, b) => a - b);
}

/** Runs of blocks that are not zeros. False when another thread was at one of them. */
function copyUnit(file: DirectFile, bytes: Buffer, offsetBytes: number): boolean {
  let complete = true;
  const { dataFd } = file.map.layer!;
  const count = Math.ceil(bytes.length / BLOCK);
  const isZero = (block: number) => isAllZero(bytes.subarray(block * BLOCK, (block + 1) * BLOCK));
  for (let block = 0; block < count; block++) {
    const first = block;
    while (block < count && !isZero(block)) block++;
    if (block === first) continue;
    const put = (at: number, lengthBytes: number) => {
      const start = at - offsetBytes;
      pwriteExact(dataFd, bytes.subarray(start, start + lengthBytes), lengthBytes, at);
    };
    if (!file.copyUp(offsetBytes / BLOCK + first, block - first, put)) complete = false;
  }
  return complete;
}

/** Fills a unit by sharing the base file's extents; false when it has to be copied. */
function sharing(
  file: DirectFile,
  base: Image,
  baseFd: number,
): (offsetBytes: number, lengthBytes: number) => boolean {
  const { dataFd } = file.map.layer!;
  const states = new Uint8Array(file.map.layer!.states);
  const request = Buffer.alloc(32);
  let usable = true;
  const share = (at: number, lengthBytes: number) => {
    request.writeBigInt64LE(BigInt(baseFd), 0);
    for (const [i, value] of [at, lengthBytes, at].entries())
      request.writeBigUInt64LE(BigInt(value), 8 + 8 * i);
    ioctl(dataFd, FICLONERANGE, request);
  };
  return (offsetBytes, lengthBytes) => {
    const end = offsetBytes + lengthBytes;
    const first = offsetBytes / BLOCK;
    const last = first + lengthBytes / BLOCK;
    // Not of frozen layers, not of a last block that is short.
    if (!usable || lengthBytes % BLOCK !== 0 || end > base.sizeBytes) return false;
    for (let block = first; block < last; block++) {
      const state = visibleState(states[block]!);
      if (isBelow(state) && state !== BLOCK_ABSENT) return false;
    }
    try {
      for (
        let data = nextData(baseFd, offsetBytes);
        data && data.start < end;
        data = nextData(baseFd, data.end)
      ) {
        const from = Math.floor(data.start / BLOCK);
        const to = Math.min(Math.ceil(data.end / BLOCK), last);
        if (!file.copyUp(from, to - from, share)) return false; // copied, then
      }
      return true;
    } catch (error) {
      if (error instanceof GridError) throw error;
      // Another file system, or one that cannot: everything is copied.
      usable = false;
      return false;
    }
  };
}
