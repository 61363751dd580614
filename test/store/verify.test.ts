/** Verify finds every kind of damage and says which images it is in. */
import assert from 'node:assert/strict';
import {
  appendFileSync,
  chmodSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { mkdtempSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { KIB, MIB } from '../../src/core/limits.ts';
import { encodeProfile } from '../../src/core/profile.ts';
import { importImage, openStore, verifyStore } from '../../src/store/index.ts';
import type { Store } from '../../src/store/index.ts';
import { makeFixtureStore, randomNumbers } from '../suites/fixtures.ts';
import type { FixtureStore } from '../suites/fixtures.ts';
import { failsWith, testFolder } from './helpers.ts';

const folder = testFolder('verify');

async function twoImages(seed: number): Promise<{ store: Store; fixture: FixtureStore; other: string }> {
  const fixture = await makeFixtureStore(mkdtempSync(path.join(folder, 'f-')), {
    sizeBytes: 4 * MIB,
    seed,
    chunkBytes: 32 * KIB,
  });
  const store = await openStore(fixture.storeFolder);
  const file = path.join(folder, `other-${seed}`);
  writeFileSync(file, Buffer.alloc(100_000, 'other '));
  const { digest } = await importImage(store, { path: file, reference: 'other:1', kind: 'data' });
  return { store, fixture, other: digest };
}

function flipBit(file: string, next: () => number): void {
  const bytes = readFileSync(file);
  const at = next() % bytes.length;
  bytes[at] = bytes[at]! ^ (1 << (next() % 8));
  chmodSync(file, 0o644);
  writeFileSync(file, bytes);
}

test('a whole store has nothing to report, and all of it was looked at', async () => {
  const { store, fixture } = await twoImages(50);
  const seen: number[] = [];
  const result = await verifyStore(store, {
    onProgress: (done, total) => seen.push(done / total),
  });
  const chunks = new Set([...fixture.table.entries()].map(({ digest }) => digest)).size + 1;
  assert.equal(result.checkedObjects, chunks + 2 + 2);
  assert.deepEqual([result.damaged, result.missing, result.unreferencedChunks], [[], [], 0]);
  assert.equal(seen.at(-1), 1);
});

test('a flipped bit anywhere in a chunk is found, or changes no byte of what it decodes to', async () => {
  const { store, fixture } = await twoImages(51);
  const next = randomNumbers(51);
  const digests = [...new Set([...fixture.table.entries()].map(({ digest }) => digest))].slice(0, 40);
  for (const digest of digests) flipBit(store.layout.object('chunks', digest), next);
  const { damaged, missing } = await verifyStore(store);
  // zstd's frame header has a bit or two that do not matter.
  assert.ok(damaged.length >= digests.length - 2, `${damaged.length} of ${digests.length}`);
  for (const one of damaged) {
    assert.deepEqual([one.kind, one.images], ['chunks', [fixture.reference]]);
    assert.equal(one.path, store.layout.object('chunks', one.digest));
    assert.ok(digests.includes(one.digest));
    assert.match(one.reason, /digest|decompress/);
  }
  assert.deepEqual(missing, []);
});

test('truncated, empty, exchanged and foreign files are found', async () => {
  const { store, fixture } = await twoImages(52);
  const [truncated, empty, exchanged, exchangedWith] = [
    ...new Set([...fixture.table.entries()].map(({ digest }) => digest)),
  ].map((digest) => ({ digest, file: store.layout.object('chunks', digest) }));
  truncateSync(truncated!.file, statSync(truncated!.file).size - 1);
  truncateSync(empty!.file, 0);
  rmSync(exchanged!.file);
  writeFileSync(exchanged!.file, readFileSync(exchangedWith!.file));
  const foreign = path.join(path.dirname(truncated!.file), 'notes.txt');
  writeFileSync(foreign, 'hello');
  writeFileSync(path.join(store.layout.v1, 'chunks', 'file'), 'hello');
  const { damaged } = await verifyStore(store);
  assert.deepEqual(
    damaged
      .filter(({ kind }) => kind === 'chunks')
      .map(({ digest }) => digest)
      .toSorted(),
    [truncated!.digest, empty!.digest, exchanged!.digest].toSorted(),
  );
  assert.deepEqual(
    damaged
      .filter(({ kind }) => kind === 'foreign')
      .map((one) => one.path)
      .toSorted(),
    [foreign, path.join(store.layout.v1, 'chunks', 'file')].toSorted(),
  );
});

test('bytes after the end of an object are found, though every reader ignores them', async () => {
  const { store, fixture } = await twoImages(57);
  const chunk = fixture.table.digestOfEntry(2);
  for (const file of [
    store.layout.object('chunks', chunk),
    store.layout.object('tables', fixture.manifest.table),
  ]) {
    chmodSync(file, 0o644);
    appendFileSync(file, 'x');
  }
  const { damaged } = await verifyStore(store);
  assert.deepEqual(
    damaged.map(({ kind, digest, reason }) => [kind, digest, reason]),
    [
      ['chunks', chunk, 'it goes on after its end'],
      ['tables', fixture.manifest.table, 'it goes on after its end'],
    ],
  );
});

test('a damaged profile is found, with the image that it is for', async () => {
  const { store, fixture } = await twoImages(58);
  const profile = { manifest: fixture.digest, purpose: 'boot', runs: 1, early: [1], late: [] };
  await store.recordProfile(fixture.digest, 'boot', encodeProfile(profile));
  assert.deepEqual((await verifyStore(store)).damaged, []);
  const file = path.join(store.layout.profiles(fixture.digest), 'boot.json');
  truncateSync(file, 20);
  const foreign = path.join(store.layout.profiles(fixture.digest), 'Not A Purpose');
  writeFileSync(foreign, '');
  const { damaged } = await verifyStore(store);
  assert.deepEqual(
    damaged.map((one) => [one.path, one.kind, one.digest, one.images]),
    [
      [foreign, 'profiles', fixture.digest, ['test:1']],
      [file, 'profiles', fixture.digest, ['test:1']],
    ],
  );
});

test('missing chunks, tables and manifests are named with every image that needs them', async () => {
  const { store, fixture, other } = await twoImages(53);
  await store.setTag('alias', '1', fixture.digest);
  const victim = fixture.table.digestOfEntry(3);
  rmSync(store.layout.object('chunks', victim));
  let { missing } = await verifyStore(store);
  assert.deepEqual(missing, [{ kind: 'chunks', digest: victim, images: ['alias:1', 'test:1'] }]);
  rmSync(store.layout.object('tables', fixture.manifest.table));
  rmSync(store.layout.object('manifests', other));
  ({ missing } = await verifyStore(store));
  assert.deepEqual(missing, [
    { kind: 'manifests', digest: other, images: ['other:1'] },
    { kind: 'tables', digest: fixture.manifest.table, images: ['alias:1', 'test:1'] },
  ]);
});

test('damaged tables, manifests and tags are found', async () => {
  const { store, fixture, other } = await twoImages(54);
  const manifest = store.layout.object('manifests', other);
  rmSync(manifest);
  writeFileSync(manifest, '{}');
  const table = store.layout.object('tables', fixture.manifest.table);
  truncateSync(table, statSync(table).size - 5);
  const { damaged } = await verifyStore(store);
  assert.deepEqual(
    damaged.map(({ kind, digest, images }) => [kind, digest, images]),
    [
      ['manifests', other, ['other:1']],
      ['tables', fixture.manifest.table, ['test:1']],
    ],
  );
  writeFileSync(store.layout.tags, 'nonsense');
  const withoutTags = await verifyStore(store);
  assert.equal(withoutTags.damaged[0]!.kind, 'tags');
  assert.equal(withoutTags.damaged.length, 3);
});

test('chunks of an image that was removed are counted as unreferenced', async () => {
  const { store } = await twoImages(55);
  await store.removeTag('other', '1');
  const { damaged, missing, unreferencedChunks } = await verifyStore(store);
  assert.deepEqual([damaged, missing, unreferencedChunks], [[], [], 1]);
});

test('a verification that is cancelled ends with closed', async () => {
  const { store } = await twoImages(56);
  const abort = new AbortController();
  await failsWith(verifyStore(store, { signal: abort.signal, onProgress: () => abort.abort() }), 'closed');
});
