/** A thread of turns.test.ts: takes turns as a worker of a mount does, and waits where it is told to. */
import { workerData } from 'node:worker_threads';
import { Turns } from '../../../src/frontend/fuse/turns.ts';

/** i32 words: how many are at work, most of them at once, 1 while whoever is at work is to wait, and rounds of each. */
export const AT_WORK = 0;
export const MOST = 1;
export const GATE = 2;
export const ENDED = 3;
export const ROUNDS = 4;

interface Data {
  turns: SharedArrayBuffer;
  words: SharedArrayBuffer;
  index: number;
  awakeMax: number;
}

if (workerData !== null && typeof workerData === 'object' && 'turns' in workerData) {
  const { turns: shared, words: sharedWords, index, awakeMax } = workerData as Data;
  const turns = new Turns(shared, awakeMax);
  const words = new Int32Array(sharedWords);
  while (Atomics.load(words, ENDED) === 0) {
    turns.rest(60_000, () => undefined);
    const atWork = Atomics.add(words, AT_WORK, 1) + 1;
    if (atWork > Atomics.load(words, MOST)) Atomics.store(words, MOST, atWork);
    Atomics.sub(words, AT_WORK, 1);
    if (Atomics.load(words, GATE) === 1) {
      turns.leave();
      Atomics.wait(words, GATE, 1);
      turns.return();
    }
    Atomics.add(words, ROUNDS + index, 1);
  }
  turns.end();
}
