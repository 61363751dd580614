/**
 * Uploads on the wire: the bodies of four calls, which only a server that was told to takes, and only from somebody
 * it knows (ssh, stdio, a unix socket).
 *
 *   POST /v1/uploads/find     which chunks are there     → stored bytes of each, 0 for none: u32 each
 *   POST /v1/uploads/chunks   new chunks                 → { stored }
 *   POST /v1/uploads/image    manifest, table and tag    → the tag
 *   POST /v1/uploads/remove   NAME:VERSION of a checkpoint → the names that were there, as a JSON array
 *
 * Invariants: every length is checked against its bound and the body's before anything is taken from it; nothing may
 * follow the last field; each call is whole or refused, and harmless when it comes twice.
 *
 * find (little-endian):
 *   0  4  magic "GVU1"
 *   4  4  count, 1 to UPLOAD_QUESTION_MAX
 *   8  32 × count   SHA-256 of the plain chunk
 *
 * chunks:
 *   0  4  magic "GVC1"
 *   4  4  count, 1 to UPLOAD_CHUNKS_MAX
 *   8  count ×  { 32 SHA-256 of the plain chunk, u32 its plain bytes, u32 its stored bytes, the stored bytes }
 *
 * image:
 *   0  4  magic "GVI1"
 *   4  4  bytes of the tag, 8  4 of the manifest, 12  4 of the table as stored
 *  16  …  tag: JSON { name, version, expected? }; manifest; table
 */
import { isDigest } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import { GridError } from '../src/core/errors.ts';
import { CHUNK_BYTES_MAX, MANIFEST_BYTES_MAX, STORED_OVERHEAD_BYTES_MAX } from '../src/core/limits.ts';
import { isName } from '../src/core/manifest.ts';
import {
  UPLOAD_BYTES_MAX,
  UPLOAD_CHUNKS_MAX,
  UPLOAD_QUESTION_MAX,
  UPLOAD_TABLE_BYTES_MAX,
  UPLOAD_TAG_BYTES_MAX,
} from '../src/core/uploads.ts';
import type { NewChunk, NewImage } from '../src/core/uploads.ts';

export const UPLOAD_FIND_PATH = '/v1/uploads/find';
export const UPLOAD_CHUNKS_PATH = '/v1/uploads/chunks';
export const UPLOAD_IMAGE_PATH = '/v1/uploads/image';
export const UPLOAD_REMOVE_PATH = '/v1/uploads/remove';

const MAGIC_FIND = 'GVU1';
const MAGIC_CHUNKS = 'GVC1';
const MAGIC_IMAGE = 'GVI1';
const HEAD_BYTES = 8;
const DIGEST_BYTES = 32;
const CHUNK_HEAD_BYTES = DIGEST_BYTES + 8;
const IMAGE_HEAD_BYTES = 16;

/** Largest body of each call. */
export const FIND_BODY_BYTES_MAX = HEAD_BYTES + DIGEST_BYTES * UPLOAD_QUESTION_MAX;
export const CHUNKS_BODY_BYTES_MAX =
  HEAD_BYTES +
  CHUNK_HEAD_BYTES * UPLOAD_CHUNKS_MAX +
  Math.max(UPLOAD_BYTES_MAX, CHUNK_BYTES_MAX + STORED_OVERHEAD_BYTES_MAX);
export const IMAGE_BODY_BYTES_MAX =
  IMAGE_HEAD_BYTES + UPLOAD_TAG_BYTES_MAX + MANIFEST_BYTES_MAX + UPLOAD_TABLE_BYTES_MAX;

function bad(why: string): GridError {
  return new GridError('bad-request', `an upload ${why}`);
}

function head(magic: string, count: number): Buffer {
  const bytes = Buffer.alloc(HEAD_BYTES);
  bytes.write(magic, 'latin1');
  bytes.writeUInt32LE(count, 4);
  return bytes;
}

function parseHead(bytes: Buffer, magic: string, countMax: number): number {
  if (bytes.length < HEAD_BYTES || bytes.toString('latin1', 0, 4) !== magic) {
    throw bad(`does not start with ${magic}`);
  }
  const count = bytes.readUInt32LE(4);
  if (count < 1 || count > countMax) throw bad(`has ${count} chunks`);
  return count;
}

export function encodeFind(digests: readonly Digest[]): Buffer {
  return Buffer.concat([head(MAGIC_FIND, digests.length), Buffer.from(digests.join(''), 'hex')]);
}

/** Throws bad-request. */
export function parseFind(bytes: Buffer): Digest[] {
  const count = parseHead(bytes, MAGIC_FIND, UPLOAD_QUESTION_MAX);
  if (bytes.length !== HEAD_BYTES + count * DIGEST_BYTES) throw bad('has the wrong length');
  return Array.from({ length: count }, (_, i) => {
    const at = HEAD_BYTES + i * DIGEST_BYTES;
    return bytes.toString('hex', at, at + DIGEST_BYTES);
  });
}

