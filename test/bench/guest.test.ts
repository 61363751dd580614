/** The guest builder: reuse, refusal, interruption, and the formats it writes itself. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { buildGuest, guestCacheFolder, type BuiltGuest } from '../../bench/guest/build.ts';
import { cpioArchive, moduleChain } from '../../bench/guest/initramfs.ts';
import { measure } from '../../bench/guest/host.ts';
import { failsWith } from '../suites/vmm.ts';

const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-guest-'));
after(() => rmSync(temporary, { recursive: true, force: true }));

const BUILD = path.resolve('bench/guest/build.ts');
const cached = () => buildGuest({ guest: 'small', folder: path.join(guestCacheFolder(), 'small') });

test('a finished guest is what its guest.json says, with a clean file system', async () => {
  const guest = await cached();
  const disk = await measure(guest.disk);
  assert.deepEqual(disk, {
    sha256: guest.sha256.disk,
    sizeBytes: guest.sizeBytes,
    nonzeroBytes: guest.nonzeroBytes,
  });
  assert.equal((await measure(guest.kernel)).sha256, guest.sha256.kernel);
  assert.equal((await measure(guest.initrd)).sha256, guest.sha256.initrd);
  assert.ok(Object.keys(guest.packages).some((name) => name.startsWith('linux-image-')));
  execFileSync('/usr/sbin/e2fsck', ['-fn', guest.disk], { stdio: 'ignore' });
  const features = execFileSync('/usr/sbin/dumpe2fs', ['-h', guest.disk], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  assert.match(features.toString(), /features:.*has_journal/);
});

test('the same recipe builds the same bytes, and two builders of one folder build it once', async () => {
  const guest = await cached();
  const folder = path.join(temporary, 'twice');
  mkdirSync(path.join(temporary, '.twice.making-left by a killed builder'));
  const lines: string[] = [];
  const options = { guest: 'small' as const, folder, progress: (line: string) => lines.push(line) };
  const both = await Promise.all([buildGuest(options), buildGuest(options)]);
  assert.deepEqual(both.map((each) => each.result).toSorted(), ['built', 'reused']);
  assert.equal(lines.filter((line) => /making the disk/.test(line)).length, 1);
  for (const each of both) {
    // Another kernel may have come into the archive since the cached one was built.
    if (JSON.stringify(each.packages) === JSON.stringify(guest.packages)) {
      assert.deepEqual(each.sha256, guest.sha256);
    }
  }
  assert.deepEqual(readdirSync(folder).toSorted(), ['disk.raw', 'guest.json', 'initrd', 'kernel']);
  assert.deepEqual(readdirSync(temporary), ['twice'], 'no lock, no temporary folder');
});

test('a guest of another recipe is built anew, and one whose disk is cut short too', async () => {
  const guest = await cached();
  const folder = path.join(temporary, 'old');
  cpSync(guest.folder, folder, { recursive: true });
  assert.equal((await buildGuest({ guest: 'small', folder })).result, 'reused');
  writeFileSync(path.join(folder, 'disk.raw'), 'short');
  const aborter = new AbortController();
  // It is enough to see that it would build; the building itself is tested above.
  const building = buildGuest({
    guest: 'small',
    folder,
    signal: aborter.signal,
    progress: () => aborter.abort(),
  });
  await assert.rejects(building, failsWith('closed', /cancelled/));
  assert.equal(readFileSync(path.join(folder, 'disk.raw'), 'utf8'), 'short', 'replaced only by a whole one');
  assert.deepEqual(
    readdirSync(temporary).filter((name) => name.startsWith('.')),
    [],
  );
});

test('a folder that holds something else is refused and left alone', async () => {
  const folder = path.join(temporary, 'home');
  mkdirSync(folder);
  writeFileSync(path.join(folder, 'thesis.txt'), 'precious');
  await assert.rejects(buildGuest({ guest: 'small', folder }), failsWith('exists', /is no guest/));
  assert.deepEqual(readdirSync(folder), ['thesis.txt']);
});

test('a builder that is interrupted leaves nothing', async () => {
  const parent = path.join(temporary, 'interrupted');
  mkdirSync(parent);
  const child = spawn(process.execPath, [BUILD, '--out', path.join(parent, 'small')], {
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  await once(child.stderr, 'data');
  child.kill('SIGINT');
  const [code] = (await once(child, 'exit')) as [number];
  assert.equal(code, 1);
  assert.deepEqual(readdirSync(parent), []);
});

test('the command answers with JSON, and a mistake in its arguments with exit code 2', async () => {
  const guest = await cached();
  const json = execFileSync(process.execPath, [BUILD, '--guest', 'small', '--json'], { stdio: 'pipe' });
  const told = JSON.parse(json.toString()) as BuiltGuest;
  assert.equal(told.result, 'reused');
  assert.deepEqual(told.sha256, guest.sha256);
  for (const args of [['--guest', 'windows'], ['--nonsense']]) {
    const child = spawn(process.execPath, [BUILD, ...args], { stdio: 'ignore' });
    assert.deepEqual((await once(child, 'exit'))[0], 2);
  }
});

test('an archive of ours is unpacked by cpio as it was meant', () => {
  const folder = path.join(temporary, 'cpio');
  mkdirSync(folder);
  const archive = cpioArchive([
    { path: 'bin', mode: 0o040755, data: Buffer.alloc(0) },
    { path: 'bin/tool', mode: 0o100755, data: Buffer.from('#!/bin/sh\necho works\n') },
    { path: 'bin/link', mode: 0o120777, data: Buffer.from('tool') },
    { path: 'empty', mode: 0o100644, data: Buffer.alloc(0) },
  ]);
  const busybox = ['cpio', '-i', '-d', '--quiet'];
  execFileSync('busybox', busybox, { cwd: folder, input: archive });
  assert.equal(execFileSync(path.join(folder, 'bin/link')).toString(), 'works\n');
  assert.deepEqual(readdirSync(folder).toSorted(), ['bin', 'empty']);
});

test('modules come after what they depend on, once, and those built in are left out', () => {
  const folder = path.join(temporary, 'modules');
  mkdirSync(path.join(folder, 'kernel'), { recursive: true });
  const module = (name: string, depends: string) =>
    writeFileSync(
      path.join(folder, 'kernel', `${name}.ko`),
      `ELF\0license=GPL\0depends=${depends}\0name=${name}\0`,
    );
  module('virtio_ring', '');
  module('virtio', 'virtio_ring');
  module('virtio-rng', 'virtio,virtio_ring');
  module('virtio_blk', 'virtio,virtio_ring');
  const names = moduleChain(folder, ['virtio_blk', 'virtio_rng', 'ext4']).map((file) => path.basename(file));
  assert.deepEqual(names, ['virtio_ring.ko', 'virtio.ko', 'virtio_blk.ko', 'virtio-rng.ko']);
});
