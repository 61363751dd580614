/** mmap(2), posix_fadvise(2) and fallocate(2) for tests of mounts: what Node cannot do and guests' hosts do all the time. */
import { openSync, closeSync } from 'node:fs';
import koffi from 'koffi';

const libc = koffi.load('libc.so.6');
const cMmap = libc.func('void *mmap(void *addr, size_t length, int prot, int flags, int fd, int64_t offset)');
const cMunmap = libc.func('int munmap(void *addr, size_t length)');
const cMsync = libc.func('int msync(void *addr, size_t length, int flags)');
const cRead = libc.func('void *memcpy(_Out_ uint8_t *to, const void *from, size_t n)');
const cWrite = libc.func('void *memcpy(void *to, const uint8_t *from, size_t n)');
const cFadvise = libc.func('int posix_fadvise(int fd, int64_t offset, int64_t length, int advice)');
const cFallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)');

const PROT_READ = 1;
const PROT_WRITE = 2;
const MAP_SHARED = 1;
const MAP_PRIVATE = 2;
const MS_SYNC = 4;
const POSIX_FADV_DONTNEED = 4;

/** Maps [offset, offset + length) of a file (offset in whole pages) and gives it to `use`. */
export function withMapping<T>(
  file: string,
  mode: 'shared' | 'private' | 'shared-read',
  offsetBytes: number,
  lengthBytes: number,
  use: (mapping: {
    read(at: number, length: number): Buffer;
    write(at: number, bytes: Buffer): void;
    sync(): void;
  }) => T,
): T {
  const fd = openSync(file, mode === 'shared' ? 'r+' : 'r');
  try {
    const protection = mode === 'shared-read' ? PROT_READ : PROT_READ | PROT_WRITE;
    const flags = mode === 'private' ? MAP_PRIVATE : MAP_SHARED;
    const address: unknown = cMmap(null, lengthBytes, protection, flags, fd, offsetBytes);
    const start = koffi.address(address);
    if (start === 0xffff_ffff_ffff_ffffn) throw new Error(`mmap of ${file} failed: ${koffi.errno()}`);
    try {
      return use({
        read(at, length) {
          const bytes = Buffer.alloc(length);
          cRead(bytes, start + BigInt(at), length);
          return bytes;
        },
        write(at, bytes) {
          cWrite(start + BigInt(at), bytes, bytes.length);
        },
        sync() {
          if (cMsync(start, lengthBytes, MS_SYNC) !== 0) throw new Error(`msync failed: ${koffi.errno()}`);
        },
      });
    } finally {
      cMunmap(start, lengthBytes);
    }
  } finally {
    closeSync(fd);
  }
}

/** Drops the clean pages that the kernel keeps of an open file: the next read asks the daemon. */
export function dropPages(fd: number): void {
  cFadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}

/** fallocate(2): 0, or the errno that it failed with. */
export function fallocate(fd: number, mode: number, offsetBytes: number, lengthBytes: number): number {
  return cFallocate(fd, mode, offsetBytes, lengthBytes) === 0 ? 0 : koffi.errno();
}
