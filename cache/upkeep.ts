/**
 * What an operator asks of a cache: warm, pin, unpin, evict, scrub; and the starts of machines, whose profiles are
 * replayed and recorded. Long work reports progress and can be cancelled.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { ByteRange, Digest } from '../src/core/bytes.ts';
import { GridError } from '../src/core/errors.ts';
import { chunkCountOf, chunkLengthOf } from '../src/core/manifest.ts';
import { inOrder, LATE_RANK, mergeProfiles } from '../src/core/profile.ts';
import type { Profile, Purpose } from '../src/core/profile.ts';
import type { ImageFile } from './image-file.ts';
import type { Pins } from './pins.ts';
import { prefetchChunks, rangeOf } from './prefetch.ts';
import type { PrefetchOptions } from './prefetch.ts';
import { Recording } from './profiles.ts';
import type { Profiles, StartRecording } from './profiles.ts';
import type { Space } from './space.ts';

/** Behind whatever starts. */
const WARM_RANK = 1000;
/** Chunks that scrub reads and hashes at a time. */
const SCRUB_CHUNKS = 4;
/** Starts that a host records of one image: each costs passthrough, and later ones add next to nothing. */
const RECORDINGS_MAX = 3;

/** A guest that has not answered by then, counted from when all that it needed is here, is not waited for. */
const LATE_WAIT_MS = 1000;

export interface ReplayOptions extends PrefetchOptions {
  /** What earlier starts touched late is fetched when this resolves. It costs the processors of a start as much as what
   * its guest waits for; on a fast link they are what it waits for. */
  readonly lateAfter?: Promise<void>;
}

export interface UpkeepContext {
  readonly space: Space;
  readonly pins: Pins;
  readonly profiles: Profiles;
  /** Opens an image; it stays open until `release`. */
  readonly hold: (manifest: Digest) => Promise<{ readonly file: ImageFile; readonly release: () => void }>;
  /** The image if it is open, how many have it, and how many of them read it for somebody else. */
  readonly peek: (manifest: Digest) => {
    readonly file: ImageFile | undefined;
    readonly references: number;
    readonly readers: number;
  };
  /** Manifests of all images in the folder. */
  readonly localManifests: () => Digest[];
  /** Closes an image that nobody has open and removes its files. */
  readonly removeFiles: (manifest: Digest) => Promise<void>;
  readonly log: (message: string) => void;
}

export interface WarmResult {
  /** Chunks that are here now, of those asked for; how many of them had to be fetched. */
  readonly chunks: number;
  readonly fetchedChunks: number;
}

export interface ScrubResult {
  readonly images: number;
  readonly checkedChunks: number;
  readonly refetchedChunks: number;
  /** Damaged, and the source did not give them: they are not here any more. */
  readonly lostChunks: number;
}

export class Upkeep {
  readonly #context: UpkeepContext;

  constructor(context: UpkeepContext) {
    this.#context = context;
  }

  /** Fetches all of an image, or what the profile of `purpose` names. Throws not-found without a profile, no-space,
   * closed when cancelled, and what a fetch throws. */
  async warm(manifest: Digest, options: PrefetchOptions & { purpose?: Purpose } = {}): Promise<WarmResult> {
    const { purpose } = options;
    const holding = this.#context.hold(manifest);
    const remote = purpose === undefined ? undefined : this.#askedWhileOpening(holding, manifest, purpose);
    const { file, release } = await holding;
    try {
      const chunks = purpose === undefined ? allChunks(file) : await this.#bootSet(file, purpose, remote);
      this.#refuseTooMuch(file, chunks);
      const behind = { ...options, rankOf: () => WARM_RANK };
      const fetchedChunks = await prefetchChunks(file, this.#context.space, chunks, behind);
      await file.flush();
      return { chunks: chunks.length, fetchedChunks };
    } finally {
      release();
    }
  }

  /** More than fits at all would evict its own beginning. */
  #refuseTooMuch(file: ImageFile, chunks: readonly number[]): void {
    const { quotaBytes = Infinity } = this.#context.space;
    const bytes = chunks.reduce((sum, index) => sum + chunkLengthOf(file.manifest, index), 0);
    if (bytes <= quotaBytes) return;
    throw new GridError(
      'no-space',
      `${bytes} bytes of image ${file.manifestDigest.slice(0, 12)} do not fit the cache's quota of ${quotaBytes} bytes`,
    );
  }

