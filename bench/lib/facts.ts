/** What a record says of the machine it was made on, and the two things that make runs comparable: medians, and
 * the state of the page cache. */
import { readFileSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import os from 'node:os';
import { syncFileSystem } from '../../src/core/linux.ts';
import { closeSync, openSync } from 'node:fs';

export interface HostFacts {
  readonly kernel: string;
  readonly node: string;
  readonly processor: string;
  readonly cores: number;
  readonly memoryBytes: number;
  readonly qemu: string;
  readonly accelerator: string;
}

export function hostFacts(accelerator: string): HostFacts {
  const qemu = spawnSync('qemu-system-x86_64', ['--version'], { encoding: 'utf8' });
  return {
    kernel: os.release(),
    node: process.version,
    processor: os.cpus()[0]?.model ?? 'unknown',
    cores: os.cpus().length,
    memoryBytes: os.totalmem(),
    qemu: qemu.stdout?.split('\n')[0] ?? 'not found',
    accelerator,
  };
}

/** 'dropped': nothing of any file is in memory. 'kept': this user may not drop it. */
export type PageCacheState = 'dropped' | 'kept';

/** Drops clean pages, directories and inodes of the whole host, after writing back what is dirty below `folder`. */
export function dropPageCache(folder: string): PageCacheState {
  const fd = openSync(folder, 'r');
  try {
    syncFileSystem(fd);
  } finally {
    closeSync(fd);
  }
  try {
    writeFileSync('/proc/sys/vm/drop_caches', '3');
    return 'dropped';
  } catch {
    return 'kept';
  }
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** CPU seconds, user and system, that a process and its threads have used. */
export function cpuSecondsOf(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]!.split(' ');
  return (Number(fields[11]) + Number(fields[12])) / 100;
}
