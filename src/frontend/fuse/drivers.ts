/** The two drivers behind one call. */
import type { ImageTree } from '../../core/image.ts';
import { mountKernel } from './mount.ts';
import type { FuseMount, MountOptions } from './mount.ts';
import { mountNative } from './native.ts';

/** `kernel` speaks to /dev/fuse itself; `fuse-native` goes through libfuse 2 (native.ts says what it cannot do). */
export const DRIVERS = ['kernel', 'fuse-native'] as const;
export type Driver = (typeof DRIVERS)[number];

/**
 * Mounts `tree` at `mountpoint`, an empty folder. Throws unsupported (no /dev/fuse, not root, old kernel, no libfuse),
 * not-found, bad-request, in-use; then nothing is mounted and nothing runs.
 */
export function mountTree(
  tree: ImageTree,
  mountpoint: string,
  options: MountOptions & { readonly driver?: Driver },
): Promise<FuseMount> {
  return options.driver === 'fuse-native'
    ? mountNative(tree, mountpoint, options)
    : mountKernel(tree, mountpoint, options);
}
