/**
 * The /dev/fuse protocol 7.31 and later: numbers and byte layouts, nothing else (linux/fuse.h). Everything is in
 * host order, which is little-endian on the machines we run on (x86-64, arm64).
 *
 * A request is a 40-byte header and a body; a reply is a 16-byte header and a body, written in one write(2) to
 * the descriptor that the request was read from.
 */
import { isUtf8 } from 'node:buffer';
import { constants } from 'node:os';
import type { ErrorCode } from '../../core/errors.ts';
import { errnoOf, GridError } from '../../core/errors.ts';
import { FUSE_REQUEST_BYTES_MAX } from '../../core/limits.ts';
import type { TreeEntry } from '../../core/image.ts';

/* Request header: u32 len, u32 opcode, u64 unique, u64 nodeid, u32 uid, u32 gid, u32 pid, u32 padding. */
export const IN_HEADER_BYTES = 40;
/** In the request's padding, which is 0 as long as INIT agreed on no extensions of requests. */
export const STAMP_AT = 36;
/* Reply header: u32 len, i32 -errno, u64 unique. */
export const OUT_HEADER_BYTES = 16;
/* WRITE's body before its data: u64 fh, u64 offset, u32 size, u32 flags, u64 owner, u32 open flags, u32 0. */
export const WRITE_BODY_BYTES = 40;
/** What one read(2) of the device may return: a full WRITE, and the header room that the kernel demands. */
export const REQUEST_BUFFER_BYTES = FUSE_REQUEST_BYTES_MAX + 4096;

export const ROOT_NODE = 1;

/** Set in `unique` of a request that is sent again after NOTIFY_RESEND; its reply bears it too. */
export const UNIQUE_RESEND = 1n << 63n;

export const LOOKUP = 1;
export const FORGET = 2;
export const GETATTR = 3;
export const SETATTR = 4;
export const SYMLINK = 6;
export const MKNOD = 8;
export const MKDIR = 9;
export const UNLINK = 10;
export const RMDIR = 11;
export const RENAME = 12;
export const LINK = 13;
export const OPEN = 14;
export const READ = 15;
export const WRITE = 16;
export const STATFS = 17;
export const RELEASE = 18;
export const FSYNC = 20;
export const SETXATTR = 21;
export const REMOVEXATTR = 24;
export const INIT = 26;
export const OPENDIR = 27;
export const READDIR = 28;
export const RELEASEDIR = 29;
export const CREATE = 35;
export const INTERRUPT = 36;
export const DESTROY = 38;
export const BATCH_FORGET = 42;
export const FALLOCATE = 43;
export const READDIRPLUS = 44;
export const RENAME2 = 45;
export const TMPFILE = 51;

export const FOPEN_KEEP_CACHE = 1 << 1;
export const FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6;
/** Reads go to the backing file of the OPEN reply's id; goes with no flag about pages. */
export const FOPEN_PASSTHROUGH = 1 << 7;

export const FATTR_SIZE = 1 << 3;
const FATTR_FH = 1 << 6;
const FATTR_LOCKOWNER = 1 << 9;
/** SETATTR bits that say something about the call and change nothing. */
export const FATTR_NEUTRAL = FATTR_FH | FATTR_LOCKOWNER;

export const FALLOC_PUNCH_HOLE_KEEP_SIZE = 3;
export const FALLOC_ZERO_RANGE = 16;
export const FALLOC_ZERO_RANGE_KEEP_SIZE = 17;

const ASYNC_READ = 2 ** 0;
const ATOMIC_O_TRUNC = 2 ** 3;
const BIG_WRITES = 2 ** 5;
const DO_READDIRPLUS = 2 ** 13;
const READDIRPLUS_AUTO = 2 ** 14;
const PARALLEL_DIROPS = 2 ** 18;
const MAX_PAGES = 2 ** 22;
const INIT_EXT = 2 ** 30;

