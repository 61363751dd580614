/** What happened to one image since the start of this process: kept when its files are closed. */
import { Usage } from '../src/core/usage.ts';
import type { FetchTally } from './fetcher.ts';

export interface ImageFigures extends FetchTally {
  /** Chunks that a reader had to wait for: neither here nor in memory when it came. */
  missedChunks: number;
  /** Fetched before anybody asked, and their plain bytes. */
  prefetchedChunks: number;
  prefetchedBytes: number;
  /** Copied from another image of this cache instead of fetched. */
  savedChunks: number;
  savedBytes: number;
  /** Chunks whose bytes on this disk were found wrong, and made right again. */
  refetchedChunks: number;
  evictedChunks: number;
  /** Requests of frontends for the image itself, not for clones of it. */
  readonly usage: Usage;
  /** One byte per chunk, see chunk-states.ts. */
  readonly notes: SharedArrayBuffer;
}

export function newFigures(chunkCount: number): ImageFigures {
  return {
    fetchedChunks: 0,
    fetchedPlainBytes: 0,
    fetchedStoredBytes: 0,
    missedChunks: 0,
    prefetchedChunks: 0,
    prefetchedBytes: 0,
    savedChunks: 0,
    savedBytes: 0,
    refetchedChunks: 0,
    evictedChunks: 0,
    usage: new Usage(),
    notes: new SharedArrayBuffer(chunkCount),
  };
}
