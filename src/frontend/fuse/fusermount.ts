/**
 * Mounts and unmounts for whoever is not root, through fusermount3 (Debian: fuse3), which is setuid. It opens
 * /dev/fuse, makes the mount for the user and sends the session's descriptor back over a unix socket. What a user's
 * mount lacks: passthrough (the kernel wants CAP_SYS_ADMIN), and other users unless /etc/fuse.conf says
 * `user_allow_other`. fusermount3 opens /dev/fuse with the rights of the user, who must be let in there (udev does).
 *
 * `takeDown` and `takeDownNow` are umount2(2) for root and `fusermount3 -u` for users: everything that unmounts
 * goes through them.
 */
import { spawn, spawnSync } from 'node:child_process';
import { closeSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { GridError } from '../../core/errors.ts';
import {
  isRoot,
  MNT_DETACH,
  MNT_FORCE,
  receiveDescriptor,
  socketPair,
  SystemError,
  unmount,
  unmountInBackground,
} from '../../core/linux.ts';
import { findMount, findMountSync } from './mountinfo.ts';
import type { MountEntry } from '../../core/mountinfo.ts';

const PROGRAM = 'fusermount3';
/** Its messages are matched, so they must not be translated. */
const environment = () => ({ ...process.env, LC_ALL: 'C' });

/** Mounts at `place` with mount(8)'s `options`; returns the session's descriptor (close-on-exec). Throws unsupported
 * (no fusermount3) and no-permission, with what fusermount3 said; then nothing is mounted. */
export async function mountByHelper(place: string, options: readonly string[]): Promise<number> {
  const [ours, theirs] = socketPair();
  try {
    let child;
    try {
      child = spawn(PROGRAM, ['-o', options.join(','), '--', place], {
        stdio: ['ignore', 'ignore', 'pipe', theirs],
        env: { ...environment(), _FUSE_COMMFD: '3' },
      });
    } finally {
      closeSync(theirs);
    }
    let said = '';
    child.stderr!.on('data', (part: Buffer) => (said += part.toString('utf8')));
    const code = await new Promise<number | null>((resolve, reject) => {
      child.once('error', (cause) => reject(noHelper(`mounting at ${place}`, cause)));
      child.once('close', resolve);
    });
    const fd = receiveDescriptor(ours);
    if (code === 0 && fd !== undefined) return fd;
    if (fd !== undefined) closeSync(fd);
    throw new GridError('no-permission', `cannot mount at ${place}: ${reasonOf(said, code)}`);
  } finally {
    closeSync(ours);
  }
}

/** umount2(2) with MNT_DETACH, MNT_FORCE or neither, on behalf of whoever we are, without blocking this thread.
 * Throws a SystemError, EBUSY among them. */
export async function takeDown(place: string, flags: number): Promise<void> {
  if (isRoot()) return unmountInBackground(place, flags);
  const entry = await findMount(place);
  const child = spawn(PROGRAM, unmountArguments(place, flags), {
    stdio: ['ignore', 'ignore', 'pipe'],
    env: environment(),
  });
  let said = '';
  child.stderr.on('data', (part: Buffer) => (said += part.toString('utf8')));
  const code = await new Promise<number | null>((resolve, reject) => {
    child.once('error', (cause) => reject(noHelper(`unmounting ${place}`, cause)));
    child.once('close', resolve);
  });
  if (code !== 0) throw unmountFailure(place, said, code);
  if (flags & MNT_FORCE) abortConnection(entry);
}

/** The same for the end of a process, where nothing can be awaited. */
export function takeDownNow(place: string, flags: number): void {
  if (isRoot()) return unmount(place, flags);
  const entry = findMountSync(place);
  const { error, status, stderr } = spawnSync(PROGRAM, unmountArguments(place, flags), {
    stdio: ['ignore', 'ignore', 'pipe'],
    env: environment(),
    encoding: 'utf8',
  });
  if (error) throw noHelper(`unmounting ${place}`, error);
  if (status !== 0) throw unmountFailure(place, stderr, status);
  if (flags & MNT_FORCE) abortConnection(entry);
}

function unmountArguments(place: string, flags: number): string[] {
  return ['-u', ...(flags & (MNT_DETACH | MNT_FORCE) ? ['-z'] : []), '--', place];
}

/** What MNT_FORCE does, for a mount of ours that is detached already: whoever still uses it gets ENOTCONN. The file
 * belongs to the user who mounted. The connection's number is the minor number of the mount's device. */
function abortConnection(entry: MountEntry | undefined): void {
  const minor = entry?.device.split(':')[1];
  if (minor === undefined) return;
  try {
    writeFileSync(`/sys/fs/fuse/connections/${minor}/abort`, '1', { flag: 'w' });
  } catch {
    // Nobody used it any more, or fusectl is not mounted: then it ends with its last user or with this process.
  }
}

function unmountFailure(place: string, said: string, code: number | null): Error {
  if (/busy/i.test(said)) return new SystemError('umount2', constants.errno.EBUSY);
  return new GridError('no-permission', `cannot unmount ${place}: ${reasonOf(said, code)}`);
}

function reasonOf(said: string, code: number | null): string {
  return said.trim().replaceAll(/\s*\n\s*/g, '; ') || `${PROGRAM} ended with ${code}`;
}

function noHelper(doing: string, cause: Error): GridError {
  return new GridError(
    'unsupported',
    `${doing} needs root or ${PROGRAM}, which cannot be run (${cause.message}): apt-get install fuse3`,
    { cause },
  );
}
