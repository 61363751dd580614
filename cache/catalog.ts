/**
 * What the cache knows besides chunks: manifests and chunk tables (immutable, kept in memory and on disk, checked
 * whenever they are read) and the tags, the only thing that expires. When the source cannot say, the last known
 * tags are served and `tags` says how old they are.
 */
import { rmSync, statSync } from 'node:fs';
import { LRUCache } from 'lru-cache';
import type { Digest } from '../src/core/bytes.ts';
import { ChunkTable } from '../src/core/chunk-table.ts';
import { asGridError, GridError, worthAnotherSource } from '../src/core/errors.ts';
import {
  MANIFEST_BYTES_MAX,
  TABLE_BYTES_MAX,
  TAG_RECENT_MS,
  TAG_WAIT_MS,
  TAGS_BYTES_MAX,
} from '../src/core/limits.ts';
import { encodeTags, parseManifest, parseTags } from '../src/core/manifest.ts';
import type { Manifest, Tag } from '../src/core/manifest.ts';
import type { ChunkSource } from '../src/core/source.ts';
import { readWhole, replaceFile } from './folder.ts';
import type { CacheFolder } from './folder.ts';
import type { Space } from './space.ts';

/** Manifests in memory: a page each. */
const MANIFESTS_IN_MEMORY_MAX = 4096;

const RESAVE_MS = 60_000;

export interface Known<T> {
  readonly bytes: Buffer;
  readonly value: T;
}

interface KnownTags {
  readonly tags: Tag[];
  /** When the source said so, by Date.now(). */
  readonly asOfMs: number;
}

/** Immutable objects of one kind: memory, then disk, then source; equal requests share one way. */
class Objects<T> {
  readonly #kind: 'manifests' | 'tables';
  readonly #catalog: CatalogContext;
  readonly #bytesMax: number;
  readonly #fetch: (digest: Digest) => Promise<Buffer>;
  readonly #parse: (bytes: Buffer, digest: Digest) => T;
  readonly #flights = new Map<Digest, Promise<Known<T>>>();

  constructor(
    kind: 'manifests' | 'tables',
    catalog: CatalogContext,
    bytesMax: number,
    fetch: (digest: Digest) => Promise<Buffer>,
    parse: (bytes: Buffer, digest: Digest) => T,
  ) {
    this.#kind = kind;
    this.#catalog = catalog;
    this.#bytesMax = bytesMax;
    this.#fetch = fetch;
    this.#parse = parse;
  }

  /** From disk or source. Throws corrupt, bad-format, newer-format, not-found and what the source throws. */
  get(digest: Digest): Promise<Known<T>> {
    let flight = this.#flights.get(digest);
    if (!flight) {
      flight = this.#load(digest).finally(() => this.#flights.delete(digest));
      this.#flights.set(digest, flight);
    }
    return flight;
  }

  /** From disk alone; a file that is not what its name says is removed, one that cannot be read is not there. */
  local(digest: Digest): Known<T> | undefined {
    const { folder, log } = this.#catalog;
    const file = folder.path(this.#kind, digest);
    try {
      const bytes = readWhole(file, this.#bytesMax);
      return bytes && { bytes, value: this.#parse(bytes, digest) };
    } catch (error) {
      log(`cache: ${file} is no use, it will be fetched again: ${String(error)}`);
      try {
        rmSync(file, { force: true });
      } catch {
        // Neither readable nor removable: the next whole file takes its name.
      }
      return undefined;
    }
  }

  async #load(digest: Digest): Promise<Known<T>> {
    const known = this.local(digest);
    if (known) return known;
    const { source, folder, space, log } = this.#catalog;
    const fetched = await this.#fetchChecked(digest).catch(async (error: unknown) => {
      if (!(error instanceof GridError) || error.code !== 'corrupt') throw error;
      log(`cache: ${error.message} (from ${source.name}), asking once more`);
      return this.#fetchChecked(digest);
    });
    const file = folder.path(this.#kind, digest);
    const bytes = fetched.bytes.length + 4096;
    if (space.take(file, bytes) || ((await space.reclaim(bytes)) && space.take(file, bytes))) {
      try {
        replaceFile(file, fetched.bytes);
        space.succeeded();
      } catch (error) {
        space.setCharge(file, 0);
        space.failed(error, `cannot write ${file}`);
      }
    }
    return fetched;
  }

  async #fetchChecked(digest: Digest): Promise<Known<T>> {
    const bytes = await this.#fetch(digest);
    return { bytes, value: this.#parse(bytes, digest) };
  }
}

export interface CatalogContext {
  readonly folder: CacheFolder;
  readonly source: ChunkSource;
  readonly space: Space;
  readonly tagTtlMs: number;
  readonly log: (message: string) => void;
}

export class Catalog {
  readonly #context: CatalogContext;
  readonly #manifests: Objects<Manifest>;
  readonly #tables: Objects<ChunkTable>;
  readonly #manifestsInMemory = new LRUCache<Digest, Known<Manifest>>({ max: MANIFESTS_IN_MEMORY_MAX });
  #known: KnownTags | undefined;
  #freshUntilMs = 0;
  /** An answer to a question from before the last one is not fresh. */
  #moves = 0;
  /** When the source last answered, by performance.now(). */
  #heardMs = -Infinity;
  #refresh: { readonly done: Promise<void>; readonly startedMs: number } | undefined;
  #saved: { readonly bytes: Buffer; readonly atMs: number } | undefined;
  /** Why the last known tags are served instead of the source's. */
  #stale: string | undefined;

