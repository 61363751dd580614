/** Quota and full disks: chunks are no longer stored, reads stay right, and it heals without a restart. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { closeSync, ftruncateSync, mkdirSync, openSync, rmSync, statfsSync, writeSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import type { TestContext } from 'node:test';
import { CACHE_RETRY_MS, KIB, MIB } from '../../src/core/limits.ts';
import { isRoot, mount, unmount } from '../../src/core/linux.ts';
import { failsWith, figures, makeHarness, readAll, readAtRandom } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const harness = await makeHarness({ sizeBytes: 20 * MIB + 512, seed: 13, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;
const source = await harness.source();
const MS_REMOUNT = 32;

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Bytes that a folder takes, as du counts them. */
function takenBytes(folder: string): number {
  return Number(execFileSync('du', ['-s', '--block-size=1', folder], { encoding: 'utf8' }).split('\t')[0]);
}

test('the quota is never exceeded: older chunks go, and all reads are right', async () => {
  const folder = harness.fresh();
  const quotaBytes = 5 * MIB;
  const cache = await harness.open({ folder, source, quotaBytes });
  const image = await cache.openImage(fixture.digest);
  assert.equal((await cache.status()).degraded, undefined);
  for (let round = 0; round < 2; round++) {
    assert.ok((await readAll(image)).equals(raw));
    await readAtRandom(image, raw, 100, 3 + round);
    await cache.flush();
    const taken = takenBytes(folder);
    assert.ok(taken <= quotaBytes, `${taken} bytes taken`);
    assert.ok(taken > quotaBytes - MIB, `only ${taken} bytes taken`);
  }
  const status = await cache.status();
  assert.equal(status.degraded, undefined);
  assert.ok(status.evictedChunks > 100, `${status.evictedChunks} evicted`);
  assert.ok(status.usedBytes <= quotaBytes);
  await cache.close();
  const larger = await harness.open({ folder, source, quotaBytes: 100 * MIB });
  assert.ok((await readAll(await larger.openImage(fixture.digest))).equals(raw));
  await larger.flush();
  assert.equal((await larger.status()).degraded, undefined);
  assert.equal((await figures(larger)).refetchedChunks, 0);
  await larger.close();
  const smaller = await harness.open({ folder, source, quotaBytes });
  assert.ok((await readAll(await smaller.openImage(fixture.digest))).equals(raw));
});

test('many small reads of a chunk that cannot be kept on the disk fetch it once', async () => {
  const counted = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source: counted, quotaBytes: 0 });
  const image = await cache.openImage(fixture.digest);
  assert.equal(image.direct, undefined);
  const index = fixture.table.entries().next().value!.index;
  for (let at = 0; at < CHUNK_BYTES; at += 4 * KIB) {
    const target = Buffer.alloc(4 * KIB);
    await image.read(target, index * CHUNK_BYTES + at);
    assert.ok(target.equals(raw.subarray(index * CHUNK_BYTES + at).subarray(0, target.length)));
  }
  assert.equal(counted.chunksAskedFor, 1);
  await readAtRandom(image, raw, 100, 5);
});

test('a quota that is no number of bytes is refused', async () => {
  await failsWith(harness.open({ folder: harness.fresh(), source, quotaBytes: -1 }), 'bad-request');
  await failsWith(harness.open({ folder: harness.fresh(), source, quotaBytes: 0.5 }), 'bad-request');
});

/** A mounted temp folder, unmounted at the end of the test file; undefined (test skipped) where that cannot be. */
function mounted(t: TestContext, make: (mountpoint: string) => void): string | undefined {
  const mountpoint = harness.fresh();
  mkdirSync(mountpoint);
  try {
    if (!isRoot()) throw new Error('not root');
    make(mountpoint);
  } catch (error) {
    t.skip(`cannot mount here: ${String(error)}`);
    return undefined;
  }
  harness.defer(() => unmount(mountpoint, 0));
  return mountpoint;
}

