/**
 * Profiles (src/core/profile.ts) on this host: `profiles/<manifest>/<purpose>.json`, what starts here touched,
 * merged with what the origin keeps, and the recording of one start.
 *
 * What a recording covers: every chunk that a reader took from the cache between its beginning and its end, at
 * most PROFILE_WINDOW_MS after the first. It has to begin before the image is opened for the start, counts only if
 * nobody had it open then, and ends when a second reader opens it: another's reads would pass for this start's. (A
 * kernel is read whole by whoever opens it, and by QEMU through several handles.) Passthrough is refused meanwhile.
 * Pages that the kernel kept from an earlier open are read without anybody's knowing, so a start over them records
 * less than it used; as profiles are merged by union, that adds nothing and takes nothing away.
 */
import { mkdirSync } from 'node:fs';
import path from 'node:path';
import type { Digest } from '../src/core/bytes.ts';
import { GridError } from '../src/core/errors.ts';
import { PROFILE_BYTES_MAX, PROFILE_WINDOW_MS } from '../src/core/limits.ts';
import { isName } from '../src/core/manifest.ts';
import { encodeProfile, mergeProfiles, parseProfile, stepAt } from '../src/core/profile.ts';
import type { Profile, Purpose } from '../src/core/profile.ts';
import type { ChunkSource } from '../src/core/source.ts';
import { readWhole, replaceFile } from './folder.ts';
import type { CacheFolder } from './folder.ts';
import type { UseListener } from './chunk-states.ts';
import type { ImageFile } from './image-file.ts';

/** How often a recording reads the marks of use: its order of touches is as fine as this. */
const SAMPLE_MS = 50;
/** What was touched until the guest answered is early; of one that does not say when, what was touched in this part of
 * the recording's time … */
const EARLY_SHARE = 1 / 3;
/** … and what was touched within this: all that a resumed guest takes to answer at its console, where it waits for no link. */
const EARLY_MS_MIN = 500;

export interface ProfilesContext {
  readonly folder: CacheFolder;
  readonly source: ChunkSource;
  readonly log: (message: string) => void;
}

export class Profiles {
  readonly #context: ProfilesContext;

  constructor(context: ProfilesContext) {
    this.#context = context;
  }

  /** What this host knows; a file that is no profile of this image counts as none. */
  local(manifest: Digest, purpose: Purpose, chunkCount: number): Profile | undefined {
    const file = this.#fileOf(manifest, purpose);
    try {
      const bytes = readWhole(file, PROFILE_BYTES_MAX);
      return bytes && parseProfile(bytes, { manifest, purpose, chunkCount });
    } catch (error) {
      this.#context.log(`cache: ${file} is no use: ${String(error)}`);
      return undefined;
    }
  }

  /** What the origin has; undefined where it has none, keeps none, or does not answer. Untrusted: checked. The image
   * may still be being opened: the question does not wait for its number of chunks. */
  async remote(
    manifest: Digest,
    purpose: Purpose,
    chunkCount: number | Promise<number>,
  ): Promise<Profile | undefined> {
    const { source, log } = this.#context;
    try {
      const bytes = await source.readProfile?.(manifest, purpose);
      return bytes && parseProfile(bytes, { manifest, purpose, chunkCount: await chunkCount });
    } catch (error) {
      log(`cache: no profile '${purpose}' of ${manifest.slice(0, 12)} from ${source.name}: ${String(error)}`);
      return undefined;
    }
  }

  /** Merges a recording into what this host knows and, where it says something new, offers it to the origin. */
  async add(recording: Profile, chunkCount: number): Promise<void> {
    const { manifest, purpose } = recording;
    const known = this.local(manifest, purpose, chunkCount);
    this.save(known ? mergeProfiles(known, recording) : recording);
    const { source, log } = this.#context;
    if (!source.recordProfile) return;
    const remote = await this.remote(manifest, purpose, chunkCount);
    const there = new Set([...(remote?.early ?? []), ...(remote?.late ?? [])]);
    if (remote && [...recording.early, ...recording.late].every((index) => there.has(index))) return;
    try {
      await source.recordProfile(manifest, purpose, encodeProfile(recording));
    } catch (error) {
      log(`cache: ${source.name} does not take profile '${purpose}': ${String(error)}`);
    }
  }

