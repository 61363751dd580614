/**
 * A new version that is made from another: a disk or memory that was a clone of it, or bytes in hand without any
 * parent. What did not change is taken from the parent's chunk table as it is; only chunks that may have changed are
 * read, of some only the blocks that did (patching.ts), and packed at the end that leads to the store: a folder of this host (commit.ts), or whatever a source
 * leads to (upload-image.ts). So the work goes with what changed.
 *
 *   plan: size, which chunks → end.pack: read, hash, compress and store what lacks → table → manifest
 *     → end.publish: durable, and named only when all that it reaches is there; the tag moves last
 */
import type { Digest } from '../core/bytes.ts';
import { ChunkTable, encodeChunkTable, objectsOf } from '../core/chunk-table.ts';
import type { ChunkEntry, NewEntry } from '../core/chunk-table.ts';
import { compress } from '../core/chunk.ts';
import { GridError, invariant } from '../core/errors.ts';
import { LABEL_LENGTH_MAX, LABELS_MAX, NAME_LENGTH_MAX } from '../core/limits.ts';
import {
  chunkCountOf,
  chunkLengthOf,
  encodeManifest,
  parseManifest,
  parseReference,
} from '../core/manifest.ts';
import type { Manifest, ManifestKind, Tag } from '../core/manifest.ts';
import type { ChunkSource } from '../core/source.ts';
import type { NewImage } from '../core/uploads.ts';

/** Collections that take chunks from under a version while it is made; the second pass stores them anew. */
const PASSES_MAX = 4;

/** What whoever makes a version says of it. */
export interface NewVersionOptions {
  /** `name:version` to point at the result. */
  readonly reference: string;
  /** Manifest of the version that this one is made from; must be in the store. */
  readonly parent?: Digest;
  /** At least the parent's. */
  readonly sizeBytes: number;
  /** Without a parent; with one, the parent's counts. */
  readonly chunkBytes?: number;
  /** Numbers, rising, of chunks that may differ from the parent; `chunkBytes` are the parent's. */
  readonly changed: (chunkBytes: number) => Iterable<number>;
  /** True: every chunk that is not changed is zeros, whatever the parent has there. */
  readonly standalone?: boolean;
  /** Beside the parent's, which they replace where they have the same key. */
  readonly labels?: Readonly<Record<string, string>>;
  /** Instead of the parent's kind and parts; its labels are not taken over then. */
  readonly own?: { readonly kind: ManifestKind; readonly parts: Readonly<Record<string, Digest>> };
  readonly onProgress?: (doneBytes: number, totalBytes: number) => void;
  readonly signal?: AbortSignal;
}

export interface NewVersion {
  readonly manifest: Manifest;
  readonly digest: Digest;
  readonly tag: Tag;
  /** Chunks that may have changed, read as a whole or in part. */
  readonly changedChunks: number;
  /** Objects that the store did not have, chunks or blocks of several in one: all that is uploaded. */
  readonly newChunks: number;
  readonly newStoredBytes: number;
}

/** A chunk of the parent: an object, or a patched one, whose digest no object has. */
export type ChunkBelow = ChunkEntry & { readonly plainBytes: number };

/** What an end has to pack. */
export interface Changes {
  readonly reference: string;
  readonly size: Pick<Manifest, 'sizeBytes' | 'chunkBytes'>;
  /** Rising. */
  readonly indexes: readonly number[];
  /** What the parent has there; undefined for zeros. */
  readonly below: (index: number) => ChunkBelow | undefined;
  readonly onProgress?: (doneBytes: number, totalBytes: number) => void;
  readonly signal?: AbortSignal;
}

export interface Packed {
  /** Of all that are not zeros, in any order. */
  readonly chunks: readonly NewEntry[];
  readonly newChunks: number;
  readonly newStoredBytes: number;
}

/** The end of the pipeline that a store is at. */
export interface VersionEnd {
  /** `again`: some of what the last pass relied on was collected as garbage. */
  pack(changes: Changes, again: boolean): Promise<Packed>;
  /** Undefined, and nothing is named: a collection took some of `used`; pack again. */
  publish(image: NewImage, used: Iterable<Digest>): Promise<Tag | undefined>;
}

/** `tag` undefined: the caller did not want it. */
export type MadeVersion = Omit<NewVersion, 'tag'> & { readonly tag?: Tag };

/**
 * Packs what changed and publishes it, unless `beforeTag` says no. Durable when it resolves; a failure or a cancel
 * leaves the tag where it was. Throws bad-request (reference, labels, a disk that is smaller than
 * its parent), exists (the name is of another kind), not-found (parent), in-use (collections in the way), closed (cancelled), and what the end throws.
 */
export async function makeVersion(
  source: Pick<ChunkSource, 'listTags' | 'readManifest' | 'readTable'>,
  end: VersionEnd,
  options: NewVersionOptions,
  beforeTag: (made: MadeVersion) => Promise<boolean> = () => Promise.resolve(true),
): Promise<MadeVersion> {
  const { name, version } = parseReference(options.reference);
  const parent = options.parent === undefined ? undefined : await readParent(source, options.parent);
  const labels = labelsOf(options, parent?.manifest);
  await checkKind(source, options.reference, kindOf(options.own, parent));
  const changes = changesOf(options, parent);
  let newChunks = 0;
  let newStoredBytes = 0;
  for (let pass = 1; ; pass++) {
    const packed = await end.pack(changes, pass > 1);
    newChunks += packed.newChunks;
    newStoredBytes += packed.newStoredBytes;
    const { image, used, digest } = describe(options, parent, changes, packed, labels);
    const made = {
      manifest: parseManifest(image.manifest, digest),
      digest,
      changedChunks: changes.indexes.length,
      newChunks,
      newStoredBytes,
    };
    checkCancelled(changes);
    if (!(await beforeTag(made))) return made;
    const tag = await end.publish({ ...image, name, version }, used);
    if (tag) return { ...made, tag };
    if (pass === PASSES_MAX) {
      throw new GridError(
        'in-use',
        `garbage collections removed chunks of ${options.reference} while it was made, ${pass} times: make it when none runs`,
      );
    }
  }
}

