/**
 * One running QEMU, from its start to its end. Its folder holds everything of it: the QMP and console sockets, the
 * console's log, QEMU's own messages, its pid.
 *
 *   start() -> starting --(guest says readyText; at once without one)--> running
 *      either --(guest powers down, stop())--> stopped
 *      either --(QEMU dies, is killed, exits with an error)-----------> failed, with the reason
 *
 *   resume() -> paused --(proceed())--> running --(capture())--> paused
 *
 * QEMU runs in a session of its own, so Ctrl-C at a terminal does not reach it, and it lives on when this process
 * dies: `adopt` takes it up again, `killMachine` (folder.ts) ends it. `ended` resolves after the process is gone and its sockets
 * are removed; the logs stay. Nothing here touches a disk's file: it may lie on a mount that this process serves.
 */
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, errnoOf, GridError } from '../../core/errors.ts';
import type {
  IoLimits,
  Machine,
  MachineCapture,
  MachineDescription,
  MachineDisk,
  MachineFiles,
  MachineState,
  MachineStatus,
} from '../../core/machine.ts';
import { seedImage } from '../seed.ts';
import type { Accelerator } from './accelerator.ts';
import { attachDisk, Departures, detachDisk, limitDisks } from './attached.ts';
import { compatibilityOf, copyMemory, loadDeviceState, saveDeviceState } from './checkpoint.ts';
import {
  CONSOLE_LOG,
  CONSOLE_SOCKET,
  IDENTITY_SOCKET,
  QMP_SOCKET,
  qemuArguments,
  SEED_FILE,
} from './command-line.ts';
import { checkDescription, checkLimits } from '../description.ts';
import { ConsoleLog, ConsoleWatch, lastWords } from '../console.ts';
import {
  KILL_TIMEOUT_MS,
  prepareFolder,
  readMachineRecord,
  removeRunFiles,
  runningPid,
  writeMachineRecord,
} from './folder.ts';
import { DiskFull } from './disk-full.ts';
import { forwardPort } from './forward.ts';
import { askGuestAgent } from './guest-agent.ts';
import { CONSOLE_LINES, guestReady, Stopping } from '../guest.ts';
import { adoptProcess, type RunningProcess } from '../process.ts';
import { isOnFuse, smallFaultsSpare, withSmallFaults } from './page-faults.ts';
import { qemuWords, startProcess } from './process.ts';
import { QmpClient, type QmpEvent } from './qmp.ts';
import { makeTap, removeTap } from './tap.ts';
import { within } from '../within.ts';

/** From exec to an answer on QMP: libraries and disks on a slow mount are read meanwhile. */
const ANSWER_TIMEOUT_MS = 30_000;
const CONNECT_INTERVAL_MS = 5;
/** `quit` writes back what QEMU holds of the disks. */
const QUIT_TIMEOUT_MS = 3_000;
/** A guest that is still booting misses the power button; it is pressed again. */
const POWERDOWN_INTERVAL_MS = 2_000;
/** A guest that writes much takes a while to have it all on its disk; one without an agent says nothing. */
const AGENT_TIMEOUT_MS = 10_000;
/** How long after the exit QMP's last events may still be on their way. */
const LAST_EVENTS_MS = 1_000;

export interface StartOptions {
  /** Path of the QEMU program. */
  readonly program: string;
  readonly accelerator: Accelerator;
  readonly description: MachineDescription;
  readonly folder: string;
  readonly log: (line: string) => void;
  /** Set for a machine that is resumed. */
  readonly from?: {
    /** Versioned machine type. */
    readonly machine: string;
    readonly memoryImage: string;
    readonly deviceState: Uint8Array;
  };
}

/** What is known of a machine that runs already. */
interface Facts {
  readonly memoryImage?: string;
  readonly startedMs?: number;
  readonly readyMs?: number;
}

/** Why QEMU says that it ends, where it was told that it must not boot its guest (command-line.ts). */
const GUEST_RESET = 'guest-reset';
/** Of a socket that QEMU has not made yet, or that ends with it: whether it still runs says which. */
const NOT_THERE = new Set(['ENOENT', 'ECONNREFUSED', 'ECONNRESET', 'EPIPE']);

