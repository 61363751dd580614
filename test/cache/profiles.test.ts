/** Profiles of starts: what a recording covers, how it travels, what a replay fetches, and what comes from outside. */
import assert from 'node:assert/strict';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { KIB, MIB } from '../../src/core/limits.ts';
import { encodeProfile, parseProfile } from '../../src/core/profile.ts';
import type { ChunkSource } from '../../src/core/source.ts';
import { GridError } from '../../src/core/errors.ts';
import { failsWith, figures, makeHarness, readAll } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const harness = await makeHarness({ sizeBytes: 20 * MIB + 512, seed: 37, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;
const indexes = [...fixture.table.entries()].map(({ index }) => index);
const count = fixture.table.count;
const expected = { manifest: fixture.digest, purpose: 'boot', chunkCount: count };
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Reads the first bytes of each of these chunks. */
async function touch(image: { read(target: Buffer, offset: number): Promise<void> }, chunks: number[]) {
  for (const index of chunks) await image.read(Buffer.alloc(16), index * CHUNK_BYTES);
}

/** Whether no other chunk has its bytes. */
function isAlone(index: number): boolean {
  const digest = fixture.table.digestOf(index);
  return indexes.every((other) => other === index || fixture.table.digestOf(other) !== digest);
}

/** A source without profiles; what it has, and what it was given. */
function withProfiles(inner: ChunkSource, profile?: Buffer) {
  const recorded: Buffer[] = [];
  const source: ChunkSource = {
    name: inner.name,
    listTags: () => inner.listTags(),
    readManifest: (digest) => inner.readManifest(digest),
    readTable: (digest) => inner.readTable(digest),
    readChunks: (...args) => inner.readChunks(...args),
    close: () => inner.close(),
    readProfile: () => Promise.resolve(recorded.at(-1) ?? profile),
    recordProfile: (_manifest, _purpose, recording) => {
      recorded.push(recording);
      return Promise.resolve();
    },
  };
  return { source, recorded };
}

test('what a start touches is recorded, in two sets, kept here and offered to the origin', async () => {
  const { source, recorded } = withProfiles(await harness.source());
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source });
  const recording = cache.startRecording(fixture.digest, 'boot');
  const image = await cache.openImage(fixture.digest);
  const early = indexes.filter((_, at) => at % 9 === 0).slice(0, 6);
  const late = indexes.filter((_, at) => at % 9 === 4).slice(0, 9);
  await touch(image, early);
  await pause(900);
  await touch(image, late);
  // Once more: the first touch counts.
  await touch(image, early);
  const profile = await recording.finish();
  assert.deepEqual([profile?.early, profile?.late, profile?.runs], [early, late, 1]);
  assert.equal(await recording.finish(), profile);
  assert.deepEqual(parseProfile(recorded[0]!, expected), profile);
  const file = path.join(folder, 'profiles', fixture.digest, 'boot.json');
  assert.deepEqual(parseProfile(readFileSync(file), expected), profile);
  // A second start adds to it.
  await image.close();
  const second = cache.startRecording(fixture.digest, 'boot');
  const again = await cache.openImage(fixture.digest);
  const more = indexes.at(-1)!;
  await touch(again, [early[0]!, more]);
  await second.finish();
  const merged = parseProfile(readFileSync(file), expected);
  assert.equal(merged.runs, 2);
  assert.deepEqual(new Set([...merged.early, ...merged.late]), new Set([...early, ...late, more]));
  assert.equal(recorded.length, 2);
  // A third that says nothing new is not sent.
  await again.close();
  const third = cache.startRecording(fixture.digest, 'boot');
  const last = await cache.openImage(fixture.digest);
  await touch(last, [more]);
  assert.ok(await third.finish());
  await last.close();
  assert.equal(recorded.length, 2);
  // After three the image is known well enough to be left alone.
  const fourth = cache.startRecording(fixture.digest, 'boot');
  await touch(await cache.openImage(fixture.digest), [indexes.at(-2)!]);
  assert.equal(await fourth.finish(), undefined);
});

test('a recording does not count while somebody else has the image open, and nothing is claimed during one', async () => {
  const cache = await harness.open({ folder: harness.fresh(), source: await harness.source() });
  const image = await cache.openImage(fixture.digest);
  const recording = cache.startRecording(fixture.digest, 'boot');
  await readAll(image);
  assert.equal(await recording.finish(), undefined);
  await cache.flush();
  await image.close();
  const counted = cache.startRecording(fixture.digest, 'boot');
  const other = await cache.openImage(fixture.digest);
  assert.equal(await other.claimWhole(), undefined);
  assert.equal(await counted.finish(), undefined, 'nothing was read');
  const claim = await other.claimWhole();
  assert.ok(claim);
  claim.release();
});

