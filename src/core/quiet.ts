/**
 * Quiet points: how the one who takes something away from worker threads (the cache that evicts a chunk, an image
 * that closes a file) knows that none of them still uses what it saw before. Epoch-based reclamation (Fraser,
 * "Practical lock-freedom", 2004) with one counter per thread: odd while the thread is inside a request.
 *
 * The taker first makes the thing unreachable (clears a presence mark), then awaits `quiet()`, then destroys it. A
 * thread that entered before the mark was cleared holds its counter odd and unchanged until it leaves; one that
 * enters later sees the cleared mark. Costs a thread two atomic adds per request.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { GridError } from './errors.ts';

/** Threads that one process may have; a worker more than this is refused. */
const THREADS_MAX = 256;
/** A request inside the kernel on a slow disk may take long; asking more often than this buys nothing. */
const POLL_MS = 2;

/** In a worker: around every use of shared states and the descriptors behind them. */
export class QuietThread {
  readonly #counters: Int32Array;
  readonly #slot: number;

  constructor(counters: SharedArrayBuffer, slot: number) {
    this.#counters = new Int32Array(counters);
    this.#slot = slot;
  }

  enter(): void {
    Atomics.add(this.#counters, this.#slot, 1);
  }

  leave(): void {
    Atomics.add(this.#counters, this.#slot, 1);
  }
}

/** In the main thread: one per process, shared by every frontend and every image below them. */
export class QuietPoints {
  /** Hand it, with a slot, to each worker, which makes its `QuietThread` of them. */
  readonly counters = new SharedArrayBuffer(THREADS_MAX * Int32Array.BYTES_PER_ELEMENT);
  readonly #view = new Int32Array(this.counters);
  readonly #free = Array.from({ length: THREADS_MAX }, (_, slot) => THREADS_MAX - 1 - slot);

  /** A slot for one thread. */
  register(): number {
    const slot = this.#free.pop();
    if (slot === undefined) throw new GridError('bug', `more than ${THREADS_MAX} worker threads`);
    Atomics.store(this.#view, slot, 0);
    return slot;
  }

  /** Gives the slot of a thread that has ended back. */
  release(slot: number): void {
    Atomics.store(this.#view, slot, 0);
    this.#free.push(slot);
  }

  /** Resolves when every thread has been outside a request at least once since the call. */
  async quiet(): Promise<void> {
    const busy: [slot: number, counter: number][] = [];
    for (let slot = 0; slot < THREADS_MAX; slot++) {
      const counter = Atomics.load(this.#view, slot);
      if (counter % 2 !== 0) busy.push([slot, counter]);
    }
    while (busy.some(([slot, counter]) => Atomics.load(this.#view, slot) === counter)) await sleep(POLL_MS);
  }
}
