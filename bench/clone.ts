/**
 * `node bench/clone.ts`: what clones cost, each case against what its promise names:
 *   mounted  4 KiB random reads (fio, direct) of a clone over 1, 8 and 32 layers through the mount: a read must not
 *            pay for depth
 *   chain    the same within one process, and beside it pread(2) alone from as many files: what is left of the
 *            difference is the page cache's, which finds pages of one file sooner than of many
 *   create   create and open a clone of a sparse 100 GiB image: time, disk, memory
 *   many     a thousand clones of one image: create, one write each, list, remove
 *   commit   changed blocks of a 10 GiB image as a new version, against importing that disk whole
 *
 * In one process with the real parts (layers, agent, store), page cache warm, rounds interleaved: what is compared
 * is our code, not the disk. `--commit-size` sets the size of the committed image.
 */
import { execFile } from 'node:child_process';
import { closeSync, ftruncateSync, openSync, readdirSync, readSync, statSync, writeSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs, promisify } from 'node:util';
import { openCache } from '../cache/index.ts';
import { ControlClient } from '../src/agent/client.ts';
import { Clones } from '../src/agent/clones.ts';
import { cloneParts } from '../src/cli/clone-parts.ts';
import { parseBytes, table } from '../src/cli/kit.ts';
import { DirectFile } from '../src/core/direct-io.ts';
import { GIB, KIB, LAYER_BLOCK_BYTES, MIB } from '../src/core/limits.ts';
import { syncFileSystem } from '../src/core/linux.ts';
import {
  blockChangeOf,
  changedUnits,
  createLayerOver,
  openChain,
  openClone,
  zeroImage,
} from '../src/image/index.ts';
import type { Clone } from '../src/image/index.ts';
import { commitImage, importImage, initStore, openStore } from '../src/store/index.ts';
import type { Store } from '../src/store/index.ts';
import { gridvfs } from './lib/child.ts';
import { hostFacts, median } from './lib/facts.ts';

interface Row {
  readonly case: 'mounted' | 'chain' | 'create' | 'many' | 'commit';
  readonly subject: string;
  readonly value: number;
  readonly unit: string;
  /** To the case's first row, or to what the subject names. */
  readonly ratio?: number;
  readonly runs?: readonly number[];
}

const BASE = '5'.repeat(64);
/** Per round. */
const READS = 200_000;
const BLOCK = LAYER_BLOCK_BYTES;
const say = (text: string) => process.stderr.write(`${text}\n`);

/** Seeded: xorshift32, in [0, 1). */
function randomOf(seed: number): () => number {
  let state = (seed * 2654435761) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state / 2 ** 32;
  };
}

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
  const { stdout } = await promisify(execFile)('fio', [
    ...['--name=read', `--filename=${file}`, '--readonly', '--rw=randread', '--bs=4k', '--direct=1'],
    ...['--ioengine=psync', '--time_based', `--runtime=${FIO_SECONDS}`, '--output-format=json'],
  ]);
  const { jobs } = JSON.parse(stdout) as { jobs: { read: { iops: number } }[] };
  return jobs[0]!.read.iops;
}

/** A store with one image of `sizeBytes`, a cache over it and clones over that, as a proxy has them. */
async function world(folder: string, fill: (fd: number) => void, sizeBytes: number) {
  const raw = path.join(folder, 'image.raw');
  const fd = openSync(raw, 'w');
  ftruncateSync(fd, sizeBytes);
  fill(fd);
  closeSync(fd);
  const storeFolder = path.join(folder, 'store');
  await initStore(storeFolder);
  const store = await openStore(storeFolder);
  const startMs = performance.now();
  const { digest } = await importImage(store, { path: raw, reference: 'base:1', format: 'raw' });
  const importMs = performance.now() - startMs;
  const cache = await openCache({ folder: path.join(folder, 'cache'), source: store });
  const clones = await Clones.load(path.join(folder, 'state'), cloneParts(cache), say);
  return {
    raw,
    store,
    cache,
    clones,
    digest,
    importMs,
    close: async () => {
      await clones.close();
      await cache.close();
      await store.close();
    },
  };
}

const rssBytes = () => process.memoryUsage.rss();

