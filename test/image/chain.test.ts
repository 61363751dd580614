/** Chains of layers: the same Image as any clone, opened only in their order and over their base; filling them. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { BLOCK_DATA, FROZEN_LAYERS_MAX } from '../../src/core/image.ts';
import type { Image } from '../../src/core/image.ts';
import { isRoot } from '../../src/core/linux.ts';
import { createLayerOver, openChain, openClone, zeroImage } from '../../src/image/index.ts';
import type { Chain, Clone } from '../../src/image/index.ts';
import { hasCode, imageSuite } from '../suites/image.ts';
import type { ImageFixture } from '../suites/image.ts';
import { FileImage, patternedContent, seededRandom } from './file-image.ts';

const BASE = '7'.repeat(64);
const BLOCK = 4096;
const MIB = 1024 * 1024;
const root = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-chain-'));
after(() => rmSync(root, { recursive: true }));
let made = 0;

interface Made {
  readonly chain: Chain;
  readonly content: Buffer;
  readonly folder: string;
  readonly openBase: () => FileImage;
}

/** `depth` layers with random writes and trims in each, each `grow` bytes larger than the one below. */
async function makeChain(depth: number, baseBytes: number, grow = 0, parent = root): Promise<Made> {
  const folder = path.join(parent, `chain${++made}`);
  mkdirSync(folder);
  const baseContent = patternedContent(baseBytes, depth);
  const openBase = () => new FileImage(path.join(folder, 'base'), baseContent, (unit) => unit % 3 === 1, 0);
  const random = seededRandom(depth);
  let content = Buffer.from(baseContent);
  let chain: Chain = { base: BASE, layers: [] };
  for (let i = 0; i < depth; i++) {
    const layer = path.join(folder, `layer${i}`);
    const sizeBytes = content.length + grow;
    await createLayerOver(layer, chain, sizeBytes);
    chain = { base: BASE, layers: [...chain.layers, layer] };
    content = Buffer.concat([content, Buffer.alloc(grow)]);
    if (i === depth - 1) break;
    const clone = openClone(openBase(), await openChain(chain));
    for (let step = 0; step < 12; step++) {
      const offset = Math.floor(random() * sizeBytes);
      const length = Math.min(1 + Math.floor(random() * 40_000), sizeBytes - offset);
      if (random() < 0.3) {
        await clone.trim(offset, length);
        content.fill(0, offset, offset + length);
      } else {
        await clone.write(Buffer.alloc(length, 1 + i), offset);
        content.fill(1 + i, offset, offset + length);
      }
    }
    await clone.flush();
    await clone.close();
  }
  return { chain, content, folder, openBase };
}

async function makeFixture(depth: number, baseBytes: number, grow = 0): Promise<ImageFixture> {
  const { chain, content, openBase } = await makeChain(depth, baseBytes, grow);
  const open = async () => openClone(openBase(), await openChain(chain));
  let image: Image = await open();
  return { image, content, reopen: async () => (image = await open()), dispose: () => image.close() };
}

imageSuite('a clone of a clone', () => makeFixture(2, 2 * MIB));
imageSuite('a chain of 12 layers, each larger than the one below', () => makeFixture(12, MIB + 777, 1300));

async function readAll(image: Image): Promise<Buffer> {
  const all = Buffer.alloc(image.sizeBytes, 0xee);
  await image.read(all, 0);
  return all;
}

test('layers in another order, without one of them or over another base are refused, and nothing stays open', async () => {
  const { chain } = await makeChain(4, MIB);
  const [a, b, c, d] = chain.layers as [string, string, string, string];
  const descriptors = readdirSync('/proc/self/fd').length;
  for (const layers of [[b, a, c, d], [a, c, d], [a, b, d], [a, b, c, d, d], [d]]) {
    await assert.rejects(openChain({ base: BASE, layers }), hasCode('wrong-base'));
  }
  await assert.rejects(openChain({ ...chain, base: '8'.repeat(64) }), hasCode('wrong-base'));
  truncateSync(path.join(b, 'data'), 100);
  await assert.rejects(openChain(chain), hasCode('bad-format'));
  rmSync(b, { recursive: true });
  await assert.rejects(openChain(chain), hasCode('not-found'));
  assert.equal(readdirSync('/proc/self/fd').length, descriptors);
});

test(`a chain of ${FROZEN_LAYERS_MAX} frozen layers opens, one of more is refused`, async () => {
  const { chain, content, openBase } = await makeChain(1, 10 * BLOCK);
  const layers = [...chain.layers];
  for (let i = 0; i < FROZEN_LAYERS_MAX; i++) {
    const clone = openClone(openBase(), await openChain({ base: BASE, layers }));
    await clone.write(Buffer.alloc(BLOCK, i), (i % 10) * BLOCK);
    content.fill(i, (i % 10) * BLOCK, ((i % 10) + 1) * BLOCK);
    await clone.flush();
    await clone.close();
    const layer = path.join(path.dirname(layers[0]!), `more${i}`);
    await createLayerOver(layer, { base: BASE, layers }, 10 * BLOCK);
    layers.push(layer);
  }
  const clone = openClone(openBase(), await openChain({ base: BASE, layers }));
  assert.ok((await readAll(clone)).equals(content));
  await clone.close();
  const over = createLayerOver(path.join(root, 'over'), { base: BASE, layers }, 10 * BLOCK);
  await assert.rejects(over, hasCode('bad-request'));
  assert.equal(readdirSync(root).includes('over'), false);
});

