/**
 * Versions that go into a store which is reached through a source (new-version.ts). Chunks that may have changed, or
 * the blocks of them that did (patching.ts), are read and hashed here; the store is asked which of them it lacks, and these alone are compressed and sent; then the
 * image; its tag moves last. An upload that was cut off leaves chunks behind, which the next one finds there.
 *
 *   changed chunks → rounds of 16 MiB, a few at a time: read, hash → ask → compress in libuv's threads → send
 */
import { promisify } from 'node:util';
import { zstdCompress } from 'node:zlib';
import { isAllZero, sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import type { NewEntry } from '../core/chunk-table.ts';
import { compressionOf } from '../core/chunk.ts';
import { GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import { chunkLengthOf } from '../core/manifest.ts';
import type { ManifestKind, Tag } from '../core/manifest.ts';
import { PACK_BLOCKS_MAX, PATCH_BLOCK_BYTES } from '../core/patch.ts';
import type { ChunkSource } from '../core/source.ts';
import { UPLOAD_BYTES_MAX, UPLOAD_CHUNKS_MAX } from '../core/uploads.ts';
import type { NewChunk, NewImage, UploadTarget } from '../core/uploads.ts';
import { checkCancelled, makeVersion } from './new-version.ts';
import { entriesOfGroup, PacksBelow, readGroup, splitChanges } from './patching.ts';
import type { GroupContent, PatchGroup } from './patching.ts';
import type { Changes, MadeVersion, NewVersionOptions, Packed, VersionEnd } from './new-version.ts';

const compressInBackground = promisify(zstdCompress);

/** Plain bytes of one round: its question and its answer cost two round trips. */
const ROUND_BYTES = 16 * MIB;
/** Rounds under way: while one waits for the far side, the next is read and compressed. */
const ROUNDS_MAX = 3;

type Uploading = Pick<
  ChunkSource,
  'name' | 'listTags' | 'readManifest' | 'readTable' | 'readChunks' | 'uploads'
>;

/** Fills `target`, a whole chunk, or whole blocks of it where `isChanged` is given, with the content from `offsetBytes`.
 * Called once for each chunk or block. */
type ReadChunk = (target: Uint8Array, offsetBytes: number) => Promise<void>;

export interface UploadOptions extends Omit<NewVersionOptions, 'own' | 'chunkBytes'> {
  readonly parent: Digest;
  readonly read: ReadChunk;
  /** Of a chunk that `changed` names, whether block `block` (4 KiB, counted from the disk's start) may differ: chunks of
   * which few do become patches of the parent's. Left out: all are sent as a whole. */
  readonly isChanged?: (block: number) => boolean;
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
  const { before, beforeTag } = options;
  return makeVersion(
    source,
    new UploadEnd(source, uploads, options),
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
  const { kind, parts = {} } = options;
  return makeVersion(source, new UploadEnd(source, uploadsOf(source), options), {
    ...options,
    own: { kind, parts },
  });
}

function uploadsOf({ uploads, name }: Uploading): UploadTarget {
  if (!uploads) throw new GridError('denied', `${name} takes no uploads`);
  return uploads;
}

/** What becomes one object: a chunk, by its number, or the pack of a group. */
type Piece = number | PatchGroup;

/** Chunks on their way to a far store: read and hashed, asked for, and sent where they lack. */
class UploadEnd implements VersionEnd {
  readonly #target: UploadTarget;
  readonly #options: Pick<UploadOptions, 'read' | 'isChanged' | 'expected'>;
  /** Digest of each piece that was read and is not zeros. */
  readonly #digests = new Map<Piece, Digest>();
  readonly #contents = new Map<PatchGroup, GroupContent>();
  readonly #packsBelow: PacksBelow;
  /** Stored bytes of each that is there; 0 while a round is at it. */
  readonly #storedBytes = new Map<Digest, number>();
  #sentChunks = 0;
  #sentBytes = 0;
  #doneBytes = 0;

  constructor(
    source: Pick<ChunkSource, 'readChunks'>,
    target: UploadTarget,
    options: Pick<UploadOptions, 'read' | 'isChanged' | 'expected'>,
  ) {
    this.#target = target;
    this.#options = options;
    this.#packsBelow = new PacksBelow(source);
  }

  async pack(changes: Changes): Promise<Packed> {
    const { isChanged } = this.#options;
    const { whole, groups } = isChanged
      ? await splitChanges(changes, isChanged)
      : { whole: changes.indexes, groups: [] };
    const sizeOf = (piece: Piece) =>
      typeof piece === 'number' ? chunkLengthOf(changes.size, piece) : piece.blockCount * PATCH_BLOCK_BYTES;
    const bytesOf = (pieces: readonly Piece[]) =>
      pieces.reduce<number>((sum, piece) => sum + sizeOf(piece), 0);
    const totalBytes = bytesOf([...whole, ...groups]);
    const rounds: (readonly Piece[])[] = [
      ...slices(groups, ROUND_BYTES / (PACK_BLOCKS_MAX * PATCH_BLOCK_BYTES)),
      ...slices(whole, Math.max(1, Math.floor(ROUND_BYTES / changes.size.chunkBytes))),
    ];
    let failed = false;
    const lane = async () => {
      for (let round = rounds.shift(); round && !failed; round = rounds.shift()) {
        try {
          await this.#round(round, changes);
          this.#doneBytes += bytesOf(round);
          changes.onProgress?.(this.#doneBytes, totalBytes);
        } catch (error) {
          failed = true;
          throw error;
        }
      }
    };
    // All of them, also after a failure: the disk may be closed when we are done.
    const lanes = await Promise.allSettled(Array.from({ length: ROUNDS_MAX }, lane));
    for (const result of lanes) if (result.status === 'rejected') throw result.reason;
    const chunks = [...whole, ...groups].flatMap((piece) => this.#entriesOf(piece));
    return { chunks, newChunks: this.#sentChunks, newStoredBytes: this.#sentBytes };
  }

  #entriesOf(piece: Piece): NewEntry[] {
    const digest = this.#digests.get(piece);
    const object = digest === undefined ? undefined : { digest, storedBytes: this.#storedBytes.get(digest)! };
    if (typeof piece !== 'number') return entriesOfGroup(this.#contents.get(piece)!, object);
    return object ? [{ index: piece, ...object }] : [];
  }

  /** Never undefined: a store that lacks a chunk refuses the image. */
  publish(image: NewImage): Promise<Tag> {
    const { expected } = this.#options;
    return this.#target.putImage({ ...image, ...(expected === undefined ? {} : { expected }) });
  }

  async #read(piece: Piece, size: Changes['size']): Promise<Buffer> {
    const { read } = this.#options;
    if (typeof piece === 'number') {
      const plain = Buffer.allocUnsafe(chunkLengthOf(size, piece));
      await read(plain, piece * size.chunkBytes);
      return plain;
    }
    const { plain, content } = await readGroup(piece, size.chunkBytes, read, this.#packsBelow);
    this.#contents.set(piece, content);
    return plain;
  }

  async #round(pieces: readonly Piece[], changes: Changes): Promise<void> {
    const { size } = changes;
    const fresh = new Map<Digest, Buffer>();
    for (const piece of pieces) {
      checkCancelled(changes);
      const plain = await this.#read(piece, size);
      if (isAllZero(plain)) continue;
      const digest = sha256(plain);
      this.#digests.set(piece, digest);
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

function* slices<T>(all: readonly T[], length: number): Generator<readonly T[]> {
  for (let at = 0; at < all.length; at += length) yield all.slice(at, at + length);
}
