/**
 * Which of the changed chunks of a new version become patches of the parent's (core/patch.ts), and their packs. A chunk of
 * which few blocks changed is not read, hashed, compressed and sent again; its blocks go into a pack.
 *
 * A pack holds the blocks of neighbouring chunks, in groups that lie at fixed places of the disk: where a version is made
 * again with a little more changed, as a pushed clone is, the other packs are the same and are not sent again.
 */
import { LRUCache } from 'lru-cache';
import { isAllZero } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import type { NewEntry } from '../core/chunk-table.ts';
import { decodeChunk } from '../core/chunk.ts';
import type { ChunkRef } from '../core/chunk.ts';
import { invariant } from '../core/errors.ts';
import { CHUNK_BYTES_DEFAULT, MIB } from '../core/limits.ts';
import { chunkLengthOf } from '../core/manifest.ts';
import {
  bitsOf,
  countOf,
  PACK_BLOCKS_MAX,
  packRefOf,
  PATCH_BLOCK_BYTES,
  PATCHED_CHUNK_BYTES_MAX,
} from '../core/patch.ts';
import type { Pack, Patch, StoredObject } from '../core/patch.ts';
import type { ChunkSource } from '../core/source.ts';
import type { ChunkBelow, Changes } from './new-version.ts';

const BLOCK = PATCH_BLOCK_BYTES;
/** Of a chunk's blocks: from here on the whole costs a reader less, who fetches it once and not two objects. */
const PATCHED_SHARE_MAX = 1 / 4;
/** Chunks whose blocks may share a pack. */
const GROUP_CHUNKS = (8 * MIB) / CHUNK_BYTES_DEFAULT;

/** Packs for chunks of one place that did not change; from here on they are packed together, if that makes them fewer. */
const PLACE_PACKS_MAX = 4;
/** Between two turns of the event loop: some milliseconds of it. */
const INDEXES_PER_TURN = 4096;
/** 4 MiB at most. */
const PACKS_BELOW_MAX = 16;

interface PatchedChunk {
  readonly index: number;
  readonly base: StoredObject;
  /** Blocks that changed, and with them those that the parent's patch replaces. */
  readonly own: bigint;
  readonly blocks: bigint;
  readonly old: Patch | undefined;
}

/** Chunks to be patched whose blocks share a pack. */
export interface PatchGroup {
  readonly chunks: readonly PatchedChunk[];
  readonly blockCount: number;
}

export interface SplitChanges {
  /** Rising, of chunks that are packed as a whole. */
  readonly whole: readonly number[];
  readonly groups: readonly PatchGroup[];
}

/**
 * `isChanged`: of a block of the disk, by its number. Where the parent has patches of many packs in the place of a group, all of
 * them are packed anew with it: so no version needs more than a few packs for a place, however often it was committed to.
 */
export async function splitChanges(
  { indexes, size, below }: Pick<Changes, 'indexes' | 'size' | 'below'>,
  isChanged: (block: number) => boolean,
): Promise<SplitChanges> {
  if (size.chunkBytes > PATCHED_CHUNK_BYTES_MAX) return { whole: indexes, groups: [] };
  const whole: number[] = [];
  const places = new Map<number, PatchedChunk[]>();
  for (const [i, index] of indexes.entries()) {
    if (i % INDEXES_PER_TURN === INDEXES_PER_TURN - 1) await new Promise(setImmediate);
    const chunk = patchedChunk(index, size, below(index), isChanged);
    if (!chunk) {
      whole.push(index);
      continue;
    }
    const place = Math.floor(index / GROUP_CHUNKS);
    const there = places.get(place);
    if (there) there.push(chunk);
    else places.set(place, [chunk]);
  }
  const changed = new Set(indexes);
  const groups: { chunks: PatchedChunk[]; blockCount: number }[] = [];
  for (const [place, chunks] of places) {
    const others: PatchedChunk[] = [];
    for (let index = place * GROUP_CHUNKS; index < (place + 1) * GROUP_CHUNKS; index++) {
      const there = changed.has(index) ? undefined : below(index);
      const chunk = there?.patch && patchedChunk(index, size, there, () => false);
      if (chunk) others.push(chunk);
    }
    if (isScattered(others)) chunks.push(...others);
    chunks.sort((one, other) => one.index - other.index);
    let group: (typeof groups)[number] | undefined;
    for (const chunk of chunks) {
      const blockCount = countOf(chunk.blocks);
      if (!group || group.blockCount + blockCount > PACK_BLOCKS_MAX)
        groups.push((group = { chunks: [], blockCount: 0 }));
      group.chunks.push(chunk);
      group.blockCount += blockCount;
    }
  }
  return { whole, groups };
}

/** Whether chunks that did not change have their blocks in many more packs than they need. */
function isScattered(chunks: readonly PatchedChunk[]): boolean {
  const packs = new Set(chunks.map(({ old }) => old!.pack?.digest)).size;
  const least = Math.ceil(chunks.reduce((sum, { blocks }) => sum + countOf(blocks), 0) / PACK_BLOCKS_MAX);
  return packs >= Math.max(PLACE_PACKS_MAX, 2 * least);
}

