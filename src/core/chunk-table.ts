/**
 * The chunk table: which chunk has which digest. Named by the SHA-256 of the plain bytes below; zstd at rest
 * and on the wire like a chunk. Holes cost nothing, so the table of a 100 GiB image with 2 GiB of data is
 * 300 KiB, in memory too: it is used as it lies, by binary search over the extents.
 *
 * Invariants: extents are in rising order, do not touch or overlap, are not empty and stay below `count`;
 * chunks outside them are all zero.
 *
 * Bytes (little-endian):
 *   0  8  magic "GVFSTAB1", or "GVFSTAB2" where chunks are patched
 *   8  4  chunkBytes
 *  12  4  count: chunks in the image
 *  16  4  extentCount
 *  20  4  entryCount: chunks in all extents together
 *  24  8 × extentCount   { u32 first chunk, u32 chunks }
 *   …  36 × entryCount   { 32 SHA-256 of the plain chunk, of a patched one that of the chunk below, u32 stored (compressed) bytes }
 *   …  in version 2 the patches: patch-table.ts
 */
import { bufferOf, sha256 } from './bytes.ts';
import type { Digest } from './bytes.ts';
import { GridError, invariant } from './errors.ts';
import { CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, STORED_OVERHEAD_BYTES_MAX, TABLE_BYTES_MAX } from './limits.ts';
import { countOf, patchDigest } from './patch.ts';
import type { Patch, StoredObject } from './patch.ts';
import { encodePatches, PATCH_HEADER_BYTES, PatchTable } from './patch-table.ts';

const MAGIC = Buffer.from('GVFSTAB1');
const VERSION_PATCHED = '2'.charCodeAt(0);
const HEADER_BYTES = 24;
const EXTENT_BYTES = 8;
const ENTRY_BYTES = 36;

/** A chunk that is not all zero. */
export interface ChunkEntry {
  readonly index: number;
  /** Of a patched chunk the name of the patch, which no object has. */
  readonly digest: Digest;
  /** Of a patched chunk about what it takes of a link: the chunk below and its share of the pack. */
  readonly storedBytes: number;
  readonly patch?: Patch;
}

/** A chunk on its way into a table: an object, or what it is made of. */
export type NewEntry = { readonly index: number } & (
  (StoredObject & { readonly patch?: Patch }) | { readonly patch: Patch }
);

/** The objects that a chunk needs. */
export function objectsOf(entry: NewEntry): StoredObject[] {
  const { patch } = entry;
  if (!patch) return [entry as StoredObject];
  return patch.pack ? [patch.base, patch.pack] : [patch.base];
}

export class ChunkTable {
  readonly chunkBytes: number;
  /** Chunks in the image, zero ones included. */
  readonly count: number;
  /** Chunks that are not all zero. */
  readonly entryCount: number;
  readonly bytes: Buffer;
  /** First chunk, chunks, and entries before it, of each extent. */
  readonly #extents: Uint32Array;
  readonly #entriesAt: number;
  readonly #patches: PatchTable | undefined;

  private constructor(bytes: Buffer, extents: Uint32Array, patches: PatchTable | undefined) {
    this.bytes = bytes;
    this.#patches = patches;
    this.chunkBytes = bytes.readUInt32LE(8);
    this.count = bytes.readUInt32LE(12);
    this.entryCount = bytes.readUInt32LE(20);
    this.#extents = extents;
    this.#entriesAt = HEADER_BYTES + (extents.length / 3) * EXTENT_BYTES;
  }