// Without EARLY_MS_MIN of profiles.ts the second is late; without `answered`, the third.
test('early is what was touched until the guest answered, and half a second at least', async () => {
  const cache = await harness.open({ folder: harness.fresh(), source: await harness.source() });
  const touches = indexes.filter((_, at) => at % 9 === 0).slice(0, 4);
  const record = async (answersMs: number) => {
    const recording = cache.startRecording(fixture.digest, 'resume');
    const image = await cache.openImage(fixture.digest);
    const touchNext = (at: number) => touch(image, [touches[at]!]);
    await touchNext(0);
    await pause(answersMs);
    await touchNext(1);
    recording.answered();
    await pause(300);
    await touchNext(2);
    await pause(2200);
    await touchNext(3);
    await image.close();
    const profile = await recording.finish();
    return [profile?.early, profile?.late];
  };
  assert.deepEqual(await record(1500), [touches.slice(0, 2), touches.slice(2)]);
  assert.deepEqual(await record(100), [touches.slice(0, 3), touches.slice(3)]);
});

// Fails without `goesOn` in profiles.ts.
test('what a machine needed before its guest went on comes first the next time, then the rest as it was touched', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source });
  const picked = indexes
    .filter((_, at) => at % 9 === 0)
    .slice(0, 5)
    .toReversed();
  const recording = cache.startRecording(fixture.digest, 'resume');
  const image = await cache.openImage(fixture.digest);
  await touch(image, [picked[0]!]);
  await pause(120);
  await touch(image, [picked[1]!]);
  recording.goesOn();
  for (const index of picked.slice(2)) {
    await pause(120);
    await touch(image, [index]);
  }
  await image.close();
  const profile = await recording.finish();
  assert.deepEqual(
    [picked[0], picked[1]].map((index) => profile?.steps?.get(index!)),
    [0, 0],
  );
  const steps = picked.slice(2).map((index) => profile!.steps!.get(index)!);
  assert.deepEqual(
    steps,
    steps.toSorted((a, b) => a - b),
  );
  assert.equal(new Set(steps).size, 3);
  await cache.evict(fixture.digest);
  source.askedFor.clear();
  await cache.prefetchProfile(fixture.digest, 'resume');
  const order = [...source.askedFor.keys()].map((digest) =>
    picked.findIndex((index) => fixture.table.digestOf(index) === digest),
  );
  assert.deepEqual(new Set(order.slice(0, 2)), new Set([0, 1]));
  assert.deepEqual(order.slice(2), [2, 3, 4]);
});

// Fails without `rankOf` in prefetch.ts, and without the order of RankedQueue.
test('what a start touches comes before what is warmed, whoever asked first', async () => {
  const source = await harness.source();
  const cache = await harness.open({ folder: harness.fresh(), source });
  const recording = cache.startRecording(fixture.digest, 'boot');
  const image = await cache.openImage(fixture.digest);
  // From the end, and unlike all others: nothing is read ahead, and nobody has asked for their bytes before.
  const last = indexes.filter(isAlone).slice(-3).toReversed();
  await touch(image, last);
  await image.close();
  await recording.finish();
  await cache.evict(fixture.digest);
  source.askedFor.clear();
  source.arm({ delayMs: 20 });
  const warming = cache.warm(fixture.digest);
  await pause(5);
  assert.equal(await cache.prefetchProfile(fixture.digest, 'boot'), last.length);
  source.disarm();
  await warming;
  const order = [...source.askedFor.keys()];
  const places = last.map((index) => order.indexOf(fixture.table.digestOf(index)!));
  assert.ok(Math.max(...places) < order.length / 2, `asked for as ${places.join()} of ${order.length}`);
});

