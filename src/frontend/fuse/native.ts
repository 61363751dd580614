/**
 * The portable driver: the tree through the package fuse-native (libfuse 2). Everything runs in the main thread, one
 * request after the other as the package hands them over. For hosts where the kernel driver cannot work.
 *
 * What it cannot do, and what it says then: requests over 128 KiB (the kernel splits them), passthrough, surviving its
 * process, punching holes and zeroing ranges (EOPNOTSUPP), ending a killed reader that waits for bytes (it ends when
 * they come). libfuse 2 knows files by path alone, so two contents at one path would share the kernel's pages: while a
 * file is open its path keeps the content it had at the first open, and a moved tag is seen after the last close.
 * Pages are not kept across opens.
 */
import { createRequire } from 'node:module';
import { constants } from 'node:os';
import { DirectFile } from '../../core/direct-io.ts';
import { asGridError, GridError } from '../../core/errors.ts';
import type { Image, ImageTree, TreeEntry } from '../../core/image.ts';
import { isRoot, MNT_DETACH, MNT_FORCE } from '../../core/linux.ts';
import { OperationTimes } from './operation-times.ts';
import type { FuseMount, MountEnd, MountOptions, MountStatistics, UnmountOptions } from './mount.ts';
import { takeDownNow } from './fusermount.ts';
import { detachMount, released } from './unmount.ts';
import { checkMountpoint, findMount, findMountSync } from './mountinfo.ts';
import { inoOf, keyOf } from './nodes.ts';
import { errnoNumberOf, errnoOfContent, modeOf, Refusal } from './protocol.ts';
import type { Owner } from './protocol.ts';

/** What of fuse-native is used. */
interface NativeFuse {
  mount(tell: (error: Error | null) => void): void;
  unmount(tell: (error: Error | null) => void): void;
}

type Done = (status: number, ...results: unknown[]) => void;

interface NativeModule {
  new (mountpoint: string, operations: Record<string, unknown>, options: object): NativeFuse;
  unmount: (mountpoint: string, tell: (error: Error | null) => void) => void;
}

let loaded: NativeModule | undefined;

/** Throws unsupported, with what to install. */
export function loadFuseNative(): NativeModule {
  if (loaded) return loaded;
  try {
    loaded = createRequire(import.meta.url)('fuse-native') as NativeModule;
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message.split('\n')[0] : String(cause);
    throw new GridError(
      'unsupported',
      `the fuse-native driver cannot be loaded (${reason}): it needs the npm package fuse-native and libfuse.so.2 (apt-get install libfuse2)`,
      { cause },
    );
  }
  // Its own way is `fusermount -uz`; we have unmounted by the time we tell it.
  loaded.unmount = (_mountpoint, tell) => tell(null);
  return loaded;
}

/** Under which name the time of an operation is counted; the rest is 'other'. */
const COUNTED_AS: Readonly<Record<string, string>> = {
  getattr: 'getattr',
  fgetattr: 'getattr',
  readdir: 'readdir',
  statfs: 'statfs',
  open: 'open',
  read: 'read',
  write: 'write',
  fsync: 'fsync',
};

/** An image behind all opens of one path. */
interface OpenFile {
  readonly entry: Extract<TreeEntry, { type: 'file' }>;
  readonly image: Image;
  readonly file: DirectFile | undefined;
  users: number;
}

/** The operations, named and called as fuse-native does: the last argument is told a status and the results. */
class Operations {
  readonly #tree: ImageTree;
  readonly #owner: Owner;
  readonly #readOnly: boolean;
  readonly #log: (message: string) => void;
  /** By path: opening, open, or closing. */
  readonly #open = new Map<string, { opened: Promise<OpenFile>; closed?: Promise<void> }>();
  readonly #files = new Map<number, { path: string; file: OpenFile }>();
  #nextHandle = 1;
  readonly counts = { reads: 0, readBytes: 0, writes: 0, failures: 0, inFlight: 0 };
  readonly times = new OperationTimes();

  constructor(tree: ImageTree, owner: Owner, readOnly: boolean, log: (message: string) => void) {
    this.#tree = tree;
    this.#owner = owner;
    this.#readOnly = readOnly;
    this.#log = log;
  }

  get openFiles(): number {
    return this.#files.size;
  }

