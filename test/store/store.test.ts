/** The folder and its tags: what is a store, what is not, and names that move. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { GridError } from '../../src/core/errors.ts';
import { MIB } from '../../src/core/limits.ts';
import { parseTags } from '../../src/core/manifest.ts';
import { importImage, initStore, openStore } from '../../src/store/index.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';
import { failsWith, filesOf, newStore, testFolder } from './helpers.ts';

const folder = testFolder('tags');
const newFolder = () => mkdtempSync(path.join(folder, 'f-'));

test('init makes a store, also below folders that are not there yet, and does nothing the second time', async () => {
  const place = path.join(newFolder(), 'a', 'b');
  await initStore(place);
  const files = filesOf(place);
  await initStore(place);
  assert.deepEqual(filesOf(place), files);
  assert.deepEqual([...files.keys()], ['gridvfs-store.json', 'lock', 'v1/tags.json']);
  assert.deepEqual(parseTags(readFileSync(path.join(place, 'v1/tags.json')), 'tags'), []);
  const store = await openStore(place);
  assert.equal(store.name, place);
  assert.deepEqual(await store.listTags(), []);
});

test('init at the same time from several sides makes one store', async () => {
  const place = newFolder();
  await Promise.all([1, 2, 3].map(() => initStore(place)));
  await openStore(place);
  assert.deepEqual(readdirSync(path.join(place, 'tmp')), []);
});

test('init refuses a folder that holds something else, and touches nothing in it', async () => {
  const place = newFolder();
  writeFileSync(path.join(place, 'thesis.tex'), 'years of work');
  const error = await failsWith(initStore(place), 'exists');
  assert.match(error.message, /thesis\.tex/);
  assert.deepEqual([...filesOf(place).keys()], ['thesis.tex']);
  await failsWith(initStore(path.join(place, 'thesis.tex')), 'exists');
});

test('init goes on where one that was killed stopped', async () => {
  const place = newFolder();
  mkdirSync(path.join(place, 'tmp'));
  writeFileSync(path.join(place, 'tmp', 'replace'), 'half');
  writeFileSync(path.join(place, 'lock'), '');
  await initStore(place);
  await openStore(place);
  assert.deepEqual(readdirSync(path.join(place, 'tmp')), []);
});

test('open says what is wrong with a folder and what to do about it', async () => {
  const nothing = path.join(newFolder(), 'nothing');
  assert.match((await failsWith(openStore(nothing), 'not-found')).message, /gridvfs store init/);
  const empty = newFolder();
  assert.ok((await failsWith(openStore(empty), 'not-found')).message.includes(empty));
  const marked = (marker: string) => {
    const place = newFolder();
    writeFileSync(path.join(place, 'gridvfs-store.json'), marker);
    return place;
  };
  for (const damaged of ['', 'null', '[]', '{"format":"other","version":1}', '{"format":"gridvfs-store"}']) {
    await failsWith(openStore(marked(damaged)), 'bad-format');
    await failsWith(initStore(marked(damaged)), 'bad-format');
  }
  const newer = marked('{"format":"gridvfs-store","version":2}');
  assert.match((await failsWith(openStore(newer), 'newer-format')).message, /upgrade gridvfs/);
  await failsWith(initStore(newer), 'newer-format');
  assert.equal(readdirSync(newer).length, 1);
});

test('a tag moves, goes, and is never pointed at what is not there', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 1 * MIB, seed: 40 });
  const store = await openStore(fixture.storeFolder);
  await store.setTag('debian', '12', fixture.digest);
  const moved = await store.setTag('debian', '12', fixture.digest);
  assert.deepEqual(await store.resolve('debian:12'), moved);
  await failsWith(store.setTag('debian', '12', 'ab'.repeat(32)), 'not-found');
  await failsWith(store.setTag('debian', '12', fixture.manifest.table), 'not-found');
  await failsWith(store.setTag('debian', '12', '../../etc/passwd'), 'bad-request');
  for (const hostile of [
    '',
    '..',
    '.hidden',
    '-rf',
    'a/b',
    'a b',
    'Ä',
    'a\n',
    'a:b',
    'x'.repeat(129),
    '__proto__',
  ]) {
    await failsWith(store.setTag(hostile, '1', fixture.digest), 'bad-request');
    await failsWith(store.setTag('a', hostile, fixture.digest), 'bad-request');
    await failsWith(store.resolve(`${hostile}:1:2`), 'bad-request');
  }
  await store.removeTag('debian', '12');
  await failsWith(store.removeTag('debian', '12'), 'not-found');
  assert.deepEqual(
    (await store.listTags()).map(({ name }) => name),
    ['test'],
  );
});

test('an unknown image is answered with up to five that are near', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 4096, seed: 41, chunkBytes: 4096 });
  const store = await openStore(fixture.storeFolder);
  for (let version = 1; version <= 8; version++) await store.setTag('debian', `${version}`, fixture.digest);
  await store.setTag('fedora', '40', fixture.digest);
  const other = await failsWith(store.resolve('debian:99'), 'not-found');
  assert.equal(other.message.match(/debian:\d/g)?.length, 6, other.message);
  assert.match((await failsWith(store.resolve('fedroa:40'), 'not-found')).message, /fedora:40/);
  assert.match((await failsWith(store.resolve('windows-server-2022:1'), 'not-found')).message, /store ls/);
  const empty = await newStore(folder);
  assert.match((await failsWith(empty.resolve('a'), 'not-found')).message, /no images yet/);
});

test('tags that many set at once are all there', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 4096, seed: 42, chunkBytes: 4096 });
  const stores = await Promise.all([1, 2, 3].map(() => openStore(fixture.storeFolder)));
  await Promise.all(
    Array.from({ length: 24 }, (_, i) => stores[i % 3]!.setTag('many', `${i}`, fixture.digest)),
  );
  assert.equal((await stores[0]!.listTags()).length, 25);
  assert.deepEqual(readdirSync(path.join(fixture.storeFolder, 'tmp')), []);
});

test('a lost or damaged list of tags is said to be that', async () => {
  const store = await newStore(folder);
  writeFileSync(store.layout.tags, '{"schema":1,"tags":[{"name":"../x"}]}');
  await failsWith(store.listTags(), 'bad-format');
  writeFileSync(store.layout.tags, '{"schema":2,"tags":[]}');
  await failsWith(store.listTags(), 'newer-format');
  rmSync(store.layout.tags);
  assert.match((await failsWith(store.listTags(), 'bad-format')).message, /tags\.json/);
});

test('statistics count what an image costs, and what images share once', async () => {
  const place = newFolder();
  const fixture = await makeFixtureStore(place, { sizeBytes: 6 * MIB, seed: 43 });
  const store = await openStore(fixture.storeFolder);
  await importImage(store, { path: fixture.rawPath, reference: 'again:1' });
  const { images, chunks, storedBytes } = await store.statistics();
  const digests = new Set([...fixture.table.entries()].map(({ digest }) => digest));
  let bytes = 0;
  for (const digest of digests) bytes += statSync(store.layout.object('chunks', digest)).size;
  for (const image of images) assert.deepEqual([image.chunks, image.storedBytes], [digests.size, bytes]);
  assert.deepEqual([images.length, chunks, storedBytes], [2, digests.size, bytes]);
  assert.equal(images[0]!.manifest.sizeBytes, 6 * MIB);
});

test('a chunk file of a length that no such chunk has is corrupt, a missing one not-found, both named', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 1 * MIB, seed: 44, chunkBytes: 65536 });
  const store = await openStore(fixture.storeFolder);
  const [first, second, third] = [...fixture.table.entries()];
  const replace = (digest: string, bytes: Uint8Array) => {
    rmSync(store.layout.object('chunks', digest));
    writeFileSync(store.layout.object('chunks', digest), bytes);
  };
  replace(first!.digest, Buffer.alloc(0));
  replace(second!.digest, Buffer.alloc(1 * MIB));
  rmSync(store.layout.object('chunks', third!.digest));
  for (const [entry, code] of [
    [first!, 'corrupt'],
    [second!, 'corrupt'],
    [third!, 'not-found'],
  ] as const) {
    const error = await failsWith(
      store.readChunks([{ digest: entry.digest, plainBytes: 65536 }], { priority: 'demand' }, () =>
        assert.fail('delivered'),
      ),
      code,
    );
    assert.ok(error instanceof GridError && error.message.includes(entry.digest), error.message);
  }
});
