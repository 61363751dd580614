/** Profiles in a store: merged, bounded, never taken at their word. */
import assert from 'node:assert/strict';
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import fc from 'fast-check';
import {
  GIB,
  KIB,
  MIB,
  PROFILE_CHUNKS_MAX,
  PROFILE_PURPOSES_MAX,
  PROFILE_RUNS_MAX,
} from '../../src/core/limits.ts';
import { chunkCountOf } from '../../src/core/manifest.ts';
import { encodeProfile, mergeProfiles, parseProfile } from '../../src/core/profile.ts';
import type { Profile } from '../../src/core/profile.ts';
import { importImage, openStore } from '../../src/store/index.ts';
import type { Store } from '../../src/store/index.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';
import { failsWith, newStore, testFolder } from './helpers.ts';

const folder = testFolder('profiles');
const MANIFEST = 'ab'.repeat(32);

interface Subject {
  readonly store: Store;
  readonly manifest: string;
  readonly expected: { manifest: string; purpose: string; chunkCount: number };
  readonly recording: (early: number[], late?: number[], purpose?: string) => Buffer;
  readonly kept: (purpose?: string) => Promise<Profile | undefined>;
}

async function subject(): Promise<Subject> {
  const fixture = await makeFixtureStore(mkdtempSync(path.join(folder, 'f-')), {
    sizeBytes: 1 * MIB,
    seed: 70,
    chunkBytes: 4 * KIB,
  });
  const store = await openStore(fixture.storeFolder);
  const manifest = fixture.digest;
  const expected = { manifest, purpose: 'boot', chunkCount: chunkCountOf(fixture.manifest) };
  return {
    store,
    manifest,
    expected,
    recording: (early, late = [], purpose = 'boot') =>
      encodeProfile({ manifest, purpose, runs: 1, early, late }),
    kept: async (purpose = 'boot') => {
      const bytes = await store.readProfile(manifest, purpose);
      return bytes && parseProfile(bytes, { ...expected, purpose });
    },
  };
}

test('recordings are merged: a chunk that any of them had early is early', async () => {
  const { store, manifest, recording, kept } = await subject();
  assert.equal(await kept(), undefined);
  await store.recordProfile(manifest, 'boot', recording([1, 2, 7], [9, 10]));
  await store.recordProfile(manifest, 'boot', recording([2, 9], [1, 50]));
  assert.deepEqual(await kept(), {
    manifest,
    purpose: 'boot',
    runs: 2,
    early: [1, 2, 7, 9],
    late: [10, 50],
  });
  await store.recordProfile(manifest, 'resume', recording([3], [], 'resume'));
  assert.deepEqual((await kept('resume'))?.early, [3]);
  assert.equal((await kept())?.runs, 2);
  // Where a static server finds it.
  assert.deepEqual(
    readFileSync(
      path.join(store.layout.folder, 'v1', 'profiles', manifest.slice(0, 2), manifest, 'boot.json'),
    ),
    await store.readProfile(manifest, 'boot'),
  );
  assert.deepEqual(readdirSync(store.layout.tmp), []);
});

test('recordings of several processes at once are all merged', async () => {
  const { store, manifest, recording, kept } = await subject();
  const stores = await Promise.all([1, 2, 3].map(() => openStore(store.layout.folder)));
  await Promise.all(
    Array.from({ length: 12 }, (_, i) => stores[i % 3]!.recordProfile(manifest, 'boot', recording([i * 2]))),
  );
  const profile = await kept();
  assert.equal(profile?.runs, 12);
  assert.deepEqual(
    profile.early,
    Array.from({ length: 12 }, (_, i) => i * 2),
  );
});

test('after enough recordings a profile grows no more, whatever a recording says it is worth', async () => {
  const { store, manifest, recording, kept } = await subject();
  const boasting = encodeProfile({ manifest, purpose: 'boot', runs: 1_000_000, early: [0], late: [] });
  await store.recordProfile(manifest, 'boot', boasting);
  assert.equal((await kept())?.runs, 1);
  for (let i = 1; i < PROFILE_RUNS_MAX; i++) await store.recordProfile(manifest, 'boot', recording([i]));
  const full = await store.readProfile(manifest, 'boot');
  assert.equal((await kept())?.runs, PROFILE_RUNS_MAX);
  await store.recordProfile(manifest, 'boot', recording([200]));
  assert.deepEqual(await store.readProfile(manifest, 'boot'), full);
});

test('hostile names, unknown manifests, foreign and damaged recordings are refused and leave nothing', async () => {
  const { store, manifest, expected, recording } = await subject();
  for (const purpose of [
    '',
    '..',
    '../boot',
    'a/b',
    '.hidden',
    'Boot',
    'x'.repeat(129),
    'a\0b',
    '__proto__',
  ]) {
    await failsWith(store.readProfile(manifest, purpose), 'bad-request');
    await failsWith(store.recordProfile(manifest, purpose, recording([1], [], purpose)), 'bad-request');
  }
  await failsWith(store.readProfile('../../../etc/passwd', 'boot'), 'bad-request');
  await failsWith(store.recordProfile('../x', 'boot', recording([1])), 'bad-request');
  await failsWith(store.recordProfile(MANIFEST, 'boot', recording([1])), 'not-found');
  const refused: unknown[] = [
    { early: [[expected.chunkCount, 1]] },
    { early: [[5, 1]], late: [[5, 1]] },
    {
      early: [
        [5, 2],
        [6, 1],
      ],
    },
    { early: [[5, 0]] },
    { early: [[-1, 1]] },
    { early: [[0.5, 1]] },
    { early: 'all' },
    { purpose: 'other' },
    { manifest: MANIFEST },
    { runs: 0 },
  ];
  for (const fields of refused) {
    const body = { schema: 1, manifest, purpose: 'boot', runs: 1, early: [], late: [] };
    const bytes = Buffer.from(JSON.stringify(Object.assign(body, fields)));
    await failsWith(store.recordProfile(manifest, 'boot', bytes), 'bad-format');
  }
  await failsWith(store.recordProfile(manifest, 'boot', Buffer.from('{"schema":2}')), 'newer-format');
  await failsWith(store.recordProfile(manifest, 'boot', Buffer.alloc(3 * MIB, ' ')), 'bad-format');
  assert.ok(!readdirSync(store.layout.v1).includes('profiles'));
});