async function createRows(folder: string, rounds: number): Promise<Row[]> {
  const sizeBytes = 100 * GIB;
  const { clones, digest, close } = await world(
    folder,
    (fd) => writeSync(fd, Buffer.alloc(4 * MIB, 7), 0, 4 * MIB, 50 * GIB),
    sizeBytes,
  );
  const times: number[] = [];
  const memory: number[] = [];
  let diskBytes = 0;
  for (let round = 0; round < rounds + 3; round++) {
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
  const { clones, cache, digest, close } = await world(
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
    for (const name of names) await clones.remove(name);
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

async function commitRows(folder: string, sizeBytes: number): Promise<Row[]> {
  say(`importing ${sizeBytes / GIB} GiB`);
  const { store, cache, digest, importMs, raw, close } = await world(
    folder,
    (fd) => fillData(fd, sizeBytes),
    sizeBytes,
  );
  const rows: Row[] = [
    { case: 'commit', subject: 'import of the whole image', value: importMs / 1000, unit: 's', ratio: 1 },
  ];
  // 1 % of the blocks each time, in runs as long as writes of a file system, of files, or single blocks.
  for (const runBytes of [1 * MIB, 256 * KIB, 64 * KIB, 4 * KIB]) {
    const layer = path.join(folder, `layer-${runBytes}`);
    await createLayerOver(layer, { base: digest, layers: [] }, sizeBytes);
    const clone = openClone(
      await cache.openImage(digest),
      await openChain({ base: digest, layers: [layer] }),
    );
    const random = randomOf(runBytes);
    for (let done = 0; done < sizeBytes / 100; done += runBytes) {
      const bytes = Buffer.alloc(runBytes);
      for (let i = 0; i < runBytes; i += 4) bytes.writeUInt32LE(Math.floor(random() * 2 ** 16), i);
      await clone.write(bytes, Math.floor((random() * sizeBytes) / runBytes) * runBytes);
    }
    await clone.flush();
    const seconds = await commitOnce(store, clone, digest, `base:run-${runBytes / KIB}k`);
    await clone.close();
    rows.push(
      {
        case: 'commit',
        subject: `commit, 1 % in runs of ${runBytes / KIB} KiB`,
        value: seconds.seconds,
        unit: 's',
        ratio: (1000 * seconds.seconds) / importMs,
      },
      { case: 'commit', subject: '  chunks changed', value: seconds.changed, unit: '' },
      { case: 'commit', subject: '  chunks stored', value: seconds.stored, unit: '' },
    );
  }
  await close();
  if (statSync(raw).size !== sizeBytes) throw new Error('the image changed');
  return rows;
}

async function commitOnce(store: Store, clone: Clone, parent: string, reference: string) {
  syncFileSystem(clone.direct.layer!.dataFd); // what was written before is not waited for within the time
  const startMs = performance.now();
  const { changedChunks, newChunks } = await commitImage(store, {
    parent,
    reference,
    sizeBytes: clone.sizeBytes,
    changed: (chunkBytes) => changedUnits(clone, chunkBytes),
    isChanged: blockChangeOf(clone),
    read: (target, offsetBytes) => clone.read(target, offsetBytes),
  });
  return { seconds: (performance.now() - startMs) / 1000, changed: changedChunks, stored: newChunks };
}

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '7' },
    'commit-size': { type: 'string', default: '10G' },
    only: { type: 'string' },
    folder: { type: 'string', default: os.tmpdir() },
    json: { type: 'string' },
  },
});
const rounds = Number(values.rounds);
const cases: Record<Row['case'], (folder: string) => Promise<Row[]>> = {
  mounted: (folder) => mountedRows(folder, rounds),
  chain: (folder) => chainRows(folder, rounds),
  create: (folder) => createRows(folder, rounds),
  many: (folder) => manyRows(folder),
  commit: (folder) => commitRows(folder, parseBytes(values['commit-size'])),
};
const rows: Row[] = [];
for (const [name, run] of Object.entries(cases)) {
  if (values.only !== undefined && values.only !== name) continue;
  const folder = await mkdtemp(path.join(values.folder, 'gridvfs-bench-clone-'));
  try {
    rows.push(...(await run(folder)));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
process.stdout.write(
  table(
    ['CASE', 'SUBJECT', 'VALUE', 'UNIT', 'RATIO'],
    rows.map((row) => [
      row.case,
      row.subject,
      row.value.toFixed(row.value < 100 ? 2 : 0),
      row.unit,
      row.ratio === undefined ? '-' : row.ratio.toFixed(3),
    ]),
  ) + '\n',
);
if (values.json !== undefined) {
  const record = { schema: 1, host: hostFacts('none'), made: new Date().toISOString(), rows };
  await writeFile(values.json, JSON.stringify(record, null, 2) + os.EOL);
}
