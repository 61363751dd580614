/** What a profile says of order: on the wire, merged, and as ranks for a prefetch. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { encodeProfile, inOrder, mergeProfiles, parseProfile, stepAt } from '../../src/core/profile.ts';
import type { Profile } from '../../src/core/profile.ts';
import { hasCode } from '../suites/image.ts';

const MANIFEST = 'ab'.repeat(32);
const EXPECTED = { manifest: MANIFEST, purpose: 'resume', chunkCount: 100 };

function profile(early: number[], late: number[], steps?: [number, number][]): Profile {
  const order = steps === undefined ? {} : { steps: new Map(steps) };
  return { manifest: MANIFEST, purpose: 'resume', runs: 1, early, late, ...order };
}

test('steps are short while a resumed guest answers, long after that, and end', () => {
  assert.deepEqual([-1, 0, 49, 50, 1599].map(stepAt), [0, 0, 0, 1, 31]);
  assert.deepEqual([1600, 2099, 2100].map(stepAt), [32, 32, 33]);
  assert.deepEqual([20_000, 3_600_000].map(stepAt), [63, 63]);
});

test('a profile with steps is read as it was written; one without them stays without', () => {
  const steps: [number, number][] = [
    [3, 5],
    [4, 5],
    [40, 0],
    [90, 63],
  ];
  // 91 has no step.
  const written = profile([3, 4, 40], [90, 91], steps);
  assert.deepEqual(parseProfile(encodeProfile(written), EXPECTED), written);
  const plain = profile([1], [2]);
  assert.deepEqual(parseProfile(encodeProfile(plain), EXPECTED), plain);
  assert.ok(!encodeProfile(plain).includes('order'));
});

test('an order that does not fit the chunks is refused', () => {
  const json = (order: unknown) =>
    Buffer.from(
      JSON.stringify({
        schema: 1,
        manifest: MANIFEST,
        purpose: 'resume',
        runs: 1,
        early: [[3, 2]],
        late: [],
        order,
      }),
    );
  assert.equal(parseProfile(json([[7, 2]]), EXPECTED).steps?.get(4), 7);
  const bad = [
    7,
    [],
    [[7, 1]],
    [[7, 3]],
    [[65, 2]],
    [[-1, 2]],
    [
      [0, 0],
      [1, 2],
    ],
    [[0.5, 2]],
    [[1]],
    'x',
  ];
  for (const order of bad) assert.throws(() => parseProfile(json(order), EXPECTED), hasCode('bad-format'));
});

test('the lowest step comes first, then what has none, then what is late, by step too', () => {
  const ranked = inOrder(
    profile(
      [1, 2, 3],
      [4, 5],
      [
        [3, 0],
        [1, 9],
        [5, 12],
      ],
    ),
  );
  assert.deepEqual(
    ranked.map(({ index }) => index),
    [3, 1, 2, 5, 4],
  );
  const unordered = inOrder(profile([8, 9], [7]));
  assert.deepEqual(
    unordered.map(({ index }) => index),
    [8, 9, 7],
  );
  // Beside another image's, whose machine waits for them.
  assert.ok(unordered[0]!.rank > ranked[0]!.rank);
});

test('merged profiles keep the steps and the classes of the first recording that has steps', () => {
  const first = profile([1], [2], [[1, 3]]);
  const second = profile(
    [2, 6],
    [],
    [
      [1, 0],
      [2, 1],
      [6, 1],
    ],
  );
  assert.deepEqual(mergeProfiles(first, second), {
    ...first,
    runs: 2,
    early: [1, 6],
    late: [2],
  });
  const plain = profile([2, 4], [1]);
  assert.deepEqual(mergeProfiles(plain, first), { ...first, runs: 2, early: [1, 4], late: [2] });
  assert.deepEqual(mergeProfiles(plain, profile([3], [2])), { ...plain, runs: 2, early: [2, 3, 4] });
});
