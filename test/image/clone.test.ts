/** Clones as Images: over bases with and without local files, of other sizes, and what only clones can do. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { BLOCK_ABSENT } from '../../src/core/image.ts';
import { createLayer, openClone, openLayer } from '../../src/image/index.ts';
import { hasCode, imageSuite } from '../suites/image.ts';
import type { ImageFixture } from '../suites/image.ts';
import { FileImage, patternedContent, withoutDirect } from './file-image.ts';

const BASE = 'b'.repeat(64);

interface Shape {
  readonly baseBytes: number;
  readonly sizeBytes: number;
  readonly direct: boolean;
  readonly absent?: (unit: number) => boolean;
}

async function makeClone(shape: Shape): Promise<ImageFixture & { folder: string }> {
  const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-clone-'));
  const baseContent = patternedContent(shape.baseBytes, shape.sizeBytes);
  const layerFolder = path.join(folder, 'layer');
  await createLayer(layerFolder, { baseDigest: BASE, sizeBytes: shape.sizeBytes });
  const open = async () => {
    const base = new FileImage(path.join(folder, 'base'), baseContent, shape.absent);
    const layer = await openLayer(layerFolder, { baseDigest: BASE });
    return openClone(shape.direct ? base : withoutDirect(base), layer);
  };
  let image = await open();
  const content = Buffer.alloc(shape.sizeBytes);
  baseContent.copy(content);
  return {
    folder,
    image,
    content,
    reopen: async () => (image = await open()),
    dispose: async () => {
      await image.close();
      rmSync(folder, { recursive: true });
    },
  };
}

const MIB = 1024 * 1024;

imageSuite('a clone over a local base', () =>
  makeClone({ baseBytes: 4 * MIB, sizeBytes: 4 * MIB, direct: true }),
);
imageSuite('a clone over a base that is partly here', () =>
  makeClone({ baseBytes: 4 * MIB, sizeBytes: 4 * MIB, direct: true, absent: (unit) => unit % 3 === 1 }),
);
imageSuite('a clone over a base without local files', () =>
  makeClone({ baseBytes: 2 * MIB + 777, sizeBytes: 2 * MIB + 777, direct: false }),
);
imageSuite('a clone larger than its base, neither a whole number of blocks', () =>
  makeClone({
    baseBytes: MIB + 5000,
    sizeBytes: 3 * MIB + 123,
    direct: true,
    absent: (unit) => unit % 2 === 0 || unit > 60,
  }),
);
imageSuite('a clone larger than its base, which has no local files', () =>
  makeClone({ baseBytes: 100_001, sizeBytes: 2 * MIB, direct: false }),
);
imageSuite('a clone of less than one block', () =>
  makeClone({ baseBytes: 1000, sizeBytes: 1000, direct: true }),
);
imageSuite('a clone over an empty base', () => makeClone({ baseBytes: 0, sizeBytes: MIB, direct: false }));

test('a clone smaller than its base is refused', async (t) => {
  const fixture = await makeClone({ baseBytes: 8192, sizeBytes: 8192, direct: true });
  t.after(() => fixture.dispose());
  const folder = path.join(fixture.folder, 'small');
  await createLayer(folder, { baseDigest: BASE, sizeBytes: 4096 });
  const layer = await openLayer(folder, { baseDigest: BASE });
  t.after(() => layer.close());
  assert.throws(() => openClone(fixture.image, layer), hasCode('bad-request'));
});

test('a trim beyond the base leaves the map alone, over the base it hides the base', async (t) => {
  const fixture = await makeClone({ baseBytes: 2 * 4096, sizeBytes: 100 * 4096, direct: true });
  t.after(() => fixture.dispose());
  await fixture.image.trim(0, fixture.image.sizeBytes);
  const states = new Uint8Array(fixture.image.direct!.layer!.states);
  assert.deepEqual([...states.subarray(0, 3)], [2, 2, BLOCK_ABSENT]);
  const all = Buffer.alloc(fixture.image.sizeBytes, 1);
  await fixture.image.read(all, 0);
  assert.ok(all.equals(Buffer.alloc(all.length)));
});

test('a failed read of the base fails the write into the middle of its block and leaves the block as it was', async (t) => {
  const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-clone-'));
  t.after(() => rmSync(folder, { recursive: true }));
  const content = patternedContent(8192, 3).fill(7, 0, 10);
  const base = new FileImage(path.join(folder, 'base'), content);
  let broken = true;
  const flaky = {
    ...withoutDirect(base),
    read: (target: Uint8Array, at: number) =>
      broken ? Promise.reject(new Error('the tunnel is gone')) : base.read(target, at),
  };
  await createLayer(path.join(folder, 'layer'), { baseDigest: BASE, sizeBytes: 8192 });
  const clone = openClone(flaky, await openLayer(path.join(folder, 'layer'), { baseDigest: BASE }));
  await assert.rejects(() => clone.write(Buffer.from('x'), 5), hasCode('local-io'));
  await assert.rejects(() => clone.read(Buffer.alloc(10), 0), hasCode('local-io'));
  broken = false;
  const target = Buffer.alloc(10);
  await clone.read(target, 0);
  assert.deepEqual(target, content.subarray(0, 10));
  await clone.write(Buffer.from('x'), 5);
  await clone.read(target, 0);
  assert.equal(target.toString('latin1'), '\x07\x07\x07\x07\x07x\x07\x07\x07\x07');
  await clone.close();
  await assert.rejects(() => clone.read(target, 0), hasCode('closed'));
  await assert.rejects(() => clone.write(target, 0), hasCode('closed'));
  await assert.rejects(() => clone.flush(), hasCode('closed'));
});