test('a full tmpfs makes reads pass through; with more space the rest is kept, without a restart', async (t) => {
  const mountpoint = mounted(t, (at) => mount('tmpfs', at, 'tmpfs', 0, 'size=6m'));
  if (mountpoint === undefined) return;
  const cache = await harness.open({ folder: path.join(mountpoint, 'cache'), source });
  const image = await cache.openImage(fixture.digest);
  assert.ok((await readAll(image)).equals(raw));
  await readAtRandom(image, raw, 200, 8);
  await cache.flush();
  assert.match((await cache.status()).degraded!, /disk of .* is full/);
  assert.ok((await figures(cache)).presentChunks < harness.chunks);
  mount('tmpfs', mountpoint, 'tmpfs', MS_REMOUNT, 'size=64m');
  assert.equal((await cache.status()).degraded, undefined, 'health recovers without traffic');
  await pause(CACHE_RETRY_MS);
  assert.ok((await readAll(image)).equals(raw));
  await pause(200);
  await cache.flush();
  const status = await figures(cache);
  assert.equal(status.presentChunks, harness.chunks);
  assert.equal(status.recordedChunks, harness.chunks);
  await cache.close();
});

test('an image that a full disk leaves no room for is readable all the same, and gets its files later', async (t) => {
  const mountpoint = mounted(t, (at) => {
    const file = harness.fresh();
    const fd = openSync(file, 'wx');
    ftruncateSync(fd, 64 * MIB);
    closeSync(fd);
    execFileSync('mkfs.ext4', ['-q', '-F', '-m', '0', file], { stdio: 'pipe' });
    execFileSync('mount', ['-o', 'loop', file, at], { stdio: 'pipe' });
  });
  if (mountpoint === undefined) return;
  const cache = await harness.open({ folder: mountpoint, source });
  const ballast = path.join(mountpoint, 'lost+found', 'ballast');
  fillDisk(ballast);
  const image = await cache.openImage(fixture.digest);
  assert.equal(image.direct, undefined);
  assert.ok((await readAll(image)).equals(raw));
  assert.match((await cache.status()).degraded!, /full/);
  assert.equal((await cache.listTags()).length, 1);
  rmSync(ballast);
  await pause(CACHE_RETRY_MS + 100);
  assert.ok((await readAll(image)).equals(raw));
  await pause(CACHE_RETRY_MS);
  assert.ok((await readAll(image)).equals(raw));
  const later = await cache.openImage(fixture.digest);
  assert.ok(later.direct, 'a handle opened now has files');
  assert.ok((await readAll(later)).equals(raw));
  await cache.flush();
  assert.equal((await cache.status()).degraded, undefined);
  assert.ok((await figures(cache)).recordedChunks > 0);
  await cache.close();
  const again = await harness.open({ folder: mountpoint, source });
  assert.ok((await readAll(await again.openImage(fixture.digest))).equals(raw));
  assert.equal((await figures(again)).refetchedChunks, 0);
  await again.close();
});

test('a disk that fills and empties under random reads never shows a wrong byte', async (t) => {
  const mountpoint = mounted(t, (at) => mount('tmpfs', at, 'tmpfs', 0, 'size=32m'));
  if (mountpoint === undefined) return;
  const folder = path.join(mountpoint, 'cache');
  const cache = await harness.open({ folder, source });
  const image = await cache.openImage(fixture.digest);
  const ballast = path.join(mountpoint, 'ballast');
  for (let round = 0; round < 3; round++) {
    fillDisk(ballast);
    await readAtRandom(image, raw, 60, 100 + round, 200_000);
    rmSync(ballast);
    await pause(CACHE_RETRY_MS);
    await readAtRandom(image, raw, 10, 200 + round, 200_000);
  }
  await pause(CACHE_RETRY_MS);
  assert.ok((await readAll(image)).equals(raw));
  await pause(200);
  await cache.flush();
  const { recordedChunks, presentChunks } = await figures(cache);
  assert.equal(recordedChunks, presentChunks);
  assert.equal(presentChunks, harness.chunks);
  await cache.close();
  const again = await harness.open({ folder, source });
  assert.ok((await readAll(await again.openImage(fixture.digest))).equals(raw));
  assert.deepEqual([(await figures(again)).refetchedChunks, (await figures(again)).fetchedChunks], [0, 0]);
  await again.close();
});

