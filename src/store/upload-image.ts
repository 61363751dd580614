/**
 * A disk that was made from an image becomes a new version of it in a store that is reached through a source: the
 * same as commit.ts, where the store is not a folder of this host. Chunks that may have changed are read and hashed
 * here; the store is asked which of them it lacks, and these alone are compressed and sent; then the image; its tag
 * moves last. An upload that was cut off leaves chunks behind, which the next one finds there.
 *
 *   changed chunks → rounds of 16 MiB, a few at a time: read, hash → ask → compress in libuv's threads → send
 */
import { promisify } from 'node:util';
import { zstdCompress } from 'node:zlib';
import { isAllZero, sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { ChunkTable, encodeChunkTable } from '../core/chunk-table.ts';
import { compress, compressionOf } from '../core/chunk.ts';
import { GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import {
  chunkCountOf,
  chunkLengthOf,
  encodeManifest,
  parseManifest,
  parseReference,
} from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import type { ChunkSource } from '../core/source.ts';
import { UPLOAD_BYTES_MAX, UPLOAD_CHUNKS_MAX } from '../core/uploads.ts';
import type { NewChunk, UploadTarget } from '../core/uploads.ts';
import { checkedLabels } from './commit.ts';
import type { CommitOptions, CommitResult } from './commit.ts';

const compressInBackground = promisify(zstdCompress);

/** Plain bytes of one round: its question and its answer cost two round trips. */
const ROUND_BYTES = 16 * MIB;
/** Rounds under way: while one waits for the far side, the next is read and compressed. */
const ROUNDS_MAX = 3;

export interface UploadOptions extends Omit<CommitOptions, 'isChanged' | 'read'> {
  /** Fills `target`, a whole chunk, with the disk's content from `offsetBytes`. Called once for each chunk. */
  readonly read: (target: Uint8Array, offsetBytes: number) => Promise<void>;
  /** What the tag has to point at: see NewImage. */
  readonly expected?: Digest | null;
  /** A chunk table: where the disk's is the same, there is nothing new, and nothing is made. */
  readonly before?: Digest;
  /** Hears of the image's digest just before the tag moves. */
  readonly beforeTag?: (manifest: Digest) => Promise<void>;
}

export type UploadResult = Omit<CommitResult, 'tag'> & {
  /** Undefined: nothing was new. */ readonly tag?: Tag;
};

/**
 * Makes the new version, durable when it resolves; a failure or a cancel leaves the tag where it was. Throws
 * bad-request (reference, labels, a disk that is smaller than its parent), not-found (parent), denied (the source
 * takes no uploads), exists (`expected`), tunnel and origin errors, closed (cancelled), and what `read` throws.
 */
export async function uploadImage(
  source: Pick<ChunkSource, 'name' | 'readManifest' | 'readTable' | 'uploads'>,
  options: UploadOptions,
): Promise<UploadResult> {
  const { name, version } = parseReference(options.reference);
  const { uploads } = source;
  if (!uploads) throw new GridError('denied', `${source.name} takes no uploads`);
  // A source that takes nothing says so here, before anything is read.
  await uploads.findChunks([options.parent]);
  const parent = parseManifest(await source.readManifest(options.parent), options.parent);
  if (options.sizeBytes < parent.sizeBytes) {
    throw new GridError('bad-request', `the disk has ${options.sizeBytes} bytes, fewer than its parent's`);
  }
  const labels = checkedLabels({ ...parent.labels, ...options.labels });
  const table = ChunkTable.parse(await source.readTable(parent.table), parent.table);
  const size = { sizeBytes: options.sizeBytes, chunkBytes: parent.chunkBytes };

  const changed = new Set(options.changed(parent.chunkBytes));
  // A last chunk that was short is a longer one now, with another digest.
  if (options.sizeBytes > parent.sizeBytes && parent.sizeBytes % parent.chunkBytes !== 0) {
    changed.add(Math.floor(parent.sizeBytes / parent.chunkBytes));
  }
  const upload = new Upload(uploads, size, options);
  await upload.run([...changed].toSorted((a, b) => a - b));

  const chunks = upload.chunks();
  if (!options.standalone)
    for (const entry of table.entries()) if (!changed.has(entry.index)) chunks.push(entry);
  chunks.sort((a, b) => a.index - b.index);
  const encoded = encodeChunkTable(parent.chunkBytes, chunkCountOf(size), chunks);
  const { bytes, digest } = encodeManifest({
    schema: 1,
    kind: parent.kind,
    ...size,
    table: encoded.digest,
    nonzeroBytes: chunks.reduce((sum, { index }) => sum + chunkLengthOf(size, index), 0),
    parent: options.parent,
    labels,
    parts: parent.parts,
    created: new Date().toISOString(),
  });
  const result = {
    manifest: parseManifest(bytes, digest),
    digest,
    changedChunks: changed.size,
    newChunks: upload.sentChunks,
    newStoredBytes: upload.sentBytes,
  };
  if (encoded.digest === options.before) return result;
  upload.checkCancelled();
  await options.beforeTag?.(digest);
  const tag = await uploads.putImage({
    manifest: bytes,
    table: compress(encoded.bytes),
    name,
    version,
    ...(options.expected === undefined ? {} : { expected: options.expected }),
  });
  return { ...result, tag };
}

/** What `Upload` needs to know. */
export type UploadWork = Pick<UploadOptions, 'reference' | 'read' | 'onProgress' | 'signal'>;

/** Chunks on their way into a store: read and hashed, asked for, and sent where they lack. */
export class Upload {
  sentChunks = 0;
  sentBytes = 0;
  readonly #target: UploadTarget;
  readonly #size: Pick<Manifest, 'sizeBytes' | 'chunkBytes'>;
  readonly #options: UploadWork;
  /** Digest of each chunk that was read and is not zeros. */
  readonly #digests = new Map<number, Digest>();
  /** Stored bytes of each that is there; 0 while a round is at it. */
  readonly #storedBytes = new Map<Digest, number>();
  #doneBytes = 0;
  #totalBytes = 0;

  constructor(target: UploadTarget, size: Pick<Manifest, 'sizeBytes' | 'chunkBytes'>, options: UploadWork) {
    this.#target = target;
    this.#size = size;
    this.#options = options;
  }

  /** For the table, in no order. */
  chunks(): { index: number; digest: Digest; storedBytes: number }[] {
    return [...this.#digests].map(([index, digest]) => ({
      index,
      digest,
      storedBytes: this.#storedBytes.get(digest)!,
    }));
  }

  checkCancelled(): void {
    if (!this.#options.signal?.aborted) return;
    throw new GridError('closed', `the upload of ${this.#options.reference} was cancelled`);
  }

  async run(indexes: readonly number[]): Promise<void> {
    this.#totalBytes = indexes.reduce((sum, index) => sum + chunkLengthOf(this.#size, index), 0);
    const roundChunks = Math.max(1, Math.floor(ROUND_BYTES / this.#size.chunkBytes));
    let next = 0;
    let failed = false;
    const lane = async () => {
      while (next < indexes.length && !failed) {
        const round = indexes.slice(next, (next += roundChunks));
        try {
          await this.#round(round);
        } catch (error) {
          failed = true;
          throw error;
        }
      }
    };
    // All of them, also after a failure: the disk may be closed when we are done.
    const lanes = await Promise.allSettled(Array.from({ length: ROUNDS_MAX }, lane));
    for (const result of lanes) if (result.status === 'rejected') throw result.reason;
  }

  async #round(indexes: readonly number[]): Promise<void> {
    const fresh = new Map<Digest, Buffer>();
    for (const index of indexes) {
      this.checkCancelled();
      const plain = Buffer.allocUnsafe(chunkLengthOf(this.#size, index));
      await this.#options.read(plain, index * this.#size.chunkBytes);
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
    await this.#send(missing);
    this.#doneBytes += indexes.reduce((sum, index) => sum + chunkLengthOf(this.#size, index), 0);
    this.#options.onProgress?.(this.#doneBytes, this.#totalBytes);
  }

  async #send(missing: readonly (readonly [Digest, Buffer])[]): Promise<void> {
    const packed = await Promise.all(
      missing.map(async ([digest, plain]): Promise<NewChunk> => {
        const stored = await compressInBackground(plain, compressionOf(plain.length));
        return { digest, plainBytes: plain.length, stored };
      }),
    );
    for (let at = 0; at < packed.length;) {
      this.checkCancelled();
      const call: NewChunk[] = [];
      for (let bytes = 0; at < packed.length && call.length < UPLOAD_CHUNKS_MAX; at++) {
        bytes += packed[at]!.stored.length;
        if (call.length > 0 && bytes > UPLOAD_BYTES_MAX) break;
        call.push(packed[at]!);
      }
      await this.#target.putChunks(call);
      for (const { digest, stored } of call) {
        this.#storedBytes.set(digest, stored.length);
        this.sentChunks++;
        this.sentBytes += stored.length;
      }
    }
  }
}
