/**
 * What the lanes do (lanes.ts): plain functions over whole units of work with synchronous system calls, run in a
 * worker thread or, for small stores, in the caller's. Inputs and outputs are plain data that can be posted.
 */
import { readFileSync, readSync, statSync, utimesSync } from 'node:fs';
import { isAllZero, sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { compress, decodeChunk, decompress } from '../core/chunk.ts';
import type { ChunkRef } from '../core/chunk.ts';
import { pwriteFull } from '../core/direct-io.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import {
  CHUNK_BYTES_MAX,
  MANIFEST_BYTES_MAX,
  STORED_OVERHEAD_BYTES_MAX,
  TABLE_BYTES_MAX,
} from '../core/limits.ts';
import { applyPatch, packRefOf } from '../core/patch.ts';
import type { Patch } from '../core/patch.ts';
import { StoreLayout, temporaryPath, writeNewFile } from './layout.ts';
import type { ObjectKind } from './layout.ts';

/** Cut, hash, compress and write a run of chunks. */
export interface PackJob {
  readonly type: 'pack';
  /** A descriptor of this process; threads share them. */
  readonly fd: number;
  /** The bytes to pack, instead of the descriptor's … */
  readonly plain?: Uint8Array;
  /** … and where they are incomplete, what lies below them. */
  readonly below?: PackBelow;
  /** The image, for messages. */
  readonly path: string;
  readonly storeFolder: string;
  /** The writer's folder: new chunks go there under their temporary names. */
  readonly writerFolder: string;
  readonly chunkBytes: number;
  readonly firstChunk: number;
  /** Plain bytes to pack, from firstChunk × chunkBytes. */
  readonly lengthBytes: number;
  /** Chunks that are there already get the time of now, so that no garbage collection takes them for old. */
  readonly renew?: boolean;
}

/** Chunks of this store from which the blocks that `plain` does not have are taken. */
export interface PackBelow {
  readonly blockBytes: number;
  /** One byte per block of `plain`: 1 where `plain` has it. */
  readonly has: Uint8Array;
  /** One per chunk; undefined for zeros. The lengths are plain bytes. */
  readonly chunks: readonly (ChunkRef | undefined)[];
  /** Their stored bytes, of those that are needed. */
  readonly stored: readonly (Uint8Array | undefined)[];
}

export interface PackedChunk {
  readonly index: number;
  readonly digest: Digest;
  readonly storedBytes: number;
  /** Written by this job; otherwise the store, or this writer, had it. */
  readonly isNew: boolean;
}

/** Decode and hash objects of one kind. */
export interface VerifyJob {
  readonly type: 'verify';
  readonly storeFolder: string;
  readonly kind: ObjectKind;
  readonly digests: readonly Digest[];
}

export interface Verified {
  readonly storedBytes: number;
  readonly damaged: readonly { readonly digest: Digest; readonly reason: string }[];
  /** Not there any more. */
  readonly gone: readonly Digest[];
}

/** Check chunks and write their plain bytes where they belong. */
export interface UnpackJob {
  readonly type: 'unpack';
  readonly storeFolder: string;
  /** Of this process, to write to, and its name for messages. */
  readonly fd: number;
  readonly path: string;
  readonly chunks: readonly {
    readonly digest: Digest;
    readonly offsetBytes: number;
    readonly plainBytes: number;
    /** Of the chunk that has this digest, to be applied before it is written. */
    readonly patch?: Patch;
  }[];
}

export type Job = PackJob | VerifyJob | UnpackJob;
export type ResultOf<J extends Job> = J extends PackJob
  ? PackedChunk[]
  : J extends VerifyJob
    ? Verified
    : undefined;

/** Throws GridErrors only. */
export function runJob(job: Job): ResultOf<Job> {
  try {
    if (job.type === 'pack') return pack(job);
    if (job.type === 'verify') return verify(job);
    return unpack(job);
  } catch (error) {
    throw asGridError(error, `cannot write to ${job.type === 'unpack' ? job.path : job.storeFolder}`);
  }
}

