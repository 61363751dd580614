/**
 * Starts of machines as the cache learns from them: what earlier starts of an image touched is fetched before it is
 * asked for, and what this one touches is recorded for the next. Of memory that a machine goes on in, what is known to be
 * needed is brought into the kernel's pages as well (pages-ahead.ts); where nothing is known and nothing recorded, all
 * of it that is here.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { ByteRange, Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import type { Profile, Purpose } from '../core/profile.ts';
import { readPagesAhead } from './pages-ahead.ts';
import type { Vm } from './vm-record.ts';

/** A start is over this long after it began at the latest … */
export const START_MS_MAX = 120_000;
/** … or this long after the guest was ready: what its last services read belongs to it. A resumed guest says
 * nothing; what it does first is over by then. */
const START_TAIL_MS = 3_000;
const RESUME_MS = 10_000;

/** What the machines tell. */
export interface Starts {
  /** Whether what they touch is recorded. */
  readonly records: boolean;
  /** A machine is about to open these images; the ones it needs first come first. `memory`: of what it goes on in, the
   * file on the mount, whose bytes are that one's of the images unless it has written them. */
  begin(manifests: readonly Digest[], purpose: Purpose, memory?: { file: string; image: Digest }): Start;
}

export interface Start {
  /** What the machine of a resume needs itself is loaded, its guest goes on: what was touched until now comes first the
   * next time. Idempotent. */
  goesOn(): void;
  /** A resumed guest has answered: what it does from now on, the next one's answer does not wait for. Idempotent. */
  answered(): void;
  /** The guest is ready, and has done what a start does after that. Idempotent. */
  ended(): void;
  /** The machine is gone, or never was: as `ended`, and nothing is read for it any more. Idempotent. */
  gone(): void;
  /** When it has ended and what it touched is on record, here and at the origin as far as that takes it: how many chunks. */
  readonly recorded: Promise<number>;
}

/** What a cache does for it. */
export interface StartCache {
  prefetchProfile(
    manifest: Digest,
    purpose: Purpose,
    options: { here?: (range: ByteRange) => void; lateAfter?: Promise<void> },
  ): Promise<number>;
  startRecording(
    manifest: Digest,
    purpose: Purpose,
  ): { goesOn(): void; answered(): void; finish(): Promise<Profile | undefined> };
  presentRanges(manifest: Digest): Promise<ByteRange[]>;
  /** A machine is being started, until what is returned is called. */
  starting(): () => void;
}

/** `profiles`: whether starts are recorded, and what earlier ones touched is fetched ahead. */
export function createStarts(cache: StartCache, profiles: boolean, log: (line: string) => void): Starts {
  const failed = (what: string, manifest: Digest) => (error: unknown) => {
    if (error instanceof GridError && error.code === 'closed') return;
    log(`${what} of ${manifest.slice(0, 12)}: ${error instanceof Error ? error.message : String(error)}`);
  };
  const replay = async (
    manifest: Digest,
    purpose: Purpose,
    options: Parameters<StartCache['prefetchProfile']>[2],
  ) => {
    const chunks = await cache.prefetchProfile(manifest, purpose, options);
    if (chunks > 0) log(`profile '${purpose}' of ${manifest.slice(0, 12)}: ${chunks} chunks fetched ahead`);
  };
  return {
    records: profiles,
    begin(manifests, purpose, memory) {
      const pages = memory === undefined ? undefined : readPagesAhead(memory.file);
      /** A resumed guest has answered, or there is nobody to wait for. */
      const done = Promise.withResolvers<void>();
      const recordings = profiles ? manifests.map((one) => cache.startRecording(one, purpose)) : [];
      const isMade = cache.starting();
      for (const manifest of manifests) {
        const mine = manifest === memory?.image ? pages : undefined;
        let work: Promise<void> | undefined;
        const options = {
          ...(mine ? { here: mine.here } : {}),
          ...(memory ? { lateAfter: done.promise } : {}),
        };
        if (profiles) work = replay(manifest, purpose, options);
        else if (mine) work = cache.presentRanges(manifest).then((ranges) => ranges.forEach(mine.here));
        void work?.catch(failed('replay of the profile', manifest)).finally(() => mine?.finish());
      }
      const recorded = Promise.withResolvers<number>();
      const ended = () => {
        isMade();
        done.resolve();
        const finished = recordings.splice(0).map(async (recording, at) => {
          try {
            const profile = await recording.finish();
            return profile === undefined ? 0 : profile.early.length + profile.late.length;
          } catch (error) {
            failed('recording', manifests[at]!)(error);
            return 0;
          }
        });
        void Promise.all(finished).then((counts) =>
          recorded.resolve(counts.reduce((sum, one) => sum + one, 0)),
        );
      };
      return {
        goesOn() {
          isMade();
          for (const recording of recordings) recording.goesOn();
        },
        answered() {
          done.resolve();
          for (const recording of recordings) recording.answered();
        },
        ended,
        gone() {
          ended();
          pages?.stop();
        },
        recorded: recorded.promise,
      };
    },
  };
}

/** Tells of a start when it is over: the guest is ready, gone, or has had its time. */
export async function watchStart(start: Start, { machine, record, answer }: Vm): Promise<void> {
  const sleepQuietly = (ms: number) => sleep(ms, undefined, { ref: false });
  const ready = () =>
    record.readyText === undefined
      ? sleepQuietly(START_MS_MAX)
      : machine.ready(START_MS_MAX).then(
          () => sleepQuietly(START_TAIL_MS),
          () => undefined,
        );
  void answer?.then(() => start.answered()).catch(() => undefined);
  void machine.ended.then(() => start.gone());
  await Promise.race([record.memory ? sleepQuietly(RESUME_MS) : ready(), machine.ended]);
  start.ended();
}
