/**
 * One running container, from its start to its end; what outlives this process is its supervisor (supervisor.ts). Attached
 * disks are loop devices, nodes of which appear in the container as /dev/volumes/NAME.
 */
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, open, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { asGridError, GridError } from '../../core/errors.ts';
import type {
  Machine,
  MachineDescription,
  MachineDisk,
  MachineState,
  MachineStatus,
} from '../../core/machine.ts';
import { ConsoleLog, ConsoleWatch, lastWords } from '../console.ts';
import { CONSOLE_LINES, guestReady, Stopping } from '../guest.ts';
import { adoptProcess } from '../process.ts';
import type { RunningProcess } from '../process.ts';
import { within } from '../within.ts';
import {
  CONSOLE_LOG,
  CONSOLE_SOCKET,
  EXIT_FILE,
  PID_FILE,
  readJson,
  RECORD_FILE,
  removeRunFiles,
  RUN_FILE,
  runningSupervisor,
  SUPERVISOR_LOG,
  UP_FILE,
} from './folder.ts';
import type { ContainerExit, ContainerRun } from './folder.ts';

const START_TIMEOUT_MS = 30_000;
const LOOK_MS = 5;
const KILL_TIMEOUT_MS = 10_000;
const POWERDOWN_INTERVAL_MS = 2_000;
const VOLUMES = 'dev/volumes';

/** machine.json. */
interface ContainerRecord {
  readonly schema: 1;
  readonly description: MachineDescription;
  /** Loop devices of attached disks, by name. */
  readonly loops: Readonly<Record<string, string>>;
  readonly startedMs?: number;
  readonly readyMs?: number;
}

const cannot = (what: string) => new GridError('unsupported', `a container ${what}`);

export class ContainerMachine implements Machine {
  readonly consoleSocket: string;
  readonly identitySocket: string;
  readonly consoleLog: string;
  readonly ended: Promise<MachineStatus>;
  readonly #folder: string;
  readonly #say: (line: string) => void;
  readonly #supervisor: RunningProcess;
  readonly #startMs = performance.now();
  readonly #log: ConsoleLog;
  readonly #loops = new Map<string, string>();
  #description: MachineDescription;
  #console: ConsoleWatch | undefined;
  /** Of systemd-nspawn, and of the first process in the container. */
  #pid: number | undefined;
  #first: number | undefined;
  #state: MachineState = 'starting';
  #reason: string | undefined;
  #startedMs: number | undefined;
  #readyMs: number | undefined;
  readonly #stopping = new Stopping();

  private constructor(
    folder: string,
    description: MachineDescription,
    supervisor: number,
    say: (line: string) => void,
  ) {
    this.#folder = folder;
    this.#description = description;
    this.#say = say;
    this.#supervisor = adoptProcess(supervisor);
    this.consoleSocket = path.join(folder, CONSOLE_SOCKET);
    this.identitySocket = path.join(folder, 'no-identity.sock');
    this.consoleLog = path.join(folder, CONSOLE_LOG);
    this.#log = new ConsoleLog(this.consoleLog);
    this.ended = this.#supervisor.exited.then(() => this.#end());
  }

  static async start(
    description: MachineDescription,
    folderPath: string,
    say: (line: string) => void,
  ): Promise<ContainerMachine> {
    const folder = path.resolve(folderPath);
    await prepareFolder(folder);
    const [disk] = description.disks;
    const run: ContainerRun = {
      name: `gridvfs-${process.pid}-${Math.floor(performance.now())}`,
      hostName:
        description.seed?.hostName ?? (description.name.replaceAll(/[^a-zA-Z0-9-]+/g, '-') || 'container'),
      disk: disk!.path,
      readOnly: disk!.readOnly,
    };
    await writeFile(path.join(folder, RUN_FILE), JSON.stringify(run), { mode: 0o600 });
    const pid = await startSupervisor(folder);
    say(`${description.name}: container started, pid ${pid}`);
    const machine = new ContainerMachine(folder, description, pid, say);
    try {
      await machine.#untilUp();
      if (description.readyText === undefined) machine.#state = 'running';
      else machine.#watchConsole(description.readyText);
      machine.#startedMs = performance.now() - machine.#startMs;
      await machine.#record();
      return machine;
    } catch (error) {
      machine.#supervisor.kill();
      await machine.ended;
      throw asGridError(error, `${description.name} did not start`, 'vm-failed');
    }
  }

  static async adopt(folderPath: string, say: (line: string) => void): Promise<ContainerMachine | undefined> {
    const folder = path.resolve(folderPath);
    const pid = await runningSupervisor(folder);
    const record = await readJson<ContainerRecord>(folder, RECORD_FILE);
    if (pid === undefined || record === undefined) return undefined;
    const machine = new ContainerMachine(folder, record.description, pid, say);
    await machine.#untilUp();
    for (const [id, loop] of Object.entries(record.loops)) machine.#loops.set(id, loop);
    machine.#startedMs = record.startedMs;
    machine.#readyMs = record.readyMs;
    const { readyText } = record.description;
    if (record.readyMs !== undefined || readyText === undefined) machine.#state = 'running';
    else machine.#watchConsole(readyText);
    return machine;
  }