  /** Puts a profile in place of what this host knows. */
  save(profile: Profile): void {
    const file = this.#fileOf(profile.manifest, profile.purpose);
    try {
      mkdirSync(path.dirname(file), { recursive: true, mode: 0o700 });
      replaceFile(file, encodeProfile(profile));
    } catch (error) {
      this.#context.log(`cache: cannot write ${file}: ${String(error)}`);
    }
  }

  #fileOf(manifest: Digest, purpose: Purpose): string {
    if (!isName(purpose)) {
      throw new GridError('bad-request', `'${String(purpose).slice(0, 80)}' is not the name of a purpose`);
    }
    return this.#context.folder.path('profiles', manifest, `${purpose}.json`);
  }
}

/** What is told about a start that is recorded. */
export interface StartRecording {
  /** The guest of a resume goes on: what was touched until now comes first. Idempotent. */
  goesOn(): void;
  /** The guest has answered: what is early is a share of the time until now. Idempotent. */
  answered(): void;
  /** Ends it, and merges it into the profile; undefined when it does not count. Idempotent. */
  finish(): Promise<Profile | undefined>;
}

/** One start being recorded. */
export class Recording implements UseListener {
  readonly #file: ImageFile;
  readonly #purpose: Purpose;
  readonly #firstTouchMs = new Map<number, number>();
  readonly #timer: NodeJS.Timeout;
  readonly #windowMs: number;
  readonly #beganMs: number;
  /** When the guest went on. */
  #goesOnMs: number | undefined;
  #harvestMs = performance.now();
  #startedMs: number | undefined;
  #answeredMs: number | undefined;

  /** `beganMs`, by performance.now(): the start began, perhaps before the image was open. */
  constructor(
    file: ImageFile,
    purpose: Purpose,
    {
      windowMs = PROFILE_WINDOW_MS,
      beganMs = performance.now(),
    }: { windowMs?: number; beganMs?: number } = {},
  ) {
    this.#file = file;
    this.#purpose = purpose;
    this.#windowMs = windowMs;
    this.#beganMs = beganMs;
    file.recordings.add(this);
    this.#timer = setInterval(() => this.#sample(), SAMPLE_MS).unref();
  }

  /** All that one harvest finds has one time. */
  #harvest(): void {
    this.#harvestMs = performance.now();
    this.#file.harvest();
  }

  #sample(): void {
    this.#harvest();
    if (this.#firstTouchMs.size === 0) return;
    this.#startedMs ??= performance.now();
    if (performance.now() - this.#startedMs > this.#windowMs) this.#stop();
  }

  used(index: number): void {
    if (!this.#firstTouchMs.has(index)) this.#firstTouchMs.set(index, this.#harvestMs);
  }

  shared(): void {
    const { kind } = this.#file.manifest;
    if (kind === 'disk' || kind === 'memory') this.#end();
  }

  /** What is touched from now on does not belong to it. */
  #end(): void {
    this.#harvest();
    this.#stop();
  }

  #stop(): void {
    clearInterval(this.#timer);
    this.#file.recordings.delete(this);
  }

  /** What its machine needed is loaded: its guest goes on now. */
  goesOn(): void {
    this.#harvest();
    this.#goesOnMs ??= performance.now();
  }

  /** The guest does now what it was started for. What a resumed one does in the rest of the recording it does at rest:
   * that is late. */
  answered(): void {
    this.#harvest();
    this.#answeredMs ??= performance.now();
  }

  /** Ends it. Undefined when nothing was touched. */
  finish(): Profile | undefined {
    this.#end();
    const times = [...this.#firstTouchMs.values()];
    if (times.length === 0) return undefined;
    const beganMs = times[0]!;
    const untilMs = this.#answeredMs ?? beganMs + (times.at(-1)! - beganMs) * EARLY_SHARE;
    const earlyUntil = Math.max(untilMs, beganMs + EARLY_MS_MIN);
    const ofClass = (early: boolean) =>
      [...this.#firstTouchMs]
        .filter(([, atMs]) => atMs <= earlyUntil === early)
        .map(([index]) => index)
        .toSorted((a, b) => a - b);
    return {
      manifest: this.#file.manifestDigest,
      purpose: this.#purpose,
      runs: 1,
      early: ofClass(true),
      late: ofClass(false),
      steps: this.#steps(),
    };
  }

  #steps(): Map<number, number> {
    const goesOnMs = this.#goesOnMs ?? -Infinity;
    return new Map(
      [...this.#firstTouchMs].map(([index, atMs]) => [
        index,
        atMs <= goesOnMs ? 0 : stepAt(atMs - this.#beganMs),
      ]),
    );
  }
}
