/** The tree of names: what it lists, opens and refuses, and that it reads no manifest that nobody asked for. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { sha256 } from '../../src/core/bytes.ts';
import { GridError } from '../../src/core/errors.ts';
import type { Image } from '../../src/core/image.ts';
import type { Manifest, Tag } from '../../src/core/manifest.ts';
import { createTree } from '../../src/image/index.ts';
import type { CloneEntry } from '../../src/image/index.ts';
import { hasCode } from '../suites/image.ts';

const CREATED = '2026-01-02T03:04:05.000Z';
const MOVED = '2026-05-06T07:08:09.000Z';

/** An image that only knows its size: what is opened is all that matters here. */
function imageOf(sizeBytes: number): Image {
  const refuse = () => Promise.reject(new GridError('unsupported', 'not here'));
  const nothing = () => Promise.resolve();
  return {
    sizeBytes,
    writable: false,
    read: refuse,
    write: refuse,
    trim: refuse,
    flush: nothing,
    close: nothing,
  };
}

function makeWorld() {
  const manifests = new Map<string, Manifest>();
  const add = (kind: Manifest['kind'], sizeBytes: number, parts: Record<string, string> = {}) => {
    const digest = sha256(Buffer.from(`${kind} ${sizeBytes} ${manifests.size}`));
    const manifest: Manifest = {
      schema: 1,
      kind,
      sizeBytes,
      chunkBytes: 4096,
      table: digest,
      nonzeroBytes: 0,
      labels: {},
      parts,
      created: CREATED,
    };
    manifests.set(digest, manifest);
    return digest;
  };
  const world = {
    add,
    tags: [] as Tag[],
    recent: undefined as Tag[] | undefined,
    clones: [] as CloneEntry[],
    read: [] as string[],
    opened: [] as string[],
  };
  const tree = createTree({
    catalog: {
      listTags: () => Promise.resolve(world.tags),
      recentTags: () => world.recent,
      readManifest: (digest) => {
        world.read.push(digest);
        const manifest = manifests.get(digest);
        return manifest ? Promise.resolve(manifest) : Promise.reject(new GridError('not-found', digest));
      },
      openImage: (digest) => {
        world.opened.push(digest);
        return Promise.resolve(imageOf(manifests.get(digest)!.sizeBytes));
      },
    },
    clones: {
      list: () => Promise.resolve(world.clones),
      find: (id) => Promise.resolve(world.clones.find((clone) => clone.id === id)),
      open: (id, { write }) => {
        world.opened.push(`${id} ${write}`);
        return Promise.resolve(imageOf(1));
      },
      space: () => Promise.resolve({ totalBytes: 10, freeBytes: 5 }),
    },
  });
  return { world, tree };
}

const tagOf = (name: string, version: string, manifest: string): Tag => ({
  name,
  version,
  manifest,
  moved: MOVED,
});
const namesOf = (entries: { name: string }[]) => entries.map(({ name }) => name);

test('an image shows its disk and its parts by their kinds and names, with the digest as content id', async () => {
  const { world, tree } = makeWorld();
  const kernel = world.add('kernel', 7000);
  const initrd = world.add('initrd', 9000);
  const disk = world.add('disk', 4096 * 10, { kernel, initrd, 'disk.raw': kernel });
  const memory = world.add('memory', 512);
  world.tags = [tagOf('debian', '12', disk), tagOf('debian', '11', disk), tagOf('state', 'a', memory)];

  assert.deepEqual(namesOf(await tree.list([])), ['clones', 'images']);
  assert.deepEqual(namesOf(await tree.list(['images'])), ['debian', 'state']);
  assert.deepEqual(namesOf(await tree.list(['images', 'debian'])), ['11', '12']);
  assert.deepEqual(await tree.list(['images', 'debian', '12']), [
    {
      name: 'disk.raw',
      type: 'file',
      sizeBytes: 40960,
      writable: false,
      modifiedMs: Date.parse(CREATED),
      contentId: disk,
    },
    {
      name: 'initrd',
      type: 'file',
      sizeBytes: 9000,
      writable: false,
      modifiedMs: Date.parse(CREATED),
      contentId: initrd,
    },
    {
      name: 'kernel',
      type: 'file',
      sizeBytes: 7000,
      writable: false,
      modifiedMs: Date.parse(CREATED),
      contentId: kernel,
    },
  ]);
  assert.deepEqual(namesOf(await tree.list(['images', 'state', 'a'])), ['memory.raw']);
  assert.equal((await tree.lookup(['images', 'debian', '12']))!.modifiedMs, Date.parse(MOVED));
  await tree.open(['images', 'debian', '12', 'kernel'], { write: false });
  await tree.open(['images', 'debian', '12', 'disk.raw'], { write: false });
  assert.deepEqual(world.opened, [kernel, disk]);
});

