/**
 * The contract for making new images in a source: chunks first, then the image that they belong to, its tag last.
 * A store takes them, a proxy's client sends them to a server whose operator lets it. Whatever is there is never
 * changed, so sending a thing twice does no harm, and who was cut off goes on where it was: what came is there.
 */
import type { Digest } from './bytes.ts';
import { BATCH_CHUNKS_MAX, KIB, MIB } from './limits.ts';
import type { Tag } from './manifest.ts';

/** Digests in one question which of them are there: 128 KiB of them, a GiB of image at the default chunk size. */
export const UPLOAD_QUESTION_MAX = 4096;
/** Stored bytes of one call of `putChunks`, unless it is a single chunk: a second of a 32 Mbit/s link. */
export const UPLOAD_BYTES_MAX = 4 * MIB;
/** Chunks of one call of `putChunks`. */
export const UPLOAD_CHUNKS_MAX = BATCH_CHUNKS_MAX;
/** Of a new image's chunk table, as stored and plain: 450 GiB of data at the default chunk size. */
export const UPLOAD_TABLE_BYTES_MAX = 64 * MIB;
/** The tag with its conditions, as JSON. */
export const UPLOAD_TAG_BYTES_MAX = 4 * KIB;

/** A chunk on its way into a store. */
export interface NewChunk {
  readonly digest: Digest;
  readonly plainBytes: number;
  /** zstd of the plain bytes: one frame. */
  readonly stored: Uint8Array;
}

/** An image whose chunks are there. */
export interface NewImage {
  readonly manifest: Buffer;
  /** zstd of the chunk table's bytes. */
  readonly table: Buffer;
  readonly name: string;
  readonly version: string;
  /**
   * What the tag has to point at when it moves: a manifest, or null for a tag that is not there yet. Left out: it
   * moves whatever it points at.
   */
  readonly expected?: Digest | null;
}

export interface UploadTarget {
  /** Stored bytes of each chunk that is there, 0 for one that is not. At most UPLOAD_QUESTION_MAX. */
  findChunks(digests: readonly Digest[]): Promise<number[]>;

  /**
   * Takes chunks whose bytes are what their digests say; all of a call or none. Throws corrupt, bad-request, denied
   * (it takes no uploads), no-space or origin-failed.
   */
  putChunks(chunks: readonly NewChunk[]): Promise<void>;

  /**
   * Takes an image and moves its tag, durable when it resolves. Throws not-found (a chunk or part that is not there;
   * nothing is changed), exists (the tag does not point at what was expected), bad-request, bad-format, denied.
   */
  putImage(image: NewImage): Promise<Tag>;

  /**
   * Takes the names of a checkpoint and of its parts (NAME.PART:VERSION) away; what nothing else needs goes with the
   * next garbage collection. Resolves with the names that were there. Throws bad-request (it is no checkpoint), in-use
   * (some host holds it), denied.
   */
  removeCheckpoint(name: string, version: string): Promise<string[]>;
}

/** Plain bytes that one process has in hand of an upload: read, hashed, being compressed or sent. */
export const UPLOAD_WINDOW_BYTES = 64 * MIB;
