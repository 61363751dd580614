/** What a cache does when its source fails, lies or is gone. */
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { KIB, MIB, TAG_WAIT_MS } from '../../src/core/limits.ts';
import { failsWith, figures, makeHarness, readAll } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const harness = await makeHarness({ sizeBytes: 8 * MIB + 512, seed: 9, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;

test('chunks that arrive damaged are asked for again, and no wrong byte is read or stored', async () => {
  const folder = harness.fresh();
  const source = await harness.source(21);
  const cache = await harness.open({ folder, source });
  const image = await cache.openImage(fixture.digest);
  source.arm({ corruptShare: 0.15 });
  let refusals = 0;
  const target = Buffer.alloc(CHUNK_BYTES);
  for (const { index } of fixture.table.entries()) {
    const offset = index * CHUNK_BYTES;
    const part = target.subarray(0, Math.min(CHUNK_BYTES, image.sizeBytes - offset));
    const outcome: unknown = await image.read(part, offset).catch((error: unknown) => error);
    if (outcome === undefined) assert.ok(part.equals(raw.subarray(offset, offset + part.length)));
    else {
      refusals++;
      const error = await failsWith(Promise.reject(outcome), 'corrupt');
      assert.match(error.message, /chunk [0-9a-f]{12} from .*store/);
    }
  }
  const { corruptChunks } = await cache.status();
  assert.ok(
    corruptChunks > 2 * refusals,
    `seed ${source.seed}: ${corruptChunks} corrupt, ${refusals} refused`,
  );
  source.disarm();
  assert.ok((await readAll(image)).equals(raw));
  await cache.close();
  const again = await harness.open({ folder, source });
  assert.ok((await readAll(await again.openImage(fixture.digest))).equals(raw));
  assert.equal((await figures(again)).refetchedChunks, 0);
});

test('a chunk that stays damaged fails its reader with corrupt after two attempts; its neighbours are served', async () => {
  const source = await harness.source(22);
  const cache = await harness.open({ folder: harness.fresh(), source });
  const image = await cache.openImage(fixture.digest);
  source.arm({ corruptShare: 1 });
  const { index, digest } = fixture.table.entries().next().value!;
  await failsWith(image.read(Buffer.alloc(1), index * CHUNK_BYTES), 'corrupt');
  assert.equal(source.askedFor.get(digest), 2);
  assert.equal((await figures(cache)).presentChunks, 0);
  source.disarm();
  assert.ok((await readAll(image)).equals(raw));
});

test('a chunk that is not at the source fails its own reader and nobody else', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source });
  const image = await cache.openImage(fixture.digest);
  const all = [...fixture.table.entries()];
  const gone = all[3]!.digest;
  source.arm({ missing: new Set([gone]) });
  const outcomes = await Promise.allSettled(
    all.slice(0, 20).map(({ index }) => image.read(Buffer.alloc(8), index * CHUNK_BYTES)),
  );
  outcomes.forEach((outcome, i) => {
    assert.equal(outcome.status, all[i]!.digest === gone ? 'rejected' : 'fulfilled', `chunk ${i}`);
  });
  const failed = outcomes.find((outcome) => outcome.status === 'rejected')!;
  const error = await failsWith(Promise.reject(failed.reason), 'not-found');
  assert.match(error.message, new RegExp(gone.slice(0, 12)));
});

test('a source that leaves out a chunk without an error is asked again, then blamed', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source });
  const image = await cache.openImage(fixture.digest);
  source.arm({ forget: 1 });
  const indexes = [...fixture.table.entries()].slice(0, 5).map(({ index }) => index);
  const outcomes = await Promise.allSettled(
    indexes.map((index) => image.read(Buffer.alloc(8), index * CHUNK_BYTES)),
  );
  assert.equal(outcomes.filter((outcome) => outcome.status === 'fulfilled').length, 4);
  const failed = outcomes.find((outcome) => outcome.status === 'rejected')!;
  await failsWith(Promise.reject(failed.reason), 'origin-failed');
});

test('a failed fetch leaves nothing behind: the same read works when the source is back', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source });
  const image = await cache.openImage(fixture.digest);
  source.arm({ failWith: 'tunnel-lost' });
  await failsWith(image.read(Buffer.alloc(image.sizeBytes), 0), 'tunnel-lost');
  source.disarm();
  assert.ok((await readAll(image)).equals(raw));
});

test('nobody writes to a buffer after its read has failed', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source });
  const image = await cache.openImage(fixture.digest);
  // The first chunk fails at once, the others arrive later.
  source.arm({ missing: new Set([fixture.table.entries().next().value!.digest]) });
  const target = Buffer.alloc(image.sizeBytes, 0x55);
  await failsWith(image.read(target, 0), 'not-found');
  const asReturned = Buffer.from(target);
  await new Promise((resolve) => setTimeout(resolve, 100));
  assert.ok(target.equals(asReturned));
});

