/**
 * Memory that was freed goes back to the system. glibc keeps it, in an arena for each of many threads, of which it only
 * ever gives back the end (malloc(3), mallopt(3)): a proxy that published a checkpoint of 512 MB kept 850 MB for good, of
 * which 500 MB were nobody's. malloc_trim(3) gives back what is free in between too. It took 55 ms for those, of a thread of
 * its own; an arena is locked while it is looked through.
 */
import { trimMemory } from './linux.ts';

const LOOK_MS = 5_000;
/** To look through less is not worth while. */
const EXCESS_BYTES = 96 * 1024 * 1024;
/** What is in use is not given back: it is tried again ever later, until something has changed. */
const LOOKS_MAX = 64;
const CHANGE_BYTES = 16 * 1024 * 1024;

/** Looks every few seconds whether there is much more than there was at the least, until what is returned is called. Keeps
 * no process alive. */
export function giveBackMemory(lookMs = LOOK_MS): () => void {
  let leastBytes = process.memoryUsage.rss();
  let lastBytes = 0;
  let looks = 0;
  let pause = 1;
  let trimming = false;
  const look = async () => {
    const bytes = process.memoryUsage.rss();
    leastBytes = Math.min(leastBytes, bytes);
    if (trimming || bytes < leastBytes + EXCESS_BYTES) return;
    if (Math.abs(bytes - lastBytes) > CHANGE_BYTES) pause = 1;
    if (++looks < pause) return;
    looks = 0;
    trimming = true;
    await trimMemory();
    trimming = false;
    lastBytes = process.memoryUsage.rss();
    pause = lastBytes > bytes - CHANGE_BYTES ? Math.min(2 * pause, LOOKS_MAX) : 1;
  };
  const timer = setInterval(() => void look(), lookMs).unref();
  return () => clearInterval(timer);
}
