/**
 * One image in the cache: `images/<manifest digest>/` with `data` and `map`.
 *
 * Invariants
 *  - `data` is exactly sizeBytes long; plain bytes lie at their own offsets; chunks of zeros are holes.
 *  - A record of `map` is written only after an fdatasync of `data` that covers its chunk (the one place is
 *    commits.ts), so after power loss too a chunk that the map calls present is on the disk.
 *  - Nothing in either file is trusted: a record gives a chunk the right to be hashed on its first read after a
 *    start, and only a match makes it readable. A map that is torn, foreign or of another size is thrown away
 *    together with its data.
 *  - Both appear together, by the rename of their folder. Records are 8 bytes, aligned: a disk writes one whole.
 *
 * data: the image, sparse.
 * map (little-endian), 4096 + 8 × count bytes, sparse:
 *      0   8  magic "GVFSMAP1"
 *      8   4  chunkBytes
 *     12   4  count: chunks in the image, zero ones included
 *     16   8  sizeBytes of the image
 *     24  32  SHA-256 of the manifest
 *     56   8  xxhash64 of bytes 0 to 55 (a hash of 0 is stored as 1)
 *     64   …  zeros up to 4096
 *   4096   8 × count   xxhash64 of the plain chunk; 0 = absent or of zeros (a hash of 0 is stored as 1)
 */
import {
  closeSync,
  constants,
  fdatasync,
  fstatSync,
  fsync,
  ftruncateSync,
  lstatSync,
  mkdirSync,
  openSync,
  read,
  readSync,
  renameSync,
  rmSync,
  write,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import type { Digest } from '../src/core/bytes.ts';
import { bufferOf } from '../src/core/bytes.ts';
import { chunkHash } from '../src/core/chunk-hash.ts';
import { errnoOf, GridError } from '../src/core/errors.ts';
import { KIB } from '../src/core/limits.ts';
import { nextData, punchHole } from '../src/core/linux.ts';
import { unfinishedPath } from './folder.ts';

const MAGIC = Buffer.from('GVFSMAP1');
const HEADER_BYTES = 4096;
const HASHED_HEADER_BYTES = 56;
const RECORD_BYTES = 8;
/** Records are read in pieces of this size when an image is opened. */
const PIECE_BYTES = 256 * KIB;

const readAsync = promisify(read);
const writeAsync = promisify(write);
export const syncData = promisify(fdatasync);
const syncAll = promisify(fsync);

/** What the two files are for; all of it stands in the map's header. */
export interface ImageShape {
  readonly manifestDigest: Digest;
  readonly sizeBytes: number;
  readonly chunkBytes: number;
  readonly count: number;
}

export interface ImageFiles {
  readonly dataFd: number;
  readonly mapFd: number;
}

/** A map's length; what the image's quota is charged for it. */
export function mapBytesOf(count: number): number {
  return HEADER_BYTES + count * RECORD_BYTES;
}

function headerOf(shape: ImageShape): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  MAGIC.copy(header);
  header.writeUInt32LE(shape.chunkBytes, 8);
  header.writeUInt32LE(shape.count, 12);
  header.writeBigUInt64LE(BigInt(shape.sizeBytes), 16);
  header.write(shape.manifestDigest, 24, 32, 'hex');
  header.writeBigUInt64LE(chunkHash(header.subarray(0, HASHED_HEADER_BYTES)), HASHED_HEADER_BYTES);
  return header;
}

/**
 * Opens the files of an image, or says that there are none (undefined). Throws bad-format for anything that is
 * not exactly what it should be (the caller drops it), newer-format for a map of a later version.
 */
