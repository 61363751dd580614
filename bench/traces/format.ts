/**
 * A trace: the reads that a guest's boots asked of its disk, as QEMU sent them on, to be replayed without the guest.
 *
 * Bound to the disk by its digest: offsets mean nothing on another one. A file holds several boots of the same
 * disk that differ in what two machines differ in (host name, MAC, machine id, random seed), so that what is learnt
 * from one can be judged on another. Reads of what the same boot had written are left out: they never reach a base
 * image.
 *
 * Text, so that it can be read and compared; lines end with LF:
 *   gridvfs-trace 1
 *   {"guest":…,"disk":SHA-256,"sizeBytes":…,"latencyMs":…,"qemu":…}      one JSON object: `TraceHead`
 *   boot {"hostname":…,"macAddress":…,"machineId":…,"accelerator":…}     one JSON object: `BootIdentity`
 *   OFFSET LENGTH DEPTH                                                  one line for each read, in order of issue
 *   boot …
 * OFFSET and LENGTH are in sectors of 512 bytes. DEPTH is how many reads were under way once this one was, itself
 * included: a replay issues it as soon as fewer than DEPTH are.
 */
import { isDigest } from '../../src/core/bytes.ts';
import type { Digest } from '../../src/core/bytes.ts';
import { GridError } from '../../src/core/errors.ts';

const FIRST_LINE = 'gridvfs-trace 1';
export const SECTOR_BYTES = 512;
const TRACE_BYTES_MAX = 8 * 1024 * 1024;
const READS_MAX = 200_000;
const READ_SECTORS_MAX = (32 * 1024 * 1024) / SECTOR_BYTES;
/** virtio-blk's queue has 256 places. */
export const DEPTH_MAX = 256;

export interface TraceHead {
  readonly guest: string;
  /** SHA-256 of the disk. */
  readonly disk: Digest;
  readonly sizeBytes: number;
  /** What each read took while it was recorded: it decides how many a guest has under way. */
  readonly latencyMs: number;
  readonly qemu: string;
}

export interface BootIdentity {
  readonly hostname: string;
  readonly macAddress: string;
  readonly machineId: string;
  readonly accelerator: string;
}

export interface TraceRead {
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  readonly depth: number;
}

export interface Boot {
  readonly identity: BootIdentity;
  readonly reads: readonly TraceRead[];
}

export interface Trace extends TraceHead {
  readonly boots: readonly Boot[];
}

export function encodeTrace(trace: Trace): string {
  const { boots, ...head } = trace;
  const lines = [FIRST_LINE, JSON.stringify(head)];
  for (const boot of boots) {
    lines.push(`boot ${JSON.stringify(boot.identity)}`);
    for (const { offsetBytes, lengthBytes, depth } of boot.reads)
      lines.push(`${offsetBytes / SECTOR_BYTES} ${lengthBytes / SECTOR_BYTES} ${depth}`);
  }
  return lines.join('\n') + '\n';
}

/** Throws bad-format with the line that is wrong, newer-format; every read lies within the disk. */
export function parseTrace(text: string): Trace {
  const bad = (line: number, why: string) => new GridError('bad-format', `trace, line ${line}: ${why}`);
  if (text.length > TRACE_BYTES_MAX) throw bad(1, 'the file is over its size bound');
  const lines = text.split('\n');
  if (lines[0] !== FIRST_LINE) {
    if (lines[0]?.startsWith('gridvfs-trace '))
      throw new GridError('newer-format', `trace of version ${lines[0].slice(14, 40)}`);
    throw bad(1, 'this is no trace');
  }
  if (lines.pop() !== '') throw bad(lines.length + 1, 'cut short');
  const json = (at: number, from: number): Record<string, unknown> => {
    let value: unknown;
    try {
      value = JSON.parse((lines[at] ?? '').slice(from));
    } catch {
      throw bad(at + 1, 'not JSON');
    }
    if (typeof value !== 'object' || value === null) throw bad(at + 1, 'not an object');
    return value as Record<string, unknown>;
  };
  const texts = <Name extends string>(at: number, from: number, names: readonly Name[]) => {
    const value = json(at, from);
    for (const name of names) if (typeof value[name] !== 'string') throw bad(at + 1, `no ${name}`);
    return Object.fromEntries(names.map((name) => [name, value[name]])) as Record<Name, string>;
  };
  const head = texts(1, 0, ['guest', 'disk', 'qemu']);
  const { sizeBytes, latencyMs } = json(1, 0);
  if (!isDigest(head.disk)) throw bad(2, 'disk is no digest');
  if (!Number.isSafeInteger(sizeBytes) || (sizeBytes as number) <= 0) throw bad(2, 'no size');
  if (typeof latencyMs !== 'number' || !(latencyMs >= 0)) throw bad(2, 'no latency');
  const boots: { identity: BootIdentity; reads: TraceRead[] }[] = [];
  for (let at = 2; at < lines.length; at++) {
    const line = lines[at]!;
    if (line.startsWith('boot ')) {
      const identity = texts(at, 5, ['hostname', 'macAddress', 'machineId', 'accelerator']);
      boots.push({ identity, reads: [] });
      continue;
    }
    const match = /^(\d{1,12}) (\d{1,8}) (\d{1,4})$/.exec(line);
    const boot = boots.at(-1);
    if (!match || !boot) throw bad(at + 1, 'neither a boot nor a read');
    const [first, sectors, depth] = match.slice(1).map(Number) as [number, number, number];
    if (sectors < 1 || sectors > READ_SECTORS_MAX || depth < 1 || depth > DEPTH_MAX)
      throw bad(at + 1, 'a wild length or depth');
    if ((first + sectors) * SECTOR_BYTES > (sizeBytes as number)) throw bad(at + 1, 'beyond the disk');
    if (boot.reads.length === READS_MAX) throw bad(at + 1, 'too many reads');
    boot.reads.push({ offsetBytes: first * SECTOR_BYTES, lengthBytes: sectors * SECTOR_BYTES, depth });
  }
  if (boots.length === 0) throw bad(lines.length, 'no boot');
  return { ...head, sizeBytes: sizeBytes as number, latencyMs, boots };
}

/** What a trace's boots ask for: bytes of all reads, of the distinct 4 KiB blocks, and the deepest queue. */
export function summaryOf(boot: Boot): { reads: number; bytes: number; depthMax: number } {
  let bytes = 0;
  let depthMax = 0;
  for (const read of boot.reads) {
    bytes += read.lengthBytes;
    depthMax = Math.max(depthMax, read.depth);
  }
  return { reads: boot.reads.length, bytes, depthMax };
}

/** Indexes of the chunks that a boot touches, in order of first touch. */
export function chunksTouched(boot: Boot, chunkBytes: number): number[] {
  const touched = new Set<number>();
  for (const { offsetBytes, lengthBytes } of boot.reads) {
    const last = Math.floor((offsetBytes + lengthBytes - 1) / chunkBytes);
    for (let index = Math.floor(offsetBytes / chunkBytes); index <= last; index++) touched.add(index);
  }
  return [...touched];
}
