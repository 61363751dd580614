/**
 * What a clone is on disk. `clones/ID/clone.json` (below) names the layers that make up its disk, bottom first, as
 * folders of `layers/`; the last one is its own, the others are frozen and shared. A record is replaced by rename,
 * which is the one moment in which a clone changes; a layer that no record names is garbage.
 */
import { open, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { Digest } from '../core/bytes.ts';
import { isDigest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { FROZEN_LAYERS_MAX } from '../core/image.ts';
import { IMAGE_BYTES_MAX } from '../core/limits.ts';
import { isName } from '../core/manifest.ts';

/** Non-persistent: goes with the VM that runs over it, or with `rm`. Persistent: only with `rm`. Full: persistent,
 * and a file of its own once it is filled. */
export const CLONE_KINDS = ['non-persistent', 'persistent', 'full'] as const;
export type CloneKind = (typeof CLONE_KINDS)[number];

export interface CloneRecord {
  readonly schema: 2;
  readonly id: string;
  readonly kind: CloneKind;
  /** The reference it was made from, as the user wrote it: for people only. */
  readonly image: string;
  /** Manifest digest of the base: what counts. */
  readonly base: Digest;
  /** Names below `layers/`, bottom first. */
  readonly layers: readonly string[];
  /** Set when its disk needs nothing of the base any more: what the lowest layer names as its base. */
  readonly detached?: Digest;
  readonly sizeBytes: number;
  /** Most data that its own layer may hold. */
  readonly quotaBytes?: number;
  /** The clone that it was made from. */
  readonly parent?: string;
  /** ISO 8601, UTC. */
  readonly created: string;
  /** The VM it was made for; it goes with that VM. */
  readonly vm?: string;
  /** What of it was pushed to the store, or pulled from there. */
  readonly pushed?: PushedState;
}

/** Where a clone and its pushed versions stand. Whoever pushes next has to have the last one. */
export interface PushedState {
  /** The tag that points at the last pushed version. */
  readonly reference: string;
  /** The same in all pushed versions of one clone, on whatever host: 32 hexadecimal digits. */
  readonly lineage: string;
  /** Of the version that this clone pushed or pulled last; 0: none yet. */
  readonly generation: number;
  /** That version: its manifest, and its chunk table. */
  readonly manifest?: Digest;
  readonly table?: Digest;
  /** The next version's manifest, while its tag is being moved: after a crash it may have been or not. */
  readonly pending?: Digest;
}

export const RECORD_FILE = 'clone.json';

/** Puts the record into `folder` (which is there), durable when it resolves unless `durable` is false. */
export async function writeRecord(folder: string, record: CloneRecord, durable = true): Promise<void> {
  const file = path.join(folder, RECORD_FILE);
  try {
    await writeFile(`${file}.new`, JSON.stringify(record) + '\n', { flush: durable });
    await rename(`${file}.new`, file);
    if (durable) await syncFolder(folder);
  } catch (error) {
    await rm(`${file}.new`, { force: true });
    throw error;
  }
}

/** Throws bad-format, newer-format and what the disk says. */
export async function readRecord(folder: string): Promise<CloneRecord> {
  const text = await readFile(path.join(folder, RECORD_FILE), 'utf8');
  const record = parseObject(text) as Partial<CloneRecord>;
  if (record.schema !== 2)
    throw new GridError(
      'newer-format',
      `its clone.json has schema ${JSON.stringify(record.schema)}, this is 2`,
    );
  const { id, kind, base, layers, detached, sizeBytes, quotaBytes } = record;
  const good =
    id === path.basename(folder) &&
    isName(id) &&
    CLONE_KINDS.includes(kind!) &&
    isDigest(base) &&
    Array.isArray(layers) &&
    layers.length > 0 &&
    layers.length <= FROZEN_LAYERS_MAX + 1 &&
    layers.every(isName) &&
    (detached === undefined || isDigest(detached)) &&
    isSize(sizeBytes) &&
    (quotaBytes === undefined || isSize(quotaBytes)) &&
    (record.pushed === undefined || isPushed(record.pushed));
  if (!good) throw new GridError('bad-format', 'its clone.json is malformed');
  return record as CloneRecord;
}

/** Of all clones in `folder`. Removes what is half-made; one that cannot be read is said and left alone. */
export async function readRecords(
  folder: string,
  log: (line: string) => void,
): Promise<{ readonly records: CloneRecord[]; readonly unreadable: number }> {
  const records: CloneRecord[] = [];
  let unreadable = 0;
  for (const name of await readdir(folder)) {
    const clone = path.join(folder, name);
    const stats = await stat(path.join(clone, RECORD_FILE)).catch(() => undefined);
    // Without a byte: the power failed before a record that nobody had made durable yet reached the disk.
    if (name.startsWith('.') || stats?.size === 0) {
      await rm(clone, { recursive: true, force: true });
      continue;
    }
    try {
      records.push(await readRecord(clone));
    } catch (error) {
      unreadable++;
      log(`clone ${name} is left alone, it cannot be read: ${String(error)}`);
    }
  }
  return { records, unreadable };
}

function isPushed({ reference, lineage, generation, manifest, table, pending }: PushedState): boolean {
  return (
    typeof reference === 'string' &&
    /^[0-9a-f]{32}$/.test(lineage) &&
    Number.isSafeInteger(generation) &&
    generation >= 0 &&
    [manifest, table, pending].every((digest) => digest === undefined || isDigest(digest))
  );
}

function parseObject(text: string): object {
  try {
    return Object(JSON.parse(text)) as object;
  } catch (cause) {
    throw new GridError('bad-format', 'its clone.json is not JSON', { cause });
  }
}

function isSize(value: unknown): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 && value <= IMAGE_BYTES_MAX;
}

/** Makes the names in a folder durable. */
export async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** It goes with its VM, and the VM with the power of this host. */
export function isVolatile(clone: { readonly kind?: CloneKind; readonly vm?: string }): boolean {
  return (clone.kind ?? 'non-persistent') === 'non-persistent' && clone.vm !== undefined;
}
