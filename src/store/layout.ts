/**
 * A store on disk: a folder of immutable objects that any static HTTP server can serve.
 *
 * Invariants
 *  - An object that is there is whole, also after power loss: it is written under tmp/, made durable (syncfs), and
 *    only then renamed to its name; a tag moves after everything that it reaches is durable under its name.
 *  - An object is named by the SHA-256 of its PLAIN bytes and never changes. What does change (`v1/tags.json`,
 *    profiles) changes by rename, by whoever holds the flock of `lock`.
 *  - Whoever writes objects holds the flock of tmp/ID/lock for as long as it does. A folder tmp/ID that nobody
 *    holds belongs to a dead writer and may be removed. Folders in tmp/ are made by the holder of `lock` (so a
 *    folder is never seen before its own lock is held): who holds `lock` knows all live writers.
 *  - A manifest that is there has its table, chunks and parts there: a writer gives it its name last (holding
 *    `lock`), a garbage collection (gc.ts) takes it first. What only damage can break, verify finds.
 *  - What lies below v1/ is what a server offers, under the same path; nothing else is offered.
 *
 *  gridvfs-store.json            {"format":"gridvfs-store","version":1}
 *  lock                          empty; flock'ed by who changes tags, pins or holds, starts a writer, sweeps
 *  swept                         another text after each sweep of a garbage collection
 *  pins/DIGEST                   empty; this manifest is kept though no tag points at it
 *  holds/HOLDER                  digests, a line each, that the clones of a host lie on (holds.ts)
 *  tmp/ID/lock                   empty; flock'ed by the writer ID (ID = pid-random)
 *  tmp/ID/…                      its unfinished files
 *  v1/tags.json                  encodeTags() of core/manifest.ts
 *  v1/manifests/AB/DIGEST        manifest JSON, as it is
 *  v1/tables/AB/DIGEST           zstd of the chunk table's bytes (core/chunk-table.ts)
 *  v1/chunks/AB/DIGEST           zstd of the plain chunk           (AB: the first two digits of DIGEST)
 *  v1/profiles/AB/DIGEST/PURPOSE.json   encodeProfile() of core/profile.ts, DIGEST that of the manifest
 */
import { closeSync, fsyncSync, openSync, renameSync, rmSync, writeSync } from 'node:fs';
import { open, readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import type { Digest } from '../core/bytes.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';

export const STORE_VERSION = 1;
export const MARKER_FILE = 'gridvfs-store.json';

export const OBJECT_KINDS = ['manifests', 'tables', 'chunks'] as const;
export type ObjectKind = (typeof OBJECT_KINDS)[number];

/** Objects never change, and say so to whoever would edit one by accident. */
const OBJECT_MODE = 0o444;

/** The paths of a store. */
export class StoreLayout {
  readonly folder: string;
  readonly marker: string;
  readonly lock: string;
  readonly tmp: string;
  readonly swept: string;
  readonly pins: string;
  readonly holds: string;
  /** The root of what a server offers. */
  readonly v1: string;
  readonly tags: string;

  constructor(folder: string) {
    this.folder = folder;
    this.marker = path.join(folder, MARKER_FILE);
    this.lock = path.join(folder, 'lock');
    this.tmp = path.join(folder, 'tmp');
    this.swept = path.join(folder, 'swept');
    this.pins = path.join(folder, 'pins');
    this.holds = path.join(folder, 'holds');
    this.v1 = path.join(folder, 'v1');
    this.tags = path.join(this.v1, 'tags.json');
  }

  /** The folder of all objects of one kind. */
  kind(kind: ObjectKind): string {
    return `${this.v1}/${kind}`;
  }

  /** Where an object lies. `digest` was checked by the caller (`isDigest`): it becomes a path here. */
  object(kind: ObjectKind, digest: Digest): string {
    return `${this.v1}/${kind}/${digest.slice(0, 2)}/${digest}`;
  }

  /** The folder of all profiles of a manifest. */
  profiles(manifest: Digest): string {
    return `${this.v1}/profiles/${manifest.slice(0, 2)}/${manifest}`;
  }
}

/** Where the writer of `folder` (writer.ts) puts an object until it is flushed. */
export function temporaryPath(folder: string, kind: ObjectKind, digest: Digest): string {
  return `${folder}/${kind}-${digest}`;
}

/** Creates `file` with `bytes`; it must not exist. Not durable: see `Writer.flush`. */
export function writeNewFile(file: string, bytes: Uint8Array): void {
  const fd = openSync(file, 'wx', OBJECT_MODE);
  try {
    writeAll(fd, bytes);
  } finally {
    closeSync(fd);
  }
}

/** Creates `file` with `bytes`, durable when it returns, except for its name (see `syncFolder`). */
export function writeDurableFile(file: string, bytes: Uint8Array): void {
  const fd = openSync(file, 'wx', 0o666);
  try {
    writeAll(fd, bytes);
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

function writeAll(fd: number, bytes: Uint8Array): void {
  for (let done = 0; done < bytes.length;) done += writeSync(fd, bytes, done);
}

/** Makes the names in a folder durable. */
export function syncFolder(folder: string): void {
  const fd = openSync(folder, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/** Temp file, fsync, rename, fsync of the folder. The caller holds the store's lock. */
export function replaceFile(layout: StoreLayout, file: string, bytes: Uint8Array): void {
  // One name is enough: only the holder of the lock writes here, so what lies there is a dead writer's.
  const temporary = path.join(layout.tmp, 'replace');
  rmSync(temporary, { force: true });
  writeDurableFile(temporary, bytes);
  renameSync(temporary, file);
  syncFolder(path.dirname(file));
}

/** A whole file of at most `maxBytes`; bad-format above. */
export async function readBounded(file: string, maxBytes: number): Promise<Buffer> {
  const handle = await open(file, 'r');
  try {
    const { size } = await handle.stat();
    if (size > maxBytes)
      throw new GridError('bad-format', `${file} has ${size} bytes, more than ${maxBytes}`);
    return await readFile(handle);
  } finally {
    await handle.close();
  }
}

/** What lies in a folder of ours, by name; nothing where it is not there yet. */
export async function entriesOf(
  folder: string,
): Promise<{ name: string; isFile: boolean; isFolder: boolean }[]> {
  try {
    const entries = await readdir(folder, { withFileTypes: true });
    return entries
      .map((entry) => ({ name: entry.name, isFile: entry.isFile(), isFolder: entry.isDirectory() }))
      .toSorted((a, b) => (a.name < b.name ? -1 : 1));
  } catch (error) {
    // The folder of a kind comes with its first object.
    if (errnoOf(error) === 'ENOENT') return [];
    throw asGridError(error, `cannot list ${folder}`);
  }
}