export function encodeFound(storedBytes: readonly number[]): Buffer {
  const bytes = Buffer.alloc(4 * storedBytes.length);
  for (const [i, size] of storedBytes.entries()) bytes.writeUInt32LE(size, 4 * i);
  return bytes;
}

/** Throws origin-failed. */
export function parseFound(bytes: Buffer, count: number, source: string): number[] {
  if (bytes.length !== 4 * count) {
    throw new GridError('origin-failed', `${source} answered ${bytes.length} bytes about ${count} chunks`);
  }
  return Array.from({ length: count }, (_, i) => bytes.readUInt32LE(4 * i));
}

export function encodeChunks(chunks: readonly NewChunk[]): Buffer {
  const parts: Uint8Array[] = [head(MAGIC_CHUNKS, chunks.length)];
  for (const { digest, plainBytes, stored } of chunks) {
    const before = Buffer.alloc(CHUNK_HEAD_BYTES);
    before.write(digest, 'hex');
    before.writeUInt32LE(plainBytes, DIGEST_BYTES);
    before.writeUInt32LE(stored.length, DIGEST_BYTES + 4);
    parts.push(before, stored);
  }
  return Buffer.concat(parts);
}

/** Views into `bytes`. Throws bad-request. */
export function parseChunks(bytes: Buffer): NewChunk[] {
  const count = parseHead(bytes, MAGIC_CHUNKS, UPLOAD_CHUNKS_MAX);
  const chunks: NewChunk[] = [];
  let at = HEAD_BYTES;
  for (let i = 0; i < count; i++) {
    if (bytes.length - at < CHUNK_HEAD_BYTES) throw bad('is cut short');
    const digest = bytes.toString('hex', at, at + DIGEST_BYTES);
    const plainBytes = bytes.readUInt32LE(at + DIGEST_BYTES);
    const storedBytes = bytes.readUInt32LE(at + DIGEST_BYTES + 4);
    at += CHUNK_HEAD_BYTES;
    if (plainBytes < 1 || plainBytes > CHUNK_BYTES_MAX) throw bad(`has a chunk of ${plainBytes} bytes`);
    if (storedBytes < 1 || storedBytes > plainBytes + STORED_OVERHEAD_BYTES_MAX) {
      throw bad(`has ${storedBytes} bytes for a chunk of ${plainBytes}`);
    }
    if (bytes.length - at < storedBytes) throw bad('is cut short');
    chunks.push({ digest, plainBytes, stored: bytes.subarray(at, at + storedBytes) });
    at += storedBytes;
  }
  if (at !== bytes.length) throw bad('goes on after its end');
  return chunks;
}

export function encodeImage({ manifest, table, name, version, expected }: NewImage): Buffer {
  const tag = Buffer.from(JSON.stringify({ name, version, ...(expected === undefined ? {} : { expected }) }));
  const before = Buffer.alloc(IMAGE_HEAD_BYTES);
  before.write(MAGIC_IMAGE, 'latin1');
  for (const [i, { length }] of [tag, manifest, table].entries()) before.writeUInt32LE(length, 4 + 4 * i);
  return Buffer.concat([before, tag, manifest, table]);
}

/** Throws bad-request. What manifest and table say is not looked at. */
export function parseImage(bytes: Buffer): NewImage {
  if (bytes.length < IMAGE_HEAD_BYTES || bytes.toString('latin1', 0, 4) !== MAGIC_IMAGE) {
    throw bad(`does not start with ${MAGIC_IMAGE}`);
  }
  const [tagBytes, manifestBytes, tableBytes] = [4, 8, 12].map((at) => bytes.readUInt32LE(at)) as [
    number,
    number,
    number,
  ];
  if (tagBytes > UPLOAD_TAG_BYTES_MAX || manifestBytes > MANIFEST_BYTES_MAX) throw bad('has a wild length');
  if (bytes.length !== IMAGE_HEAD_BYTES + tagBytes + manifestBytes + tableBytes) {
    throw bad('has the wrong length');
  }
  const manifestAt = IMAGE_HEAD_BYTES + tagBytes;
  const tableAt = manifestAt + manifestBytes;
  return {
    ...parseTag(bytes.subarray(IMAGE_HEAD_BYTES, manifestAt)),
    manifest: bytes.subarray(manifestAt, tableAt),
    table: bytes.subarray(tableAt),
  };
}

function parseTag(bytes: Buffer): Pick<NewImage, 'name' | 'version' | 'expected'> {
  let raw: unknown;
  try {
    raw = JSON.parse(bytes.toString('utf8'));
  } catch (cause) {
    throw new GridError('bad-request', 'an upload names its tag in something that is not JSON', { cause });
  }
  const { name, version, expected } = Object(raw) as Record<string, unknown>;
  if (!isName(name) || !isName(version)) throw bad('has a malformed tag');
  if (expected !== undefined && expected !== null && !isDigest(expected)) {
    throw bad('expects its tag at something that is not a digest');
  }
  return { name, version, ...(expected === undefined ? {} : { expected }) };
}
