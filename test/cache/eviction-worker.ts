/**
 * A thread that reads an image as frontends' workers do (state, then pread, within a quiet point's bounds) and
 * compares, until it is told to end. Slow now and then between the two, as a thread that loses its processor is, and without
 * marks of use, which would keep from eviction just what it reads.
 */
import { readFileSync, readSync } from 'node:fs';
import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import { UNIT_PRESENT } from '../../src/core/image.ts';
import type { DirectMap } from '../../src/core/image.ts';
import { QuietThread } from '../../src/core/quiet.ts';
import { randomNumbers } from '../suites/fixtures.ts';

const { map, counters, slot, rawPath, seed } = workerData as {
  map: DirectMap;
  counters: SharedArrayBuffer;
  slot: number;
  rawPath: string;
  seed: number;
};
const { fd, unitBytes } = map.base;
const raw = readFileSync(rawPath);
const states = new Uint8Array(map.base.states);
const thread = new QuietThread(counters, slot);
const next = randomNumbers(seed);
const nap = new Int32Array(new SharedArrayBuffer(4));
const target = Buffer.alloc(4096);
const port = parentPort!;
let reads = 0;
let wrong = 0;
port.postMessage('ready');
while (receiveMessageOnPort(port) === undefined) {
  const unit = next() % (states.length - 1);
  thread.enter();
  if (Atomics.load(states, unit) === UNIT_PRESENT) {
    if (next() % 4 === 0) Atomics.wait(nap, 0, 0, 20);
    readSync(fd, target, 0, target.length, unit * unitBytes);
    reads++;
    if (!target.equals(raw.subarray(unit * unitBytes, unit * unitBytes + target.length))) wrong++;
  }
  thread.leave();
}
port.postMessage({ reads, wrong });
