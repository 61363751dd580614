/**
 * A profile: which chunks of one manifest a start (a boot, a resume) touches, as two sets: `early`, what was
 * touched in the first part of the recording, and `late`. Sets of several runs can
 * be merged. `steps` says of each chunk how long after the start's beginning one recording first saw it touched: on a link
 * whose bandwidth is what a start waits for, it counts that the pages with which a machine loads its devices, and then
 * those of the guest's answer, come before others, and over all images of the start. (On a fast disk exact order
 * gained nothing: REAP, ASPLOS 2021, and what followed.)
 *
 * JSON, { schema: 1, manifest, purpose, runs, early: [[first, count], …], late: […], order?: [[step, count], …] }:
 * runs of chunk indexes in rising order; `order` names the steps of all of them, in rising order of index.
 * It comes from outside (any proxy may have recorded it), so parsing is bounded: by its bytes, by
 * the image and by PROFILE_CHUNKS_MAX.
 */
import { isDigest } from './bytes.ts';
import type { Digest } from './bytes.ts';
import { GridError } from './errors.ts';
import { PROFILE_BYTES_MAX, PROFILE_CHUNKS_MAX } from './limits.ts';

/** What a start is: a name such as `boot` or `resume` (see `isName`). */
export type Purpose = string;

export interface Profile {
  readonly manifest: Digest;
  readonly purpose: Purpose;
  /** Recordings merged into it. */
  readonly runs: number;
  /** Chunk indexes in rising order. */
  readonly early: readonly number[];
  readonly late: readonly number[];
  /** Of chunks that are early or late: `stepAt` of their first touch. Not all of them need have one. */
  readonly steps?: ReadonlyMap<number, number>;
}

/** One more than the highest step. */
const STEPS_MAX = 64;
const SHORT_STEPS = 32;
const SHORT_STEP_MS = 50;
const LONG_STEP_MS = 500;

/** The step of something that happens so long after a start began: short ones while a resumed guest answers, long ones
 * for a boot. Step 0 is also what a machine touches before its guest goes on. */
export function stepAt(ms: number): number {
  const short = Math.floor(Math.max(0, ms) / SHORT_STEP_MS);
  if (short < SHORT_STEPS) return short;
  const long = Math.floor((ms - SHORT_STEPS * SHORT_STEP_MS) / LONG_STEP_MS);
  return Math.min(SHORT_STEPS + long, STEPS_MAX - 1);
}

function toRuns(indexes: readonly number[]): [number, number][] {
  const runs: [number, number][] = [];
  for (const index of indexes) {
    const last = runs.at(-1);
    if (last && last[0] + last[1] === index) last[1]++;
    else runs.push([index, 1]);
  }
  return runs;
}

function toIndexes(runs: readonly [from: number, to: number][]): number[] {
  const indexes: number[] = [];
  for (const [from, to] of runs) for (let index = from; index < to; index++) indexes.push(index);
  return indexes;
}

export function encodeProfile(profile: Profile): Buffer {
  const { manifest, purpose, runs, early, late, steps } = profile;
  const order = steps === undefined ? {} : { order: toOrder(profile, steps) };
  const json = { schema: 1, manifest, purpose, runs, early: toRuns(early), late: toRuns(late), ...order };
  return Buffer.from(JSON.stringify(json) + '\n');
}

const ascending = (a: number, b: number) => a - b;

function toOrder({ early, late }: Profile, steps: ReadonlyMap<number, number>): [number, number][] {
  const order: [number, number][] = [];
  for (const index of [...early, ...late].toSorted(ascending)) {
    const step = steps.get(index) ?? STEPS_MAX;
    const last = order.at(-1);
    if (last?.[0] === step) last[1]++;
    else order.push([step, 1]);
  }
  return order;
}

/** Undefined when it is not what `toOrder` writes. */
function toSteps({ early, late }: Profile, order: unknown): Map<number, number> | undefined {
  if (!Array.isArray(order)) return undefined;
  const all = [...early, ...late].toSorted(ascending);
  const steps = new Map<number, number>();
  let at = 0;
  for (const run of order as unknown[]) {
    const [step, count] = (Array.isArray(run) && run.length === 2 ? run : []) as unknown[];
    if (!Number.isSafeInteger(step) || !Number.isSafeInteger(count)) return undefined;
    const end = at + (count as number);
    if ((step as number) < 0 || (step as number) > STEPS_MAX || end <= at || end > all.length)
      return undefined;
    for (; at < end; at++) if (step !== STEPS_MAX) steps.set(all[at]!, step as number);
  }
  return at === all.length ? steps : undefined;
}

