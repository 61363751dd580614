/**
 * Versions that go into a store which is reached through a source (new-version.ts). Chunks that may have changed are
 * read and hashed here; the store is asked which of them it lacks, and these alone are compressed and sent; then the
 * image; its tag moves last. An upload that was cut off leaves chunks behind, which the next one finds there.
 *
 *   changed chunks → rounds of 16 MiB, a few at a time: read, hash → ask → compress in libuv's threads → send
 */
import { promisify } from 'node:util';
import { zstdCompress } from 'node:zlib';
import { isAllZero, sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { compressionOf } from '../core/chunk.ts';
import { GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import { chunkLengthOf } from '../core/manifest.ts';
import type { ManifestKind, Tag } from '../core/manifest.ts';
import type { ChunkSource } from '../core/source.ts';
import { UPLOAD_BYTES_MAX, UPLOAD_CHUNKS_MAX } from '../core/uploads.ts';
import type { NewChunk, NewImage, UploadTarget } from '../core/uploads.ts';
import { checkCancelled, makeVersion } from './new-version.ts';
import type { Changes, MadeVersion, NewVersionOptions, Packed, VersionEnd } from './new-version.ts';

const compressInBackground = promisify(zstdCompress);

/** Plain bytes of one round: its question and its answer cost two round trips. */
const ROUND_BYTES = 16 * MIB;
/** Rounds under way: while one waits for the far side, the next is read and compressed. */
const ROUNDS_MAX = 3;

type Uploading = Pick<ChunkSource, 'name' | 'listTags' | 'readManifest' | 'readTable' | 'uploads'>;

/** Fills `target`, a whole chunk, with the content from `offsetBytes`. Called once for each chunk. */
type ReadChunk = (target: Uint8Array, offsetBytes: number) => Promise<void>;

export interface UploadOptions extends Omit<NewVersionOptions, 'own' | 'chunkBytes'> {
  readonly parent: Digest;
  readonly read: ReadChunk;
  /** What the tag has to point at: see NewImage. */
  readonly expected?: Digest | null;
  /** A chunk table: where the disk's is the same, there is nothing new, and nothing is made. */
  readonly before?: Digest;
  /** Hears of the image's digest just before the tag moves. */
  readonly beforeTag?: (manifest: Digest) => Promise<void>;
}

/** Without a tag nothing was new. */
export type UploadResult = MadeVersion;

/**
 * A disk that was made from an image becomes its next version, durable when it resolves; a failure or a cancel leaves
 * the tag where it was. Throws bad-request (reference, labels, a disk that is smaller than its parent), not-found
 * (parent), denied (the source takes no uploads), exists (`expected`), tunnel and origin errors, closed (cancelled),
 * and what `read` throws.
 */
export async function uploadImage(source: Uploading, options: UploadOptions): Promise<UploadResult> {
  const uploads = uploadsOf(source);
  // A source that takes nothing says so here, before anything is read.
  await uploads.findChunks([options.parent]);
  const { read, expected, before, beforeTag } = options;
  return makeVersion(
    source,
    new UploadEnd(uploads, read, expected),
    options,
    async ({ manifest, digest }) => {
      if (manifest.table === before) return false;
      await beforeTag?.(digest);
      return true;
    },
  );
}

export interface VersionOptions extends Omit<NewVersionOptions, 'own' | 'chunkBytes' | 'standalone'> {
  readonly read: ReadChunk;
  readonly kind: ManifestKind;
  /** Without a parent; with one, the parent's counts. */
  readonly chunkBytes: number;
  /** Versions that are in the store already, by the names of files. */
  readonly parts?: Readonly<Record<string, Digest>>;
}

/** A version of any kind: its kind, labels and parts are its own, of its parent it has only chunks. As above. */
export function uploadVersion(source: Uploading, options: VersionOptions): Promise<UploadResult> {
  const { read, kind, parts = {} } = options;
  return makeVersion(source, new UploadEnd(uploadsOf(source), read), { ...options, own: { kind, parts } });
}

function uploadsOf({ uploads, name }: Uploading): UploadTarget {
  if (!uploads) throw new GridError('denied', `${name} takes no uploads`);
  return uploads;
}

/** Chunks on their way to a far store: read and hashed, asked for, and sent where they lack. */
class UploadEnd implements VersionEnd {
  readonly #target: UploadTarget;
  readonly #read: ReadChunk;
  readonly #expected: Digest | null | undefined;
  /** Digest of each chunk that was read and is not zeros. */
  readonly #digests = new Map<number, Digest>();
  /** Stored bytes of each that is there; 0 while a round is at it. */
  readonly #storedBytes = new Map<Digest, number>();
  #sentChunks = 0;
  #sentBytes = 0;
  #doneBytes = 0;

  constructor(target: UploadTarget, read: ReadChunk, expected?: Digest | null) {
    this.#target = target;
    this.#read = read;
    this.#expected = expected;
  }

  async pack(changes: Changes): Promise<Packed> {
    const { indexes, size } = changes;
    const roundChunks = Math.max(1, Math.floor(ROUND_BYTES / size.chunkBytes));
    let next = 0;
    let failed = false;
    const lane = async () => {
      while (next < indexes.length && !failed) {
        const round = indexes.slice(next, (next += roundChunks));
        try {
          await this.#round(round, changes);
        } catch (error) {
          failed = true;
          throw error;
        }
      }
    };
    // All of them, also after a failure: the disk may be closed when we are done.
    const lanes = await Promise.allSettled(Array.from({ length: ROUNDS_MAX }, lane));
    for (const result of lanes) if (result.status === 'rejected') throw result.reason;
    const chunks = [...this.#digests].map(([index, digest]) => ({
      index,
      digest,
      storedBytes: this.#storedBytes.get(digest)!,
    }));
    return { chunks, newChunks: this.#sentChunks, newStoredBytes: this.#sentBytes };
  }

  /** Never undefined: a store that lacks a chunk refuses the image. */
  publish(image: NewImage): Promise<Tag> {
    return this.#target.putImage({
      ...image,
      ...(this.#expected === undefined ? {} : { expected: this.#expected }),
    });
  }

  async #round(indexes: readonly number[], changes: Changes): Promise<void> {
    const { size, totalBytes } = changes;
    const fresh = new Map<Digest, Buffer>();
    for (const index of indexes) {
      checkCancelled(changes);
      const plain = Buffer.allocUnsafe(chunkLengthOf(size, index));
      await this.#read(plain, index * size.chunkBytes);
      if (isAllZero(plain)) continue;
      const digest = sha256(plain);
      this.#digests.set(index, digest);
      if (this.#storedBytes.has(digest)) continue;
      this.#storedBytes.set(digest, 0);
      fresh.set(digest, plain);
    }
    const digests = [...fresh.keys()];
    const found = digests.length === 0 ? [] : await this.#target.findChunks(digests);
    const missing: [Digest, Buffer][] = [];
    for (const [i, digest] of digests.entries()) {
      if (found[i] === 0) missing.push([digest, fresh.get(digest)!]);
      else this.#storedBytes.set(digest, found[i]!);
    }
    await this.#send(missing, changes);
    this.#doneBytes += indexes.reduce((sum, index) => sum + chunkLengthOf(size, index), 0);
    changes.onProgress?.(this.#doneBytes, totalBytes);
  }

  async #send(missing: readonly (readonly [Digest, Buffer])[], changes: Changes): Promise<void> {
    const packed = await Promise.all(
      missing.map(async ([digest, plain]): Promise<NewChunk> => {
        const stored = await compressInBackground(plain, compressionOf(plain.length));
        return { digest, plainBytes: plain.length, stored };
      }),
    );
    for (let at = 0; at < packed.length;) {
      checkCancelled(changes);
      const call: NewChunk[] = [];
      for (let bytes = 0; at < packed.length && call.length < UPLOAD_CHUNKS_MAX; at++) {
        bytes += packed[at]!.stored.length;
        if (call.length > 0 && bytes > UPLOAD_BYTES_MAX) break;
        call.push(packed[at]!);
      }
      await this.#target.putChunks(call);
      for (const { digest, stored } of call) {
        this.#storedBytes.set(digest, stored.length);
        this.#sentChunks++;
        this.#sentBytes += stored.length;
      }
    }
  }
}
