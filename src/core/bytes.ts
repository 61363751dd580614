/** Small helpers over bytes: all-zero test, digests, the checks at the wire. */
import { createHash, hash } from 'node:crypto';
import { GridError } from './errors.ts';

/** SHA-256 as 64 lower-case hexadecimal digits. */
export type Digest = string;

const DIGEST_PATTERN = /^[0-9a-f]{64}$/;

export function isDigest(text: unknown): text is Digest {
  return typeof text === 'string' && DIGEST_PATTERN.test(text);
}

/** SHA-256 (FIPS 180-4) of `bytes` in one call; for streams use `createHash`. */
export function sha256(bytes: Uint8Array): Digest {
  return hash('sha256', bytes, 'hex');
}

export function sha256Stream(): { update(bytes: Uint8Array): void; digest(): Digest } {
  const state = createHash('sha256');
  return { update: (bytes) => void state.update(bytes), digest: () => state.digest('hex') };
}

/** The same bytes as a Buffer, without a copy. */
export function bufferOf(bytes: Uint8Array): Buffer {
  return Buffer.isBuffer(bytes) ? bytes : Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

const ZEROS = Buffer.alloc(64 * 1024);

/** Whether every byte is zero. memcmp against a zero page: about 10 GB/s. */
export function isAllZero(bytes: Uint8Array): boolean {
  const buffer = bufferOf(bytes);
  for (let at = 0; at < buffer.length; at += ZEROS.length) {
    const end = Math.min(at + ZEROS.length, buffer.length);
    if (buffer.compare(ZEROS, 0, end - at, at, end) !== 0) return false;
  }
  return true;
}

/** Refuses an offset or length that is not a whole number within [0, max]. `what` names it in the message. */
export function checkedNumber(value: unknown, what: string, max: number = Number.MAX_SAFE_INTEGER): number {
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 0 || value > max) {
    throw new GridError(
      'bad-request',
      `${what} must be a whole number from 0 to ${max}, not ${String(value)}`,
    );
  }
  return value;
}

/** A u64 on the wire as a number; refused above `max` (always below 2^53). */
export function readU64(buffer: Buffer, offset: number, what: string, max: number): number {
  const value = buffer.readBigUInt64LE(offset);
  if (value > BigInt(max)) throw new GridError('bad-format', `${what} is ${value}, more than ${max}`);
  return Number(value);
}

/** A range of a file or an image; `endBytes` is not in it. */
export interface ByteRange {
  readonly startBytes: number;
  readonly endBytes: number;
}
