/** Where a chunk lies in an image, by its digest: for tiers, which are asked by digest alone, and for siblings. */
import type { Digest } from '../src/core/bytes.ts';
import type { ChunkTable } from '../src/core/chunk-table.ts';

/** Digest → chunk index of one table: a hash table with open addressing over the first 32 bits of the digests. */
export class DigestIndex {
  readonly #table: ChunkTable;
  /** Chunk index + 1; 0 is a free slot. */
  readonly #slots: Uint32Array;

  constructor(table: ChunkTable) {
    this.#table = table;
    this.#slots = new Uint32Array(2 ** Math.ceil(Math.log2(2 * table.entryCount + 2)));
    const mask = this.#slots.length - 1;
    let entry = 0;
    for (const [first, chunks] of table.extents()) {
      for (let index = first; index < first + chunks; index++) {
        let slot = table.digestPrefixOfEntry(entry++) & mask;
        while (this.#slots[slot] !== 0) slot = (slot + 1) & mask;
        this.#slots[slot] = index + 1;
      }
    }
  }

  /** A chunk with this digest that is acceptable; undefined when the table has none. */
  find(digest: Digest, accept: (index: number) => boolean = () => true): number | undefined {
    const mask = this.#slots.length - 1;
    for (let slot = prefixOf(digest) & mask; this.#slots[slot] !== 0; slot = (slot + 1) & mask) {
      const index = this.#slots[slot]! - 1;
      if (this.#table.digestOf(index) === digest && accept(index)) return index;
    }
    return undefined;
  }
}

function prefixOf(digest: Digest): number {
  return Number.parseInt(digest.slice(0, 8), 16);
}