test('a clone shows one writable disk under its id', async () => {
  const { world, tree } = makeWorld();
  const base = world.add('disk', 5);
  world.clones = [
    { id: 'c2', base, sizeBytes: 5, modifiedMs: 8 },
    { id: 'c1', base, sizeBytes: 6, modifiedMs: 9 },
    { id: '../../etc', base, sizeBytes: 6, modifiedMs: 9 },
  ];
  assert.deepEqual(namesOf(await tree.list(['clones'])), ['c1', 'c2']);
  const entry = {
    name: 'disk.raw',
    type: 'file',
    sizeBytes: 6,
    writable: true,
    modifiedMs: 9,
    contentId: 'clone:c1',
  };
  assert.deepEqual(await tree.list(['clones', 'c1']), [entry]);
  assert.deepEqual(await tree.lookup(['clones', 'c1', 'disk.raw']), entry);
  await tree.open(['clones', 'c1', 'disk.raw'], { write: true });
  assert.deepEqual(world.opened, ['c1 true']);
  assert.deepEqual(await tree.space(), { totalBytes: 10, freeBytes: 5 });
});

test('a clone shows the parts of its image, read-only, though no tag points at that; the disk alone where the manifest is gone', async () => {
  const { world, tree } = makeWorld();
  const kernel = world.add('kernel', 7000);
  const base = world.add('disk', 4096, { kernel, 'disk.raw': kernel });
  world.clones = [
    { id: 'c1', base, sizeBytes: 4096, modifiedMs: 8 },
    { id: 'c2', base: sha256(Buffer.from('gone')), sizeBytes: 4096, modifiedMs: 8 },
  ];
  assert.deepEqual(namesOf(await tree.list(['clones', 'c1'])), ['disk.raw', 'kernel']);
  assert.deepEqual(namesOf(await tree.list(['clones', 'c2'])), ['disk.raw']);
  assert.equal(await tree.lookup(['clones', 'c2', 'kernel']), undefined);
  const file = await tree.lookup(['clones', 'c1', 'kernel']);
  assert.ok(file?.type === 'file' && !file.writable && file.contentId === kernel);
  await tree.open(['clones', 'c1', 'kernel'], { write: false });
  await tree.open(['clones', 'c1', 'disk.raw'], { write: true });
  assert.deepEqual(world.opened, [kernel, 'c1 true']);
  await assert.rejects(() => tree.open(['clones', 'c1', 'kernel'], { write: true }), hasCode('read-only'));
});

test('what is not there is undefined to lookup and not-found to list and open; images are not opened for writing', async () => {
  const { world, tree } = makeWorld();
  const base = world.add('disk', 1);
  world.tags = [tagOf('debian', '12', base)];
  world.clones = [{ id: 'c1', base, sizeBytes: 5, modifiedMs: 8 }];
  const absent = [
    ['etc'],
    ['images', 'nope'],
    ['images', 'debian', '13'],
    ['images', 'debian', '12', 'kernel'],
    ['images', 'debian', '12', '__proto__'],
    ['images', 'debian', '12', 'disk.raw', 'x'],
    ['clones', 'nope'],
    ['clones', 'c1', 'memory.raw'],
    ['clones', 'c1', 'disk.raw', 'x'],
    ['images', '..'],
    ['clones', '..'],
    ['..'],
  ];
  for (const path of absent) {
    assert.equal(await tree.lookup(path), undefined, path.join('/'));
    await assert.rejects(() => tree.list(path), hasCode('not-found'));
    await assert.rejects(() => tree.open(path, { write: false }), hasCode('not-found'));
  }
  const disk = ['images', 'debian', '12', 'disk.raw'];
  await assert.rejects(() => tree.list(disk), hasCode('not-found'));
  await assert.rejects(() => tree.open(disk, { write: true }), hasCode('read-only'));
  await assert.rejects(() => tree.open(['images'], { write: false }), hasCode('bad-request'));
  assert.deepEqual(world.opened, []);
});

