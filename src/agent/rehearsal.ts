/**
 * A checkpoint's first resume, made right after it was published, so that no other host has to be the first: which pages
 * a resume begins with is known only when one has run, and whoever does not know them asks for a thousand of them one
 * after the other. (REAP, ASPLOS 2021, records them when a function is invoked the first time; here that is nobody's
 * loss.) What it touched goes to the origin as its profile 'resume', as of any start.
 *
 * It is a fork like any other, a machine of its own whose disk and memory go with it, except that its network leads
 * nowhere: nobody outside may meet a copy of a guest that nobody asked for. It is asked who it is, where it answers, and
 * a line is typed at its console, because that is what resumed guests are for; when it has answered both it is ended.
 */
import { randomBytes } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { GridError } from '../core/errors.ts';
import type { Forks } from './forks.ts';
import type { Machines } from './machines.ts';
import type { Start } from './starts.ts';
import { connectTo } from './vm-answer.ts';

/** A guest that has said nothing by then has touched what it touches without being asked. Over a long link its first
 * resume takes some ten seconds. */
const ANSWER_MS = 60_000;
/** One that does not answer at all is at rest by then. */
const SILENT_MS = 10_000;
/** A console has said all that it says to a line when it says no more for so long. */
const QUIET_MS = 150;
/** To a shell a command without effect that has in it what commands have, to a login a name. */
const LINE = 'echo "$HOME"; echo $?\n';

export interface Rehearsed {
  /** Chunks of memory and disk that it touched until it was over. */
  readonly chunks: number;
  /** Since it was asked for. */
  readonly seconds: number;
}

/** How a fork is made that is a rehearsal. */
export interface Rehearsal {
  readonly name: string;
  /** Instead of the start that the fork would tell how far it is. */
  watch(start: Start): Start;
}

/** Throws unsupported (nothing is recorded here; its network cannot be left out) and what forks do. */
export async function rehearse(
  { forks, machines }: { forks: Forks; machines: Machines },
  reference: string,
): Promise<Rehearsed> {
  const startedMs = performance.now();
  if (!machines.recordsStarts)
    throw new GridError('unsupported', 'this proxy records no starts; mount without --no-profile');
  let start: Start | undefined;
  const vm = await forks.rehearse(reference, {
    name: `rehearsal-${randomBytes(5).toString('hex')}`,
    watch(real) {
      start = real;
      // What its console needs belongs to its answer, and comes after it; over a long link it takes what it takes.
      return { ...real, answered() {}, ended() {} };
    },
  });
  try {
    const spoken = answersAtConsole(vm.consoleSocket, vm.answers ? ANSWER_MS : SILENT_MS);
    const [isAnswered] = await Promise.all([spoken, machines.ready(vm.id, ANSWER_MS)]);
    if (isAnswered || vm.answers) start!.answered();
    start!.ended();
    const chunks = await start!.recorded;
    return { chunks, seconds: (performance.now() - startedMs) / 1000 };
  } finally {
    if (machines.has(vm.id)) await machines.stop(vm.id, 0);
  }
}

/** Types a line at a console; true when it has said something to it. */
async function answersAtConsole(socketFile: string, timeoutMs: number): Promise<boolean> {
  const socket = connectTo(socketFile);
  const heard = Promise.withResolvers<boolean>();
  let quiet: NodeJS.Timeout | undefined;
  socket.on('data', () => {
    clearTimeout(quiet);
    quiet = setTimeout(() => heard.resolve(true), QUIET_MS);
  });
  socket.once('connect', () => socket.write(LINE));
  socket.on('error', () => undefined);
  socket.on('close', () => heard.resolve(false));
  const late = sleep(timeoutMs, false, { ref: false });
  try {
    return await Promise.race([heard.promise, late]);
  } finally {
    clearTimeout(quiet);
    socket.destroy();
  }
}
