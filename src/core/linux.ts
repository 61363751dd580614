/**
 * The few Linux system calls that Node lacks, through koffi (libc, no compiler needed). Each wrapper throws a
 * SystemError with errno's name in `code`, like Node's own. Numbers from the kernel's uapi headers
 * (linux/falloc.h, linux/fs.h, linux/mount.h, linux/fuse.h), the same on x86-64 and arm64 unless said.
 */
import { readFileSync } from 'node:fs';
import { constants } from 'node:os';
import koffi from 'koffi';

const libc = koffi.load('libc.so.6');

/** Of two names of one number the first counts, as in Node's own errors: EAGAIN is also EWOULDBLOCK. */
const NAMES = new Map(
  Object.entries(constants.errno)
    .toReversed()
    .map(([name, value]) => [value, name]),
);

/** Like Node's errors of system calls: `code` is 'ENOSPC', `errno` the positive number. */
export class SystemError extends Error {
  readonly code: string;
  readonly errno: number;
  readonly syscall: string;

  constructor(syscall: string, errno: number) {
    const code = NAMES.get(errno) ?? `errno ${errno}`;
    super(`${code}: ${syscall}`);
    this.name = 'SystemError';
    this.code = code;
    this.errno = errno;
    this.syscall = syscall;
  }
}

function checked(syscall: string, result: number | bigint): number {
  if (result < 0) throw new SystemError(syscall, koffi.errno());
  return Number(result);
}

const cFlock = libc.func('int flock(int fd, int operation)');
const cFallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t len)');
const cLseek = libc.func('int64_t lseek(int fd, int64_t offset, int whence)');
const cMount = libc.func(
  'int mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)',
);
const cUmount2 = libc.func('int umount2(const char *target, int flags)');
const cIoctl = libc.func('int ioctl(int fd, unsigned long request, void *argument)');
const cFcntl = libc.func('int fcntl(int fd, int command, ...)');
const cSyncfs = libc.func('int syncfs(int fd)');
const cGeteuid = libc.func('unsigned int geteuid()');
const cMallocTrim = libc.func('int malloc_trim(size_t pad)');
const cExit = libc.func('void _exit(int status)');

const cCopyFileRange = libc.func(
  'int64_t copy_file_range(int from, _Inout_ int64_t *fromOffset, int to, _Inout_ int64_t *toOffset, size_t length, unsigned int flags)',
);

const LOCK_EX = 2;
const LOCK_NB = 4;

/** Takes the exclusive flock(2) of an open file without waiting; false when somebody else has it. It goes with
 * the last descriptor of the open file, so also when the process is killed. */
export function tryLock(fd: number): boolean {
  if (cFlock(fd, LOCK_EX | LOCK_NB) === 0) return true;
  const errno = koffi.errno();
  if (NAMES.get(errno) === 'EAGAIN') return false;
  throw new SystemError('flock', errno);
}

const FALLOC_FL_KEEP_SIZE = 1;
const FALLOC_FL_PUNCH_HOLE = 2;

/** Gives the range's blocks back; it reads as zeros. Works on whole blocks inside, zeroes the edges. */
export function punchHole(fd: number, offsetBytes: number, lengthBytes: number): void {
  if (lengthBytes === 0) return;
  checked('fallocate', cFallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsetBytes, lengthBytes));
}

const cFadvise = libc.func('int posix_fadvise(int fd, int64_t offset, int64_t len, int advice)');
const POSIX_FADV_WILLNEED = 3;

/** Has the kernel begin to read the range into its page cache. A wish: nothing fails. */
export function willNeed(fd: number, offsetBytes: number, lengthBytes: number): void {
  cFadvise(fd, offsetBytes, lengthBytes, POSIX_FADV_WILLNEED);
}

/** Reserves the range's blocks so that later writes to it cannot meet a full disk. */
export function reserve(fd: number, offsetBytes: number, lengthBytes: number): void {
  if (lengthBytes === 0) return;
  checked('fallocate', cFallocate(fd, 0, offsetBytes, lengthBytes));
}

/** copy_file_range(2) on a thread of its own, until `lengthBytes` are copied: shares the blocks where the file
 * system can, else copies within the kernel. */
export async function copyFileRange(
  from: number,
  fromOffsetBytes: number,
  to: number,
  toOffsetBytes: number,
  lengthBytes: number,
): Promise<void> {
  for (let done = 0; done < lengthBytes;) {
    const copied = await new Promise<number>((resolve, reject) => {
      cCopyFileRange.async(
        from,
        [fromOffsetBytes + done],
        to,
        [toOffsetBytes + done],
        lengthBytes - done,
        0,
        (error: unknown, result: number | bigint) => {
          if (error) reject(error instanceof Error ? error : new Error('copy_file_range was not called'));
          else if (result < 0) reject(new SystemError('copy_file_range', koffi.errno()));
          else resolve(Number(result));
        },
      );
    });
    if (copied === 0) throw new SystemError('copy_file_range', constants.errno.EIO);
    done += copied;
  }
}

