/**
 * Versions whose chunks are patches of their parent's: right to the byte through the cache, an export and a pulled
 * clone's way in, over any number of generations; as little work and as few bytes as what changed; and kept by
 * collections as long as somebody needs them.
 */
import assert from 'node:assert/strict';
import { chmodSync, readFileSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { openCache } from '../../cache/index.ts';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { KIB, MIB } from '../../src/core/limits.ts';
import { bitsOf } from '../../src/core/patch.ts';
import {
  collectGarbage,
  commitImage,
  exportImage,
  openStore,
  uploadImage,
  verifyStore,
} from '../../src/store/index.ts';
import type { Store } from '../../src/store/index.ts';
import { makeFixtureStore, randomBuffer, randomNumbers } from '../suites/fixtures.ts';
import { assertNothingTemporary, filesOf, readBack, testFolder } from './helpers.ts';

const CHUNK = 256 * KIB;
const BLOCK = 4 * KIB;
const CHUNK_BLOCKS = CHUNK / BLOCK;
const folder = testFolder('patching');
let made = 0;

type Way = 'commit' | 'upload';

/** A disk over the newest version of an image, and what a test knows of it. */
class World {
  readonly store: Store;
  content: Buffer;
  parent: string;
  generation = 1;
  reads = 0;
  readonly #changed = new Set<number>();

  private constructor(store: Store, content: Buffer, parent: string) {
    this.store = store;
    this.content = content;
    this.parent = parent;
  }

  static async make(sizeBytes: number): Promise<World> {
    const seed = ++made;
    const fixture = await makeFixtureStore(path.join(folder, `world${seed}`), {
      sizeBytes,
      seed,
      chunkBytes: CHUNK,
    });
    return new World(await openStore(fixture.storeFolder), readFileSync(fixture.rawPath), fixture.digest);
  }

  write(block: number, bytes: Uint8Array): void {
    this.content.set(bytes, block * BLOCK);
    for (let i = 0; i < bytes.length / BLOCK; i++) this.#changed.add(block + i);
  }

  grow(bytes: number): void {
    this.content = Buffer.concat([this.content, Buffer.alloc(bytes)]);
  }

  /** The next version, checked in every way; then it is the parent. */
  async publish(way: Way, expectedDamage: readonly string[] = []) {
    const { store, content } = this;
    const changed = [...this.#changed].toSorted((a, b) => a - b);
    this.reads = 0;
    const options = {
      parent: this.parent,
      reference: `test:${++this.generation}`,
      sizeBytes: content.length,
      changed: () => new Set(changed.map((block) => Math.floor(block / CHUNK_BLOCKS))),
      isChanged: (block: number) => this.#changed.has(block),
      read: async (target: Uint8Array, offset: number) => {
        this.reads += target.length;
        content.copy(target, 0, offset, offset + target.length);
      },
    };
    const result = await (way === 'commit' ? commitImage(store, options) : uploadImage(store, options));
    assert.ok((await readBack(store, result.digest)).equals(content), `generation ${this.generation}`);
    const { damaged, missing } = await verifyStore(store, {});
    assert.deepEqual([damaged.map((one) => one.digest), missing], [expectedDamage, []]);
    assertNothingTemporary(store);
    this.parent = result.digest;
    this.#changed.clear();
    return { ...result, table: await this.table(result.digest) };
  }

  async table(digest = this.parent): Promise<ChunkTable> {
    const { table } = JSON.parse(String(await this.store.readManifest(digest))) as { table: string };
    return ChunkTable.parse(await this.store.readTable(table), table);
  }

  /** An index of a chunk of data, not the last. */
  async dataChunks(count: number): Promise<number[]> {
    const entries = [...(await this.table()).entries()];
    return entries.slice(0, count).map(({ index }) => index);
  }
}

const random = randomNumbers(77);
const noise = (blocks: number) => randomBuffer(random, blocks * BLOCK);

for (const way of ['commit', 'upload'] as const) {
  test(`${way}: few blocks of many chunks are read, stored and named; a chunk of many is one of its own`, async () => {
    const world = await World.make(24 * MIB);
    const chunks = await world.dataChunks(20);
    for (const chunk of chunks) world.write(chunk * CHUNK_BLOCKS + 3, noise(1));
    world.write(chunks[0]! * CHUNK_BLOCKS + 10, noise(15)); // a quarter in all
    world.write(chunks[1]! * CHUNK_BLOCKS + 10, noise(16)); // and one more
    world.write(chunks[2]! * CHUNK_BLOCKS + 63, Buffer.alloc(BLOCK));
    const { table, changedChunks, newChunks, newStoredBytes } = await world.publish(way);
    assert.equal(changedChunks, 20);
    assert.deepEqual([table.patchCount, table.patchOf(chunks[1]!)], [19, undefined]);
    assert.equal(table.patchOf(chunks[2]!)!.zero, 1n << 63n);
    assert.deepEqual([...bitsOf(table.patchOf(chunks[0]!)!.data)].length, 16);
    assert.ok(newChunks <= 1 + 4, `${newChunks} objects`);
    assert.ok(newStoredBytes < 2 * CHUNK + 40 * BLOCK, `${newStoredBytes} bytes stored`);
    const wholeBytes = way === 'commit' ? 17 * BLOCK : CHUNK;
    assert.equal(world.reads, (16 + 2 + 17) * BLOCK + wholeBytes);
  });
}

test('the same changes and one more: the packs of other places are there already', async () => {
  const world = await World.make(40 * MIB);
  const parent = world.parent;
  const chunks = await world.dataChunks(1000);
  const first = chunks.map((chunk) => noise(1 + (chunk % 2)));
  const write = () =>
    chunks.forEach((chunk, i) => world.write(chunk * CHUNK_BLOCKS + (chunk % 50), first[i]!));
  write();
  const before = await world.publish('upload');
  world.parent = parent;
  write();
  const one = chunks[5]! * CHUNK_BLOCKS + 60;
  const was = Buffer.from(world.content.subarray(one * BLOCK, (one + 1) * BLOCK));
  world.write(one, noise(1));
  const after = await world.publish('upload');
  was.copy(world.content, one * BLOCK);
  assert.ok(before.newChunks >= 4, `${before.newChunks} packs`);
  assert.equal(after.newChunks, 1);
  // And nothing new at all is nothing new.
  world.parent = parent;
  write();
  const again = await world.publish('upload');
  assert.equal(again.newChunks, 0);
  assert.equal(again.manifest.table, before.manifest.table);
});

test('generations: patches of patches, of holes, zeros and short ends; whatever was written is there, in every version', async () => {
  const world = await World.make(12 * MIB + 5 * BLOCK);
  const versions = [{ digest: world.parent, content: Buffer.from(world.content) }];
  const next = randomNumbers(5);
  let patched = 0;
  for (let generation = 0; generation < 12; generation++) {
    if (generation === 6) world.grow(3 * BLOCK);
    if (generation === 9) world.grow(2 * CHUNK + 512);
    const blocks = Math.floor(world.content.length / BLOCK);
    for (let i = next() % 40; i >= 0; i--) {
      const length = next() % 8 === 0 ? 1 + (next() % 80) : 1 + (next() % 3);
      // Again and again the same places, so that patches meet.
      const block = next() % 2 === 0 ? next() % blocks : next() % 200;
      const bytes = next() % 4 === 0 ? Buffer.alloc(length * BLOCK) : noise(length);
      world.write(block, bytes.subarray(0, (blocks - block) * BLOCK));
    }
    const { digest, table } = await world.publish(generation % 2 === 0 ? 'commit' : 'upload');
    patched += table.patchCount;
    // Never a patch of what is no object.
    for (const { patch } of table.entries())
      assert.ok(!patch || filesOf(world.store.layout.kind('chunks')).has(fileOf(patch.base.digest)));
    versions.push({ digest, content: Buffer.from(world.content) });
  }
  assert.ok(patched > 20, `${patched} patched chunks`);
  const cache = await openCache({ folder: path.join(folder, `cache${made}`), source: world.store });
  try {
    for (const { digest, content } of versions.toReversed()) {
      const image = await cache.openImage(digest);
      const all = Buffer.alloc(image.sizeBytes, 0xee);
      await image.read(all, 0);
      assert.ok(all.equals(content));
      await image.close();
      const file = path.join(folder, `${digest}.raw`);
      await exportImage(world.store, { manifest: digest, path: file });
      assert.ok(readFileSync(file).equals(content));
    }
  } finally {
    await cache.close();
  }
});

/** Guards PLACE_PACKS_MAX. */
test('a place that is committed to again and again has few packs, and those of others are left alone', async () => {
  const world = await World.make(20 * MIB);
  const chunks = await world.dataChunks(40);
  const [elsewhere] = chunks.splice(-1);
  world.write(elsewhere! * CHUNK_BLOCKS, noise(1));
  const there = chunks.filter((chunk) => chunk < 32);
  for (const chunk of there) {
    world.write(chunk * CHUNK_BLOCKS + 5, noise(1));
    await world.publish('commit');
  }
  const table = await world.table();
  const packs = new Set(there.map((chunk) => table.patchOf(chunk)!.pack!.digest));
  assert.ok(there.length > 12 && packs.size <= 5, `${packs.size} packs for ${there.length} commits`);
  assert.equal(table.patchOf(elsewhere!)!.pack!.blocks, 1);
});

/** Guards the second bound in `isScattered`: without it all of the place is packed anew each time. */
test('a place that is full of patches is left alone but for what changed', async () => {
  const world = await World.make(20 * MIB);
  const there = (await world.dataChunks(40)).filter((chunk) => chunk < 32);
  for (const chunk of there) world.write(chunk * CHUNK_BLOCKS + 5, noise(14));
  const { newChunks } = await world.publish('commit');
  assert.ok(newChunks >= 4, `${newChunks} packs`);
  world.write(there[3]! * CHUNK_BLOCKS + 40, noise(1));
  const { newStoredBytes } = await world.publish('commit');
  assert.ok(newStoredBytes < 16 * BLOCK, `${newStoredBytes} bytes`);
});

/** Guards the look at the lengths in patching.ts. */
test('a chunk that has grown with its disk is a whole one', async () => {
  const world = await World.make(4 * MIB + 20 * BLOCK);
  const last = (4 * MIB) / BLOCK;
  world.write(last, noise(20));
  await world.publish('commit');
  for (const way of ['commit', 'upload'] as const) {
    world.grow(20 * BLOCK);
    world.write(last + 3, noise(1));
    const { table } = await world.publish(way);
    assert.equal(table.patchOf(16), undefined);
  }
});

const fileOf = (digest: string) => `${digest.slice(0, 2)}/${digest}`;

/** Guards `objects` in gc.ts: with `entries` there the chunks below and the packs go. */
test('a collection leaves what patches are made of when their parent goes, and takes it when they go', async () => {
  const world = await World.make(6 * MIB);
  const grandparent = world.parent;
  const chunks = await world.dataChunks(6);
  for (const chunk of chunks) world.write(chunk * CHUNK_BLOCKS, noise(1));
  await world.publish('commit');
  for (const chunk of chunks.slice(3)) world.write(chunk * CHUNK_BLOCKS + 1, noise(1));
  const { digest } = await world.publish('commit');
  const { store, content } = world;
  const collect = async () => {
    for (const name of filesOf(store.layout.v1).keys()) utimesSync(path.join(store.layout.v1, name), 1, 1);
    return collectGarbage(store, { graceMs: 0 });
  };
  await store.removeTag('test', '1');
  await store.removeTag('test', '2');
  const { removed } = await collect();
  assert.equal(removed.manifests, 2);
  assert.ok(!filesOf(store.layout.kind('manifests')).has(fileOf(grandparent)));
  assert.equal(removed.chunks, 0, 'two packs and all chunks below are needed still');
  assert.ok((await readBack(store, digest)).equals(content));
  const { images } = await store.statistics();
  assert.equal(images[0]!.storedBytes, (await store.statistics()).storedBytes);
  await store.removeTag('test', '3');
  await collect();
  assert.equal(filesOf(store.layout.kind('chunks')).size, 0);
});

test('a pack or a chunk below that is not there, or is damaged, is found and named by verify', async () => {
  const world = await World.make(6 * MIB);
  const [chunk] = await world.dataChunks(1);
  world.write(chunk! * CHUNK_BLOCKS + 7, noise(2));
  const { table } = await world.publish('commit');
  const { base, pack } = table.patchOf(chunk!)!;
  const object = (digest: string) => world.store.layout.object('chunks', digest);
  rmSync(object(pack!.digest));
  chmodSync(object(base.digest), 0o600);
  writeFileSync(object(base.digest), 'damage');
  const { damaged, missing } = await verifyStore(world.store, {});
  assert.deepEqual(
    missing.map(({ digest, images }) => [digest, images]),
    [[pack!.digest, ['test:2']]],
  );
  assert.deepEqual(
    damaged.map(({ digest, images }) => [digest, images.toSorted()]),
    [[base.digest, ['test:1', 'test:2']]],
  );
});

/** Guards `otherwise` in patching.ts. */
test('a damaged pack of the parent does not stop who goes on from it: its blocks come from the disk', async () => {
  const world = await World.make(6 * MIB);
  const [chunk] = await world.dataChunks(1);
  world.write(chunk! * CHUNK_BLOCKS + 7, noise(2));
  let { table } = await world.publish('commit');
  for (const way of ['commit', 'upload'] as const) {
    const pack = table.patchOf(chunk!)!.pack!.digest;
    const file = world.store.layout.object('chunks', pack);
    const bytes = readFileSync(file);
    chmodSync(file, 0o600);
    writeFileSync(file, 'damage');
    world.write(chunk! * CHUNK_BLOCKS + (way === 'commit' ? 20 : 30), noise(1));
    ({ table } = await world.publish(way, [pack]));
    assert.equal(table.patchCount, 1);
    writeFileSync(file, bytes);
  }
});
