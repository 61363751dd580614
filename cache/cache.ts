/**
 * The bounded copy on a host's disk: everything one daemon has in one folder, in front of one source. The source
 * is given and stays the caller's to close. Parts: folder.ts (lock, format), catalog.ts (tags, manifests, tables),
 * image-file.ts (states, misses) over map-file.ts (the two files of an image) and commits.ts (their order on disk),
 * fetcher.ts (each chunk once), siblings.ts (or not at all), read-ahead.ts, space.ts and eviction.ts (quota, full
 * disk), upkeep.ts (warm, pins, scrub, profiles of starts), status.ts (figures), tier.ts (a source for others).
 */
import { lstatSync, readdirSync, rmSync, statSync } from 'node:fs';
import path from 'node:path';
import { checkedNumber, isDigest } from '../src/core/bytes.ts';
import type { ByteRange, Digest } from '../src/core/bytes.ts';
import type { ChunkEncoding } from '../src/core/chunk.ts';
import { asGridError, GridError } from '../src/core/errors.ts';
import { CACHE_IDLE_IMAGES_MAX, TAG_TTL_MS } from '../src/core/limits.ts';
import { chunkCountOf } from '../src/core/manifest.ts';
import type { Manifest, Tag } from '../src/core/manifest.ts';
import type { Purpose } from '../src/core/profile.ts';
import { QuietPoints } from '../src/core/quiet.ts';
import type { ChunkSource } from '../src/core/source.ts';
import { CachedImage } from './cached-image.ts';
import { Catalog } from './catalog.ts';
import { Eviction } from './eviction.ts';
import { Fetcher } from './fetcher.ts';
import { newFigures } from './figures.ts';
import type { ImageFigures } from './figures.ts';
import { CacheFolder } from './folder.ts';
import { ImageFile } from './image-file.ts';
import { Pins } from './pins.ts';
import type { PrefetchOptions } from './prefetch.ts';
import { Profiles } from './profiles.ts';
import type { StartRecording } from './profiles.ts';
import { newPacks } from './chunk-way.ts';
import { Siblings } from './siblings.ts';
import { Space } from './space.ts';
import { localImages, statusOf } from './status.ts';
import type { CacheStatus } from './status.ts';
import { Tier } from './tier.ts';
import type { TierCache } from './tier.ts';
import { Upkeep } from './upkeep.ts';
import type { ReplayOptions, ScrubResult, WarmResult } from './upkeep.ts';

export interface CacheOptions {
  /** Made if it is not there; one process at a time. */
  readonly folder: string;
  /** Where missing chunks come from. Not closed by the cache. */
  readonly source: ChunkSource;
  /** Hard bound of what the folder takes on disk; none when left out. */
  readonly quotaBytes?: number;
  /** What stays free on the disk for others; the smaller of 1 GiB and 5 % of it when left out. */
  readonly minFreeBytes?: number;
  /** Most that prefetch and read-ahead take of the link, in stored bytes; no bound when left out. */
  readonly prefetchBytesPerSecond?: number;
  /** Whether more than what is missed is fetched with it on long links (read-around.ts); default true. */
  readonly readAround?: boolean;
  /** Where the threads that read `direct` themselves say when they do: eviction waits for them. Needed as soon as
   * there are such threads. */
  readonly quiet?: QuietPoints;
  /** How long a tag listing is believed; default TAG_TTL_MS. */
  readonly tagTtlMs?: number;
  /** One line per event worth an operator's eye; default: nothing. */
  readonly log?: (message: string) => void;
}

/** Opens (or makes) a cache. Throws in-use, bad-format, newer-format, bad-request, no-space, local-io. */
export async function openCache(options: CacheOptions): Promise<Cache> {
  if (options.quotaBytes !== undefined) checkedNumber(options.quotaBytes, 'the cache quota in bytes');
  if (options.minFreeBytes !== undefined)
    checkedNumber(options.minFreeBytes, 'the free space to leave in bytes');
  if (options.prefetchBytesPerSecond !== undefined && !(options.prefetchBytesPerSecond > 0)) {
    throw new GridError(
      'bad-request',
      'the ceiling of prefetch must be a number of bytes per second above 0',
    );
  }
  if (options.tagTtlMs !== undefined) checkedNumber(options.tagTtlMs, 'the tag lifetime in milliseconds');
  const folder = CacheFolder.open(path.resolve(options.folder));
  try {
    return new Cache(folder, options);
  } catch (error) {
    folder.close();
    throw asGridError(error, `cannot open cache folder ${folder.folder}`);
  }
}