const SEEK_DATA = 3;
const SEEK_HOLE = 4;

function seek(fd: number, offsetBytes: number, whence: number): number | undefined {
  const at = Number(cLseek(fd, offsetBytes, whence));
  if (at >= 0) return at;
  const errno = koffi.errno();
  if (NAMES.get(errno) === 'ENXIO') return undefined;
  throw new SystemError('lseek', errno);
}

/** Where data is at or after `offsetBytes`: [start, end), or undefined when only a hole follows. */
export function nextData(fd: number, offsetBytes: number): { start: number; end: number } | undefined {
  const start = seek(fd, offsetBytes, SEEK_DATA);
  if (start === undefined) return undefined;
  const end = seek(fd, start, SEEK_HOLE);
  return end === undefined ? undefined : { start, end };
}

export const MS_RDONLY = 1;
export const MS_NOSUID = 2;
export const MS_NODEV = 4;

/** mount(2). */
export function mount(source: string, target: string, type: string, flags: number, data: string): void {
  checked('mount', cMount(source, target, type, flags, data));
}

export const MNT_FORCE = 1;
export const MNT_DETACH = 2;

/** umount2(2); `flags` 0 fails with EBUSY while something is open. */
export function unmount(target: string, flags: number): void {
  checked('umount2', cUmount2(target, flags));
}

/** umount2(2) on a thread of its own: what it writes back may have to be answered by this very process. */
export function unmountInBackground(target: string, flags: number): Promise<void> {
  return new Promise((resolve, reject) => {
    cUmount2.async(target, flags, (failure: Error | null, result: number) => {
      if (failure) reject(failure);
      else if (result < 0) reject(new SystemError('umount2', koffi.errno()));
      else resolve();
    });
  });
}

/** ioctl(2) with a pointer argument; `argument` is read and written in place. Returns the call's result. */
export function ioctl(fd: number, request: number, argument: Uint8Array): number {
  return checked('ioctl', cIoctl(fd, request, argument));
}

/** syncfs(2): everything of the file system that holds `fd`. */
export function syncFileSystem(fd: number): void {
  checked('syncfs', cSyncfs(fd));
}

/** The same without holding up the calling thread: a disk's write-back can take seconds. */
export function syncFileSystemInBackground(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    cSyncfs.async(fd, (error: unknown, result: number) => {
      if (error) reject(error instanceof Error ? error : new Error('syncfs was not called'));
      else if (result < 0) reject(new SystemError('syncfs', koffi.errno()));
      else resolve();
    });
  });
}

const cRead = libc.func('int64_t read(int fd, void *target, size_t length)');
const cWrite = libc.func('int64_t write(int fd, void *source, size_t length)');
const cPreadv2 = libc.func('int64_t preadv2(int fd, void *iov, int count, int64_t offset, int flags)');

const RWF_NOWAIT = 8;

/** read(2) into the beginning of `target`, for a thread that does nothing else: costs less than Node's readSync. */
export function readInto(fd: number, target: Uint8Array, length: number): number {
  return checked('read', cRead(fd, target, length));
}

const cPoll = libc.func('int poll(void *fds, unsigned long count, int timeout)');
const cYield = libc.func('int sched_yield()');
const POLLIN = 1;
/** struct pollfd, of this thread. */
const polled = new Int32Array(2);
const polledHalves = new Int16Array(polled.buffer);

/** Whether a read of `fd` would not wait, or would fail. */
export function isReadable(fd: number): boolean {
  polled[0] = fd;
  polledHalves[2] = POLLIN;
  return cPoll(polled, 1, 0) !== 0;
}

/** Lets another thread that waits for this processor run. */
export function yieldProcessor(): void {
  cYield();
}

/** write(2) of the beginning of `source`. */
export function writeFrom(fd: number, source: Uint8Array, length: number): number {
  return checked('write', cWrite(fd, source, length));
}

const PAGE_BYTES = 4096;

/** Zeros that begin so that what is `alignedAt` bytes behind lies at the beginning of a page of memory. The kernel
 * copies from page to page at half the speed where the two begin differently. */
export function pageAligned(bytes: number, alignedAt: number): Buffer {
  const buffer = Buffer.alloc(bytes + PAGE_BYTES);
  const past = Number((koffi.address(buffer) + BigInt(alignedAt)) % BigInt(PAGE_BYTES));
  const start = (PAGE_BYTES - past) % PAGE_BYTES;
  return buffer.subarray(start, start + bytes);
}

/** Where a buffer lies, as an iovec of it: for `preadNow`. The buffer must be kept. */
export function vectorOf(target: Uint8Array): BigUint64Array {
  return BigUint64Array.of(koffi.address(target), BigInt(target.length));
}

/** What of the range is in the page cache, from its beginning on, read without waiting for a disk: its length, which
 * may be less than asked for; -1 where all of it has to be waited for, 0 when that cannot be told. */