  /** The origin's profile, asked for while the image is being opened: on a long link that is a round trip less. */
  #askedWhileOpening(
    holding: Promise<{ readonly file: ImageFile }>,
    manifest: Digest,
    purpose: Purpose,
  ): Promise<Profile | undefined> {
    const chunkCount = holding.then(({ file }) => chunkCountOf(file.manifest));
    chunkCount.catch(() => undefined); // whoever holds the image says why
    return this.#context.profiles.remote(manifest, purpose, chunkCount);
  }

  async #bootSet(file: ImageFile, purpose: Purpose, asked?: Promise<Profile | undefined>): Promise<number[]> {
    const { profiles } = this.#context;
    const count = chunkCountOf(file.manifest);
    const local = profiles.local(file.manifestDigest, purpose, count);
    const remote = await (asked ?? profiles.remote(file.manifestDigest, purpose, count));
    const profile = local && remote ? mergeProfiles(local, remote) : (local ?? remote);
    if (!profile) {
      throw new GridError(
        'not-found',
        `image ${file.manifestDigest.slice(0, 12)} has no profile '${purpose}' yet; one start of it records one`,
      );
    }
    return inOrder(profile).map(({ index }) => index);
  }

  /** Keeps an image, or what the profile of `purpose` names of it, from eviction; `warm` brings it here. */
  async pin(manifest: Digest, purpose?: Purpose): Promise<void> {
    const { pins, profiles, hold } = this.#context;
    const { file, release } = await hold(manifest);
    try {
      if (purpose !== undefined) {
        const count = chunkCountOf(file.manifest);
        if (!profiles.local(manifest, purpose, count)) {
          const remote = await profiles.remote(manifest, purpose, count);
          if (remote) profiles.save(remote);
        }
      }
      this.#refuseTooMuch(file, purpose === undefined ? allChunks(file) : await this.#bootSet(file, purpose));
      pins.add(purpose === undefined ? { manifest } : { manifest, purpose });
    } finally {
      release();
    }
  }

  /** Throws not-found when there is no such pin. */
  unpin(manifest: Digest, purpose?: Purpose): void {
    if (this.#context.pins.remove(manifest, purpose)) return;
    const what = purpose === undefined ? '' : ` for '${purpose}'`;
    throw new GridError('not-found', `image ${manifest.slice(0, 12)} is not pinned${what}`);
  }

  /** Takes an image's chunks off this disk; with its files, when nobody has it open. Resolves to the chunks that
   * went. Throws in-use for a pinned image and one whose file a frontend has handed out. */
  async evict(manifest: Digest): Promise<number> {
    const { pins, hold, removeFiles, peek } = this.#context;
    if (pins.of(manifest).length > 0) {
      throw new GridError('in-use', `image ${manifest.slice(0, 12)} is pinned; unpin it first`);
    }
    const { file, release } = await hold(manifest);
    try {
      if (file.claimed) {
        throw new GridError(
          'in-use',
          `image ${manifest.slice(0, 12)} is open for passthrough; close it first`,
        );
      }
      await file.flush();
      const before = file.figures.evictedChunks;
      await file.evict(presentChunks(file));
      return file.figures.evictedChunks - before;
    } finally {
      release();
      if (peek(manifest).references === 0) await removeFiles(manifest);
    }
  }

  /** Reads and hashes all that is here of one image or of all; fetches again what is damaged. */
  async scrub(options: PrefetchOptions & { manifest?: Digest } = {}): Promise<ScrubResult> {
    const { hold, localManifests, log } = this.#context;
    const manifests = options.manifest === undefined ? localManifests() : [options.manifest];
    const total = { images: 0, checkedChunks: 0, refetchedChunks: 0, lostChunks: 0 };
    const jobs: { file: ImageFile; chunks: number[]; release: () => void }[] = [];
    try {
      for (const manifest of manifests) {
        const { file, release } = await hold(manifest);
        jobs.push({ file, chunks: presentChunks(file), release });
      }
      const all = jobs.reduce((sum, { chunks }) => sum + chunks.length, 0);
      for (const { file, chunks } of jobs) {
        total.images++;
        let next = 0;
        let lost = 0;
        const before = file.figures.refetchedChunks;
        const oneAfterAnother = async () => {
          for (let index = chunks[next++]; index !== undefined; index = chunks[next++]) {
            if (options.signal?.aborted) throw new GridError('closed', 'the scrub was cancelled');
            try {
              await file.check(index);
            } catch (error) {
              lost++;
              log(`cache: scrub: chunk ${index} of ${file.manifestDigest.slice(0, 12)}: ${String(error)}`);
            }
            options.progress?.(++total.checkedChunks, all);
          }
        };
        await Promise.all(Array.from({ length: SCRUB_CHUNKS }, oneAfterAnother));
        total.lostChunks += lost;
        total.refetchedChunks += file.figures.refetchedChunks - before - lost;
        await file.flush();
      }
      return total;
    } finally {
      for (const { release } of jobs) release();
    }
  }

  /**
   * Fetches what earlier starts touched, early set first. Resolves to the number of chunks fetched when all is here;
   * 0 without a profile. Throws closed when cancelled, no-space, and what a fetch throws.
   */
  async prefetchProfile(manifest: Digest, purpose: Purpose, options: ReplayOptions = {}): Promise<number> {
    const { hold, profiles, space } = this.#context;
    const holding = hold(manifest);
    const remote = this.#askedWhileOpening(holding, manifest, purpose);
    const { file, release } = await holding;
    // Also while what is late waits: chunks around a miss would come before it, and beside what the guest waits for.
    const resume = file.readAround.pause();
    try {
      const done = new Set<number>();
      const ranks = new Map<number, number>();
      const rankOf = (index: number) => ranks.get(index)!;
      const replay = (chosen: (rank: number) => boolean) => {
        const more = [...ranks.keys()].filter((index) => !done.has(index) && chosen(rankOf(index)));
        for (const index of more) done.add(index);
        return prefetchChunks(file, space, more, { ...options, rankOf });
      };
      const replayEarly = async (profile: Profile | undefined) => {
        for (const { index, rank } of profile ? inOrder(profile) : [])
          if (!ranks.has(index)) ranks.set(index, rank);
        return replay((rank) => rank < LATE_RANK);
      };
      // What is known here does not wait for the origin's answer.
      let fetched = await replayEarly(profiles.local(manifest, purpose, chunkCountOf(file.manifest)));
      fetched += await replayEarly(await remote);
      if (options.lateAfter && done.size < ranks.size)
        await Promise.race([options.lateAfter, sleep(LATE_WAIT_MS, undefined, { ref: false })]);
      return fetched + (await replay(() => true));
    } finally {
      resume();
      release();
    }
  }

  /** What of an image is on this disk, but for zeros: chunk by chunk, in the order of the image. */
  async presentRanges(manifest: Digest): Promise<ByteRange[]> {
    const { file, release } = await this.#context.hold(manifest);
    try {
      return presentChunks(file).map((index) => rangeOf(file, index));
    } finally {
      release();
    }
  }

  /** Begins to record what a start touches (see profiles.ts for what that covers). Call before the image is opened
   * for it. `finish` merges the recording into the profile; undefined when it does not count. */
  startRecording(manifest: Digest, purpose: Purpose): StartRecording {
    const { peek, hold, profiles, pins } = this.#context;
    const { file: open, readers } = peek(manifest);
    if (readers > 0) {
      const nothing = () => undefined;
      return { goesOn: nothing, answered: nothing, finish: () => Promise.resolve(undefined) };
    }
    open?.harvest();
    const beganMs = performance.now();
    const held = hold(manifest).then(({ file, release }) => {
      const known = profiles.local(manifest, purpose, chunkCountOf(file.manifest));
      const isKnownWell = (known?.runs ?? 0) >= RECORDINGS_MAX;
      return {
        file,
        release,
        recording: isKnownWell ? undefined : new Recording(file, purpose, { beganMs }),
      };
    });
    held.catch(() => undefined);
    let finished: Promise<Profile | undefined> | undefined;
    const finish = async () => {
      const { file, release, recording } = await held;
      try {
        const profile = recording?.finish();
        if (profile) await profiles.add(profile, chunkCountOf(file.manifest));
        pins.refresh(manifest);
        return profile;
      } finally {
        release();
      }
    };
    return {
      goesOn: () => void held.then(({ recording }) => recording?.goesOn()).catch(() => undefined),
      answered: () => void held.then(({ recording }) => recording?.answered()).catch(() => undefined),
      finish: () => (finished ??= finish()),
    };
  }
}

function allChunks(file: ImageFile): number[] {
  return [...file.table.entries()].map(({ index }) => index);
}

function presentChunks(file: ImageFile): number[] {
  const present: number[] = [];
  file.states.forEachPresent((index) => present.push(index));
  return present;
}
