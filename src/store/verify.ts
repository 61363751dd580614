/**
 * Verify: every object is decoded and hashed, and everything that a tag reaches is looked for. Damage is reported
 * with the images that it is in, and changes nothing: whoever deletes a damaged object and imports its image
 * again has healed the store.
 *
 * The tags are read before the folders are listed, so an import that runs meanwhile is either not seen at all or
 * whole.
 */
import path from 'node:path';
import { ChunkTable } from '../core/chunk-table.ts';
import { isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { chunkCountOf, parseManifest } from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import { parseProfile } from '../core/profile.ts';
import type { VerifyJob } from './jobs.ts';
import { Lanes } from './lanes.ts';
import { entriesOf, OBJECT_KINDS } from './layout.ts';
import type { ObjectKind } from './layout.ts';
import type { Store } from './store.ts';

export interface VerifyOptions {
  /** Objects done, of all there are. */
  readonly onProgress?: (doneObjects: number, totalObjects: number) => void;
  readonly signal?: AbortSignal;
}

/** A file that is not what it should be. */
export interface DamagedObject {
  readonly path: string;
  /** 'foreign': nothing of ours, in a folder of ours. */
  readonly kind: ObjectKind | 'profiles' | 'tags' | 'foreign';
  /** Of a profile, that of its manifest. Empty for 'tags' and 'foreign'. */
  readonly digest: Digest;
  readonly reason: string;
  /** `name:version` of every tag that reaches it. */
  readonly images: readonly string[];
}

/** What a tag reaches and the store does not have. */
export interface MissingObject {
  readonly kind: ObjectKind;
  readonly digest: Digest;
  readonly images: readonly string[];
}

export interface VerifyResult {
  readonly checkedObjects: number;
  readonly checkedBytes: number;
  readonly damaged: readonly DamagedObject[];
  readonly missing: readonly MissingObject[];
  /** Chunks that no tag reaches: of removed images, of imports that were cancelled or still run. */
  readonly unreferencedChunks: number;
}

/** Objects of a unit of work: about 20 ms of one processor. */
const UNIT_OBJECTS = 32;
/** Below this many objects the start of threads takes longer than the work. */
const INLINE_OBJECTS_MAX = 64;

/** Checks the whole store. Damage is a result, not an error; throws local-io and closed (cancelled). */
export async function verifyStore(store: Store, options: VerifyOptions = {}): Promise<VerifyResult> {
  const run = new VerifyRun(store, options);
  return run.run();
}

/** An object, or the lack of one, and the images it is in. */
interface Finding {
  readonly kind: ObjectKind;
  readonly digest: Digest;
  /** Undefined: it is missing. */
  readonly reason: string | undefined;
  readonly images: Set<string>;
}

class VerifyRun {
  readonly #store: Store;
  readonly #options: VerifyOptions;
  /** What is there, by kind, and whether a tag reaches it. */
  readonly #present: Record<ObjectKind, Map<Digest, boolean>> = {
    manifests: new Map(),
    tables: new Map(),
    chunks: new Map(),
  };
  readonly #findings = new Map<string, Finding>();
  readonly #others: DamagedObject[] = [];
  #checkedBytes = 0;

  constructor(store: Store, options: VerifyOptions) {
    this.#store = store;
    this.#options = options;
  }

  async run(): Promise<VerifyResult> {
    const tags = await this.#readTags();
    for (const kind of OBJECT_KINDS) await this.#list(kind);
    const checkedObjects = OBJECT_KINDS.reduce((sum, kind) => sum + this.#present[kind].size, 0);
    await this.#checkObjects(checkedObjects);
    for (const tag of tags) {
      this.#checkAborted();
      await this.#reach(tag.manifest, imageOf(tag), true);
    }
    await this.#checkProfiles(tags);
    // The lanes find things in any order; people and tests like one.
    const findings = [...this.#findings.entries()]
      .toSorted(([a], [b]) => (a < b ? -1 : 1))
      .map(([, one]) => one);
    return {
      checkedObjects,
      checkedBytes: this.#checkedBytes,
      damaged: [
        ...this.#others,
        ...findings
          .filter(({ reason }) => reason !== undefined)
          .map(({ kind, digest, reason, images }) => ({
            path: this.#store.layout.object(kind, digest),
            kind,
            digest,
            reason: reason!,
            images: [...images],
          })),
      ],
      missing: findings
        .filter(({ reason }) => reason === undefined)
        .map(({ kind, digest, images }) => ({ kind, digest, images: [...images] })),
      unreferencedChunks: [...this.#present.chunks.values()].filter((reached) => !reached).length,
    };
  }

  async #readTags(): Promise<Tag[]> {
    try {
      return await this.#store.listTags();
    } catch (error) {
      if (!(error instanceof GridError) || error.blame !== 'data') throw error;
      const { tags: file } = this.#store.layout;
      this.#others.push({ path: file, kind: 'tags', digest: '', reason: error.message, images: [] });
      return [];
    }
  }

  /** Notes what lies in the folders of one kind. */
  async #list(kind: ObjectKind): Promise<void> {
    const folder = this.#store.layout.kind(kind);
    const foreign = (path: string) =>
      this.#others.push({
        path,
        kind: 'foreign',
        digest: '',
        reason: 'it is no object of a store',
        images: [],
      });
    for (const { name: shard, isFolder } of await entriesOf(folder)) {
      this.#checkAborted();
      if (!isFolder || !/^[0-9a-f]{2}$/.test(shard)) {
        foreign(`${folder}/${shard}`);
        continue;
      }
      for (const { name, isFile } of await entriesOf(`${folder}/${shard}`)) {
        if (isFile && isDigest(name) && name.startsWith(shard)) this.#present[kind].set(name, false);
        else foreign(`${folder}/${shard}/${name}`);
      }
    }
  }

  async #checkObjects(total: number): Promise<void> {
    const { onProgress, signal } = this.#options;
    const lanes = new Lanes(total > INLINE_OBJECTS_MAX);
    let done = 0;
    try {
      await lanes.runAll(this.#jobs(), signal, ({ storedBytes, damaged, gone }, job) => {
        done += job.digests.length;
        this.#checkedBytes += storedBytes;
        for (const { digest, reason } of damaged) this.#find(job.kind, digest, reason);
        // A garbage collection was faster; if a tag reaches it, it is missing.
        for (const digest of gone) this.#present[job.kind].delete(digest);
        onProgress?.(done, total);
      });
    } catch (error) {
      this.#checkAborted();
      throw error;
    } finally {
      await lanes.close();
    }
  }

  *#jobs(): Generator<VerifyJob> {
    const storeFolder = this.#store.layout.folder;
    for (const kind of OBJECT_KINDS) {
      let digests: Digest[] = [];
      for (const digest of this.#present[kind].keys()) {
        digests.push(digest);
        if (digests.length < UNIT_OBJECTS) continue;
        yield { type: 'verify', storeFolder, kind, digests };
        digests = [];
      }
      if (digests.length > 0) yield { type: 'verify', storeFolder, kind, digests };
    }
  }

  #find(kind: ObjectKind, digest: Digest, reason: string | undefined): Finding {
    const key = `${kind}/${digest}`;
    const finding = this.#findings.get(key) ?? { kind, digest, reason, images: new Set<string>() };
    this.#findings.set(key, finding);
    return finding;
  }

  /** Notes that `image` needs an object; whether it is there and whole. */
  #need(kind: ObjectKind, digest: Digest, image: string): boolean {
    const isThere = this.#present[kind].has(digest);
    if (isThere) this.#present[kind].set(digest, true);
    const finding = isThere ? this.#findings.get(`${kind}/${digest}`) : this.#find(kind, digest, undefined);
    finding?.images.add(image);
    return finding === undefined;
  }

  /** Follows a manifest to its table, its chunks and its parts. */
  async #reach(digest: Digest, image: string, withParts: boolean): Promise<void> {
    if (!this.#need('manifests', digest, image)) return;
    const damaged = (kind: ObjectKind, which: Digest, error: unknown) => {
      if (!(error instanceof GridError) || error.blame !== 'data') throw error;
      this.#find(kind, which, error.message).images.add(image);
    };
    let manifest: Manifest;
    try {
      manifest = parseManifest(await this.#store.readManifest(digest), digest);
    } catch (error) {
      return damaged('manifests', digest, error);
    }
    if (this.#need('tables', manifest.table, image)) {
      try {
        const table = ChunkTable.parse(await this.#store.readTable(manifest.table), manifest.table);
        if (table.chunkBytes !== manifest.chunkBytes || table.count !== chunkCountOf(manifest)) {
          throw new GridError('bad-format', `it does not fit the manifest ${digest}`);
        }
        for (const object of table.objects()) this.#need('chunks', object.digest, image);
      } catch (error) {
        damaged('tables', manifest.table, error);
      }
    }
    // Parts have no parts of their own: what says otherwise is not followed, so no circle is either.
    if (withParts) for (const part of Object.values(manifest.parts)) await this.#reach(part, image, false);
  }

  /** Profiles of manifests that are there and whole. */
  async #checkProfiles(tags: readonly Tag[]): Promise<void> {
    const root = path.join(this.#store.layout.v1, 'profiles');
    for (const { name: shard } of await entriesOf(root)) {
      for (const { name: manifest } of await entriesOf(path.join(root, shard))) {
        this.#checkAborted();
        if (!this.#present.manifests.has(manifest) || this.#findings.has(`manifests/${manifest}`)) continue;
        const bytes = await this.#store.readManifest(manifest);
        const chunkCount = chunkCountOf(parseManifest(bytes, manifest));
        for (const { name } of await entriesOf(this.#store.layout.profiles(manifest))) {
          const purpose = name.replace(/\.json$/, '');
          try {
            const profile = await this.#store.readProfile(manifest, purpose);
            if (profile) parseProfile(profile, { manifest, purpose, chunkCount });
          } catch (error) {
            if (!(error instanceof GridError)) throw error;
            const file = path.join(this.#store.layout.profiles(manifest), name);
            const images = tags.filter((tag) => tag.manifest === manifest).map(imageOf);
            this.#others.push({
              path: file,
              kind: 'profiles',
              digest: manifest,
              reason: error.message,
              images,
            });
          }
        }
      }
    }
  }

  #checkAborted(): void {
    if (this.#options.signal?.aborted) {
      throw new GridError('closed', `the verification of ${this.#store.name} was cancelled`);
    }
  }
}

function imageOf({ name, version }: Tag): string {
  return `${name}:${version}`;
}
