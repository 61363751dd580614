/** The life of a mount of the kernel driver: made, refused, busy, torn down, dead, cleaned; and what it leaves. */
import assert from 'node:assert/strict';
import { execFile, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { GridError } from '../../../src/core/errors.ts';
import { QuietPoints } from '../../../src/core/quiet.ts';
import { DeviceWorkers } from '../../../src/frontend/fuse/device.ts';
import { cleanDeadMount, describeMount, mountTree } from '../../../src/frontend/fuse/index.ts';
import { isOnFuse } from '../../../src/vmm/qemu/page-faults.ts';
import { FileTree } from './file-tree.ts';
import type { FileSpec } from './file-tree.ts';
import { LEAVE_OTHERS_MOUNTS } from '../../scenarios/namespace.ts';
import { MountChild, Place } from './harness.ts';

const run = promisify(execFile);
const errno = (code: string) => (error: NodeJS.ErrnoException) => error.code === code;

const MOUNTS = process.env['GRIDVFS_LONG'] === '1' ? 300 : 20;

describe('a mount of the kernel driver', () => {
  let place: Place;
  let specs: FileSpec[];

  before(() => {
    place = new Place();
    specs = [
      { path: 'images/a/1/disk.raw', source: place.source('a', 2_000_000), kind: 'image', contentId: 'a1' },
      {
        path: 'images/stuck/1/disk.raw',
        source: place.source('stuck', 4 << 20),
        kind: 'cold',
        contentId: 's1',
        stuckFrom: 1 << 20,
      },
    ];
  });
  afterEach(() => place.clean());
  after(() => place.remove());
  const file = (name: string) => path.join(place.mountpoint, name);

  // Fails without `mapped` in mount.ts, and without the timer of readahead.ts.
  test('memory is read page by page where it is opened to be mapped, and with read-ahead otherwise', async () => {
    const memory = 'images/m/1/memory.raw';
    const source = place.source('memory', 4 << 20);
    const spec: FileSpec = {
      path: memory,
      source,
      kind: 'image',
      contentId: 'm1',
      mapsPrivately: true,
      whole: false,
    };
    const child = await MountChild.start(place, { specs: [spec] });
    const requestsOf = async (flags: string, at: number) => {
      const fd = openSync(file(memory), flags);
      const before = (await child.statistics()).directReads;
      for (let page = 0; page < 16; page++) readSync(fd, Buffer.alloc(4096), 0, 4096, at + page * 4096);
      const requests = (await child.statistics()).directReads - before;
      closeSync(fd);
      return requests;
    };
    assert.equal(await requestsOf('r+', 0), 16);
    await setTimeout(100);
    assert.ok((await requestsOf('r', 1 << 20)) < 8);
    await child.run({ do: 'unmount' });
  });

  test(`${MOUNTS} mounts in a row show each its own content and leak no descriptor, thread or image`, async () => {
    const sources = Array.from({ length: MOUNTS }, (_, index) =>
      place.source(`row${index}`, 100_000 + index),
    );
    const specsOf = (index: number): FileSpec[] => [
      { path: 'images/a/1/disk.raw', source: sources[index]!, kind: 'image', contentId: `row${index}` },
    ];
    const child = await MountChild.start(place, { specs: specsOf(0) });
    const seen = [];
    for (let index = 0; index < MOUNTS; index++) {
      if (index > 0) await child.run({ do: 'mount', specs: specsOf(index) });
      await run('cmp', [sources[index]!, file('images/a/1/disk.raw')]);
      await child.run({ do: 'unmount' });
      assert.deepEqual(await child.run({ do: 'ended' }), { reason: 'unmounted' });
      assert.equal(await describeMount(place.mountpoint), undefined);
      const { descriptors, threads, openImages } = await child.statistics();
      assert.equal(openImages, 0);
      seen.push({ descriptors, threads });
    }
    // The first mount also starts what stays: the thread pool, koffi's thread.
    assert.deepEqual(seen.at(-1), seen[2]);
    await child.stop();
  });

  test('unmount of a mount in use says by whom and leaves it as it was, and works afterwards', async () => {
    const child = await MountChild.start(place, { specs });
    const fd = openSync(file('images/a/1/disk.raw'), 'r');
    await assert.rejects(
      child.run({ do: 'unmount' }),
      (error: Error & { code: string }) =>
        error.code === 'in-use' && error.message.includes(`(${process.pid})`),
    );
    assert.equal(readSync(fd, Buffer.alloc(10), 0, 10, 0), 10);
    closeSync(fd);
    await child.stop();
    assert.equal(await describeMount(place.mountpoint), undefined);
  });

  test('a lazy unmount frees the mount point at once and serves who has a file open to the end', async () => {
    const child = await MountChild.start(place, { specs });
    const fd = openSync(file('images/a/1/disk.raw'), 'r');
    await child.run({ do: 'unmount', options: { lazy: true } });
    assert.deepEqual(readdirSync(place.mountpoint), []);
    const bytes = Buffer.alloc(1000);
    readSync(fd, bytes, 0, 1000, 1_500_000);
    assert.ok(bytes.equals(readFileSync(specs[0]!.source).subarray(1_500_000, 1_501_000)));
    closeSync(fd);
    assert.deepEqual(await child.run({ do: 'ended' }), { reason: 'unmounted' });
    await child.stop();
  });

  test('a forced unmount cuts off a reader that waits for bytes that do not come', async () => {
    const child = await MountChild.start(place, { specs });
    const reader = spawn(
      'dd',
      [`if=${file('images/stuck/1/disk.raw')}`, 'of=/dev/null', 'bs=1M', 'skip=2', 'count=1'],
      {
        stdio: 'ignore',
      },
    );
    const exit = once(reader, 'exit');
    await setTimeout(100);
    await child.run({ do: 'unmount', options: { force: true } });
    assert.notEqual((await exit)[0], 0);
    assert.deepEqual(await child.run({ do: 'ended' }), { reason: 'unmounted' });
    await child.stop();
  });

  test('umount by somebody else ends the mount, and a second unmount is no error', async () => {
    const child = await MountChild.start(place, { specs });
    const ended = child.run({ do: 'ended' });
    await run('umount', [place.mountpoint]);
    assert.deepEqual(await ended, { reason: 'unmounted' });
    await child.stop();
  });

  test('an aborted connection is a failed mount and leaves no dead mount behind', async () => {
    const child = await MountChild.start(place, { specs });
    const fd = openSync(file('images/a/1/disk.raw'), 'r');
    // MNT_FORCE on a busy mount: the connection is aborted, the mount stays.
    await assert.rejects(run('umount', ['-f', place.mountpoint]), /busy/);
    const ended = (await child.run({ do: 'ended' })) as { reason: string; code: string };
    assert.equal(ended.reason, 'failed');
    assert.equal(ended.code, 'closed');
    assert.throws(() => readSync(fd, Buffer.alloc(10), 0, 10, 0));
    closeSync(fd);
    assert.equal(await describeMount(place.mountpoint), undefined);
    await child.stop();
  });

  test('kill -9 of the daemon leaves a dead mount that is recognised, refused and cleaned', async () => {
    const child = await MountChild.start(place, { specs });
    assert.equal(await cleanDeadMount(place.mountpoint), false, 'a living mount is left alone');
    await child.kill();
    assert.throws(() => statSync(place.mountpoint), errno('ENOTCONN'));
    const found = await describeMount(place.mountpoint);
    assert.equal(found?.state, 'dead');
    assert.equal(found.type, 'fuse.gridvfs');
    await assert.rejects(MountChild.start(place, { specs }), /already a mount point .*daemon is dead/);
    assert.equal(await cleanDeadMount(place.mountpoint), true);
    assert.equal(await cleanDeadMount(place.mountpoint), false);
    const next = await MountChild.start(place, { specs });
    await run('cmp', [specs[0]!.source, file('images/a/1/disk.raw')]);
    await next.stop();
  });

  test('a process that exits without unmounting ends, and takes its mount along', async () => {
    const child = await MountChild.start(place, { specs });
    const exit = once(child.process, 'exit');
    child.run({ do: 'exit' }).catch(() => undefined);
    assert.deepEqual(await exit, [0, null]);
    assert.equal(await describeMount(place.mountpoint), undefined);
  });

  test('a process with a lazily unmounted mount still in use ends, and the user is cut off', async () => {
    const child = await MountChild.start(place, { specs });
    const fd = openSync(file('images/stuck/1/disk.raw'), 'r');
    await child.run({ do: 'unmount', options: { lazy: true } });
    const exit = once(child.process, 'exit');
    child.run({ do: 'exit' }).catch(() => undefined);
    assert.deepEqual(await Promise.race([exit, setTimeout(3000, 'still there')]), [0, null]);
    assert.throws(() => readSync(fd, Buffer.alloc(10), 0, 10, 0), errno('ENOTCONN'));
    assert.throws(() => closeSync(fd), errno('ENOTCONN'));
  });

  test('an unmount says when another mount namespace still has the mount, and the process can end all the same', async () => {
    const child = await MountChild.start(place, { specs });
    const script = `${LEAVE_OTHERS_MOUNTS}; exec sleep 60`;
    const other = spawn('unshare', ['-m', '--propagation', 'private', 'sh', '-c', script, place.mountpoint], {
      stdio: 'ignore',
    });
    const exits = Promise.all([once(child.process, 'exit'), once(other, 'exit')]);
    for (let waitedMs = 0; readFileSync(`/proc/${other.pid}/comm`, 'utf8') !== 'sleep\n'; waitedMs += 10) {
      assert.ok(waitedMs < 10_000 && other.exitCode === null, 'no mount namespace can be made here');
      await setTimeout(10);
    }
    await assert.rejects(child.run({ do: 'unmount' }), /another mount namespace/);
    child.run({ do: 'exit' }).catch(() => undefined);
    await setTimeout(1000);
    other.kill('SIGKILL');
    assert.deepEqual((await exits)[0], [0, null]);
  });

  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    test(`a reader with O_DIRECT that waits for bytes that do not come ends on ${signal}`, async () => {
      const child = await MountChild.start(place, { specs });
      const reader = spawn(
        'dd',
        [
          `if=${file('images/stuck/1/disk.raw')}`,
          'of=/dev/null',
          'bs=1M',
          'skip=2',
          'count=1',
          'iflag=direct',
        ],
        { stdio: 'ignore' },
      );
      const exit = once(reader, 'exit');
      await setTimeout(150);
      // A signal that does not kill must not fail the read.
      process.kill(reader.pid!, 'SIGUSR1');
      await setTimeout(150);
      assert.equal(reader.exitCode, null);
      process.kill(reader.pid!, signal);
      assert.deepEqual(await Promise.race([exit, setTimeout(3000, 'still there')]), [null, signal]);
      assert.ok((await child.statistics()).interrupted >= 1);
      // The late bytes go nowhere, and the mount is as good as before.
      await child.run({ do: 'release' });
      await run('cmp', [specs[1]!.source, file('images/stuck/1/disk.raw')]);
      await child.stop();
    });
  }

  // Its read is begun and not waited for: a process that ends waits for it all the same (exit_aio, fs/aio.c).
  test('a QEMU that reads with libaio can be killed while its bytes do not come', async () => {
    const child = await MountChild.start(place, { specs });
    const stuck = file('images/stuck/1/disk.raw');
    const args = ['-r', '-f', 'raw', '-t', 'none', '-n', '-c', 'aio_read 2M 64k', '-c', 'aio_flush', stuck];
    const reader = spawn('qemu-io', args, { stdio: 'ignore' });
    const exit = once(reader, 'exit');
    await setTimeout(500);
    assert.equal(reader.exitCode, null);
    process.kill(reader.pid!, 'SIGKILL');
    assert.deepEqual(await Promise.race([exit, setTimeout(3000, 'still there')]), [null, 'SIGKILL']);
    await child.stop();
  });

  // A daemon that resumes machines from its own mount must not wait for itself: hangs with statfs(2) in isOnFuse.
  test('whether a file is on it is known without asking it', async () => {
    const child = await MountChild.start(place, { specs });
    child.process.kill('SIGSTOP');
    try {
      const stuck = isOnFuse(file('images/stuck/1/disk.raw'));
      assert.equal(await Promise.race([stuck, setTimeout(3000, 'it was asked')]), true);
      assert.equal(await isOnFuse(path.dirname(place.mountpoint)), false);
    } finally {
      child.process.kill('SIGCONT');
    }
    await child.stop();
  });

  test('a buffered reader that waits for bytes that do not come can be killed', async () => {
    const child = await MountChild.start(place, { specs });
    const reader = spawn('cat', [file('images/stuck/1/disk.raw')], { stdio: 'ignore' });
    const exit = once(reader, 'exit');
    await setTimeout(150);
    process.kill(reader.pid!, 'SIGKILL');
    assert.deepEqual(await Promise.race([exit, setTimeout(3000, 'still there')]), [null, 'SIGKILL']);
    await child.stop();
  });

  test('reads of what is here go on while others wait for what is not', async () => {
    const child = await MountChild.start(place, { specs });
    const readers = Array.from({ length: 8 }, (_, index) =>
      spawn(
        'dd',
        [
          `if=${file('images/stuck/1/disk.raw')}`,
          'of=/dev/null',
          'bs=64k',
          `skip=${20 + index}`,
          'count=1',
          'iflag=direct',
        ],
        { stdio: 'ignore' },
      ),
    );
    const exits = Promise.all(readers.map((reader) => once(reader, 'exit')));
    await setTimeout(200);
    execFileSync('cmp', [specs[0]!.source, file('images/a/1/disk.raw')], { timeout: 5000 });
    await child.run({ do: 'release' });
    assert.deepEqual(
      await exits,
      readers.map(() => [0, null]),
    );
    await child.stop();
  });

  // Guards `enter` and `leave` in worker.ts: the second mount's file lies on the first, where its bytes do not come.
  test('a worker that is inside a file holds quiet points back until it is out again', async () => {
    const lower = await MountChild.start(place, { specs });
    const upper = new Place();
    const image: FileSpec = {
      path: 'images/on-stuck/1/disk.raw',
      source: file('images/stuck/1/disk.raw'),
      kind: 'image',
      contentId: 'on-stuck',
    };
    try {
      const child = await MountChild.start(upper, { specs: [image] });
      assert.equal(await child.run({ do: 'quiet', withinMs: 1000 }), 'quiet');
      const reader = spawn(
        'dd',
        [`if=${path.join(upper.mountpoint, image.path)}`, 'of=/dev/null', 'bs=64k', 'skip=30', 'count=1'],
        { stdio: 'ignore' },
      );
      const exit = once(reader, 'exit');
      await setTimeout(200);
      assert.equal(await child.run({ do: 'quiet', withinMs: 200 }), 'busy');
      await lower.run({ do: 'release' });
      assert.deepEqual(await exit, [0, null]);
      assert.equal(await child.run({ do: 'quiet', withinMs: 1000 }), 'quiet');
      await child.stop();
    } finally {
      await upper.remove();
    }
    await lower.stop();
  });

  test('a tag that moves shows its new content within two seconds, and open files keep the old one', async () => {
    const child = await MountChild.start(place, { specs });
    const moved = place.source('moved', 1_234_567);
    const fd = openSync(file('images/a/1/disk.raw'), 'r');
    const before = statSync(file('images/a/1/disk.raw')).ino;
    await child.run({
      do: 'specs',
      specs: [{ path: 'images/a/1/disk.raw', source: moved, kind: 'image', contentId: 'a2' }],
    });
    await setTimeout(1500);
    await run('cmp', [moved, file('images/a/1/disk.raw')]);
    assert.equal(statSync(file('images/a/1/disk.raw')).size, 1_234_567);
    assert.notEqual(statSync(file('images/a/1/disk.raw')).ino, before);
    const bytes = Buffer.alloc(1000);
    readSync(fd, bytes, 0, 1000, 1_999_000);
    assert.ok(bytes.equals(readFileSync(specs[0]!.source).subarray(1_999_000, 2_000_000)));
    assert.throws(() => statSync(file('images/stuck/1/disk.raw')), errno('ENOENT'));
    closeSync(fd);
    await child.stop();
  });

  test('a worker that fails is reported, and its threads and descriptors go', async () => {
    const workers = await DeviceWorkers.start(1, new QuietPoints(), () => undefined);
    const failed = Promise.withResolvers<GridError>();
    // Reading a folder throws where the device would wait.
    workers.serve(openSync(place.folder, 'r'), undefined, () => assert.fail('no request'), failed.resolve);
    const failure = await failed.promise;
    assert.equal(failure.code, 'bug');
    assert.match(failure.message, /EISDIR/);
    await workers.gone;
    workers.closeDescriptors();
  });

  test('options out of range are refused before anything is mounted', async () => {
    for (const options of [{ workers: 0 }, { workers: 1.5 }, { workers: 1000 }, { readaheadBytes: -1 }]) {
      await assert.rejects(
        mountTree(new FileTree(specs, place.scratch), place.mountpoint, { fsName: 'test', ...options }),
        (error: GridError) => error.code === 'bad-request',
      );
    }
    assert.equal(await describeMount(place.mountpoint), undefined);
  });

  test('other users read images and not clones, and nothing when allowOther is off', async () => {
    const clone: FileSpec = {
      path: 'clones/c/disk.raw',
      source: specs[0]!.source,
      kind: 'clone',
      contentId: 'c',
    };
    chmodSync(place.folder, 0o755);
    const nobody = { uid: 65534, gid: 65534, cwd: '/' };
    const child = await MountChild.start(place, { specs: [specs[0]!, clone] });
    await run('dd', [`if=${file('images/a/1/disk.raw')}`, 'of=/dev/null'], nobody);
    await assert.rejects(run('dd', [`if=${file(clone.path)}`, 'of=/dev/null'], nobody), /Permission denied/);
    await child.stop();
    const next = await MountChild.start(place, { specs, options: { allowOther: false } });
    await assert.rejects(run('ls', [place.mountpoint], nobody), /Permission denied/);
    await next.stop();
    const owned = await MountChild.start(place, { specs: [clone], options: { uid: 65534, gid: 65534 } });
    await run('dd', [`if=${file(clone.path)}`, 'of=/dev/null'], nobody);
    await owned.stop();
  });

  test('a read-only mount writes nowhere, not even to a clone', async () => {
    const clone: FileSpec = {
      path: 'clones/c/disk.raw',
      source: specs[0]!.source,
      kind: 'clone',
      contentId: 'c',
    };
    const child = await MountChild.start(place, { specs: [clone], options: { readOnly: true } });
    assert.throws(() => openSync(file(clone.path), 'r+'), errno('EROFS'));
    await run('cmp', [clone.source, file(clone.path)]);
    await child.stop();
  });

  test('what cannot be a mount point is refused with its reason, and nothing is left', async () => {
    const plain = path.join(place.folder, 'plain-file');
    writeFileSync(plain, '');
    const full = path.join(place.folder, 'full');
    mkdirSync(path.join(full, 'something'), { recursive: true });
    const refused = async (mountpoint: string, code: string, message: RegExp) => {
      await assert.rejects(
        mountTree(new FileTree(specs, place.scratch), mountpoint, { fsName: 'test' }),
        (error: Error & { code: string }) => error.code === code && message.test(error.message),
      );
    };
    await refused(path.join(place.folder, 'missing'), 'not-found', /missing/);
    await refused(plain, 'bad-request', /not a folder/);
    await refused(full, 'in-use', /not empty/);
    const child = await MountChild.start(place, { specs });
    await refused(place.mountpoint, 'in-use', /already a mount point/);
    await run('cmp', [specs[0]!.source, file('images/a/1/disk.raw')]);
    await child.stop();
  });
});
