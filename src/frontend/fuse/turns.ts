/**
 * How many of a mount's workers ask the device for requests at once: as many as there are processors. The kernel
 * gives a request to the worker that waited longest, so more of them only take turns on the same processors, each
 * with buffers that are in no cache by then. But one that waits for a disk is not there for the others: before it
 * does, it wakes a worker that rests, and the next to be done rests in its place.
 *
 * AWAKE counts those that are in the device or at work without waiting. A token is one more of AWAKE that nobody has
 * taken yet. Whoever is about to rest first says so in RESTING and then looks at AWAKE again; whoever is about to
 * wait first takes itself out of AWAKE and then looks at RESTING: one of both sees the other. A token can be left for
 * one who is not counted out of RESTING yet, and then lies there: it counts as one awake too many until somebody is
 * about to rest and takes it instead.
 */

/** As in mount.ts: a token for everybody. */
const WORKERS_MAX = 64;

const AWAKE = 0;
const RESTING = 1;
const TOKENS = 2;

/** Shared by all workers of a mount. */
export function newTurns(workers: number): SharedArrayBuffer {
  const shared = new SharedArrayBuffer(3 * Int32Array.BYTES_PER_ELEMENT);
  new Int32Array(shared)[AWAKE] = workers;
  return shared;
}

/** A worker's own. */
export class Turns {
  readonly #words: Int32Array;
  readonly #awakeMax: number;

  constructor(shared: SharedArrayBuffer, awakeMax: number) {
    this.#words = new Int32Array(shared);
    this.#awakeMax = awakeMax;
  }

  /** Between two requests. Blocks while enough others are awake; `eachMs`, at least that often, calls `meanwhile`. */
  rest(eachMs: number, meanwhile: () => void): void {
    const words = this.#words;
    if (Atomics.load(words, AWAKE) <= this.#awakeMax || !this.#change(AWAKE, -1, this.#awakeMax + 1)) return;
    Atomics.add(words, RESTING, 1);
    for (;;) {
      // What a worker that waits handed on, or what it could not hand on because it looked too early.
      if (this.#change(TOKENS, -1, 1)) break;
      if (Atomics.load(words, AWAKE) < this.#awakeMax) {
        Atomics.add(words, AWAKE, 1);
        break;
      }
      if (Atomics.wait(words, TOKENS, 0, eachMs) === 'timed-out') meanwhile();
    }
    Atomics.sub(words, RESTING, 1);
  }

  /** This worker is about to wait for something slow. */
  leave(): void {
    const words = this.#words;
    Atomics.sub(words, AWAKE, 1);
    if (Atomics.load(words, RESTING) <= Atomics.load(words, TOKENS)) return;
    Atomics.add(words, AWAKE, 1);
    Atomics.add(words, TOKENS, 1);
    Atomics.notify(words, TOKENS, 1);
  }

  /** It has waited. */
  return(): void {
    Atomics.add(this.#words, AWAKE, 1);
  }

  /** The device is gone: nobody rests any more. */
  end(): void {
    Atomics.add(this.#words, TOKENS, WORKERS_MAX);
    Atomics.notify(this.#words, TOKENS);
  }

  /** Adds `by` while the word is at least `least`; false when it is less. */
  #change(word: number, by: number, least: number): boolean {
    for (;;) {
      const value = Atomics.load(this.#words, word);
      if (value < least) return false;
      if (Atomics.compareExchange(this.#words, word, value, value + by) === value) return true;
    }
  }
}
