/** Taking a mount down, whichever driver made it: patient with a user who is just leaving, clear about one who stays. */
import { asGridError, errnoOf, GridError } from '../../core/errors.ts';
import { MNT_DETACH, MNT_FORCE } from '../../core/linux.ts';
import { takeDown } from './fusermount.ts';
import type { MountEnd, UnmountOptions } from './mount.ts';
import { findMount, holdersOf, isDead, MOUNT_TYPE, resolveMountpoint } from './mountinfo.ts';

/** How often and how long an unmount waits for a user who is just leaving. */
const BUSY_TRIES = 5;
const BUSY_PAUSE_MS = 40;
/** The threads leave in milliseconds once the mount is gone everywhere. */
const RELEASE_TIMEOUT_MS = 2_000;

/** Detaches the mount with `mountId` at `mountpoint`, unless somebody else did. Throws in-use, with who uses it. */
export async function detachMount(
  mountpoint: string,
  mountId: number,
  options: UnmountOptions,
  isOver: () => boolean,
): Promise<void> {
  const flags = options.force ? MNT_FORCE | MNT_DETACH : options.lazy ? MNT_DETACH : 0;
  for (let attempt = 1; !isOver(); attempt++) {
    const found = await findMount(mountpoint);
    if (!found) return; // somebody else unmounted it
    if (found.id !== mountId) {
      throw new GridError(
        'in-use',
        `another mount (${found.source}) covers ${mountpoint}: unmount that first`,
      );
    }
    try {
      await takeDown(mountpoint, flags);
      return;
    } catch (error) {
      if (errnoOf(error) !== 'EBUSY') throw asGridError(error, `cannot unmount ${mountpoint}`);
      if (attempt >= BUSY_TRIES) {
        const holders = await holdersOf(mountpoint);
        throw new GridError('in-use', `${mountpoint} is in use by ${holders}: end that first`, {
          cause: error,
        });
      }
      await new Promise((resolve) => void setTimeout(resolve, BUSY_PAUSE_MS));
    }
  }
}

/** Waits until a mount that is detached is released everywhere; throws in-use when somebody keeps it. */
export async function released(mountpoint: string, ended: Promise<MountEnd>): Promise<void> {
  let timer;
  const late = new Promise<'late'>((resolve) => {
    timer = setTimeout(() => resolve('late'), RELEASE_TIMEOUT_MS);
  });
  const first = await Promise.race([ended, late]);
  clearTimeout(timer);
  if (first !== 'late') return;
  throw new GridError(
    'in-use',
    `${mountpoint} is unmounted, but somebody or another mount namespace still uses it: it is served until they are gone or this process ends`,
  );
}

/** Detaches gridvfs mounts at `mountpoint` whose daemon died; whether there were any. Leaves living ones alone. */
export async function cleanDeadMount(mountpoint: string): Promise<boolean> {
  const place = await resolveMountpoint(mountpoint);
  let cleaned = false;
  for (;;) {
    const entry = await findMount(place);
    if (entry?.type !== MOUNT_TYPE || !(await isDead(place))) return cleaned;
    try {
      await takeDown(place, MNT_DETACH);
    } catch (error) {
      throw asGridError(error, `cannot detach the dead mount ${place}`);
    }
    cleaned = true;
  }
}

/** Takes a mount of ours down whoever uses it and without asking its daemon, which is gone for good. `place` is
 * resolved. Nothing happens when there is none. */
export async function abandonMount(place: string): Promise<void> {
  if ((await findMount(place))?.type !== MOUNT_TYPE) return;
  try {
    await takeDown(place, MNT_FORCE | MNT_DETACH);
  } catch (error) {
    throw asGridError(error, `cannot unmount ${place}`);
  }
}
