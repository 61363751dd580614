/**
 * Snapshots: what is read of one is the disk of its moment, whatever is written, trimmed and filled meanwhile.
 *
 * Guarded lines, each tried by taking it out: clone.ts #put, layer.beforeChange; layer.ts #trimStep, beforeChange;
 * direct-io.ts write, the look at `budget[2]` (a thread goes on writing past the moment); layer.ts snapshot, the await
 * of `quiet`.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { Worker } from 'node:worker_threads';
import { GridError } from '../../src/core/errors.ts';
import { QuietPoints } from '../../src/core/quiet.ts';
import { changedUnitsOf, createLayerOver, openChain, openClone, zeroImage } from '../../src/image/index.ts';
import type { Clone } from '../../src/image/index.ts';
import { hasCode } from '../suites/image.ts';
import { FileImage, patternedContent, seededRandom } from './file-image.ts';
import type { SnapshotWriter } from './snapshot-worker.ts';

const BASE = '7'.repeat(64);
const BLOCK = 4096;
const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-snapshot-'));
const nobody = () => Promise.resolve();
let made = 0;

after(() => rmSync(folder, { recursive: true }));

const newLayer = () => path.join(folder, `layer${++made}`);

async function readAll(clone: Clone): Promise<Buffer> {
  const all = Buffer.alloc(clone.sizeBytes, 0xee);
  await clone.read(all, 0);
  return all;
}

/** One random change of the disk and of what is expected of it. */
async function change(clone: Clone, content: Buffer, random: () => number): Promise<void> {
  const whole = random() < 0.5;
  const unit = whole ? BLOCK : 1;
  const offset = Math.floor((random() * clone.sizeBytes) / unit) * unit;
  const length = Math.min(clone.sizeBytes - offset, (1 + Math.floor(random() * 6 * (BLOCK / unit))) * unit);
  if (random() < 0.25) {
    await clone.trim(offset, length);
    content.fill(0, offset, offset + length);
  } else {
    const bytes = Buffer.alloc(length, 1 + Math.floor(random() * 255));
    await clone.write(bytes, offset);
    bytes.copy(content, offset);
  }
}

test('a snapshot reads as the disk of its moment while the disk is changed and filled; the disk is as if there were none', async () => {
  for (let seed = 1; seed <= 25; seed++) {
    const random = seededRandom(seed);
    const size = 60 * BLOCK + Math.floor(random() * BLOCK);
    const baseContent = patternedContent(50 * BLOCK, seed);
    const content = Buffer.concat([baseContent, Buffer.alloc(size - baseContent.length)]);
    const layers: string[] = [];
    let clone: Clone | undefined;
    for (let depth = 0; depth < 1 + (seed % 3); depth++) {
      if (clone) {
        await clone.flush();
        await clone.close();
      }
      const layer = newLayer();
      await createLayerOver(layer, { base: BASE, layers }, size);
      layers.push(layer);
      const base = new FileImage(path.join(folder, `base${made}`), baseContent, (unit) => unit % 3 === 1, 0);
      clone = openClone(base, await openChain({ base: BASE, layers }));
      for (let i = 0; i < 12; i++) await change(clone, content, random);
    }
    assert.ok(clone);
    const then = Buffer.from(content);
    const snapshot = await clone.snapshot(nobody);
    const units = [...changedUnitsOf(snapshot.states, 4 * BLOCK)];
    const read = Buffer.concat([baseContent, Buffer.alloc(size - baseContent.length)]);
    const filling = seed % 4 === 0 ? clone.fillUp({}) : undefined;
    for (const unit of units.toSorted(() => random() - 0.5)) {
      const disk = clone;
      const under = (async () => {
        for (let i = 0; i < 3; i++) await change(disk, content, random);
      })();
      const offset = unit * 4 * BLOCK;
      const target = Buffer.alloc(Math.min(4 * BLOCK, size - offset), 0xee);
      await snapshot.readOnce(target, offset);
      target.copy(read, offset);
      await under;
    }
    await filling;
    assert.ok(read.equals(then), `seed ${seed}: the snapshot is another disk than that of its moment`);
    snapshot.close();
    assert.ok((await readAll(clone)).equals(content), `seed ${seed}: the disk itself is wrong`);
    assert.deepEqual(readdirSync(layers.at(-1)!).toSorted(), ['data', 'map', 'map.durable']);
    await clone.close();
  }
});

