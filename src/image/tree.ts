/**
 * The tree of names that frontends show:
 *
 *   images/<name>/<version>/disk.raw (or memory.raw, kernel, … by the manifest's kind), and one file per part
 *   clones/<id>/disk.raw, and the parts (kernel, initrd, …) of the image that the clone was made of: they are there
 *   as long as the clone is, whatever its tag points at by now
 *
 * Lookups read only what they need: a manifest is read when something in its version's folder is looked up, never
 * for a listing above it. Parsed manifests are kept (they never change); the index of tags is made again when the
 * catalog hands out another list.
 */
import { GridError } from '../core/errors.ts';
import type { Digest } from '../core/bytes.ts';
import type { Image, ImageTree, TreeEntry, TreePath } from '../core/image.ts';
import { fileNameOf, isName } from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';

/** Where images come from; a cache fits it. */
export interface ImageCatalog {
  /** Cheap to call often: the same array as long as nothing moved. */
  listTags(): Promise<readonly Tag[]>;
  /** The same without waiting, if they are recent; what is not among them may have come since. */
  recentTags?(): readonly Tag[] | undefined;
  /** Throws not-found. */
  readManifest(digest: Digest): Promise<Manifest>;
  /** Read-only; every open is closed by the caller. */
  openImage(digest: Digest): Promise<Image>;
}

/** What the tree says of a clone. */
export interface CloneEntry {
  readonly id: string;
  /** Manifest of its base, whose parts are shown beside the disk. */
  readonly base: Digest;
  readonly sizeBytes: number;
  readonly modifiedMs: number;
}

/** Where clones come from: whoever owns their folders. */
export interface CloneCatalog {
  list(): Promise<readonly CloneEntry[]>;
  find(id: string): Promise<CloneEntry | undefined>;
  /** Every open is closed by the caller. Throws not-found, in-use. */
  open(id: string, options: { write: boolean }): Promise<Image>;
  /** Of the file system that holds the clones. */
  space(): Promise<{ totalBytes: number; freeBytes: number }>;
}

const CLONE_FILE = 'disk.raw';
/** Begins the content id of a clone; that of an image is its digest. */
const CLONE_CONTENT = 'clone:';
/** Parsed manifests kept; a page of JSON each. The oldest goes first. */
const MANIFESTS_KEPT_MAX = 10_000;

type Directory = Extract<TreeEntry, { type: 'directory' }>;
type File = Extract<TreeEntry, { type: 'file' }>;

interface TagIndex {
  readonly tags: readonly Tag[];
  readonly names: ReadonlyMap<string, ReadonlyMap<string, Tag>>;
}

export function createTree(options: { catalog: ImageCatalog; clones: CloneCatalog }): ImageTree {
  return new NameTree(options.catalog, options.clones);
}

class NameTree implements ImageTree {
  readonly #catalog: ImageCatalog;
  readonly #clones: CloneCatalog;
  readonly #createdMs = Date.now();
  readonly #manifests = new Map<Digest, Manifest>();
  #index: TagIndex = { tags: [], names: new Map() };

  constructor(catalog: ImageCatalog, clones: CloneCatalog) {
    this.#catalog = catalog;
    this.#clones = clones;
  }