/**
 * What is asked for where the kernel offers it. Not WRITEBACK_CACHE: a write that was acknowledged must be in the
 * layer's files, where it outlives this daemon and its mount; the kernel would acknowledge it from its own page
 * cache. Not AUTO_INVAL_DATA: content never changes behind the kernel's back. Not ASYNC_DIO, with which a large O_DIRECT
 * write can go to several workers at once (in four pieces 1.6 times as fast): of a write that libaio or io_uring began,
 * the kernel then drops the pages before it is sent and not again when it is done (xfstests generic/451), so a buffered
 * reader in between leaves old bytes in pages that we tell it to keep; and it waits for O_DIRECT reads in a way that no
 * signal ends, so a QEMU whose tunnel is dead could not be killed. Without it only libaio's io_submit waits.
 */
const WANTED =
  ASYNC_READ |
  ATOMIC_O_TRUNC |
  BIG_WRITES |
  DO_READDIRPLUS |
  READDIRPLUS_AUTO |
  PARALLEL_DIROPS |
  MAX_PAGES |
  INIT_EXT;

/** In place of the error, in a "reply" with unique 0. */
const NOTIFY_RESEND = 7;

/** In flags2: bit 37 of all flags. */
const PASSTHROUGH = 2 ** 5;
/** Bit 39: the kernel sends requests again that a daemon took and did not answer (Linux 6.9). */
const HAS_RESEND = 2 ** 7;
/** How deep file systems may be stacked with passthrough: our files lie on an ordinary one. */
const STACK_DEPTH_MAX = 1;

/** The protocol version these layouts are from; the kernel adapts to it. */
const MAJOR = 7;
const MINOR = 40;
const MINOR_MIN = 31;

/** The reply to INIT, and whether it agreed on passthrough and resending; throws unsupported for a kernel older than protocol 7.31
 * (Linux 5.4). */
export function encodeInitReply(
  request: Buffer,
  readaheadBytes: number,
): { readonly reply: Buffer; readonly passthrough: boolean; readonly resend: boolean } {
  const body = request.subarray(IN_HEADER_BYTES);
  if (request.length < IN_HEADER_BYTES + 16 || request.readUInt32LE(4) !== INIT) {
    throw new GridError('unsupported', 'the kernel did not start the FUSE session with INIT');
  }
  const [major, minor] = [body.readUInt32LE(0), body.readUInt32LE(4)];
  if (major !== MAJOR || minor < MINOR_MIN) {
    throw new GridError(
      'unsupported',
      `this kernel speaks FUSE ${major}.${minor}; gridvfs needs ${MAJOR}.${MINOR_MIN} (Linux 5.4) or later`,
    );
  }
  // u32 major, minor, max_readahead, flags, then flags2 where the kernel is new enough to have any.
  const offered = body.readUInt32LE(12);
  const offered2 = (offered & INIT_EXT) !== 0 && body.length >= 20 ? body.readUInt32LE(16) : 0;
  const passthrough = (offered2 & PASSTHROUGH) !== 0;
  const resend = (offered2 & HAS_RESEND) !== 0;
  const out = Buffer.alloc(64);
  out.writeUInt32LE(MAJOR, 0);
  out.writeUInt32LE(Math.min(minor, MINOR), 4);
  out.writeUInt32LE(readaheadBytes, 8);
  out.writeUInt32LE((offered & WANTED) >>> 0, 12);
  // Read-ahead requests that may be under way at once; 50 guests may start on one cold image.
  out.writeUInt16LE(128, 16);
  out.writeUInt16LE(96, 18);
  out.writeUInt32LE(FUSE_REQUEST_BYTES_MAX, 20);
  out.writeUInt32LE(1, 24); // time stamps count in nanoseconds
  out.writeUInt16LE(FUSE_REQUEST_BYTES_MAX / 4096, 28);
  out.writeUInt32LE((passthrough ? PASSTHROUGH : 0) + (resend ? HAS_RESEND : 0), 32);
  if (passthrough) out.writeUInt32LE(STACK_DEPTH_MAX, 36);
  return { reply: encodeReply(request.readBigUInt64LE(8), out), passthrough, resend };
}