  /** Checks the bytes against `digest` and every invariant; throws corrupt, bad-format or newer-format. */
  static parse(plain: Uint8Array, digest: Digest): ChunkTable {
    const bytes = bufferOf(plain);
    const what = `chunk table ${digest.slice(0, 12)}`;
    if (sha256(bytes) !== digest) throw new GridError('corrupt', `${what} does not match its digest`);
    const bad = (why: string) => new GridError('bad-format', `${what}: ${why}`);
    if (bytes.length < HEADER_BYTES || bytes.length > TABLE_BYTES_MAX)
      throw bad(`${bytes.length} bytes long`);
    if (!bytes.subarray(0, 7).equals(MAGIC.subarray(0, 7))) throw bad('wrong magic');
    const isPatched = bytes[7] === VERSION_PATCHED;
    if (bytes[7] !== MAGIC[7] && !isPatched)
      throw new GridError('newer-format', `${what} is of another version`);
    const chunkBytes = bytes.readUInt32LE(8);
    const count = bytes.readUInt32LE(12);
    const extentCount = bytes.readUInt32LE(16);
    const entryCount = bytes.readUInt32LE(20);
    if (chunkBytes < CHUNK_BYTES_MIN || chunkBytes > CHUNK_BYTES_MAX || chunkBytes % CHUNK_BYTES_MIN !== 0) {
      throw bad(`chunk size ${chunkBytes}`);
    }
    const patchesAt = HEADER_BYTES + extentCount * EXTENT_BYTES + entryCount * ENTRY_BYTES;
    if (isPatched ? bytes.length < patchesAt + PATCH_HEADER_BYTES : bytes.length !== patchesAt)
      throw bad('wrong length');
    const extents = new Uint32Array(extentCount * 3);
    let entries = 0;
    let end = -1;
    for (let i = 0; i < extentCount; i++) {
      const first = bytes.readUInt32LE(HEADER_BYTES + i * EXTENT_BYTES);
      const chunks = bytes.readUInt32LE(HEADER_BYTES + i * EXTENT_BYTES + 4);
      if (chunks === 0 || first <= end || first + chunks > count)
        throw bad(`extent ${i} is out of order or range`);
      extents.set([first, chunks, entries], i * 3);
      entries += chunks;
      end = first + chunks;
    }
    if (entries !== entryCount) throw bad('extents and entries disagree');
    for (let entry = 0, at = HEADER_BYTES + extentCount * EXTENT_BYTES; at < patchesAt; entry++) {
      const stored = bytes.readUInt32LE(at + 32);
      if (stored === 0 || stored > chunkBytes + STORED_OVERHEAD_BYTES_MAX)
        throw bad(`entry ${entry} has a wild length`);
      at += ENTRY_BYTES;
    }
    const patches = isPatched ? new PatchTable(bytes, patchesAt, { chunkBytes, entryCount }, bad) : undefined;
    return new ChunkTable(bytes, extents, patches);
  }

  /** How many chunks are patched. */
  get patchCount(): number {
    return this.#patches?.count ?? 0;
  }

  /** What chunk `index` is made of where it is patched. O(log extents + log patches). */
  patchOf(index: number): Patch | undefined {
    return this.#patches && this.#patchOfEntry(this.entryOf(index));
  }