test('there is one snapshot at a time, each block of it is read once, and a closed one is refused', async () => {
  const layer = newLayer();
  await createLayerOver(layer, { base: BASE, layers: [] }, 10 * BLOCK);
  const clone = openClone(zeroImage(), await openChain({ base: BASE, layers: [layer] }));
  await clone.write(Buffer.alloc(2 * BLOCK, 5), 0);
  const first = await clone.snapshot(nobody);
  await assert.rejects(clone.snapshot(nobody), hasCode('in-use'));
  const target = Buffer.alloc(BLOCK);
  await first.readOnce(target, 0);
  await assert.rejects(first.readOnce(target, 0), hasCode('bug'));
  first.close();
  await assert.rejects(first.readOnce(target, BLOCK), hasCode('closed'));
  await assert.rejects(
    clone.snapshot(() => Promise.reject(new GridError('timeout', 'never quiet'))),
    hasCode('timeout'),
  );
  const second = await clone.snapshot(nobody);
  second.close();
  await clone.close();
});

test('threads that write directly are cut at one moment: a later write is never in without the earlier one', async () => {
  const NEW = 4000;
  for (let round = 0; round < 6; round++) {
    const layer = newLayer();
    await createLayerOver(layer, { base: BASE, layers: [] }, (NEW + 100) * BLOCK);
    const clone = openClone(zeroImage(), await openChain({ base: BASE, layers: [layer] }));
    const quiet = new QuietPoints();
    // In both orders of their numbers: the states are copied from the lowest to the highest.
    const [a, b] = round % 2 === 0 ? [1, NEW + 50] : [NEW + 50, 1];
    const shared = new SharedArrayBuffer(8);
    const view = new Int32Array(shared);
    const slot = quiet.register();
    const data: SnapshotWriter = {
      ...{ map: clone.direct, counters: quiet.counters, slot, shared, a, b, firstNew: 20, newBlocks: NEW },
    };
    const worker = new Worker(new URL('./snapshot-worker.ts', import.meta.url), { workerData: data });
    const ended = new Promise((resolve) => worker.once('exit', resolve));
    while (Atomics.load(view, 1) < 10 * (round + 1)) await new Promise(setImmediate);

    const acknowledged = Atomics.load(view, 1);
    const snapshot = await clone.snapshot(() => quiet.quiet());
    const block = Buffer.alloc(BLOCK);
    const valueOf = async (number: number) => {
      await snapshot.readOnce(block, number * BLOCK);
      const value = block.readUInt32LE(0);
      assert.ok(block.equals(Buffer.alloc(BLOCK, block.subarray(0, 4))), 'half of a write');
      return value;
    };
    const [valueA, valueB] = [await valueOf(a), await valueOf(b)];
    assert.ok(valueB >= acknowledged, `${acknowledged} was acknowledged, ${valueB} is in`);
    assert.ok(valueA === valueB || valueA === valueB + 1, `A is ${valueA} and B ${valueB}`);
    let filled = 0;
    while ((await valueOf(20 + filled)) === filled + 1) filled++;
    assert.ok(filled === valueB || filled === valueB - 1, `${filled} new blocks and B ${valueB}`);
    for (let i = filled + 1; i < NEW; i += 97) assert.equal(await valueOf(20 + i), 0, 'a hole in the past');
    snapshot.close();

    Atomics.store(view, 0, 1);
    await ended;
    await clone.close();
  }
});
