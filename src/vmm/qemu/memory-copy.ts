/**
 * A program of its own: copies a paused QEMU's guest memory into a file that may lie on a mount of the process that
 * asks for it, which therefore must not do it itself. `memory-copy PID BYTES TARGET [IMAGE]`; prints
 * { writtenBytes } as JSON.
 *
 * Without IMAGE the memory is a memfd: its holes are skipped, and so are pages of zeros, which TARGET has already.
 * With IMAGE it is that file, mapped privately: what the guest changed are the pages that are the process's own by now,
 * which /proc/PID/pagemap tells (the kernel's Documentation/admin-guide/mm/pagemap.rst: 64 bits per page, bit 63 in
 * memory, 62 swapped out, 61 of the file or shared). They are read through /proc/PID/mem; TARGET holds what IMAGE does.
 */
import {
  closeSync,
  fsyncSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  readSync,
  writeSync,
} from 'node:fs';
import { GridError } from '../../core/errors.ts';
import { MIB } from '../../core/limits.ts';
import { nextData } from '../../core/linux.ts';
import { RAM_NAME } from './command-line.ts';

const PAGE_BYTES = 4096;
/** One write to the target at most. */
const RUN_BYTES = 1 * MIB;
const ENTRIES_READ = 8192;

interface Mapping {
  readonly start: number;
  readonly end: number;
  readonly offsetBytes: number;
}

/** Parts of the process's address space that show the file, in /proc/PID/maps: start-end perms offset dev inode path. */
function mappingsOf(pid: number, file: string, sizeBytes: number): Mapping[] {
  const found = readFileSync(`/proc/${pid}/maps`, 'utf8')
    .split('\n')
    .flatMap((line) => {
      const match = /^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+ +(.*)$/.exec(line);
      const shown = match?.[5]?.replace(/ \(deleted\)$/, '');
      if (!match || shown !== file || !match[3]!.endsWith('p')) return [];
      const [start, end, offsetBytes] = [match[1], match[2], match[4]].map((hex) =>
        Number.parseInt(hex!, 16),
      );
      return [{ start: start!, end: end!, offsetBytes: offsetBytes! }];
    });
  const shown = found.reduce((sum, { start, end }) => sum + end - start, 0);
  if (shown !== sizeBytes) {
    throw new GridError(
      'vm-failed',
      `process ${pid} maps ${shown} bytes of ${file}, not its memory of ${sizeBytes}`,
    );
  }
  return found;
}

/** Offsets of the process's own pages in the mapping, in rising order. */
function* changedPages(pagemap: number, { start, end, offsetBytes }: Mapping): Generator<number> {
  const entries = Buffer.alloc(8 * ENTRIES_READ);
  for (let address = start; address < end; address += ENTRIES_READ * PAGE_BYTES) {
    const count = Math.min(ENTRIES_READ, (end - address) / PAGE_BYTES);
    const read = readSync(pagemap, entries, 0, 8 * count, (address / PAGE_BYTES) * 8);
    if (read !== 8 * count) throw new GridError('vm-failed', 'the page map ends before the memory does');
    for (let at = 0; at < count; at++) {
      const high = entries.readUInt32LE(8 * at + 4);
      const [present, swapped, ofFile] = [high >>> 31, (high >>> 30) & 1, (high >>> 29) & 1];
      if (swapped || (present && !ofFile)) yield offsetBytes + (address - start) + at * PAGE_BYTES;
    }
  }
}

/** Joins neighbouring pages to runs [offset, length] of at most RUN_BYTES. */
function* runsOf(pages: Iterable<number>): Generator<[offsetBytes: number, lengthBytes: number]> {
  let start = -1;
  let end = -1;
  for (const page of pages) {
    if (page === end && end - start < RUN_BYTES) {
      end += PAGE_BYTES;
      continue;
    }
    if (start >= 0) yield [start, end - start];
    [start, end] = [page, page + PAGE_BYTES];
  }
  if (start >= 0) yield [start, end - start];
}

function readWhole(fd: number, target: Buffer, position: number): void {
  for (let done = 0; done < target.length;) {
    const read = readSync(fd, target, done, target.length - done, position + done);
    if (read === 0) throw new GridError('vm-failed', 'the memory ends before its size');
    done += read;
  }
}

function writeWhole(fd: number, source: Buffer, position: number): void {
  for (let done = 0; done < source.length;)
    done += writeSync(fd, source, done, source.length - done, position + done);
}

function copyChanged(pid: number, sizeBytes: number, image: string, target: number): number {
  const memory = openSync(`/proc/${pid}/mem`, 'r');
  const pagemap = openSync(`/proc/${pid}/pagemap`, 'r');
  const buffer = Buffer.alloc(RUN_BYTES);
  let writtenBytes = 0;
  for (const mapping of mappingsOf(pid, image, sizeBytes)) {
    for (const [offsetBytes, lengthBytes] of runsOf(changedPages(pagemap, mapping))) {
      const run = buffer.subarray(0, lengthBytes);
      readWhole(memory, run, mapping.start + (offsetBytes - mapping.offsetBytes));
      writeWhole(target, run, offsetBytes);
      writtenBytes += lengthBytes;
    }
  }
  return writtenBytes;
}

function copyAll(pid: number, sizeBytes: number, target: number): number {
  const folder = `/proc/${pid}/fd`;
  const name = readdirSync(folder).find((fd) => {
    try {
      return readlinkSync(`${folder}/${fd}`).startsWith(`/memfd:${RAM_NAME} `);
    } catch {
      return false; // closed meanwhile
    }
  });
  if (name === undefined) throw new GridError('vm-failed', `process ${pid} has no memory of its own`);
  const memory = openSync(`${folder}/${name}`, 'r');
  const buffer = Buffer.alloc(RUN_BYTES);
  let writtenBytes = 0;
  for (let data = nextData(memory, 0); data; data = nextData(memory, data.end)) {
    for (let at = data.start; at < Math.min(data.end, sizeBytes); at += RUN_BYTES) {
      const part = buffer.subarray(0, Math.min(RUN_BYTES, data.end - at));
      readWhole(memory, part, at);
      for (const [offsetBytes, lengthBytes] of runsOf(pagesWithData(part))) {
        writeWhole(target, part.subarray(offsetBytes, offsetBytes + lengthBytes), at + offsetBytes);
        writtenBytes += lengthBytes;
      }
    }
  }
  return writtenBytes;
}

const ZEROS = Buffer.alloc(PAGE_BYTES);

function* pagesWithData(bytes: Buffer): Generator<number> {
  for (let at = 0; at < bytes.length; at += PAGE_BYTES) {
    if (bytes.compare(ZEROS, 0, PAGE_BYTES, at, at + PAGE_BYTES) !== 0) yield at;
  }
}

const [pid, sizeBytes, file, image] = process.argv.slice(2);
try {
  const target = openSync(file!, 'r+');
  const writtenBytes =
    image === undefined
      ? copyAll(Number(pid), Number(sizeBytes), target)
      : copyChanged(Number(pid), Number(sizeBytes), realpathSync(image), target);
  fsyncSync(target);
  closeSync(target);
  process.stdout.write(JSON.stringify({ writtenBytes }));
} catch (error) {
  process.stderr.write(error instanceof Error ? error.message : String(error));
  process.exitCode = 1;
}