/** FUSE_NOTIFY_RESEND: what was taken from the session's devices and not answered is sent again. */
export function encodeResend(): Buffer {
  const notice = Buffer.alloc(OUT_HEADER_BYTES);
  notice.writeUInt32LE(OUT_HEADER_BYTES, 0);
  notice.writeInt32LE(NOTIFY_RESEND, 4);
  return notice;
}

export function encodeReply(unique: bigint, body: Uint8Array): Buffer {
  const reply = Buffer.allocUnsafe(OUT_HEADER_BYTES + body.length);
  writeReplyHeader(reply, unique);
  reply.set(body, OUT_HEADER_BYTES);
  return reply;
}

/** Header of a good reply that fills all of `reply`. */
export function writeReplyHeader(reply: Buffer, unique: bigint): void {
  reply.writeUInt32LE(reply.length, 0);
  reply.writeInt32LE(0, 4);
  reply.writeBigUInt64LE(unique, 8);
}

export function encodeErrorReply(unique: bigint, errno: number): Buffer {
  const reply = Buffer.allocUnsafe(OUT_HEADER_BYTES);
  reply.writeUInt32LE(OUT_HEADER_BYTES, 0);
  reply.writeInt32LE(-errno, 4);
  reply.writeBigUInt64LE(unique, 8);
  return reply;
}

export const ATTR_BYTES = 88;
export const ENTRY_BYTES = 128;

export interface Owner {
  readonly uid: number;
  readonly gid: number;
}

const S_IFDIR = 0o040000;
const S_IFREG = 0o100000;

/** u64 ino, size, blocks, atime, mtime, ctime; u32 the nanoseconds of these, mode, nlink, uid, gid, rdev, blksize. */
export function writeAttr(target: Buffer, at: number, entry: TreeEntry, ino: number, owner: Owner): void {
  const sizeBytes = entry.type === 'file' ? entry.sizeBytes : 0;
  const seconds = Math.max(0, Math.floor(entry.modifiedMs / 1000));
  const nanoseconds = Math.floor((Math.max(0, entry.modifiedMs) % 1000) * 1e6);
  writeU64(target, at, ino);
  writeU64(target, at + 8, sizeBytes);
  writeU64(target, at + 16, Math.ceil(sizeBytes / 512));
  for (const field of [24, 32, 40]) writeU64(target, at + field, seconds);
  for (const field of [48, 52, 56]) target.writeUInt32LE(nanoseconds, at + field);
  target.writeUInt32LE(modeOf(entry), at + 60);
  target.writeUInt32LE(entry.type === 'directory' ? 2 : 1, at + 64);
  target.writeUInt32LE(owner.uid, at + 68);
  target.writeUInt32LE(owner.gid, at + 72);
  target.writeUInt32LE(0, at + 76);
  target.writeUInt32LE(4096, at + 80);
  target.writeUInt32LE(0, at + 84);
}

/** Images are for everybody to read; a clone is one machine's private disk. */
export function modeOf(entry: TreeEntry): number {
  if (entry.type === 'directory') return S_IFDIR | 0o555;
  return S_IFREG | (entry.writable ? 0o600 : 0o444);
}

export const DT_DIRECTORY = 4;
export const DT_REGULAR = 8;

/** u64 ino, u64 offset of the next, u32 name length, u32 type, name, padding to 8. Returns its length. */
export function direntBytes(name: Buffer): number {
  return (24 + name.length + 7) & ~7;
}

export function writeDirent(
  target: Buffer,
  at: number,
  dirent: { ino: number; next: number; type: number; name: Buffer },
): void {
  writeU64(target, at, dirent.ino);
  writeU64(target, at + 8, dirent.next);
  target.writeUInt32LE(dirent.name.length, at + 16);
  target.writeUInt32LE(dirent.type, at + 20);
  dirent.name.copy(target, at + 24);
  target.fill(0, at + 24 + dirent.name.length, at + direntBytes(dirent.name));
}

export function writeU64(target: Buffer, at: number, value: number): void {
  target.writeUInt32LE(value >>> 0, at);
  target.writeUInt32LE(Math.floor(value / 2 ** 32), at + 4);
}