export function openFiles(folder: string, shape: ImageShape): ImageFiles | undefined {
  const bad = (why: string, cause?: unknown) =>
    new GridError('bad-format', `cached image ${folder} ${why}`, { cause });
  try {
    if (!lstatSync(folder).isDirectory()) throw bad('is not a folder');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined;
    throw error;
  }
  const opened: number[] = [];
  try {
    const flags = constants.O_RDWR | constants.O_NOFOLLOW | constants.O_NONBLOCK;
    const dataFd = openSync(path.join(folder, 'data'), flags);
    opened.push(dataFd);
    const mapFd = openSync(path.join(folder, 'map'), flags);
    opened.push(mapFd);
    const data = fstatSync(dataFd);
    const map = fstatSync(mapFd);
    if (!data.isFile() || !map.isFile()) throw bad('holds something that is not a file');
    const header = Buffer.alloc(HEADER_BYTES);
    readHere(mapFd, header, 0);
    if (header.subarray(0, 7).equals(MAGIC.subarray(0, 7)) && header[7]! > MAGIC[7]!) {
      throw new GridError(
        'newer-format',
        `cached image ${folder} was written by a newer gridvfs; upgrade this one`,
      );
    }
    if (!header.equals(headerOf(shape))) throw bad('has a map that is damaged or belongs to another image');
    if (map.size !== mapBytesOf(shape.count)) throw bad(`has a map of ${map.size} bytes`);
    if (data.size !== shape.sizeBytes) throw bad(`has ${data.size} bytes of data, not ${shape.sizeBytes}`);
    return { dataFd, mapFd };
  } catch (error) {
    for (const fd of opened) closeSync(fd);
    if (['ENOENT', 'ELOOP', 'ENXIO', 'EISDIR'].includes(errnoOf(error) ?? '')) {
      throw bad('lacks one of its two files', error);
    }
    throw error;
  }
}

/** Makes the files of an image that is not cached yet. Throws system errors; nothing half-made stays. */
export function createFiles(folder: string, shape: ImageShape): ImageFiles {
  const temporary = unfinishedPath(folder);
  const opened: number[] = [];
  try {
    mkdirSync(temporary, { mode: 0o700 });
    for (const name of ['data', 'map']) opened.push(openSync(path.join(temporary, name), 'wx+', 0o600));
    const [dataFd, mapFd] = opened as [number, number];
    ftruncateSync(dataFd, shape.sizeBytes);
    writeSync(mapFd, headerOf(shape), 0, HEADER_BYTES, 0);
    ftruncateSync(mapFd, mapBytesOf(shape.count));
    renameSync(temporary, folder);
    return { dataFd, mapFd };
  } catch (error) {
    for (const fd of opened) closeSync(fd);
    rmSync(temporary, { recursive: true, force: true });
    throw error;
  }
}

export function closeFiles(files: ImageFiles): void {
  closeSync(files.dataFd);
  closeSync(files.mapFd);
}

/** Makes the names and headers of new files durable; once, before their first records. */
export async function syncNewFiles(folder: string, files: ImageFiles): Promise<void> {
  await syncAll(files.mapFd);
  for (const name of [folder, path.dirname(folder)]) {
    const fd = openSync(name, constants.O_RDONLY | constants.O_DIRECTORY);
    await syncAll(fd).finally(() => closeSync(fd));
  }
}

/** Calls `found` with every chunk that has a record and the record, in order. Reads only what is not a hole of the map. */
export function scanRecords(
  mapFd: number,
  count: number,
  found: (index: number, record: bigint) => void,
): void {
  const end = mapBytesOf(count);
  const piece = Buffer.alloc(Math.min(PIECE_BYTES, Math.max(RECORD_BYTES, end - HEADER_BYTES)));
  const words = new BigUint64Array(piece.buffer, piece.byteOffset, piece.length / RECORD_BYTES);
  let at = HEADER_BYTES;
  while (at < end) {
    const data = nextData(mapFd, at);
    if (!data || data.start >= end) return;
    // Extents are whole blocks, so they start at a record; the header's block may be part of the first one.
    const from = Math.max(HEADER_BYTES, data.start - (data.start % RECORD_BYTES));
    const until = Math.min(end, data.end);
    for (let pieceAt = from; pieceAt < until; pieceAt += piece.length) {
      const bytes = Math.min(piece.length, until - pieceAt);
      readHere(mapFd, piece.subarray(0, bytes), pieceAt);
      const firstIndex = (pieceAt - HEADER_BYTES) / RECORD_BYTES;
      const records = Math.floor(bytes / RECORD_BYTES);
      for (let k = 0; k < records; k++) if (words[k] !== 0n) found(firstIndex + k, words[k]!);
    }
    at = Math.max(until, at + 1);
  }
}

