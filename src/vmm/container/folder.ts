/** A container's folder: its sockets, logs, and the records by which its parts and a later process know of it. */
import { readFile, readlink, realpath, rm, rmdir } from 'node:fs/promises';
import path from 'node:path';
import { errnoOf } from '../../core/errors.ts';

export const CONSOLE_SOCKET = 'console.sock';
export const CONSOLE_LOG = 'console.log';
export const SUPERVISOR_LOG = 'supervisor.log';
/** Where the disk is mounted, in the supervisor's mount namespace. */
export const ROOT = 'root';
/** ContainerRun: what the supervisor is told. */
export const RUN_FILE = 'run.json';
/** { pid, first }: systemd-nspawn runs, and the container's first process. */
export const UP_FILE = 'up.json';
/** ContainerExit. */
export const EXIT_FILE = 'exit.json';
/** ContainerRecord: what a later process needs to adopt it. */
export const RECORD_FILE = 'machine.json';
/** systemd-nspawn's own, beside the root. */
const NSPAWN_LOCK = `.#${ROOT}.lck`;
export const PID_FILE = 'supervisor.pid';

export interface ContainerRun {
  readonly name: string;
  readonly hostName: string;
  readonly disk: string;
  readonly readOnly: boolean;
}

export interface ContainerExit {
  readonly code: number | null;
  readonly signal: string | null;
  readonly reason?: string;
}

export async function readJson<T>(folder: string, file: string): Promise<T | undefined> {
  try {
    return JSON.parse(await readFile(path.join(folder, file), 'utf8')) as T;
  } catch {
    return undefined;
  }
}

export async function removeRunFiles(folder: string): Promise<void> {
  const names = [NSPAWN_LOCK, CONSOLE_SOCKET, RUN_FILE, UP_FILE, EXIT_FILE, RECORD_FILE, PID_FILE];
  for (const name of names) await rm(path.join(folder, name), { force: true });
  await rmdir(path.join(folder, ROOT)).catch(() => undefined);
}

/** The pid of the supervisor that runs in the folder: one named in its pid file and at home there. */
export async function runningSupervisor(folder: string): Promise<number | undefined> {
  try {
    const pid = Number.parseInt(await readFile(path.join(folder, PID_FILE), 'utf8'), 10);
    if (!Number.isSafeInteger(pid) || pid < 2) return undefined;
    return (await readlink(`/proc/${pid}/cwd`)) === (await realpath(folder)) ? pid : undefined;
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'ENOENT' || errno === 'ESRCH' || errno === 'ENOTDIR') return undefined;
    throw error;
  }
}
