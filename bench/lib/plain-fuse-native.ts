/**
 * What a user of the package fuse-native writes after its README: one file, read with fs.read. bench/fuse.ts measures
 * it beside our own driver over that package. Arguments: mount point, raw file. Prints one JSON line when it is
 * mounted; SIGTERM unmounts.
 */
import { fstatSync, openSync, read } from 'node:fs';
import { constants } from 'node:os';
import { loadFuseNative } from '../../src/frontend/fuse/native.ts';
import { MNT_DETACH, MNT_FORCE, unmountInBackground } from '../../src/core/linux.ts';

type Tell = (status: number, ...results: unknown[]) => void;

const [mountpoint, file] = process.argv.slice(2) as [string, string];
const fd = openSync(file, 'r');
const { size } = fstatSync(fd);
const time = new Date(0);
const attributes = (mode: number, bytes: number) => ({
  ...{ mode, size: bytes, mtime: time, atime: time, ctime: time },
  ...{ nlink: 1, uid: process.getuid!(), gid: process.getgid!() },
});
const Fuse = loadFuseNative();
const fuse = new Fuse(
  mountpoint,
  {
    readdir: (_path: string, tell: Tell) => tell(0, ['image']),
    getattr: (path: string, tell: Tell) => {
      if (path === '/') tell(0, attributes(0o040_755, 4096));
      else if (path === '/image') tell(0, attributes(0o100_444, size));
      else tell(-constants.errno.ENOENT);
    },
    open: (_path: string, _flags: number, tell: Tell) => tell(0, 42),
    release: (_path: string, _handle: number, tell: Tell) => tell(0),
    read: (
      ...[_path, _handle, target, lengthBytes, offsetBytes, tell]: [
        string,
        number,
        Buffer,
        number,
        number,
        (bytes: number) => void,
      ]
    ) => {
      read(fd, target, 0, lengthBytes, offsetBytes, (error, bytes) => tell(error ? -5 : bytes));
    },
  },
  {},
);
process.on('SIGTERM', () => {
  unmountInBackground(mountpoint, MNT_FORCE | MNT_DETACH).then(
    () => process.exit(0),
    () => process.exit(1),
  );
});
fuse.mount((error) => {
  if (error) throw error;
  console.log(JSON.stringify({ mounted: mountpoint }));
});