test('a tag that cannot be a file name is not shown', async () => {
  const { world, tree } = makeWorld();
  const digest = world.add('disk', 1);
  world.tags = [
    tagOf('..', 'x', digest),
    tagOf('a/b', 'x', digest),
    tagOf('ok', '.', digest),
    tagOf('ok', 'v', digest),
  ];
  assert.deepEqual(namesOf(await tree.list(['images'])), ['ok']);
  assert.deepEqual(namesOf(await tree.list(['images', 'ok'])), ['v']);
});

test('a tag that moved shows the new image', async () => {
  const { world, tree } = makeWorld();
  const [before, after] = [world.add('disk', 1), world.add('disk', 2)];
  const path = ['images', 'a', 'latest', 'disk.raw'];
  const idOf = async () => {
    const entry = await tree.lookup(path);
    return entry?.type === 'file' ? entry.contentId : undefined;
  };
  world.tags = [tagOf('a', 'latest', before)];
  assert.equal(await idOf(), before);
  world.tags = [tagOf('a', 'latest', after)];
  assert.equal(await idOf(), after);
});

test('with 2,000 tags, listings read no manifest, a lookup reads the one it needs, and once', async () => {
  const { world, tree } = makeWorld();
  world.tags = Array.from({ length: 2000 }, (_, i) =>
    tagOf(`image${i % 100}`, `v${i}`, world.add('disk', i)),
  );
  assert.equal((await tree.list(['images'])).length, 100);
  assert.equal((await tree.list(['images', 'image7'])).length, 20);
  await tree.lookup(['images', 'image7', 'v107']);
  assert.deepEqual(world.read, []);
  const names = ['images', 'image7', 'v107', 'disk.raw'];
  const lookupsMs = async (lookups: typeof tree.lookup) => {
    let bestMs = Infinity;
    for (let attempt = 0; attempt < 5; attempt++) {
      const started = performance.now();
      for (let i = 0; i < 300; i++) await lookups(names);
      bestMs = Math.min(bestMs, performance.now() - started);
    }
    return bestMs;
  };
  const manyMs = await lookupsMs((path) => tree.lookup(path));
  assert.deepEqual(world.read, [world.tags[107]!.manifest]);
  const small = makeWorld();
  small.world.tags = [tagOf('image7', 'v107', small.world.add('disk', 107))];
  const oneMs = await lookupsMs((path) => small.tree.lookup(path));
  assert.ok(manyMs < 10 * oneMs, `a lookup does not walk all tags: ${manyMs} ms of 2,000, ${oneMs} of one`);
});

test('what recent tags have is found in them; what they lack, and a listing, in fresh ones', async () => {
  const { tree, world } = makeWorld();
  const tag = (version: string): Tag => ({
    name: 'debian',
    version,
    manifest: world.add('disk', 4096),
    moved: MOVED,
  });
  world.recent = [tag('12')];
  world.tags = [tag('13')];
  assert.equal((await tree.lookup(['images', 'debian', '12', 'disk.raw']))?.type, 'file');
  assert.equal((await tree.lookup(['images', 'debian', '13']))?.type, 'directory');
  assert.equal(await tree.lookup(['images', 'debian', '11']), undefined);
  assert.deepEqual(
    (await tree.list(['images', 'debian'])).map(({ name }) => name),
    ['13'],
  );
});
