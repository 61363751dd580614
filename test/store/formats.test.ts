/** Import of what is not raw: qemu-img makes the images, and takes them apart behind our own checks. */
import assert from 'node:assert/strict';
import {
  closeSync,
  copyFileSync,
  openSync,
  readFileSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { before, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { importImage } from '../../src/store/index.ts';
import { randomBuffer, randomNumbers, writeRandomImage } from '../suites/fixtures.ts';
import {
  assertNothingTemporary,
  failsWith,
  filesOf,
  newStore,
  readBack,
  run,
  testFolder,
} from './helpers.ts';

const folder = testFolder('formats');
const raw = path.join(folder, 'disk.raw');
const at = (name: string) => path.join(folder, name);

before(() => writeRandomImage(raw, 8 * MIB + 512, 30));

const VARIANTS: readonly (readonly [name: string, ...options: string[]])[] = [
  ['qcow2'],
  ['qcow2', '-o', 'compat=0.10'],
  ['qcow2', '-c'],
  ['qcow2', '-c', '-o', 'compression_type=zstd'],
  ['qcow2', '-o', 'cluster_size=512'],
  ['qcow2', '-c', '-o', 'cluster_size=2M'],
  ['qcow2', '-o', 'extended_l2=on,cluster_size=128k'],
  ['qcow2', '-o', 'preallocation=metadata'],
  ['qcow2', '-o', 'lazy_refcounts=on'],
  ['vmdk'],
  ['vmdk', '-o', 'subformat=streamOptimized'],
  ['vdi'],
  ['vhdx'],
];

for (const [format, ...options] of VARIANTS) {
  test(`an image in ${[format, ...options].join(' ')} comes back as it was`, async () => {
    const store = await newStore(folder);
    const file = at(`variant.${format}`);
    run('qemu-img', 'convert', '-f', 'raw', '-O', format, ...options, raw, file);
    const phases = new Set<string>();
    const { digest } = await importImage(store, {
      path: file,
      reference: 'a',
      onProgress: (done, total, phase) => {
        assert.ok(done <= total);
        phases.add(phase);
      },
    });
    const [image, expected] = [await readBack(store, digest), readFileSync(raw)];
    assert.ok(image.subarray(0, expected.length).equals(expected));
    // Some formats count in larger units than sectors.
    assert.ok(image.subarray(expected.length).every((byte) => byte === 0));
    if (format === 'qcow2') assert.equal(image.length, expected.length);
    assert.deepEqual([...phases], ['unpack', 'pack']);
    assertNothingTemporary(store);
  });
}

test('an image that was cut short anywhere is refused in one line that names it, or nothing of it was lost', async () => {
  let store = await newStore(folder);
  const empty = filesOf(store.layout.folder);
  const whole = at('whole');
  // Ends in data, so that what a cut takes first is not padding.
  const raw = at('full.raw');
  writeFileSync(raw, randomBuffer(randomNumbers(32), 4 * MIB));
  const cut = at('cut.img');
  for (const [format, ...options] of [
    ['qcow2'],
    ['qcow2', '-c'],
    ['qcow2', '-c', '-o', 'compression_type=zstd'],
    ['qcow2', '-o', 'preallocation=metadata'],
    ['vmdk'],
    ['vdi'],
    ['vhdx'],
  ] as const) {
    run('qemu-img', 'convert', '-f', 'raw', '-O', format, ...options, raw, whole);
    const { size } = statSync(whole);
    let refused = 0;
    for (const lost of [1, 100, 513, 70_000, 1 * MIB, Math.floor(size / 2), size - 600, size - 60]) {
      copyFileSync(whole, cut);
      truncateSync(cut, size - lost);
      const outcome = await importImage(store, { path: cut, reference: 'cut', format }).catch(
        (error: unknown) => error as Error,
      );
      const title = `${[format, ...options].join(' ')} cut by ${lost} of ${size}`;
      if (outcome instanceof Error) {
        refused++;
        assert.equal(
          (outcome as Error & { code: unknown }).code,
          'bad-format',
          `${title}: ${outcome.message}`,
        );
        assert.ok(outcome.message.includes(cut), outcome.message);
        assert.ok(!outcome.message.includes('\n'), outcome.message);
        assert.deepEqual(filesOf(store.layout.folder), empty, title);
      } else {
        // What qemu-img writes last may be padding.
        const image = await readBack(store, outcome.digest);
        assert.ok(image.subarray(0, statSync(raw).size).equals(readFileSync(raw)), title);
        store = await newStore(folder);
      }
    }
    assert.ok(refused >= 3, `${format} ${options.join(' ')}: only ${refused} refused`);
  }
});

test('an image that refers to any other file is refused before anything opens that file', async () => {
  const store = await newStore(folder);
  const empty = filesOf(store.layout.folder);
  run('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', raw, '-F', 'raw', at('overlay.qcow2'));
  run(
    'qemu-img',
    'create',
    '-q',
    '-f',
    'qcow2',
    '-o',
    `data_file=${at('outside')}`,
    at('data-file.qcow2'),
    '1M',
  );
  run('qemu-img', 'create', '-q', '-f', 'vmdk', '-o', 'subformat=monolithicFlat', at('flat.vmdk'), '1M');
  run('qemu-img', 'create', '-q', '-f', 'vmdk', at('base.vmdk'), '1M');
  run('qemu-img', 'create', '-q', '-f', 'vmdk', '-b', at('base.vmdk'), '-F', 'vmdk', at('overlay.vmdk'));
  for (const name of ['overlay.qcow2', 'data-file.qcow2', 'flat.vmdk', 'overlay.vmdk']) {
    const error = await failsWith(importImage(store, { path: at(name), reference: 'a' }), 'bad-request');
    assert.match(error.message, /flatten it/);
    assert.ok(error.message.includes(at(name)), error.message);
  }
  assert.deepEqual(filesOf(store.layout.folder), empty);
});

test('what claims to be qcow2 and is none is refused, whatever its header says', async () => {
  const store = await newStore(folder);
  const file = at('hostile.qcow2');
  const good = at('good.qcow2');
  run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, good);
  const edits: [name: string, offset: number, bytes: number[]][] = [
    ['version 9', 4, [0, 0, 0, 9]],
    ['cluster bits 63', 20, [0, 0, 0, 63]],
    ['an enormous size', 24, [0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]],
    ['an L1 table elsewhere', 40, [0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0]],
    ['an L1 table of no entries', 36, [0, 0, 0, 0]],
    ['marked corrupt', 79, [2]],
    ['features nobody knows', 72, [0x80]],
    ['encryption', 35, [2]],
    ['a refcount table elsewhere', 48, [0, 0, 0x7f, 0xff, 0, 0, 0, 0]],
  ];
  for (const [name, offset, bytes] of edits) {
    copyFileSync(good, file);
    const fd = openSync(file, 'r+');
    writeSync(fd, Buffer.from(bytes), 0, bytes.length, offset);
    closeSync(fd);
    const outcome: unknown = await importImage(store, { path: file, reference: 'a' }).catch(
      (error: unknown) => error,
    );
    assert.ok(outcome instanceof Error, name);
    assert.match(
      (outcome as Error & { code: string }).code,
      /^bad-(format|request)$/,
      `${name}: ${outcome.message}`,
    );
    assert.ok(outcome.message.includes(file), `${name}: ${outcome.message}`);
  }
  writeFileSync(file, Buffer.from('QFI\xfb\0\0\0\x03', 'latin1'));
  await failsWith(importImage(store, { path: file, reference: 'a' }), 'bad-format');
  assertNothingTemporary(store);
  assert.deepEqual(await store.listTags(), []);
});

test('a raw disk whose guest wrote an image header into it is imported as raw when that is said', async () => {
  const store = await newStore(folder);
  const file = at('guest-wrote-header.raw');
  copyFileSync(raw, file);
  const fd = openSync(file, 'r+');
  writeSync(fd, Buffer.from('QFI\xfb\0\0\0\x03', 'latin1'), 0, 8, 0);
  closeSync(fd);
  await failsWith(importImage(store, { path: file, reference: 'a' }), 'bad-format');
  const { digest } = await importImage(store, { path: file, reference: 'a', format: 'raw' });
  assert.ok((await readBack(store, digest)).equals(readFileSync(file)));
});

test('without qemu-img, an image that is not raw is refused with the package to install', async () => {
  const store = await newStore(folder);
  const file = at('needs-qemu-img.qcow2');
  run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, file);
  const before = process.env['PATH'];
  process.env['PATH'] = '/nowhere';
  try {
    const error = await failsWith(importImage(store, { path: file, reference: 'a' }), 'unsupported');
    assert.match(error.message, /qemu-utils/);
  } finally {
    process.env['PATH'] = before;
  }
  assertNothingTemporary(store);
});

test('an import that is cancelled while it is unpacked leaves nothing', async () => {
  const store = await newStore(folder);
  const file = at('large.qcow2');
  writeRandomImage(at('large.raw'), 64 * MIB, 31);
  run('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', at('large.raw'), file);
  const empty = filesOf(store.layout.folder);
  const abort = new AbortController();
  await failsWith(
    importImage(store, {
      path: file,
      reference: 'a',
      signal: abort.signal,
      onProgress: (_, __, phase) => {
        if (phase === 'unpack') abort.abort();
      },
    }),
    'closed',
  );
  assert.deepEqual(filesOf(store.layout.folder), empty);
});
