/**
 * Lanes: as many threads as the host has processors, each of which takes the next unit of work when it has done
 * one. A worker thread that reads, hashes, compresses and writes with synchronous calls needs two messages per
 * unit of several MiB; the same through libuv's pool would need six hops per chunk. Starting a thread takes some
 * 30 ms, so a little work is done in the caller's thread.
 */
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { GridError } from '../core/errors.ts';
import { runJob } from './jobs.ts';
import type { Job, ResultOf } from './jobs.ts';
import type { Answer } from './lane-worker.ts';

/** Beyond this the disk is what is waited for; each lane holds about 10 MiB. */
const LANES_MAX = 16;

/** The worker's file has our own ending: .ts from the source tree, .js from the package. */
const WORKER_FILE = new URL(`./lane-worker${path.extname(import.meta.filename)}`, import.meta.url);

interface Lane {
  run(job: Job): Promise<unknown>;
  close(): Promise<void>;
}

function inlineLane(): Lane {
  return {
    run: async (job) => {
      // Lets timers, signals and other work in between units.
      await new Promise(setImmediate);
      return runJob(job);
    },
    close: async () => {},
  };
}

function threadLane(): Lane {
  // Flags of the main program (--input-type, --cpu-prof …) are not the worker's.
  const worker = new Worker(WORKER_FILE, { execArgv: [] });
  let waiting: { resolve: (result: unknown) => void; reject: (error: Error) => void } | undefined;
  let failure: Error | undefined;
  const fail = (error: Error) => {
    failure ??= error;
    waiting?.reject(failure);
    waiting = undefined;
  };
  worker.on('message', (answer: Answer) => {
    const { resolve, reject } = waiting!;
    waiting = undefined;
    if ('code' in answer) reject(new GridError(answer.code, answer.message));
    else resolve(answer.result);
  });
  worker.on('error', (cause) => fail(new GridError('bug', 'a worker thread of the store died', { cause })));
  worker.on('exit', () => fail(new GridError('bug', 'a worker thread of the store ended')));
  return {
    run: (job) =>
      new Promise((resolve, reject) => {
        if (failure) return reject(failure);
        waiting = { resolve, reject };
        // Bytes go over as they are: the caller has no use for them any more.
        const bytes = job.type === 'pack' && job.plain ? [job.plain.buffer as ArrayBuffer] : [];
        worker.postMessage(job, bytes);
      }),
    close: async () => void (await worker.terminate()),
  };
}

export class Lanes {
  readonly #lanes: Lane[];

  /** `threads` false: everything in the caller's thread. */
  constructor(threads: boolean) {
    this.#lanes = threads
      ? Array.from({ length: Math.min(LANES_MAX, availableParallelism()) }, threadLane)
      : [inlineLane()];
  }

  /**
   * Runs all jobs, several at a time, in order of their start; `done` gets each result and may make its lane wait.
   * On the first failure or abort no more are started; rejects when the lanes are idle again. A job may be a promise:
   * its lane waits for it.
   */
  async runAll<J extends Job>(
    jobs: Iterable<J | Promise<J>>,
    signal: AbortSignal | undefined,
    done: (result: ResultOf<J>, job: J) => Promise<void> | void,
  ): Promise<void> {
    const iterator = jobs[Symbol.iterator]();
    let failure: unknown;
    const drive = async (lane: Lane) => {
      while (failure === undefined) {
        const next = iterator.next();
        if (next.done) return;
        try {
          if (signal?.aborted) throw new GridError('closed', 'cancelled');
          const job = await next.value;
          await done((await lane.run(job)) as ResultOf<J>, job);
        } catch (error) {
          failure ??= error;
        }
      }
    };
    await Promise.all(this.#lanes.map(drive));
    if (failure !== undefined) throw failure;
  }

  async close(): Promise<void> {
    await Promise.all(this.#lanes.map((lane) => lane.close()));
  }
}
