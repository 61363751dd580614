/**
 * A file system of its own on a loop device that can lose power: the shutdown ioctl stops it dead, journal unflushed,
 * and the next mount shows the device as it was then.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, constants, mkdirSync, openSync, truncateSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { ioctl, isRoot } from '../../src/core/linux.ts';

/**
 * `still`: the kernel lets nobody change a page while it is written to the disk (sysfs: stable_writes), as disks with
 * checksums ask for. `moving`, which is what most disks say: a page that is written again meanwhile may reach the disk
 * part old, part new.
 */
export type Pages = 'still' | 'moving';

/** EXT4_IOC_SHUTDOWN = XFS_IOC_GOINGDOWN = _IOR('X', 125, u32), with "do not flush the log". */
const SHUTDOWN = 0x8004587d;
const NO_LOG_FLUSH = 2;
const RELEASE_TIMEOUT_MS = 120_000;

function run(program: string, ...args: string[]): string {
  return execFileSync(program, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

/** Why it cannot be tried here, or false. */
export function noCrashingDisk(): string | false {
  if (!isRoot()) return 'needs root for a loop device';
  try {
    run('losetup', '-f');
    return false;
  } catch {
    return 'no loop devices here';
  }
}

export class CrashingDisk {
  readonly mountpoint: string;
  readonly #loop: string;
  #mounted = false;

  /** Not yet mounted; `dispose` when done. */
  constructor(folder: string, type: 'ext4' | 'xfs', sizeBytes: number, pages: Pages = 'moving') {
    this.mountpoint = path.join(folder, type);
    mkdirSync(this.mountpoint);
    const file = path.join(folder, `${type}.img`);
    writeFileSync(file, '');
    truncateSync(file, sizeBytes);
    run(`mkfs.${type}`, '-q', file);
    this.#loop = run('losetup', '--show', '-f', file).trim();
    this.#setPages(pages);
  }

  /** What is mounted from now on obeys it. */
  #setPages(pages: Pages): void {
    const file = `/sys/block/${path.basename(this.#loop)}/queue/stable_writes`;
    writeFileSync(file, pages === 'still' ? '1' : '0');
  }

  mount(): void {
    run('mount', this.#loop, this.mountpoint);
    this.#mounted = true;
  }

  /** From now on nothing reaches the device, and what is not in memory cannot be read. */
  losePower(): void {
    const fd = openSync(this.mountpoint, 'r');
    const flags = Buffer.alloc(4);
    flags.writeUInt32LE(NO_LOG_FLUSH);
    ioctl(fd, SHUTDOWN, flags);
    closeSync(fd);
  }

  /**
   * Resolves when nobody has the file system mounted. A process that made a mount namespace of its own meanwhile
   * still holds the dead one in it, and the next mount would show that one again: EIO for everything.
   */
  async unmount(): Promise<void> {
    run('umount', this.mountpoint);
    this.#mounted = false;
    const deadlineMs = performance.now() + RELEASE_TIMEOUT_MS;
    for (;;) {
      try {
        closeSync(openSync(this.#loop, constants.O_RDONLY | constants.O_EXCL));
        return;
      } catch (error) {
        if (performance.now() > deadlineMs) throw error;
        await sleep(50);
      }
    }
  }

  async dispose(): Promise<void> {
    if (this.#mounted) await this.unmount();
    // The kernel keeps it for whoever has the loop device next.
    this.#setPages('moving');
    run('losetup', '-d', this.#loop);
  }
}
