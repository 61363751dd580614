/**
 * A patched chunk: another chunk with some of its blocks replaced. What a commit of few blocks here and there would
 * otherwise read, hash, compress, store and send is sixty times as much: the chunks around them.
 *
 * The blocks of several patched chunks lie one after the other in a *pack*, which is an object like any chunk: named by the
 * SHA-256 of its plain bytes, zstd at rest and on the wire. Which block lies where stands in the chunk table, so a
 * pack is nothing but blocks. A patched chunk has no SHA-256 of its own (to know it, all of it would have to be hashed); its
 * name is that of the patch, which says what it is made of: equal names, equal bytes. No object has that name.
 *
 * Patches do not lie on patches: a chunk that is patched again is a patch of the same chunk with the blocks of both.
 */
import { sha256 } from './bytes.ts';
import type { Digest } from './bytes.ts';
import type { ChunkRef } from './chunk.ts';
import { GridError } from './errors.ts';
import { KIB, LAYER_BLOCK_BYTES } from './limits.ts';

/** What a patch replaces: the block of layers. */
export const PATCH_BLOCK_BYTES = LAYER_BLOCK_BYTES;
/** One bit per block. */
export const PATCHED_CHUNK_BYTES_MAX = 64 * PATCH_BLOCK_BYTES;
/** Blocks of a pack: as long as a chunk, so that the miss of one block does not bring much more than it did. */
export const PACK_BLOCKS_MAX = (256 * KIB) / PATCH_BLOCK_BYTES;

/** An object of a store, and how long it is there. */
export interface StoredObject {
  readonly digest: Digest;
  readonly storedBytes: number;
}

export interface Pack extends StoredObject {
  readonly blocks: number;
}

export interface Patch {
  /** The chunk below, as long as the patched one. */
  readonly base: StoredObject;
  /** Where the blocks of `data` lie, one after the other from `firstBlock`. Undefined where there are none. */
  readonly pack: Pack | undefined;
  readonly firstBlock: number;
  /** Bit i: block i of the chunk comes from the pack. */
  readonly data: bigint;
  /** Bit i: block i of the chunk is zeros. */
  readonly zero: bigint;
}

/** What to ask a source for. */
export function packRefOf({ digest, blocks, storedBytes }: Pack): ChunkRef {
  return { digest, plainBytes: blocks * PATCH_BLOCK_BYTES, storedBytes };
}

/** Numbers of the bits that are set, rising. */
export function* bitsOf(mask: bigint): Generator<number> {
  for (let half = 0; half < 2; half++) {
    let word = Number(BigInt.asUintN(32, mask >> BigInt(32 * half)));
    while (word !== 0) {
      const bit = 31 - Math.clz32(word & -word);
      yield 32 * half + bit;
      word = (word & (word - 1)) >>> 0;
    }
  }
}

export function countOf(mask: bigint): number {
  return bitsIn(Number(BigInt.asUintN(32, mask))) + bitsIn(Number(mask >> 32n));
}

/** How many of a number's 32 bits are set. */
export function bitsIn(word: number): number {
  let count = word - ((word >>> 1) & 0x55555555);
  count = (count & 0x33333333) + ((count >>> 2) & 0x33333333);
  return Math.imul((count + (count >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
}

/** The name of what a patch makes. */
export function patchDigest({ base, pack, firstBlock, data, zero }: Patch): Digest {
  const bytes = Buffer.alloc(32 + 32 + 4 + 8 + 8);
  bytes.write(base.digest, 0, 'hex');
  if (pack) bytes.write(pack.digest, 32, 'hex');
  bytes.writeUInt32LE(firstBlock, 64);
  bytes.writeBigUInt64LE(data, 68);
  bytes.writeBigUInt64LE(zero, 76);
  return sha256(Buffer.concat([Buffer.from('gridvfs patch 1\n'), bytes]));
}

/**
 * Puts the blocks of a patch into `plain`, which holds the chunk below; `pack` are the pack's plain bytes. Throws bad-format
 * where the patch goes beyond either.
 */
export function applyPatch(plain: Uint8Array, patch: Patch, pack: Uint8Array | undefined): void {
  let at = patch.firstBlock * PATCH_BLOCK_BYTES;
  for (const block of bitsOf(patch.data)) {
    const from = pack?.subarray(at, at + PATCH_BLOCK_BYTES);
    if (from?.length !== PATCH_BLOCK_BYTES) throw beyond(patch);
    put(plain, from, block, patch);
    at += PATCH_BLOCK_BYTES;
  }
  for (const block of bitsOf(patch.zero)) put(plain, ZEROS, block, patch);
}

const ZEROS = new Uint8Array(PATCH_BLOCK_BYTES);

function put(plain: Uint8Array, from: Uint8Array, block: number, patch: Patch): void {
  const at = block * PATCH_BLOCK_BYTES;
  if (at + PATCH_BLOCK_BYTES > plain.length) throw beyond(patch);
  plain.set(from, at);
}

function beyond({ base }: Patch): GridError {
  return new GridError(
    'bad-format',
    `a patch of chunk ${base.digest.slice(0, 12)} goes beyond its end or its pack's`,
  );
}