  constructor(context: CatalogContext) {
    const { source } = context;
    this.#context = context;
    this.#manifests = new Objects(
      'manifests',
      context,
      MANIFEST_BYTES_MAX,
      (digest) => source.readManifest(digest),
      parseManifest,
    );
    this.#tables = new Objects(
      'tables',
      context,
      TABLE_BYTES_MAX,
      (digest) => source.readTable(digest),
      (bytes, digest) => ChunkTable.parse(bytes, digest),
    );
    this.#known = this.#loadTags();
  }

  /** A manifest and its bytes. Throws corrupt, not-found and what the source throws. */
  async manifest(digest: Digest): Promise<Known<Manifest>> {
    const inMemory = this.#manifestsInMemory.get(digest);
    if (inMemory) return inMemory;
    const known = await this.#manifests.get(digest);
    this.#manifestsInMemory.set(digest, known);
    return known;
  }

  /** A chunk table and its bytes; not kept in memory here. */
  table(digest: Digest): Promise<Known<ChunkTable>> {
    return this.#tables.get(digest);
  }

  /** What is known without the source. */
  localManifest(digest: Digest): Manifest | undefined {
    return (this.#manifestsInMemory.get(digest) ?? this.#manifests.local(digest))?.value;
  }

  localTable(digest: Digest): ChunkTable | undefined {
    return this.#tables.local(digest)?.value;
  }

  /** All tags, at most `tagTtlMs` old while the source answers; else the last known, if there are any. */
  async listTags(): Promise<Tag[]> {
    if (this.#known && performance.now() < this.#freshUntilMs) return this.#known.tags;
    const { done, startedMs } = this.#refreshing();
    if (!this.#known) {
      await done;
      return this.#known!.tags;
    }
    // A source that is waiting for its tunnel answers after minutes; the last known tags are here now.
    const waitMs = startedMs + TAG_WAIT_MS - performance.now();
    if (waitMs > 0) await firstOf(done, waitMs);
    if (this.#refresh) this.#goStale(`${this.#context.source.name} has not answered for ${TAG_WAIT_MS} ms`);
    return this.#known.tags;
  }

  /** All tags at once, where the source said them less than TAG_RECENT_MS ago; it is asked again behind. */
  recentTags(): Tag[] | undefined {
    const nowMs = performance.now();
    if (!this.#known || nowMs - this.#heardMs > TAG_RECENT_MS) return undefined;
    if (nowMs >= this.#freshUntilMs) this.#refreshing();
    return this.#known.tags;
  }

  /** Somebody here has moved a name: whoever asks from now on is told as it is now. */
  expireTags(): void {
    this.#moves++;
    this.#freshUntilMs = 0;
    this.#heardMs = -Infinity;
    this.#refresh = undefined;
  }

  #refreshing(): { readonly done: Promise<void>; readonly startedMs: number } {
    if (!this.#refresh) {
      const done = this.#refreshTags().finally(() => {
        if (this.#refresh === refresh) this.#refresh = undefined;
      });
      // Nobody may be waiting any more when it fails.
      done.catch(() => undefined);
      const refresh = { done, startedMs: performance.now() };
      this.#refresh = refresh;
    }
    return this.#refresh;
  }

  /** How many tags are known, how old they are, and why they are not fresher. */
  tags(): { count: number; ageMs: number; stale?: string } | undefined {
    if (!this.#known) return undefined;
    return {
      count: this.#known.tags.length,
      ageMs: Math.max(0, Date.now() - this.#known.asOfMs),
      ...(this.#stale === undefined ? {} : { stale: this.#stale }),
    };
  }

  async #refreshTags(): Promise<void> {
    const { source, tagTtlMs } = this.#context;
    const moves = this.#moves;
    try {
      const tags = await source.listTags();
      if (moves !== this.#moves && this.#known) return; // a later answer may be here already
      this.#known = { tags, asOfMs: Date.now() };
      if (moves === this.#moves) this.#heardMs = performance.now();
      if (this.#stale !== undefined) this.#context.log(`cache: tags are fresh again from ${source.name}`);
      this.#stale = undefined;
      this.#saveTags(tags);
    } catch (cause) {
      const error = asGridError(cause, `cannot list the tags of ${source.name}`, 'origin-failed');
      if (!this.#known || !worthAnotherSource(error)) throw error;
      this.#goStale(error.message);
    }
    if (moves === this.#moves) this.#freshUntilMs = performance.now() + tagTtlMs;
  }

  #goStale(why: string): void {
    if (this.#stale === undefined) {
      const ageS = Math.round((Date.now() - this.#known!.asOfMs) / 1000);
      this.#context.log(`cache: ${why}; serving the tags known ${ageS} s ago`);
    }
    this.#stale = why;
  }

  #loadTags(): KnownTags | undefined {
    const file = this.#context.folder.path('tags.json');
    try {
      const bytes = readWhole(file, TAGS_BYTES_MAX);
      return bytes && { tags: parseTags(bytes, file), asOfMs: statSync(file).mtimeMs };
    } catch (error) {
      this.#context.log(`cache: forgetting the last known tags: ${String(error)}`);
      return undefined;
    }
  }

  #saveTags(tags: readonly Tag[]): void {
    const { folder, space } = this.#context;
    const file = folder.path('tags.json');
    const bytes = encodeTags(tags);
    // Unchanged tags are written again now and then only, for their age on disk.
    if (this.#saved?.bytes.equals(bytes) && Date.now() - this.#saved.atMs < RESAVE_MS) return;
    try {
      space.setCharge(file, bytes.length + 4096);
      replaceFile(file, bytes);
      this.#saved = { bytes, atMs: Date.now() };
    } catch (error) {
      space.failed(error, `cannot write ${file}`);
    }
  }
}

/** Until `done` settles or `waitMs` have passed. A failure of `done` is thrown. */
async function firstOf(done: Promise<void>, waitMs: number): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, waitMs);
  });
  await Promise.race([done, late]).finally(() => clearTimeout(timer));
}
