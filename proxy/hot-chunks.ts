/**
 * Small chunks that a server reads again and again, kept in memory: the pages that every resume of a checkpoint begins
 * with are some thousand chunks of 16 KiB, and to open, read and close the file of each costs more than all else that is
 * done for it, and a trip to the thread pool while somebody waits.
 *
 * Nothing wrong is kept: what a disk gave is checked against its digest when it is asked for a second time (the first
 * time nobody knows that there will be one), and forgotten unless it matches, so that whoever found a damaged chunk and
 * asks again gets what the disk has by then.
 */
import { LRUCache } from 'lru-cache';
import type { Digest } from '../src/core/bytes.ts';
import { decodeChunk } from '../src/core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { KIB, MIB } from '../src/core/limits.ts';
import type { ChunkSource, ReadChunksOptions } from '../src/core/source.ts';

/** Plain bytes of a chunk that counts as small: larger ones are a disk's, and cost more to send than to read. */
const SMALL_BYTES_MAX = 64 * KIB;
/** Stored bytes of all that is kept: what some dozens of checkpoints begin with. */
const KEPT_BYTES_MAX = 64 * MIB;
/** Of a chunk beside its bytes, about: object, key, list. */
const ENTRY_BYTES = 256;

interface Kept {
  readonly bytes: Uint8Array;
  readonly plainBytes: number;
  checked: boolean;
}

/** In front of a source's chunks as a store has them; what comes plain, from a cache, is not kept: it is in one. */
export class HotChunks {
  readonly #source: Pick<ChunkSource, 'readChunks'>;
  readonly #kept = new LRUCache<Digest, Kept>({
    maxSize: KEPT_BYTES_MAX,
    sizeCalculation: ({ bytes }) => bytes.length + ENTRY_BYTES,
  });
  #hits = 0;

  constructor(source: Pick<ChunkSource, 'readChunks'>) {
    this.#source = source;
  }

  /** As ChunkSource.readChunks. What is kept is delivered before it returns. */
  async readChunks(
    refs: readonly ChunkRef[],
    options: ReadChunksOptions,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    const left: number[] = [];
    for (const [index, ref] of refs.entries()) {
      const bytes = options.signal?.aborted === true ? undefined : this.#find(ref);
      if (bytes === undefined) left.push(index);
      else deliver(index, { encoding: 'zstd', bytes });
    }
    if (left.length === 0) return;
    const missing = left.length === refs.length ? refs : left.map((index) => refs[index]!);
    await this.#source.readChunks(missing, options, (place, chunk) => {
      this.#keep(missing[place]!, chunk);
      deliver(left[place]!, chunk);
    });
  }

  /** Chunks that no file was read for, since it was asked the last time. */
  takeHits(): number {
    const hits = this.#hits;
    this.#hits = 0;
    return hits;
  }

  #find(ref: ChunkRef): Uint8Array | undefined {
    if (ref.plainBytes > SMALL_BYTES_MAX) return undefined;
    const kept = this.#kept.get(ref.digest);
    if (!kept || kept.plainBytes !== ref.plainBytes) return undefined;
    if (!kept.checked) {
      try {
        decodeChunk({ encoding: 'zstd', bytes: kept.bytes }, ref);
      } catch {
        return undefined; // and what the source has now replaces it
      }
      kept.checked = true;
    }
    this.#hits++;
    return kept.bytes;
  }

  #keep({ digest, plainBytes }: ChunkRef, { encoding, bytes }: StoredChunk): void {
    if (encoding !== 'zstd' || plainBytes > SMALL_BYTES_MAX) return;
    this.#kept.set(digest, { bytes, plainBytes, checked: false });
  }
}
