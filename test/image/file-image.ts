/**
 * A base image for tests: a real sparse file with `direct`, some of its units absent there (they are read through
 * `read`, after a while), so that clones over it meet both ways of a read.
 */
import { closeSync, ftruncateSync, openSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { isAllZero } from '../../src/core/bytes.ts';
import { outOfRange, preadExact, pwriteFull } from '../../src/core/direct-io.ts';
import { GridError } from '../../src/core/errors.ts';
import { UNIT_ABSENT, UNIT_PRESENT } from '../../src/core/image.ts';
import type { DirectMap, Image } from '../../src/core/image.ts';

const UNIT_BYTES = 16 * 1024;

export class FileImage implements Image {
  readonly sizeBytes: number;
  readonly writable = false;
  readonly direct: DirectMap;
  readonly #fd: number;
  readonly #delayMs: number;
  #closed = false;

  /** Writes `content` to `file` (zero blocks as holes). Unit i is absent from `direct` when `absent(i)`. */
  constructor(file: string, content: Buffer, absent: (unit: number) => boolean = () => false, delayMs = 1) {
    this.sizeBytes = content.length;
    this.#delayMs = delayMs;
    this.#fd = openSync(file, 'w+');
    ftruncateSync(this.#fd, content.length);
    for (let at = 0; at < content.length; at += 4096) {
      const block = content.subarray(at, at + 4096);
      if (!isAllZero(block)) pwriteFull(this.#fd, block, at);
    }
    const units = Math.ceil(content.length / UNIT_BYTES);
    const states = new SharedArrayBuffer(units);
    new Uint8Array(states).forEach((_, i, all) => (all[i] = absent(i) ? UNIT_ABSENT : UNIT_PRESENT));
    this.direct = {
      sizeBytes: content.length,
      base: { fd: this.#fd, unitBytes: UNIT_BYTES, states, touched: new SharedArrayBuffer(units) },
    };
  }

  async read(target: Uint8Array, offsetBytes: number): Promise<void> {
    if (offsetBytes < 0 || offsetBytes + target.length > this.sizeBytes) {
      throw outOfRange(offsetBytes, target.length, this.sizeBytes);
    }
    if (this.#delayMs > 0) await sleep(this.#delayMs);
    preadExact(this.#fd, target, 0, target.length, offsetBytes);
  }

  write(): Promise<void> {
    return Promise.reject(new GridError('read-only', 'a base image'));
  }

  trim(): Promise<void> {
    return this.write();
  }

  flush(): Promise<void> {
    return Promise.resolve();
  }

  close(): Promise<void> {
    if (!this.#closed) closeSync(this.#fd);
    this.#closed = true;
    return Promise.resolve();
  }
}

/** The same without `direct`: everything goes through `read`. */
export function withoutDirect(image: Image): Image {
  return {
    sizeBytes: image.sizeBytes,
    writable: false,
    read: (target, offsetBytes) => image.read(target, offsetBytes),
    write: (source, offsetBytes) => image.write(source, offsetBytes),
    trim: (offsetBytes, lengthBytes) => image.trim(offsetBytes, lengthBytes),
    flush: () => image.flush(),
    close: () => image.close(),
  };
}

/** Bytes that repeat from no seed to the next: mulberry32. `next()` is in [0, 1). */
export function seededRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** `lengthBytes` of content with holes: about a third of the 4 KiB blocks are zeros. */
export function patternedContent(lengthBytes: number, seed: number): Buffer {
  const random = seededRandom(seed);
  const content = Buffer.alloc(lengthBytes);
  for (let at = 0; at < lengthBytes; at += 4096) {
    if (random() < 0.33) continue;
    const end = Math.min(at + 4096, lengthBytes);
    for (let i = at; i < end; i++) content[i] = 1 + Math.floor(random() * 255);
  }
  return content;
}
