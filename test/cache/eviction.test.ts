/**
 * Eviction: what goes, what never goes, and that nobody ever reads what is going.
 *
 * The line that the worker test guards is `await this.#context.quiet.quiet()` in cache/image-file.ts: without it
 * the workers read zeros of punched holes.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { fstatSync, readFileSync, readSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { Worker } from 'node:worker_threads';
import { KIB, MIB } from '../../src/core/limits.ts';
import { QuietPoints } from '../../src/core/quiet.ts';
import { failsWith, figures, makeHarness, readAll, readAtRandom } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const harness = await makeHarness({ sizeBytes: 20 * MIB + 512, seed: 29, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;
const indexes = [...fixture.table.entries()].map(({ index }) => index);
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

test('what was used least recently goes first', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source, quotaBytes: 6 * MIB });
  const image = await cache.openImage(fixture.digest);
  const hot = indexes.filter((_, at) => at % 8 === 0).slice(0, 25);
  const readHot = async () => {
    for (const index of hot) await image.read(Buffer.alloc(16), index * CHUNK_BYTES);
  };
  await readHot();
  await cache.flush();
  for (const index of indexes.filter((one) => !hot.includes(one))) {
    await image.read(Buffer.alloc(16), index * CHUNK_BYTES);
    // In the middle of a long run of others: read through the file alone, as worker threads do.
    if (index % 7 !== 0) continue;
    await readHot();
    await cache.flush();
  }
  const status = await cache.status();
  assert.ok(status.evictedChunks > 50, `${status.evictedChunks} evicted`);
  assert.equal(status.degraded, undefined);
  const asked = source.chunksAskedFor;
  await readHot();
  assert.ok(source.chunksAskedFor - asked <= 2, `${source.chunksAskedFor - asked} hot chunks had gone`);
  assert.ok((await readAll(image)).equals(raw));
});

test('after a restart the map calls nothing present that was evicted', async () => {
  const source = await harness.source();
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source, quotaBytes: 6 * MIB });
  assert.ok((await readAll(await cache.openImage(fixture.digest))).equals(raw));
  await cache.flush();
  const { evictedChunks, presentChunks } = await figures(cache);
  assert.ok(evictedChunks > 0);
  await cache.close();
  const again = await harness.open({ folder, source, quotaBytes: 100 * MIB });
  const image = await again.openImage(fixture.digest);
  assert.equal((await figures(again)).presentChunks, presentChunks);
  assert.ok((await readAll(image)).equals(raw));
  assert.equal((await figures(again)).refetchedChunks, 0);
  await again.flush();
  assert.equal((await figures(again)).presentChunks, harness.chunks);
});

test('a smaller quota is met as soon as something new is stored, also by images that nobody has opened', async () => {
  const other = await makeHarness({ sizeBytes: 4 * MIB, seed: 30, chunkBytes: CHUNK_BYTES });
  const folder = harness.fresh();
  const first = await harness.open({ folder, source: await harness.source() });
  await first.warm(fixture.digest);
  await first.close();
  const quotaBytes = 4 * MIB;
  const cache = await harness.open({ folder, source: await other.source(), quotaBytes });
  assert.ok((await cache.status()).usedBytes > quotaBytes);
  assert.ok((await readAll(await cache.openImage(other.fixture.digest))).equals(other.raw));
  await cache.flush();
  const status = await cache.status();
  assert.ok(status.usedBytes <= quotaBytes, `${status.usedBytes}`);
  assert.equal(status.degraded, undefined);
  const kept = status.images.find(({ manifest }) => manifest === other.fixture.digest)!;
  assert.equal(kept.presentChunks, other.chunks, 'the image in use has all of its chunks');
});

test('pinned images stay, also after a restart; with everything pinned reads pass through and health says so', async () => {
  const other = await makeHarness({ sizeBytes: 6 * MIB, seed: 31, chunkBytes: CHUNK_BYTES });
  const folder = harness.fresh();
  const first = await harness.open({ folder, source: await other.source() });
  await first.pin(other.fixture.digest);
  await first.warm(other.fixture.digest);
  await first.close();
  const source = await harness.source();
  const quotaBytes = 5 * MIB;
  const cache = await harness.open({ folder, source, quotaBytes });
  await failsWith(cache.evict(other.fixture.digest), 'in-use');
  const image = await cache.openImage(fixture.digest);
  for (let round = 0; round < 2; round++) assert.ok((await readAll(image)).equals(raw));
  const status = await cache.status();
  const pinned = status.images.find(({ manifest }) => manifest === other.fixture.digest)!;
  assert.deepEqual([pinned.presentChunks, pinned.pinned], [other.chunks, ['all']]);
  if (pinned.presentBytes > quotaBytes - MIB / 2) assert.match(status.degraded!, /nothing can be evicted/);
  cache.unpin(other.fixture.digest);
  await failsWith(
    Promise.resolve().then(() => cache.unpin(other.fixture.digest)),
    'not-found',
  );
  assert.ok((await readAll(image)).equals(raw));
  await pause(50);
  assert.ok((await readAll(image)).equals(raw));
  await cache.flush();
  const later = await cache.status();
  assert.ok(
    later.images.find(({ manifest }) => manifest === other.fixture.digest)!.presentChunks < other.chunks,
  );
  assert.equal(later.degraded, undefined);
  await cache.close();
  writeFileSync(path.join(folder, 'pins.json'), '{"schema":1,"pins":[{"manifest":"../x"}]}');
  await failsWith(harness.open({ folder, source }), 'bad-format');
});

test('a whole image is claimed only when all of it was checked, and nothing of it goes while it is', async () => {
  const source = await harness.source();
  const folder = harness.fresh();
  const first = await harness.open({ folder, source });
  const cold = await first.openImage(fixture.digest);
  assert.equal(await cold.claimWhole(), undefined);
  await readAll(cold);
  await first.flush();
  const fresh = await cold.claimWhole();
  assert.ok(fresh);
  fresh.release();
  await first.close();
  const cache = await harness.open({ folder, source, quotaBytes: 4 * MIB });
  const image = await cache.openImage(fixture.digest);
  assert.equal(await image.claimWhole(), undefined, 'nothing is hashed yet');
  let claim: Awaited<ReturnType<typeof image.claimWhole>>;
  for (let i = 0; i < 200 && !claim; i++) {
    await pause(10);
    claim = await image.claimWhole();
  }
  assert.ok(claim, 'hashed in the background');
  assert.equal(fstatSync(claim.fd).size, raw.length);
  const other = await makeHarness({ sizeBytes: 3 * MIB, seed: 33, chunkBytes: CHUNK_BYTES });
  const more = await harness.open({ folder: harness.fresh(), source: await other.source() });
  await readAll(await more.openImage(other.fixture.digest));
  await failsWith(cache.evict(fixture.digest), 'in-use');
  const bytes = Buffer.alloc(raw.length);
  readSync(claim.fd, bytes, 0, bytes.length, 0);
  assert.ok(bytes.equals(raw));
  assert.throws(() => writeFileSync(claim.fd, 'x'), { code: 'EBADF' });
  claim.release();
  claim.release();
  assert.ok((await cache.evict(fixture.digest)) > 0);
  assert.equal(await image.claimWhole(), undefined);
  assert.ok((await readAll(image)).equals(raw));
});

test('an evicted image that nobody has open leaves no files behind', async () => {
  const source = await harness.source();
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source });
  await cache.warm(fixture.digest);
  assert.equal(await cache.evict(fixture.digest), harness.chunks);
  assert.throws(() => readFileSync(path.join(folder, 'images', fixture.digest, 'map')), { code: 'ENOENT' });
  const { usedBytes, images } = await cache.status();
  assert.ok(usedBytes < 200 * KIB, `${usedBytes}`);
  assert.deepEqual(images, []);
  const image = await cache.openImage(fixture.digest);
  assert.ok((await readAll(image)).equals(raw));
  assert.equal((await figures(cache)).evictedChunks, harness.chunks, 'figures outlive the files');
});

test('threads that read the file themselves never see a chunk go', async () => {
  const quiet = new QuietPoints();
  const cache = await harness.open({
    folder: harness.fresh(),
    source: await harness.source(),
    quotaBytes: 5 * MIB,
    quiet,
  });
  const image = await cache.openImage(fixture.digest);
  await readAll(image);
  await cache.flush();
  const workers = [1, 2].map(
    (seed) =>
      new Worker(path.join(import.meta.dirname, 'eviction-worker.ts'), {
        workerData: {
          map: image.direct,
          counters: quiet.counters,
          slot: quiet.register(),
          rawPath: fixture.rawPath,
          seed,
        },
        execArgv: [],
      }),
  );
  await Promise.all(workers.map((worker) => once(worker, 'message')));
  const untilMs = performance.now() + 1500;
  for (let round = 0; performance.now() < untilMs; round++) {
    await readAtRandom(image, raw, 40, 500 + round, 300_000);
  }
  const reports = await Promise.all(
    workers.map(async (worker) => {
      // oxlint-disable-next-line unicorn/require-post-message-target-origin -- a thread, not a window
      worker.postMessage('end');
      const [report] = (await once(worker, 'message')) as [{ reads: number; wrong: number }];
      await worker.terminate();
      return report;
    }),
  );
  const { evictedChunks } = await figures(cache);
  assert.ok(evictedChunks > 100, `${evictedChunks} evicted`);
  for (const { reads, wrong } of reports) {
    assert.ok(reads > 100, `${reads} reads`);
    assert.equal(wrong, 0);
  }
});
