/**
 * Garbage collection: removes the manifests, tables, chunks and profiles that nothing needs.
 *
 * What is kept: whatever a tag, a pin, a clone on some host (holds.ts) or a manifest that is kept itself reaches (its table, chunks and parts; not its
 * parent, which is where it comes from and not what it is made of, unless it is a pushed clone: then whoever pulls it
 * lays it over its parent), and everything that is younger than the grace
 * time or than the oldest import that runs. The grace time is for what an import that was killed has stored: the
 * next one goes on there.
 *
 * Imports go on meanwhile. The store's lock is held for one batch at a time, and under it
 *  1. tags, pins, holds and young manifests are looked at again, and what they reach is marked;
 *  2. the file `swept` gets another text; 3. what of the batch is still unmarked and old is removed.
 * An import may have found a chunk in the store that goes away in step 3 because no tag reaches it yet. It gives its
 * manifest a name under the same lock (Writer.publish), so either step 1 of every later batch sees the manifest, or
 * the import sees that `swept` changed, looks for its chunks and packs again what is not there. Nothing here rests
 * on clocks but how often that happens.
 *
 * Manifests go first and durably, then the rest: after a crash in the middle, a manifest that is there is whole.
 * Damage in what is to be kept stops the collection: what it reaches is not known then.
 */
