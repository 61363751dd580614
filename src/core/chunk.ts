/**
 * A chunk as it lies in a store and travels: zstd (RFC 8878) of its plain bytes, or the plain bytes themselves
 * where a cache serves them. Decoding always verifies: nobody holds plain bytes that were not checked.
 */
import { constants, zstdCompressSync, zstdDecompressSync } from 'node:zlib';
import type { ZstdOptions } from 'node:zlib';
import { bufferOf, sha256 } from './bytes.ts';
import type { Digest } from './bytes.ts';
import { GridError } from './errors.ts';
import { CHUNK_BYTES_MAX, KIB, STORED_OVERHEAD_BYTES_MAX } from './limits.ts';

export type ChunkEncoding = 'zstd' | 'plain';

export interface StoredChunk {
  readonly encoding: ChunkEncoding;
  readonly bytes: Uint8Array;
}

/** Which chunk, and how long its plain bytes are: the bound for decoding it. */
export interface ChunkRef {
  readonly digest: Digest;
  readonly plainBytes: number;
  /** Its bytes as stored, where the asker has the chunk table at hand: how much of a link it will take. A hint. */
  readonly storedBytes?: number;
}

/** zstd's level 3: 2.95 : 1 and about 300 MB/s per thread on a Debian image at 256 KiB. */
export const ZSTD_LEVEL = 3;

export function compress(plain: Uint8Array): Buffer {
  return zstdCompressSync(plain, compressionOf(plain.length));
}

/**
 * zlib's options to compress so many bytes. The output has room for all of it at once: where a frame ends just where
 * an output buffer does (16 KiB by default, so one chunk in 16,384), Node 26 begins another frame behind it.
 */
export function compressionOf(plainBytes: number): ZstdOptions {
  return {
    params: { [constants.ZSTD_c_compressionLevel]: ZSTD_LEVEL },
    chunkSize: plainBytes + (plainBytes >> 7) + STORED_OVERHEAD_BYTES_MAX,
  };
}

/** zstd to plain bytes, at most `maxBytes` of them (a bomb ends there); throws corrupt. */
export function decompress(stored: Uint8Array, maxBytes: number, what: string): Buffer {
  // One output buffer with a byte to spare, where it is small, instead of pieces of 16 KiB: a quarter faster.
  const chunkSize = maxBytes <= CHUNK_BYTES_MAX ? Math.max(64, maxBytes + 1) : 16 * KIB;
  try {
    return zstdDecompressSync(stored, { maxOutputLength: Math.max(1, maxBytes), chunkSize });
  } catch (cause) {
    throw new GridError('corrupt', `${what} does not decompress`, { cause });
  }
}

/** Plain bytes of a stored chunk, checked against length and digest; throws corrupt. About 0.5 ms per 256 KiB. */
export function decodeChunk(stored: StoredChunk, ref: ChunkRef): Buffer {
  const what = `chunk ${ref.digest.slice(0, 12)}`;
  if (stored.bytes.length > ref.plainBytes + STORED_OVERHEAD_BYTES_MAX) {
    throw new GridError('corrupt', `${what} is ${stored.bytes.length} bytes stored, over its bound`);
  }
  const plain =
    stored.encoding === 'zstd' ? decompress(stored.bytes, ref.plainBytes, what) : bufferOf(stored.bytes);
  if (plain.length !== ref.plainBytes || sha256(plain) !== ref.digest) {
    throw new GridError('corrupt', `${what} does not match its digest`);
  }
  return plain;
}

/**
 * Plain bytes of neighbouring zstd chunks, one after the other: frames that follow each other are one stream to zstd (RFC
 * 8878, 3), and to begin a stream costs as much as to decompress 16 KiB. Undefined when anything is wrong with any of
 * them: `decodeChunk` says with which, and what.
 */
export function decodeTogether(stored: Uint8Array, refs: readonly ChunkRef[]): Buffer | undefined {
  const plainBytes = refs.reduce((sum, ref) => sum + ref.plainBytes, 0);
  let plain: Buffer;
  try {
    plain = zstdDecompressSync(stored, {
      maxOutputLength: plainBytes,
      chunkSize: Math.max(64, plainBytes + 1),
    });
  } catch {
    return undefined;
  }
  if (plain.length !== plainBytes) return undefined;
  let at = 0;
  const areRight = refs.every((ref) => sha256(plain.subarray(at, (at += ref.plainBytes))) === ref.digest);
  return areRight ? plain : undefined;
}
