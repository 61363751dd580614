/**
 * Several worker threads and the main thread on one clone: whole blocks, parts of blocks, trims, reads and flushes
 * over the same few blocks, checked against the log of all of them (race-log.ts), and the map file against the
 * states.
 *
 * Guarded lines, each tried by taking it out: direct-io.ts #release, `if (this.#claims[i] === 1)` (claims of others
 * are undone); direct-io.ts write, claimBlock; layer.ts #trimStep, the states set to ZERO before punchHole (the
 * hole swallows a write). Windows of nanoseconds have tests of their own in test/core/direct-io.test.ts.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { createLayer, openClone, openLayer } from '../../src/image/index.ts';
import { FileImage, seededRandom } from './file-image.ts';
import { CELL_BYTES, checkLog, randomRange, stampedBytes, tick } from './race-log.ts';
import type { LoggedOperation, RaceData } from './race-log.ts';

const BASE = 'd'.repeat(64);
const BLOCKS = 10;
const CELLS = BLOCKS * 4;
const WORKERS = 3;
const long = process.env['GRIDVFS_LONG'] === '1';
const ROUNDS = long ? 400 : 15;
/** Of the main thread in one round; the workers go on as long as it does. */
const STEPS = 300;
const WORKER_STEPS_MAX = 3000;

type FromWorker =
  | { kind: 'write'; source: Uint8Array; offsetBytes: number }
  | { kind: 'done'; log: LoggedOperation[]; asked: number };

async function oneRound(folder: string, seed: number): Promise<{ operations: number; asked: number }> {
  const baseStamps = Array.from({ length: CELLS }, (_, cell) => (cell % 8 < 4 ? 900_000_000 + cell : 0));
  const base = new FileImage(
    path.join(folder, 'base'),
    Buffer.concat(baseStamps.map((stamp) => stampedBytes(1, stamp))),
    undefined,
    0,
  );
  const layerFolder = path.join(folder, `layer-${seed}`);
  await createLayer(layerFolder, { baseDigest: BASE, sizeBytes: base.sizeBytes });
  const layer = await openLayer(layerFolder, { baseDigest: BASE });
  const clone = openClone(base, layer);
  const clock = new SharedArrayBuffer(8);
  const ticks = new Int32Array(clock);
  ticks[1] = WORKERS;
  const log: LoggedOperation[] = [];
  let operations = 0;
  let asked = 0;

  const workers = Array.from({ length: WORKERS }, (_, i) => {
    const data: RaceData = {
      clock,
      seed: seed * 100 + i,
      stepsMax: WORKER_STEPS_MAX,
      firstStamp: 1 + i * 1_000_000,
    };
    const worker = new Worker(new URL('./race-worker.ts', import.meta.url), {
      workerData: { ...data, map: clone.direct },
    });
    return new Promise<void>((resolve, reject) => {
      worker.on('error', reject);
      worker.on('exit', () => resolve());
      worker.on('message', (message: FromWorker) => {
        if (message.kind === 'done') {
          operations += message.log.length;
          asked += message.asked;
          for (const operation of message.log) log.push(operation);
          return;
        }
        clone
          .write(message.source, message.offsetBytes)
          .then(() => worker.postMessage('written', []), reject);
      });
    });
  });

  const random = seededRandom(seed);
  const busy = (async () => {
    while (Atomics.load(ticks, 1) > 0) await nextTurn();
    for (let stamp = 100_000_000; stamp < 100_000_000 + STEPS; stamp++) {
      const { firstCell, cells } = randomRange(random, CELLS);
      const what = random();
      const start = tick(ticks);
      if (what < 0.6) await clone.trim(firstCell * CELL_BYTES, cells * CELL_BYTES);
      else if (what < 0.9) await clone.write(stampedBytes(cells, stamp), firstCell * CELL_BYTES);
      else await clone.flush();
      if (what < 0.9) {
        log.push({
          kind: 'write',
          firstCell,
          cells,
          stamp: what < 0.6 ? 0 : stamp,
          start,
          end: tick(ticks),
        });
      }
      if (what > 0.5) await nextTurn();
    }
    Atomics.store(ticks, 1, -1);
  })();
  await Promise.all([...workers, busy]);

  const content = Buffer.alloc(clone.sizeBytes);
  await clone.read(content, 0);
  checkLog(
    log,
    baseStamps,
    Array.from({ length: CELLS }, (_, cell) => content.readUInt32LE(cell * CELL_BYTES)),
  );
  for (let at = 0; at < content.length; at += CELL_BYTES) {
    const cell = content.subarray(at, at + CELL_BYTES);
    assert.ok(cell.equals(stampedBytes(1, cell.readUInt32LE(0))), `cell ${at / CELL_BYTES} is torn`);
  }
  const states = Buffer.from(new Uint8Array(layer.direct.states));
  const map = readFileSync(path.join(layerFolder, 'map')).subarray(layer.direct.mapOffsetBytes);
  assert.deepEqual(map, states, 'the working map is what the states say');
  await clone.flush();
  const durable = readFileSync(path.join(layerFolder, 'map.durable')).subarray(layer.direct.mapOffsetBytes);
  assert.deepEqual(durable, states, 'the durable map is what the states say after a flush');
  await clone.close();
  return { operations, asked };
}

test(`${WORKERS} threads and the main thread writing, trimming and reading the same blocks leave nothing unexplained`, async (t) => {
  const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-race-'));
  t.after(() => rmSync(folder, { recursive: true }));
  const seed = Number(process.env['GRIDVFS_SEED'] ?? Math.floor(Math.random() * 2 ** 24));
  t.diagnostic(`seed ${seed} (GRIDVFS_SEED)`);
  const total = { operations: 0, asked: 0 };
  for (let round = 0; round < ROUNDS; round++) {
    const { operations, asked } = await oneRound(folder, seed + round);
    total.operations += operations;
    total.asked += asked;
  }
  t.diagnostic(
    `${ROUNDS} rounds, ${total.operations} operations of the workers, ${total.asked} went to the main thread`,
  );
  assert.ok(total.asked > 0, 'the slow path was met');
});
