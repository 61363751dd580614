/**
 * The main thread's side of the device: the session's descriptor, a clone of it for each further worker, and the
 * workers themselves. A reply goes to the descriptor that its request came from, or the kernel does not find it.
 *
 * Order of a life: `ready` workers wait; the mount is made; `serve` gives each its descriptor; when the mount is
 * gone every worker ends by itself, and only then are the descriptors closed. A thread that is blocked in the
 * device cannot be stopped from JavaScript in any other way, and Node waits for it when the process exits.
 */
import { closeSync, openSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { errnoOf, GridError } from '../../core/errors.ts';
import { ioctl } from '../../core/linux.ts';
import type { QuietPoints } from '../../core/quiet.ts';
import { newEager } from './eager.ts';
import { newTurns } from './turns.ts';
import { COUNTERS, send } from './worker.ts';
import type { FromWorker, ToWorker, WorkerData } from './worker.ts';

const FUSE_DEV_IOC_CLONE = 0x8004e500;

/** Called with a request and the function that answers it. */
export type OnRequest = (bytes: Buffer, reply: (bytes: Buffer) => void) => void;

interface Member {
  readonly worker: Worker;
  readonly counters: Float64Array;
  ended: boolean;
}

export class DeviceWorkers {
  readonly #members: readonly Member[];
  readonly #descriptors: number[] = [];
  readonly #log: (message: string) => void;
  /** Resolves when every thread is gone. */
  readonly gone: Promise<void>;
  #onFailure: ((error: GridError) => void) | undefined;
  readonly #running: Int32Array;
  /** What was told before 'start', which every worker hears first. */
  #early: ToWorker[] | undefined = [];
  #open = true;

  private constructor(
    members: readonly Member[],
    running: Int32Array,
    gone: Promise<void>,
    log: (message: string) => void,
  ) {
    this.#members = members;
    this.#running = running;
    this.gone = gone;
    this.#log = log;
  }

  /** Starts `count` threads; resolves when all are loaded and wait for their descriptors. */
  static async start(
    count: number,
    quiet: QuietPoints,
    log: (message: string) => void,
  ): Promise<DeviceWorkers> {
    const file = new URL(`./worker${path.extname(import.meta.url)}`, import.meta.url);
    const fuseRunning = new SharedArrayBuffer(Int32Array.BYTES_PER_ELEMENT);
    const fuseTurns = newTurns(count);
    const fuseEager = newEager();
    const members = Array.from({ length: count }, (_, index): Member => {
      const fuseCounters = new SharedArrayBuffer(COUNTERS * Float64Array.BYTES_PER_ELEMENT);
      const quietSlot = quiet.register();
      const workerData: WorkerData = {
        fuseCounters,
        fuseRunning,
        fuseTurns,
        fuseEager,
        awakeMax: availableParallelism(),
        quietCounters: quiet.counters,
        quietSlot,
      };
      const worker = new Worker(file, { name: `fuse-${index}`, workerData });
      worker.once('exit', () => quiet.release(quietSlot));
      return { worker, counters: new Float64Array(fuseCounters), ended: false };
    });
    const exits = members.map(({ worker }) => new Promise((resolve) => worker.once('exit', resolve)));
    const gone = Promise.all(exits).then(() => undefined);
    const self = new DeviceWorkers(members, new Int32Array(fuseRunning), gone, log);
    const loaded = members.map(({ worker }) => {
      return new Promise((resolve, reject) => {
        worker.once('message', resolve);
        worker.once('error', reject);
      });
    });
    try {
      await Promise.all(loaded);
    } catch (cause) {
      await self.terminate();
      throw new GridError('bug', `a FUSE worker thread did not start: ${String(cause)}`, { cause });
    }
    return self;
  }

  /**
   * Gives the workers the session's descriptor and clones of it, which belong to this object from here on. `clones`:
   * open devices to make clones of, or that are clones already; otherwise some of its own.
   */
  serve(
    sessionFd: number,
    clones: readonly number[] | undefined,
    onRequest: OnRequest,
    onFailure: (error: GridError) => void,
  ): void {
    this.#onFailure = onFailure;
    this.#descriptors.push(sessionFd);
    for (let index = 0; this.#descriptors.length < this.#members.length; index++) {
      const fd = clones?.[index] ?? openSync('/dev/fuse', 'r+');
      this.#descriptors.push(fd);
      cloneDevice(fd, sessionFd, clones !== undefined);
    }
    Atomics.store(this.#running, 0, this.#members.length);
    for (const [index, member] of this.#members.entries()) {
      const fd = this.#descriptors[index]!;
      const reply = (bytes: Buffer) => {
        // A late answer must not go to whatever has the number by now.
        if (!this.#open) return;
        const failure = send(fd, bytes, bytes.length);
        if (failure !== undefined) this.#log(failure);
      };
      member.worker.on('message', (message: FromWorker) => {
        if (message instanceof Uint8Array) {
          onRequest(Buffer.from(message.buffer, message.byteOffset, message.byteLength), reply);
        } else if (message.kind === 'ended') member.ended = true;
        else if (message.kind === 'log') this.#log(message.message);
      });
      member.worker.on('error', (cause) => this.#fail(`it threw ${String(cause)}`, cause));
      member.worker.on('exit', () => {
        if (!member.ended) this.#fail('it ended while the device was open', undefined);
      });
      post(member, { kind: 'start', fd });
      for (const message of this.#early ?? []) post(member, message);
    }
    this.#early = undefined;
  }

  #fail(why: string, cause: unknown): void {
    this.#onFailure?.(new GridError('bug', `a FUSE worker thread failed: ${why}`, { cause }));
    this.#onFailure = undefined;
  }

  broadcast(message: ToWorker): void {
    if (this.#early) this.#early.push(message);
    else for (const member of this.#members) post(member, message);
  }

  /** A counter summed over all workers. */
  sum(counter: number): number {
    return this.#members.reduce((sum, { counters }) => sum + counters[counter]!, 0);
  }

  /** Ends threads that were never given a descriptor, or whose device is gone. */
  async terminate(): Promise<void> {
    await Promise.all(this.#members.map(({ worker }) => worker.terminate()));
  }

  /** Whether every thread has left the device; blocks for at most `timeoutMs`. */
  haveLeft(timeoutMs: number): boolean {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const running = Atomics.load(this.#running, 0);
      const leftMs = deadline - performance.now();
      if (running === 0 || leftMs <= 0) return running === 0;
      Atomics.wait(this.#running, 0, running, leftMs);
    }
  }

  /** Only after `gone`. */
  closeDescriptors(): void {
    this.#open = false;
    for (const fd of this.#descriptors.splice(0)) closeSync(fd);
  }
}

/** A device that the last daemon made a clone of already answers EINVAL. */
export function cloneDevice(fd: number, sessionFd: number, mayBeDone = false): void {
  try {
    ioctl(fd, FUSE_DEV_IOC_CLONE, new Uint8Array(Uint32Array.of(sessionFd).buffer));
  } catch (error) {
    if (!mayBeDone || errnoOf(error) !== 'EINVAL') throw error;
  }
}

function post({ worker }: Member, message: ToWorker): void {
  worker.postMessage(message, []);
}
