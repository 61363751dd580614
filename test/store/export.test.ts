/** Export: the same bytes again, sparse, checked, and whole or not there. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import {
  chmodSync,
  closeSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { KIB, MIB } from '../../src/core/limits.ts';
import { mount, unmount } from '../../src/core/linux.ts';
import { exportImage, importImage, openStore } from '../../src/store/index.ts';
import type { ExportOptions } from '../../src/store/index.ts';
import { makeFixtureStore, randomBuffer, randomNumbers } from '../suites/fixtures.ts';
import { failsWith, newStore, run, testFolder } from './helpers.ts';

const folder = testFolder('export');
const newFolder = () => mkdtempSync(path.join(folder, 'f-'));
const MAIN = path.resolve(import.meta.dirname, '../../src/main.ts');

test('a raw export has every byte again, and holes where the image is zero', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 40 * MIB + 512, seed: 80 });
  const store = await openStore(fixture.storeFolder);
  const place = newFolder();
  const file = path.join(place, 'out.raw');
  const seen: number[] = [];
  const result = await exportImage(store, {
    manifest: fixture.digest,
    path: file,
    onProgress: (done, total, phase) => {
      assert.equal(phase, 'unpack');
      seen.push(done / total);
    },
  });
  assert.ok(readFileSync(file).equals(readFileSync(fixture.rawPath)));
  const { nonzeroBytes } = fixture.manifest;
  assert.deepEqual(
    [result.path, result.sizeBytes, result.nonzeroBytes],
    [file, 40 * MIB + 512, nonzeroBytes],
  );
  assert.ok(statSync(file).blocks * 512 <= nonzeroBytes + 64 * KIB, 'zeros are holes');
  assert.ok(seen.length > 3 && seen.at(-1) === 1);
  assert.deepEqual(readdirSync(place), ['out.raw']);
});

test('a qcow2 export holds the same disk, and imports to the same table', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 6 * MIB, seed: 81, chunkBytes: 64 * KIB });
  const store = await openStore(fixture.storeFolder);
  const place = newFolder();
  const file = path.join(place, 'out.qcow2');
  await exportImage(store, { manifest: fixture.digest, path: file, format: 'qcow2' });
  assert.deepEqual(readdirSync(place), ['out.qcow2']);
  run('qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw', file, fixture.rawPath);
  const again = await importImage(store, { path: file, reference: 'again', chunkBytes: 64 * KIB });
  assert.deepEqual([again.newChunks, again.manifest.table], [0, fixture.manifest.table]);
});

test('an image of zeros, of no bytes and of odd length are exported too', async () => {
  const store = await newStore(folder);
  for (const [i, bytes] of [
    Buffer.alloc(1 * MIB),
    Buffer.alloc(0),
    randomBuffer(() => 7, 12_345),
  ].entries()) {
    const source = path.join(folder, `odd-${i}`);
    writeFileSync(source, bytes);
    const { digest } = await importImage(store, { path: source, reference: `odd:${i}`, kind: 'data' });
    const file = path.join(newFolder(), 'out');
    await exportImage(store, { manifest: digest, path: file });
    assert.ok(readFileSync(file).equals(bytes));
    if (bytes.length % 512 !== 0 || bytes.length === 0) {
      const error = await failsWith(
        exportImage(store, { manifest: digest, path: `${file}2`, format: 'qcow2' }),
        'bad-request',
      );
      assert.match(error.message, /export it as raw/);
    }
  }
});

test('a damaged or missing chunk fails the export, named, and leaves no file', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 20 * MIB, seed: 82 });
  const store = await openStore(fixture.storeFolder);
  const place = newFolder();
  const digest = fixture.table.digestOfEntry(fixture.table.entryCount - 1);
  const victim = store.layout.object('chunks', digest);
  const stored = readFileSync(victim);
  stored[stored.length >> 1]! ^= 0x10;
  chmodSync(victim, 0o644);
  writeFileSync(victim, stored);
  const out = { manifest: fixture.digest, path: path.join(place, 'out.raw') };
  assert.match(
    (await failsWith(exportImage(store, out), 'corrupt')).message,
    new RegExp(digest.slice(0, 12)),
  );
  writeFileSync(victim, Buffer.alloc(1 * MIB));
  assert.match((await failsWith(exportImage(store, out), 'corrupt')).message, new RegExp(digest));
  rmSync(victim);
  assert.match((await failsWith(exportImage(store, out), 'not-found')).message, new RegExp(digest));
  assert.deepEqual(readdirSync(place), []);
});

test('a file that is there is replaced only when asked for, and only by a whole image', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 1 * MIB, seed: 83, chunkBytes: 64 * KIB });
  const store = await openStore(fixture.storeFolder);
  const place = newFolder();
  const file = path.join(place, 'out.raw');
  writeFileSync(file, 'precious');
  const options: ExportOptions = { manifest: fixture.digest, path: file };
  assert.match((await failsWith(exportImage(store, options), 'exists')).message, /--force/);
  await failsWith(exportImage(store, { ...options, force: true, signal: AbortSignal.abort() }), 'closed');
  assert.equal(readFileSync(file, 'utf8'), 'precious');
  await exportImage(store, { ...options, force: true });
  assert.ok(readFileSync(file).equals(readFileSync(fixture.rawPath)));

  // One that comes while the export runs.
  rmSync(file);
  const late = exportImage(store, { ...options, onProgress: () => writeFileSync(file, 'late') });
  await failsWith(late, 'exists');
  assert.equal(readFileSync(file, 'utf8'), 'late');

  mkdirSync(path.join(place, 'folder'));
  for (const [one, code] of [
    [path.join(place, 'folder'), 'bad-request'],
    ['/dev/null', 'bad-request'],
    [path.join(place, 'nowhere', 'out.raw'), 'not-found'],
    [path.join(file, 'out.raw'), 'not-found'],
  ] as const) {
    await failsWith(exportImage(store, { ...options, path: one, force: true }), code);
  }
  await failsWith(exportImage(store, { ...options, manifest: 'ab'.repeat(32), force: true }), 'not-found');
  await failsWith(exportImage(store, { ...options, format: 'vmdk' as 'raw', force: true }), 'bad-request');
  assert.deepEqual(readdirSync(place), ['folder', 'out.raw']);
});

test('an export that is cancelled leaves nothing, whatever the format', async () => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 64 * MIB, seed: 84 });
  const store = await openStore(fixture.storeFolder);
  const place = newFolder();
  for (const format of ['raw', 'qcow2'] as const) {
    for (const phase of ['unpack', 'convert']) {
      if (format === 'raw' && phase === 'convert') continue;
      const abort = new AbortController();
      const error = await failsWith(
        exportImage(store, {
          manifest: fixture.digest,
          path: path.join(place, 'out'),
          format,
          signal: abort.signal,
          onProgress: (_, __, now) => now === phase && abort.abort(),
        }),
        'closed',
      );
      assert.match(error.message, /export to .*out was cancelled/);
      assert.deepEqual(readdirSync(place), []);
    }
  }
});

test('Ctrl-C ends the command with one line and leaves nothing', async () => {
  const store = await newStore(folder);
  const source = path.join(folder, 'large');
  const fd = openSync(source, 'wx');
  ftruncateSync(fd, 256 * MIB);
  closeSync(fd);
  writeFileSync(source, randomBuffer(randomNumbers(85), 96 * MIB), { flag: 'r+' });
  await importImage(store, { path: source, reference: 'large:1' });
  const place = newFolder();
  const child = spawn(
    process.execPath,
    [MAIN, 'store', 'export', store.layout.folder, 'large:1', path.join(place, 'out.raw')],
    { stdio: ['ignore', 'ignore', 'pipe'] },
  );
  let errors = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => (errors += text));
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
  while (readdirSync(place).length === 0 && child.exitCode === null) await sleep(1);
  child.kill('SIGINT');
  assert.equal(await ended, 1);
  assert.match(errors, /was cancelled \[closed\]\n$/);
  assert.deepEqual(readdirSync(place), []);
  assert.ok(existsSync(source));
});

test('a full disk fails the export with no-space and leaves nothing', async (t) => {
  const fixture = await makeFixtureStore(newFolder(), { sizeBytes: 24 * MIB, seed: 86 });
  const store = await openStore(fixture.storeFolder);
  const small = newFolder();
  try {
    mount('gridvfs-test', small, 'tmpfs', 0, 'size=8m');
  } catch {
    t.skip('needs root, to mount a small tmpfs');
    return;
  }
  try {
    const out = { manifest: fixture.digest, path: path.join(small, 'out') };
    assert.match((await failsWith(exportImage(store, out), 'no-space')).message, /out/);
    await failsWith(exportImage(store, { ...out, format: 'qcow2' }), 'no-space');
    assert.deepEqual(readdirSync(small), []);
  } finally {
    unmount(small, 0);
  }
});
