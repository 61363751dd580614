/** A writer and reader of race.test.ts: random operations through `DirectFile`, the rest asked of the main thread. */
import { parentPort, workerData } from 'node:worker_threads';
import { DirectFile } from '../../src/core/direct-io.ts';
import type { DirectMap } from '../../src/core/image.ts';
import { seededRandom } from './file-image.ts';
import { CELL_BYTES, randomRange, stampedBytes, tick } from './race-log.ts';
import type { LoggedOperation, RaceData } from './race-log.ts';

const { map, clock, seed, stepsMax, firstStamp } = workerData as RaceData & { map: DirectMap };
const port = parentPort!;
const file = new DirectFile(map);
const random = seededRandom(seed);
const ticks = new Int32Array(clock);
const log: LoggedOperation[] = [];
let answered: (() => void) | undefined;
port.on('message', () => answered?.());

/** What the frontend does with a request that `DirectFile` cannot serve. */
function askMain(source: Buffer, offsetBytes: number): Promise<void> {
  return new Promise((resolve) => {
    answered = resolve;
    port.postMessage({ kind: 'write', source, offsetBytes });
  });
}

// All begin at once: each is done in a few milliseconds.
Atomics.sub(ticks, 1, 1);
while (Atomics.load(ticks, 1) > 0);

let asked = 0;
for (let i = 0; i < stepsMax && Atomics.load(ticks, 1) === 0; i++) {
  // More threads than cores: give way now and then, in the middle of what others do.
  if (random() < 0.3) Atomics.wait(ticks, 1, 0, random() * 0.2);
  const { firstCell, cells } = randomRange(random, map.sizeBytes / CELL_BYTES);
  const start = tick(ticks);
  if (random() < 0.3) {
    const target = Buffer.alloc(CELL_BYTES);
    if (!file.read(target, firstCell * CELL_BYTES)) throw new Error('the base is wholly local here');
    log.push({ kind: 'read', firstCell, cells: 1, stamp: target.readUInt32LE(0), start, end: tick(ticks) });
    continue;
  }
  const stamp = firstStamp + i;
  const source = stampedBytes(cells, stamp);
  if (!file.write(source, firstCell * CELL_BYTES)) {
    asked++;
    await askMain(source, firstCell * CELL_BYTES);
  }
  log.push({ kind: 'write', firstCell, cells, stamp, start, end: tick(ticks) });
}
port.postMessage({ kind: 'done', log, asked });
port.close();