/** One per thread, as large as the largest unit so far. */
let buffer = Buffer.alloc(0);

function pack(job: PackJob): PackedChunk[] {
  const plain = job.plain ?? readPlain(job);
  if (job.below) completeFrom(job.below, plain, job);
  const layout = new StoreLayout(job.storeFolder);
  const packed: PackedChunk[] = [];
  for (let at = 0; at < plain.length; at += job.chunkBytes) {
    const chunk = plain.subarray(at, Math.min(at + job.chunkBytes, plain.length));
    if (isAllZero(chunk)) continue;
    const index = job.firstChunk + at / job.chunkBytes;
    const digest = sha256(chunk);
    const object = layout.object('chunks', digest);
    const there = statSync(object, { throwIfNoEntry: false });
    // A length that no chunk of its size has is damage, which writing it again heals.
    if (
      there &&
      there.size > 0 &&
      there.size <= chunk.length + STORED_OVERHEAD_BYTES_MAX &&
      (!job.renew || renewed(object))
    ) {
      packed.push({ index, digest, storedBytes: there.size, isNew: false });
      continue;
    }
    const stored = compress(chunk);
    const isNew = writeUnlessThere(temporaryPath(job.writerFolder, 'chunks', digest), stored);
    packed.push({ index, digest, storedBytes: stored.length, isNew });
  }
  return packed;
}

/** Puts the blocks of the chunks below where `plain` has none of its own; there it is zeros before. */
function completeFrom(below: PackBelow, plain: Uint8Array, { chunkBytes }: PackJob): void {
  const { blockBytes, has } = below;
  for (const [i, ref] of below.chunks.entries()) {
    const bytes = below.stored[i];
    if (!ref || !bytes) continue;
    const start = i * chunkBytes;
    const first = start / blockBytes;
    const count = Math.ceil(Math.min(chunkBytes, plain.length - start) / blockBytes);
    const chunk = decodeChunk({ encoding: 'zstd', bytes }, ref);
    for (let block = 0; block < count; block++) {
      if (has[first + block] === 1) continue;
      // A chunk that ends the parent may be shorter; what lies beyond it is zeros.
      plain.set(chunk.subarray(block * blockBytes, (block + 1) * blockBytes), start + block * blockBytes);
    }
  }
}

/** False when the object has gone meanwhile. One that belongs to another user stays as old as it is. */
function renewed(object: string): boolean {
  const now = new Date();
  try {
    utimesSync(object, now, now);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false;
    if (['EPERM', 'EACCES'].includes(errnoOf(error) ?? '')) return true;
    throw error;
  }
}

function readPlain(job: PackJob): Uint8Array {
  if (buffer.length < job.lengthBytes) buffer = Buffer.allocUnsafeSlow(job.lengthBytes);
  const plain = buffer.subarray(0, job.lengthBytes);
  readWhole(job, plain);
  return plain;
}

/** A source that shrinks meanwhile is refused: what it lost must not become zeros. */
function readWhole({ fd, path, firstChunk, chunkBytes }: PackJob, target: Buffer): void {
  const offsetBytes = firstChunk * chunkBytes;
  for (let done = 0; done < target.length;) {
    let count: number;
    try {
      count = readSync(fd, target, done, target.length - done, offsetBytes + done);
    } catch (error) {
      throw asGridError(error, `cannot read ${path} at ${offsetBytes + done}`);
    }
    if (count === 0) throw new GridError('bad-request', `${path} became shorter while it was read`);
    done += count;
  }
}

/** The same chunk twice in one image: the lane that comes second leaves the first one's file alone. */
function writeUnlessThere(file: string, bytes: Uint8Array): boolean {
  try {
    writeNewFile(file, bytes);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'EEXIST') return false;
    throw error;
  }
}

/** Stored and plain bytes that an object of a kind has at most. */
const BOUNDS: Record<ObjectKind, { stored: number; plain: number }> = {
  manifests: { stored: MANIFEST_BYTES_MAX, plain: MANIFEST_BYTES_MAX },
  tables: { stored: TABLE_BYTES_MAX, plain: TABLE_BYTES_MAX },
  chunks: { stored: CHUNK_BYTES_MAX + STORED_OVERHEAD_BYTES_MAX, plain: CHUNK_BYTES_MAX },
};