export class QemuMachine implements Machine {
  readonly consoleSocket: string;
  readonly identitySocket: string;
  readonly consoleLog: string;
  readonly ended: Promise<MachineStatus>;
  readonly #options: Omit<StartOptions, 'program' | 'from'>;
  #description: MachineDescription;
  readonly #departures = new Departures();
  readonly #process: RunningProcess;
  readonly #startMs: number;
  readonly #memoryImage: string | undefined;
  readonly #log: ConsoleLog;
  #console: ConsoleWatch | undefined;
  #qmp: QmpClient | undefined;
  #state: MachineState = 'starting';
  #reason: string | undefined;
  #startedMs: number | undefined;
  #readyMs: number | undefined;
  /** The SHUTDOWN event's reason, e.g. 'guest-shutdown'. */
  #shutdown: string | undefined;
  readonly #diskFull = new DiskFull({
    execute: (command) => this.execute(command),
    isMeantToRun: () => this.#state === 'running' || this.#state === 'starting',
    log: (text) => this.#options.log(`${this.#options.description.name}: ${text}`),
  });
  readonly #stopping = new Stopping();

  private constructor(
    options: Omit<StartOptions, 'program' | 'from'>,
    process: RunningProcess,
    facts: Facts,
  ) {
    const { folder } = options;
    this.#options = options;
    this.#description = options.description;
    this.#process = process;
    this.#startMs = performance.now();
    this.#memoryImage = facts.memoryImage;
    this.#startedMs = facts.startedMs;
    this.#readyMs = facts.readyMs;
    this.consoleSocket = path.join(folder, CONSOLE_SOCKET);
    this.identitySocket = path.join(folder, IDENTITY_SOCKET);
    this.consoleLog = path.join(folder, CONSOLE_LOG);
    this.#log = new ConsoleLog(this.consoleLog);
    this.ended = process.exited.then(([code, signal]) => this.#end(code, signal));
  }

  /** Starts QEMU and resolves when it answers on QMP; otherwise nothing of it is left but its log. */
  static async start(options: StartOptions): Promise<QemuMachine> {
    const { program, accelerator, description, log, from } = options;
    const folder = path.resolve(options.folder);
    checkDescription(description);
    await prepareFolder(folder);
    const { network, macAddress, seed } = description;
    const tap = typeof network === 'object' ? await makeTap(network.bridge, macAddress) : undefined;
    const args = qemuArguments(description, {
      accelerator,
      ...(from === undefined ? {} : { machine: from.machine, memoryImage: from.memoryImage }),
      ...(tap === undefined ? {} : { tap }),
    });
    let process: RunningProcess;
    try {
      if (seed !== undefined) await writeFile(path.join(folder, SEED_FILE), seedImage(seed), { mode: 0o600 });
      const isFetched = from !== undefined && (await isOnFuse(from.memoryImage));
      const spare = isFetched ? smallFaultsSpare?.take() : undefined;
      const command = isFetched && !spare ? await withSmallFaults(program, args) : { program, args };
      process = await startProcess(command, folder, (text) => log(`${description.name}: ${text}`), spare);
    } catch (error) {
      if (tap !== undefined) await removeTap(macAddress);
      throw asGridError(error, `cannot start ${program} for ${description.name}`, 'vm-failed');
    }
    log(`${description.name}: ${program} started, pid ${process.pid}, ${accelerator}`);
    const memory = from === undefined ? {} : { memoryImage: from.memoryImage };
    const machine = new QemuMachine({ accelerator, description, folder, log }, process, memory);
    try {
      if (from === undefined) machine.#watchConsole();
      await machine.#connect();
      if (description.limits !== undefined) await limitDisks(machine.#qmp!, description, description.limits);
      if (from === undefined) {
        if (description.readyText === undefined) machine.#state = 'running';
      } else {
        await loadDeviceState(machine.#qmp!, folder, from.deviceState);
        machine.#state = 'paused';
      }
      machine.#startedMs = performance.now() - machine.#startMs;
      await machine.#record();
      return machine;
    } catch (error) {
      process.kill();
      await machine.ended;
      throw asGridError(error, `${description.name} did not start`, 'vm-failed');
    }
  }

  /** The machine that an earlier process left running in the folder; undefined when there is none. */
  static async adopt(folderPath: string, log: (line: string) => void): Promise<QemuMachine | undefined> {
    const folder = path.resolve(folderPath);
    const pid = await runningPid(folder);
    if (pid === undefined) return undefined;
    const { description, accelerator, ...facts } = await readMachineRecord(folder);
    const machine = new QemuMachine({ accelerator, description, folder, log }, adoptProcess(pid), facts);
    await machine.#connect();
    const { status } = (await machine.#qmp!.execute('query-status')) as { status: string };
    const isReady = facts.readyMs !== undefined || description.readyText === undefined;
    if (status !== 'running') machine.#state = 'paused';
    // One that was resumed says no such line again.
    else if (isReady || facts.memoryImage !== undefined) machine.#state = 'running';
    else machine.#watchConsole();
    log(`${description.name}: pid ${pid} goes on`);
    return machine;
  }

  status(): MachineStatus {
    const reason = this.#reason ?? this.#diskFull.reason;
    return {
      state: this.#state,
      ...(this.#isAlive() ? { pid: this.#process.pid } : {}),
      accelerator: this.#options.accelerator,
      ...(reason === undefined ? {} : { reason }),
      ...(this.#shutdown === GUEST_RESET && this.#state === 'stopped' && !this.#stopping.asked
        ? { reboots: true as const }
        : {}),
      ...(this.#startedMs === undefined ? {} : { startedMs: this.#startedMs }),
      ...(this.#readyMs === undefined ? {} : { readyMs: this.#readyMs }),
    };
  }

  ready(timeoutMs: number): Promise<void> {
    const { name, readyText } = this.#options.description;
    const { consoleLog, ended } = this;
    const guest = { name, readyText, watch: this.#console, consoleLog, ended };
    return guestReady({ ...guest, isReady: () => this.#readyMs !== undefined }, timeoutMs);
  }

  stop(graceMs: number): Promise<void> {
    return this.#stopping.stop(graceMs, (ms) => this.#stop(ms));
  }

  /** A QMP command, for what the contract has no word for. Throws vm-failed, timeout, closed. */
  execute(command: string, commandArguments?: Record<string, unknown>): Promise<unknown> {
    if (this.#qmp === undefined)
      throw new GridError('closed', `${this.#options.description.name} is not running`);
    return this.#qmp.execute(command, commandArguments);
  }

  get description(): MachineDescription {
    return this.#description;
  }

  async attach(disk: MachineDisk & { readonly id: string }): Promise<void> {
    await this.#change((qmp) => attachDisk(qmp, this.#description, disk));
  }

  async detach(id: string, timeoutMs: number): Promise<void> {
    await this.#change((qmp) => detachDisk(qmp, this.#departures, this.#description, id, timeoutMs));
  }

  async setLimits(limits: IoLimits): Promise<void> {
    checkLimits(this.#description.name, limits);
    await this.#change(async (qmp) => {
      await limitDisks(qmp, this.#description, limits);
      return { ...this.#description, limits };
    });
  }

  async #change(work: (qmp: QmpClient) => Promise<MachineDescription>): Promise<void> {
    if (this.#qmp === undefined) throw new GridError('closed', `${this.#description.name} is not running`);
    this.#description = await work(this.#qmp);
    await this.#record();
  }

  async capture(files: MachineFiles): Promise<MachineCapture> {
    const { folder, accelerator } = this.#options;
    const description = this.#description;
    const before = this.#state;
    try {
      if (before === 'running') await this.#quiesce();
      await this.execute('stop');
      this.#state = 'paused';
      await saveDeviceState(this.#qmp!, folder, files.deviceState);
      return {
        compatibility: await compatibilityOf(this.#qmp!, accelerator),
        memoryWrittenBytes: await copyMemory(this.#process.pid, description, files.memory, this.#memoryImage),
      };
    } catch (error) {
      if (this.#isAlive() && before !== 'paused') {
        await this.proceed();
        this.#state = before;
      }
      throw asGridError(error, `${description.name} cannot be captured`, 'vm-failed');
    }
  }

  async proceed(): Promise<void> {
    await this.execute('cont');
    this.#state = 'running';
    // Also of a machine that was resumed: it was captured with its file systems held still.
    if (this.#description.guestAgent === true) void this.#tellAgent('guest-fsfreeze-thaw');
  }

  async #quiesce(): Promise<void> {
    if (this.#description.guestAgent === true) await this.#tellAgent('guest-fsfreeze-freeze');
  }

  forward(guestPort: number) {
    return forwardPort(this, guestPort);
  }

  askAgent(call: string, args: object, timeoutMs: number): Promise<unknown> {
    return askGuestAgent(this.#options.folder, call, timeoutMs, args);
  }

  /** Where the agent does not answer, the guest is like one that has none. */
  async #tellAgent(command: string): Promise<void> {
    try {
      const answer = await askGuestAgent(this.#options.folder, command, AGENT_TIMEOUT_MS);
      this.#options.log(`${this.#description.name}: ${command}: ${JSON.stringify(answer)}`);
    } catch (error) {
      this.#options.log(`${this.#description.name}: ${String(error)}`);
    }
  }

  #isAlive(): boolean {
    return this.#process.exit === undefined;
  }

  #watchConsole(): void {
    const { readyText } = this.#options.description;
    if (readyText === undefined) return;
    const console = new ConsoleWatch(this.consoleLog, readyText);
    this.#console = console;
    void console.outcome.then((outcome) => {
      if (outcome === 'ready') this.#becomeReady();
      return console.close();
    });
  }

  #becomeReady(): void {
    this.#readyMs = performance.now() - this.#startMs;
    if (this.#state === 'starting') this.#state = 'running';
    this.#options.log(`${this.#options.description.name}: ready after ${Math.round(this.#readyMs)} ms`);
    // While it starts, `start` writes it.
    if (this.#startedMs !== undefined) void this.#record();
  }

  /** Tells a later process what it needs to adopt this machine. */
  async #record(): Promise<void> {
    const { folder, accelerator } = this.#options;
    const description = this.#description;
    try {
      await writeMachineRecord(folder, {
        schema: 1,
        description,
        accelerator,
        ...(this.#memoryImage === undefined ? {} : { memoryImage: this.#memoryImage }),
        ...(this.#startedMs === undefined ? {} : { startedMs: this.#startedMs }),
        ...(this.#readyMs === undefined ? {} : { readyMs: this.#readyMs }),
      });
      // It ended meanwhile, and its files were removed.
      if (!this.#isAlive()) await removeRunFiles(folder);
    } catch (error) {
      this.#options.log(`${description.name}: ${String(error)}`);
    }
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
        if (errno === undefined || !NOT_THERE.has(errno)) {
          throw this.#isAlive() ? error : await this.#startFailure();
        }
        await sleep(CONNECT_INTERVAL_MS);
      }
    }
  }

  async #startFailure(): Promise<GridError> {
    const { reason } = await this.ended;
    return new GridError(
      'vm-failed',
      `${this.#options.description.name} did not start: ${reason ?? 'no reason given'}`,
    );
  }

  #onEvent(event: QmpEvent): void {
    this.#diskFull.heard(event);
    if (event.event === 'SHUTDOWN') this.#shutdown = String(event.data['reason']);
    if (event.event === 'DEVICE_DELETED') this.#departures.gone(String(event.data['device']));
  }

  /** QMP broke: QEMU is ending, so its exit says why. */
  async #describeLoss(): Promise<string> {
    this.#process.look();
    if (this.#isAlive()) await within(LAST_EVENTS_MS, this.#process.exited);
    const words = await qemuWords(this.#options.folder);
    return [this.#describeExit(...(this.#process.exit ?? [null, null])), words].filter(Boolean).join(': ');
  }

  #describeExit(code: number | null, signal: NodeJS.Signals | null): string {
    // What the kernel does to a program that touches a page which its file cannot give.
    if (signal === 'SIGBUS' && this.#memoryImage !== undefined)
      return `a page of its memory image ${this.#memoryImage} cannot be read (SIGBUS)`;
    if (signal !== null) return `QEMU was killed by ${signal}`;
    return code === null ? 'QEMU ended' : `QEMU ended with status ${code}`;
  }

  async #end(code: number | null, signal: NodeJS.Signals | null): Promise<MachineStatus> {
    const { folder, description, log } = this.#options;
    // Nobody else holds QMP's other end, so it closes now, after its last events.
    if (this.#qmp !== undefined) await within(LAST_EVENTS_MS, this.#qmp.closed);
    this.#qmp?.close();
    await this.#console?.close();
    this.#diskFull.close();
    this.#log.close();
    const asked = this.#stopping.asked && this.#startedMs !== undefined;
    // Nobody hears an adopted process's status; that the guest powered down is heard by QMP.
    const zero = code === 0 || (code === null && signal === null && this.#shutdown !== undefined);
    const clean = zero && this.#shutdown !== 'host-signal' && this.#startedMs !== undefined;
    if (asked || clean) {
      this.#state = 'stopped';
    } else {
      const qemu = await qemuWords(folder);
      const guest = await lastWords(this.consoleLog, CONSOLE_LINES);
      const exit = this.#describeExit(code, signal);
      this.#reason = (qemu === '' ? exit : `${exit}: ${qemu}`) + (guest === '' ? '' : `; console: ${guest}`);
      this.#state = 'failed';
    }
    if (typeof description.network === 'object') await removeTap(description.macAddress);
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
    this.#process.kill();
    if (await this.#endsWithin(KILL_TIMEOUT_MS)) return;
    const { name } = this.#options.description;
    throw new GridError(
      'vm-failed',
      `${name} (pid ${this.#process.pid}) does not end: it waits for a disk that does not answer; see to its mount`,
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
