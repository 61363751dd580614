/** Processes that machines are, whether this process started them or an earlier one did. */
import { readFileSync } from 'node:fs';
import { isRunning } from '../core/linux.ts';

/** How often an adopted process is looked at; what is connected to it says so sooner. */
const LOOK_INTERVAL_MS = 250;

/** Status or signal, as in Node's 'exit' event; both null for an adopted process. */
export type Exit = readonly [code: number | null, signal: NodeJS.Signals | null];

export interface RunningProcess {
  readonly pid: number;
  /** Undefined while it runs. */
  readonly exit: Exit | undefined;
  readonly exited: Promise<Exit>;
  kill(): void;
  /** Looks now whether it is gone. */
  look(): void;
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
export function adoptProcess(pid: number): RunningProcess {
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
