/**
 * A store as a ChunkSource, and its tags. Reading needs no lock and no write access: objects never change, tags
 * are replaced whole. Objects come in through a `Writer` (writer.ts), which import.ts drives.
 */
import { mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import path from 'node:path';
import { ChunkTable } from '../core/chunk-table.ts';
import { decompress } from '../core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../core/chunk.ts';
import { isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { MANIFEST_BYTES_MAX, TABLE_BYTES_MAX, TAGS_BYTES_MAX, TAGS_MAX } from '../core/limits.ts';
import {
  chunkCountOf,
  encodeTags,
  isName,
  parseManifest,
  parseReference,
  parseTags,
} from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import type { Purpose } from '../core/profile.ts';
import type { ChunkSource, ReadChunksOptions } from '../core/source.ts';
import type { UploadTarget } from '../core/uploads.ts';
import { ChunkReader } from './chunk-reader.ts';
import {
  entriesOf,
  MARKER_FILE,
  readBounded,
  replaceFile,
  STORE_VERSION,
  StoreLayout,
  syncFolder,
} from './layout.ts';
import type { ObjectKind } from './layout.ts';
import { withStoreLock } from './lock.ts';
import { nearTags } from './near.ts';
import { readHolds, writeHold } from './holds.ts';
import type { Hold } from './holds.ts';
import { readProfile, recordProfile } from './profiles.ts';
import { storeUploads } from './uploads.ts';

/**
 * Makes `folder` a store. Makes the folder where there is none; does nothing where it is a store already; throws
 * exists where it holds anything else, newer-format or bad-format where its marker is not one of ours.
 */
export async function initStore(folder: string): Promise<void> {
  const layout = new StoreLayout(path.resolve(folder));
  try {
    mkdirSync(layout.folder, { recursive: true });
  } catch (error) {
    throw asGridError(error, `cannot make the store ${layout.folder}`);
  }
  if (readMarker(layout) === 'store') return;
  const names = readdirSync(layout.folder);
  // What an init that was killed leaves: everything but the marker, which comes last.
  const foreign = names.find((name) => !['lock', 'tmp', 'v1'].includes(name));
  if (foreign !== undefined) {
    throw new GridError(
      'exists',
      `${layout.folder} is not empty (it has '${foreign}') and not a store; name a new or empty folder`,
    );
  }
  try {
    mkdirSync(layout.v1, { recursive: true });
    mkdirSync(layout.tmp, { recursive: true });
    await withStoreLock(layout, () => {
      if (readMarker(layout) === 'store') return;
      replaceFile(layout, layout.tags, encodeTags([]));
      const marker = JSON.stringify({ format: 'gridvfs-store', version: STORE_VERSION }) + '\n';
      replaceFile(layout, layout.marker, Buffer.from(marker));
    });
  } catch (error) {
    throw asGridError(error, `cannot make the store ${layout.folder}`);
  }
}

/** Opens a store. Throws not-found, bad-format or newer-format; each message names the folder and the way on. */
export async function openStore(folder: string): Promise<Store> {
  const layout = new StoreLayout(path.resolve(folder));
  if (readMarker(layout) === 'none') {
    throw new GridError(
      'not-found',
      `there is no store at ${layout.folder}: create it with 'gridvfs store init ${layout.folder}'`,
    );
  }
  return new Store(layout);
}

function readMarker(layout: StoreLayout): 'store' | 'none' {
  let text: string;
  try {
    text = readFileSync(layout.marker, 'utf8');
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(errnoOf(error) ?? '')) return 'none';
    throw asGridError(error, `cannot open the store ${layout.folder}`);
  }
  let marker: unknown;
  try {
    marker = JSON.parse(text);
  } catch {
    marker = undefined;
  }
  const { format, version } = (typeof marker === 'object' && marker !== null ? marker : {}) as {
    format?: unknown;
    version?: unknown;
  };
  if (format !== 'gridvfs-store' || typeof version !== 'number') {
    throw new GridError(
      'bad-format',
      `${layout.folder} is not a gridvfs store: its ${MARKER_FILE} is damaged or foreign`,
    );
  }
  if (version > STORE_VERSION) {
    throw new GridError(
      'newer-format',
      `the store ${layout.folder} has version ${version}, this gridvfs reads up to ${STORE_VERSION}: upgrade gridvfs`,
    );
  }
  return 'store';
}

/** What one tag costs. */
export interface ImageStatistics {
  readonly tag: Tag;
  readonly manifest: Manifest;
  /** Chunks that are not all zero, doubles counted once, and their bytes as they lie in the store. */
  readonly chunks: number;
  readonly storedBytes: number;
}

export interface StoreStatistics {
  readonly images: ImageStatistics[];
  /** Over all tags, chunks that several share counted once. */
  readonly chunks: number;
  readonly storedBytes: number;
}

export class Store implements ChunkSource {
  readonly name: string;
  readonly layout: StoreLayout;
  readonly #reader: ChunkReader;

  /** Use `openStore`. */
  constructor(layout: StoreLayout) {
    this.name = layout.folder;
    this.layout = layout;
    this.#reader = new ChunkReader(layout);
  }

  /** All tags, sorted by name and version. */
  async listTags(): Promise<Tag[]> {
    const what = `the tags of the store ${this.name}`;
    try {
      return parseTags(await readBounded(this.layout.tags, TAGS_BYTES_MAX), what);
    } catch (error) {
      throw errnoOf(error) === 'ENOENT'
        ? new GridError('bad-format', `the store ${this.name} has lost its v1/tags.json`, { cause: error })
        : asGridError(error, `cannot read ${what}`);
    }
  }

  /** The tag that `reference` (`name` or `name:version`) names; not-found lists the nearest ones there are. */
  async resolve(reference: string): Promise<Tag> {
    const { name, version } = parseReference(reference);
    const tags = await this.listTags();
    const tag = tags.find((one) => one.name === name && one.version === version);
    if (tag) return tag;
    throw new GridError('not-found', this.#noSuchTag(name, version, tags));
  }

  #noSuchTag(name: string, version: string, tags: readonly Tag[]): string {
    const near = nearTags(`${name}:${version}`, tags);
    const wayOn =
      near.length > 0
        ? `it has ${near.join(', ')}`
        : tags.length > 0
          ? `'gridvfs store ls' lists what it has`
          : 'it has no images yet';
    return `the store ${this.name} has no image ${name}:${version}; ${wayOn}`;
  }

  /**
   * Points `name:version` at a manifest that is in the store. Durable when it resolves. `expected`: only if the tag
   * points at that manifest now (null: if there is no such tag), or at `manifest` already. Throws not-found, exists.
   */
  async setTag(name: string, version: string, manifest: Digest, expected?: Digest | null): Promise<Tag> {
    if (!isName(name) || !isName(version)) parseReference(`${name}:${version}`);
    return withStoreLock(this.layout, async () => {
      parseManifest(await this.readManifest(manifest), manifest);
      const tags = await this.listTags();
      const before = tags.find((one) => one.name === name && one.version === version);
      if (expected !== undefined) {
        if (before?.manifest === manifest) return before;
        if ((before?.manifest ?? null) !== expected) {
          throw new GridError(
            'exists',
            `${name}:${version} of the store ${this.name} is ${before?.manifest ?? 'not there'}, not ${expected ?? 'free'}: somebody else moved it`,
          );
        }
      }
      const others = tags.filter((one) => one !== before);
      if (others.length >= TAGS_MAX)
        throw new GridError('no-space', `the store ${this.name} has ${TAGS_MAX} tags, the most there can be`);
      const tag: Tag = { name, version, manifest, moved: new Date().toISOString() };
      this.#writeTags([...others, tag]);
      return tag;
    });
  }

  /** Takes the name away; what it pointed at stays until a garbage collection. Throws not-found. */
  async removeTag(name: string, version: string): Promise<void> {
    await withStoreLock(this.layout, async () => {
      const tags = await this.listTags();
      const others = tags.filter((one) => one.name !== name || one.version !== version);
      if (others.length === tags.length)
        throw new GridError('not-found', this.#noSuchTag(name, version, tags));
      this.#writeTags(others);
    });
  }

  /** Takes those away that still point at what these do. */
  async removeTags(gone: readonly Tag[]): Promise<void> {
    const isGone = ({ name, version, manifest }: Tag) =>
      gone.some((one) => one.name === name && one.version === version && one.manifest === manifest);
    await withStoreLock(this.layout, async () =>
      this.#writeTags((await this.listTags()).filter((tag) => !isGone(tag))),
    );
  }

  #writeTags(tags: readonly Tag[]): void {
    try {
      replaceFile(this.layout, this.layout.tags, encodeTags(tags));
    } catch (error) {
      throw asGridError(error, `cannot write the tags of the store ${this.name}`);
    }
  }

  /** Keeps a manifest, and what it reaches, though no tag points at it: for clones and checkpoints made of it.
   * Durable when it resolves. Throws not-found, corrupt. */
  async pin(manifest: Digest): Promise<void> {
    await withStoreLock(this.layout, async () => {
      parseManifest(await this.readManifest(manifest), manifest);
      try {
        if (mkdirSync(this.layout.pins, { recursive: true }) !== undefined) syncFolder(this.layout.folder);
        replaceFile(this.layout, path.join(this.layout.pins, manifest), Buffer.alloc(0));
      } catch (error) {
        throw asGridError(error, `cannot pin ${manifest} in the store ${this.name}`);
      }
    });
  }

  /** Takes a pin away. Throws not-found. */
  async unpin(manifest: Digest): Promise<void> {
    if (!isDigest(manifest)) throw new GridError('bad-request', `'${String(manifest)}' is not a digest`);
    await withStoreLock(this.layout, () => {
      try {
        rmSync(path.join(this.layout.pins, manifest));
        syncFolder(this.layout.pins);
      } catch (error) {
        throw errnoOf(error) === 'ENOENT'
          ? new GridError('not-found', `${manifest} is not pinned in the store ${this.name}`)
          : asGridError(error, `cannot unpin ${manifest} in the store ${this.name}`);
      }
    });
  }

  /** The pinned manifests, sorted. */
  async listPins(): Promise<Digest[]> {
    return (await entriesOf(this.layout.pins)).map(({ name }) => name).filter(isDigest);
  }

  /** See ChunkSource. Durable when it resolves. */
  async hold(holder: string, manifests: readonly Digest[]): Promise<void> {
    await writeHold(this.layout, holder, manifests);
  }

  /** What hosts hold. */
  listHolds(): Promise<Hold[]> {
    return readHolds(this.layout);
  }

  async readManifest(digest: Digest): Promise<Buffer> {
    return this.#readObject('manifests', digest, MANIFEST_BYTES_MAX);
  }

  async readTable(digest: Digest): Promise<Buffer> {
    const stored = await this.#readObject('tables', digest, TABLE_BYTES_MAX);
    return decompress(
      stored,
      TABLE_BYTES_MAX,
      `chunk table ${digest.slice(0, 12)} of the store ${this.name}`,
    );
  }

  async #readObject(kind: ObjectKind, digest: Digest, maxBytes: number): Promise<Buffer> {
    const what = kind.slice(0, -1);
    if (!isDigest(digest)) throw new GridError('bad-request', `'${String(digest)}' is not a digest`);
    try {
      return await readBounded(this.layout.object(kind, digest), maxBytes);
    } catch (error) {
      throw errnoOf(error) === 'ENOENT'
        ? new GridError('not-found', `the store ${this.name} has no ${what} ${digest}`, { cause: error })
        : asGridError(error, `cannot read ${what} ${digest} of the store ${this.name}`);
    }
  }

  /** See ChunkSource. The refs' plain length bounds what is read. */
  async readChunks(
    refs: readonly ChunkRef[],
    options: ReadChunksOptions,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    await this.#reader.read(refs, options.signal, deliver);
  }

  /** See ChunkSource. Throws bad-request for what is no digest or name. */
  async readProfile(manifest: Digest, purpose: Purpose): Promise<Buffer | undefined> {
    return readProfile(this.layout, manifest, purpose);
  }

  /**
   * Merges a recording into the profile, durable when it resolves. Throws bad-request, bad-format (the recording),
   * not-found (no such manifest), no-space (a purpose too many, or the disk), local-io (a store of somebody else).
   */
  async recordProfile(manifest: Digest, purpose: Purpose, recording: Buffer): Promise<void> {
    const described = parseManifest(await this.readManifest(manifest), manifest);
    await recordProfile(this.layout, { manifest, purpose, chunkCount: chunkCountOf(described) }, recording);
  }

  /** What each tag and all of them together cost. Reads every table. */
  async statistics(): Promise<StoreStatistics> {
    const all = new Set<Digest>();
    let storedBytes = 0;
    const images: ImageStatistics[] = [];
    for (const tag of await this.listTags()) {
      const manifest = parseManifest(await this.readManifest(tag.manifest), tag.manifest);
      const table = ChunkTable.parse(await this.readTable(manifest.table), manifest.table);
      const own = new Set<Digest>();
      let ownBytes = 0;
      for (const object of table.objects()) {
        if (!own.has(object.digest)) ownBytes += object.storedBytes;
        own.add(object.digest);
        if (!all.has(object.digest)) storedBytes += object.storedBytes;
        all.add(object.digest);
      }
      images.push({ tag, manifest, chunks: own.size, storedBytes: ownBytes });
    }
    return { images, chunks: all.size, storedBytes };
  }

  /** See ChunkSource. */
  get uploads(): UploadTarget {
    return storeUploads(this);
  }

  async close(): Promise<void> {
    this.#reader.close();
  }
}