/** One chunk's record; 0n when it has none. Waits for the disk only if the kernel has dropped the page since the
 * image was opened. */
export function readRecord(mapFd: number, index: number): bigint {
  const bytes = Buffer.allocUnsafe(RECORD_BYTES);
  readHere(mapFd, bytes, HEADER_BYTES + index * RECORD_BYTES);
  return bytes.readBigUInt64LE(0);
}

/** Writes records, neighbours together. `entries` is sorted in place. */
export async function writeRecords(
  mapFd: number,
  entries: { index: number; record: bigint }[],
): Promise<void> {
  entries.sort((a, b) => a.index - b.index);
  for (let first = 0; first < entries.length;) {
    const start = entries[first]!.index;
    let next = first + 1;
    while (next < entries.length && entries[next]!.index === start + next - first) next++;
    const bytes = Buffer.alloc((next - first) * RECORD_BYTES);
    for (let k = first; k < next; k++) {
      bytes.writeBigUInt64LE(entries[k]!.record, (k - first) * RECORD_BYTES);
    }
    await writeFull(mapFd, bytes, HEADER_BYTES + start * RECORD_BYTES);
    first = next;
  }
}

/** Gives the blocks of chunks back, neighbours together, with a breath in between: the calls wait for the disk's
 * journal. */
export async function punchRuns(
  dataFd: number,
  indexes: readonly number[],
  { chunkBytes, sizeBytes }: ImageShape,
): Promise<void> {
  const sorted = indexes.toSorted((a, b) => a - b);
  for (let first = 0; first < sorted.length;) {
    let next = first + 1;
    while (next < sorted.length && sorted[next] === sorted[first]! + next - first) next++;
    const start = sorted[first]! * chunkBytes;
    // Whole blocks, also of a last chunk that ends within one: the file's size stays.
    const end = Math.min((sorted[first]! + next - first) * chunkBytes, Math.ceil(sizeBytes / 4096) * 4096);
    punchHole(dataFd, start, end - start);
    first = next;
    await new Promise(setImmediate);
  }
}

/** The same, waiting for the disk: only for a map's header and records while an image is opened. */
function readHere(fd: number, target: Buffer, offsetBytes: number): void {
  let done = 0;
  while (done < target.length) {
    const bytesRead = readSync(fd, target, done, target.length - done, offsetBytes + done);
    if (bytesRead === 0) {
      target.fill(0, done);
      return;
    }
    done += bytesRead;
  }
}

/** pread(2) in the thread pool until `target` is full or the file ends (the rest becomes zeros). */
export async function readFull(fd: number, target: Uint8Array, offsetBytes: number): Promise<void> {
  let done = 0;
  while (done < target.length) {
    const { bytesRead } = await readAsync(
      fd,
      bufferOf(target),
      done,
      target.length - done,
      offsetBytes + done,
    );
    if (bytesRead === 0) {
      target.fill(0, done);
      return;
    }
    done += bytesRead;
  }
}

/** pwrite(2) in the thread pool until all of `source` is written. */
export async function writeFull(fd: number, source: Uint8Array, offsetBytes: number): Promise<void> {
  let done = 0;
  while (done < source.length) {
    const { bytesWritten } = await writeAsync(fd, source, done, source.length - done, offsetBytes + done);
    done += bytesWritten;
  }
}
