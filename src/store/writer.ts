/**
 * How objects come into a store: written whole under tmp/ID, made durable many at a time with one syncfs(2), then
 * renamed to their names. One flush per object would cost a journal commit each, some milliseconds times
 * thousands; syncfs waits for other writers' dirty pages of that file system too, which the batches keep rare.
 * While it lives, a writer holds the lock of its folder: what it writes is not garbage though no tag reaches it.
 * What it found there and relies on may be: so `publish` looks whether a garbage collection was at work meanwhile.
 */
import { randomBytes } from 'node:crypto';
import {
  closeSync,
  existsSync,
  fstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
} from 'node:fs';
import path from 'node:path';
import type { Digest } from '../core/bytes.ts';
import { asGridError, errnoOf } from '../core/errors.ts';
import { syncFileSystemInBackground, tryLock } from '../core/linux.ts';
import type { ObjectKind, StoreLayout } from './layout.ts';
import { temporaryPath, writeNewFile } from './layout.ts';
import { withStoreLock } from './lock.ts';

/** Renames between two turns of the event loop: about 5 ms of it. */
const RENAMES_PER_TURN = 256;

/** An object at its temporary path. */
export interface NewObject {
  readonly kind: ObjectKind;
  readonly digest: Digest;
}

export class Writer {
  /** Its own folder under tmp/, for whatever it needs; goes with it. */
  readonly folder: string;
  readonly #layout: StoreLayout;
  readonly #lockFd: number;
  /** The last sweep that what this writer relies on has seen. */
  #lastSweep: string;
  #ended = false;

  private constructor(layout: StoreLayout, folder: string, lockFd: number) {
    this.#layout = layout;
    this.folder = folder;
    this.#lockFd = lockFd;
    this.#lastSweep = lastSweep(layout);
  }

  /** Registers a writer, and removes what dead ones left. Throws in-use, local-io, no-space. */
  static async begin(layout: StoreLayout): Promise<Writer> {
    return withStoreLock(layout, () => {
      const folder = path.join(layout.tmp, `${process.pid}-${randomBytes(6).toString('hex')}`);
      try {
        mkdirSync(layout.tmp, { recursive: true });
        tendWriters(layout);
        mkdirSync(folder);
        const lockFd = openSync(path.join(folder, 'lock'), 'wx');
        tryLock(lockFd);
        return new Writer(layout, folder, lockFd);
      } catch (error) {
        throw asGridError(error, `cannot write to the store ${layout.folder}`);
      }
    });
  }

  /** Where the caller writes an object's stored bytes, with `writeNewFile`, before it hands it to `flush`. */
  temporaryPath(kind: ObjectKind, digest: Digest): string {
    return temporaryPath(this.folder, kind, digest);
  }

  /** Writes an object that is in memory to its temporary path. */
  put(kind: ObjectKind, digest: Digest, stored: Uint8Array): void {
    try {
      const file = this.temporaryPath(kind, digest);
      rmSync(file, { force: true });
      writeNewFile(file, stored);
    } catch (error) {
      throw asGridError(error, `cannot write to the store ${this.#layout.folder}`);
    }
  }

  /** Makes the written objects durable and gives them their names. The names are durable after `sync`. */
  async flush(objects: readonly NewObject[]): Promise<void> {
    if (objects.length === 0) return;
    await this.sync();
    await this.#renameAll(objects);
  }

  async #renameAll(objects: readonly NewObject[]): Promise<void> {
    try {
      for (const [i, { kind, digest }] of objects.entries()) {
        if (i % RENAMES_PER_TURN === RENAMES_PER_TURN - 1) await new Promise(setImmediate);
        this.#rename(kind, digest);
      }
    } catch (error) {
      throw asGridError(error, `cannot write to the store ${this.#layout.folder}`);
    }
  }

  /**
   * Gives the last chunks and then tables and manifests (`described`, parts before what they are parts of) their
   * names. False, and nothing of `described` named, when a garbage collection removed some of the chunks in `used`
   * since: they have to be packed again, and then will stay. Durable after `sync`.
   *
   * One flush for all of it: that a manifest's name is not on the disk before those of the chunks rests on the file
   * system's journal, which keeps the order of renames.
   */
  async publish(
    chunks: readonly NewObject[],
    described: readonly NewObject[],
    used: Iterable<Digest>,
  ): Promise<boolean> {
    await this.sync();
    await this.#renameAll(chunks);
    return withStoreLock(this.#layout, () => {
      try {
        const sweep = lastSweep(this.#layout);
        if (sweep !== this.#lastSweep) {
          this.#lastSweep = sweep;
          for (const digest of used) {
            if (!existsSync(this.#layout.object('chunks', digest))) return false;
          }
        }
        for (const { kind, digest } of described) this.#rename(kind, digest);
        return true;
      } catch (error) {
        throw asGridError(error, `cannot write to the store ${this.#layout.folder}`);
      }
    });
  }

  #rename(kind: ObjectKind, digest: Digest): void {
    const from = this.temporaryPath(kind, digest);
    const to = this.#layout.object(kind, digest);
    try {
      renameSync(from, to);
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw error;
      mkdirSync(path.dirname(to), { recursive: true });
      renameSync(from, to);
    }
  }

  /** Everything written and renamed so far, by anybody, survives power loss. */
  async sync(): Promise<void> {
    try {
      await syncFileSystemInBackground(this.#lockFd);
    } catch (error) {
      throw asGridError(error, `cannot flush the store ${this.#layout.folder} to disk`);
    }
  }

  /** Removes its folder with whatever was not flushed. Idempotent. */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    try {
      rmSync(this.folder, { recursive: true, force: true });
    } finally {
      closeSync(this.#lockFd);
    }
  }
}

/** What the file `swept` says. The caller holds the store's lock. */
function lastSweep(layout: StoreLayout): string {
  try {
    return readFileSync(layout.swept, 'utf8');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return '';
    throw error;
  }
}

/**
 * Removes what dead writers left (unless `remove` is false) and says when the first of the live ones began (ms since 1970, by the clock of the
 * file system; infinity when there is none). The caller holds the store's lock, so no writer is between making its
 * folder and locking it.
 */
export function tendWriters(layout: StoreLayout, remove = true): number {
  let firstMs = Infinity;
  for (const name of readdirSync(layout.tmp)) {
    const folder = path.join(layout.tmp, name);
    let fd: number | undefined;
    try {
      fd = openSync(path.join(folder, 'lock'), 'r');
    } catch (error) {
      // A writer that ends removes its folder; a folder without a lock died before it had one.
      if (!['ENOENT', 'ENOTDIR'].includes(errnoOf(error) ?? '')) throw error;
    }
    try {
      if (fd === undefined || tryLock(fd)) {
        if (remove) rmSync(folder, { recursive: true, force: true });
      } else firstMs = Math.min(firstMs, fstatSync(fd).mtimeMs);
    } finally {
      if (fd !== undefined) closeSync(fd);
    }
  }
  return firstMs;
}
