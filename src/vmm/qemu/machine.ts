/**
 * One running QEMU, from its start to its end. Its folder holds everything of it: the QMP and console sockets, the
 * console's log, QEMU's own messages, its pid.
 *
 *   start() -> starting --(guest says readyText; at once without one)--> running
 *      either --(guest powers down, stop())--> stopped
 *      either --(QEMU dies, is killed, exits with an error)-----------> failed, with the reason
 *
 * QEMU runs in a session of its own, so Ctrl-C at a terminal does not reach it, and it lives on when this process
 * dies: `killMachine` ends what an earlier process left. `ended` resolves after the process is gone and its sockets
 * are removed; the logs stay. Nothing here touches a disk's file: it may lie on a mount that this process serves.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { open, readFile, readlink, realpath, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, errnoOf, GridError } from '../../core/errors.ts';
import type { Machine, MachineDescription, MachineState, MachineStatus } from '../../core/machine.ts';
import type { Accelerator } from './accelerator.ts';
import {
  CONSOLE_LOG,
  CONSOLE_SOCKET,
  PID_FILE,
  QEMU_LOG,
  QMP_SOCKET,
  qemuArguments,
} from './command-line.ts';
import { ConsoleWatch, lastWords } from './console.ts';
import { QmpClient, type QmpEvent } from './qmp.ts';

/** From exec to an answer on QMP: libraries and disks on a slow mount are read meanwhile. */
const ANSWER_TIMEOUT_MS = 30_000;
const CONNECT_INTERVAL_MS = 5;
/** `quit` writes back what QEMU holds of the disks. */
const QUIT_TIMEOUT_MS = 3_000;
/** A killed process goes at once, unless it is stuck in a disk's I/O. */
const KILL_TIMEOUT_MS = 10_000;
/** A guest that is still booting misses the power button; it is pressed again. */
const POWERDOWN_INTERVAL_MS = 2_000;
/** How long after the exit QMP's last events may still be on their way. */
const LAST_EVENTS_MS = 1_000;
const CONSOLE_LINES = 3;
/** Some of its errors have a second line that explains. */
const QEMU_LINES = 2;
/** Node's timers count in 31 bits and fire at once beyond. */
const TIMER_MS_MAX = 2 ** 31 - 1;

export interface StartOptions {
  /** Path of the QEMU program. */
  readonly program: string;
  readonly accelerator: Accelerator;
  readonly description: MachineDescription;
  readonly folder: string;
  readonly log: (line: string) => void;
}

/** Status or signal, as in Node's 'exit' event. */
type Exit = [code: number | null, signal: NodeJS.Signals | null];

export class QemuMachine implements Machine {
  readonly consoleSocket: string;
  readonly consoleLog: string;
  readonly ended: Promise<MachineStatus>;
  readonly #options: StartOptions;
  readonly #child: ChildProcess;
  readonly #startMs: number;
  readonly #console: ConsoleWatch | undefined;
  #qmp: QmpClient | undefined;
  #state: MachineState = 'starting';
  #reason: string | undefined;
  #startedMs: number | undefined;
  #readyMs: number | undefined;
  /** The SHUTDOWN event's reason, e.g. 'guest-shutdown'. */
  #shutdown: string | undefined;
  #stopAsked = false;
  #stopping: Promise<void> | undefined;

