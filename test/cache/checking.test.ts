/**
 * Worker threads that hash what they read for the first time after a start: what is right never comes to the main
 * thread, what is damaged always does.
 *
 * The line that the second test guards is `if (chunkHash(…) !== expected) return false` in src/core/direct-io.ts:
 * without it the worker shows the flipped bits.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { Worker } from 'node:worker_threads';
import { KIB, MIB } from '../../src/core/limits.ts';
import type { DirectMap } from '../../src/core/image.ts';
import { QuietPoints } from '../../src/core/quiet.ts';
import { figures, makeHarness, readAll, readAtRandom } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const harness = await makeHarness({ sizeBytes: 12 * MIB + 512, seed: 61, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;
const holes = Array.from({ length: fixture.table.count }, (_, i) => i).filter(
  (index) => fixture.table.entryOf(index) < 0,
);

interface Report {
  elsewhere: number[];
  wrong: number;
  reads: number;
}

function readInThread(map: DirectMap, quiet: QuietPoints, rounds: number): Promise<Report> {
  const worker = new Worker(path.join(import.meta.dirname, 'checking-worker.ts'), {
    workerData: {
      map,
      counters: quiet.counters,
      slot: quiet.register(),
      rawPath: fixture.rawPath,
      rounds,
    },
    execArgv: [],
  });
  return once(worker, 'message').then(async ([report]) => {
    await worker.terminate();
    return report as Report;
  });
}

/** A closed cache folder that has the image's first bytes, or all of it. */
async function warmFolder(bytes = raw.length): Promise<string> {
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source: await harness.source() });
  await (await cache.openImage(fixture.digest)).read(Buffer.alloc(bytes), 0);
  await cache.close();
  return folder;
}

function flip(file: string, offset: number): void {
  const fd = openSync(file, 'r+');
  const byte = Buffer.alloc(1);
  readSync(fd, byte, 0, 1, offset);
  byte[0]! ^= 4;
  writeSync(fd, byte, 0, 1, offset);
  closeSync(fd);
}

test('after a start a worker hashes and reads a whole image without the main thread', async () => {
  const folder = await warmFolder();
  const quiet = new QuietPoints();
  const source = await harness.source();
  const cache = await harness.open({ folder, source, quiet });
  const image = await cache.openImage(fixture.digest);
  const { elsewhere, wrong, reads } = await readInThread(image.direct!, quiet, 1);
  assert.deepEqual({ elsewhere, wrong, reads }, { elsewhere: [], wrong: 0, reads: fixture.table.count });
  const claim = await image.claimWhole();
  assert.ok(claim, 'all of it is verified');
  claim.release();
  assert.equal((await figures(cache)).presentChunks, harness.chunks);
  assert.ok((await readAll(image)).equals(raw));
  assert.equal(source.chunksAskedFor, 0);
});

test('of damaged chunks a worker shows no byte; the main thread counts them and makes them right', async () => {
  const folder = await warmFolder();
  const files = path.join(folder, 'images', fixture.digest);
  const data = [...fixture.table.entries()].map(({ index }) => index);
  const damaged = [data[0]!, data[7]!, data.at(-1)!];
  // The last bytes of each chunk, which are the ones that the worker reads.
  for (const index of [...damaged, holes[1]!]) {
    flip(path.join(files, 'data'), Math.min((index + 1) * CHUNK_BYTES, raw.length) - 1);
  }
  flip(path.join(files, 'map'), 4096 + 8 * data[11]!);
  const expected = [...damaged, holes[1]!, data[11]!].toSorted((a, b) => a - b);

  const quiet = new QuietPoints();
  const cache = await harness.open({ folder, source: await harness.source(), quiet });
  const image = await cache.openImage(fixture.digest);
  const first = await readInThread(image.direct!, quiet, 2);
  assert.equal(first.wrong, 0);
  assert.deepEqual(first.elsewhere, expected);
  assert.equal((await figures(cache)).refetchedChunks, 0, 'a worker only says no');
  for (const index of expected) {
    const start = index * CHUNK_BYTES;
    const target = Buffer.alloc(Math.min(CHUNK_BYTES, raw.length - start));
    await image.read(target, start);
    assert.ok(target.equals(raw.subarray(start, start + target.length)), `chunk ${index}`);
  }
  await cache.flush();
  assert.equal((await figures(cache)).refetchedChunks, expected.length);
  const second = await readInThread(image.direct!, quiet, 1);
  assert.deepEqual([second.wrong, second.elsewhere], [0, []]);
  // What the scrub looks at again is UNVERIFIED meanwhile: the new hash counts, not the record of the start.
  const [scrubbed, third] = await Promise.all([cache.scrub(), readInThread(image.direct!, quiet, 3)]);
  assert.equal(scrubbed.refetchedChunks, 0);
  assert.equal(third.wrong, 0);
});

test('workers that hash beside a main thread that hashes, evicts and fetches show no wrong byte', async () => {
  const folder = await warmFolder(raw.length / 2 - 256);
  const quiet = new QuietPoints();
  const cache = await harness.open({
    folder,
    source: await harness.source(),
    quiet,
    quotaBytes: 4 * MIB,
  });
  const image = await cache.openImage(fixture.digest);
  const threads = [1, 2].map(() => readInThread(image.direct!, quiet, 40));
  const ended = new AbortController();
  const reports = Promise.all(threads).finally(() => ended.abort());
  for (let seed = 0; !ended.signal.aborted; seed++) {
    await readAtRandom(image, raw, 16, seed, 300_000);
    await cache.scrub();
  }
  for (const { wrong, reads } of await reports) {
    assert.equal(wrong, 0);
    assert.ok(reads > 0);
  }
  await cache.flush();
  const { presentChunks, evictedChunks, refetchedChunks } = await figures(cache);
  assert.ok(evictedChunks > 0);
  assert.equal(refetchedChunks, 0);
  let counted = 0;
  for (const { index } of fixture.table.entries()) {
    const state = new Uint8Array(image.direct!.base.states)[index]!;
    if (state >= 1 && state <= 3) counted++;
  }
  assert.equal(presentChunks, counted, 'the count of what is here has followed');
});
