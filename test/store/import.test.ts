/** Import of raw files: every byte back, nothing twice, nothing half-made. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import {
  appendFileSync,
  closeSync,
  copyFileSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { KIB, MIB } from '../../src/core/limits.ts';
import { parseManifest } from '../../src/core/manifest.ts';
import type { ManifestKind } from '../../src/core/manifest.ts';
import { importImage, openStore, verifyStore } from '../../src/store/index.ts';
import type { ImportOptions } from '../../src/store/index.ts';
import { randomBuffer, randomNumbers, writeRandomImage } from '../suites/fixtures.ts';
import { assertNothingTemporary, failsWith, filesOf, newStore, readBack, testFolder } from './helpers.ts';

const folder = testFolder('import');
let files = 0;
const newFile = () => path.join(folder, `file-${files++}`);

function rawFile(bytes: Uint8Array): string {
  const file = newFile();
  writeFileSync(file, bytes);
  return file;
}

test('a raw disk comes back as it was, through threads', async () => {
  const store = await newStore(folder);
  const file = newFile();
  writeRandomImage(file, 40 * MIB + 512, 1);
  const seen: number[] = [];
  const result = await importImage(store, {
    path: file,
    reference: 'debian:12',
    labels: { os: 'debian', kernel: '6.1' },
    onProgress: (done, total, phase) => {
      assert.equal(phase, 'pack');
      assert.ok(done <= total);
      seen.push(done / total);
    },
  });
  assert.ok((await readBack(store, result.digest)).equals(readFileSync(file)));
  assert.equal(result.sizeBytes, 40 * MIB + 512);
  assert.equal(result.manifest.kind, 'disk');
  assert.deepEqual(result.manifest.labels, { os: 'debian', kernel: '6.1' });
  assert.deepEqual(await store.resolve('debian:12'), result.tag);
  assert.equal(result.tag.manifest, result.digest);
  assert.ok(seen.length > 3 && seen.at(-1) === 1 && seen.every((one, i) => i === 0 || one >= seen[i - 1]!));
  assertNothingTemporary(store);
  const verified = await verifyStore(store);
  assert.deepEqual([verified.damaged, verified.missing, verified.unreferencedChunks], [[], [], 0]);
});

test('any file, in chunks of any size, comes back as it was', async () => {
  const store = await newStore(folder);
  const piece = fc.record({
    kind: fc.constantFrom('hole', 'zeros', 'random', 'same'),
    length: fc.integer({ min: 1, max: 30_000 }),
  });
  await fc.assert(
    fc.asyncProperty(
      fc.array(piece, { maxLength: 12 }),
      fc.integer({ min: 1, max: 4 }),
      fc.integer(),
      async (pieces, chunkPages, seed) => {
        const next = randomNumbers(seed);
        const file = newFile();
        const fd = openSync(file, 'wx');
        let at = 0;
        for (const { kind, length } of pieces) {
          if (kind === 'zeros') writeSync(fd, Buffer.alloc(length), 0, length, at);
          if (kind === 'random') writeSync(fd, randomBuffer(next, length), 0, length, at);
          if (kind === 'same') writeSync(fd, Buffer.alloc(length, 7), 0, length, at);
          at += length;
        }
        ftruncateSync(fd, at);
        closeSync(fd);
        const { digest, nonzeroBytes, manifest } = await importImage(store, {
          path: file,
          reference: 'any',
          kind: 'data',
          format: 'raw',
          chunkBytes: chunkPages * 4096,
        });
        const plain = readFileSync(file);
        assert.ok((await readBack(store, digest)).equals(plain));
        let nonzero = 0;
        for (let from = 0; from < plain.length; from += manifest.chunkBytes) {
          const chunk = plain.subarray(from, from + manifest.chunkBytes);
          if (chunk.some((byte) => byte !== 0)) nonzero += chunk.length;
        }
        assert.equal(nonzeroBytes, nonzero);
        assert.equal(manifest.nonzeroBytes, nonzero);
      },
    ),
    { numRuns: 60 },
  );
  assertNothingTemporary(store);
});

test('a sparse file of 100 GiB is imported without reading its holes', async () => {
  const store = await newStore(folder);
  const file = newFile();
  const fd = openSync(file, 'wx');
  ftruncateSync(fd, 100 * 1024 * MIB);
  writeSync(fd, Buffer.from('boot'), 0, 4, 0);
  writeSync(fd, Buffer.from('end'), 0, 3, 100 * 1024 * MIB - 3);
  closeSync(fd);
  const start = performance.now();
  const result = await importImage(store, { path: file, reference: 'sparse:1' });
  // Reading 100 GiB of zeros takes longer on any machine that this runs on.
  assert.ok(performance.now() - start < 10_000, `${performance.now() - start} ms`);
  assert.equal(result.chunks, 2);
  assert.equal(result.sizeBytes, 100 * 1024 * MIB);
});

test('an image of nothing but zeros stores no chunk', async () => {
  const store = await newStore(folder);
  const result = await importImage(store, { path: rawFile(Buffer.alloc(3 * MIB)), reference: 'zeros' });
  assert.deepEqual([result.chunks, result.newChunks, result.nonzeroBytes], [0, 0, 0]);
  assert.ok((await readBack(store, result.digest)).equals(Buffer.alloc(3 * MIB)));
});

test('an image that is already there stores no chunk again, a changed one only what changed', async () => {
  const store = await newStore(folder);
  const file = newFile();
  writeRandomImage(file, 24 * MIB, 2);
  const first = await importImage(store, { path: file, reference: 'a:1' });
  assert.ok(first.newChunks > 20);
  const again = await importImage(store, { path: file, reference: 'a:2' });
  assert.deepEqual([again.chunks, again.newChunks, again.newStoredBytes], [first.chunks, 0, 0]);
  assert.equal(again.manifest.table, first.manifest.table);

  const changed = newFile();
  copyFileSync(file, changed);
  const fd = openSync(changed, 'r+');
  writeSync(fd, randomBuffer(randomNumbers(3), 600 * KIB), 0, 600 * KIB, 5 * MIB);
  closeSync(fd);
  const third = await importImage(store, { path: changed, reference: 'a:3', parent: first.digest });
  assert.equal(third.newChunks, 3);
  assert.equal(third.manifest.parent, first.digest);
  assert.ok((await readBack(store, third.digest)).equals(readFileSync(changed)));
  const { images, chunks } = await store.statistics();
  assert.equal(images.length, 3);
  assert.ok(chunks <= images[0]!.chunks + 3);
});

test('parts become manifests of their own, also when two are the same file', async () => {
  const store = await newStore(folder);
  const kernel = rawFile(randomBuffer(randomNumbers(4), 300_001));
  const disk = newFile();
  writeRandomImage(disk, 2 * MIB, 5);
  const result = await importImage(store, {
    path: disk,
    reference: 'guest',
    parts: [
      { name: 'kernel', kind: 'kernel', path: kernel },
      { name: 'rescue', kind: 'kernel', path: kernel },
      { name: 'initrd', kind: 'initrd', path: rawFile(Buffer.from('QFI\xfb not a qcow2', 'latin1')) },
    ],
  });
  const { parts } = result.manifest;
  assert.deepEqual(Object.keys(parts).toSorted(), ['initrd', 'kernel', 'rescue']);
  assert.equal(parts['kernel'], parts['rescue']);
  const manifest = parseManifest(await store.readManifest(parts['kernel']!), parts['kernel']!);
  assert.deepEqual([manifest.kind, manifest.sizeBytes], ['kernel', 300_001]);
  assert.ok((await readBack(store, parts['kernel']!)).equals(readFileSync(kernel)));
  assert.equal(result.tag.version, 'latest');
  assert.deepEqual((await verifyStore(store)).missing, []);
});

test('bad options and bad sources are refused with their name, and leave the store as it was', async () => {
  const store = await newStore(folder);
  const good = rawFile(Buffer.alloc(1 * MIB, 1));
  await importImage(store, { path: good, reference: 'good:1' });
  const before = filesOf(store.layout.folder);
  const refusals: [Partial<ImportOptions>, Parameters<typeof failsWith>[1], RegExp][] = [
    [{ reference: '../evil' }, 'bad-request', /"\.\.\/evil" is not an image reference/],
    [{ reference: 'a:b:c' }, 'bad-request', /a:b:c/],
    [{ reference: 'UPPER' }, 'bad-request', /UPPER/],
    [{ reference: '' }, 'bad-request', /not an image reference/],
    [{ reference: 'x'.repeat(200) }, 'bad-request', /not an image reference/],
    [{ reference: 'na\0me' }, 'bad-request', /not an image reference/],
    [{ kind: 'floppy' as ManifestKind }, 'bad-request', /floppy/],
    [{ format: 'iso' as 'raw' }, 'bad-request', /'iso' is not one of the image formats/],
    [{ chunkBytes: 5000 }, 'bad-request', /5000/],
    [{ chunkBytes: 8 * MIB }, 'bad-request', /8388608/],
    [{ chunkBytes: Number.NaN }, 'bad-request', /NaN/],
    [{ labels: { note: 'x'.repeat(2000) } }, 'bad-request', /note/],
    [{ parent: 'ab'.repeat(32) }, 'not-found', /abab/],
    [{ parts: [{ name: '../k', kind: 'kernel', path: good }] }, 'bad-request', /'\.\.\/k'/],
    [{ parts: [{ name: 'k', kind: 'kernel', path: '/nowhere/k' }] }, 'not-found', /\/nowhere\/k/],
    [{ path: '/nowhere/disk' }, 'not-found', /\/nowhere\/disk/],
    [{ path: folder }, 'bad-request', /not a regular file/],
    [{ path: '/dev/null' }, 'bad-request', /not a regular file/],
    [{ path: rawFile(Buffer.alloc(0)) }, 'bad-request', /is empty/],
    [{ path: rawFile(Buffer.alloc(1000, 1)) }, 'bad-request', /1000 bytes.*sectors/],
    [{ path: rawFile(Buffer.from('\x1f\x8b\x08rest of it', 'latin1')) }, 'bad-request', /gzip.*unpack/],
  ];
  for (const [options, code, sentence] of refusals) {
    const error = await failsWith(importImage(store, { path: good, reference: 'new:1', ...options }), code);
    assert.match(error.message, sentence);
  }
  assert.deepEqual(filesOf(store.layout.folder), before);
});

test('an image that something writes to meanwhile is refused', async () => {
  const store = await newStore(folder);
  const file = newFile();
  writeRandomImage(file, 32 * MIB, 6);
  const error = await failsWith(
    importImage(store, {
      path: file,
      reference: 'moving',
      onProgress: (done, total) => {
        if (done < total) appendFileSync(file, 'more');
      },
    }),
    'bad-request',
  );
  assert.match(error.message, /changed while it was read/);
  await failsWith(store.resolve('moving'), 'not-found');
  const shrinking = newFile();
  writeRandomImage(shrinking, 32 * MIB, 6);
  await failsWith(
    importImage(store, {
      path: shrinking,
      reference: 'moving',
      onProgress: () => truncateSync(shrinking, 4096),
    }),
    'bad-request',
  );
  assertNothingTemporary(store);
});

test('an import that is cancelled leaves no tag and no temporary file, and of chunks whole ones', async () => {
  const store = await newStore(folder);
  const file = newFile();
  writeRandomImage(file, 48 * MIB, 7);
  const abort = new AbortController();
  let calls = 0;
  const error = await failsWith(
    importImage(store, {
      path: file,
      reference: 'cancelled',
      signal: abort.signal,
      onProgress: () => {
        if (++calls === 3) abort.abort();
      },
    }),
    'closed',
  );
  assert.ok(error.message.includes(file), error.message);
  await failsWith(importImage(store, { path: file, reference: 'x', signal: AbortSignal.abort() }), 'closed');
  assertNothingTemporary(store);
  assert.deepEqual(await store.listTags(), []);
  const { damaged } = await verifyStore(store);
  assert.deepEqual(damaged, []);
});

test('imports that run at the same time into one store, of the same and other images, all succeed', async () => {
  const store = await newStore(folder);
  const [one, two] = [newFile(), newFile()];
  writeRandomImage(one, 16 * MIB, 8);
  writeRandomImage(two, 16 * MIB, 9);
  const results = await Promise.all(
    [one, one, two, two].map((file, i) => importImage(store, { path: file, reference: `at-once:${i}` })),
  );
  assert.equal((await store.listTags()).length, 4);
  for (const [i, { digest }] of results.entries()) {
    assert.ok((await readBack(store, digest)).equals(readFileSync(i < 2 ? one : two)));
  }
  assertNothingTemporary(store);
  const verified = await verifyStore(store);
  assert.deepEqual([verified.damaged, verified.missing, verified.unreferencedChunks], [[], [], 0]);
});

/** Imports in a process of its own; `progress` lines tell how far it is. */
const CHILD = `
  import { importImage, openStore } from ${JSON.stringify(path.resolve(import.meta.dirname, '../../src/store/index.ts'))};
  const [folder, file, reference] = process.argv.slice(1);
  const store = await openStore(folder);
  await importImage(store, { path: file, reference, onProgress: () => process.stdout.write('.') });
`;

