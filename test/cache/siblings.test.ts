/** Chunks that another image of the cache has are copied, and are right even when that image's are not. */
import assert from 'node:assert/strict';
import { closeSync, copyFileSync, openSync, writeSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { KIB, MIB } from '../../src/core/limits.ts';
import { parseManifest } from '../../src/core/manifest.ts';
import { importImage, openStore } from '../../src/store/index.ts';
import { randomBuffer, randomNumbers } from '../suites/fixtures.ts';
import { makeHarness, readAll, readAtRandom } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const CHANGED = 12;
const harness = await makeHarness({ sizeBytes: 10 * MIB, seed: 41, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;

/** A second version in the same store: some chunks changed, the rest as in the first. */
const second = await (async () => {
  const rawPath = path.join(harness.folder, 'second.raw');
  copyFileSync(fixture.rawPath, rawPath);
  const bytes = Buffer.from(raw);
  const next = randomNumbers(6);
  const fd = openSync(rawPath, 'r+');
  for (let i = 0; i < CHANGED; i++) {
    const at = (3 + i * 11) * CHUNK_BYTES;
    const change = randomBuffer(next, 4096);
    change.copy(bytes, at);
    writeSync(fd, change, 0, change.length, at);
  }
  closeSync(fd);
  const store = await openStore(fixture.storeFolder);
  const { digest } = await importImage(store, {
    path: rawPath,
    reference: 'test:2',
    format: 'raw',
    chunkBytes: CHUNK_BYTES,
  });
  const manifest = parseManifest(await store.readManifest(digest), digest);
  const table = ChunkTable.parse(await store.readTable(manifest.table), manifest.table);
  await store.close();
  return { digest, bytes, table };
})();

test('a second version fetches only what changed, also when the first was cached by an earlier process', async () => {
  const source = await harness.source();
  const folder = harness.fresh();
  const first = await harness.open({ folder, source });
  await first.warm(fixture.digest);
  await first.close();
  const before = source.chunksAskedFor;
  const cache = await harness.open({ folder, source });
  assert.ok((await readAll(await cache.openImage(second.digest))).equals(second.bytes));
  assert.equal(source.chunksAskedFor - before, CHANGED);
  await cache.flush();
  const status = (await cache.status()).images.find(({ manifest }) => manifest === second.digest)!;
  assert.equal(status.presentChunks, second.table.entryCount);
  assert.equal(status.savedChunks, second.table.entryCount - CHANGED);
  await cache.close();
  // What was copied is as good on the disk as what was fetched.
  const again = await harness.open({ folder, source });
  assert.ok((await readAll(await again.openImage(second.digest))).equals(second.bytes));
  assert.equal(source.chunksAskedFor - before, CHANGED);
  assert.equal((await again.status()).refetchedChunks, 0);
});

test('damage in the sibling is never copied', async () => {
  const source = await harness.source();
  const folder = harness.fresh();
  const first = await harness.open({ folder, source });
  await first.warm(fixture.digest);
  await first.close();
  const fd = openSync(path.join(folder, 'images', fixture.digest, 'data'), 'r+');
  for (let at = 100; at < raw.length; at += 5 * CHUNK_BYTES) writeSync(fd, 'damage', at);
  closeSync(fd);
  const cache = await harness.open({ folder, source });
  assert.ok((await readAll(await cache.openImage(second.digest))).equals(second.bytes));
  assert.ok((await readAll(await cache.openImage(fixture.digest))).equals(raw));
  await cache.flush();
  assert.ok((await readAll(await cache.openImage(second.digest))).equals(second.bytes));
});

test('siblings that are being evicted while they are copied never give a wrong byte', async () => {
  const source = await harness.source();
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source, quotaBytes: 6 * MIB });
  const one = await cache.openImage(fixture.digest);
  const two = await cache.openImage(second.digest);
  for (let round = 0; round < 6; round++) {
    await Promise.all([
      readAtRandom(one, raw, 60, 70 + round, 100_000),
      readAtRandom(two, second.bytes, 60, 80 + round, 100_000),
    ]);
  }
  await cache.flush();
  const status = await cache.status();
  assert.ok(status.savedChunks > 20, `${status.savedChunks} saved`);
  assert.ok(status.evictedChunks > 50, `${status.evictedChunks} evicted`);
  await cache.close();
  const again = await harness.open({ folder, source });
  assert.ok((await readAll(await again.openImage(second.digest))).equals(second.bytes));
  assert.ok((await readAll(await again.openImage(fixture.digest))).equals(raw));
  assert.equal((await again.status()).refetchedChunks, 0);
});
