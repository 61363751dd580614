/**
 * A machine's folder: QMP, console and identity sockets, logs, pid file, and `machine.json` (below), by which a later
 * process knows the machine that runs there. A pid alone says little: the process must also be at home in the folder
 * and be QEMU.
 */
import { readFile, readlink, realpath, rename, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { segmentSocket } from '../../core/machine.ts';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, errnoOf, GridError } from '../../core/errors.ts';
import type { MachineDescription } from '../../core/machine.ts';
import { checkDescription, SEGMENTS_MAX } from '../description.ts';
import type { Accelerator } from './accelerator.ts';
import {
  AGENT_SOCKET,
  CONSOLE_LOG,
  CONSOLE_SOCKET,
  IDENTITY_SOCKET,
  INCOMING_SOCKET,
  PID_FILE,
  QMP_SOCKET,
  SEED_FILE,
} from './command-line.ts';
import { removeTap } from './tap.ts';

/** A killed process goes at once, unless it is stuck in a disk's I/O. */
export const KILL_TIMEOUT_MS = 10_000;
const RECORD_FILE = 'machine.json';

/** `machine.json`. */
export interface MachineRecord {
  readonly schema: 1;
  readonly description: MachineDescription;
  readonly accelerator: Accelerator;
  /** The memory image that it was resumed from. */
  readonly memoryImage?: string;
  readonly startedMs?: number;
  readonly readyMs?: number;
}

export async function writeMachineRecord(folder: string, record: MachineRecord): Promise<void> {
  const file = path.join(folder, RECORD_FILE);
  await writeFile(`${file}.new`, JSON.stringify(record) + '\n', { mode: 0o600 });
  await rename(`${file}.new`, file);
}

/** Throws bad-format, newer-format. */
export async function readMachineRecord(folder: string): Promise<MachineRecord> {
  const file = path.join(folder, RECORD_FILE);
  let record: Partial<MachineRecord>;
  try {
    record = JSON.parse(await readFile(file, 'utf8')) as Partial<MachineRecord>;
  } catch (cause) {
    throw new GridError('bad-format', `${file} cannot be read`, { cause });
  }
  if ((record.schema as number) > 1) throw new GridError('newer-format', `${file} is of a newer gridvfs`);
  if (record.schema !== 1 || typeof record.description !== 'object') {
    throw new GridError('bad-format', `${file} is malformed`);
  }
  checkDescription(record.description);
  return record as MachineRecord;
}

export function removeRunFiles(folder: string): Promise<unknown> {
  const sockets = [QMP_SOCKET, CONSOLE_SOCKET, IDENTITY_SOCKET, INCOMING_SOCKET, AGENT_SOCKET];
  const names = [...sockets, PID_FILE, SEED_FILE, RECORD_FILE];
  for (let index = 0; index < SEGMENTS_MAX; index++) names.push(segmentSocket(index));
  return Promise.all(names.map((name) => rm(path.join(folder, name), { force: true })));
}

/** A folder without leftovers, or in-use when a machine of an earlier process still runs in it. */
export async function prepareFolder(folder: string): Promise<void> {
  try {
    if (!(await stat(folder)).isDirectory()) throw new GridError('bad-request', `${folder} is no folder`);
    const pid = await runningPid(folder);
    if (pid !== undefined) {
      throw new GridError('in-use', `a machine still runs in ${folder} (pid ${pid}); stop it first`);
    }
    await removeRunFiles(folder);
    // QEMU keeps the file and its mode; an earlier run's words must not count for this one.
    await writeFile(path.join(folder, CONSOLE_LOG), '', { mode: 0o600 });
  } catch (error) {
    throw asGridError(error, `cannot use ${folder} for a machine`);
  }
}

/** The pid of the QEMU that runs in the folder: one named in its pid file and at home there. */
export async function runningPid(folder: string): Promise<number | undefined> {
  try {
    const pid = Number.parseInt(await readFile(path.join(folder, PID_FILE), 'utf8'), 10);
    if (!Number.isSafeInteger(pid) || pid < 2) return undefined;
    // The number may belong to another process by now; only ours has this folder as its working folder.
    const home = await readlink(`/proc/${pid}/cwd`);
    const program = await readlink(`/proc/${pid}/exe`);
    const ours = home === (await realpath(folder)) && path.basename(program).startsWith('qemu-system');
    return ours ? pid : undefined;
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'ENOENT' || errno === 'ESRCH' || errno === 'ENOTDIR') return undefined;
    throw error;
  }
}

/**
 * Ends at once whatever machine an earlier process left running in the folder, and removes its sockets. Resolves
 * with whether there was one. Throws vm-failed when it does not go, local-io.
 */
export async function killMachine(folder: string): Promise<boolean> {
  try {
    const pid = await runningPid(folder);
    if (pid === undefined) return false;
    process.kill(pid, 'SIGKILL');
    const deadlineMs = performance.now() + KILL_TIMEOUT_MS;
    while ((await runningPid(folder)) === pid) {
      if (performance.now() > deadlineMs) {
        throw new GridError(
          'vm-failed',
          `QEMU in ${folder} (pid ${pid}) does not end: it waits for a disk that does not answer`,
        );
      }
      await sleep(10);
    }
    const record = await readMachineRecord(folder).catch(() => undefined);
    if (typeof record?.description.network === 'object') await removeTap(record.description.macAddress);
    await removeRunFiles(folder);
    return true;
  } catch (error) {
    throw asGridError(error, `cannot end the machine in ${folder}`);
  }
}
