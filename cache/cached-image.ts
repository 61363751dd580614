/** A read-only image of the cache as frontends see it; one handle of several over one `ImageFile`. */
import { GridError } from '../src/core/errors.ts';
import type { DirectMap, Image } from '../src/core/image.ts';
import type { Manifest } from '../src/core/manifest.ts';
import type { Usage } from '../src/core/usage.ts';
import type { ImageFile } from './image-file.ts';

export class CachedImage implements Image {
  readonly writable = false;
  readonly manifest: Manifest;
  readonly sizeBytes: number;
  readonly usage: Usage;
  /** Missing only while the cache's disk is too full to make the image's files. */
  readonly direct?: DirectMap;
  readonly #file: ImageFile;
  #release: (() => void) | undefined;

  constructor(file: ImageFile, release: () => void) {
    this.#file = file;
    this.#release = release;
    this.manifest = file.manifest;
    this.sizeBytes = file.manifest.sizeBytes;
    this.usage = file.figures.usage;
    if (file.direct) this.direct = file.direct;
  }

  read(target: Uint8Array, offsetBytes: number): Promise<void> {
    if (!this.#release) return Promise.reject(new GridError('closed', 'read from an image after its close'));
    return this.#file.read(target, offsetBytes);
  }

  /** Fetches a chunk behind demand reads; what could be stored is then here. Throws what a fetch throws. */
  async prefetch(index: number): Promise<void> {
    if (!this.#release) throw new GridError('closed', 'prefetch from an image after its close');
    await this.#file.prefetch(index);
  }

  write(): Promise<void> {
    return Promise.reject(
      new GridError('read-only', 'images cannot be written to; write to a clone of this one instead'),
    );
  }

  trim(): Promise<void> {
    return this.write();
  }

  flush(): Promise<void> {
    return Promise.resolve();
  }

  /** Undefined also while a start is being recorded: passthrough hides what is read. */
  claimWhole(options?: {
    readonly held: boolean;
  }): Promise<{ readonly fd: number; release(): void } | undefined> {
    return Promise.resolve(this.#release ? this.#file.claimWhole(options?.held) : undefined);
  }

  close(): Promise<void> {
    this.#release?.();
    this.#release = undefined;
    return Promise.resolve();
  }
}
