/** A cache as a source: the contract of all sources, and what only a tier does. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { chunkSourceSuite, SUITE_FIXTURE } from '../suites/chunk-source.ts';
import type { ChunkSource } from '../../src/core/source.ts';
import { failsWith, figures, makeHarness, readAll } from './harness.ts';

const harness = await makeHarness(SUITE_FIXTURE);
const { fixture, raw } = harness;

for (const encoding of ['plain', 'zstd'] as const) {
  chunkSourceSuite(`cold cache, ${encoding}`, async () => {
    const cache = await harness.open({ folder: harness.fresh(), source: await harness.source() });
    const source = cache.asSource({ encoding });
    return { source, fixture, close: () => source.close() };
  });
}

chunkSourceSuite('warm cache', async () => {
  const folder = harness.fresh();
  const first = await harness.open({ folder, source: await harness.source() });
  await readAll(await first.openImage(fixture.digest));
  await first.close();
  const cache = await harness.open({ folder, source: await harness.source() });
  const source = cache.asSource();
  return { source, fixture, close: () => source.close() };
});

test('two hosts behind a site’s cache cost the origin one fetch of each chunk, and none after a restart', async () => {
  const origin = await harness.source();
  const siteFolder = harness.fresh();
  const site = await harness.open({ folder: siteFolder, source: origin });
  const tier = site.asSource();
  for (let host = 0; host < 2; host++) {
    const cache = await harness.open({ folder: harness.fresh(), source: tier });
    assert.ok((await readAll(await cache.openImage(fixture.digest))).equals(raw));
  }
  assert.equal(origin.chunksAskedFor, harness.distinctChunks);
  const before = origin.chunksAskedFor;
  await site.flush();
  assert.ok((await figures(site)).presentChunks >= harness.distinctChunks);
  await tier.close();
  await site.close();
  const again = await harness.open({ folder: siteFolder, source: origin });
  const second = again.asSource();
  const host = await harness.open({ folder: harness.fresh(), source: second });
  assert.ok((await readAll(await host.openImage(fixture.digest))).equals(raw));
  assert.equal(origin.chunksAskedFor, before);
  await second.close();
});

test('a site passes profiles on, both ways, and refuses recordings where the origin keeps none', async () => {
  const origin = await harness.source();
  const bytes = Buffer.from('{}');
  const given: Buffer[] = [];
  const keeper: ChunkSource = {
    name: origin.name,
    listTags: () => origin.listTags(),
    readManifest: (digest) => origin.readManifest(digest),
    readTable: (digest) => origin.readTable(digest),
    readChunks: (...args) => origin.readChunks(...args),
    close: () => origin.close(),
    readProfile: () => Promise.resolve(bytes),
    recordProfile: (_manifest, _purpose, recording) => {
      given.push(recording);
      return Promise.resolve();
    },
  };
  const site = await harness.open({ folder: harness.fresh(), source: keeper });
  const tier = site.asSource();
  assert.equal(await tier.readProfile!(fixture.digest, 'boot'), bytes);
  await tier.recordProfile!(fixture.digest, 'boot', bytes);
  assert.deepEqual(given, [bytes]);
  await tier.close();
  const plain = (await harness.open({ folder: harness.fresh(), source: origin })).asSource();
  assert.equal(await plain.readProfile!(fixture.digest, 'boot'), undefined);
  await failsWith(plain.recordProfile!(fixture.digest, 'boot', bytes), 'denied');
  await plain.close();
});

test('what a host prefetches through a site is prefetch for the origin too', async () => {
  const origin = await harness.source();
  const site = await harness.open({ folder: harness.fresh(), source: origin });
  const tier = site.asSource();
  const host = await harness.open({ folder: harness.fresh(), source: tier });
  await host.warm(fixture.digest);
  assert.equal(origin.demandCalls, 0);
  assert.equal(origin.chunksAskedFor, harness.distinctChunks);
  await tier.close();
});

test('a host that asks a restarted site for chunks alone is served from the site’s disk', async () => {
  const origin = await harness.source();
  const folder = harness.fresh();
  const first = await harness.open({ folder, source: origin });
  await readAll(await first.openImage(fixture.digest));
  await first.close();
  const site = await harness.open({ folder, source: origin });
  const before = origin.chunksAskedFor;
  const { digest } = fixture.table.entries().next().value!;
  let delivered = 0;
  await site
    .asSource()
    .readChunks(
      [{ digest, plainBytes: fixture.manifest.chunkBytes }],
      { priority: 'demand' },
      () => delivered++,
    );
  assert.deepEqual([delivered, origin.chunksAskedFor], [1, before]);
});