  #patchOfEntry(entry: number): Patch | undefined {
    return this.#patches?.of(entry, this.#objectOf(entry));
  }

  /** What stands in an entry: of a patched chunk the chunk below. */
  #objectOf(entry: number): StoredObject {
    const at = this.#entriesAt + entry * ENTRY_BYTES;
    return { digest: this.bytes.toString('hex', at, at + 32), storedBytes: this.bytes.readUInt32LE(at + 32) };
  }

  /** Entry number of chunk `index`, or -1 for a chunk of zeros. O(log extents). */
  entryOf(index: number): number {
    let low = 0;
    let high = this.#extents.length / 3 - 1;
    while (low <= high) {
      const middle = (low + high) >>> 1;
      const first = this.#extents[middle * 3]!;
      if (index < first) high = middle - 1;
      else if (index >= first + this.#extents[middle * 3 + 1]!) low = middle + 1;
      else return this.#extents[middle * 3 + 2]! + (index - first);
    }
    return -1;
  }

  /** Digest of chunk `index`; undefined for a chunk of zeros. */
  digestOf(index: number): Digest | undefined {
    const entry = this.entryOf(index);
    return entry < 0 ? undefined : this.digestOfEntry(entry);
  }

  /** Of a patched chunk the name of the patch. */
  digestOfEntry(entry: number): Digest {
    const patch = this.#patchOfEntry(entry);
    return patch ? patchDigest(patch) : this.#objectOf(entry).digest;
  }

  /** First 32 bits of the digest: enough for a hash table, without a string for each. */
  digestPrefixOfEntry(entry: number): number {
    const patch = this.#patchOfEntry(entry);
    if (patch) return Number.parseInt(patchDigest(patch).slice(0, 8), 16);
    return this.bytes.readUInt32BE(this.#entriesAt + entry * ENTRY_BYTES);
  }

  /** See ChunkEntry. */
  storedBytesOfEntry(entry: number): number {
    const own = this.bytes.readUInt32LE(this.#entriesAt + entry * ENTRY_BYTES + 32);
    const patch = this.#patchOfEntry(entry);
    if (!patch?.pack) return own;
    return own + Math.ceil((patch.pack.storedBytes * countOf(patch.data)) / patch.pack.blocks);
  }

  /** Chunk `index`; undefined for one of zeros. */
  at(index: number): ChunkEntry | undefined {
    const entry = this.entryOf(index);
    return entry < 0 ? undefined : this.#entry(index, entry);
  }

  #entry(index: number, entry: number): ChunkEntry {
    const patch = this.#patchOfEntry(entry);
    if (!patch) return { index, ...this.#objectOf(entry) };
    return { index, digest: patchDigest(patch), storedBytes: this.storedBytesOfEntry(entry), patch };
  }

  /** Every chunk that is not all zero, in order. */
  *entries(): Generator<ChunkEntry> {
    for (let i = 0; i < this.#extents.length; i += 3) {
      const first = this.#extents[i]!;
      const base = this.#extents[i + 2]!;
      for (let k = 0; k < this.#extents[i + 1]!; k++) yield this.#entry(first + k, base + k);
    }
  }

  /** All that a store needs for this image; some may come more than once. */
  *objects(): Generator<StoredObject> {
    for (let entry = 0; entry < this.entryCount; entry++) yield this.#objectOf(entry);
    for (let i = 0; i < (this.#patches?.packCount ?? 0); i++) yield this.#patches!.packAt(i);
  }

  /** Runs of chunks that are not all zero: [first, chunks]. */
  *extents(): Generator<[first: number, chunks: number]> {
    for (let i = 0; i < this.#extents.length; i += 3) yield [this.#extents[i]!, this.#extents[i + 1]!];
  }
}

/** The table's bytes and digest from the chunks that are not zero, in rising order of index. */
export function encodeChunkTable(
  chunkBytes: number,
  count: number,
  chunks: readonly NewEntry[],
): { bytes: Buffer; digest: Digest } {
  const extents: [number, number][] = [];
  let previous = -2;
  for (const { index } of chunks) {
    invariant(index > previous && index < count, 'chunks are in order and within the image');
    const last = extents.at(-1);
    if (last && index === previous + 1) last[1]++;
    else extents.push([index, 1]);
    previous = index;
  }
  const bytes = Buffer.alloc(HEADER_BYTES + extents.length * EXTENT_BYTES + chunks.length * ENTRY_BYTES);
  MAGIC.copy(bytes);
  bytes.writeUInt32LE(chunkBytes, 8);
  bytes.writeUInt32LE(count, 12);
  bytes.writeUInt32LE(extents.length, 16);
  bytes.writeUInt32LE(chunks.length, 20);
  let at = HEADER_BYTES;
  for (const [first, length] of extents) {
    bytes.writeUInt32LE(first, at);
    bytes.writeUInt32LE(length, at + 4);
    at += EXTENT_BYTES;
  }
  for (const chunk of chunks) {
    const { digest, storedBytes } = objectsOf(chunk)[0]!;
    bytes.write(digest, at, 32, 'hex');
    bytes.writeUInt32LE(storedBytes, at + 32);
    at += ENTRY_BYTES;
  }
  const patches = encodePatches(chunks.map(({ patch }) => patch));
  if (!patches) return { bytes, digest: sha256(bytes) };
  bytes[7] = VERSION_PATCHED;
  const all = Buffer.concat([bytes, patches]);
  return { bytes: all, digest: sha256(all) };
}
