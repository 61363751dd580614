/**
 * `node bench/clone.ts`: what clones cost, each case against what its promise names:
 *   mounted  4 KiB random reads (fio, direct) of a clone over 1, 8 and 32 layers through the mount: a read must not
 *            pay for depth
 *   chain    the same within one process, and beside it pread(2) alone from as many files: what is left of the
 *            difference is the page cache's, which finds pages of one file sooner than of many
 *   create   create and open a clone of a sparse 100 GiB image: time, disk, memory
 *   many     a thousand clones of one image: create, one write each, list, remove
 * (commits: clone-commit.ts)
 *
 * In one process with the real parts (layers, agent, store), page cache warm, rounds interleaved: what is compared
 * is our code, not the disk.
 */
import { execFile } from 'node:child_process';
import { closeSync, ftruncateSync, openSync, readdirSync, readSync, writeSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs, promisify } from 'node:util';
import { ControlClient } from '../src/agent/client.ts';
import { DirectFile } from '../src/core/direct-io.ts';
import { GIB, KIB, LAYER_BLOCK_BYTES, MIB } from '../src/core/limits.ts';
import { createLayerOver, openChain, openClone, zeroImage } from '../src/image/index.ts';
import type { Clone } from '../src/image/index.ts';
import { importImage, initStore, openStore } from '../src/store/index.ts';
import { gridvfs } from './lib/child.ts';
import { cloneWorld, printRows, randomOf } from './lib/clones.ts';
import type { Row } from './lib/clones.ts';
import { median } from './lib/facts.ts';
import { abortOnSignals, failed } from './lib/scene.ts';

/** Ends the case that runs, which then undoes what it made. */
const signal = abortOnSignals();
const BASE = '5'.repeat(64);
/** Per round. */
const READS = 200_000;
const BLOCK = LAYER_BLOCK_BYTES;

/** The same disk, every block of it data, its blocks dealt out at random over the layers of each chain. */
async function chainRows(folder: string, rounds: number): Promise<Row[]> {
  const depths = [1, 8, 32];
  const blocks = (256 * MIB) / BLOCK;
  const files = new Map<number, { clone: Clone; file: DirectFile }>();
  for (const depth of depths) {
    const random = randomOf(depth);
    const owner = Uint8Array.from({ length: blocks }, () => Math.floor(random() * depth));
    const layers: string[] = [];
    for (let i = 0; i < depth; i++) {
      const layer = path.join(folder, `chain-${depth}-${i}`);
      await createLayerOver(layer, { base: BASE, layers }, blocks * BLOCK);
      layers.push(layer);
      const clone = openClone(zeroImage(), await openChain({ base: BASE, layers }));
      for (let block = 0; block < blocks; block++) {
        if (owner[block] === i) await clone.write(Buffer.alloc(BLOCK, block), block * BLOCK);
      }
      await clone.flush();
      await clone.close();
    }
    const clone = openClone(zeroImage(), await openChain({ base: BASE, layers }));
    files.set(depth, { clone, file: new DirectFile(clone.direct) });
  }
  const iops = new Map<number, number[]>(depths.map((depth) => [depth, []]));
  const target = Buffer.alloc(BLOCK);
  for (let round = 0; round <= rounds; round++) {
    for (const depth of depths) {
      const { file } = files.get(depth)!;
      const random = randomOf(round + 1);
      const startMs = performance.now();
      for (let i = 0; i < READS; i++) file.read(target, Math.floor(random() * blocks) * BLOCK);
      const value = (READS / (performance.now() - startMs)) * 1000;
      if (round > 0) iops.get(depth)!.push(value); // the first round warms the page cache and the compiler
    }
  }
  for (const { clone } of files.values()) await clone.close();
  return [
    ...depthRows('chain', 'layers', iops),
    ...depthRows('chain', 'files, pread alone', preadIops(folder, depths, blocks, rounds)),
  ];
}

function depthRows(name: Row['case'], what: string, iops: ReadonlyMap<number, readonly number[]>): Row[] {
  const first = median(iops.get(1)!);
  return [...iops].map(([depth, runs]) => ({
    case: name,
    subject: `${depth} ${what}`,
    value: median(runs),
    unit: 'IOPS',
    ratio: median(runs) / first,
    runs,
  }));
}