  get description(): MachineDescription {
    return this.#description;
  }

  status(): MachineStatus {
    return {
      state: this.#state,
      accelerator: 'container',
      ...(this.#isAlive() && this.#pid !== undefined ? { pid: this.#pid } : {}),
      ...(this.#reason === undefined ? {} : { reason: this.#reason }),
      ...(this.#startedMs === undefined ? {} : { startedMs: this.#startedMs }),
      ...(this.#readyMs === undefined ? {} : { readyMs: this.#readyMs }),
    };
  }

  ready(timeoutMs: number): Promise<void> {
    const { name, readyText } = this.#description;
    const { consoleLog, ended } = this;
    const guest = { name, readyText, watch: this.#console, consoleLog, ended };
    return guestReady({ ...guest, isReady: () => this.#readyMs !== undefined }, timeoutMs);
  }

  stop(graceMs: number): Promise<void> {
    return this.#stopping.stop(graceMs, (ms) => this.#stop(ms));
  }

  capture(): Promise<never> {
    return Promise.reject(cannot('cannot be captured'));
  }

  proceed(): Promise<void> {
    return Promise.resolve(); // it is never paused
  }

  setLimits(): Promise<void> {
    return Promise.reject(cannot('is bounded by its control group, not by its disks'));
  }

  async attach(disk: MachineDisk & { readonly id: string }): Promise<void> {
    const { name } = this.#description;
    if (this.#loops.has(disk.id)) throw new GridError('exists', `${name} has a disk '${disk.id}' already`);
    if (disk.format !== 'raw') throw cannot(`has no disks in format ${disk.format}`);
    // In a process of its own: the file may lie on a mount that this one serves.
    const loop = await this.#run('losetup', [
      '--find',
      '--show',
      ...(disk.readOnly ? ['--read-only'] : []),
      disk.path,
    ]);
    try {
      await mkdir(path.join(this.#inside(), VOLUMES), { recursive: true });
      const { rdev } = await stat(loop);
      const [major, minor] = [(rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xfff00)];
      await this.#run('mknod', [
        path.join(this.#inside(), VOLUMES, disk.id),
        'b',
        String(major),
        String(minor),
      ]);
    } catch (error) {
      await this.#run('losetup', ['--detach', loop]);
      throw error;
    }
    this.#loops.set(disk.id, loop);
    this.#description = { ...this.#description, disks: [...this.#description.disks, disk] };
    await this.#record();
  }

  async detach(id: string, timeoutMs: number): Promise<void> {
    const { name, disks } = this.#description;
    const loop = this.#loops.get(id);
    if (loop === undefined) throw new GridError('not-found', `${name} has no attached disk '${id}'`);
    const endMs = performance.now() + timeoutMs;
    const isMounted = async () => {
      const mounts = await readFile(`/proc/${this.#first}/mounts`, 'utf8');
      return mounts
        .split('\n')
        .some((line) => line.startsWith(`/dev/volumes/${id} `) || line.startsWith(`${loop} `));
    };
    while (await isMounted()) {
      if (performance.now() > endMs)
        throw new GridError(
          'timeout',
          `${name} has disk '${id}' mounted after ${timeoutMs} ms; it stays attached`,
        );
      await sleep(50);
    }
    await rm(path.join(this.#inside(), VOLUMES, id), { force: true });
    await this.#run('blockdev', ['--flushbufs', loop]);
    await this.#run('losetup', ['--detach', loop]);
    this.#loops.delete(id);
    this.#description = { ...this.#description, disks: disks.filter((disk) => disk.id !== id) };
    await this.#record();
  }

  /** The container's root, seen from here. */
  #inside(): string {
    return `/proc/${this.#first}/root`;
  }

  async #run(program: string, args: readonly string[]): Promise<string> {
    try {
      return (await promisify(execFile)(program, args, { timeout: START_TIMEOUT_MS })).stdout.trim();
    } catch (error) {
      const words = (error as { stderr?: string }).stderr?.trim().split('\n').at(-1);
      throw new GridError('vm-failed', `${program}: ${words || String(error)}`, { cause: error });
    }
  }

  #isAlive(): boolean {
    return this.#supervisor.exit === undefined;
  }

  async #untilUp(): Promise<void> {
    const endMs = performance.now() + START_TIMEOUT_MS;
    for (;;) {
      this.#supervisor.look();
      if (!this.#isAlive()) {
        const { reason } = await this.ended;
        throw new GridError(
          'vm-failed',
          `${this.#description.name} did not start: ${reason ?? 'no reason given'}`,
        );
      }
      const up = await readJson<{ pid: number; first: number }>(this.#folder, UP_FILE);
      if (up !== undefined) {
        [this.#pid, this.#first] = [up.pid, up.first];
        return;
      }
      if (performance.now() > endMs)
        throw new GridError(
          'vm-failed',
          `${this.#description.name} did not start within ${START_TIMEOUT_MS} ms`,
        );
      await sleep(LOOK_MS);
    }
  }

  #watchConsole(readyText: string): void {
    const console = new ConsoleWatch(this.consoleLog, readyText);
    this.#console = console;
    void console.outcome.then((outcome) => {
      if (outcome === 'ready') {
        this.#readyMs = performance.now() - this.#startMs;
        if (this.#state === 'starting') this.#state = 'running';
        if (this.#startedMs !== undefined) void this.#record();
      }
      return console.close();
    });
  }

  async #record(): Promise<void> {
    const record: ContainerRecord = {
      schema: 1,
      description: this.#description,
      loops: Object.fromEntries(this.#loops),
      ...(this.#startedMs === undefined ? {} : { startedMs: this.#startedMs }),
      ...(this.#readyMs === undefined ? {} : { readyMs: this.#readyMs }),
    };
    const file = path.join(this.#folder, RECORD_FILE);
    await writeFile(`${file}.new`, JSON.stringify(record), { mode: 0o600 });
    await rename(`${file}.new`, file);
    if (!this.#isAlive()) await removeRunFiles(this.#folder);
  }

  async #end(): Promise<MachineStatus> {
    await this.#console?.close();
    this.#log.close();
    for (const loop of this.#loops.values())
      await this.#run('losetup', ['--detach', loop]).catch(() => undefined);
    const exit = await readJson<ContainerExit>(this.#folder, EXIT_FILE);
    if (this.#startedMs !== undefined && (this.#stopping.asked || exit?.code === 0)) {
      this.#state = 'stopped';
    } else {
      const how =
        exit?.reason ??
        (exit?.signal ? `killed by ${exit.signal}` : `ended with status ${exit?.code ?? '?'}`);
      const words = await lastWords(this.consoleLog, CONSOLE_LINES);
      this.#reason = `${how}${words === '' ? '' : `; console: ${words}`}`;
      this.#state = 'failed';
    }
    await removeRunFiles(this.#folder);
    this.#say(
      `${this.#description.name}: ${this.#state}${this.#reason === undefined ? '' : `, ${this.#reason}`}`,
    );
    return this.status();
  }

  async #stop(graceMs: number): Promise<void> {
    const deadlineMs = performance.now() + graceMs;
    for (let leftMs = graceMs; leftMs > 0; leftMs = deadlineMs - performance.now()) {
      this.#signal('SIGTERM'); // nspawn tells the container's init to power off
      if (await this.#endsWithin(Math.min(POWERDOWN_INTERVAL_MS, leftMs))) return;
    }
    this.#signal('SIGKILL');
    if (await this.#endsWithin(KILL_TIMEOUT_MS)) return;
    this.#supervisor.kill();
    if (await this.#endsWithin(KILL_TIMEOUT_MS)) return;
    throw new GridError(
      'vm-failed',
      `${this.#description.name} (pid ${this.#pid}) does not end: it waits for a disk that does not answer`,
    );
  }

  #signal(signal: NodeJS.Signals): void {
    try {
      if (this.#isAlive() && this.#pid !== undefined) process.kill(this.#pid, signal);
    } catch {
      // It is gone already; its supervisor follows.
    }
  }

  async #endsWithin(timeoutMs: number): Promise<boolean> {
    return (await within(timeoutMs, this.ended)) !== undefined;
  }
}

async function prepareFolder(folder: string): Promise<void> {
  try {
    if (!(await stat(folder)).isDirectory()) throw new GridError('bad-request', `${folder} is no folder`);
    const pid = await runningSupervisor(folder);
    if (pid !== undefined)
      throw new GridError('in-use', `a machine still runs in ${folder} (pid ${pid}); stop it first`);
    await removeRunFiles(folder);
    await writeFile(path.join(folder, CONSOLE_LOG), '', { mode: 0o600 });
  } catch (error) {
    throw asGridError(error, `cannot use ${folder} for a machine`);
  }
}

/** In a session and a mount namespace of its own; what the host unmounts goes there too. */
async function startSupervisor(folder: string): Promise<number> {
  const output = await open(path.join(folder, SUPERVISOR_LOG), 'w', 0o600);
  try {
    const program = path.join(import.meta.dirname, `supervisor${path.extname(import.meta.filename)}`);
    const child = spawn('unshare', ['--mount', '--propagation', 'slave', process.execPath, program], {
      cwd: folder,
      detached: true,
      stdio: ['ignore', output.fd, output.fd],
    });
    await once(child, 'spawn');
    child.on('error', () => undefined);
    await writeFile(path.join(folder, PID_FILE), String(child.pid), { mode: 0o600 });
    return child.pid!;
  } catch (error) {
    throw asGridError(error, 'cannot start unshare', 'vm-failed');
  } finally {
    await output.close();
  }
}

/** Ends at once whatever runs in the folder; false when nothing does. */
export async function endContainer(folder: string): Promise<boolean> {
  const machine = await ContainerMachine.adopt(folder, () => undefined);
  if (machine === undefined) return false;
  await machine.stop(0);
  return true;
}