test('a manifest has profiles for a bounded number of purposes', async () => {
  const { store, manifest, recording } = await subject();
  for (let i = 0; i < PROFILE_PURPOSES_MAX; i++)
    await store.recordProfile(manifest, `p${i}`, recording([i], [], `p${i}`));
  await failsWith(store.recordProfile(manifest, 'more', recording([1], [], 'more')), 'no-space');
  await store.recordProfile(manifest, 'p3', recording([1], [], 'p3'));
});

test('a union over the bounds loses what is late first, and stays a profile', async () => {
  const store = await newStore(folder);
  const file = path.join(folder, 'sparse.raw');
  closeSync(openSync(file, 'wx'));
  truncateSync(file, 8 * GIB);
  const { digest } = await importImage(store, { path: file, reference: 'sparse', chunkBytes: 4 * KIB });
  const record = (early: number[], late: number[]) =>
    store.recordProfile(
      digest,
      'boot',
      encodeProfile({ manifest: digest, purpose: 'boot', runs: 1, early, late }),
    );
  const every = (from: number, step: number, count: number) =>
    Array.from({ length: count }, (_, i) => from + i * step);
  const kept = async () =>
    parseProfile((await store.readProfile(digest, 'boot'))!, {
      manifest: digest,
      purpose: 'boot',
      chunkCount: 2 ** 21,
    });
  // Runs of one chunk: bounded by the bytes of the JSON.
  const early = every(0, 16, 100_000);
  await record(early, []);
  await record([], every(4, 16, 100_000));
  const byBytes = await kept();
  assert.deepEqual(byBytes.early, early);
  assert.ok(byBytes.late.length > 0 && byBytes.late.length < 100_000, `${byBytes.late.length}`);
  // Long runs: bounded by what they name.
  await record(every(0, 1, 2 ** 20), []);
  await record(every(2 ** 20, 1, 2 ** 20), []);
  const byChunks = await kept();
  assert.ok(byChunks.early.length > 2 ** 19 && byChunks.early.length <= 2 ** 20);
  assert.equal(byChunks.runs, 4);
});

test('a damaged profile is replaced by the next recording', async () => {
  const { store, manifest, recording, kept } = await subject();
  mkdirSync(store.layout.profiles(manifest), { recursive: true });
  writeFileSync(path.join(store.layout.profiles(manifest), 'boot.json'), '{"schema":1,"early":');
  await store.recordProfile(manifest, 'boot', recording([4]));
  assert.deepEqual((await kept())?.early, [4]);
});

test('a few bytes that name more chunks than a profile may have are refused before any list is made', () => {
  const expected = { manifest: MANIFEST, purpose: 'boot', chunkCount: 2 ** 32 - 1 };
  const naming = (early: unknown, late: unknown) =>
    Buffer.from(JSON.stringify({ schema: 1, manifest: MANIFEST, purpose: 'boot', runs: 1, early, late }));
  const before = process.memoryUsage().rss;
  for (const [early, late] of [
    [[[0, 4_294_967_295]], []],
    [[[0, PROFILE_CHUNKS_MAX]], [[PROFILE_CHUNKS_MAX, 1]]],
  ]) {
    assert.throws(() => parseProfile(naming(early, late), expected), { code: 'bad-format' });
  }
  assert.ok(process.memoryUsage().rss - before < 64 * MIB);
  const largest = parseProfile(naming([[7, PROFILE_CHUNKS_MAX]], []), expected);
  assert.equal(largest.early.length, PROFILE_CHUNKS_MAX);
});

test('any two recordings survive encoding and merge to their union', () => {
  const indexes = fc.uniqueArray(fc.nat(300), { maxLength: 80 });
  const profile = fc.tuple(indexes, indexes).map(([early, late]): Profile => {
    const sorted = (list: number[]) => list.toSorted((a, b) => a - b);
    return {
      manifest: MANIFEST,
      purpose: 'boot',
      runs: 1,
      early: sorted(early),
      late: sorted(late.filter((index) => !early.includes(index))),
    };
  });
  fc.assert(
    fc.property(profile, profile, (a, b) => {
      const expected = { manifest: MANIFEST, purpose: 'boot', chunkCount: 301 };
      assert.deepEqual(parseProfile(encodeProfile(a), expected), a);
      const merged = mergeProfiles(a, b);
      assert.deepEqual(parseProfile(encodeProfile(merged), expected), merged);
      for (let index = 0; index <= 300; index++) {
        const isEarly = a.early.includes(index) || b.early.includes(index);
        const isLate = !isEarly && (a.late.includes(index) || b.late.includes(index));
        assert.deepEqual([merged.early.includes(index), merged.late.includes(index)], [isEarly, isLate]);
      }
    }),
    { numRuns: 100 },
  );
});