/** Undefined for one that is packed as a whole. */
function patchedChunk(
  index: number,
  size: Changes['size'],
  there: ChunkBelow | undefined,
  isChanged: (block: number) => boolean,
): PatchedChunk | undefined {
  const plainBytes = chunkLengthOf(size, index);
  if (!there || there.plainBytes !== plainBytes || plainBytes % BLOCK !== 0) return undefined;
  const blocksMax = Math.floor((plainBytes / BLOCK) * PATCHED_SHARE_MAX);
  const first = (index * size.chunkBytes) / BLOCK;
  const ours: number[] = [];
  for (let i = 0; i < plainBytes / BLOCK; i++) {
    if (!isChanged(first + i)) continue;
    if (ours.length === blocksMax) return undefined;
    ours.push(i);
  }
  const old = there.patch;
  const own = ours.reduce((mask, block) => mask | (1n << BigInt(block)), 0n);
  const blocks = old ? own | old.data | old.zero : own;
  const blockCount = countOf(blocks);
  if (blockCount > blocksMax || blockCount === 0) return undefined;
  const base = old?.base ?? { digest: there.digest, storedBytes: there.storedBytes };
  return { index, base, own, blocks, old };
}

/** The patches of a group, but for the name of their pack, and how many blocks that has. */
export interface GroupContent {
  readonly blocks: number;
  /** With those of zeros. */
  readonly blockCount: number;
  readonly patches: readonly (Omit<Patch, 'pack'> & { readonly index: number })[];
}

/** Plain bytes of packs that a parent has; the last ones stay in memory, for neighbours. */
export class PacksBelow {
  readonly #source: Pick<ChunkSource, 'readChunks'>;
  readonly #packs = new LRUCache<Digest, Promise<Buffer>>({ max: PACKS_BELOW_MAX });

  constructor(source: Pick<ChunkSource, 'readChunks'>) {
    this.#source = source;
  }

  /** Throws corrupt, and what the source throws. */
  read(pack: Pack): Promise<Buffer> {
    let reading = this.#packs.get(pack.digest);
    if (!reading) this.#packs.set(pack.digest, (reading = this.#fetch(packRefOf(pack))));
    return reading;
  }

  async #fetch(ref: ChunkRef): Promise<Buffer> {
    let plain: Buffer | undefined;
    await this.#source.readChunks([ref], { priority: 'demand' }, (_, chunk) => {
      plain = decodeChunk(chunk, ref);
    });
    invariant(plain !== undefined, 'a source that says nothing has delivered');
    return plain;
  }
}

/** `plain`: of the pack; empty where all blocks are zeros, there is no pack then. `read` fills a buffer with blocks
 * of the disk. Throws what it throws. */
export async function readGroup(
  { chunks, blockCount }: PatchGroup,
  chunkBytes: number,
  read: (target: Uint8Array, offsetBytes: number) => Promise<void>,
  below: PacksBelow,
): Promise<{ plain: Buffer; content: GroupContent }> {
  const bytes = Buffer.alloc(blockCount * BLOCK);
  const reads: Promise<void>[] = [];
  let at = 0;
  for (const { index, own, blocks, old } of chunks) {
    const target = bytes.subarray(at, (at += countOf(blocks) * BLOCK));
    /** Where in `target` the blocks lie that are of this kind. */
    const placesOf = (kind: bigint) => {
      const places: { block: number; place: number }[] = [];
      let place = 0;
      for (const block of bitsOf(blocks)) {
        if ((kind >> BigInt(block)) & 1n) places.push({ block, place });
        place++;
      }
      return places;
    };
    const ours = placesOf(own);
    for (let i = 0; i < ours.length;) {
      const { block, place } = ours[i]!;
      const first = i++;
      while (ours[i]?.block === block + i - first) i++;
      const run = target.subarray(place * BLOCK, (place + i - first) * BLOCK);
      reads.push(read(run, index * chunkBytes + block * BLOCK));
    }
    const kept = placesOf(old ? old.data & ~own : 0n);
    if (!old?.pack || kept.length === 0) continue;
    const inPack = new Map([...bitsOf(old.data)].map((block, i) => [block, old.firstBlock + i]));
    const copy = (pack: Buffer) => {
      for (const { block, place } of kept) {
        const from = inPack.get(block)! * BLOCK;
        pack.copy(target, place * BLOCK, from, from + BLOCK);
      }
    };
    // What cannot be had of the pack is asked of the disk, whose way to it has more to try.
    const otherwise = async () => {
      for (const { block, place } of kept)
        await read(target.subarray(place * BLOCK, (place + 1) * BLOCK), index * chunkBytes + block * BLOCK);
    };
    reads.push(below.read(old.pack).then(copy, otherwise));
  }
  // All of them, also after a failure: a later one still writes into the buffer.
  for (const result of await Promise.allSettled(reads)) if (result.status === 'rejected') throw result.reason;
  const patches: GroupContent['patches'][number][] = [];
  let kept = 0;
  at = 0;
  for (const { index, base, blocks } of chunks) {
    const firstBlock = kept;
    let zero = 0n;
    for (const block of bitsOf(blocks)) {
      const from = bytes.subarray(at, (at += BLOCK));
      if (isAllZero(from)) zero |= 1n << BigInt(block);
      else bytes.copyWithin(kept++ * BLOCK, at - BLOCK, at);
    }
    const data = blocks & ~zero;
    patches.push({ index, base, firstBlock: data === 0n ? 0 : firstBlock, data, zero });
  }
  return { plain: bytes.subarray(0, kept * BLOCK), content: { blocks: kept, blockCount, patches } };
}

/** `pack` is what the pack has become. */
export function entriesOfGroup(
  { patches, blocks }: GroupContent,
  pack: StoredObject | undefined,
): NewEntry[] {
  const named: Pack | undefined = pack && { digest: pack.digest, storedBytes: pack.storedBytes, blocks };
  return patches.map(({ index, ...patch }) => ({
    index,
    patch: { ...patch, pack: patch.data === 0n ? undefined : named },
  }));
}
