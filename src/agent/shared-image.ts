/** One open image with several users: each has a handle of its own to close; the last close is told. */
import { GridError } from '../core/errors.ts';
import type { DirectMap, Image } from '../core/image.ts';
import type { Usage, UsageFigures } from '../core/usage.ts';

export class SharedImage<T extends Image> {
  readonly image: T;
  readonly #lastClosed: () => Promise<void>;
  #users = 0;

  constructor(image: T, lastClosed: () => Promise<void>) {
    this.image = image;
    this.#lastClosed = lastClosed;
  }

  get users(): number {
    return this.#users;
  }

  handle(): Image {
    this.#users++;
    return new Handle(this.image, () => {
      this.#users--;
      return this.#users === 0 ? this.#lastClosed() : Promise.resolve();
    });
  }
}

/** What was read and written of each image in `open` that counts it, by the names that these have there. */
export function usagesOf(
  open: ReadonlyMap<string, SharedImage<Image>>,
): ({ readonly id: string } & UsageFigures)[] {
  return [...open].flatMap(([id, { image }]) => (image.usage ? [{ id, ...image.usage.figures() }] : []));
}

class Handle implements Image {
  readonly #image: Image;
  #release: (() => Promise<void>) | undefined;
  readonly direct?: DirectMap;
  readonly usage?: Usage;

  constructor(image: Image, release: () => Promise<void>) {
    this.#image = image;
    this.#release = release;
    if (image.direct) this.direct = image.direct;
    if (image.usage) this.usage = image.usage;
  }

  get sizeBytes(): number {
    return this.#image.sizeBytes;
  }

  get writable(): boolean {
    return this.#image.writable;
  }

  read(target: Uint8Array, offsetBytes: number): Promise<void> {
    return this.#open().read(target, offsetBytes);
  }

  write(source: Uint8Array, offsetBytes: number): Promise<void> {
    return this.#open().write(source, offsetBytes);
  }

  trim(offsetBytes: number, lengthBytes: number): Promise<void> {
    return this.#open().trim(offsetBytes, lengthBytes);
  }

  flush(): Promise<void> {
    return this.#open().flush();
  }

  async close(): Promise<void> {
    const release = this.#release;
    this.#release = undefined;
    await release?.();
  }

  #open(): Image {
    if (!this.#release) throw new GridError('closed', 'the image was closed');
    return this.#image;
  }
}
