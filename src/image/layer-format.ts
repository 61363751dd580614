/**
 * A layer on disk: a folder with three files.
 *
 * Invariants:
 *  - `data` is sparse, exactly sizeBytes long and has no header: block n lies at n × 4096, the last one may be
 *    short. What lies below a block that its map does not call DATA means nothing and is never shown.
 *  - `map.durable` is the map as of the last flush. A block that it calls DATA has content in `data` that
 *    survives power loss (data is synced before the map that names it). Its header never changes.
 *  - `map` is the working map, written through before a write is acknowledged and never synced. It is true as long
 *    as the host kernel that it was written to is up, which its boot id tells: with another boot id the whole
 *    file is made again from `map.durable`, and only then gets the present boot id. A crash on the way leaves
 *    the old boot id and the next open begins again.
 *  - A folder that is there is whole: it is made under another name, synced, renamed.
 *  - A layer over a frozen layer names as its base the digest of chain.ts, so it never opens over the image alone.
 *    A frozen layer is read by `data` and `map.durable` only, as its last flush left them.
 *
 * Both maps (little-endian):
 *     0    8  magic "GVFSLAY1", the last character is the version
 *     8    4  bytes per block: 4096
 *    12    4  0
 *    16    8  sizeBytes of the disk
 *    24    8  created, ms since 1970
 *    32   32  manifest digest (SHA-256) of the base image
 *    64   16  random id, the same in both maps: files of two layers are not mixed up
 *    80    4  CRC-32 of bytes 0 to 79
 *    84   36  `map`: boot id in ASCII (/proc/sys/kernel/random/boot_id); `map.durable`: zeros
 *   120    …  0 up to 4096
 *  4096    …  one byte per block: 0 absent, 1 data, 2 zero
 *
 * Deliberately not done: checksums of blocks (a layer is as good as the disk below it, like any raw disk), and
 * telling a file system that vanished and came back within one boot (a pulled disk) from one that stayed.
 */
import { readFileSync } from 'node:fs';
import { crc32 } from 'node:zlib';
import { readU64 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { IMAGE_BYTES_MAX, LAYER_BLOCK_BYTES } from '../core/limits.ts';

export const DATA_FILE = 'data';
export const MAP_FILE = 'map';
export const DURABLE_MAP_FILE = 'map.durable';
export const LAYER_FILES = [DATA_FILE, MAP_FILE, DURABLE_MAP_FILE];

/** One page, so that the page of a map that holds block n starts at a multiple of the kernel's page too. */
export const HEADER_BYTES = 4096;
/** Blocks whose map bytes lie in one page: the unit of `dirtyPages`. */
export const PAGE_BLOCKS = 4096;
export const BOOT_ID_AT = 84;
export const BOOT_ID_BYTES = 36;

const MAGIC = Buffer.from('GVFSLAY1');
const ID_AT = 64;
const ID_BYTES = 16;
const CRC_AT = 80;

export interface LayerHeader {
  readonly baseDigest: Digest;
  readonly sizeBytes: number;
  readonly createdMs: number;
  /** 32 hexadecimal digits. */
  readonly id: string;
  /** Empty in the durable map. */
  readonly bootId: string;
}

export function blockCountOf(sizeBytes: number): number {
  return Math.ceil(sizeBytes / LAYER_BLOCK_BYTES);
}

/** Length of both map files. */
export function mapFileBytes(sizeBytes: number): number {
  return HEADER_BYTES + blockCountOf(sizeBytes);
}

export function encodeHeader(header: LayerHeader): Buffer {
  const bytes = Buffer.alloc(HEADER_BYTES);
  MAGIC.copy(bytes);
  bytes.writeUInt32LE(LAYER_BLOCK_BYTES, 8);
  bytes.writeBigUInt64LE(BigInt(header.sizeBytes), 16);
  bytes.writeBigUInt64LE(BigInt(header.createdMs), 24);
  bytes.write(header.baseDigest, 32, 32, 'hex');
  bytes.write(header.id, ID_AT, ID_BYTES, 'hex');
  bytes.writeUInt32LE(crc32(bytes.subarray(0, CRC_AT)), CRC_AT);
  bytes.write(header.bootId, BOOT_ID_AT, BOOT_ID_BYTES, 'latin1');
  return bytes;
}

/** `what` is the file's path, for messages. Throws bad-format, newer-format. */
export function parseHeader(bytes: Buffer, what: string): LayerHeader {
  const bad = (why: string) => new GridError('bad-format', `${what} is not a map of a layer: ${why}`);
  if (bytes.length < HEADER_BYTES) throw bad(`it ends after ${bytes.length} bytes`);
  if (!bytes.subarray(0, 7).equals(MAGIC.subarray(0, 7))) throw bad('wrong magic');
  if (bytes[7] !== MAGIC[7]) {
    throw new GridError(
      'newer-format',
      `${what} is of version '${bytes.toString('latin1', 7, 8)}', this is 1`,
    );
  }
  if (bytes.readUInt32LE(CRC_AT) !== crc32(bytes.subarray(0, CRC_AT))) throw bad('its header is damaged');
  if (bytes.readUInt32LE(8) !== LAYER_BLOCK_BYTES) throw bad(`blocks of ${bytes.readUInt32LE(8)} bytes`);
  return {
    sizeBytes: readU64(bytes, 16, `size in ${what}`, IMAGE_BYTES_MAX),
    createdMs: readU64(bytes, 24, `date in ${what}`, 8.64e15),
    baseDigest: bytes.toString('hex', 32, 64),
    id: bytes.toString('hex', ID_AT, ID_AT + ID_BYTES),
    bootId: bytes.toString('latin1', BOOT_ID_AT, BOOT_ID_AT + BOOT_ID_BYTES).replaceAll('\0', ''),
  };
}

/** Changes with every start of the host's kernel, and only then. */
export function currentBootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim();
}
