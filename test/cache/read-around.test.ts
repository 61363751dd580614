/** Read-around: what comes with a missed chunk, on which links, and when not. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { UNIT_ABSENT } from '../../src/core/image.ts';
import { KIB, MIB } from '../../src/core/limits.ts';
import type { WayFigures } from '../../src/core/source.ts';
import type { ChunkStates } from '../../cache/chunk-states.ts';
import { neighbourBytes, ReadAround } from '../../cache/read-around.ts';
import { FaultySource } from '../faults/faulty-source.ts';
import { figures, makeHarness } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const harness = await makeHarness({ sizeBytes: 20 * MIB + 512, seed: 29, chunkBytes: CHUNK_BYTES });
const { fixture } = harness;
const indexes = [...fixture.table.entries()].map(({ index }) => index);
const hasData = new Set(indexes);

const LOCAL: WayFigures = { roundTripMs: 1, bytesPerSecond: undefined, prefetchBytes: 1 * MIB };
const SHORT: WayFigures = { roundTripMs: 32, bytesPerSecond: 12.5e6, prefetchBytes: 1 * MIB };
const LONG: WayFigures = { roundTripMs: 150, bytesPerSecond: 6.25e6, prefetchBytes: 2 * MIB };

class Way extends FaultySource {
  figures: WayFigures | undefined;

  way(): WayFigures | undefined {
    return this.figures;
  }
}

async function openOver(way: WayFigures | undefined, options: { readAround?: boolean } = {}) {
  const source = new Way(await harness.source(), 1);
  source.figures = way;
  const cache = await harness.open({ folder: harness.fresh(), source, ...options });
  const image = await cache.openImage(fixture.digest);
  const read = (index: number, at = CHUNK_BYTES / 4) =>
    image.read(Buffer.alloc(16), index * CHUNK_BYTES + at);
  /** What was asked for, once nothing is under way. */
  const asked = async () => {
    while ((await cache.status()).inFlightChunks > 0) await new Promise((resolve) => setTimeout(resolve, 5));
    const digests = new Set(source.askedFor.keys());
    return new Set(indexes.filter((index) => digests.has(fixture.table.digestOf(index)!)));
  };
  return { source, cache, read, asked };
}

/** One with data on both sides, three deep, none of them equal to another. */
const middle = indexes.find((index) => {
  const near = [-3, -2, -1, 0, 1, 2, 3].map((step) => index + step);
  return (
    near.every((at) => hasData.has(at)) && new Set(near.map((at) => fixture.table.digestOf(at))).size === 7
  );
})!;

test('a miss over a short way, or to a store on this host, brings its chunk and no other', async () => {
  for (const way of [undefined, LOCAL, SHORT]) {
    const { read, asked } = await openOver(way);
    await read(middle);
    assert.ok((await asked()).has(middle));
    assert.ok(!(await asked()).has(middle + 1) && !(await asked()).has(middle - 1));
  }
});

test('the chunk between two that were missed comes with the second, but not on a local network', async () => {
  for (const [way, expected] of [
    [SHORT, true],
    [LOCAL, false],
  ] as const) {
    const { read, asked } = await openOver(way);
    await read(middle - 1);
    await read(middle + 1);
    assert.equal((await asked()).has(middle), expected);
    assert.ok(!(await asked()).has(middle + 3));
  }
});

test('over a way that is not local a read near the end of a chunk brings the next one, at its beginning the one before', async () => {
  const end = await openOver(SHORT);
  await end.read(middle, CHUNK_BYTES - 16);
  assert.ok((await end.asked()).has(middle + 1) && !(await end.asked()).has(middle - 1));
  const beginning = await openOver(SHORT);
  await beginning.read(middle, 0);
  assert.ok((await beginning.asked()).has(middle - 1) && !(await beginning.asked()).has(middle + 1));
  const local = await openOver(LOCAL);
  await local.read(middle, CHUNK_BYTES - 16);
  assert.ok(!(await local.asked()).has(middle + 1));
});

test('over a long way a miss brings its neighbours as prefetch, as many as the link carries meanwhile', async () => {
  const { source, cache, read, asked } = await openOver(LONG);
  await read(middle);
  const got = await asked();
  for (const near of [middle - 1, middle + 1, middle - 2, middle + 2]) assert.ok(got.has(near), `${near}`);
  assert.equal(source.demandCalls, 1);
  const { fetchedStoredBytes, prefetchedChunks } = await figures(cache);
  assert.ok(prefetchedChunks >= 4);
  assert.ok(fetchedStoredBytes <= neighbourBytes(LONG) + CHUNK_BYTES + 4 * KIB, `${fetchedStoredBytes}`);
});

test('neighbours are worth the part of a round trip that is above the shortest, and nothing on a short way', () => {
  assert.equal(neighbourBytes(undefined), 0);
  assert.equal(neighbourBytes(SHORT), 0);
  assert.ok(Math.abs(neighbourBytes(LONG) - 6.25e6 * 0.11) < 1);
  // What the link carries is not known yet: half of what may be under way.
  const unknown = neighbourBytes({ ...LONG, bytesPerSecond: undefined });
  assert.ok(unknown > 0 && unknown < LONG.prefetchBytes / 2);
});

test('nothing comes with a miss where the operator said so, nor while a whole image or a profile is fetched', async () => {
  const off = await openOver(LONG, { readAround: false });
  await off.read(middle);
  assert.deepEqual([...(await off.asked())], [middle]);
  const asked: number[] = [];
  const file = {
    manifest: { kind: 'disk' as const },
    table: fixture.table,
    states: { get: () => UNIT_ABSENT } as unknown as ChunkStates,
    prefetch: (index: number) => Promise.resolve(asked.push(index) > 0),
  };
  const around = new ReadAround(
    file,
    { way: LONG, prefetchBytes: 0 },
    { underWay: () => false, room: () => true },
  );
  const resume = around.pause();
  around.onMiss(middle, 16 * KIB, 16);
  assert.deepEqual(asked, []);
  resume();
  around.onMiss(middle, 16 * KIB, 16);
  assert.deepEqual(asked.slice(0, 2), [middle + 1, middle - 1]);
});

// Fails without the look at `kind` in read-around.ts.
test('over a way of middle length a miss brings neighbours of memory, and none of a disk', () => {
  const way = { ...LONG, roundTripMs: 30 };
  for (const kind of ['disk', 'memory'] as const) {
    const asked: number[] = [];
    const file = {
      manifest: { kind },
      table: fixture.table,
      states: { get: () => UNIT_ABSENT } as unknown as ChunkStates,
      prefetch: (index: number) => Promise.resolve(asked.push(index) > 0),
    };
    const is = { underWay: () => false, room: () => true };
    new ReadAround(file, { way, prefetchBytes: 0 }, is).onMiss(middle, 16 * KIB, 16);
    assert.equal(asked.length > 0, kind === 'memory');
  }
});

test('nor more while the neighbours of two misses are still under way, nor where the disk has no room', () => {
  for (const [prefetchBytes, room] of [
    [2 * neighbourBytes(LONG), true],
    [0, false],
  ] as const) {
    const asked: number[] = [];
    const file = {
      manifest: { kind: 'disk' as const },
      table: fixture.table,
      states: { get: () => UNIT_ABSENT } as unknown as ChunkStates,
      prefetch: (index: number) => Promise.resolve(asked.push(index) > 0),
    };
    const is = { underWay: () => false, room: () => room };
    new ReadAround(file, { way: LONG, prefetchBytes }, is).onMiss(middle, 16 * KIB, 16);
    assert.deepEqual(asked, []);
  }
});
