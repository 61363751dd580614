/**
 * What is mounted where, from /proc/self/mountinfo and without touching the mount itself: a mount whose daemon
 * died, or that waits for its tunnel, must still be recognised.
 */
import { readFileSync } from 'node:fs';
import { readdir, readFile, readlink, realpath, statfs } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, errnoOf, GridError } from '../../core/errors.ts';
import { MOUNTINFO, parseMountinfo } from '../../core/mountinfo.ts';
import type { MountEntry } from '../../core/mountinfo.ts';

export const MOUNT_TYPE = 'fuse.gridvfs';

/** The uppermost mount at exactly `mountpoint` (an absolute path without symbolic links), or undefined. */
export async function findMount(mountpoint: string): Promise<MountEntry | undefined> {
  return uppermost(mountpoint, await readFile(MOUNTINFO, 'utf8'));
}

/** The same for the end of a process, where nothing can be awaited. */
export function findMountSync(mountpoint: string): MountEntry | undefined {
  return uppermost(mountpoint, readFileSync(MOUNTINFO, 'utf8'));
}

function uppermost(mountpoint: string, mountinfo: string): MountEntry | undefined {
  return parseMountinfo(mountinfo).findLast((entry) => entry.mountpoint === mountpoint);
}

/** Absolute, symbolic links above the last name resolved; the last name may be a dead mount and is left alone. */
export async function resolveMountpoint(mountpoint: string): Promise<string> {
  const absolute = path.resolve(mountpoint);
  try {
    try {
      return await realpath(absolute);
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') throw error;
      return path.join(await realpath(path.dirname(absolute)), path.basename(absolute));
    }
  } catch (error) {
    throw asGridError(error, `cannot find the mount point ${mountpoint}`);
  }
}

export interface MountDescription extends MountEntry {
  /** 'dead': the daemon is gone, and everything below answers "Transport endpoint is not connected". */
  readonly state: 'alive' | 'dead';
}

/** The mount at `mountpoint`, of whatever type; undefined when nothing is mounted there. Throws not-found. */
export async function describeMount(mountpoint: string): Promise<MountDescription | undefined> {
  const entry = await findMount(await resolveMountpoint(mountpoint));
  if (!entry) return undefined;
  const dead = entry.type === MOUNT_TYPE && (await isDead(entry.mountpoint));
  return { ...entry, state: dead ? 'dead' : 'alive' };
}

/** Asks the daemon: unlike attributes, statfs is never answered from what the kernel remembers. */
export async function isDead(mountpoint: string): Promise<boolean> {
  try {
    await statfs(mountpoint);
    return false;
  } catch (error) {
    const errno = errnoOf(error);
    return errno === 'ENOTCONN' || errno === 'ECONNABORTED';
  }
}

const HOLDERS_SHOWN_MAX = 5;
/** A process that waits in a page fault lets nobody read its mappings until it is served. */
const HOLDERS_TIMEOUT_MS = 2_000;

/** "qemu-system-x86 (4711), bash (4712)": processes with an open file, folder or mapping below `mountpoint`, as far
 * as they can be found in two seconds. */
export async function holdersOf(mountpoint: string): Promise<string> {
  const below = (target: string) => target === mountpoint || target.startsWith(mountpoint + '/');
  const found: string[] = [];
  const look = async (pid: string) => {
    const descriptors = await readdir(`/proc/${pid}/fd`).catch(() => []);
    const links = ['cwd', 'root', 'exe', ...descriptors.map((fd) => `fd/${fd}`)];
    const targets = await Promise.all(links.map((link) => readlink(`/proc/${pid}/${link}`).catch(() => '')));
    const maps = targets.some(below) ? '' : await readFile(`/proc/${pid}/maps`, 'utf8').catch(() => '');
    if (targets.some(below) || maps.includes(` ${mountpoint}/`)) {
      found.push(`${(await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '?')).trim()} (${pid})`);
    }
  };
  const late = sleep(HOLDERS_TIMEOUT_MS, 'late', { ref: false });
  for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name))) {
    if ((await Promise.race([look(pid), late])) === 'late') break;
  }
  if (found.length === 0) return 'somebody';
  const shown = found.slice(0, HOLDERS_SHOWN_MAX).join(', ');
  return found.length > HOLDERS_SHOWN_MAX ? `${shown} and ${found.length - HOLDERS_SHOWN_MAX} more` : shown;
}

/** Refuses whatever could not be a mount point, before anything is made; returns the resolved path. */
export async function checkMountpoint(mountpoint: string): Promise<string> {
  const place = await resolveMountpoint(mountpoint);
  const mounted = await findMount(place);
  if (mounted) {
    const dead = mounted.type === MOUNT_TYPE && (await isDead(place)) ? '; its daemon is dead' : '';
    throw new GridError(
      'in-use',
      `${place} is already a mount point (${mounted.source}, type ${mounted.type}${dead}): unmount that first or choose another folder`,
    );
  }
  let entries;
  try {
    entries = await readdir(place);
  } catch (error) {
    if (errnoOf(error) === 'ENOTDIR')
      throw new GridError('bad-request', `the mount point ${place} is not a folder`);
    throw asGridError(error, `cannot use the mount point ${place}`);
  }
  if (entries.length > 0) {
    throw new GridError('in-use', `the mount point ${place} is not empty: mounting would hide what is in it`);
  }
  return place;
}