/** An image while somebody has it, or just had it. */
interface Entry {
  readonly opening: Promise<ImageFile>;
  file: ImageFile | undefined;
  references: number;
  /** Of them, those of readers; the others are the cache's own work. */
  readers: number;
}

export class Cache {
  readonly #folder: CacheFolder;
  readonly #source: ChunkSource;
  readonly #space: Space;
  readonly #catalog: Catalog;
  readonly #fetcher: Fetcher;
  readonly #quiet: QuietPoints;
  readonly #siblings: Siblings;
  readonly #packs = newPacks();
  readonly #eviction: Eviction;
  readonly #profiles: Profiles;
  readonly #pins: Pins;
  readonly #upkeep: Upkeep;
  readonly #figures = new Map<Digest, ImageFigures>();
  readonly #log: (message: string) => void;
  readonly #entries = new Map<Digest, Entry>();
  /** Entries without references, the longest unused first. */
  readonly #idle = new Set<Digest>();
  readonly #closing = new Map<Digest, Promise<void>>();
  #droppedImages = 0;
  #closed: Promise<void> | undefined;
  /** Rejects when the cache is closed. */
  readonly #ended = Promise.withResolvers<never>();

  /** Use `openCache`. */
  constructor(folder: CacheFolder, options: CacheOptions) {
    this.#folder = folder;
    this.#source = options.source;
    this.#log = options.log ?? (() => undefined);
    this.#space = new Space(folder.folder, options, this.#log);
    this.#catalog = new Catalog({
      folder,
      source: options.source,
      space: this.#space,
      tagTtlMs: options.tagTtlMs ?? TAG_TTL_MS,
      log: this.#log,
    });
    this.#fetcher = new Fetcher(options.source, this.#log, options);
    this.#quiet = options.quiet ?? new QuietPoints();
    this.#profiles = new Profiles({ folder, source: options.source, log: this.#log });
    this.#pins = new Pins(folder, (manifest, purpose) => {
      const known = this.#catalog.localManifest(manifest);
      return known && this.#profiles.local(manifest, purpose, chunkCountOf(known));
    });
    const open = () => this.#openFiles();
    this.#siblings = new Siblings(open, async () => {
      const seen = new Set<Digest>();
      for (let count = 0; count < CACHE_IDLE_IMAGES_MAX / 2; count++) {
        if (!(await this.#openAnother(seen))) return;
      }
    });
    this.#eviction = new Eviction({
      space: this.#space,
      open,
      openAnother: (seen) => this.#openAnother(seen),
      log: this.#log,
    });
    this.#space.reclaimer = (bytes) => this.#eviction.makeRoom(bytes);
    this.#upkeep = new Upkeep({
      space: this.#space,
      pins: this.#pins,
      profiles: this.#profiles,
      hold: (manifest) => this.#hold(manifest),
      peek: (manifest) => {
        const { file, references = 0, readers = 0 } = this.#entries.get(manifest) ?? {};
        return { file, references, readers };
      },
      localManifests: () => localImages(folder, this.#catalog).map(({ digest }) => digest),
      removeFiles: (manifest) => this.#removeFiles(manifest),
      log: this.#log,
    });
    this.#ended.promise.catch(() => undefined);
    this.#chargeWhatIsThere();
  }

  /** All tags: fresh to `tagTtlMs`, or the last known when the source cannot say (see `status().tags`). */
  listTags(): Promise<Tag[]> {
    this.#checkOpen();
    return this.#catalog.listTags();
  }

  /** The tags without waiting, where they were heard a short while ago (TAG_RECENT_MS). */
  recentTags(): Tag[] | undefined {
    this.#checkOpen();
    return this.#catalog.recentTags();
  }

  /** A name was moved by this process: nobody is answered from what was heard before. */
  expireTags(): void {
    this.#catalog.expireTags();
  }

  /** A manifest, from here or the source. Throws bad-request, not-found, corrupt and what the source throws. */
  async readManifest(digest: Digest): Promise<Manifest> {
    this.#checkOpen();
    checkDigest(digest);
    return (await this.#catalog.manifest(digest)).value;
  }

  /** Manifests and chunk tables as a source has them, from here or the source; no image is opened for it (`asSource`). */
  get descriptions(): Pick<ChunkSource, 'readManifest' | 'readTable'> {
    this.#checkOpen();
    return {
      readManifest: async (digest) => (await this.#catalog.manifest(checkDigest(digest))).bytes,
      readTable: async (digest) => (await this.#catalog.table(checkDigest(digest))).bytes,
    };
  }

  /**
   * Opens an image for reading; handles of one image share files, states and fetches. Throws bad-request,
   * not-found, corrupt, bad-format (manifest and table disagree), newer-format and what the source throws.
   */
  async openImage(manifestDigest: Digest): Promise<CachedImage> {
    const { file, entry, release } = await this.#hold(manifestDigest);
    if (++entry.readers > 1) for (const recording of file.recordings) recording.shared();
    return new CachedImage(file, () => {
      entry.readers--;
      release();
    });
  }

  async #hold(digest: Digest): Promise<{ file: ImageFile; entry: Entry; release: () => void }> {
    this.#checkOpen();
    checkDigest(digest);
    const entry = this.#entries.get(digest) ?? this.#addEntry(digest);
    // Counted before the wait, so that nobody closes it meanwhile.
    entry.references++;
    this.#idle.delete(digest);
    try {
      const file = entry.file ?? (await Promise.race([entry.opening, this.#ended.promise]));
      let held = true;
      const release = () => {
        if (held) this.#release(digest, entry);
        held = false;
      };
      return { file, entry, release };
    } catch (error) {
      if (this.#entries.get(digest) === entry) this.#entries.delete(digest);
      throw asGridError(error, `cannot open image ${digest.slice(0, 12)} in ${this.#folder.folder}`);
    }
  }

  /** Fetches all of an image, or what its profile for `purpose` names. Throws not-found without a profile,
   * no-space, closed when cancelled, and what a fetch throws. */
  warm(manifest: Digest, options: PrefetchOptions & { purpose?: Purpose } = {}): Promise<WarmResult> {
    return this.#upkeep.warm(manifest, options);
  }

  /** Keeps an image, or what its profile for `purpose` names, from eviction, also after a restart. */
  pin(manifest: Digest, purpose?: Purpose): Promise<void> {
    return this.#upkeep.pin(manifest, purpose);
  }

  /** Removes one pin, or all of the image. Throws not-found. */
  unpin(manifest: Digest, purpose?: Purpose): void {
    this.#upkeep.unpin(manifest, purpose);
  }

  /** Takes an image's chunks off the disk. Resolves to their number. Throws in-use. */
  evict(manifest: Digest): Promise<number> {
    return this.#upkeep.evict(manifest);
  }

  /** Reads and hashes all that is here, of one image or all, and fetches again what is damaged. */
  scrub(options: PrefetchOptions & { manifest?: Digest } = {}): Promise<ScrubResult> {
    return this.#upkeep.scrub(options);
  }

  /** Chunks will be wanted soon: what takes time to be ready is begun. */
  prepare(): void {
    this.#fetcher.prepare();
  }

  /** A machine is being started until what is returned is called: prefetch leaves it the processors. */
  starting(): () => void {
    return this.#fetcher.starting();
  }

  /** Fetches what earlier starts of this kind touched, while they start. Resolves to the chunks fetched. */
  prefetchProfile(manifest: Digest, purpose: Purpose, options: ReplayOptions = {}): Promise<number> {
    return this.#upkeep.prefetchProfile(manifest, purpose, options);
  }

  /** What of an image is on this disk, but for zeros: chunk by chunk, in the order of the image. */
  presentRanges(manifest: Digest): Promise<ByteRange[]> {
    return this.#upkeep.presentRanges(manifest);
  }

  /** Records what a start touches; call before the image is opened for it. */
  startRecording(manifest: Digest, purpose: Purpose): StartRecording {
    this.#checkOpen();
    return this.#upkeep.startRecording(checkDigest(manifest), purpose);
  }

  /** Figures of the cache and of every image in it. */
  async status(): Promise<CacheStatus> {
    await this.#space.probe().catch(() => undefined);
    return statusOf({
      folder: this.#folder,
      sourceName: this.#source.name,
      space: this.#space,
      catalog: this.#catalog,
      figures: this.#figures,
      pins: this.#pins,
      corruptChunks: this.#fetcher.corruptChunks,
      evictedChunks: this.#eviction.evictedChunks,
      inFlightChunks: this.#fetcher.inFlight,
      droppedImages: this.#droppedImages,
      open: new Map(
        [...this.#entries].flatMap(([digest, { file, references }]) =>
          file ? [[digest, { file, references }]] : [],
        ),
      ),
    });
  }

  /** Puts everything fetched so far on disk and into the maps: after it, power loss costs next to nothing of that
   * (the map's own pages follow within the kernel's write-back time, or at close). */
  async flush(): Promise<void> {
    await Promise.all([...this.#entries.values()].map(async ({ file }) => file?.flush()));
  }

  /**
   * This cache as a source for other caches. `encoding` is how chunks that are here travel: 'plain' (default)
   * costs no time, 'zstd' a millisecond each and a third of the bytes. Closing the source leaves the cache open.
   */
  asSource(options: { readonly encoding?: ChunkEncoding } = {}): ChunkSource {
    this.#checkOpen();
    const tier: TierCache = {
      name: `cache ${this.#folder.folder} of ${this.#source.name}`,
      source: this.#source,
      listTags: () => this.listTags(),
      manifestBytes: async (digest) => this.#catalog.manifest(checkDigest(digest)),
      tableBytes: async (digest) => this.#catalog.table(checkDigest(digest)),
      openImage: (digest) => this.openImage(digest),
      localImages: () => localImages(this.#folder, this.#catalog),
    };
    return new Tier(tier, options.encoding ?? 'plain');
  }

  /** Ends reads that wait for the source (`closed`), commits, closes all files, gives the folder free. Idempotent. */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    const files = [...this.#openFiles()];
    this.#fetcher.close();
    const evicted = this.#eviction.close();
    this.#ended.reject(this.#closedError());
    await Promise.all(files.map((file) => file.close()));
    await Promise.all(this.#closing.values());
    await evicted;
    this.#folder.close();
  }

  *#openFiles(): Generator<ImageFile> {
    for (const { file } of this.#entries.values()) if (file) yield file;
  }

  /** Opens an image that is on the disk and not open, the longest unchanged first, each once per `seen`. */
  async #openAnother(seen: Set<Digest>): Promise<boolean> {
    const changedMs = (digest: Digest) => {
      try {
        return statSync(this.#folder.path('images', digest, 'map')).mtimeMs;
      } catch {
        return 0;
      }
    };
    const digests = readdirSync(this.#folder.path('images'))
      .filter((digest) => isDigest(digest) && !seen.has(digest) && !this.#entries.has(digest))
      .filter((digest) => {
        const manifest = this.#catalog.localManifest(digest);
        return manifest !== undefined && this.#catalog.localTable(manifest.table) !== undefined;
      });
    const [oldest] = digests
      .map((digest) => ({ digest, ms: changedMs(digest) }))
      .toSorted((a, b) => a.ms - b.ms);
    if (!oldest) return false;
    seen.add(oldest.digest);
    const { release } = await this.#hold(oldest.digest);
    release();
    return true;
  }

  /** Unless somebody has opened it meanwhile. */
  async #removeFiles(digest: Digest): Promise<void> {
    const entry = this.#entries.get(digest);
    if (entry && entry.references > 0) return;
    this.#idle.delete(digest);
    this.#entries.delete(digest);
    const removing = (async () => {
      await entry?.file?.close();
      rmSync(this.#folder.path('images', digest), { recursive: true, force: true });
      this.#space.setCharge(digest, 0);
    })().finally(() => this.#closing.delete(digest));
    this.#closing.set(digest, removing);
    await removing;
  }

  #addEntry(digest: Digest): Entry {
    const opening = Promise.withResolvers<ImageFile>();
    // Nobody may be waiting any more when it fails.
    opening.promise.catch(() => undefined);
    const entry: Entry = { opening: opening.promise, file: undefined, references: 0, readers: 0 };
    this.#entries.set(digest, entry);
    void this.#openFile(digest, entry).then(opening.resolve, opening.reject);
    return entry;
  }

  /** Sets `entry.file` in the same moment as it opens files, so that a close finds them. */
  async #openFile(digest: Digest, entry: Entry): Promise<ImageFile> {
    await this.#closing.get(digest);
    const { value: manifest } = await this.#catalog.manifest(digest);
    const { value: table } = await this.#catalog.table(manifest.table);
    if (table.chunkBytes !== manifest.chunkBytes || table.count !== chunkCountOf(manifest)) {
      throw new GridError(
        'bad-format',
        `manifest ${digest.slice(0, 12)} and its chunk table ${manifest.table.slice(0, 12)} disagree`,
      );
    }
    this.#checkOpen();
    const folder = this.#folder.path('images', digest);
    const context = {
      fetcher: this.#fetcher,
      space: this.#space,
      quiet: this.#quiet,
      siblings: this.#siblings,
      packs: this.#packs,
      figures: this.#figuresOf(digest, table.count),
      isPinned: (index: number) => this.#pins.covers(digest, index),
      log: this.#log,
    };
    try {
      entry.file = new ImageFile(folder, digest, manifest, table, context);
    } catch (error) {
      if (!(error instanceof GridError) || error.code !== 'bad-format') throw error;
      this.#droppedImages++;
      this.#log(`cache: ${error.message}; it is dropped and fetched again`);
      rmSync(folder, { recursive: true, force: true });
      this.#space.setCharge(digest, 0);
      entry.file = new ImageFile(folder, digest, manifest, table, context);
    }
    return entry.file;
  }

  #figuresOf(digest: Digest, chunkCount: number): ImageFigures {
    let figures = this.#figures.get(digest);
    if (!figures) this.#figures.set(digest, (figures = newFigures(chunkCount)));
    return figures;
  }

  #release(digest: Digest, entry: Entry): void {
    entry.references--;
    if (entry.references > 0 || this.#closed) return;
    this.#idle.add(digest);
    if (this.#idle.size <= CACHE_IDLE_IMAGES_MAX) return;
    const [oldest] = this.#idle;
    if (oldest === undefined) return;
    this.#idle.delete(oldest);
    const file = this.#entries.get(oldest)?.file;
    this.#entries.delete(oldest);
    if (!file) return;
    const closing = file.close().finally(() => this.#closing.delete(oldest));
    this.#closing.set(oldest, closing);
  }

  #chargeWhatIsThere(): void {
    const takes = (file: string) => {
      try {
        return lstatSync(file).blocks * 512;
      } catch {
        // Whatever is wrong with it, the open of its image finds it.
        return 0;
      }
    };
    for (const kind of ['manifests', 'tables']) {
      for (const name of readdirSync(this.#folder.path(kind))) {
        const file = this.#folder.path(kind, name);
        this.#space.setCharge(file, takes(file));
      }
    }
    for (const digest of readdirSync(this.#folder.path('images'))) {
      const folder = this.#folder.path('images', digest);
      this.#space.setCharge(digest, takes(path.join(folder, 'data')) + takes(path.join(folder, 'map')));
    }
  }

  #checkOpen(): void {
    if (this.#closed) throw this.#closedError();
  }

  #closedError(): GridError {
    return new GridError('closed', `the cache in ${this.#folder.folder} is closed`);
  }
}

function checkDigest(digest: unknown): Digest {
  if (!isDigest(digest)) throw new GridError('bad-request', `'${String(digest)}' is not a digest`);
  return digest;
}