test('what an import that was killed leaves is cleared by the next one, which stores only the rest', async () => {
  const store = await newStore(folder);
  const file = newFile();
  // Incompressible, so that there is more than one flush.
  writeFileSync(file, randomBuffer(randomNumbers(10), 96 * MIB));
  const child = spawn(
    process.execPath,
    ['--input-type=module', '-e', CHILD, store.layout.folder, file, 'k'],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  );
  const ended = new Promise<NodeJS.Signals | null>((resolve) => child.on('exit', (_, name) => resolve(name)));
  child.stdout.resume();
  // The first flush has begun to give chunks their names: there are two more to come.
  const chunks = store.layout.kind('chunks');
  const isNamed = () =>
    existsSync(chunks) &&
    readdirSync(chunks, { recursive: true, withFileTypes: true }).some((entry) => entry.isFile());
  while (!isNamed() && child.exitCode === null) await sleep(1);
  child.kill('SIGKILL');
  assert.equal(await ended, 'SIGKILL');
  assert.equal(readdirSync(store.layout.tmp).length, 1, 'the kill came in the middle');
  assert.deepEqual(await store.listTags(), []);
  const afterKill = await verifyStore(store);
  assert.deepEqual(afterKill.damaged, []);
  assert.ok(afterKill.unreferencedChunks > 0, 'a flush was under way');
  const result = await importImage(store, { path: file, reference: 'k' });
  assert.equal(result.newChunks, result.chunks - afterKill.unreferencedChunks);
  assertNothingTemporary(store);
  assert.ok((await readBack(store, result.digest)).equals(readFileSync(file)));
});

