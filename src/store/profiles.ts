/**
 * Profiles in a store: one file for each manifest and purpose, below v1/ so that a static server offers them.
 * Recordings come from outside and are merged under the store's lock; the file stays below PROFILE_BYTES_MAX and
 * stops to grow after PROFILE_RUNS_MAX recordings. A file that cannot be parsed is as good as none: it is read as
 * it is (the receiver parses) and replaced by the next recording.
 */
import { existsSync, mkdirSync, readdirSync } from 'node:fs';
import path from 'node:path';
import { isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import {
  PROFILE_BYTES_MAX,
  PROFILE_CHUNKS_MAX,
  PROFILE_PURPOSES_MAX,
  PROFILE_RUNS_MAX,
} from '../core/limits.ts';
import { isName } from '../core/manifest.ts';
import { encodeProfile, mergeProfiles, parseProfile } from '../core/profile.ts';
import type { Profile, Purpose } from '../core/profile.ts';
import { readBounded, replaceFile, syncFolder } from './layout.ts';
import type { StoreLayout } from './layout.ts';
import { withStoreLock } from './lock.ts';

/** Where a profile lies. Both names become a path here, so both are checked: throws bad-request. */
function profilePath(layout: StoreLayout, manifest: Digest, purpose: Purpose): string {
  if (!isDigest(manifest)) throw new GridError('bad-request', `'${String(manifest)}' is not a digest`);
  if (!isName(purpose)) {
    throw new GridError(
      'bad-request',
      `${JSON.stringify(String(purpose).slice(0, 100))} is not a purpose: lower-case letters, digits, '.', '-', '_'`,
    );
  }
  return path.join(layout.profiles(manifest), `${purpose}.json`);
}

/** The profile's bytes as they are, or undefined where there is none. */
export async function readProfile(
  layout: StoreLayout,
  manifest: Digest,
  purpose: Purpose,
): Promise<Buffer | undefined> {
  const file = profilePath(layout, manifest, purpose);
  try {
    return await readBounded(file, PROFILE_BYTES_MAX);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined;
    throw asGridError(error, `cannot read profile '${purpose}' of manifest ${manifest}`);
  }
}

interface Target {
  readonly manifest: Digest;
  readonly purpose: Purpose;
  /** Of that manifest, which the caller has seen to be there. */
  readonly chunkCount: number;
}

/** Merges one recording into the file. See Store.recordProfile. */
export async function recordProfile(
  layout: StoreLayout,
  target: Target,
  recording: Uint8Array,
): Promise<void> {
  const { manifest, purpose } = target;
  const file = profilePath(layout, manifest, purpose);
  // One call is one recording, whatever it says of itself.
  const added: Profile = { ...parseProfile(recording, target), runs: 1 };
  await withStoreLock(layout, async () => {
    const before = await readKept(layout, target);
    if (before && before.runs >= PROFILE_RUNS_MAX) return;
    // A garbage collection that came first took the manifest and its profiles together.
    if (!existsSync(layout.object('manifests', manifest))) {
      throw new GridError('not-found', `the store ${layout.folder} has no manifest ${manifest}`);
    }
    try {
      if (!before) makeRoom(layout, manifest, purpose);
      replaceFile(layout, file, fitting(before ? mergeProfiles(before, added) : added));
    } catch (error) {
      throw asGridError(error, `cannot write profile '${purpose}' of manifest ${manifest}`);
    }
  });
}

async function readKept(layout: StoreLayout, target: Target): Promise<Profile | undefined> {
  try {
    const bytes = await readProfile(layout, target.manifest, target.purpose);
    return bytes && parseProfile(bytes, target);
  } catch (error) {
    if (error instanceof GridError && error.blame === 'data') return undefined;
    throw error;
  }
}

/** The folder for a profile that is not there yet; each name in the way to it durable. */
function makeRoom(layout: StoreLayout, manifest: Digest, purpose: Purpose): void {
  const folder = layout.profiles(manifest);
  if (mkdirSync(folder, { recursive: true }) !== undefined) {
    for (let at = path.dirname(folder); at.length >= layout.v1.length; at = path.dirname(at)) syncFolder(at);
  }
  const others = readdirSync(folder).filter((name) => name !== `${purpose}.json`);
  if (others.length >= PROFILE_PURPOSES_MAX) {
    throw new GridError(
      'no-space',
      `manifest ${manifest} has profiles for ${PROFILE_PURPOSES_MAX} purposes, the most there can be: remove one below ${folder}`,
    );
  }
}

/** The profile as bytes within its bounds. What goes first is what a start needs last; a union over its bounds is
 * of starts that have little in common, and of no use as a whole. */
function fitting(profile: Profile): Buffer {
  for (let { early, late } = profile; ;) {
    const bytes = encodeProfile({ ...profile, early, late });
    const isWithin = early.length + late.length <= PROFILE_CHUNKS_MAX && bytes.length <= PROFILE_BYTES_MAX;
    if (isWithin) return bytes;
    if (late.length > 0) late = late.slice(0, late.length >> 1);
    else early = early.slice(0, early.length >> 1);
  }
}
