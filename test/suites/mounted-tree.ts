/**
 * What every mount of a tree must do, whichever driver makes it and whatever gives the images: run for each. All
 * file operations are made by this process and by real tools, the mount is another process's.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import {
  closeSync,
  constants,
  ftruncateSync,
  linkSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmdirSync,
  statfsSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  chmodSync,
  chownSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { open } from 'node:fs/promises';
import { constants as osConstants } from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { fsx, randomFrom } from './fsx.ts';
import { dropPages, fallocate, withMapping } from './mapped-file.ts';

const run = promisify(execFile);

/** A file in the mount and a plain copy of what it holds at first. */
export interface MountedFile {
  /** From the mount point, e.g. images/debian/12/disk.raw */
  readonly path: string;
  readonly reference: string;
}

export interface MountedTree {
  readonly mountpoint: string;
  /** Read-only, all of it on this host. */
  readonly image: MountedFile;
  /** Read-only, nothing of it on this host yet; it comes slowly. */
  readonly cold: MountedFile;
  /** Read-only; what lies beyond its first MiB is at no source any more. */
  readonly gone: MountedFile;
  /** Writable, at least 4 MiB. */
  readonly clone: MountedFile;
  /** Whether ranges of a clone can be punched and zeroed; where not, both are EOPNOTSUPP. */
  readonly trims: boolean;
  /** How often an image was opened at its source since the start; undefined where nobody counts. */
  opens?(): Promise<number>;
  close(): Promise<void>;
}

const SEED = Number(process.env['GRIDVFS_SEED'] ?? Date.now() % 1_000_000);

const LONG = process.env['GRIDVFS_LONG'] === '1';
const LONG_RUNS = [SEED, 1, 2, 3].map((seed) => ({ seed, operations: 200_000 }));