/** Throws bad-format or newer-format; every index is below `chunkCount`, in rising order, in one set only. */
export function parseProfile(
  bytes: Uint8Array,
  expected: { manifest: Digest; purpose: Purpose; chunkCount: number },
): Profile {
  const what = `profile '${expected.purpose}' of ${expected.manifest.slice(0, 12)}`;
  const bad = (why: string) => new GridError('bad-format', `${what}: ${why}`);
  if (bytes.length > PROFILE_BYTES_MAX) throw bad('over its size bound');
  let raw: Record<string, unknown>;
  try {
    raw = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes)) as Record<string, unknown>;
  } catch (cause) {
    throw new GridError('bad-format', `${what} is not JSON`, { cause });
  }
  if (typeof raw !== 'object' || raw === null) throw bad('not an object');
  if (typeof raw['schema'] !== 'number') throw bad('no schema');
  if (raw['schema'] !== 1) throw new GridError('newer-format', `${what} has schema ${raw['schema']}`);
  if (!isDigest(raw['manifest']) || raw['manifest'] !== expected.manifest) throw bad('of another image');
  if (raw['purpose'] !== expected.purpose) throw bad('of another purpose');
  const { runs } = raw;
  if (typeof runs !== 'number' || !Number.isSafeInteger(runs) || runs < 1) throw bad('a bad number of runs');
  let chunks = 0;
  const runsOf = (field: 'early' | 'late'): [from: number, to: number][] => {
    const value = raw[field];
    if (!Array.isArray(value)) throw bad(`${field} is not a list`);
    let end = 0;
    return value.map((run: unknown): [number, number] => {
      const [first, count] = Array.isArray(run) && run.length === 2 ? (run as unknown[]) : [];
      if (!Number.isSafeInteger(first) || !Number.isSafeInteger(count))
        throw bad(`${field} has a malformed run`);
      const from = first as number;
      const to = from + (count as number);
      if (from < end || to <= from || to > expected.chunkCount)
        throw bad(`${field} has a run out of order or range`);
      chunks += to - from;
      if (chunks > PROFILE_CHUNKS_MAX) throw bad(`more than ${PROFILE_CHUNKS_MAX} chunks`);
      end = to;
      return [from, to];
    });
  };
  const early = runsOf('early');
  const late = runsOf('late');
  for (let e = 0, l = 0; e < early.length && l < late.length;) {
    if (early[e]![1] <= late[l]![0]) e++;
    else if (late[l]![1] <= early[e]![0]) l++;
    else throw bad(`chunk ${Math.max(early[e]![0], late[l]![0])} is in both sets`);
  }
  const profile: Profile = {
    manifest: expected.manifest,
    purpose: expected.purpose,
    runs,
    early: toIndexes(early),
    late: toIndexes(late),
  };
  if (raw['order'] === undefined) return profile;
  const steps = toSteps(profile, raw['order']);
  if (!steps) throw bad('a malformed order');
  return { ...profile, steps };
}

/** Of ranks: what is late has no lower one. */
export const LATE_RANK = STEPS_MAX + 1;

/** All that it names, each with its rank: the lower comes first, also before other images of the same start. */
export function inOrder({ steps, early, late }: Profile): { index: number; rank: number }[] {
  const ranked = (otherwise: number) => (index: number) => ({ index, rank: steps?.get(index) ?? otherwise });
  // What an earlier recording knew only as early comes with the first of those that have steps.
  const all = [
    ...early.map(ranked(steps ? STEPS_MAX : 1)),
    ...late.map((index) => ({ index, rank: LATE_RANK + (steps?.get(index) ?? STEPS_MAX) })),
  ];
  return all.toSorted((a, b) => a.rank - b.rank);
}

/** The union of two recordings. Steps are those of the first that has any, and what it knows keeps its class: in a later
 * one, much is here before it is asked for, or is read ahead of the guest. Else a chunk that either has early is early. */
export function mergeProfiles(a: Profile, b: Profile): Profile {
  const [first, second] = a.steps !== undefined || b.steps === undefined ? [a, b] : [b, a];
  const isLate = new Set(first.steps === undefined ? [] : first.late);
  const early = new Set([...first.early, ...second.early.filter((index) => !isLate.has(index))]);
  const late = new Set([...a.late, ...b.late].filter((index) => !early.has(index)));
  const steps = a.steps ?? b.steps;
  return {
    ...a,
    runs: a.runs + b.runs,
    early: [...early].toSorted(ascending),
    late: [...late].toSorted(ascending),
    ...(steps === undefined ? {} : { steps }),
  };
}
