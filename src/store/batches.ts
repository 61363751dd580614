/**
 * New chunks of one writer on their way to their names: many with one flush, which runs while the next are packed.
 * A kill costs two batches at most, the one that is being flushed and the next.
 */
import type { PackedChunk } from './jobs.ts';
import type { NewObject, Writer } from './writer.ts';
import { MIB } from '../core/limits.ts';

/** Small ones spread the disk's work over the time, and the last one is short. */
const BATCH_BYTES = 32 * MIB;
const BATCH_OBJECTS = 4096;

export class Batches {
  readonly #writer: Writer;
  #objects: NewObject[] = [];
  #bytes = 0;
  #flushing: Promise<void> = Promise.resolve();

  constructor(writer: Writer) {
    this.#writer = writer;
  }

  /** Takes the new ones of these; waits where the disk is a whole batch behind. */
  async add(chunks: readonly PackedChunk[]): Promise<void> {
    for (const { digest, storedBytes, isNew } of chunks) {
      if (!isNew) continue;
      this.#objects.push({ kind: 'chunks', digest });
      this.#bytes += storedBytes;
    }
    if (this.#isFull()) await this.#flushing;
    if (!this.#isFull()) return;
    this.#flushing = this.#writer.flush(this.take());
    // Whoever waits for it learns of a failure; until somebody does, it is not an unhandled one.
    this.#flushing.catch(() => {});
  }

  /** Those that no flush has begun with: `Writer.publish` names them. */
  take(): NewObject[] {
    const objects = this.#objects;
    this.#objects = [];
    this.#bytes = 0;
    return objects;
  }

  /** Ends with the flush that is under way, and throws what that throws. */
  settle(): Promise<void> {
    return this.#flushing;
  }

  #isFull(): boolean {
    return this.#bytes >= BATCH_BYTES || this.#objects.length >= BATCH_OBJECTS;
  }
}