/** The data files of the chains read as they are, without any of our code. */
function preadIops(folder: string, depths: readonly number[], blocks: number, rounds: number) {
  const files = new Map<number, { fds: number[]; owner: Uint8Array }>();
  for (const depth of depths) {
    const random = randomOf(depth);
    files.set(depth, {
      fds: Array.from({ length: depth }, (_, i) =>
        openSync(path.join(folder, `chain-${depth}-${i}`, 'data'), 'r'),
      ),
      owner: Uint8Array.from({ length: blocks }, () => Math.floor(random() * depth)),
    });
  }
  const iops = new Map<number, number[]>(depths.map((depth) => [depth, []]));
  const target = Buffer.alloc(BLOCK);
  for (let round = 0; round <= rounds; round++) {
    for (const [depth, { fds, owner }] of files) {
      const random = randomOf(round + 1);
      const startMs = performance.now();
      for (let i = 0; i < READS; i++) {
        const block = Math.floor(random() * blocks);
        readSync(fds[owner[block]!]!, target, 0, BLOCK, block * BLOCK);
      }
      if (round > 0) iops.get(depth)!.push((READS / (performance.now() - startMs)) * 1000);
    }
  }
  for (const { fds } of files.values()) for (const fd of fds) closeSync(fd);
  return iops;
}

/** The same through a proxy of its own and the kernel: fio, direct, so that every read reaches the proxy. */
async function mountedRows(folder: string, rounds: number): Promise<Row[]> {
  const blocks = (64 * MIB) / BLOCK;
  const raw = path.join(folder, 'image.raw');
  const fd = openSync(raw, 'w');
  ftruncateSync(fd, blocks * BLOCK);
  closeSync(fd);
  const storeFolder = path.join(folder, 'store');
  await initStore(storeFolder);
  const store = await openStore(storeFolder);
  await importImage(store, { path: raw, reference: 'base:1', format: 'raw' });
  await store.close();
  const mountpoint = path.join(folder, 'mnt');
  await mkdir(mountpoint);
  const { runtime } = await gridvfs<{ runtime: string }>([
    ...['mount', storeFolder, mountpoint, '--name', path.basename(folder).toLowerCase(), '--json'],
    ...['--cache-dir', path.join(folder, 'cache'), '--state-dir', path.join(folder, 'state')],
  ]);
  try {
    const client = new ControlClient(path.join(runtime, 'control.sock'));
    const iops = new Map<number, number[]>();
    for (const depth of [1, 8, 32]) {
      await client.call('POST', '/v1/clones', { image: 'base:1', name: `d${depth}-0` });
      const random = randomOf(depth);
      const owner = Uint8Array.from({ length: blocks }, () => Math.floor(random() * depth));
      for (let i = 0; i < depth; i++) {
        signal.throwIfAborted();
        if (i > 0)
          await client.call('POST', '/v1/clones', { from: `d${depth}-${i - 1}`, name: `d${depth}-${i}` });
        const disk = openSync(path.join(mountpoint, 'clones', `d${depth}-${i}`, 'disk.raw'), 'r+');
        for (let block = 0; block < blocks; block++) {
          if (owner[block] === i) writeSync(disk, Buffer.alloc(BLOCK, block), 0, BLOCK, block * BLOCK);
        }
        closeSync(disk);
      }
      iops.set(depth, []);
    }
    for (let round = 0; round <= rounds; round++) {
      for (const [depth, runs] of iops) {
        const value = await fioIops(path.join(mountpoint, 'clones', `d${depth}-${depth - 1}`, 'disk.raw'));
        if (round > 0) runs.push(value);
      }
    }
    return depthRows('mounted', 'layers', iops);
  } finally {
    await gridvfs(['umount', mountpoint, '--force', '--json']);
  }
}

const FIO_SECONDS = 2;

async function fioIops(file: string): Promise<number> {
  const { stdout } = await promisify(execFile)(
    'fio',
    [
      ...['--name=read', `--filename=${file}`, '--readonly', '--rw=randread', '--bs=4k', '--direct=1'],
      ...['--ioengine=psync', '--time_based', `--runtime=${FIO_SECONDS}`, '--output-format=json'],
    ],
    { signal },
  );
  const { jobs } = JSON.parse(stdout) as { jobs: { read: { iops: number } }[] };
  return jobs[0]!.read.iops;
}

