/**
 * `node bench/clone-commit.ts`: changed blocks of a 10 GiB image (an ext4 file system, all of it data) as a new
 * version, against importing that disk whole. One per cent of its blocks each time:
 *   installed    by a package installation: files of this host, a package's worth at a time, written under another
 *                name, fsynced, renamed, through the kernel's ext4 on the clone's disk on a mount of its own
 *   in runs      of 1 MiB … 4 KiB, scattered evenly over the disk. Single blocks touch nearly half of all chunks
 *   over that    once more, other blocks of the version that the single blocks made: patches meet
 *   base here    single blocks, where the chunks around them are in the host's cache
 *
 * In one process with the real parts, except for the installation; page cache warm. `--size` sets the image's size.
 * Root, for the loop device.
 */
import { execFile } from 'node:child_process';
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  statSync,
  writeSync,
} from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs, promisify } from 'node:util';
import { ControlClient } from '../src/agent/client.ts';
import type { CloneStatus } from '../src/agent/clone-status.ts';
import { parseBytes } from '../src/cli/kit.ts';
import { CHUNK_BYTES_DEFAULT, GIB, KIB, LAYER_BLOCK_BYTES, MIB } from '../src/core/limits.ts';
import { syncFileSystem } from '../src/core/linux.ts';
import { blockChangeOf, changedUnits, createLayerOver, openChain, openClone } from '../src/image/index.ts';
import type { Clone } from '../src/image/index.ts';
import { commitImage } from '../src/store/index.ts';
import { gridvfs } from './lib/child.ts';
import { cloneWorld, printRows, randomOf, say } from './lib/clones.ts';
import type { Row } from './lib/clones.ts';
import { promise } from './lib/record.ts';

const BLOCK = LAYER_BLOCK_BYTES;
/** Of the time that importing the whole image takes, for 1 % of its blocks. */
const COMMIT_SHARE_MAX = 0.05;
const run = promisify(execFile);
type CloneWorld = Awaited<ReturnType<typeof cloneWorld>>;

/** Text-like bytes that zstd halves, different in every 64 KiB. */
function fillData(fd: number, sizeBytes: number): void {
  const random = randomOf(11);
  const piece = Buffer.alloc(4 * MIB);
  for (let i = 0; i < piece.length; i += 4) piece.writeUInt32LE(Math.floor(random() * 2 ** 16), i);
  for (let at = 0; at < sizeBytes; at += piece.length) {
    for (let i = 0; i < piece.length; i += 64 * KIB) piece.writeDoubleLE(at + i, i);
    writeSync(fd, piece, 0, Math.min(piece.length, sizeBytes - at), at);
  }
}

/** An ext4 file system whose free blocks are full of data. */
async function makeFileSystem(raw: string): Promise<void> {
  // Not lazily: otherwise the kernel writes inode tables in the background of the first mount.
  const extended = 'nodiscard,lazy_itable_init=0,lazy_journal_init=0';
  await run('mkfs.ext4', ['-q', '-F', '-E', extended, '-d', '/usr/share/doc', raw]);
}

interface Committed {
  readonly changedChunks: number;
  readonly newChunks: number;
  readonly newStoredBytes: number;
}

function rowsOf(
  what: string,
  seconds: number,
  importMs: number,
  result: Committed,
  changedBytes: number,
): Row[] {
  const counts: [string, number, string][] = [
    ['  changed', changedBytes / MIB, 'MiB'],
    ['  chunks changed', result.changedChunks, ''],
    ['  chunks stored', result.newChunks, ''],
    ['  stored', result.newStoredBytes / MIB, 'MiB'],
  ];
  say(`${what}: ${seconds.toFixed(2)} s, ${((100_000 * seconds) / importMs).toFixed(1)} % of the import`);
  return [
    { case: 'commit', subject: what, value: seconds, unit: 's', ratio: (1000 * seconds) / importMs },
    ...counts.map(([subject, value, unit]): Row => ({ case: 'commit', subject, value, unit })),
  ];
}

/** Scattered runs over version `parent`, committed. `baseHere`: what lies around them is in the host's cache. */
async function runRows(
  folder: string,
  { store, cache, importMs, sizeBytes }: CloneWorld,
  { parent, runBytes, baseHere }: { parent: string; runBytes: number; baseHere: boolean },
  what: string,
): Promise<{ digest: string; rows: Row[] }> {
  const name = `run-${++runs}`;
  const layer = path.join(folder, `layer-${name}`);
  await createLayerOver(layer, { base: parent, layers: [] }, sizeBytes);
  const clone = openClone(await cache.openImage(parent), await openChain({ base: parent, layers: [layer] }));
  const random = randomOf(runs);
  const around = Buffer.alloc(CHUNK_BYTES_DEFAULT);
  for (let done = 0; done < sizeBytes / 100; done += runBytes) {
    const bytes = Buffer.alloc(runBytes);
    for (let i = 0; i < runBytes; i += 4) bytes.writeUInt32LE(Math.floor(random() * 2 ** 16), i);
    const at = Math.floor((random() * sizeBytes) / runBytes) * runBytes;
    if (baseHere) await clone.read(around, at - (at % around.length));
    await clone.write(bytes, at);
  }
  await clone.flush();
  syncFileSystem(clone.direct.layer!.dataFd); // what was written before is not waited for within the time
  const startMs = performance.now();
  const result = await commitImage(store, commitOf(clone, parent, `base:${name}`));
  const seconds = (performance.now() - startMs) / 1000;
  const { dataBlocks } = clone.statistics();
  await clone.close();
  await rm(layer, { recursive: true });
  return { digest: result.digest, rows: rowsOf(what, seconds, importMs, result, dataBlocks * BLOCK) };
}

let runs = 0;