export function mountedTreeSuite(name: string, start: () => Promise<MountedTree>): void {
  describe(`a mounted tree (${name})`, () => {
    let tree: MountedTree;
    let close: (() => Promise<void>) | undefined;
    const at = (file: MountedFile) => path.join(tree.mountpoint, file.path);
    const errno = (code: string) => (error: NodeJS.ErrnoException) => error.code === code;

    before(async () => {
      tree = await start();
      close = () => tree.close();
    });
    after(() => close?.());

    test('an image that is all here compares equal to its source', async () => {
      await run('cmp', [tree.image.reference, at(tree.image)]);
    });

    test('50 first opens of a cold image at once open it once, and 50 programs that read it get its bytes', async () => {
      const before = await tree.opens?.();
      const handles = await Promise.all(Array.from({ length: 50 }, () => open(at(tree.cold))));
      const opened = await tree.opens?.();
      if (before !== undefined && opened !== undefined) assert.equal(opened - before, 1);
      await Promise.all(handles.map(() => run('cmp', [tree.cold.reference, at(tree.cold)])));
      for (const handle of handles) await handle.close();
    });

    // Without errnoOfContent in calls.ts and native.ts it is ENOENT.
    test('bytes that no source has any more are EIO to who reads them, as on a disk, and the others stay', () => {
      const fd = openSync(at(tree.gone), 'r');
      try {
        assert.throws(() => readSync(fd, Buffer.alloc(4096), 0, 4096, 2 << 20), errno('EIO'));
        const [bytes, expected] = [Buffer.alloc(4096), readFileSync(tree.gone.reference)];
        assert.equal(readSync(fd, bytes, 0, 4096, 8192), 4096);
        assert.ok(bytes.equals(expected.subarray(8192, 8192 + 4096)));
        assert.throws(() => readSync(fd, bytes, 0, 4096, 2 << 20), errno('EIO'), 'again');
      } finally {
        closeSync(fd);
      }
    });

    test(`1,000 random reads equal the source, buffered and O_DIRECT (seed ${SEED})`, () => {
      const random = randomFrom(SEED);
      const reference = readFileSync(tree.image.reference);
      const buffered = openSync(at(tree.image), 'r');
      const direct = openSync(at(tree.image), constants.O_RDONLY | constants.O_DIRECT);
      try {
        for (let i = 0; i < 1000; i++) {
          const offset = random(reference.length);
          const length = 1 + random(i % 10 === 0 ? 2 << 20 : 64 << 10);
          const bytes = Buffer.alloc(length);
          const got = readSync(i % 2 === 0 ? buffered : direct, bytes, 0, length, offset);
          const expected = reference.subarray(offset, offset + length);
          assert.equal(got, expected.length, `length at ${offset}`);
          assert.ok(bytes.subarray(0, got).equals(expected), `bytes at ${offset} + ${length}`);
          if (i % 100 === 99) dropPages(buffered);
        }
        assert.equal(readSync(buffered, Buffer.alloc(10), 0, 10, reference.length + 5), 0, 'beyond the end');
      } finally {
        closeSync(buffered);
        closeSync(direct);
      }
    });

    test('a mapped image reads like the file, shared and private, and private writes stay private', () => {
      const reference = readFileSync(tree.image.reference);
      const length = Math.min(reference.length - 8192, 1 << 20);
      const expected = reference.subarray(8192, 8192 + length);
      withMapping(at(tree.image), 'shared-read', 8192, length, (mapping) => {
        assert.ok(mapping.read(0, length).equals(expected));
      });
      withMapping(at(tree.image), 'private', 8192, length, (mapping) => {
        mapping.write(100, Buffer.from('private'));
        assert.equal(mapping.read(100, 7).toString(), 'private');
        assert.ok(mapping.read(4096, length - 4096).equals(expected.subarray(4096)));
      });
      withMapping(at(tree.image), 'shared-read', 8192, length, (mapping) => {
        assert.ok(mapping.read(0, length).equals(expected));
      });
    });

    test('stat, findmnt and df say what the files and the mount are', async () => {
      const stat = statSync(at(tree.image));
      assert.equal(stat.size, statSync(tree.image.reference).size);
      assert.equal(stat.mode & 0o777, 0o444);
      assert.equal(statSync(at(tree.clone)).mode & 0o777, 0o600);
      assert.ok(statSync(path.dirname(at(tree.image))).isDirectory());
      const { stdout } = await run('findmnt', ['-n', '-o', 'FSTYPE,OPTIONS', tree.mountpoint]);
      assert.match(stdout, /^fuse\.gridvfs .*nosuid,nodev/);
      const space = statfsSync(tree.mountpoint);
      assert.ok(space.blocks * space.bsize > 0 && space.bfree <= space.blocks);
      await run('df', [tree.mountpoint]);
    });

    test('folders list their names once each, and inode numbers agree with stat', () => {
      const parts = tree.image.path.split('/');
      for (let depth = 0; depth < parts.length; depth++) {
        const folder = path.join(tree.mountpoint, ...parts.slice(0, depth));
        const names = readdirSync(folder);
        assert.ok(names.includes(parts[depth]!));
        assert.equal(new Set(names).size, names.length);
      }
      assert.equal(statSync(at(tree.image)).ino, statSync(at(tree.image)).ino);
      assert.notEqual(statSync(at(tree.image)).ino, statSync(at(tree.clone)).ino);
    });

    test('no path leaves the mount, and names that are not there do not exist', () => {
      for (const name of ['..', '../..', 'images/../..']) {
        assert.ok(!readdirSync(path.join(tree.mountpoint, 'images')).includes(name));
      }
      assert.equal(
        statSync(`${tree.mountpoint}/images/../images`).ino,
        statSync(`${tree.mountpoint}/images`).ino,
      );
      for (const name of ['etc', 'images/etc/passwd', `images/${'x'.repeat(200)}`, 'images/\u{1f4be}']) {
        assert.throws(() => statSync(path.join(tree.mountpoint, name)), errno('ENOENT'), name);
      }
      assert.throws(() => statSync(`${tree.mountpoint}/${'x'.repeat(256)}`), errno('ENAMETOOLONG'));
      assert.throws(() => statSync(Buffer.from(`${tree.mountpoint}/\xff\xfe`, 'latin1')), errno('ENOENT'));
      assert.throws(() => statSync(`${at(tree.image)}/below`), errno('ENOTDIR'));
    });

    test('every call that would change a name is refused with EROFS, as root too', async () => {
      const root = tree.mountpoint;
      const folder = path.join(root, 'images');
      const clone = at(tree.clone);
      const outside = path.join(path.dirname(tree.image.reference), 'outside');
      writeFileSync(outside, '');
      const calls: [string, () => unknown][] = [
        ['create', () => openSync(path.join(folder, 'new'), 'w')],
        ['create exclusively', () => openSync(path.join(folder, 'new'), 'wx')],
        ['mkdir', () => mkdirSync(path.join(folder, 'new'))],
        ['unlink', () => unlinkSync(at(tree.image))],
        ['unlink a clone', () => unlinkSync(clone)],
        ['rmdir', () => rmdirSync(path.dirname(clone))],
        ['rename', () => renameSync(at(tree.image), path.join(folder, 'new'))],
        ['link', () => linkSync(at(tree.image), path.join(folder, 'new'))],
        ['symlink', () => symlinkSync('/etc/passwd', path.join(folder, 'new'))],
        ['open for writing', () => openSync(at(tree.image), 'r+')],
        ['open and truncate', () => openSync(at(tree.image), 'w')],
        ['truncate', () => truncateSync(at(tree.image), 0)],
        ['chmod', () => chmodSync(at(tree.image), 0o777)],
        ['utimes', () => utimesSync(at(tree.image), 1, 1)],
        ['chmod of a folder', () => chmodSync(folder, 0o777)],
        ['chown', () => chownSync(at(tree.image), 12, 34)],
        ['chown of a folder', () => chownSync(folder, 12, 34)],
        ['utimes of a folder', () => utimesSync(folder, 1, 1)],
        ['rename of a folder', () => renameSync(folder, path.join(root, 'new'))],
        ['rename of a clone over an image', () => renameSync(clone, at(tree.image))],
        ['rename of a folder of a clone', () => renameSync(path.dirname(clone), path.join(root, 'new'))],
        ['link of a clone', () => linkSync(clone, path.join(folder, 'new'))],
        ['symlink in the root', () => symlinkSync('..', path.join(root, 'new'))],
        ['mkdir beside a clone', () => mkdirSync(`${path.dirname(clone)}/new`)],
        ['append', () => openSync(at(tree.image), 'a')],
      ];
      for (const [what, call] of calls) assert.throws(call, errno('EROFS'), what);
      for (const [tool, ...rest] of [
        ['mknod', path.join(folder, 'new'), 'p'],
        ['mv', '-T', outside, path.join(folder, 'new')],
        ['setfattr', '-n', 'user.x', '-v', '1', at(tree.image)],
        ['setfattr', '-x', 'user.x', at(tree.image)],
      ] as const) {
        const failed = await run(tool, rest, { env: { ...process.env, LC_ALL: 'C' } }).then(
          () => 'it worked',
          (error: unknown) => (error as Error).message,
        );
        if (failed.includes('ENOENT')) continue; // setfattr is not everywhere
        assert.match(failed, /Read-only file system/, tool);
      }
      unlinkSync(outside);
      assert.ok(!readdirSync(folder).includes('new'));
    });

    test('a clone keeps its size: truncation is EPERM, a write beyond the end EFBIG, preallocation not supported', async () => {
      const clone = at(tree.clone);
      const { size } = statSync(clone);
      assert.throws(() => openSync(clone, 'w'), errno('EPERM'));
      await assert.rejects(run('sh', ['-c', `cat /dev/null > '${clone}'`]), /Operation not permitted/);
      assert.throws(() => truncateSync(clone, 0), errno('EPERM'));
      assert.throws(() => truncateSync(clone, size + 1), errno('EPERM'));
      assert.throws(() => chmodSync(clone, 0o777), errno('EPERM'));
      assert.throws(() => utimesSync(clone, 1, 1), errno('EPERM'));
      const fd = openSync(clone, 'r+');
      try {
        ftruncateSync(fd, size);
        assert.throws(() => writeSync(fd, Buffer.alloc(10), 0, 10, size), errno('EFBIG'));
        // Across the end, as on a disk: what fits is written.
        const tail = Buffer.alloc(10);
        readSync(fd, tail, 0, 5, size - 5);
        assert.equal(writeSync(fd, tail, 0, 10, size - 5), 5);
      } finally {
        closeSync(fd);
      }
      await assert.rejects(run('fallocate', ['-l', '8192', clone]), /not supported/);
      assert.equal(statSync(clone).size, size);
      await run('cmp', [tree.clone.reference, clone]);
    });

    test('dd writes with O_DIRECT and reads back with O_DIRECT what it wrote', async () => {
      const clone = at(tree.clone);
      const source = path.join(path.dirname(tree.clone.reference), 'dd-source');
      const back = path.join(path.dirname(tree.clone.reference), 'dd-back');
      writeFileSync(source, Buffer.alloc(1 << 20, 'dd with oflag=direct\n'));
      await run('dd', [`if=${source}`, `of=${clone}`, 'bs=256k', 'seek=4', 'conv=notrunc', 'oflag=direct']);
      await run('dd', [`if=${clone}`, `of=${back}`, 'bs=256k', 'skip=4', 'count=4', 'iflag=direct']);
      await run('cmp', [source, back]);
      // The clone holds that from here on; the reference follows.
      await run('dd', [`if=${source}`, `of=${tree.clone.reference}`, 'bs=256k', 'seek=4', 'conv=notrunc']);
      await run('cmp', [tree.clone.reference, clone]);
      unlinkSync(source);
      unlinkSync(back);
    });

    test('fallocate punches holes and zeroes ranges of any alignment, or says that it cannot', async () => {
      const clone = at(tree.clone);
      if (!tree.trims) {
        const fd = openSync(clone, 'r+');
        for (const mode of [3, 16, 17]) {
          assert.equal(fallocate(fd, mode, 8192, 4096), osConstants.errno.EOPNOTSUPP);
        }
        closeSync(fd);
        await run('cmp', [tree.clone.reference, clone]);
        return;
      }
      const ranges: [string, number, number][] = [
        ['-p', 5000, 20_000],
        ['-p', 8192, 4096],
        ['-z', 100_001, 50_000],
        ['-p', 70_000, 10],
      ];
      for (const [flag, offset, length] of ranges) {
        await run('fallocate', [flag, '-o', `${offset}`, '-l', `${length}`, clone]);
        const fd = openSync(tree.clone.reference, 'r+');
        writeSync(fd, Buffer.alloc(length), 0, length, offset);
        closeSync(fd);
        await run('cmp', [tree.clone.reference, clone]);
      }
    });

    for (const direct of [false, true]) {
      const how = direct ? 'with O_DIRECT' : 'buffered';
      test(`four writers at once, ${how}, that share blocks do not lose each other's bytes (seed ${SEED})`, async () => {
        await writersAgree(at(tree.clone), tree.clone.reference, direct, SEED);
        await run('cmp', [tree.clone.reference, at(tree.clone)]);
      });
    }

    const runs = LONG ? LONG_RUNS : [{ seed: SEED, operations: 5_000 }];
    for (const { seed, operations } of runs) {
      test(`${operations} random operations of every kind agree with a model (seed ${seed})`, async () => {
        fsx(at(tree.clone), tree.clone.reference, { seed, operations, trims: tree.trims });
        await run('cmp', [tree.clone.reference, at(tree.clone)]);
      });
    }
  });
}

