/** Shows an ImageTree as a FUSE mount: by speaking to /dev/fuse itself (Linux 5.4 or later), or through fuse-native. */
export { DRIVERS, mountTree } from './drivers.ts';
export type { Driver } from './drivers.ts';
export { prepareThreads, READAHEAD_BYTES_DEFAULT, WORKERS_DEFAULT } from './mount.ts';
export type {
  FuseMount,
  HeldDevices,
  MountEnd,
  MountOptions,
  MountStatistics,
  UnmountOptions,
} from './mount.ts';
export { checkMountpoint, describeMount, resolveMountpoint } from './mountinfo.ts';
export type { MountDescription } from './mountinfo.ts';
export { loadFuseNative } from './native.ts';
export { abandonMount, cleanDeadMount } from './unmount.ts';
