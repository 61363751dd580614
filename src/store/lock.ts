/**
 * The store's lock: short critical sections (move a tag, start or end a writer) between processes and within one.
 * flock(2) has no wait with a bound, so it is tried again until it is free or the bound is over.
 */
import { close, open } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { tryLock } from '../core/linux.ts';
import type { StoreLayout } from './layout.ts';

const openFile = promisify(open);
const closeFile = promisify(close);

/** Sections last milliseconds; only a garbage collection would hold the lock for longer. */
const LOCK_TIMEOUT_MS = 60_000;
const LOCK_RETRY_MS = 15;

/** Runs `section` while this caller alone holds the store's lock. Throws in-use when it stays held. */
export async function withStoreLock<Result>(
  layout: StoreLayout,
  section: () => Result | Promise<Result>,
): Promise<Result> {
  const fd = await openLock(layout);
  try {
    const deadline = performance.now() + LOCK_TIMEOUT_MS;
    while (!tryLock(fd)) {
      if (performance.now() > deadline) {
        throw new GridError(
          'in-use',
          `the store ${layout.folder} is locked by another gridvfs for over ${LOCK_TIMEOUT_MS / 1000} s; ` +
            `see who holds ${layout.lock} (lsof) and try again`,
        );
      }
      await sleep(LOCK_RETRY_MS);
    }
    return await section();
  } finally {
    await closeFile(fd);
  }
}

async function openLock(layout: StoreLayout): Promise<number> {
  try {
    return await openFile(layout.lock, 'a');
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'EACCES' || errno === 'EROFS' || errno === 'EPERM') {
      throw new GridError('local-io', `this user may not change the store ${layout.folder} (${errno})`, {
        cause: error,
      });
    }
    throw asGridError(error, `cannot lock the store ${layout.folder}`);
  }
}
