/**
 * Chunks are memory outside of V8's heap, and V8 collects the whole heap for every 64 MiB of it that come and go: some
 * 190 times while an image of 390 MiB comes over six times, 28 s of processor time. Counted with the heap, as this flag
 * has it, the same is 50 collections and 20 s, with no more memory at its peak (335 MB).
 */
import { setFlagsFromString } from 'node:v8';

/** Node's major version that the flag was tried with: another one may not know it and would say so on stderr. */
const NODE_MAJOR = '26';

/** To be called once, early; threads that are started later have it too. */
export function collectLess(): void {
  if (process.versions.node.split('.')[0] === NODE_MAJOR)
    setFlagsFromString('--external-memory-accounted-in-global-limit');
}