test('a disk that fills up while chunks are evicted and recorded never shows a wrong byte, and heals', async (t) => {
  const mountpoint = mounted(t, (at) => mount('tmpfs', at, 'tmpfs', 0, 'size=9m'));
  if (mountpoint === undefined) return;
  const folder = path.join(mountpoint, 'cache');
  const cache = await harness.open({ folder, source, minFreeBytes: 256 * KIB });
  const image = await cache.openImage(fixture.digest);
  const ballast = path.join(mountpoint, 'ballast');
  for (let round = 0; round < 4; round++) {
    await readAtRandom(image, raw, 40, 300 + round, 200_000);
    // In the middle of evictions and commits.
    const reading = readAtRandom(image, raw, 60, 400 + round, 200_000);
    fillDisk(ballast);
    await reading;
    await cache.flush();
    await readAtRandom(image, raw, 40, 500 + round, 200_000);
    rmSync(ballast);
    await pause(CACHE_RETRY_MS);
  }
  await readAtRandom(image, raw, 40, 600, 200_000);
  await cache.flush();
  // The last refusal may be younger than the pause, and the disk is left alone as long once more.
  for (let tries = 0; (await cache.status()).degraded !== undefined && tries < 50; tries++) {
    await pause(CACHE_RETRY_MS / 10);
    await readAtRandom(image, raw, 10, 700 + tries, 200_000);
  }
  await cache.flush();
  const status = await cache.status();
  assert.equal(status.degraded, undefined);
  assert.ok(status.evictedChunks > 0, `${status.evictedChunks} evicted`);
  await cache.close();
  const again = await harness.open({ folder, source });
  assert.ok((await readAll(await again.openImage(fixture.digest))).equals(raw));
  assert.equal((await figures(again)).refetchedChunks, 0);
  await again.close();
});

// The line that it guards is `this.#waiting.push(...batch)` in cache/commits.ts.
test('records that a full disk refuses are written when there is space again', async (t) => {
  const mountpoint = mounted(t, (at) => mount('tmpfs', at, 'tmpfs', 0, 'size=64m'));
  if (mountpoint === undefined) return;
  const folder = path.join(mountpoint, 'cache');
  const cache = await harness.open({ folder, source });
  const image = await cache.openImage(fixture.digest);
  const ballast = path.join(mountpoint, 'ballast');
  const half = Buffer.alloc(Math.floor(raw.length / 2));
  await image.read(half, 0);
  assert.ok(half.equals(raw.subarray(0, half.length)));
  let found = await figures(cache);
  for (; found.presentChunks === 0; found = await figures(cache)) await pause(1);
  assert.equal(found.recordedChunks, 0, 'the map has no page for records yet');
  fillDisk(ballast);
  await cache.flush();
  assert.match((await cache.status()).degraded!, /disk of .* is full/);
  assert.equal((await figures(cache)).recordedChunks, 0);
  assert.ok((await readAll(image)).equals(raw));
  rmSync(ballast);
  await pause(CACHE_RETRY_MS);
  assert.ok((await readAll(image)).equals(raw));
  await cache.flush();
  const { presentChunks, recordedChunks } = await figures(cache);
  assert.ok(presentChunks > 0);
  assert.equal(recordedChunks, presentChunks);
  assert.equal((await cache.status()).degraded, undefined);
  await cache.close();
  const again = await harness.open({ folder, source });
  assert.ok((await readAll(await again.openImage(fixture.digest))).equals(raw));
  assert.equal((await figures(again)).refetchedChunks, 0);
  await again.close();
});

/** Takes everything that is free. */
function fillDisk(file: string): void {
  const fd = openSync(file, 'w');
  const block = Buffer.alloc(MIB, 0xa5);
  try {
    for (let length = block.length; length >= 512;) {
      try {
        writeSync(fd, block, 0, length);
      } catch {
        length = Math.floor(length / 2);
      }
    }
  } finally {
    closeSync(fd);
  }
  assert.ok(statfsSync(path.dirname(file)).bavail <= 1);
}