// Fails without `lateAfter` in upkeep.ts.
test('what earlier starts touched late is fetched when the guest has answered', async () => {
  const early = indexes.slice(10, 40);
  const late = indexes.slice(60, 100);
  const bytes = encodeProfile({ manifest: fixture.digest, purpose: 'resume', runs: 1, early, late });
  const { source } = withProfiles(await harness.source(), bytes);
  const cache = await harness.open({ folder: harness.fresh(), source });
  const answered = Promise.withResolvers<void>();
  const here: number[] = [];
  const work = cache.prefetchProfile(fixture.digest, 'resume', {
    lateAfter: answered.promise,
    here: ({ startBytes }) => here.push(startBytes / fixture.table.chunkBytes),
  });
  for (let at = 0; at < 500 && here.length < early.length; at++) await pause(2);
  await pause(100);
  assert.deepEqual(new Set(here), new Set(early));
  answered.resolve();
  assert.equal(await work, early.length + late.length);
  assert.deepEqual(new Set(here), new Set([...early, ...late]));
});

test('a recording ends where a second reader begins', async () => {
  const cache = await harness.open({ folder: harness.fresh(), source: await harness.source() });
  const recording = cache.startRecording(fixture.digest, 'boot');
  const image = await cache.openImage(fixture.digest);
  const its = indexes.slice(3, 9);
  await touch(image, its);
  await readAll(await cache.openImage(fixture.digest));
  const profile = await recording.finish();
  assert.deepEqual([...profile!.early, ...profile!.late], its);
});

test('a profile of the origin is replayed as prefetch and the start finds everything', async () => {
  const early = indexes.slice(10, 40);
  const late = indexes.slice(60, 100);
  const bytes = encodeProfile({ manifest: fixture.digest, purpose: 'boot', runs: 1, early, late });
  const inner = await harness.source();
  const { source } = withProfiles(inner, bytes);
  const cache = await harness.open({ folder: harness.fresh(), source });
  assert.equal(await cache.prefetchProfile(fixture.digest, 'boot'), early.length + late.length);
  assert.equal(inner.demandCalls, 0);
  const image = await cache.openImage(fixture.digest);
  await touch(image, [...early, ...late]);
  const { missedChunks, hitRate, prefetchedUsedChunks, prefetchedChunks } = await figures(cache);
  assert.deepEqual([missedChunks, hitRate], [0, 1]);
  assert.ok(prefetchedUsedChunks >= prefetchedChunks - 1);
  assert.equal(await cache.prefetchProfile(fixture.digest, 'resume'), 0);
  await failsWith(cache.prefetchProfile(fixture.digest, '../boot'), 'bad-request');
  const pinned = await cache.pin(fixture.digest, 'boot').then(() => cache.status());
  assert.deepEqual(pinned.images[0]!.pinned, ['boot']);
  await failsWith(cache.pin(fixture.digest, 'resume'), 'not-found');
  await failsWith(cache.warm(fixture.digest, { purpose: 'resume' }), 'not-found');
});

test('a pinned boot set outlives everything else of its image', async () => {
  const set = indexes.slice(100, 130);
  const bytes = encodeProfile({ manifest: fixture.digest, purpose: 'boot', runs: 1, early: set, late: [] });
  const inner = await harness.source();
  const { source } = withProfiles(inner, bytes);
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source, quotaBytes: 5 * MIB });
  await cache.pin(fixture.digest, 'boot');
  assert.equal((await cache.warm(fixture.digest, { purpose: 'boot' })).chunks, set.length);
  const image = await cache.openImage(fixture.digest);
  assert.ok((await readAll(image)).equals(raw));
  await cache.flush();
  assert.ok((await figures(cache)).evictedChunks > 0);
  const asked = inner.chunksAskedFor;
  await touch(image, set);
  assert.equal(inner.chunksAskedFor, asked);
});

test('profiles that are damaged, foreign or refused cost nothing but a line in the log', async () => {
  const inner = await harness.source();
  const { source } = withProfiles(inner, Buffer.from('{"schema":1,"early":[[0,99999999]]}'));
  const broken: ChunkSource = {
    ...source,
    recordProfile: () => Promise.reject(new GridError('denied', 'read-only here')),
  };
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source: broken });
  mkdirSync(path.join(folder, 'profiles', fixture.digest), { recursive: true });
  writeFileSync(path.join(folder, 'profiles', fixture.digest, 'boot.json'), 'no profile');
  assert.equal(await cache.prefetchProfile(fixture.digest, 'boot'), 0);
  assert.ok(cache.lines.some((line) => line.includes('no profile')));
  const recording = cache.startRecording(fixture.digest, 'boot');
  const image = await cache.openImage(fixture.digest);
  await touch(image, indexes.slice(0, 3));
  assert.ok(await recording.finish());
  assert.ok(cache.lines.some((line) => line.includes('does not take')));
  assert.equal(inner.chunksAskedFor <= 4, true);
});
