/**
 * A thread that reads an image as a mount's workers do, hashing what was not checked since the start, until all was
 * read `rounds` times. Says which units it could not read itself, and how many reads gave wrong bytes.
 */
import { readFileSync } from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import { DirectFile } from '../../src/core/direct-io.ts';
import type { DirectMap } from '../../src/core/image.ts';
import { QuietThread } from '../../src/core/quiet.ts';

const { map, counters, slot, rawPath, rounds } = workerData as {
  map: DirectMap;
  counters: SharedArrayBuffer;
  slot: number;
  rawPath: string;
  rounds: number;
};
const raw = readFileSync(rawPath);
const { unitBytes } = map.base;
const file = new DirectFile(map, { verifies: true });
const thread = new QuietThread(counters, slot);
const elsewhere = new Set<number>();
let wrong = 0;
let reads = 0;
for (let round = 0; round < rounds; round++) {
  for (let start = 0; start < map.sizeBytes; start += unitBytes) {
    // Its last bytes: a check that hashes less than the whole unit would not see them.
    const end = Math.min(start + unitBytes, map.sizeBytes);
    const target = Buffer.alloc(Math.min(512, end - start));
    thread.enter();
    const here = file.read(target, end - target.length);
    thread.leave();
    if (!here) elsewhere.add(start / unitBytes);
    else {
      reads++;
      if (!target.equals(raw.subarray(end - target.length, end))) wrong++;
    }
  }
}
const port = parentPort!;
port.postMessage({ elsewhere: [...elsewhere], wrong, reads });