export function preadNow(fd: number, vector: BigUint64Array, offsetBytes: number): number {
  const got = Number(cPreadv2(fd, vector, 1, offsetBytes, RWF_NOWAIT));
  return got >= 0 || NAMES.get(koffi.errno()) === 'EAGAIN' ? got : 0;
}

const cMmap = libc.func(
  'intptr_t mmap(void *at, size_t length, int protection, int flags, int fd, int64_t offset)',
);
const cMunmap = libc.func('int munmap(intptr_t at, size_t length)');
const cMincore = libc.func('int mincore(intptr_t at, size_t length, void *pages)');
const cWritev = libc.func('int64_t writev(int fd, void *iov, int count)');

const PROT_READ = 1;
const MAP_SHARED = 1;

/**
 * Writes a header and a range of a file as one message: the kernel takes the bytes from the page cache itself. The
 * range is mapped for the length of the call alone, because a mapping keeps a removed file's space.
 */
export class FileSender {
  readonly #vectors: BigUint64Array;
  readonly #pages: Buffer;

  /** `header`: kept, and read at each `send`. */
  constructor(header: Uint8Array, lengthMax: number) {
    this.#vectors = BigUint64Array.of(koffi.address(header), BigInt(header.length), 0n, 0n);
    this.#pages = Buffer.alloc(Math.ceil(lengthMax / PAGE_BYTES));
  }

  /** The range begins and ends at pages. False when some of it is not in the page cache or cannot be mapped: then
   * nothing was written. Throws what write(2) does. */
  send(to: number, file: number, offsetBytes: number, lengthBytes: number): boolean {
    const at = Number(cMmap(null, lengthBytes, PROT_READ, MAP_SHARED, file, offsetBytes));
    if (at === -1) return false;
    try {
      const pages = lengthBytes / PAGE_BYTES;
      if (cMincore(at, lengthBytes, this.#pages) !== 0) return false;
      const missing = this.#pages.indexOf(0);
      if (missing >= 0 && missing < pages) return false;
      this.#vectors[2] = BigInt(at);
      this.#vectors[3] = BigInt(lengthBytes);
      checked('writev', cWritev(to, this.#vectors, 2));
      return true;
    } finally {
      cMunmap(at, lengthBytes);
    }
  }
}

const cSocketPair = libc.func('int socketpair(int domain, int type, int protocol, _Out_ int *pair)');
koffi.struct('iovec', { base: 'void *', length: 'size_t' });
koffi.struct('msghdr', {
  name: 'void *',
  nameLength: 'uint32_t',
  iov: 'iovec *',
  iovLength: 'size_t',
  control: 'void *',
  controlLength: 'size_t',
  flags: 'int',
});
const cRecvmsg = libc.func('int64_t recvmsg(int fd, _Inout_ msghdr *message, int flags)');

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x40000000;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;

/** Two connected unix stream sockets, both close-on-exec: for a child that is given one of them. */
export function socketPair(): [number, number] {
  const pair: [number, number] = [-1, -1];
  checked('socketpair', cSocketPair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
  return pair;
}

/** The descriptor (close-on-exec) that came over the unix socket `fd` with the next byte; undefined when none came.
 * Does not wait. Control message, cmsg(3): u64 length, i32 level, i32 type, i32 descriptor. */
export function receiveDescriptor(fd: number): number | undefined {
  const control = Buffer.alloc(24);
  const message = {
    name: null,
    nameLength: 0,
    iov: [{ base: Buffer.alloc(1), length: 1 }],
    iovLength: 1,
    control,
    controlLength: control.length,
    flags: 0,
  };
  const got = cRecvmsg(fd, message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0 && NAMES.get(koffi.errno()) === 'EAGAIN') return undefined;
  checked('recvmsg', got);
  const rights = control.readInt32LE(8) === SOL_SOCKET && control.readInt32LE(12) === SCM_RIGHTS;
  return rights ? control.readInt32LE(16) : undefined;
}

export function isRoot(): boolean {
  return cGeteuid() === 0;
}

const F_SETFD = 2;
const FD_CLOEXEC = 1;

/** Keeps a descriptor that this process inherited from the programs that it starts. */
export function closeOnExec(fd: number): void {
  checked('fcntl', cFcntl(fd, F_SETFD, 'int', FD_CLOEXEC) as number);
}

/** When a process started, in ticks since the boot, as /proc says it: with the pid it names a process for ever.
 * Undefined when there is none. */
export function startOf(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}

/** Whether a process runs: a zombie that nobody has waited for yet does not. Never throws. */
export function isRunning(pid: number): boolean {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return !['Z', 'X'].includes(stat.charAt(stat.lastIndexOf(')') + 2));
  } catch {
    return false;
  }
}

/** _exit(2): ends the process and all its threads now, wherever they are blocked; nothing is written any more. */
export function exitNow(status: number): void {
  cExit(status);
}

/** malloc_trim(3): freed memory of all arenas goes back to the system. In a thread of the pool. */
export function trimMemory(): Promise<void> {
  return new Promise((resolve) => {
    cMallocTrim.async(0, () => resolve());
  });
}