test('with everything here the source may be gone, over a restart too', async () => {
  const folder = harness.fresh();
  const first = await harness.open({ folder, source: await harness.source() });
  const tags = await first.listTags();
  await readAll(await first.openImage(fixture.digest));
  await first.close();
  const source = await harness.source();
  source.arm({ failWith: 'unreachable' });
  const second = await harness.open({ folder, source });
  assert.deepEqual(await second.listTags(), tags);
  const image = await second.openImage(fixture.digest);
  assert.ok((await readAll(image)).equals(raw));
  const status = await second.status();
  assert.match(status.tags!.stale!, /fails as it was told to/);
  assert.ok(status.tags!.ageMs < 60_000);
  assert.ok(second.lines.some((line) => /serving the tags known \d+ s ago/.test(line)));
});

test('without any known tags the source’s failure is the answer', async () => {
  const source = await harness.source();
  source.arm({ failWith: 'unreachable' });
  const cache = await harness.open({ folder: harness.fresh(), source });
  await failsWith(cache.listTags(), 'unreachable');
  source.disarm();
  assert.equal((await cache.listTags()).length, 1);
});

test('50 listings within the lifetime of the tags ask once; after it a moved tag is seen', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source, tagTtlMs: 50 });
  await Promise.all(Array.from({ length: 50 }, () => cache.listTags()));
  await cache.listTags();
  assert.equal(source.tagCalls, 1);
  await new Promise((resolve) => setTimeout(resolve, 60));
  await cache.listTags();
  assert.equal(source.tagCalls, 2);
});

// Without `moves` in catalog.ts the question that was under way would answer for the name as it was.
test('when a name was moved here, nobody is answered from what was asked before', async () => {
  const source = await harness.source();
  const before = await source.listTags();
  const after = before.map((tag) => ({ ...tag, manifest: 'ef'.repeat(32) }));
  const answers: PromiseWithResolvers<typeof before>[] = [];
  source.listTags = () => {
    const answer = Promise.withResolvers<typeof before>();
    answers.push(answer);
    return answer.promise;
  };
  const cache = await harness.open({ folder: harness.fresh(), source, tagTtlMs: 60_000 });
  const first = cache.listTags();
  answers[0]!.resolve(before);
  assert.deepEqual(await first, before);
  cache.expireTags();
  assert.equal(cache.recentTags(), undefined);
  const underWay = cache.listTags();
  cache.expireTags();
  const asked = cache.listTags();
  answers[2]!.resolve(after);
  assert.deepEqual(await asked, after);
  answers[1]!.resolve(before);
  await underWay;
  assert.deepEqual(await cache.listTags(), after);
  assert.deepEqual(cache.recentTags(), after);
  assert.equal(answers.length, 3);
});

test('recent tags come without waiting, and the source is asked behind', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source, tagTtlMs: 0 });
  assert.equal(cache.recentTags(), undefined);
  const tags = await cache.listTags();
  source.arm({ delayMs: 50 });
  assert.deepEqual(cache.recentTags(), tags);
  assert.deepEqual(cache.recentTags(), tags);
  for (let tries = 0; source.tagCalls < 2 && tries < 200; tries++)
    await new Promise((resolve) => setTimeout(resolve, 5));
  assert.equal(source.tagCalls, 2);
});

test('a source that does not answer delays a listing once, then the known tags come at once', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source, tagTtlMs: 0 });
  const tags = await cache.listTags();
  source.arm({ delayMs: TAG_WAIT_MS + 3000 });
  const start = performance.now();
  assert.deepEqual(await cache.listTags(), tags);
  const waitedMs = performance.now() - start;
  assert.ok(waitedMs > TAG_WAIT_MS - 100 && waitedMs < TAG_WAIT_MS + 2900, `waited ${waitedMs} ms`);
  assert.deepEqual(await cache.listTags(), tags);
  assert.ok(performance.now() - start < TAG_WAIT_MS + 2900);
  assert.match((await cache.status()).tags!.stale!, /has not answered/);
  source.disarm();
  const stale = async () => {
    await new Promise((resolve) => setTimeout(resolve, 100));
    await cache.listTags();
    return (await cache.status()).tags!.stale;
  };
  for (let tries = 0; tries < 200 && (await stale()) !== undefined; tries++);
  assert.equal((await cache.status()).tags!.stale, undefined);
});

test('manifest and table that arrive damaged are asked for once more; damaged ones on the disk are replaced', async () => {
  const folder = harness.fresh();
  const source = await harness.source(23);
  const cache = await harness.open({ folder, source });
  source.arm({ corruptShare: 1 });
  await failsWith(cache.readManifest(fixture.digest), 'corrupt');
  assert.equal(source.objectCalls, 2);
  source.disarm();
  await cache.openImage(fixture.digest);
  await cache.close();
  for (const file of [
    path.join(folder, 'manifests', fixture.digest),
    path.join(folder, 'tables', fixture.manifest.table),
    path.join(folder, 'tags.json'),
  ]) {
    writeFileSync(file, 'something else');
  }
  const again = await harness.open({ folder, source });
  const image = await again.openImage(fixture.digest);
  assert.ok((await readAll(image)).equals(raw));
  assert.ok(readFileSync(path.join(folder, 'tables', fixture.manifest.table)).equals(fixture.table.bytes));
});
