/** A bound on waiting. */
import { setTimeout as sleep } from 'node:timers/promises';

/** Node's timers count in 31 bits and fire at once beyond. */
const TIMER_MS_MAX = 2 ** 31 - 1;

/** What the promise resolves with, or undefined when it takes longer; no timer is left either way. */
export async function within<T>(timeoutMs: number, promise: Promise<T>): Promise<T | undefined> {
  const timer = new AbortController();
  const late = sleep(Math.min(timeoutMs, TIMER_MS_MAX), undefined, { signal: timer.signal });
  try {
    return await Promise.race([promise, late.catch(() => undefined)]);
  } finally {
    timer.abort();
  }
}