test('a writer that lives keeps its folder when another import starts', async () => {
  const store = await newStore(folder);
  const file = newFile();
  writeFileSync(file, randomBuffer(randomNumbers(11), 24 * MIB));
  const child = spawn(
    process.execPath,
    ['--input-type=module', '-e', CHILD, store.layout.folder, file, 'long'],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  );
  const ended = new Promise<number | null>((resolve) => child.on('exit', resolve));
  const started = new Promise<true>((resolve) => child.stdout.once('data', () => resolve(true)));
  assert.equal(await Promise.race([started, ended]), true, 'the other import runs');
  child.kill('SIGSTOP');
  try {
    const other = await openStore(store.layout.folder);
    await importImage(other, { path: rawFile(Buffer.alloc(512, 3)), reference: 'short' });
    assert.equal(readdirSync(store.layout.tmp).length, 1);
  } finally {
    child.kill('SIGCONT');
  }
  assert.equal(await ended, 0);
  assert.ok((await readBack(store, (await store.resolve('long')).manifest)).equals(readFileSync(file)));
  assertNothingTemporary(store);
});

test('a damaged chunk of impossible length is written again by the next import', async () => {
  const store = await newStore(folder);
  const file = rawFile(randomBuffer(randomNumbers(12), 1 * MIB));
  const { digest } = await importImage(store, { path: file, reference: 'a' });
  const victim = [...filesOf(store.layout.folder).keys()].find((name) => name.includes('v1/chunks/'))!;
  truncateSync(path.join(store.layout.folder, victim), 0);
  assert.equal((await verifyStore(store)).damaged.length, 1);
  const again = await importImage(store, { path: file, reference: 'a' });
  assert.equal(again.newChunks, 1);
  assert.ok((await readBack(store, digest)).equals(readFileSync(file)));
});

test('a full disk fails the import with no-space and leaves nothing half-made', async (t) => {
  const mountPoint = path.join(folder, 'small');
  mkdirSync(mountPoint);
  const { mount, unmount } = await import('../../src/core/linux.ts');
  try {
    mount('gridvfs-test', mountPoint, 'tmpfs', 0, 'size=8m');
  } catch {
    t.skip('needs root, to mount a small tmpfs');
    return;
  }
  try {
    const place = path.join(mountPoint, 'store');
    const { initStore } = await import('../../src/store/index.ts');
    await initStore(place);
    const store = await openStore(place);
    const file = newFile();
    writeFileSync(file, randomBuffer(randomNumbers(13), 24 * MIB));
    const error = await failsWith(importImage(store, { path: file, reference: 'big' }), 'no-space');
    assert.match(error.message, /small\/store/);
    assertNothingTemporary(store);
    assert.deepEqual(await store.listTags(), []);
    const small = await importImage(store, { path: rawFile(Buffer.alloc(4096, 1)), reference: 'small' });
    assert.equal(small.newChunks, 1);
    assert.ok(!existsSync(path.join(place, 'tmp', 'replace')));
  } finally {
    await sleep(0);
    unmount(mountPoint, 0);
  }
});