function verify({ storeFolder, kind, digests }: VerifyJob): Verified {
  const layout = new StoreLayout(storeFolder);
  let storedBytes = 0;
  const damaged: { digest: Digest; reason: string }[] = [];
  const gone: Digest[] = [];
  for (const digest of digests) {
    try {
      storedBytes += verifyObject(layout.object(kind, digest), kind, digest);
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') gone.push(digest);
      else damaged.push({ digest, reason: error instanceof Error ? error.message : String(error) });
    }
  }
  return { storedBytes, damaged, gone };
}

/** The object's stored length; throws with the reason why it is not what its name says. */
function verifyObject(file: string, kind: ObjectKind, digest: Digest): number {
  const { size } = statSync(file);
  if (size === 0 || size > BOUNDS[kind].stored) {
    throw new GridError('corrupt', `it has ${size} bytes, which no object of its kind has`);
  }
  const stored = readFileSync(file);
  const plain = kind === 'manifests' ? stored : decompress(stored, BOUNDS[kind].plain, 'it');
  if (sha256(plain) !== digest) throw new GridError('corrupt', 'it does not match its digest');
  if (kind !== 'manifests' && !isOneFrame(stored)) {
    throw new GridError('corrupt', 'it goes on after its end');
  }
  return stored.length;
}

/** What Node's zlib put behind a frame that just filled its output buffer, when it was given one of that size. */
const EMPTY_FRAME = Buffer.from('28b52ffd2000010000', 'hex');

/** Whether the blocks of a zstd frame (RFC 8878, 3.1.1) that is known to decode end where the bytes do. Decoders
 * ignore what comes after, so a reader does no wrong with it; but nobody of ours wrote it. */
export function isOneFrame(stored: Buffer): boolean {
  const descriptor = stored[4]!;
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const contentSizeBytes = [isSingleSegment ? 1 : 0, 2, 4, 8][descriptor >> 6]!;
  let at = 5 + (isSingleSegment ? 0 : 1) + [0, 1, 2, 4][descriptor & 3]! + contentSizeBytes;
  for (let isLast = false; !isLast;) {
    if (at + 3 > stored.length) return false;
    const header = stored.readUIntLE(at, 3);
    isLast = (header & 1) === 1;
    const isRepeated = ((header >> 1) & 3) === 1;
    at += 3 + (isRepeated ? 1 : header >> 3);
  }
  const end = at + ((descriptor & 4) !== 0 ? 4 : 0);
  return end === stored.length || stored.subarray(end).equals(EMPTY_FRAME);
}

function unpack({ storeFolder, fd, chunks }: UnpackJob): undefined {
  const layout = new StoreLayout(storeFolder);
  /** Neighbours have their blocks in the same pack. */
  let last: { digest: Digest; plain: Buffer } | undefined;
  for (const ref of chunks) {
    const plain = readChunk(layout, ref);
    if (ref.patch) {
      const { pack } = ref.patch;
      if (pack && last?.digest !== pack.digest)
        last = { digest: pack.digest, plain: readChunk(layout, packRefOf(pack)) };
      applyPatch(plain, ref.patch, pack && last!.plain);
    }
    pwriteFull(fd, plain, ref.offsetBytes);
  }
}

/** Plain bytes, checked. */
function readChunk(layout: StoreLayout, ref: ChunkRef): Buffer {
  let bytes: Buffer;
  try {
    const file = layout.object('chunks', ref.digest);
    const { size } = statSync(file);
    if (size > ref.plainBytes + STORED_OVERHEAD_BYTES_MAX)
      throw new GridError('corrupt', `chunk ${ref.digest} has ${size} bytes, which no chunk of its size has`);
    bytes = readFileSync(file);
  } catch (error) {
    throw asGridError(error, `cannot read chunk ${ref.digest} of the store ${layout.folder}`);
  }
  return decodeChunk({ encoding: 'zstd', bytes }, ref);
}