const rssBytes = () => process.memoryUsage.rss();

async function createRows(folder: string, rounds: number): Promise<Row[]> {
  const sizeBytes = 100 * GIB;
  const { clones, digest, close } = await cloneWorld(
    folder,
    (fd) => writeSync(fd, Buffer.alloc(4 * MIB, 7), 0, 4 * MIB, 50 * GIB),
    sizeBytes,
  );
  const times: number[] = [];
  const memory: number[] = [];
  let diskBytes = 0;
  for (let round = 0; round < rounds + 3; round++) {
    signal.throwIfAborted();
    globalThis.gc?.();
    const before = rssBytes();
    const startMs = performance.now();
    const { id } = await clones.create({ image: 'base:1', base: digest, sizeBytes });
    const image = await clones.open(id);
    const ms = performance.now() - startMs;
    if (round >= 3) {
      times.push(ms);
      memory.push(rssBytes() - before);
    }
    diskBytes = Math.max(diskBytes, clones.status(id).allocatedBytes);
    await image.close();
    await clones.remove(id);
  }
  await close();
  return [
    { case: 'create', subject: 'create and open', value: median(times), unit: 'ms', runs: times },
    { case: 'create', subject: 'disk until written', value: diskBytes / KIB, unit: 'KiB' },
    {
      case: 'create',
      subject: 'memory until written',
      value: median(memory) / KIB,
      unit: 'KiB',
      runs: memory,
    },
  ];
}

async function manyRows(folder: string): Promise<Row[]> {
  const sizeBytes = 1 * GIB;
  const { clones, cache, digest, close } = await cloneWorld(
    folder,
    (fd) => writeSync(fd, Buffer.alloc(4 * MIB, 7), 0, 4 * MIB, 0),
    sizeBytes,
  );
  const count = 1000;
  await (await cache.openImage(digest)).close(); // its files stay open in the cache
  const descriptors = readdirSync('/proc/self/fd').length;
  const rows: Row[] = [];
  const step = async (subject: string, work: () => Promise<unknown>) => {
    const startMs = performance.now();
    await work();
    rows.push({ case: 'many', subject, value: performance.now() - startMs, unit: 'ms' });
  };
  const names = Array.from({ length: count }, (_, i) => `c${i}`);
  await step(`create ${count}`, async () => {
    for (const name of names) await clones.create({ image: 'base:1', base: digest, sizeBytes, name });
  });
  await step('open, write 4 KiB, close each', async () => {
    for (const [i, name] of names.entries()) {
      const image = await clones.open(name);
      await image.write(Buffer.alloc(BLOCK, i), i * BLOCK);
      await image.close();
    }
  });
  await step('list', async () => {
    const all = await clones.statuses();
    if (all.length !== count) throw new Error(`${all.length} clones listed`);
  });
  await step('remove all', async () => {
    for (const name of names) {
      signal.throwIfAborted();
      await clones.remove(name);
    }
  });
  const left = readdirSync(path.join(folder, 'state', 'layers')).length;
  const open = readdirSync('/proc/self/fd').length - descriptors;
  await close();
  return [
    ...rows,
    { case: 'many', subject: 'layers left', value: left, unit: '' },
    { case: 'many', subject: 'descriptors left', value: Math.max(0, open), unit: '' },
  ];
}

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '7' },
    only: { type: 'string' },
    folder: { type: 'string', default: os.tmpdir() },
    json: { type: 'string' },
  },
});
const rounds = Number(values.rounds);
const cases: Record<string, (folder: string) => Promise<Row[]>> = {
  mounted: (folder) => mountedRows(folder, rounds),
  chain: (folder) => chainRows(folder, rounds),
  create: (folder) => createRows(folder, rounds),
  many: (folder) => manyRows(folder),
};
try {
  const rows: Row[] = [];
  for (const [name, run] of Object.entries(cases)) {
    if (values.only !== undefined && values.only !== name) continue;
    signal.throwIfAborted();
    const folder = await mkdtemp(path.join(values.folder, 'gridvfs-bench-clone-'));
    try {
      rows.push(...(await run(folder)));
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  }
  await printRows('clone', rows, values.json);
} catch (error) {
  failed('bench/clone.ts', error);
}