/** Throws closed. */
export function checkCancelled({ signal, reference }: Pick<Changes, 'signal' | 'reference'>): void {
  if (signal?.aborted) throw new GridError('closed', `the making of ${reference} was cancelled`);
}

function kindOf(own: NewVersionOptions['own'], parent: Parent | undefined): ManifestKind {
  return own?.kind ?? parent?.manifest.kind ?? 'disk';
}

/** Throws exists: whoever uses the name counts on its kind (a VM boots from a disk, goes on in memory). */
async function checkKind(
  source: Pick<ChunkSource, 'listTags' | 'readManifest'>,
  reference: string,
  kind: ManifestKind,
): Promise<void> {
  const { name, version } = parseReference(reference);
  const tag = (await source.listTags()).find((one) => one.name === name && one.version === version);
  if (!tag) return;
  const there = parseManifest(await source.readManifest(tag.manifest), tag.manifest).kind;
  if (there !== kind)
    throw new GridError(
      'exists',
      `${reference} is the name of an image of kind '${there}'; give what is of kind '${kind}' another one`,
    );
}

interface Parent {
  readonly digest: Digest;
  readonly manifest: Manifest;
  readonly table: ChunkTable;
}

async function readParent(
  source: Pick<ChunkSource, 'readManifest' | 'readTable'>,
  digest: Digest,
): Promise<Parent> {
  const manifest = parseManifest(await source.readManifest(digest), digest);
  return {
    digest,
    manifest,
    table: ChunkTable.parse(await source.readTable(manifest.table), manifest.table),
  };
}

function changesOf(options: NewVersionOptions, parent: Parent | undefined): Changes {
  const { reference, sizeBytes, standalone, onProgress, signal } = options;
  const below = parent?.manifest;
  if (below && sizeBytes < below.sizeBytes) {
    throw new GridError('bad-request', `the disk has ${sizeBytes} bytes, fewer than its parent's`);
  }
  const chunkBytes = below?.chunkBytes ?? options.chunkBytes;
  invariant(chunkBytes !== undefined, 'a version without a parent says its chunk size');
  const size = { sizeBytes, chunkBytes };
  const changed = new Set(options.changed(chunkBytes));
  // A last chunk that was short is a longer one now, with another digest.
  if (below && !standalone && sizeBytes > below.sizeBytes && below.sizeBytes % chunkBytes !== 0) {
    changed.add(Math.floor(below.sizeBytes / chunkBytes));
  }
  const indexes = [...changed].toSorted((a, b) => a - b);
  return {
    reference,
    size,
    indexes,
    below(index) {
      if (!parent || standalone || index >= parent.table.count) return undefined;
      const entry = parent.table.at(index);
      return entry && { ...entry, plainBytes: chunkLengthOf(parent.manifest, index) };
    },
    ...(onProgress ? { onProgress } : {}),
    ...(signal ? { signal } : {}),
  };
}

/** Table and manifest of the version, and the digests of all its chunks. */
function describe(
  { standalone, own }: NewVersionOptions,
  parent: Parent | undefined,
  { size, indexes }: Changes,
  packed: Packed,
  labels: Record<string, string>,
) {
  const chunks: NewEntry[] = [...packed.chunks];
  if (parent && !standalone) {
    // An end may have packed more than what changed.
    const changed = new Set([...indexes, ...chunks.map(({ index }) => index)]);
    for (const entry of parent.table.entries()) if (!changed.has(entry.index)) chunks.push(entry);
  }
  chunks.sort((a, b) => a.index - b.index);
  const table = encodeChunkTable(size.chunkBytes, chunkCountOf(size), chunks);
  const { bytes, digest } = encodeManifest({
    schema: 1,
    kind: kindOf(own, parent),
    ...size,
    table: table.digest,
    nonzeroBytes: chunks.reduce((sum, { index }) => sum + chunkLengthOf(size, index), 0),
    ...(parent ? { parent: parent.digest } : {}),
    labels,
    parts: own?.parts ?? parent?.manifest.parts ?? {},
    created: new Date().toISOString(),
  });
  return {
    image: { manifest: bytes, table: compress(table.bytes) },
    used: new Set(chunks.flatMap(objectsOf).map((object) => object.digest)),
    digest,
  };
}

function labelsOf({ own, labels }: NewVersionOptions, parent: Manifest | undefined): Record<string, string> {
  const all = { ...(own ? {} : parent?.labels), ...labels };
  checkLabels(all);
  return all;
}

/** Throws bad-request for labels that no manifest may have. */
export function checkLabels(labels: Readonly<Record<string, string>>): void {
  const entries = Object.entries(labels);
  if (entries.length > LABELS_MAX) throw new GridError('bad-request', `more than ${LABELS_MAX} labels`);
  for (const [key, value] of entries) {
    if (typeof value !== 'string' || value.length > LABEL_LENGTH_MAX || key.length > NAME_LENGTH_MAX) {
      throw new GridError(
        'bad-request',
        `the label '${key.slice(0, NAME_LENGTH_MAX)}' or its value is too long`,
      );
    }
  }
}