function commitOf(clone: Clone, parent: string, reference: string): Parameters<typeof commitImage>[1] {
  return {
    parent,
    reference,
    sizeBytes: clone.sizeBytes,
    changed: (chunkBytes) => changedUnits(clone, chunkBytes),
    isChanged: blockChangeOf(clone),
    read: (target, offsetBytes) => clone.read(target, offsetBytes),
    readHere: (target, offsetBytes) => clone.readHere(target, offsetBytes),
  };
}

/** Files of this host below `folder`, folder by folder, as long as `budget` has bytes. */
function* filesBelow(folder: string, budget: { bytes: number }): Generator<string> {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const file = path.join(folder, entry.name);
    if (entry.isDirectory()) yield* filesBelow(file, budget);
    else if (entry.isFile() && budget.bytes > 0) {
      budget.bytes -= statSync(file).size;
      yield file;
    }
    if (budget.bytes <= 0) return;
  }
}

const PACKAGE_FILES = 50;

/** As dpkg does: a package's files under another name, all of them synced, then renamed. */
function install(files: readonly string[], root: string): void {
  for (let i = 0; i < files.length; i += PACKAGE_FILES) {
    const made: string[] = [];
    for (const file of files.slice(i, i + PACKAGE_FILES)) {
      const target = path.join(root, file);
      mkdirSync(path.dirname(target), { recursive: true });
      const fd = openSync(`${target}.dpkg-new`, 'w');
      writeSync(fd, readFileSync(file));
      fsyncSync(fd);
      closeSync(fd);
      made.push(target);
    }
    for (const target of made) renameSync(`${target}.dpkg-new`, target);
  }
}

/** Through a proxy and a mount of its own, over a loop device. */
async function installedRows(
  folder: string,
  { storeFolder, importMs, sizeBytes }: CloneWorld,
): Promise<Row[]> {
  const mountpoint = path.join(folder, 'mnt');
  const place = path.join(folder, 'fs');
  for (const one of [mountpoint, place]) mkdirSync(one);
  const { runtime } = await gridvfs<{ runtime: string }>([
    ...['mount', storeFolder, mountpoint, '--name', path.basename(folder).toLowerCase(), '--json'],
    ...['--cache-dir', path.join(folder, 'cache2'), '--state-dir', path.join(folder, 'state2')],
  ]);
  let loop: string | undefined;
  try {
    const client = new ControlClient(path.join(runtime, 'control.sock'));
    await client.call('POST', '/v1/clones', { image: 'base:1', name: 'installed' });
    const disk = path.join(mountpoint, 'clones', 'installed', 'disk.raw');
    loop = (await run('losetup', ['-f', '--show', disk])).stdout.trim();
    await run('mount', ['-o', 'noatime', loop, place]);
    try {
      install([...filesBelow('/usr/share', { bytes: 0.0095 * sizeBytes })], place);
    } finally {
      await run('umount', [place]);
      await run('losetup', ['-d', loop]);
      loop = undefined;
    }
    const fd = openSync(storeFolder, 'r');
    syncFileSystem(fd);
    closeSync(fd);
    const { allocatedBytes } = await client.call<CloneStatus>('GET', '/v1/clones/installed');
    const startMs = performance.now();
    const body = { reference: 'base:installed' };
    const result = await client.longCall<Committed>('POST', '/v1/clones/installed/commit', body, {});
    const seconds = (performance.now() - startMs) / 1000;
    return rowsOf('a package installation', seconds, importMs, result, allocatedBytes);
  } finally {
    if (loop !== undefined) await run('losetup', ['-d', loop]).catch(() => {});
    await gridvfs(['umount', mountpoint, '--force', '--json']);
  }
}

const { values } = parseArgs({
  options: {
    size: { type: 'string', default: '10G' },
    folder: { type: 'string', default: os.tmpdir() },
    json: { type: 'string' },
  },
});
const sizeBytes = parseBytes(values.size);
const folder = await mkdtemp(path.join(values.folder, 'gridvfs-bench-commit-'));
const rows: Row[] = [];
try {
  say(`making and importing ${sizeBytes / GIB} GiB`);
  const world = await cloneWorld(folder, (fd) => fillData(fd, sizeBytes), sizeBytes, makeFileSystem);
  const { importMs } = world;
  try {
    rows.push({
      case: 'commit',
      subject: 'import of the whole image',
      value: importMs / 1000,
      unit: 's',
      ratio: 1,
    });
    rows.push(...(await installedRows(folder, world)));
    const { digest: parent } = world;
    for (const runBytes of [1 * MIB, 256 * KIB, 64 * KIB, 16 * KIB]) {
      const what = `1 % in runs of ${runBytes / KIB} KiB`;
      rows.push(...(await runRows(folder, world, { parent, runBytes, baseHere: false }, what)).rows);
    }
    const single = { parent, runBytes: 4 * KIB, baseHere: false };
    const first = await runRows(folder, world, single, '1 % in single blocks');
    rows.push(...first.rows);
    const again = await runRows(
      folder,
      world,
      { ...single, parent: first.digest },
      'another 1 % in single blocks, over that version',
    );
    rows.push(...again.rows);
    rows.push(
      ...(await runRows(folder, world, { ...single, baseHere: true }, '1 % in single blocks, base here'))
        .rows,
    );
  } finally {
    await world.close();
  }
} finally {
  await rm(folder, { recursive: true, force: true });
}
// Over a version that is patched all over, twice as much lies in the packs that are made anew: nothing is promised of that.
const promises = rows
  .filter(({ ratio, subject }) => ratio !== undefined && !/^import|over that/.test(subject))
  .map(({ subject, ratio }) => promise(`${subject}, to the import of the whole`, ratio!, COMMIT_SHARE_MAX));
await printRows('clone-commit', rows, values.json, promises);