/** Fills while a guest writes, closes, and opens the last layer alone, over nothing. */
async function fillUnderWrites({ chain, content, openBase }: Made): Promise<Clone> {
  const clone = openClone(openBase(), await openChain(chain));
  const random = seededRandom(99);
  const progress = { filled: false };
  const filling = clone.fillUp({}).finally(() => (progress.filled = true));
  for (let step = 0; !progress.filled || step < 20; step++) {
    const offset = Math.floor(random() * content.length);
    const length = Math.min(1 + Math.floor(random() * 20_000), content.length - offset);
    const value = step % 4 === 0 ? 0 : 100 + (step % 100);
    if (value === 0) await clone.trim(offset, length);
    else await clone.write(Buffer.alloc(length, value), offset);
    content.fill(value, offset, offset + length);
    await new Promise(setImmediate);
  }
  await filling;
  assert.ok((await readAll(clone)).equals(content));
  await clone.flush();
  await clone.close();
  const base = clone.layer.baseDigest;
  return openClone(zeroImage(), await openChain({ base, layers: chain.layers.slice(-1) }));
}

test('a layer that was filled while it was written to shows the same disk without the layers and the base below', async () => {
  for (const depth of [1, 3]) {
    const made = await makeChain(depth, 8 * MIB + 5000, 2000);
    const clone = await fillUnderWrites(made);
    assert.ok((await readAll(clone)).equals(made.content), `depth ${depth}`);
    await clone.close();
  }
});

test('filling stops at the quota with no-space, keeps the disk, and goes on when it was raised', async () => {
  const { chain, content, openBase } = await makeChain(2, 4 * MIB);
  const clone = openClone(openBase(), await openChain(chain));
  clone.layer.setQuota(MIB);
  await assert.rejects(clone.fillUp({}), hasCode('no-space'));
  assert.ok((await readAll(clone)).equals(content));
  assert.ok(clone.statistics().dataBlocks * BLOCK <= MIB);
  const stop = new AbortController();
  stop.abort();
  await assert.rejects(clone.fillUp({ signal: stop.signal }), hasCode('closed'));
  clone.layer.setQuota(undefined);
  await clone.fillUp({});
  assert.ok((await readAll(clone)).equals(content));
  assert.ok(clone.statistics().dataBlocks < (content.length / BLOCK) * 0.8, 'zeros are not copied');
  await clone.close();
});

test('a quota counts what is there when the disk is opened, and a trim gives room again', async () => {
  const { chain, openBase } = await makeChain(1, 40 * BLOCK);
  const first = openClone(openBase(), await openChain(chain));
  await first.write(Buffer.alloc(10 * BLOCK, 1), 0);
  await first.close();
  const clone = openClone(openBase(), await openChain(chain));
  clone.layer.setQuota(12 * BLOCK + 100);
  await clone.write(Buffer.alloc(2 * BLOCK, 2), 20 * BLOCK);
  await assert.rejects(clone.write(Buffer.alloc(10, 3), 30 * BLOCK), hasCode('no-space'));
  await clone.write(Buffer.alloc(2 * BLOCK, 4), 0);
  await clone.trim(0, BLOCK);
  await clone.write(Buffer.alloc(10, 3), 30 * BLOCK);
  await assert.rejects(clone.write(Buffer.alloc(BLOCK, 3), 31 * BLOCK), hasCode('no-space'));
  clone.layer.setQuota(5 * BLOCK);
  await assert.rejects(clone.write(Buffer.alloc(BLOCK, 3), 31 * BLOCK), hasCode('no-space'));
  await clone.write(Buffer.alloc(BLOCK, 5), 2 * BLOCK);
  clone.layer.setQuota(13 * BLOCK);
  await clone.write(Buffer.alloc(BLOCK, 3), 31 * BLOCK);
  await clone.close();
});

test(
  'on XFS a full clone of a wholly local base shares its extents and copies nothing',
  { skip: isRoot() ? false : 'needs root for a loop device' },
  async (t) => {
    const file = path.join(root, 'xfs.img');
    const mountpoint = path.join(root, 'xfs');
    mkdirSync(mountpoint);
    writeFileSync(file, '');
    truncateSync(file, 400 * MIB);
    execFileSync('mkfs.xfs', ['-q', '-m', 'reflink=1', file]);
    execFileSync('mount', ['-o', 'loop', file, mountpoint]);
    t.after(() => execFileSync('umount', [mountpoint]));
    const made = await makeChain(1, 32 * MIB, 0, mountpoint);
    const free = () => {
      execFileSync('sync', ['-f', mountpoint]);
      return Number(execFileSync('stat', ['-f', '-c', '%f', mountpoint], { encoding: 'utf8' })) * BLOCK;
    };
    const openBase = () => {
      const base = made.openBase();
      return Object.assign(base, {
        claimWhole: () => Promise.resolve({ fd: base.direct.base.fd, release() {} }),
      });
    };
    const clone = openClone(openBase(), await openChain(made.chain));
    const freeBefore = free();
    await clone.fillUp({});
    const taken = freeBefore - free();
    assert.ok((await readAll(clone)).equals(made.content));
    assert.ok(taken < 4 * MIB, `it took ${taken} bytes of the disk`);
    const states = new Uint8Array(clone.direct.layer!.states);
    assert.ok(states.filter((state) => state === BLOCK_DATA).length > 4000);
    assert.ok(
      statSync(path.join(made.chain.layers[0]!, 'data')).blocks * 512 > 16 * MIB,
      'it has the extents',
    );
    await clone.close();
    const again = await fillUnderWrites({ ...made, openBase });
    assert.ok((await readAll(again)).equals(made.content));
    await again.close();
  },
);
