/** Clones through the real command, the mount and the kernel: chains, commit, export to another host, quota. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  copyFileSync,
  existsSync,
  readdirSync,
  readFileSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, suite, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { World } from './world.ts';

interface Clone {
  id: string;
  disk: string;
  open: boolean;
  allocatedBytes: number;
}

const SIZE = 24 * MIB;

suite('clones on a mount', () => {
  const world = new World();
  const other = new World();
  /** What the clone `work` holds. */
  const expected = path.join(world.folder, 'expected.raw');

  before(async () => {
    const raw = path.join(world.folder, 'base.raw');
    writeFileSync(raw, randomBytes(10 * MIB));
    truncateSync(raw, SIZE);
    copyFileSync(raw, expected);
    await world.succeeds(process.execPath, ...main('store', 'init', world.store));
    await world.json('store', 'import', world.store, raw, 'base:1', '--label', 'boot.ready=login:');
    await world.mount(world.store);
  });
  after(async () => {
    await other.dispose();
    await world.dispose();
  });

  const main = (...args: string[]) => [
    path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts'),
    ...args,
  ];

  const patch = async (disk: string, offset: number, bytes: Buffer) => {
    const piece = path.join(world.folder, 'piece');
    writeFileSync(piece, bytes);
    for (const target of [disk, expected]) {
      await world.succeeds(
        'dd',
        `if=${piece}`,
        `of=${target}`,
        'bs=1M',
        `seek=${offset}`,
        'oflag=seek_bytes',
        'conv=notrunc,fsync',
        'status=none',
      );
    }
  };
  const same = (disk: string, bytes = SIZE) => world.succeeds('cmp', '-n', String(bytes), expected, disk);

  test('a clone of a clone, larger, persistent, reads as its parent did', async () => {
    const parent = await world.json<Clone>('clone', 'create', 'base:1', '--name', 'parent', '--persistent');
    await patch(parent.disk, 5 * MIB + 100, randomBytes(300_000));
    await same(parent.disk);
    const work = await world.json<Clone>(
      'clone',
      'create',
      '--from',
      'parent',
      '--name',
      'work',
      '--persistent',
      '--size',
      '32M',
    );
    assert.equal(statSync(work.disk).size, 32 * MIB);
    await patch(work.disk, 20 * MIB, randomBytes(100));
    await same(work.disk);
    await world.json('clone', 'rm', 'parent');
    await same(work.disk);
  });

  test('a commit is a new version on the mount that stores only what changed', async () => {
    const result = await world.json<{ changedChunks: number; newChunks: number; digest: string }>(
      'clone',
      'commit',
      'work',
      'base:2',
    );
    assert.ok(result.changedChunks <= 4 && result.newChunks <= result.changedChunks, JSON.stringify(result));
    await sleep(1100); // a moved tag is seen within a second
    await same(path.join(world.mountpoint, 'images', 'base', '2', 'disk.raw'));
    const { manifest } = await world.json<{ manifest: { parent: string; labels: Record<string, string> } }>(
      'store',
      'show',
      world.store,
      'base:2',
    );
    assert.equal(manifest.labels['commit.clone'], 'work');
    assert.equal(manifest.labels['boot.ready'], 'login:');
    await world.refuses(1, /no clone 'none'/, 'clone', 'commit', 'none', 'base:3');
    await world.refuses(
      1,
      /there is no store at/,
      'clone',
      'commit',
      'work',
      'base:3',
      '--store',
      world.folder,
    );
  });

  test('an exported clone is the same disk on another host; over another base, damaged or cut it is refused and leaves nothing', async () => {
    const archive = path.join(world.folder, 'work.tar');
    await world.json('clone', 'export', 'work', archive);
    await world.refuses(1, /is there already/, 'clone', 'export', 'work', archive);
    await other.json('mount', world.store, other.mountpoint, ...other.proxyOptions());
    const copy = await other.json<Clone>('clone', 'import', archive, '--name', 'copy');
    await same(copy.disk);
    await other.json('clone', 'rm', 'copy');

    const bytes = readFileSync(archive);
    const damaged = path.join(world.folder, 'damaged.tar');
    bytes[bytes.length - 40_000]! ^= 1;
    writeFileSync(damaged, bytes);
    await other.refuses(1, /does not match its digest/, 'clone', 'import', damaged);
    writeFileSync(damaged, bytes.subarray(0, 50_000));
    await other.refuses(1, /damaged.tar/, 'clone', 'import', damaged);
    await other.refuses(1, /wrong-base/, 'clone', 'import', archive, '--image', 'base:2');
    assert.deepEqual(readdirSync(path.join(other.folder, 'state', 'layers')), []);
    assert.deepEqual(readdirSync(path.join(other.folder, 'state', 'clones')), []);
    await other.json('umount', other.mountpoint);
    assert.equal(existsSync(`${archive}.partial`), false);
  });

  test('a host whose source does not have the base refuses the archive', async () => {
    await other.succeeds(process.execPath, ...main('store', 'init', other.store));
    await other.json(
      'mount',
      other.store,
      other.mountpoint,
      ...other.proxyOptions(),
      '--cache-dir',
      path.join(other.folder, 'cache2'),
    );
    await other.refuses(1, /wrong-base/, 'clone', 'import', path.join(world.folder, 'work.tar'));
    assert.deepEqual(readdirSync(path.join(other.folder, 'state', 'layers')), []);
    await other.json('umount', other.mountpoint);
  });

  test('a qcow2 of a clone stands alone, or over the raw base', async () => {
    const alone = path.join(world.folder, 'alone.qcow2');
    const over = path.join(world.folder, 'over.qcow2');
    const disk = path.join(world.mountpoint, 'clones', 'work', 'disk.raw');
    await world.json('clone', 'export', 'work', alone, '--qcow2');
    await world.json(
      'clone',
      'export',
      'work',
      over,
      '--qcow2',
      '--backing',
      path.join(world.folder, 'base.raw'),
    );
    for (const file of [alone, over]) {
      await world.succeeds('qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw', file, disk);
    }
    assert.ok(statSync(over).size < 2 * MIB);
  });

  test('a full clone is the same disk and takes its own space; a quota is ENOSPC and heals when it is raised', async () => {
    const full = await world.json<Clone>(
      'clone',
      'create',
      '--from',
      'work',
      '--name',
      'full',
      '--full',
      '--wait',
    );
    await same(full.disk);
    assert.ok(full.allocatedBytes > 9 * MIB);
    const { disk } = await world.json<Clone>('clone', 'create', 'base:1', '--quota', '1M', '--name', 'small');
    const write = () =>
      world.program('dd', 'if=/dev/zero', `of=${disk}`, 'bs=64k', 'count=32', 'oflag=direct', 'conv=notrunc');
    const first = await write();
    assert.match(first.stderr, /No space left/);
    await world.json('clone', 'set', 'small', '--quota', '3M');
    assert.equal((await write()).code, 0);
    await world.refuses(2, /say what to change/, 'clone', 'set', 'small');
    await world.refuses(2, /larger .* not smaller/, 'clone', 'create', 'base:1', '--size', '1M');
    await world.refuses(2, /name either/, 'clone', 'create');
    await world.json('clone', 'rm', 'small', 'full', 'work');
    assert.deepEqual(readdirSync(path.join(world.folder, 'state', 'layers')), []);
  });
});
