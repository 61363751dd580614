/** Archives of clones: there and back, and everything that an archive from outside may be. */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import tar from 'tar-stream';
import { sha256 } from '../../src/core/bytes.ts';
import { GridError } from '../../src/core/errors.ts';
import {
  createLayerOver,
  exportArchive,
  openChain,
  openClone,
  readArchive,
  readArchiveInfo,
} from '../../src/image/index.ts';
import type { ArchiveInfo, Clone } from '../../src/image/index.ts';
import { hasCode } from '../suites/image.ts';
import { FileImage, patternedContent } from './file-image.ts';

const BASE = '9'.repeat(64);
const BLOCK = 4096;
const SIZE = 100 * BLOCK + 600;
const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-archive-'));
const file = path.join(folder, 'clone.tar');
const baseContent = patternedContent(90 * BLOCK, 4);
const content = Buffer.concat([baseContent, Buffer.alloc(SIZE - baseContent.length)]);
const ABOUT = {
  id: 'work',
  image: 'debian:12',
  base: BASE,
  standalone: false,
  machine: { 'boot.ready': 'login:' },
};
let made = 0;

after(() => rmSync(folder, { recursive: true }));

async function newClone(layers: string[] = []): Promise<Clone> {
  const layer = path.join(folder, `layer${++made}`);
  await createLayerOver(layer, { base: BASE, layers }, SIZE);
  const base = new FileImage(path.join(folder, `base${made}`), baseContent, undefined, 0);
  return openClone(base, await openChain({ base: BASE, layers: [...layers, layer] }));
}

async function change(clone: Clone, offset: number, length: number, value: number): Promise<void> {
  if (value === 0) await clone.trim(offset, length);
  else await clone.write(Buffer.alloc(length, value), offset);
  content.fill(value, offset, offset + length);
}

async function readAll(clone: Clone): Promise<Buffer> {
  const all = Buffer.alloc(clone.sizeBytes, 0xee);
  await clone.read(all, 0);
  return all;
}

/** Imports `archive` into a new clone over the base; undefined when it is refused. */
async function importInto(archive: string): Promise<Buffer | GridError> {
  const clone = await newClone();
  try {
    const { sizeBytes } = await readArchiveInfo(archive);
    assert.equal(sizeBytes, SIZE);
    await readArchive(archive, {
      write: (bytes, offset) => clone.write(bytes, offset),
      zero: (first, count) => clone.layer.trimBlocks(first, first + count - 1, Infinity),
    });
    return await readAll(clone);
  } catch (error) {
    return error as GridError;
  } finally {
    await clone.close();
  }
}

before(async () => {
  const below = await newClone();
  await change(below, 3 * BLOCK + 7, 9 * BLOCK, 1);
  await change(below, 20 * BLOCK, 5 * BLOCK, 0);
  await below.flush();
  await below.close();
  const clone = await newClone([below.layer.folder]);
  await change(clone, 5 * BLOCK, BLOCK, 2);
  await change(clone, 22 * BLOCK, 4 * BLOCK, 3);
  await change(clone, 99 * BLOCK, BLOCK + 600, 4);
  const info = await exportArchive(file, clone, ABOUT);
  assert.deepEqual([info.dataBlocks, info.sizeBytes], [10 + 4 + 2, SIZE]);
  await assert.rejects(exportArchive(file, clone, ABOUT), hasCode('exists'));
  await clone.close();
});

test('a chain travels as one layer and reads the same over its base', async () => {
  assert.equal(existsSync(`${file}.partial`), false);
  assert.ok(readFileSync(file).length < 24 * BLOCK, 'only what changed is in it');
  const imported = await importInto(file);
  assert.ok(Buffer.isBuffer(imported) && imported.equals(content));
  const info = await readArchiveInfo(file);
  assert.equal(info.base, BASE);
  assert.deepEqual(info.machine, { 'boot.ready': 'login:' });
});

