/** Commit: the new version is the disk, only what changed is worked on, and a failure leaves nothing. */
import assert from 'node:assert/strict';
import { readFileSync, utimesSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { collectGarbage, commitImage, openStore, verifyStore } from '../../src/store/index.ts';
import type { CommitOptions, Store } from '../../src/store/index.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';
import { assertNothingTemporary, failsWith, filesOf, readBack, testFolder } from './helpers.ts';

const CHUNK = 16 * 1024;
const BLOCK = 4096;
const folder = testFolder('commit');
let made = 0;

interface Disk {
  readonly store: Store;
  readonly parent: string;
  readonly content: Buffer;
  readonly reads: [offset: number, length: number][];
  readonly options: (changed: readonly number[], more?: Partial<CommitOptions>) => CommitOptions;
}

/** A store with an image of `sizeBytes`, and a disk with the same content that a test changes. */
async function makeDisk(sizeBytes: number): Promise<Disk> {
  const fixture = await makeFixtureStore(path.join(folder, `world${++made}`), {
    sizeBytes,
    seed: made,
    chunkBytes: CHUNK,
    labels: { os: 'debian', kernel: '6.1' },
  });
  const store = await openStore(fixture.storeFolder);
  const original = readFileSync(fixture.rawPath);
  const content = Buffer.from(original);
  const blockOf = (bytes: Buffer, block: number) => bytes.subarray(block * BLOCK, (block + 1) * BLOCK);
  const reads: [number, number][] = [];
  return {
    store,
    parent: fixture.digest,
    content,
    reads,
    options: (changed, more = {}) => ({
      parent: fixture.digest,
      reference: 'test:2',
      sizeBytes: content.length,
      changed: () => changed,
      isChanged: (block) => !blockOf(content, block).equals(blockOf(original, block)),
      read: async (target, offset) => {
        reads.push([offset, target.length]);
        content.copy(target, 0, offset, offset + target.length);
      },
      ...more,
    }),
  };
}

async function assertVersion(store: Store, digest: string, content: Buffer): Promise<void> {
  assert.ok((await readBack(store, digest)).equals(content));
  const { damaged, missing } = await verifyStore(store, {});
  assert.deepEqual({ damaged, missing }, { damaged: [], missing: [] });
  assertNothingTemporary(store);
}

test('only changed blocks are read and only their chunks stored; parent, parts and labels are there', async () => {
  const { store, parent, content, reads, options } = await makeDisk(200 * CHUNK);
  content.fill(1, 3 * CHUNK + 5, 3 * CHUNK + 9);
  content.fill(2, 50 * CHUNK, 53 * CHUNK);
  const before = filesOf(store.layout.kind('chunks')).size;
  const result = await commitImage(
    store,
    options([3, 50, 51, 52], { labels: { kernel: '6.2', 'commit.clone': 'work' } }),
  );
  assert.deepEqual(reads, [
    [3 * CHUNK, BLOCK],
    [50 * CHUNK, 3 * CHUNK],
  ]);
  assert.deepEqual(
    [result.changedChunks, result.newChunks],
    [4, 2],
    'three of them are one and the same chunk',
  );
  assert.equal(filesOf(store.layout.kind('chunks')).size, before + 2);
  assert.equal(result.manifest.parent, parent);
  assert.deepEqual(result.manifest.labels, { os: 'debian', kernel: '6.2', 'commit.clone': 'work' });
  assert.deepEqual(await store.resolve('test:2'), result.tag);
  await assertVersion(store, result.digest, content);
});

test('chunks that have become zeros are holes, and a chunk that is as the parent has it stores nothing', async () => {
  const { store, content, options } = await makeDisk(64 * CHUNK);
  content.fill(0, 0, 30 * CHUNK);
  const result = await commitImage(store, options(Array.from({ length: 40 }, (_, i) => i)));
  assert.equal(result.newChunks, 0);
  const { images } = await store.statistics();
  const [before, after] = images.map((image) => image.manifest.nonzeroBytes);
  assert.ok(after! < before!);
  await assertVersion(store, result.digest, content);
});

test('a larger disk: the short last chunk of the parent becomes a whole one', async () => {
  const disk = await makeDisk(20 * CHUNK + 1024);
  disk.content.fill(9, 20 * CHUNK);
  const first = await commitImage(disk.store, disk.options([20]));
  const larger = Buffer.concat([disk.content, Buffer.alloc(30 * CHUNK)]);
  larger.fill(5, 40 * CHUNK, 40 * CHUNK + 512);
  const result = await commitImage(disk.store, {
    ...disk.options([40]),
    parent: first.digest,
    sizeBytes: larger.length,
    isChanged: (block) => block === (40 * CHUNK) / BLOCK,
    read: async (target, offset) => void larger.copy(target, 0, offset, offset + target.length),
  });
  assert.equal(result.changedChunks, 2);
  await assertVersion(disk.store, result.digest, larger);
});

test('what lies around changed blocks is read where it is here, and taken from the parent where it is not', async () => {
  const { store, content, reads, options } = await makeDisk(64 * CHUNK);
  const changed = [10, 11, 12, 30, 40];
  for (const chunk of changed) content.fill(chunk, chunk * CHUNK + BLOCK, chunk * CHUNK + 3 * BLOCK);
  content.fill(1, 50 * CHUNK, 51 * CHUNK);
  const here: number[] = [];
  const result = await commitImage(
    store,
    options([...changed, 50], {
      readHere(target, offset) {
        here.push(offset / CHUNK);
        if ((offset / CHUNK) % 2 === 1) return false;
        content.copy(target, 0, offset, offset + target.length);
        return true;
      },
    }),
  );
  assert.deepEqual(here, changed, 'of a chunk that changed as a whole nothing else is asked for');
  assert.deepEqual(reads, [
    [11 * CHUNK + BLOCK, 2 * BLOCK],
    [50 * CHUNK, CHUNK],
  ]);
  await assertVersion(store, result.digest, content);
});

/**
 * Guarded lines of commit.ts publish, tried by taking them out: `writer.publish`, with a flush in its place (the
 * version names a chunk that is not there); #checkTakenOver (the same, of the parent's).
 */
test('what a collection takes from under a commit is stored by a second pass; without its parent it is refused', async () => {
  const { store, content, options } = await makeDisk(64 * CHUNK);
  const changed = Array.from({ length: 10 }, (_, i) => 5 + 2 * i);
  content.fill(200, 5 * CHUNK, 6 * CHUNK);
  await commitImage(store, options([5], { reference: 'gone:1' }));
  await store.removeTag('gone', '1');
  for (const name of filesOf(store.layout.v1).keys()) utimesSync(path.join(store.layout.v1, name), 1, 1);
  for (const chunk of changed.slice(1)) content.fill(chunk, chunk * CHUNK, (chunk + 1) * CHUNK);

  /** A commit during which, when its first chunks are packed, `meanwhile` happens. */
  const commitDuring = (meanwhile: () => Promise<unknown>) => {
    const packed = Promise.withResolvers<void>();
    let done: Promise<unknown> | undefined;
    return commitImage(
      store,
      options(changed, {
        onProgress: () => packed.resolve(),
        async read(target, offset) {
          if (offset === changed.at(-1)! * CHUNK) await (done ??= packed.promise.then(meanwhile));
          content.copy(target, 0, offset, offset + target.length);
        },
      }),
    );
  };
  let removed = 0;
  const collect = async () => (removed = (await collectGarbage(store, { graceMs: 0 })).removed.chunks);
  const result = await commitDuring(collect);
  assert.equal(removed, 1, 'the chunk that the commit had found');
  assert.equal(result.newChunks, changed.length);
  await assertVersion(store, result.digest, content);

  for (const name of filesOf(store.layout.v1).keys()) utimesSync(path.join(store.layout.v1, name), 1, 1);
  content.fill(201, 5 * CHUNK, 6 * CHUNK);
  const tags = await store.listTags();
  const orphaned = commitDuring(async () => {
    for (const { name, version } of tags) await store.removeTag(name, version);
    await collect();
  });
  await failsWith(orphaned, 'not-found');
  assert.ok(removed > 0);
  assert.deepEqual(await store.listTags(), []);
  assertNothingTemporary(store);
});

test('a standalone disk takes nothing over from the parent', async () => {
  const { store, content, options } = await makeDisk(50 * CHUNK);
  content.fill(0);
  content.fill(6, 7 * CHUNK, 9 * CHUNK);
  const result = await commitImage(store, options([7, 8], { standalone: true }));
  assert.equal(result.manifest.nonzeroBytes, 2 * CHUNK);
  await assertVersion(store, result.digest, content);
});

test('a commit of nothing is the parent under another name', async () => {
  const { store, parent, content, options } = await makeDisk(10 * CHUNK);
  const result = await commitImage(store, options([]));
  assert.equal(result.manifest.parent, parent);
  await assertVersion(store, result.digest, content);
});

test('a failed read, a cancel, a smaller disk, an unknown parent and bad words leave the store as it was', async () => {
  // More than one round and one unit, so that it is in the middle of its work.
  const { store, content, options } = await makeDisk(40 * 64 * CHUNK);
  for (let at = 0; at < content.length; at += 4) content.writeUInt32LE(at, at);
  const all = Array.from({ length: 40 * 64 }, (_, i) => i);
  const tags = await store.listTags();
  let reads = 0;
  const broken = (target: Uint8Array) => {
    if (++reads > 35) return Promise.reject(new Error('the tunnel is gone'));
    target.fill(reads);
    return Promise.resolve();
  };
  await assert.rejects(commitImage(store, options(all, { read: broken })), /the tunnel is gone/);
  const cancel = new AbortController();
  const cancelled = options(all, { signal: cancel.signal, onProgress: () => cancel.abort() });
  await failsWith(commitImage(store, cancelled), 'closed');
  await failsWith(commitImage(store, options([], { sizeBytes: content.length - 512 })), 'bad-request');
  await failsWith(commitImage(store, options([], { parent: 'e'.repeat(64) })), 'not-found');
  await failsWith(commitImage(store, options([], { reference: 'Not A Name' })), 'bad-request');
  await failsWith(commitImage(store, options([], { labels: { a: 'x'.repeat(5000) } })), 'bad-request');
  assert.deepEqual(await store.listTags(), tags);
  assertNothingTemporary(store);
  const result = await commitImage(store, options(all));
  await assertVersion(store, result.digest, content);
});
