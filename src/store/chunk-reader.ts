/**
 * Batches of chunk files, several reads in flight. Callback-style fs: promises cost a third more of the main
 * thread here. A failure, an abort or `close` settles the batch at once; reads still in the thread pool end on
 * their own and are dropped.
 */
import { closeSync, fstatSync, open, read } from 'node:fs';
import type { ChunkRef, StoredChunk } from '../core/chunk.ts';
import { isDigest } from '../core/bytes.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { BATCH_CHUNKS_MAX, STORED_OVERHEAD_BYTES_MAX } from '../core/limits.ts';
import type { StoreLayout } from './layout.ts';

/** Files of one batch being read at once: twice libuv's four threads, so that none waits for the main thread. */
const READS_MAX = 8;

export class ChunkReader {
  readonly #layout: StoreLayout;
  /** Settles each batch that is under way. */
  readonly #batches = new Set<(error: GridError) => void>();
  #closed = false;

  constructor(layout: StoreLayout) {
    this.#layout = layout;
  }

  /** See ChunkSource.readChunks. */
  async read(
    refs: readonly ChunkRef[],
    signal: AbortSignal | undefined,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    if (refs.length > BATCH_CHUNKS_MAX) {
      throw new GridError('bad-request', `${refs.length} chunks in one batch, more than ${BATCH_CHUNKS_MAX}`);
    }
    for (const { digest } of refs) {
      if (!isDigest(digest)) throw new GridError('bad-request', `'${String(digest)}' is not a digest`);
    }
    if (this.#closed) throw this.#closedError();
    if (signal?.aborted) throw abortedError();
    if (refs.length === 0) return;
    await new Promise<void>((resolve, reject) => {
      let next = 0;
      let left = refs.length;
      let settled = false;
      const settle = (error?: GridError) => {
        if (settled) return;
        settled = true;
        this.#batches.delete(settle);
        signal?.removeEventListener('abort', onAbort);
        if (error) reject(error);
        else resolve();
      };
      const onAbort = () => settle(abortedError());
      const startNext = () => {
        if (settled || next >= refs.length) return;
        const index = next++;
        this.#readOne(refs[index]!, (error, bytes) => {
          if (settled) return;
          if (error) return settle(error);
          try {
            deliver(index, { encoding: 'zstd', bytes: bytes! });
          } catch (failure) {
            return settle(asGridError(failure, 'the receiver of a chunk failed', 'bug'));
          }
          if (--left === 0) settle();
          else startNext();
        });
      };
      this.#batches.add(settle);
      signal?.addEventListener('abort', onAbort, { once: true });
      for (let i = 0; i < READS_MAX; i++) startNext();
    });
  }

  /**
   * Open, size, read, close; `done` is called once. What may wait for the disk is in the thread pool; the size of a file
   * that is open, and its close, are a microsecond each here, and there and back costs ten times that.
   */
  #readOne(ref: ChunkRef, done: (error: GridError | undefined, bytes?: Buffer) => void): void {
    const what = () => `chunk ${ref.digest} of the store ${this.#layout.folder}`;
    open(this.#layout.object('chunks', ref.digest), 'r', (openError, fd) => {
      if (openError) {
        return done(
          errnoOf(openError) === 'ENOENT'
            ? new GridError('not-found', `${what()} is not there`, { cause: openError })
            : asGridError(openError, `cannot read ${what()}`),
        );
      }
      const finish = (error: GridError | undefined, bytes?: Buffer) => {
        closeSync(fd);
        done(error, bytes);
      };
      let size: number;
      try {
        ({ size } = fstatSync(fd));
      } catch (error) {
        return finish(asGridError(error, `cannot read ${what()}`));
      }
      if (size === 0 || size > ref.plainBytes + STORED_OVERHEAD_BYTES_MAX) {
        return finish(
          new GridError('corrupt', `${what()} has ${size} bytes, which no chunk of its size has`),
        );
      }
      const bytes = Buffer.allocUnsafeSlow(size);
      const readOn = (at: number): void =>
        read(fd, bytes, at, bytes.length - at, at, (readError, count) => {
          if (readError) return finish(asGridError(readError, `cannot read ${what()}`));
          if (count === 0) return finish(new GridError('corrupt', `${what()} shrank while it was read`));
          if (at + count < bytes.length) return readOn(at + count);
          finish(undefined, bytes);
        });
      readOn(0);
    });
  }

  close(): void {
    this.#closed = true;
    for (const settle of this.#batches) settle(this.#closedError());
  }

  #closedError(): GridError {
    return new GridError('closed', `the store ${this.#layout.folder} was closed`);
  }
}

function abortedError(): GridError {
  return new GridError('closed', 'the read was cancelled');
}
