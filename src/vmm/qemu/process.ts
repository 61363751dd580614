/**
 * A QEMU process, whether this process started it or an earlier one did. Of one that was adopted nobody hears how it
 * ended, only that it did.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import path from 'node:path';
import { isRunning } from '../../core/linux.ts';
import { QEMU_LOG } from './command-line.ts';

/** How often an adopted process is looked at; its QMP connection, which ends with it, says so sooner. */
const LOOK_INTERVAL_MS = 250;

/** Status or signal, as in Node's 'exit' event; both null for an adopted process. */
export type Exit = readonly [code: number | null, signal: NodeJS.Signals | null];

export interface QemuProcess {
  readonly pid: number;
  /** Undefined while it runs. */
  readonly exit: Exit | undefined;
  readonly exited: Promise<Exit>;
  kill(): void;
  /** Looks now whether it is gone. */
  look(): void;
}

/** Starts QEMU in a session of its own, at home in `folder`, its words in `qemu.log` there. */
export async function startProcess(
  program: string,
  args: readonly string[],
  folder: string,
  onError: (message: string) => void,
): Promise<QemuProcess> {
  const output = await open(path.join(folder, QEMU_LOG), 'w', 0o600);
  try {
    const child = spawn(program, args, {
      cwd: folder,
      detached: true,
      stdio: ['ignore', output.fd, output.fd],
      env: { PATH: process.env['PATH'], LC_ALL: 'C' },
    });
    let exit: Exit | undefined;
    // From the first moment: it may be gone again before the next line of this function runs.
    const exited = new Promise<Exit>((resolve) => {
      child.once('exit', (...how: [number | null, NodeJS.Signals | null]) => resolve((exit = how)));
    });
    await once(child, 'spawn');
    child.on('error', (error) => onError(error.message));
    return {
      pid: child.pid!,
      get exit() {
        return exit;
      },
      exited,
      kill: () => void child.kill('SIGKILL'),
      look: () => undefined,
    };
  } finally {
    await output.close();
  }
}

/** When the process started, in clock ticks since boot (field 22 of /proc/PID/stat, see proc(5)): with the pid it
 * names one process. */
function startTicks(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}

/** The running process `pid`, which somebody else started. */
export function adoptProcess(pid: number): QemuProcess {
  const ticks = startTicks(pid);
  const isSame = () => isRunning(pid) && startTicks(pid) === ticks;
  const { promise, resolve } = Promise.withResolvers<Exit>();
  let exit: Exit | undefined;
  const look = () => {
    if (exit !== undefined || isSame()) return;
    clearInterval(timer);
    resolve((exit = [null, null]));
  };
  const timer = setInterval(look, LOOK_INTERVAL_MS);
  return {
    pid,
    get exit() {
      return exit;
    },
    exited: promise,
    kill: () => {
      if (isSame()) process.kill(pid, 'SIGKILL');
    },
    look,
  };
}
