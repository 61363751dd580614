/**
 * A profile: which chunks of one manifest a start (a boot, a resume) touches, as two sets: `early`, what was
 * touched in the first part of the recording, and `late`. Sets with a coarse order, not a sequence: replaying an
 * exact order gained nothing over this in the field (REAP, ASPLOS 2021, and what followed), and sets of several
 * runs can be merged.
 *
 * JSON, { schema: 1, manifest, purpose, runs, early: [[first, count], …], late: […] }, runs of chunk indexes in
 * rising order. It comes from outside (any proxy may have recorded it), so parsing is bounded: by its bytes, by
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
  const { manifest, purpose, runs, early, late } = profile;
  return Buffer.from(
    JSON.stringify({ schema: 1, manifest, purpose, runs, early: toRuns(early), late: toRuns(late) }) + '\n',
  );
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
  return {
    manifest: expected.manifest,
    purpose: expected.purpose,
    runs,
    early: toIndexes(early),
    late: toIndexes(late),
  };
}

/** The union of two recordings; a chunk that either has early is early. */
export function mergeProfiles(a: Profile, b: Profile): Profile {
  const ascending = (x: number, y: number) => x - y;
  const early = new Set([...a.early, ...b.early]);
  const late = new Set([...a.late, ...b.late].filter((index) => !early.has(index)));
  return {
    ...a,
    runs: a.runs + b.runs,
    early: [...early].toSorted(ascending),
    late: [...late].toSorted(ascending),
  };
}