/** What the kernel is told for each of our codes. Not ENOTCONN: that is how a mount without a daemon answers. */
const ERRNO_OF_CODE = {
  'bad-request': constants.errno.EINVAL,
  'not-found': constants.errno.ENOENT,
  exists: constants.errno.EEXIST,
  'in-use': constants.errno.EBUSY,
  'read-only': constants.errno.EROFS,
  'no-permission': constants.errno.EACCES,
  'no-space': constants.errno.ENOSPC,
  'local-io': constants.errno.EIO,
  unsupported: constants.errno.EOPNOTSUPP,
  'bad-format': constants.errno.EIO,
  'newer-format': constants.errno.EIO,
  corrupt: constants.errno.EIO,
  'wrong-base': constants.errno.EIO,
  unreachable: constants.errno.EHOSTUNREACH,
  'tunnel-lost': constants.errno.ECONNRESET,
  'host-key': constants.errno.EACCES,
  denied: constants.errno.EACCES,
  'origin-failed': constants.errno.EIO,
  'vm-failed': constants.errno.EIO,
  timeout: constants.errno.ETIMEDOUT,
  closed: constants.errno.ECANCELED,
  bug: constants.errno.EIO,
} as const satisfies Record<ErrorCode, number>;

const ERRNO_BY_NAME: Record<string, number | undefined> = constants.errno;

/** A refusal that is a matter of this protocol alone, by its errno's name. */
export class Refusal extends Error {
  readonly code: keyof typeof constants.errno;

  constructor(code: keyof typeof constants.errno) {
    super(code);
    this.code = code;
  }
}

/** The positive errno for anything thrown: refusals and system errors by name, GridErrors by code, else EIO. */
export function errnoNumberOf(error: unknown): number {
  if (error instanceof GridError) return ERRNO_OF_CODE[error.code];
  if (error instanceof RangeError) return constants.errno.EINVAL; // a body shorter than its fields
  return ERRNO_BY_NAME[errnoOf(error) ?? ''] ?? constants.errno.EIO;
}

/** The same for what is asked of a file that is open: no name can be missing there, so what is missing is of the disk. */
export function errnoOfContent(error: unknown): number {
  const errno = errnoNumberOf(error);
  return errno === constants.errno.ENOENT ? constants.errno.EIO : errno;
}

/** A request as the main thread sees it. The readers throw RangeError past the end: EINVAL to the kernel. */
export class Request {
  readonly bytes: Buffer;
  readonly opcode: number;
  readonly unique: bigint;
  /** Thread that asked; 0 when it is in a PID namespace that we cannot see. */
  readonly pid: number;
  /** When it was read from the device (operation-times.ts); 0 when nobody wrote that down. */
  readonly stamp: number;

  /** `bytes` holds at least a header. */
  constructor(bytes: Buffer) {
    this.bytes = bytes;
    this.opcode = bytes.readUInt32LE(4);
    this.unique = bytes.readBigUInt64LE(8);
    this.pid = bytes.readUInt32LE(32);
    this.stamp = bytes.readUInt32LE(STAMP_AT);
  }

  get nodeId(): number {
    return Number(this.bytes.readBigUInt64LE(16));
  }

  u32(at: number): number {
    return this.bytes.readUInt32LE(IN_HEADER_BYTES + at);
  }

  /** Above 2^53 the number is inexact, which no offset, handle or node of ours is: it will not be found. */
  u64(at: number): number {
    return this.u32(at) + this.u32(at + 4) * 2 ** 32;
  }

  /** A name that ends with a zero byte. Names that are not UTF-8 cannot be in the tree. */
  name(at: number): string {
    const end = this.bytes.indexOf(0, IN_HEADER_BYTES + at);
    if (end < 0) throw new Refusal('EINVAL');
    const bytes = this.bytes.subarray(IN_HEADER_BYTES + at, end);
    if (bytes.length > 255) throw new Refusal('ENAMETOOLONG');
    const name = bytes.toString('utf8');
    if (name === '' || name === '.' || name === '..' || name.includes('/')) throw new Refusal('EINVAL');
    if (!isUtf8(bytes)) throw new Refusal('ENOENT');
    return name;
  }
}