test('a flipped byte anywhere is refused', async () => {
  const bytes = readFileSync(file);
  const damaged = path.join(folder, 'damaged.tar');
  const accepted: number[] = [];
  const isFrame = (at: number) => at < 3 * 512 + 20 || at > bytes.length - 4 * 512;
  const places = [...bytes.keys()].filter((at) => (isFrame(at) ? at % 3 === 0 : at % 1997 === 0));
  for (const at of places) {
    const changed = Buffer.from(bytes);
    changed[at]! ^= 1 << (at % 8);
    writeFileSync(damaged, changed);
    const nowhere = { write: () => Promise.resolve(), zero: () => Promise.resolve() };
    await readArchive(damaged, nowhere).then(
      () => accepted.push(at),
      (error: unknown) => assert.ok(error instanceof GridError, String(error)),
    );
  }
  assert.deepEqual(accepted, []);
});

test('an archive that ends early is refused wherever it ends', async () => {
  const bytes = readFileSync(file);
  const cut = path.join(folder, 'cut.tar');
  for (let length = 0; length < bytes.length - 1024; length += 1300) {
    writeFileSync(cut, bytes.subarray(0, length));
    const outcome = await importInto(cut);
    assert.ok(
      !Buffer.isBuffer(outcome) && ['bad-format', 'corrupt'].includes(outcome.code),
      `${length}: ${String(outcome)}`,
    );
  }
});

interface Part {
  readonly name: string;
  readonly bytes: Buffer;
  readonly type?: 'symlink' | 'link' | 'directory';
  readonly size?: number;
}

/** An archive made by hand; digests are right unless the caller gives other ones. */
async function forge(
  info: Partial<ArchiveInfo>,
  change: (parts: Part[]) => Part[],
  runs = [[0, 1, 1]],
): Promise<string> {
  const pad = (bytes: Buffer, fill: number | string = 0) =>
    Buffer.concat([bytes, Buffer.alloc(Math.ceil(bytes.length / 512) * 512 - bytes.length, fill)]);
  const json = (value: unknown) => pad(Buffer.from(JSON.stringify(value)), ' ');
  const table = Buffer.alloc(runs.length * 12);
  runs.flat().forEach((value, i) => table.writeUInt32LE(value, i * 4));
  const parts: Part[] = [
    {
      name: 'clone.json',
      bytes: json({
        format: 'gridvfs-clone',
        schema: 1,
        ...ABOUT,
        sizeBytes: SIZE,
        runs: runs.length,
        dataBlocks: 1,
        created: '2026-01-01T00:00:00Z',
        ...info,
      }),
    },
    { name: 'runs', bytes: pad(table) },
    { name: 'data', bytes: Buffer.alloc(BLOCK, 0x55) },
  ];
  parts.push({
    name: 'sha256.json',
    bytes: json(Object.fromEntries(parts.map(({ name, bytes }) => [name, sha256(bytes)]))),
  });
  const pack = tar.pack();
  for (const { name, bytes, type = 'file', size } of change(parts)) {
    if (size === undefined)
      pack.entry({ name, type, ...(type === 'file' ? {} : { linkname: '/etc/passwd' }) }, bytes);
    else pack.entry({ name, size }).write(bytes);
  }
  const pieces: Buffer[] = [];
  pack.on('data', (piece: unknown) => pieces.push(piece as Buffer));
  const ended = new Promise<void>((resolve) => pack.on('close', () => resolve()));
  pack.finalize();
  await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, 50))]);
  const forged = path.join(folder, 'forged.tar');
  writeFileSync(forged, Buffer.concat(pieces));
  return forged;
}

