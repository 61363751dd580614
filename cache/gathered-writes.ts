/**
 * Small writes to one file: those that come in one turn of the event loop go to the thread pool together, neighbours as
 * one call. Memory images come in thousands of chunks of 16 KiB; the way to the pool and back costs as much as the
 * write of one, and the kernel takes as long to begin a write as to copy it.
 */
import { writev } from 'node:fs';
import { promisify } from 'node:util';
import { MIB } from '../src/core/limits.ts';
import { writeFull } from './map-file.ts';

const writevAsync = promisify(writev);

/** Of one call. */
const RUN_BYTES_MAX = 1 * MIB;

interface Write {
  readonly bytes: Buffer;
  readonly start: number;
  readonly resolve: () => void;
  readonly reject: (error: unknown) => void;
}

export class GatheredWrites {
  readonly #fd: number;
  #gathered: Write[] = [];

  constructor(fd: number) {
    this.#fd = fd;
  }

  /** Resolves when all of `bytes` is written; throws what the disk says, to neighbours too. No two of one turn overlap. */
  write(bytes: Buffer, start: number): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.#gathered.length === 0) setImmediate(() => this.#go());
      this.#gathered.push({ bytes, start, resolve, reject });
    });
  }

  #go(): void {
    const all = this.#gathered.toSorted((a, b) => a.start - b.start);
    this.#gathered = [];
    let run: Write[] = [];
    let end = -1;
    let lengthBytes = 0;
    for (const write of all) {
      if (run.length > 0 && (write.start !== end || lengthBytes >= RUN_BYTES_MAX)) {
        void this.#write(run);
        run = [];
        lengthBytes = 0;
      }
      run.push(write);
      end = write.start + write.bytes.length;
      lengthBytes += write.bytes.length;
    }
    void this.#write(run);
  }

  async #write(run: readonly Write[]): Promise<void> {
    try {
      let { bytesWritten } = await writevAsync(
        this.#fd,
        run.map(({ bytes }) => bytes),
        run[0]!.start,
      );
      // Less than all where a disk is about to be full, or a signal came.
      for (const { bytes, start } of run) {
        const done = Math.min(bytesWritten, bytes.length);
        bytesWritten -= done;
        if (done < bytes.length) await writeFull(this.#fd, bytes.subarray(done), start + done);
      }
    } catch (error) {
      for (const { reject } of run) reject(error);
      return;
    }
    for (const { resolve } of run) resolve();
  }
}
