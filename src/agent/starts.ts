/**
 * Starts of machines as the cache learns from them: what earlier starts of an image touched is fetched before it is
 * asked for, and what this one touches is recorded for the next. Of memory that a machine goes on in, what is known to be
 * needed is brought into the kernel's pages as well (pages-ahead.ts); where nothing is known and nothing recorded, all
 * of it that is here.
 */
import type { ByteRange, Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import type { Profile, Purpose } from '../core/profile.ts';
import { readPagesAhead } from './pages-ahead.ts';
import type { PagesAhead } from './pages-ahead.ts';

/** What the machines tell. */
export interface Starts {
  /** A machine is about to open these images; the ones it needs first come first. `memoryFile`: on the mount, what it
   * goes on in, whose bytes are the first image's unless it has written them. */
  begin(manifests: readonly Digest[], purpose: Purpose, memoryFile?: string): Start;
}

export interface Start {
  /** The guest is ready. Idempotent. */
  ended(): void;
  /** The machine is gone, or never was: as `ended`, and nothing is read for it any more. Idempotent. */
  gone(): void;
}

/** What a cache does for it. */
export interface StartCache {
  prefetchProfile(
    manifest: Digest,
    purpose: Purpose,
    options: { here?: (range: ByteRange) => void },
  ): Promise<number>;
  startRecording(manifest: Digest, purpose: Purpose): { finish(): Promise<Profile | undefined> };
  presentRanges(manifest: Digest): Promise<ByteRange[]>;
}

/** `profiles`: whether starts are recorded, and what earlier ones touched is fetched ahead. */
export function createStarts(cache: StartCache, profiles: boolean, log: (line: string) => void): Starts {
  const failed = (what: string, manifest: Digest) => (error: unknown) => {
    if (error instanceof GridError && error.code === 'closed') return;
    log(`${what} of ${manifest.slice(0, 12)}: ${error instanceof Error ? error.message : String(error)}`);
  };
  const replay = async (manifest: Digest, purpose: Purpose, pages: PagesAhead | undefined) => {
    const chunks = await cache.prefetchProfile(manifest, purpose, pages ? { here: pages.here } : {});
    if (chunks > 0) log(`profile '${purpose}' of ${manifest.slice(0, 12)}: ${chunks} chunks fetched ahead`);
  };
  return {
    begin(manifests, purpose, memoryFile) {
      const pages = memoryFile === undefined ? undefined : readPagesAhead(memoryFile);
      const recordings = profiles ? manifests.map((one) => cache.startRecording(one, purpose)) : [];
      for (const [at, manifest] of manifests.entries()) {
        const mine = at === 0 ? pages : undefined;
        let work: Promise<void> | undefined;
        if (profiles) work = replay(manifest, purpose, mine);
        else if (mine) work = cache.presentRanges(manifest).then((ranges) => ranges.forEach(mine.here));
        void work?.catch(failed('replay of the profile', manifest)).finally(() => mine?.finish());
      }
      const ended = () => {
        for (const [at, recording] of recordings.splice(0).entries()) {
          recording.finish().catch(failed('recording', manifests[at]!));
        }
      };
      return {
        ended,
        gone() {
          ended();
          pages?.stop();
        },
      };
    },
  };
}