  table(): Record<string, unknown> {
    const refuse = (errno: 'EROFS' | 'EPERM') => (tell: Done) => tell(-constants.errno[errno]);
    const readOnly = (...args: unknown[]) => refuse('EROFS')(args.at(-1) as Done);
    const names = ['mknod', 'create', 'unlink', 'rename', 'link', 'symlink', 'mkdir', 'rmdir'];
    const operations: Record<string, (...args: never[]) => void> = {
      ...Object.fromEntries([...names, 'setxattr', 'removexattr'].map((name) => [name, readOnly])),
      getattr: this.#answering(async (path: string) => this.#attributes(path, await this.#entry(path))),
      fgetattr: this.#answering(async (path: string, handle: number) => {
        return this.#attributes(path, this.#files.get(handle)?.file.entry ?? (await this.#entry(path)));
      }),
      readdir: this.#answering(async (path: string) => {
        const entries = await this.#tree.list(namesOf(path));
        return ['.', '..', ...entries.map(({ name }) => name)];
      }),
      statfs: this.#answering(() => this.#space()),
      open: this.#answering((path: string, flags: number) => this.#openFile(path, flags)),
      release: this.#answering(async (_path: string, handle: number) => this.#release(handle)),
      read: this.#read.bind(this),
      write: this.#write.bind(this),
      fsync: this.#answering(async (_path: string, _dataOnly: number, handle: number) => {
        const { image } = this.#of(handle);
        if (image.writable) await image.flush();
      }, errnoOfContent),
      truncate: this.#answering((path: string, sizeBytes: number) => this.#truncate(path, sizeBytes)),
      ftruncate: this.#answering((path: string, _handle: number, sizeBytes: number) =>
        this.#truncate(path, sizeBytes),
      ),
      chmod: this.#answering((path: string) => this.#refuseChange(path)),
      chown: this.#answering((path: string) => this.#refuseChange(path)),
      utimens: this.#answering((path: string) => this.#refuseChange(path)),
    };
    return Object.fromEntries(
      Object.entries(operations).map(([name, operation]) => [name, this.#timed(name, operation)]),
    );
  }

  /** The operation, with the time until it is answered counted. */
  #timed(name: string, operation: (...args: never[]) => void) {
    const counted = COUNTED_AS[name] ?? 'other';
    return (...args: unknown[]) => {
      const tell = args.at(-1) as Done;
      const startedMs = performance.now();
      this.counts.inFlight++;
      args[args.length - 1] = (...results: Parameters<Done>) => {
        this.counts.inFlight--;
        this.times.countNamed(counted, performance.now() - startedMs);
        tell(...results);
      };
      operation(...(args as never[]));
    };
  }

  /** An operation whose result is told as (0, result), and whose failure as its errno. */
  #answering<A extends unknown[]>(operation: (...args: A) => Promise<unknown>, numberOf = errnoNumberOf) {
    return (...args: [...A, Done]) => {
      const tell = args.at(-1) as Done;
      operation(...(args.slice(0, -1) as A)).then(
        (result) => tell(0, result),
        (error: unknown) => tell(-this.#errno(error, numberOf)),
      );
    };
  }

  #errno(error: unknown, numberOf = errnoNumberOf): number {
    if (!(error instanceof Refusal)) {
      this.counts.failures++;
      this.#log(`a request failed: ${error instanceof Error ? error.message : String(error)}`);
    }
    return numberOf(error);
  }

  /** What the path is: while it is open what it was at its first open. */
  async #entry(path: string): Promise<TreeEntry> {
    const open = await this.#open.get(path)?.opened.catch(() => undefined);
    const entry = open?.entry ?? (await this.#tree.lookup(namesOf(path)));
    if (!entry) throw new Refusal('ENOENT');
    return entry;
  }

  #attributes(path: string, entry: TreeEntry) {
    const sizeBytes = entry.type === 'file' ? entry.sizeBytes : 0;
    const time = new Date(Math.max(0, entry.modifiedMs));
    return {
      mode: modeOf(entry),
      ...this.#owner,
      size: sizeBytes,
      nlink: entry.type === 'directory' ? 2 : 1,
      ino: inoOf(keyOf(namesOf(path), entry)) % 2 ** 32,
      blksize: 4096,
      blocks: Math.ceil(sizeBytes / 512),
      atime: time,
      mtime: time,
      ctime: time,
    };
  }

  /** Its numbers have 32 bits: blocks of a MiB. */
  async #space() {
    const { totalBytes, freeBytes } = await this.#tree.space();
    const [blocks, free] = [totalBytes, freeBytes].map((bytes) => Math.floor(bytes / 2 ** 20));
    return { bsize: 2 ** 20, frsize: 2 ** 20, blocks, bfree: free, bavail: free, namemax: 255 };
  }

  async #openFile(path: string, flags: number): Promise<number> {
    for (;;) {
      let share = this.#open.get(path);
      if (share?.closed) {
        await share.closed;
        continue;
      }
      if (!share) {
        const mine = { opened: this.#openImage(path) };
        share = mine;
        this.#open.set(path, mine);
        mine.opened.catch(() => {
          if (this.#open.get(path) === mine) this.#open.delete(path);
        });
      }
      const file = await share.opened;
      if (share.closed) continue;
      file.users++;
      const writes = (flags & (O_ACCMODE | O_TRUNC)) !== 0;
      if (writes && !file.image.writable && !file.entry.mapsPrivately) {
        this.#letGo(path, file);
        throw new Refusal('EROFS');
      }
      const handle = this.#nextHandle++;
      this.#files.set(handle, { path, file });
      return handle;
    }
  }

  async #openImage(path: string): Promise<OpenFile> {
    const names = namesOf(path);
    const entry = await this.#tree.lookup(names);
    if (!entry) throw new Refusal('ENOENT');
    if (entry.type !== 'file') throw new Refusal('EISDIR');
    const image = await this.#tree.open(names, { write: entry.writable && !this.#readOnly });
    try {
      const now = await this.#tree.lookup(names);
      if (now?.type !== 'file' || now.contentId !== entry.contentId || image.sizeBytes !== entry.sizeBytes)
        throw new Refusal('ESTALE');
      return { entry, image, file: image.direct && new DirectFile(image.direct), users: 0 };
    } catch (error) {
      await image.close();
      throw error;
    }
  }

  #of(handle: number): OpenFile {
    const open = this.#files.get(handle);
    if (!open) throw new Refusal('EBADF');
    return open.file;
  }

  #release(handle: number): void {
    const open = this.#files.get(handle);
    if (!open) throw new Refusal('EBADF');
    this.#files.delete(handle);
    this.#letGo(open.path, open.file);
  }

  #letGo(path: string, file: OpenFile): void {
    const share = this.#open.get(path);
    if (--file.users > 0 || !share || share.closed) return;
    share.closed = file.image
      .close()
      .catch((error: unknown) => this.#log(`closing an image failed: ${String(error)}`))
      .finally(() => this.#open.delete(path));
  }

  /** No await where the bytes are here: half of a request's time is the way through the event loop. */
  #read(_path: string, handle: number, buffer: Buffer, wanted: number, offset: number, tell: Done): void {
    try {
      const { image, file } = this.#of(handle);
      const lengthBytes = Math.max(0, Math.min(wanted, image.sizeBytes - offset));
      const target = buffer.subarray(0, lengthBytes);
      this.counts.reads++;
      this.counts.readBytes += lengthBytes;
      image.usage?.countRead(lengthBytes);
      if (lengthBytes === 0 || readDirectly(file, target, offset)) {
        tell(lengthBytes);
        return;
      }
      image.read(target, offset).then(
        () => tell(lengthBytes),
        (error: unknown) => tell(-this.#errno(error, errnoOfContent)),
      );
    } catch (error) {
      tell(-this.#errno(error, errnoOfContent));
    }
  }

  #write(_path: string, handle: number, buffer: Buffer, wanted: number, offset: number, tell: Done): void {
    try {
      const { image, file } = this.#of(handle);
      const lengthBytes = Math.min(wanted, image.sizeBytes - offset);
      if (lengthBytes <= 0 && wanted > 0) throw new Refusal('EFBIG');
      const source = buffer.subarray(0, lengthBytes);
      this.counts.writes++;
      image.usage?.countWrite(lengthBytes);
      if (file?.map.layer && file.write(source, offset)) {
        tell(lengthBytes);
        return;
      }
      image.write(source, offset).then(
        () => tell(lengthBytes),
        (error: unknown) => tell(-this.#errno(error, errnoOfContent)),
      );
    } catch (error) {
      tell(-this.#errno(error, errnoOfContent));
    }
  }

  async #truncate(path: string, sizeBytes: number): Promise<void> {
    const entry = await this.#entry(path);
    if (entry.type === 'file' && entry.writable && !this.#readOnly && sizeBytes === entry.sizeBytes) return;
    await this.#refuseChange(path);
  }

  async #refuseChange(path: string): Promise<void> {
    const entry = await this.#entry(path);
    throw new Refusal(entry.type === 'file' && entry.writable && !this.#readOnly ? 'EPERM' : 'EROFS');
  }

  /** When no request can come any more. */
  async close(): Promise<void> {
    this.#files.clear();
    for (const [path, share] of this.#open) {
      const file = await share.opened.catch(() => undefined);
      if (!file) continue;
      file.users = 1;
      this.#letGo(path, file);
      await share.closed;
    }
  }
}

const O_ACCMODE = 3;
const O_TRUNC = 0o1000;

function readDirectly(file: DirectFile | undefined, target: Buffer, offsetBytes: number): boolean {
  try {
    return file?.read(target, offsetBytes) ?? false;
  } catch {
    return false; // a bad spot of the disk: the image may know another way to these bytes
  }
}

/** Throws ENAMETOOLONG; libfuse has resolved `.` and `..`. */
function namesOf(path: string): string[] {
  const names = path.split('/').filter((name) => name !== '');
  if (names.some((name) => Buffer.byteLength(name) > 255)) throw new Refusal('ENAMETOOLONG');
  return names;
}

/** The package frees nothing of a mount whose thread may still be ending: kept for the life of the process. */
const kept: NativeFuse[] = [];
const living = new Set<NativeMount>();
process.on('exit', () => {
  for (const mount of living) mount.abandon();
});

/** How often a mount is looked for that somebody else may have unmounted. */
const WATCH_MS = 200;

/** As `mountTree`, for this driver. */
export async function mountNative(
  tree: ImageTree,
  mountpoint: string,
  options: MountOptions,
): Promise<FuseMount> {
  const Fuse = loadFuseNative();
  const place = await checkMountpoint(mountpoint);
  const root = await tree.lookup([]);
  if (root?.type !== 'directory') throw new GridError('bug', 'the root of a tree is not a directory');
  const log = options.log ?? (() => undefined);
  const owner = { uid: options.uid ?? process.getuid!(), gid: options.gid ?? process.getgid!() };
  const operations = new Operations(tree, owner, options.readOnly ?? false, log);
  const fuse = new Fuse(place, operations.table(), {
    // A read may have to wait for a tunnel as long as that takes; its own bound is there.
    timeout: false,
    defaultPermissions: true,
    allowOther: options.allowOther ?? isRoot(),
    fsname: options.fsName.replaceAll(/[\\,]/g, String.raw`\$&`),
    // The package knows no names for the others: they travel behind this one.
    subtype: `gridvfs${options.readOnly ? ',ro' : ''},nosuid,nodev,big_writes,max_write=131072`,
    attrTimeout: '1',
    entryTimeout: '1',
  });
  kept.push(fuse);
  try {
    await new Promise<void>((resolve, reject) => {
      fuse.mount((error) => (error ? reject(error) : resolve()));
    });
  } catch (error) {
    throw asGridError(error, `cannot mount at ${place} through libfuse`);
  }
  const entry = await findMount(place);
  if (!entry) throw new GridError('local-io', `the mount at ${place} vanished while it was made`);
  return new NativeMount(place, entry.id, fuse, operations);
}

class NativeMount implements FuseMount {
  readonly mountpoint: string;
  readonly outlivesProcess = false;
  readonly ended: Promise<MountEnd>;
  readonly #mountId: number;
  readonly #operations: Operations;
  #over = false;

  constructor(mountpoint: string, mountId: number, fuse: NativeFuse, operations: Operations) {
    this.mountpoint = mountpoint;
    this.#mountId = mountId;
    this.#operations = operations;
    living.add(this);
    const gone = Promise.withResolvers<void>();
    const timer = setInterval(() => {
      void findMount(mountpoint).then((found) => {
        if (found?.id !== mountId) gone.resolve();
      });
    }, WATCH_MS);
    this.ended = gone.promise.then(async () => {
      clearInterval(timer);
      this.#over = true;
      living.delete(this);
      // libfuse's thread sees the end of the device by itself; this lets go of the event loop.
      await new Promise<void>((resolve) => fuse.unmount(() => resolve()));
      await operations.close();
      return { reason: 'unmounted' };
    });
  }

  async unmount(options: UnmountOptions = {}): Promise<void> {
    await detachMount(this.mountpoint, this.#mountId, options, () => this.#over);
    if (!options.lazy || options.force) await released(this.mountpoint, this.ended);
  }

  abandon(): void {
    try {
      if (findMountSync(this.mountpoint)?.id === this.#mountId)
        takeDownNow(this.mountpoint, MNT_FORCE | MNT_DETACH);
    } catch {
      // Somebody else was faster.
    }
  }

  statistics(): MountStatistics {
    const { reads, readBytes, writes, failures, inFlight } = this.#operations.counts;
    return {
      directReads: 0,
      directReadBytes: 0,
      directWrites: 0,
      directWriteBytes: 0,
      forwarded: reads + writes,
      indirectReads: reads,
      indirectReadBytes: readBytes,
      indirectWrites: writes,
      failures,
      interrupted: 0,
      inFlight,
      operations: this.#operations.times.figures(),
      passthroughOpens: 0,
      openFiles: this.#operations.openFiles,
      nodes: 0,
    };
  }
}