  private constructor(options: StartOptions, child: ChildProcess, exit: Promise<Exit>, startMs: number) {
    const { folder, description } = options;
    this.#options = options;
    this.#child = child;
    this.#startMs = startMs;
    this.consoleSocket = path.join(folder, CONSOLE_SOCKET);
    this.consoleLog = path.join(folder, CONSOLE_LOG);
    this.ended = exit.then(([code, signal]) => this.#end(code, signal));
    if (description.readyText !== undefined) {
      this.#console = new ConsoleWatch(this.consoleLog, description.readyText);
      void this.#console.outcome.then((outcome) => {
        if (outcome === 'ready') this.#becomeReady();
        return this.#console?.close();
      });
    }
  }

  /** Starts QEMU and resolves when it answers on QMP; otherwise nothing of it is left but its log. */
  static async start(options: StartOptions): Promise<QemuMachine> {
    const { program, accelerator, description, log } = options;
    const folder = path.resolve(options.folder);
    const args = qemuArguments(description, accelerator);
    await prepareFolder(folder);
    let child: ChildProcess;
    let exit: Promise<Exit>;
    const startMs = performance.now();
    const output = await open(path.join(folder, QEMU_LOG), 'w', 0o600);
    try {
      child = spawn(program, args, {
        cwd: folder,
        detached: true,
        stdio: ['ignore', output.fd, output.fd],
        env: { PATH: process.env['PATH'], LC_ALL: 'C' },
      });
      const started = child;
      // From the first moment: it may be gone again before the next line of this function runs.
      exit = new Promise((resolve) => started.once('exit', (...how: Exit) => resolve(how)));
      await once(child, 'spawn');
      child.on('error', (error) => log(`${description.name}: ${error.message}`));
    } catch (error) {
      throw asGridError(error, `cannot start ${program} for ${description.name}`, 'vm-failed');
    } finally {
      await output.close();
    }
    log(`${description.name}: ${program} started, pid ${child.pid}, ${accelerator}`);
    const machine = new QemuMachine({ ...options, folder }, child, exit, startMs);
    try {
      await machine.#connect();
      return machine;
    } catch (error) {
      child.kill('SIGKILL');
      await machine.ended;
      throw asGridError(error, `${description.name} did not start`, 'vm-failed');
    }
  }

  status(): MachineStatus {
    return {
      state: this.#state,
      ...(this.#child.pid !== undefined && this.#isAlive() ? { pid: this.#child.pid } : {}),
      accelerator: this.#options.accelerator,
      ...(this.#reason === undefined ? {} : { reason: this.#reason }),
      ...(this.#startedMs === undefined ? {} : { startedMs: this.#startedMs }),
      ...(this.#readyMs === undefined ? {} : { readyMs: this.#readyMs }),
    };
  }

  async ready(timeoutMs: number): Promise<void> {
    const { name, readyText } = this.#options.description;
    if (this.#console === undefined || readyText === undefined) {
      throw new GridError(
        'bad-request',
        `${name} was started without readyText, so nobody can know when it is ready`,
      );
    }
    if (this.#readyMs !== undefined) return;
    const outcome = await within(timeoutMs, Promise.race([this.#console.outcome, this.ended]));
    if (outcome === 'ready' || this.#readyMs !== undefined) return;
    const words = (await lastWords(this.consoleLog, CONSOLE_LINES)) || 'nothing';
    if (outcome === undefined) {
      const text = `${name} did not say "${readyText}" within ${timeoutMs} ms; its console's last words: ${words}`;
      throw new GridError('timeout', text);
    }
    if ('panic' in outcome)
      throw new GridError('vm-failed', `the kernel of ${name} gave up: ${outcome.panic}`);
    const why = outcome.reason ?? `it powered down; its console's last words: ${words}`;
    throw new GridError('vm-failed', `${name} ended before it was ready: ${why}`);
  }

  stop(graceMs: number): Promise<void> {
    if (!Number.isFinite(graceMs) || graceMs < 0) {
      const text = `graceMs must be a number from 0, not ${graceMs}`;
      return Promise.reject(new GridError('bad-request', text));
    }
    // A second call that is more urgent than the first must not wait for the first one's grace.
    if (this.#stopping !== undefined && graceMs > 0) return this.#stopping;
    this.#stopAsked = true;
    const stopping = this.#stop(graceMs).finally(() => {
      if (this.#stopping === stopping) this.#stopping = undefined;
    });
    this.#stopping = stopping;
    return stopping;
  }

  /** A QMP command, for what the contract has no word for. Throws vm-failed, timeout, closed. */
  execute(command: string, commandArguments?: Record<string, unknown>): Promise<unknown> {
    if (this.#qmp === undefined)
      throw new GridError('closed', `${this.#options.description.name} is not running`);
    return this.#qmp.execute(command, commandArguments);
  }

  #isAlive(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  #becomeReady(): void {
    this.#readyMs = performance.now() - this.#startMs;
    if (this.#state === 'starting') this.#state = 'running';
    this.#options.log(`${this.#options.description.name}: ready after ${Math.round(this.#readyMs)} ms`);
  }

  /** Connects to QMP as soon as QEMU has made its socket. */
  async #connect(): Promise<void> {
    const { folder, description } = this.#options;
    const { name } = description;
    const socket = path.join(folder, QMP_SOCKET);
    const deadlineMs = this.#startMs + ANSWER_TIMEOUT_MS;
    for (;;) {
      const leftMs = deadlineMs - performance.now();
      if (!this.#isAlive()) throw await this.#startFailure();
      if (leftMs <= 0) {
        throw new GridError('vm-failed', `QEMU of ${name} did not answer within ${ANSWER_TIMEOUT_MS} ms`);
      }
      try {
        this.#qmp = await QmpClient.connect(socket, {
          name,
          timeoutMs: leftMs,
          onEvent: (event) => this.#onEvent(event),
          describeLoss: () => this.#describeLoss(),
        });
        break;
      } catch (error) {
        const errno = errnoOf(error);
        if (errno !== 'ENOENT' && errno !== 'ECONNREFUSED') {
          throw this.#isAlive() ? error : await this.#startFailure();
        }
        await sleep(CONNECT_INTERVAL_MS);
      }
    }
    this.#startedMs = performance.now() - this.#startMs;
    if (description.readyText === undefined) this.#state = 'running';
  }

  async #startFailure(): Promise<GridError> {
    const { reason } = await this.ended;
    return new GridError(
      'vm-failed',
      `${this.#options.description.name} did not start: ${reason ?? 'no reason given'}`,
    );
  }

  #onEvent(event: QmpEvent): void {
    if (event.event === 'SHUTDOWN') this.#shutdown = String(event.data['reason']);
  }

  /** QMP broke: QEMU is ending, so its exit says why. */
  async #describeLoss(): Promise<string> {
    if (this.#isAlive()) {
      await within(LAST_EVENTS_MS, new Promise((resolve) => this.#child.once('exit', resolve)));
    }
    const words = await qemuWords(this.#options.folder);
    return [describeExit(this.#child.exitCode, this.#child.signalCode), words].filter(Boolean).join(': ');
  }

  async #end(code: number | null, signal: NodeJS.Signals | null): Promise<MachineStatus> {
    const { folder, description, log } = this.#options;
    // Nobody else holds QMP's other end, so it closes now, after its last events.
    if (this.#qmp !== undefined) await within(LAST_EVENTS_MS, this.#qmp.closed);
    this.#qmp?.close();
    await this.#console?.close();
    const asked = this.#stopAsked && this.#startedMs !== undefined;
    const clean = code === 0 && this.#shutdown !== 'host-signal' && this.#startedMs !== undefined;
    if (asked || clean) {
      this.#state = 'stopped';
    } else {
      const qemu = await qemuWords(folder);
      const guest = await lastWords(this.consoleLog, CONSOLE_LINES);
      const exit = describeExit(code, signal);
      this.#reason = (qemu === '' ? exit : `${exit}: ${qemu}`) + (guest === '' ? '' : `; console: ${guest}`);
      this.#state = 'failed';
    }
    await removeRunFiles(folder).catch((error: unknown) => log(`${description.name}: ${String(error)}`));
    log(`${description.name}: ${this.#state}${this.#reason === undefined ? '' : `, ${this.#reason}`}`);
    return this.status();
  }

  async #stop(graceMs: number): Promise<void> {
    if (graceMs > 0) await this.#powerDown(graceMs);
    if (await this.#endsWithin(0)) return;
    // QEMU may be gone between the look and the command; its end is what is waited for.
    await this.#qmp?.execute('quit', undefined, QUIT_TIMEOUT_MS).catch(() => undefined);
    if (await this.#endsWithin(QUIT_TIMEOUT_MS)) return;
    this.#child.kill('SIGKILL');
    if (await this.#endsWithin(KILL_TIMEOUT_MS)) return;
    const { name } = this.#options.description;
    throw new GridError(
      'vm-failed',
      `${name} (pid ${this.#child.pid}) does not end: it waits for a disk that does not answer; see to its mount`,
    );
  }

  async #powerDown(graceMs: number): Promise<void> {
    const deadlineMs = performance.now() + graceMs;
    for (let leftMs = graceMs; leftMs > 0; leftMs = deadlineMs - performance.now()) {
      await this.#qmp
        ?.execute('system_powerdown', undefined, Math.min(leftMs, QUIT_TIMEOUT_MS))
        .catch(() => undefined);
      if (await this.#endsWithin(Math.min(POWERDOWN_INTERVAL_MS, deadlineMs - performance.now()))) return;
    }
  }

  async #endsWithin(timeoutMs: number): Promise<boolean> {
    if (!this.#isAlive()) {
      await this.ended;
      return true;
    }
    return timeoutMs > 0 && (await within(timeoutMs, this.ended)) !== undefined;
  }
}

/** What the promise resolves with, or undefined when it takes longer; no timer is left either way. */
async function within<T>(timeoutMs: number, promise: Promise<T>): Promise<T | undefined> {
  const timer = new AbortController();
  const late = sleep(Math.min(timeoutMs, TIMER_MS_MAX), undefined, { signal: timer.signal });
  try {
    return await Promise.race([promise, late.catch(() => undefined)]);
  } finally {
    timer.abort();
  }
}

function describeExit(code: number | null, signal: NodeJS.Signals | null): string {
  if (signal !== null) return `QEMU was killed by ${signal}`;
  return code === null ? 'QEMU broke the connection' : `QEMU ended with status ${code}`;
}

/** What QEMU said last, without its name and without the option's text, which can be long JSON. */
async function qemuWords(folder: string): Promise<string> {
  const words = await lastWords(path.join(folder, QEMU_LOG), QEMU_LINES);
  return words.replaceAll(/qemu-system-\w+: (?:-\w+ \{.*?\}: )?/g, '');
}

function removeRunFiles(folder: string): Promise<unknown> {
  return Promise.all(
    [QMP_SOCKET, CONSOLE_SOCKET, PID_FILE].map((name) => rm(path.join(folder, name), { force: true })),
  );
}

/** A folder without leftovers, or in-use when a machine of an earlier process still runs in it. */
async function prepareFolder(folder: string): Promise<void> {
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
async function runningPid(folder: string): Promise<number | undefined> {
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
    await removeRunFiles(folder);
    return true;
  } catch (error) {
    throw asGridError(error, `cannot end the machine in ${folder}`);
  }
}