/** Writers at once, each in its own stripe; stripes meet in the middle of blocks, so two writers share a block. */
async function writersAgree(file: string, reference: string, direct: boolean, seed: number): Promise<void> {
  const model = readFileSync(reference);
  const stripe = 40_961;
  const writers = 4;
  const write = async (writer: number): Promise<void> => {
    const random = randomFrom(seed + writer);
    const handle = await open(file, constants.O_RDWR | (direct ? constants.O_DIRECT : 0));
    try {
      for (let step = 0; step < 100; step++) {
        const offset = (random(5) * writers + writer) * stripe + random(3) * 13_000;
        const length = 1 + random(stripe - 26_000);
        const note = `seed ${seed}, writer ${writer}, step ${step} at ${offset} + ${length}`;
        if (random(3) > 0) {
          const bytes = Buffer.alloc(length, `${writer}-${random(1_000_000)} `);
          assert.equal((await handle.write(bytes, 0, length, offset)).bytesWritten, length, note);
          bytes.copy(model, offset);
        } else {
          const { buffer } = await handle.read(Buffer.alloc(length), 0, length, offset);
          assert.ok(buffer.equals(model.subarray(offset, offset + length)), note);
        }
        if (random(20) === 0) await handle.sync();
      }
    } finally {
      await handle.close();
    }
  };
  await Promise.all(Array.from({ length: writers }, (_, writer) => write(writer)));
  writeFileSync(reference, model);
}
