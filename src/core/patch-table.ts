/**
 * The end of a chunk table of version 2: what its patched chunks are made of (patch.ts). Used as it lies, like the rest.
 *
 * Invariants: patches are in rising order of their entries, replace at least one block each, none twice and none beyond the
 * chunk, and stay within their packs. Who has data has a pack, who has none has none.
 *
 * Bytes (little-endian):
 *   0  4  packCount
 *   4  4  patchCount
 *   8  40 × packCount    { 32 SHA-256 of the plain pack, u32 stored bytes, u32 blocks }
 *   …  28 × patchCount   { u32 entry, u32 pack + 1 (0: none), u32 first block in the pack, u64 blocks of data, u64 of zeros }
 */
import type { Digest } from './bytes.ts';
import type { GridError } from './errors.ts';
import { STORED_OVERHEAD_BYTES_MAX } from './limits.ts';
import { bitsIn, PACK_BLOCKS_MAX, PATCH_BLOCK_BYTES, PATCHED_CHUNK_BYTES_MAX } from './patch.ts';
import type { Pack, Patch, StoredObject } from './patch.ts';

export const PATCH_HEADER_BYTES = 8;
const PACK_BYTES = 40;
const PATCH_BYTES = 28;

export class PatchTable {
  readonly count: number;
  readonly packCount: number;
  readonly #bytes: Buffer;
  readonly #packsAt: number;
  readonly #patchesAt: number;

  /** Checks what lies from `start` to the end of the table. Throws what `bad` makes. */
  constructor(
    bytes: Buffer,
    start: number,
    { chunkBytes, entryCount }: { chunkBytes: number; entryCount: number },
    bad: (why: string) => GridError,
  ) {
    if (chunkBytes > PATCHED_CHUNK_BYTES_MAX) throw bad(`patches of chunks of ${chunkBytes} bytes`);
    this.packCount = bytes.readUInt32LE(start);
    this.count = bytes.readUInt32LE(start + 4);
    this.#bytes = bytes;
    this.#packsAt = start + PATCH_HEADER_BYTES;
    this.#patchesAt = this.#packsAt + this.packCount * PACK_BYTES;
    if (bytes.length !== this.#patchesAt + this.count * PATCH_BYTES) throw bad('wrong length');
    for (let i = 0; i < this.packCount; i++) {
      const { storedBytes, blocks } = this.#lengthsOf(i);
      const storedMax = blocks * PATCH_BLOCK_BYTES + STORED_OVERHEAD_BYTES_MAX;
      if (blocks === 0 || blocks > PACK_BLOCKS_MAX || storedBytes === 0 || storedBytes > storedMax)
        throw bad(`pack ${i} has a wild length`);
    }
    const chunkBlocks = chunkBytes / PATCH_BLOCK_BYTES;
    const beyondLow = chunkBlocks < 32 ? ~0 << chunkBlocks : 0;
    const beyondHigh = chunkBlocks < 64 ? ~0 << Math.max(0, chunkBlocks - 32) : 0;
    let last = -1;
    for (let i = 0; i < this.count; i++) {
      const at = this.#patchesAt + i * PATCH_BYTES;
      const entry = bytes.readUInt32LE(at);
      if (entry <= last || entry >= entryCount) throw bad(`patch ${i} is out of order or range`);
      last = entry;
      const [dataLow, dataHigh, zeroLow, zeroHigh] = [12, 16, 20, 24].map((offset) =>
        bytes.readInt32LE(at + offset),
      ) as [number, number, number, number];
      const low = dataLow | zeroLow;
      const high = dataHigh | zeroHigh;
      if ((dataLow & zeroLow) !== 0 || (dataHigh & zeroHigh) !== 0 || (low | high) === 0)
        throw bad(`patch ${i} replaces nothing, or a block twice`);
      if ((low & beyondLow) !== 0 || (high & beyondHigh) !== 0) throw bad(`patch ${i} is beyond its chunk`);
      const blocks = bitsIn(dataLow) + bitsIn(dataHigh);
      const pack = bytes.readUInt32LE(at + 4);
      if (pack > this.packCount || blocks > 0 !== pack > 0) throw bad(`patch ${i} has no pack of its own`);
      if (pack > 0 && bytes.readUInt32LE(at + 8) + blocks > this.#lengthsOf(pack - 1).blocks)
        throw bad(`patch ${i} is beyond its pack`);
    }
  }

  #lengthsOf(pack: number): { storedBytes: number; blocks: number } {
    const at = this.#packsAt + pack * PACK_BYTES;
    return { storedBytes: this.#bytes.readUInt32LE(at + 32), blocks: this.#bytes.readUInt32LE(at + 36) };
  }

  packAt(pack: number): Pack {
    const at = this.#packsAt + pack * PACK_BYTES;
    return { digest: this.#bytes.toString('hex', at, at + 32), ...this.#lengthsOf(pack) };
  }

  /** The patch of an entry, in which `base` stands. */
  of(entry: number, base: StoredObject): Patch | undefined {
    let low = 0;
    let high = this.count - 1;
    while (low <= high) {
      const middle = (low + high) >>> 1;
      const at = this.#patchesAt + middle * PATCH_BYTES;
      const found = this.#bytes.readUInt32LE(at);
      if (found < entry) low = middle + 1;
      else if (found > entry) high = middle - 1;
      else {
        const pack = this.#bytes.readUInt32LE(at + 4);
        return {
          base,
          pack: pack === 0 ? undefined : this.packAt(pack - 1),
          firstBlock: this.#bytes.readUInt32LE(at + 8),
          data: this.#bytes.readBigUInt64LE(at + 12),
          zero: this.#bytes.readBigUInt64LE(at + 20),
        };
      }
    }
    return undefined;
  }
}

/** Of the patches of all entries, undefined where there is none; undefined when there is none at all. */
export function encodePatches(all: readonly (Patch | undefined)[]): Buffer | undefined {
  const packs = new Map<Digest, { number: number; pack: Pack }>();
  const patches: [entry: number, patch: Patch][] = [];
  for (const [entry, patch] of all.entries()) {
    if (!patch) continue;
    patches.push([entry, patch]);
    const { pack } = patch;
    if (pack && !packs.has(pack.digest)) packs.set(pack.digest, { number: packs.size + 1, pack });
  }
  if (patches.length === 0) return undefined;
  const bytes = Buffer.alloc(PATCH_HEADER_BYTES + packs.size * PACK_BYTES + patches.length * PATCH_BYTES);
  bytes.writeUInt32LE(packs.size, 0);
  bytes.writeUInt32LE(patches.length, 4);
  let at = PATCH_HEADER_BYTES;
  for (const { pack } of packs.values()) {
    bytes.write(pack.digest, at, 32, 'hex');
    bytes.writeUInt32LE(pack.storedBytes, at + 32);
    bytes.writeUInt32LE(pack.blocks, at + 36);
    at += PACK_BYTES;
  }
  for (const [entry, { pack, firstBlock, data, zero }] of patches) {
    bytes.writeUInt32LE(entry, at);
    bytes.writeUInt32LE(pack ? packs.get(pack.digest)!.number : 0, at + 4);
    bytes.writeUInt32LE(firstBlock, at + 8);
    bytes.writeBigUInt64LE(data, at + 12);
    bytes.writeBigUInt64LE(zero, at + 20);
    at += PATCH_BYTES;
  }
  return bytes;
}
