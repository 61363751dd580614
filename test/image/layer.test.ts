/** The layer's folder: create, open, refuse, recover, remove; full disks; what a huge empty one costs. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statfsSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { createLayer, openClone, openLayer, removeLayer, sweepLayers } from '../../src/image/index.ts';
import type { Clone } from '../../src/image/index.ts';
import { isRoot, mount, unmount } from '../../src/core/linux.ts';
import { hasCode } from '../suites/image.ts';
import { FileImage, patternedContent } from './file-image.ts';

const BASE = 'a'.repeat(64);
const OTHER = 'f'.repeat(64);
const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-layer-'));
after(() => rmSync(folder, { recursive: true }));
let made = 0;

async function makeLayer(sizeBytes = 100_000): Promise<string> {
  const layerFolder = path.join(folder, `layer${++made}`);
  await createLayer(layerFolder, { baseDigest: BASE, sizeBytes });
  return layerFolder;
}

function editFile(file: string, change: (bytes: Buffer) => void): void {
  const bytes = readFileSync(file);
  change(bytes);
  writeFileSync(file, bytes);
}

test('a layer is refused over another base, and the message has both digests', async () => {
  const layerFolder = await makeLayer();
  await assert.rejects(
    () => openLayer(layerFolder, { baseDigest: OTHER }),
    (error: Error) =>
      hasCode('wrong-base')(error) && error.message.includes(BASE) && error.message.includes(OTHER),
  );
});

test('a layer that is open is refused to a second opener and cannot be removed', async () => {
  const layerFolder = await makeLayer();
  const layer = await openLayer(layerFolder, { baseDigest: BASE });
  await assert.rejects(() => openLayer(layerFolder, { baseDigest: BASE }), hasCode('in-use'));
  await assert.rejects(() => removeLayer(layerFolder), hasCode('in-use'));
  await layer.close();
  await layer.close();
  await (await openLayer(layerFolder, { baseDigest: BASE })).close();
  await removeLayer(layerFolder);
  assert.ok(!existsSync(layerFolder));
  await assert.rejects(() => removeLayer(layerFolder), hasCode('not-found'));
  await assert.rejects(() => openLayer(layerFolder, { baseDigest: BASE }), hasCode('not-found'));
});

test('truncated, foreign, damaged and newer files are refused and leave nothing open', async () => {
  const other = await makeLayer();
  const cases: [string, string, (layerFolder: string) => void][] = [
    ['bad-format', 'data shorter', (f) => truncateSync(path.join(f, 'data'), 99_999)],
    ['bad-format', 'map shorter', (f) => truncateSync(path.join(f, 'map'), 4100)],
    ['bad-format', 'map without header', (f) => truncateSync(path.join(f, 'map'), 100)],
    ['bad-format', 'durable map shorter', (f) => truncateSync(path.join(f, 'map.durable'), 4096)],
    ['bad-format', 'durable map empty', (f) => truncateSync(path.join(f, 'map.durable'), 0)],
    ['bad-format', 'map of another layer', (f) => copyFileSync(path.join(other, 'map'), path.join(f, 'map'))],
    ['bad-format', 'magic', (f) => editFile(path.join(f, 'map.durable'), (b) => b.write('QFI'))],
    ['newer-format', 'version', (f) => editFile(path.join(f, 'map.durable'), (b) => b.write('2', 7))],
    ['bad-format', 'flipped bit in the header', (f) => editFile(path.join(f, 'map'), (b) => (b[20]! ^= 1))],
    ['bad-format', 'wild state', (f) => editFile(path.join(f, 'map'), (b) => (b[4096 + 7] = 3))],
    ['not-found', 'no map', (f) => rmSync(path.join(f, 'map'))],
    [
      'local-io',
      'a symbolic link',
      (f) => {
        rmSync(path.join(f, 'data'));
        symlinkSync(path.join(other, 'data'), path.join(f, 'data'));
      },
    ],
  ];
  const descriptors = readdirSync('/proc/self/fd').length;
  for (const [code, what, damage] of cases) {
    const layerFolder = await makeLayer();
    damage(layerFolder);
    await assert.rejects(() => openLayer(layerFolder, { baseDigest: BASE }), hasCode(code), what);
  }
  assert.equal(readdirSync('/proc/self/fd').length, descriptors);
});

test('creating over something, without a parent or with wild arguments is refused and leaves nothing', async () => {
  const parent = path.join(folder, 'parent');
  mkdirSync(path.join(parent, 'taken'), { recursive: true });
  const make = (name: string, sizeBytes = 4096, baseDigest = BASE) =>
    createLayer(path.join(parent, name), { baseDigest, sizeBytes });
  await assert.rejects(() => make('taken'), hasCode('exists'));
  await assert.rejects(() => make('no/parent'), hasCode('not-found'));
  await assert.rejects(() => make('x', -1), hasCode('bad-request'));
  await assert.rejects(() => make('x', 2 ** 50), hasCode('bad-request'));
  await assert.rejects(() => make('x', 4096, 'abc'), hasCode('bad-request'));
  assert.deepEqual(readdirSync(parent), ['taken']);
  writeFileSync(path.join(parent, 'taken', 'data'), '');
  writeFileSync(path.join(parent, 'taken', 'letters'), 'mine');
  await assert.rejects(() => removeLayer(path.join(parent, 'taken')), hasCode('bad-request'));
  assert.equal(readFileSync(path.join(parent, 'taken', 'letters'), 'utf8'), 'mine');
});

test('what a killed create left is swept once it is old, other folders are not', async () => {
  const parent = path.join(folder, 'sweep');
  const left = path.join(parent, '.c1.making-0123456789abcdef');
  mkdirSync(left, { recursive: true });
  mkdirSync(path.join(parent, '.c1.keep'));
  await createLayer(path.join(parent, 'c2'), { baseDigest: BASE, sizeBytes: 4096 });
  writeFileSync(path.join(left, 'data'), '');
  assert.equal(await sweepLayers(parent), 0);
  const long = new Date(Date.now() - 3_600_000);
  for (const name of readdirSync(parent)) utimesSync(path.join(parent, name), long, long);
  assert.equal(await sweepLayers(parent), 1);
  assert.deepEqual(readdirSync(parent).toSorted(), ['.c1.keep', 'c2']);
});

test('statistics count blocks and the space that du sees, and a trim gives space back', async (t) => {
  const layerFolder = await makeLayer(4 * 1024 * 1024);
  const base = new FileImage(path.join(folder, 'base-stat'), patternedContent(4 * 1024 * 1024, 1));
  const clone = openClone(base, await openLayer(layerFolder, { baseDigest: BASE }));
  t.after(() => clone.close());
  await clone.write(Buffer.alloc(1024 * 1024, 1), 0);
  await clone.trim(2 * 1024 * 1024, 8192);
  await clone.flush();
  const full = clone.statistics();
  assert.equal(full.dataBlocks, 256);
  assert.equal(full.zeroBlocks, 2);
  const du = Number(
    execFileSync('du', ['-s', '--block-size=1', layerFolder], { encoding: 'utf8' }).split('\t')[0],
  );
  assert.ok(du - full.allocatedBytes >= 0 && du - full.allocatedBytes <= 8192, 'all but the folder itself');
  await clone.trim(0, 1024 * 1024);
  const after = clone.statistics();
  assert.equal(after.dataBlocks, 0);
  assert.ok(after.allocatedBytes <= full.allocatedBytes - 1024 * 1024);
});

test('blocks that a power loss took away give their space back when the layer is opened again', async () => {
  const layerFolder = await makeLayer(4 * 1024 * 1024);
  const openAt = async (bootId: string) => {
    const base = new FileImage(path.join(folder, 'base-power'), patternedContent(4 * 1024 * 1024, 1));
    return openClone(base, await openLayer(layerFolder, { baseDigest: BASE, bootId }));
  };
  const before = await openAt('1'.repeat(36));
  await before.write(Buffer.alloc(4096, 1), 4096);
  await before.flush();
  await before.write(Buffer.alloc(1024 * 1024, 2), 0);
  await before.write(Buffer.alloc(100, 2), 4 * 1024 * 1024 - 100);
  await before.close();
  const after = await openAt('2'.repeat(36));
  assert.equal(after.statistics().dataBlocks, 1);
  assert.ok(after.statistics().allocatedBytes <= 8 * 4096);
  const target = Buffer.alloc(4096);
  await after.read(target, 4096);
  assert.ok(target.equals(Buffer.alloc(4096, 2)));
  await after.close();
});

test('a layer of 100 GiB is created and opened within 50 ms and 1 MiB of disk and memory', (t) => {
  const layerFolder = path.join(folder, 'huge');
  const output = execFileSync(
    process.execPath,
    ['--expose-gc', path.join(import.meta.dirname, 'huge-layer.ts'), layerFolder],
    { encoding: 'utf8' },
  );
  const huge = JSON.parse(output) as Record<'createMs' | 'openMs' | 'rssBytes' | 'allocatedBytes', number>;
  const ms = huge.createMs + huge.openMs;
  assert.ok(ms <= 50, `it took ${ms} ms`);
  t.diagnostic(output.trim());
  assert.ok(huge.rssBytes <= 1024 * 1024, `RSS grew by ${huge.rssBytes}`);
  assert.ok(huge.allocatedBytes <= 1024 * 1024);
});

test(
  'a full disk fails writes, trims and flushes with no-space, keeps what was there, and heals when there is space',
  { skip: !isRoot() && 'needs root for a small tmpfs' },
  async (t) => {
    const small = path.join(folder, 'small');
    mkdirSync(small);
    mount('gridvfs-test', small, 'tmpfs', 0, 'size=512k');
    const opened: Clone[] = [];
    t.after(async () => {
      for (const clone of opened) await clone.close();
      unmount(small, 0);
    });
    const layerFolder = path.join(small, 'layer');
    await createLayer(layerFolder, { baseDigest: BASE, sizeBytes: 64 * 1024 * 1024 });
    const content = patternedContent(16 * 1024 * 1024, 9).fill(0xbb, 0, 8192);
    const base = new FileImage(path.join(folder, 'base-small'), content);
    const clone = openClone(base, await openLayer(layerFolder, { baseDigest: BASE }));
    opened.push(clone);
    const freePages = () => statfsSync(small).bavail;
    const fill = (leavePages: number) =>
      writeFileSync(path.join(small, 'filler'), Buffer.alloc((freePages() - leavePages) * 4096));
    const expectAt = async (offset: number, want: Buffer) => {
      const target = Buffer.alloc(want.length);
      await clone.read(target, offset);
      assert.ok(target.equals(want));
    };
    const mine = Buffer.alloc(4096, 0x11);
    const theirs = Buffer.alloc(4096, 0x22);
    await clone.write(mine, 0);
    await clone.flush();

    // No page for the data.
    fill(0);
    await assert.rejects(() => clone.write(theirs, 4096), hasCode('no-space'));
    await expectAt(4096, content.subarray(4096, 8192));
    await clone.write(theirs, 0);
    await clone.flush();
    await expectAt(0, theirs);
    rmSync(path.join(small, 'filler'));

    // A page for the data and none for the map: blocks 5000 and on are in another page of it than block 0.
    const far = 5000 * 4096;
    fill(1);
    await assert.rejects(() => clone.write(mine, far), hasCode('no-space'));
    await expectAt(far, Buffer.alloc(4096));
    assert.equal(new Uint8Array(clone.direct.layer!.states)[5000], 0);
    const inBase = 4096 * 4000 + 100;
    await clone.trim(4096 * 3000, 4096);
    rmSync(path.join(small, 'filler'));
    fill(0);
    await assert.rejects(() => clone.write(Buffer.from('part'), inBase), hasCode('no-space'));
    await expectAt(inBase, content.subarray(inBase, inBase + 4));
    rmSync(path.join(small, 'filler'));

    // A map page in the working map and none in the durable one.
    await clone.write(mine, far);
    fill(0);
    await assert.rejects(() => clone.flush(), hasCode('no-space'));
    rmSync(path.join(small, 'filler'));
    await clone.flush();
    assert.equal(readFileSync(path.join(layerFolder, 'map.durable'))[4096 + 5000], 1);

    // Nothing half-made of a layer that did not fit.
    fill(0);
    await assert.rejects(
      () => createLayer(path.join(small, 'second'), { baseDigest: BASE, sizeBytes: 4096 }),
      hasCode('no-space'),
    );
    assert.deepEqual(readdirSync(small).toSorted(), ['filler', 'layer']);
    await expectAt(far, mine);
    await expectAt(0, theirs);
  },
);