import { randomUUID } from 'node:crypto';
import { existsSync, rmSync, statSync, unlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { ChunkTable } from '../core/chunk-table.ts';
import { isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { LABEL_PUSH_LINEAGE, parseManifest } from '../core/manifest.ts';
import { dropOldHolds } from './holds.ts';
import { entriesOf, OBJECT_KINDS, syncFolder } from './layout.ts';
import type { ObjectKind } from './layout.ts';
import { withStoreLock } from './lock.ts';
import type { Store } from './store.ts';
import { tendWriters } from './writer.ts';

/** Whoever notices a killed import within a day and starts it again need not store its chunks again. */
export const GC_GRACE_MS = 24 * 3_600_000;
/** Files removed while the lock is held: some tens of milliseconds. */
const BATCH_OBJECTS = 1024;

export interface GcOptions {
  /** Count what would be removed, and remove nothing. */
  readonly dryRun?: boolean;
  /** What is younger is kept, though nothing needs it. Default: a day. */
  readonly graceMs?: number;
  /** Folders done, of all there are. */
  readonly onProgress?: (doneFolders: number, totalFolders: number) => void;
  readonly signal?: AbortSignal;
}

export interface GcResult {
  readonly dryRun: boolean;
  readonly removed: Readonly<Record<ObjectKind | 'profiles', number>>;
  readonly removedBytes: number;
  /** Needed by nothing yet, but young: see `graceMs`. */
  readonly keptYoung: number;
  readonly keptYoungBytes: number;
}

/** Throws bad-request, in-use (the lock), bad-format, corrupt or not-found (damage), local-io, closed (cancelled). */
export async function collectGarbage(store: Store, options: GcOptions = {}): Promise<GcResult> {
  const { graceMs = GC_GRACE_MS } = options;
  if (!Number.isFinite(graceMs) || graceMs < 0) {
    throw new GridError('bad-request', `a grace time of ${graceMs} ms: it must be 0 or more`);
  }
  const run = new GcRun(store, options, Date.now() - graceMs);
  return run.run();
}

class GcRun {
  readonly #store: Store;
  readonly #options: GcOptions;
  /** Younger things are kept, by their mtime. */
  readonly #graceSinceMs: number;
  readonly #marked: Record<ObjectKind, Set<Digest>> = {
    manifests: new Set(),
    tables: new Set(),
    chunks: new Set(),
  };
  /** Manifests that were, or in a dry run would be, removed. */
  readonly #condemned = new Set<Digest>();
  readonly #removed = { manifests: 0, tables: 0, chunks: 0, profiles: 0 };
  #removedBytes = 0;
  #keptYoung = 0;
  #keptYoungBytes = 0;

  constructor(store: Store, options: GcOptions, graceSinceMs: number) {
    this.#store = store;
    this.#options = options;
    this.#graceSinceMs = graceSinceMs;
  }

  async run(): Promise<GcResult> {
    const { layout } = this.#store;
    const shards: [kind: ObjectKind, folder: string][] = [];
    for (const kind of OBJECT_KINDS) {
      for (const { name, isFolder } of await entriesOf(layout.kind(kind)))
        if (isFolder) shards.push([kind, path.join(layout.kind(kind), name)]);
    }
    if (!this.#options.dryRun) {
      await withStoreLock(layout, async () => {
        tendWriters(layout);
        await dropOldHolds(layout);
      });
    }
    // The long part of marking, before anybody has to wait for it.
    await this.#mark(this.#graceSinceMs, false);
    for (const [done, [kind, folder]] of shards.entries()) {
      this.#options.onProgress?.(done, shards.length);
      await this.#sweepFolder(kind, folder);
      if (kind === 'manifests' && shards[done + 1]?.[0] !== kind) await this.#sweepProfiles();
    }
    this.#options.onProgress?.(shards.length, shards.length);
    return {
      dryRun: this.#options.dryRun ?? false,
      removed: this.#removed,
      removedBytes: this.#removedBytes,
      keptYoung: this.#keptYoung,
      keptYoungBytes: this.#keptYoungBytes,
    };
  }

  /**
   * Marks what tags, pins, holds and manifests younger than `sinceMs` reach. Only what is not marked yet is read.
   * `isLocked`: the caller holds the store's lock, so what is not there is damage and not somebody's work.
   */
  async #mark(sinceMs: number, isLocked: boolean): Promise<void> {
    const needed = [
      ...(await this.#store.listTags()).map((tag) => tag.manifest),
      ...(await this.#store.listPins()),
    ];
    for (const digest of needed) {
      try {
        await this.#markManifest(digest);
      } catch (error) {
        if (!(error instanceof GridError) || isLocked) throw unknowable(error, digest);
      }
    }
    for (const { manifests } of await this.#store.listHolds()) {
      for (const digest of manifests) {
        try {
          await this.#markManifest(digest);
        } catch (error) {
          // A host may name what was never here, or went while it was away.
          const isGone = error instanceof GridError && error.code === 'not-found';
          if (!isGone && (!(error instanceof GridError) || isLocked)) throw unknowable(error, digest);
        }
      }
    }
    for (const { name: shard } of await entriesOf(this.#store.layout.kind('manifests'))) {
      for (const { name } of await entriesOf(path.join(this.#store.layout.kind('manifests'), shard))) {
        if (!isDigest(name) || this.#marked.manifests.has(name) || this.#condemned.has(name)) continue;
        const stats = statSync(this.#store.layout.object('manifests', name), { throwIfNoEntry: false });
        if (!stats || stats.mtimeMs < sinceMs) continue;
        try {
          await this.#markManifest(name);
        } catch (error) {
          // Nothing needs it: a damaged one keeps nothing but itself, until it is old.
          if (!(error instanceof GridError)) throw error;
        }
      }
    }
  }

  async #markManifest(digest: Digest): Promise<void> {
    if (this.#marked.manifests.has(digest)) return;
    this.#checkAborted();
    const manifest = parseManifest(await this.#store.readManifest(digest), digest);
    if (!this.#marked.tables.has(manifest.table)) {
      const table = ChunkTable.parse(await this.#store.readTable(manifest.table), manifest.table);
      for (const { digest: chunk } of table.objects()) this.#marked.chunks.add(chunk);
      this.#marked.tables.add(manifest.table);
    }
    this.#marked.manifests.add(digest);
    try {
      for (const part of Object.values(manifest.parts)) await this.#markManifest(part);
      if (manifest.parent !== undefined && LABEL_PUSH_LINEAGE in manifest.labels) {
        // Where it is gone already, the clone is pulled whole.
        await this.#markManifest(manifest.parent).catch((error: unknown) => {
          if (!(error instanceof GridError) || error.code !== 'not-found') throw error;
        });
      }
    } catch (error) {
      this.#marked.manifests.delete(digest);
      throw error;
    }
  }

  async #sweepFolder(kind: ObjectKind, folder: string): Promise<void> {
    const names = (await entriesOf(folder)).map(({ name }) => name);
    const unmarked = names.filter((name) => isDigest(name) && !this.#marked[kind].has(name));
    for (let at = 0; at < unmarked.length; at += BATCH_OBJECTS) {
      this.#checkAborted();
      const batch = unmarked.slice(at, at + BATCH_OBJECTS);
      await withStoreLock(this.#store.layout, () => this.#sweep(kind, folder, batch));
    }
  }

  /** One batch of a folder. The caller holds the store's lock. */
  async #sweep(kind: ObjectKind, folder: string, batch: readonly Digest[]): Promise<void> {
    const { dryRun = false } = this.#options;
    const sinceMs = Math.min(this.#graceSinceMs, tendWriters(this.#store.layout, !dryRun));
    // Manifests that nothing needs are gone when their chunks' turn comes: what is there now stays, however old.
    await this.#mark(kind === 'manifests' ? sinceMs : -Infinity, true);
    try {
      if (!dryRun) writeFileSync(this.#store.layout.swept, randomUUID());
      let removed = 0;
      for (const digest of batch) {
        if (this.#marked[kind].has(digest)) continue;
        const file = path.join(folder, digest);
        const stats = statSync(file, { throwIfNoEntry: false });
        if (!stats) continue;
        if (stats.mtimeMs >= sinceMs) {
          this.#keptYoung++;
          this.#keptYoungBytes += stats.size;
          continue;
        }
        if (!dryRun) unlinkSync(file);
        if (kind === 'manifests') this.#condemned.add(digest);
        removed++;
        this.#removedBytes += stats.size;
      }
      this.#removed[kind] += removed;
      if (removed > 0 && kind === 'manifests' && !dryRun) syncFolder(folder);
    } catch (error) {
      throw asGridError(error, `cannot remove garbage of the store ${this.#store.name}`);
    }
  }

  /** Profiles of manifests that are not there. */
  async #sweepProfiles(): Promise<void> {
    const { layout } = this.#store;
    const root = path.join(layout.v1, 'profiles');
    for (const { name: shard } of await entriesOf(root)) {
      for (const { name: manifest } of await entriesOf(path.join(root, shard))) {
        this.#checkAborted();
        if (!isDigest(manifest) || this.#marked.manifests.has(manifest)) continue;
        const files = await entriesOf(layout.profiles(manifest));
        await withStoreLock(layout, () => {
          const isThere = existsSync(layout.object('manifests', manifest));
          if (isThere && !this.#condemned.has(manifest)) return;
          for (const { name } of files) {
            const stats = statSync(path.join(layout.profiles(manifest), name), { throwIfNoEntry: false });
            this.#removed.profiles++;
            this.#removedBytes += stats?.size ?? 0;
          }
          if (!this.#options.dryRun) rmSync(layout.profiles(manifest), { recursive: true, force: true });
        });
      }
    }
  }

  #checkAborted(): void {
    if (this.#options.signal?.aborted) {
      throw new GridError('closed', `the garbage collection of ${this.#store.name} was cancelled`);
    }
  }
}

function unknowable(error: unknown, digest: Digest): unknown {
  if (!(error instanceof GridError) || (error.blame !== 'data' && error.code !== 'not-found')) return error;
  return new GridError(
    error.code,
    `${error.message}: nothing more is removed while what manifest ${digest} needs is unknown; see 'gridvfs store verify', then import its image again or remove its tag`,
    { cause: error },
  );
}
