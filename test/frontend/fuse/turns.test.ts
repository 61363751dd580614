/** Who of a mount's workers rests: real threads on the real words. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { newTurns } from '../../../src/frontend/fuse/turns.ts';
import { ENDED, GATE, MOST, ROUNDS } from './turns-worker.ts';

const THREADS = 4;

async function eventually(what: string, holds: () => boolean): Promise<void> {
  const endMs = performance.now() + 20_000;
  while (!holds()) {
    assert.ok(performance.now() < endMs, what);
    await sleep(2);
  }
}

// turns.ts: without the token of `leave` the others rest for ever; without `end` they do at the end.
test('two of four workers are awake, the others stand in while these wait, and all end', async () => {
  const turns = newTurns(THREADS);
  const shared = new SharedArrayBuffer((ROUNDS + THREADS) * Int32Array.BYTES_PER_ELEMENT);
  const words = new Int32Array(shared);
  const rounds = () => Array.from(words.subarray(ROUNDS));
  const threads = Array.from({ length: THREADS }, (_, index) => {
    const workerData = { turns, words: shared, index, awakeMax: 2 };
    return new Worker(path.join(import.meta.dirname, 'turns-worker.ts'), { workerData });
  });
  const exits = Promise.all(threads.map((thread) => once(thread, 'exit')));
  try {
    await eventually('two rest', () => new Int32Array(turns)[1] === 2);
    for (let again = 0; again < 20; again++) {
      const before = rounds();
      await sleep(5);
      const moved = rounds().filter((count, index) => count !== before[index]).length;
      assert.ok(moved <= 2, `${moved} of the workers are awake`);
      // All of them come to the gate: each that waits wakes one that rests.
      Atomics.store(words, GATE, 1);
      // A token that was left for one who was leaving his rest already counts as awake until the next rests.
      await eventually('all wait', () => {
        const [awake, resting, tokens] = new Int32Array(turns);
        return resting === 0 && awake === tokens;
      });
      Atomics.store(words, GATE, 0);
      Atomics.notify(words, GATE);
      await eventually('two rest again', () => new Int32Array(turns)[1] === 2);
    }
    Atomics.store(words, ENDED, 1);
    await Promise.race([exits, sleep(20_000).then(() => assert.fail('somebody rests for ever'))]);
    assert.ok(words[MOST]! >= 1);
  } finally {
    for (const thread of threads) await thread.terminate();
  }
});