test('a path outside, a link, a bomb of a size, a wild run and foreign entries are refused before anything is written', async () => {
  const good = await importInto(await forge({}, (parts) => parts));
  assert.ok(Buffer.isBuffer(good) && good.subarray(0, BLOCK).equals(Buffer.alloc(BLOCK, 0x55)), String(good));
  const same = (parts: Part[]) => parts;
  const renamed = (from: string, to: Partial<Part>) => (parts: Part[]) =>
    parts.map((part) => (part.name === from ? { ...part, ...to } : part));
  const cases: [string, Partial<ArchiveInfo>, (parts: Part[]) => Part[], number[][]?][] = [
    ['a path outside', {}, renamed('data', { name: '../../etc/cron.d/x' })],
    ['an absolute path', {}, renamed('runs', { name: '/etc/passwd' })],
    ['an entry too many', {}, (parts) => [...parts, { name: 'more', bytes: Buffer.alloc(512) }]],
    ['an entry twice', {}, (parts) => [parts[0]!, parts[0]!, ...parts.slice(1)]],
    ['an entry missing', {}, (parts) => parts.toSpliced(1, 1)],
    ['no digests', {}, (parts) => parts.slice(0, -1)],
    ['another order', {}, (parts) => [parts[1]!, parts[0]!, ...parts.slice(2)]],
    ['a symbolic link', {}, renamed('data', { type: 'symlink', bytes: Buffer.alloc(0) })],
    ['a folder', {}, renamed('data', { type: 'directory', bytes: Buffer.alloc(0) })],
    ['data that claims 8 TiB', {}, renamed('data', { size: 2 ** 43 })],
    ['runs that claim 1 TiB', { runs: 2 ** 36 }, renamed('runs', { size: 12 * 2 ** 36 })],
    ['a clone.json that claims 1 GiB', {}, renamed('clone.json', { size: 2 ** 30 })],
    ['a disk of 2^60 bytes', { sizeBytes: 2 ** 60 }, same],
    ['more data than the disk is large', { dataBlocks: 200 }, same],
    ['more data than its runs', { dataBlocks: 2 }, same],
    ['a run beyond the disk', {}, same, [[101, 1, 1]]],
    [
      'a run of nothing',
      {},
      same,
      [
        [3, 0, 1],
        [4, 1, 1],
      ],
    ],
    [
      'runs that overlap',
      {},
      same,
      [
        [3, 2, 2],
        [4, 1, 1],
      ],
    ],
    ['a state that there is not', {}, same, [[3, 1, 16]]],
    ['another format', { format: 'tarball' as 'gridvfs-clone' }, same],
    ['a name that is a path', { id: '../x' }, same],
    ['a base that is no digest', { base: 'latest' }, same],
  ];
  for (const [what, info, change, runs] of cases) {
    const outcome = await importInto(await forge(info, change, runs));
    assert.ok(!Buffer.isBuffer(outcome), `${what} was accepted`);
    assert.ok(
      ['bad-format', 'corrupt'].includes(outcome.code),
      `${what}: ${outcome.code} ${outcome.message}`,
    );
  }
  assert.equal(((await importInto(await forge({ schema: 2 as 1 }, same))) as GridError).code, 'newer-format');
  assert.equal(((await importInto(path.join(folder, 'nothing.tar'))) as GridError).code, 'not-found');
});

test('an export that fails or is cancelled in the middle throws that, leaves no file, and ends nothing else', async () => {
  const clone = await newClone();
  try {
    // Larger than the stream's buffers, so that the tar is being written when it happens.
    await clone.write(Buffer.alloc(90 * BLOCK, 7), 0);
    const target = path.join(folder, 'failed.tar');
    const stop = new AbortController();
    await assert.rejects(
      exportArchive(target, clone, ABOUT, { signal: stop.signal, onProgress: () => stop.abort() }),
      hasCode('closed'),
    );
    const failing = new Proxy(clone, {
      get: (real, key) =>
        key === 'read'
          ? () => Promise.reject(new GridError('local-io', 'the disk died'))
          : (Reflect.get(real, key, real) as unknown),
    });
    await assert.rejects(exportArchive(target, failing, ABOUT), hasCode('local-io'));
    // Whatever a stream says later would end this process.
    await new Promise((resolve) => setTimeout(resolve, 50));
    assert.deepEqual([existsSync(target), existsSync(`${target}.partial`)], [false, false]);
  } finally {
    await clone.close();
  }
});
