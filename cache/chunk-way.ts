/**
 * How a missing chunk of one image gets here: from memory, where the disk did not take it; from another image on this
 * disk; or from the source.
 *
 * A patched chunk (core/patch.ts) is made here of the chunk below and its pack, and stored in the image's file like any
 * other: it is made once, and no reader knows. The chunk below is usually on this disk, as a chunk of the image that was
 * committed to; a pack serves the neighbours too, so the last ones stay in memory.
 */
import { LRUCache } from 'lru-cache';
import type { Digest } from '../src/core/bytes.ts';
import type { ChunkRef } from '../src/core/chunk.ts';
import type { ChunkTable } from '../src/core/chunk-table.ts';
import { invariant } from '../src/core/errors.ts';
import { MIB } from '../src/core/limits.ts';
import { chunkLengthOf } from '../src/core/manifest.ts';
import type { Manifest } from '../src/core/manifest.ts';
import { applyPatch, packRefOf } from '../src/core/patch.ts';
import type { Patch } from '../src/core/patch.ts';
import type { Priority } from '../src/core/source.ts';
import type { Fetcher } from './fetcher.ts';
import type { ImageFigures } from './figures.ts';
import type { ImageFile } from './image-file.ts';
import type { Sibling, Siblings } from './siblings.ts';
import type { Space } from './space.ts';

/** Plain bytes of packs, one set for all images of a cache: 64 of them and more. */
export type Packs = LRUCache<Digest, Buffer>;
const PACKS_BYTES_MAX = 16 * MIB;

export function newPacks(): Packs {
  return new LRUCache({ maxSize: PACKS_BYTES_MAX, sizeCalculation: ({ length }) => length });
}

/** What a ChunkWay needs of its cache. */
export interface WayContext {
  readonly fetcher: Fetcher;
  readonly siblings: Siblings;
  readonly space: Space;
  readonly packs: Packs;
  readonly figures: ImageFigures;
}

export interface Obtained {
  readonly plain: Buffer;
  /** Where it lies on this disk. */
  readonly sibling?: Sibling;
  /** What it was asked the source for as; absent where it was here. */
  readonly fetched?: Priority;
}

export class ChunkWay {
  readonly #file: ImageFile;
  readonly #manifest: Manifest;
  readonly #table: ChunkTable;
  readonly #context: WayContext;
  /** What the source was asked for, for chunks that are not here yet. */
  readonly #asked = new Map<number, Set<ChunkRef>>();
  /** Of these, what nobody wants. */
  readonly #dropped = new WeakSet<ChunkRef>();

  constructor(file: ImageFile, manifest: Manifest, table: ChunkTable, context: WayContext) {
    this.#file = file;
    this.#manifest = manifest;
    this.#table = table;
    this.#context = context;
  }

  /** The name of a chunk of data; of a patched one no source has it. */
  refOf(index: number): ChunkRef {
    const entry = this.#table.entryOf(index);
    invariant(entry >= 0, 'a chunk of zeros is never fetched');
    return {
      digest: this.#table.digestOfEntry(entry),
      plainBytes: chunkLengthOf(this.#manifest, index),
      storedBytes: this.#table.storedBytesOfEntry(entry),
    };
  }

  /** Verified bytes of a chunk, which `settled` is called for when they are where others find them. `priority` is asked
   * when the source is. Throws bad-format (a patch that does not fit) and what a fetch throws. */
  async obtain(index: number, ref: ChunkRef, priority: () => Priority, rank: number): Promise<Obtained> {
    const { space, siblings } = this.#context;
    const kept = space.memory.get(ref.digest);
    if (kept?.length === ref.plainBytes) return { plain: kept };
    const sibling = await siblings.find(this.#file, index, ref);
    if (sibling) {
      this.#countSaved(sibling.plain.length);
      return { plain: sibling.plain, sibling };
    }
    const patch = this.#table.patchOf(index);
    if (patch) return this.#patched(index, ref.plainBytes, patch, priority, rank);
    const fetched = priority();
    return { plain: await this.#fetch(index, ref, fetched, rank), fetched };
  }

  settled(ref: ChunkRef): void {
    this.#context.fetcher.settled(ref);
  }

  /** Somebody waits for it now. */
  promote(index: number): void {
    for (const ref of this.#asked.get(index) ?? []) this.#context.fetcher.promote(ref);
  }

  /** Somebody else wants its prefetch, perhaps sooner. */
  hasten(index: number, rank: number): void {
    for (const ref of this.#asked.get(index) ?? []) {
      if (this.#dropped.delete(ref)) this.#context.fetcher.keep(ref);
      this.#context.fetcher.hasten(ref, rank);
    }
  }

  /** Nobody wants its prefetch any more. What others have asked for as well comes all the same. */
  drop(index: number): void {
    for (const ref of this.#asked.get(index) ?? []) {
      if (this.#dropped.has(ref)) continue;
      this.#dropped.add(ref);
      this.#context.fetcher.drop(ref);
    }
  }

  #countSaved(bytes: number): void {
    this.#context.figures.savedChunks++;
    this.#context.figures.savedBytes += bytes;
  }

  async #fetch(index: number, ref: ChunkRef, priority: Priority, rank: number): Promise<Buffer> {
    const asked = this.#asked.get(index) ?? new Set();
    this.#asked.set(index, asked.add(ref));
    try {
      return await this.#context.fetcher.fetch(ref, this.#context.figures, priority, rank);
    } finally {
      asked.delete(ref);
      if (asked.size === 0) this.#asked.delete(index);
    }
  }

  async #patched(
    index: number,
    plainBytes: number,
    patch: Patch,
    priority: () => Priority,
    rank: number,
  ): Promise<Obtained> {
    const { siblings, packs } = this.#context;
    let fetched: Priority | undefined;
    const fetch = async (ref: ChunkRef) => {
      try {
        return await this.#fetch(index, ref, (fetched = priority()), rank);
      } finally {
        this.settled(ref);
      }
    };
    const below = async () => {
      const ref = { ...patch.base, plainBytes };
      const sibling = await siblings.find(this.#file, index, ref);
      if (!sibling) return Buffer.from(await fetch(ref)); // a copy: others have the same buffer
      this.#countSaved(plainBytes);
      return sibling.plain;
    };
    const packed = async ({ pack }: Patch) => {
      if (!pack) return undefined;
      const kept = packs.get(pack.digest);
      if (kept) return kept;
      const plain = await fetch(packRefOf(pack));
      // What is a window of something larger is not to keep all of that.
      const own = plain.buffer.byteLength > 2 * plain.length ? Buffer.from(plain) : plain;
      packs.set(pack.digest, own);
      return own;
    };
    // Both in one turn, so that they go out in one call. Who waits hears of the first failure at once.
    const [plain, pack] = await Promise.all([below(), packed(patch)]);
    applyPatch(plain, patch, pack);
    return { plain, ...(fetched === undefined ? {} : { fetched }) };
  }
}
