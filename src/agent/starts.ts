/**
 * Starts of machines as the cache learns from them: what earlier starts of an image touched is fetched before it is
 * asked for, and what this one touches is recorded for the next.
 */
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import type { Profile, Purpose } from '../core/profile.ts';

/** What the machines tell. */
export interface Starts {
  /** A machine is about to open these images; the ones it needs first come first. */
  begin(manifests: readonly Digest[], purpose: Purpose): Start;
}

export interface Start {
  /** The guest is ready, or gone. Idempotent. */
  ended(): void;
}

/** What a cache does for it. */
export interface StartCache {
  prefetchProfile(manifest: Digest, purpose: Purpose): Promise<number>;
  startRecording(manifest: Digest, purpose: Purpose): { finish(): Promise<Profile | undefined> };
}

export function createStarts(cache: StartCache, log: (line: string) => void): Starts {
  const failed = (what: string, manifest: Digest) => (error: unknown) => {
    if (error instanceof GridError && error.code === 'closed') return;
    log(`${what} of ${manifest.slice(0, 12)}: ${error instanceof Error ? error.message : String(error)}`);
  };
  return {
    begin(manifests, purpose) {
      const recordings = manifests.map((manifest) => cache.startRecording(manifest, purpose));
      for (const manifest of manifests) {
        cache.prefetchProfile(manifest, purpose).then(
          (chunks) => {
            if (chunks > 0)
              log(`profile '${purpose}' of ${manifest.slice(0, 12)}: ${chunks} chunks fetched ahead`);
          },
          failed('replay of the profile', manifest),
        );
      }
      return {
        ended() {
          for (const [at, recording] of recordings.splice(0).entries()) {
            recording.finish().catch(failed('recording', manifests[at]!));
          }
        },
      };
    },
  };
}
