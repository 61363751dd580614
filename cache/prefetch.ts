/** Many chunks of one image before anybody asks: a bounded number at a time, cancellable, with progress. */
import type { ByteRange } from '../src/core/bytes.ts';
import { GridError } from '../src/core/errors.ts';
import { CACHE_PREFETCH_BYTES_MAX } from '../src/core/limits.ts';
import { chunkLengthOf } from '../src/core/manifest.ts';
import type { ImageFile } from './image-file.ts';
import type { Space } from './space.ts';

export interface PrefetchOptions {
  readonly signal?: AbortSignal;
  /** Called after each chunk: how many of how many are here. */
  readonly progress?: (doneChunks: number, totalChunks: number) => void;
  /** Called for each chunk that is on this disk, fetched now or there before. */
  readonly here?: (range: ByteRange) => void;
  /** Of a chunk, among all that is being prefetched: the lowest comes first. 0 when left out. */
  readonly rankOf?: (index: number) => number;
}

/** Where a chunk lies in its image. */
export function rangeOf({ manifest }: ImageFile, index: number): ByteRange {
  const startBytes = index * manifest.chunkBytes;
  return { startBytes, endBytes: startBytes + chunkLengthOf(manifest, index) };
}

/**
 * Fetches what is not here of `indexes`, in that order. Resolves to the number of chunks that it fetched when all
 * are here. Throws closed when cancelled, no-space when there is no room for more, and what a fetch throws; chunks
 * that were under way then are either stored or dropped when it throws.
 */
export async function prefetchChunks(
  file: ImageFile,
  space: Space,
  indexes: readonly number[],
  options: PrefetchOptions = {},
): Promise<number> {
  const { signal, progress, here, rankOf = () => 0 } = options;
  // What is here already takes no turn of its own: a start that is warm waits for nothing of this.
  const missing: number[] = [];
  for (const index of indexes) {
    if (!file.states.isHere(index)) missing.push(index);
    else here?.(rangeOf(file, index));
  }
  const atOnce = Math.max(1, Math.floor(CACHE_PREFETCH_BYTES_MAX / file.manifest.chunkBytes));
  const underWay = new Set<number>();
  let failure: unknown;
  let fetched = 0;
  let done = indexes.length - missing.length;
  let next = 0;
  const oneAfterAnother = async () => {
    for (let index = missing[next++]; index !== undefined; index = missing[next++]) {
      if (signal?.aborted || failure !== undefined) return;
      underWay.add(index);
      try {
        if (await file.prefetch(index, rankOf(index))) {
          fetched++;
          if (!file.states.isHere(index) && space.degraded !== undefined) {
            failure ??= new GridError('no-space', `no room to prefetch: ${space.degraded}`);
          }
        }
      } catch (error) {
        failure ??= error;
        stop();
      }
      underWay.delete(index);
      if (here && file.states.isHere(index)) here(rangeOf(file, index));
      progress?.(++done, indexes.length);
    }
  };
  const stop = () => {
    for (const index of underWay) file.cancelPrefetch(index);
  };
  signal?.addEventListener('abort', stop);
  const resume = file.readAround.pause();
  try {
    await Promise.all(Array.from({ length: Math.min(atOnce, missing.length) }, oneAfterAnother));
  } finally {
    signal?.removeEventListener('abort', stop);
    resume();
  }
  if (signal?.aborted) throw new GridError('closed', 'the prefetch was cancelled');
  if (failure !== undefined) throw failure;
  return fetched;
}