  async lookup(path: TreePath): Promise<TreeEntry | undefined> {
    const [top, first, second, third, ...rest] = path;
    if (top === undefined) return directory('', this.#createdMs);
    if (rest.length > 0) return undefined;
    if (top === 'clones') {
      if (first === undefined) return directory('clones', this.#createdMs);
      const clone = isName(first) && third === undefined ? await this.#clones.find(first) : undefined;
      if (!clone) return undefined;
      if (second === undefined) return directory(clone.id, clone.modifiedMs);
      return second === CLONE_FILE ? cloneFile(clone) : await this.#clonePart(clone, second);
    }
    if (top !== 'images') return undefined;
    const { names } = await this.#tagsWith(first, second);
    if (first === undefined) return directory('images', latestOf(names.values(), this.#createdMs));
    const versions = names.get(first);
    if (!versions) return undefined;
    if (second === undefined) return directory(first, latestOf([versions], 0));
    const tag = versions.get(second);
    if (!tag) return undefined;
    return third === undefined ? directory(second, movedMs(tag)) : await this.#imageFile(tag, third);
  }

  async list(path: TreePath): Promise<TreeEntry[]> {
    const [top, first, second] = path;
    const entry = await this.lookup(path);
    if (entry?.type !== 'directory') throw notFound(path, entry ? 'is a file' : 'does not exist');
    if (top === undefined) {
      const { names } = await this.#tags();
      return [
        directory('clones', this.#createdMs),
        directory('images', latestOf(names.values(), this.#createdMs)),
      ];
    }
    if (top === 'clones') {
      if (first !== undefined) {
        const clone = await this.#clones.find(first);
        return clone ? sorted([cloneFile(clone), ...(await this.#cloneParts(clone))]) : [];
      }
      const clones = await this.#clones.list();
      return sorted(
        clones.filter(({ id }) => isName(id)).map(({ id, modifiedMs }) => directory(id, modifiedMs)),
      );
    }
    const { names } = await this.#tags();
    if (first === undefined) {
      return sorted([...names].map(([name, versions]) => directory(name, latestOf([versions], 0))));
    }
    const versions = names.get(first) ?? new Map<string, Tag>();
    if (second === undefined) {
      return sorted([...versions.values()].map((tag) => directory(tag.version, movedMs(tag))));
    }
    const tag = versions.get(second);
    return tag ? await this.#imageFiles(tag) : [];
  }

  async open(path: TreePath, options: { write: boolean }): Promise<Image> {
    const entry = await this.lookup(path);
    if (!entry) throw notFound(path, 'does not exist');
    if (entry.type === 'directory') {
      throw new GridError('bad-request', `'${path.join('/')}' is a folder; open a file in it`);
    }
    if (path[0] === 'clones' && path[2] === CLONE_FILE) return await this.#clones.open(path[1]!, options);
    if (options.write) {
      throw new GridError('read-only', `'${path.join('/')}' is an image; write to a clone of it instead`);
    }
    return await this.#catalog.openImage(entry.contentId);
  }

  openContent(contentId: string, options: { write: boolean }): Promise<Image> {
    if (contentId.startsWith(CLONE_CONTENT)) {
      return this.#clones.open(contentId.slice(CLONE_CONTENT.length), options);
    }
    return this.#catalog.openImage(contentId);
  }

  space(): Promise<{ totalBytes: number; freeBytes: number }> {
    return this.#clones.space();
  }

  /** Tags that may be a short while old if they have this image; else fresh ones. */
  async #tagsWith(name: string | undefined, version: string | undefined): Promise<TagIndex> {
    const recent = this.#catalog.recentTags?.();
    if (recent) {
      const index = this.#indexOf(recent);
      const versions = name === undefined ? undefined : index.names.get(name);
      if (name === undefined || (version === undefined ? versions : versions?.get(version))) return index;
    }
    return await this.#tags();
  }

  async #tags(): Promise<TagIndex> {
    return this.#indexOf(await this.#catalog.listTags());
  }

  #indexOf(tags: readonly Tag[]): TagIndex {
    if (tags === this.#index.tags) return this.#index;
    const names = new Map<string, Map<string, Tag>>();
    for (const tag of tags) {
      // Checked where they were parsed; once more here, because these become names of files.
      if (!isName(tag.name) || !isName(tag.version)) continue;
      let versions = names.get(tag.name);
      if (!versions) names.set(tag.name, (versions = new Map()));
      versions.set(tag.version, tag);
    }
    this.#index = { tags, names };
    return this.#index;
  }

  async #manifest(digest: Digest): Promise<Manifest> {
    const known = this.#manifests.get(digest);
    if (known) return known;
    const manifest = await this.#catalog.readManifest(digest);
    this.#manifests.set(digest, manifest);
    if (this.#manifests.size > MANIFESTS_KEPT_MAX) {
      const [oldest] = this.#manifests.keys();
      this.#manifests.delete(oldest!);
    }
    return manifest;
  }

  async #imageFile(tag: Tag, name: string): Promise<File | undefined> {
    const manifest = await this.#manifest(tag.manifest);
    if (name === fileNameOf(manifest.kind)) return imageFile(name, tag.manifest, manifest);
    return await this.#part(manifest, name);
  }

  async #part(manifest: Manifest, name: string): Promise<File | undefined> {
    if (!isName(name) || !Object.hasOwn(manifest.parts, name)) return undefined;
    const digest = manifest.parts[name]!;
    return imageFile(name, digest, await this.#manifest(digest));
  }

  /** Undefined also where nobody can say what its image had beside it. */
  async #clonePart(clone: CloneEntry, name: string): Promise<File | undefined> {
    return (await this.#cloneParts(clone)).find((file) => file.name === name);
  }

  async #cloneParts(clone: CloneEntry): Promise<File[]> {
    try {
      const manifest = await this.#manifest(clone.base);
      const names = Object.keys(manifest.parts).filter((name) => name !== CLONE_FILE);
      const files = await Promise.all(names.map((name) => this.#part(manifest, name)));
      return files.filter((file) => file !== undefined);
    } catch (error) {
      if (error instanceof GridError) return [];
      throw error;
    }
  }

  async #imageFiles(tag: Tag): Promise<TreeEntry[]> {
    const manifest = await this.#manifest(tag.manifest);
    const main = fileNameOf(manifest.kind);
    const parts = Object.keys(manifest.parts).filter((name) => isName(name) && name !== main);
    const files = await Promise.all([main, ...parts].map((name) => this.#imageFile(tag, name)));
    return sorted(files.filter((file) => file !== undefined));
  }
}

function directory(name: string, modifiedMs: number): Directory {
  return { name, type: 'directory', modifiedMs };
}

function imageFile(name: string, digest: Digest, manifest: Manifest): File {
  return {
    name,
    type: 'file',
    sizeBytes: manifest.sizeBytes,
    writable: false,
    modifiedMs: Date.parse(manifest.created),
    contentId: digest,
    ...(manifest.kind === 'memory' ? { mapsPrivately: true as const } : {}),
  };
}

function cloneFile(clone: CloneEntry): File {
  return {
    name: CLONE_FILE,
    type: 'file',
    sizeBytes: clone.sizeBytes,
    writable: true,
    modifiedMs: clone.modifiedMs,
    contentId: CLONE_CONTENT + clone.id,
  };
}

/** When a tag moved; 0 (1970) when it does not say so in a way that we can read. */
function movedMs(tag: Tag): number {
  const ms = Date.parse(tag.moved);
  return Number.isNaN(ms) ? 0 : ms;
}

function latestOf(groups: Iterable<ReadonlyMap<string, Tag>>, atLeastMs: number): number {
  let latest = atLeastMs;
  for (const versions of groups) for (const tag of versions.values()) latest = Math.max(latest, movedMs(tag));
  return latest;
}

function sorted(entries: readonly TreeEntry[]): TreeEntry[] {
  return entries.toSorted((a, b) => (a.name < b.name ? -1 : 1));
}

function notFound(path: TreePath, why: string): GridError {
  return new GridError('not-found', `'${path.join('/')}' ${why}`);
}
