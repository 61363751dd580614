/**
 * A cache as a source for others: a site's cache in front of the origin, behind the caches of its hosts. It gives
 * what it has, and fetches and keeps what it lacks. Chunks are asked for by digest alone, so it has to know where
 * each lies: an image is known once its table was asked for here, or when it was in the folder already. A chunk of
 * no known image is passed through and not kept. Of an image with patched chunks (core/patch.ts) hosts ask for the chunks
 * below, which are its parent's, or that one's: these become known with it. Packs are passed through.
 *
 * Memory: 4 bytes per chunk that is not zero, times 2 to 4 for the free slots of the hash table.
 */
import { compress } from '../src/core/chunk.ts';
import type { ChunkEncoding, ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import type { ChunkTable } from '../src/core/chunk-table.ts';
import { isDigest } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import { asGridError, GridError } from '../src/core/errors.ts';
import { BATCH_CHUNKS_MAX } from '../src/core/limits.ts';
import { chunkLengthOf } from '../src/core/manifest.ts';
import type { Manifest, Tag } from '../src/core/manifest.ts';
import type { Purpose } from '../src/core/profile.ts';
import type { ChunkSource, ReadChunksOptions } from '../src/core/source.ts';
import type { CachedImage } from './cached-image.ts';
import { DigestIndex } from './digest-index.ts';

/** Chunks of one batch that are held in memory at a time. */
const WINDOW_CHUNKS = 32;

/** What a tier needs of its cache. */
export interface TierCache {
  readonly name: string;
  readonly source: ChunkSource;
  listTags(): Promise<Tag[]>;
  manifestBytes(digest: Digest): Promise<{ bytes: Buffer; value: Manifest }>;
  tableBytes(digest: Digest): Promise<{ bytes: Buffer; value: ChunkTable }>;
  openImage(manifest: Digest): Promise<CachedImage>;
  /** Manifests of the images in the folder. */
  localImages(): { digest: Digest; manifest: Manifest; table: ChunkTable }[];
}

interface KnownImage {
  readonly image: CachedImage;
  readonly where: DigestIndex;
}

export class Tier implements ChunkSource {
  readonly name: string;
  readonly #cache: TierCache;
  readonly #encoding: ChunkEncoding;
  readonly #abort = new AbortController();
  /** Manifests that were read here, by their tables. */
  readonly #manifestsByTable = new Map<Digest, Digest>();
  readonly #images = new Map<Digest, Promise<KnownImage>>();
  /** Images whose parents are known, or being asked for. */
  readonly #descendants = new Set<Digest>();
  #local: Promise<void> | undefined;

  constructor(cache: TierCache, encoding: ChunkEncoding) {
    this.name = cache.name;
    this.#cache = cache;
    this.#encoding = encoding;
  }

  listTags(): Promise<Tag[]> {
    return this.#cache.listTags();
  }

  async readManifest(digest: Digest): Promise<Buffer> {
    const { bytes, value } = await this.#cache.manifestBytes(digest);
    this.#manifestsByTable.set(value.table, digest);
    return bytes;
  }

  async readTable(digest: Digest): Promise<Buffer> {
    const { bytes, value } = await this.#cache.tableBytes(digest);
    const manifest = this.#manifestsByTable.get(digest);
    if (manifest !== undefined) {
      await this.#learn(manifest, value);
      if (value.patchCount > 0) this.#learnParents(manifest);
    }
    return bytes;
  }

  async readChunks(
    refs: readonly ChunkRef[],
    options: ReadChunksOptions,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    if (refs.length > BATCH_CHUNKS_MAX) {
      throw new GridError('bad-request', `a batch of ${refs.length} chunks; at most ${BATCH_CHUNKS_MAX}`);
    }
    for (const { digest } of refs) {
      if (!isDigest(digest)) throw new GridError('bad-request', `'${String(digest)}' is not a digest`);
    }
    const ended = AbortSignal.any([this.#abort.signal, ...(options.signal ? [options.signal] : [])]);
    const batch = new Batch(this.name, ended, deliver);
    this.#local ??= this.#learnLocal();
    try {
      await batch.before(this.#local);
      const here: { at: number; image: CachedImage; index: number }[] = [];
      const elsewhere: number[] = [];
      // One that cannot be opened says so to who asks for it by name.
      const opened = await batch.before(Promise.allSettled(this.#images.values()));
      const images = opened.flatMap((one) => (one.status === 'fulfilled' ? one.value : []));
      for (const [at, ref] of refs.entries()) {
        const found = find(images, ref);
        if (found) here.push({ at, ...found });
        else elsewhere.push(at);
      }
      let next = 0;
      const oneAfterAnother = async () => {
        for (let job = here[next++]; job && !batch.over; job = here[next++]) {
          const plain = Buffer.allocUnsafeSlow(refs[job.at]!.plainBytes);
          // Those behind a host's demand wait behind this site's too.
          if (options.priority === 'prefetch') await job.image.prefetch(job.index);
          await job.image.read(plain, job.index * job.image.manifest.chunkBytes);
          const bytes = this.#encoding === 'zstd' && !batch.over ? compress(plain) : plain;
          batch.deliver(job.at, { encoding: this.#encoding, bytes });
        }
      };
      await batch.before(
        Promise.all([
          ...Array.from({ length: Math.min(WINDOW_CHUNKS, here.length) }, oneAfterAnother),
          this.#passThrough(refs, elsewhere, { ...options, signal: ended }, batch),
        ]),
      );
    } finally {
      batch.over = true;
    }
  }

  /** Profiles are the origin's: a site keeps those of its own starts only. */
  async readProfile(manifest: Digest, purpose: Purpose): Promise<Buffer | undefined> {
    return this.#cache.source.readProfile?.(manifest, purpose);
  }

  async recordProfile(manifest: Digest, purpose: Purpose, recording: Buffer): Promise<void> {
    const { source } = this.#cache;
    if (!source.recordProfile) throw new GridError('denied', `${source.name} keeps no profiles`);
    await source.recordProfile(manifest, purpose, recording);
  }

  /** A site keeps what it likes; the origin is where images are held. */
  async hold(holder: string, manifests: readonly Digest[]): Promise<void> {
    const { source } = this.#cache;
    if (!source.hold) throw new GridError('denied', `${source.name} holds nothing for hosts`);
    await source.hold(holder, manifests);
  }

  /** Ends reads that wait (`closed`) and lets go of the images; the cache stays open. Idempotent. */
  async close(): Promise<void> {
    if (this.#abort.signal.aborted) return;
    this.#abort.abort();
    for (const known of await Promise.allSettled(this.#images.values())) {
      if (known.status === 'fulfilled') await known.value.image.close();
    }
  }

  async #passThrough(
    refs: readonly ChunkRef[],
    which: readonly number[],
    options: ReadChunksOptions,
    batch: Batch,
  ): Promise<void> {
    if (which.length === 0) return;
    await this.#cache.source.readChunks(
      which.map((at) => refs[at]!),
      options,
      (index, chunk) => batch.deliver(which[index]!, chunk),
    );
  }

  /** From here on the image's chunks are found, kept and counted as the image's. */
  #learn(manifest: Digest, table: ChunkTable): Promise<KnownImage> {
    let known = this.#images.get(manifest);
    if (!known) {
      known = this.#open(manifest, table);
      this.#images.set(manifest, known);
      known.catch(() => this.#images.delete(manifest));
    }
    return known;
  }

  async #open(manifest: Digest, table: ChunkTable): Promise<KnownImage> {
    const image = await this.#cache.openImage(manifest);
    if (this.#abort.signal.aborted) {
      await image.close();
      throw new GridError('closed', `${this.name} was closed`);
    }
    return { image, where: new DigestIndex(table) };
  }

  /** The images whose chunks lie below the patched ones of this one: its parent, and on from one that is patched itself. In
   * the background, once: what is asked for meanwhile is passed through, and so is all of a parent that the source has no
   * longer. */
  #learnParents(manifest: Digest): void {
    if (this.#descendants.has(manifest)) return;
    this.#descendants.add(manifest);
    const learn = async (child: Digest): Promise<void> => {
      const { parent } = (await this.#cache.manifestBytes(child)).value;
      if (parent === undefined || this.#images.has(parent)) return;
      const { table: name } = (await this.#cache.manifestBytes(parent)).value;
      const table = (await this.#cache.tableBytes(name)).value;
      await this.#learn(parent, table);
      if (table.patchCount > 0) await learn(parent);
    };
    learn(manifest).catch(() => this.#descendants.delete(manifest));
  }

  /** A host that knows its manifest and table already asks for chunks at once. */
  async #learnLocal(): Promise<void> {
    // One image that cannot be opened says so when it is asked for by name.
    await Promise.allSettled(
      this.#cache.localImages().map(({ digest, table }) => this.#learn(digest, table)),
    );
  }
}

function find(
  images: readonly KnownImage[],
  ref: ChunkRef,
): { image: CachedImage; index: number } | undefined {
  for (const { image, where } of images) {
    const index = where.find(ref.digest);
    if (index !== undefined && chunkLengthOf(image.manifest, index) === ref.plainBytes)
      return { image, index };
  }
  return undefined;
}

/** One call of readChunks: nothing is delivered after it is over. */
class Batch {
  over = false;
  readonly #deliver: (index: number, chunk: StoredChunk) => void;
  readonly #ended: Promise<never>;
  readonly #signal: AbortSignal;

  constructor(name: string, signal: AbortSignal, deliver: (index: number, chunk: StoredChunk) => void) {
    const closed = () => new GridError('closed', `reading from ${name} was cancelled`);
    this.#deliver = deliver;
    this.#signal = signal;
    this.#ended = new Promise<never>((_, reject) => {
      if (signal.aborted) reject(closed());
      signal.addEventListener('abort', () => reject(closed()), { once: true });
    });
    this.#ended.catch(() => undefined);
  }

  deliver(index: number, chunk: StoredChunk): void {
    if (!this.over && !this.#signal.aborted) this.#deliver(index, chunk);
  }

  /** What `work` gives, unless the batch is cancelled before. */
  async before<T>(work: Promise<T>): Promise<T> {
    work.catch(() => {
      this.over = true;
    });
    try {
      return await Promise.race([this.#ended, work]);
    } catch (error) {
      throw asGridError(error, 'cannot read chunks', 'origin-failed');
    }
  }
}
