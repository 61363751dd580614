/**
 * `gridvfs bench io --case fuse`: the mount beside the file beneath it, in one run, interleaved, medians.
 *
 * Image (read-only, all of it on this host): the file itself, passthrough, served by workers, fuse-native. Everybody
 * has the file beneath in the page cache. File and passthrough are then read as they are (they share those pages);
 * for served and fuse-native the mount's own pages are dropped first, so that each read is a request. No block is
 * read twice in a round, or the kernel's pages would answer.
 * There are two of fuse-native: `fuse-native` is our own driver over that package, whose reads are synchronous;
 * `plain fuse-native` is what the package's README shows, which is what a user of it has (bench/lib/plain-fuse-native.ts).
 * Clone (4 KiB direct reads and writes, 1 MiB writes): ours, and qemu-storage-daemon's FUSE export of a qcow2 overlay
 * over the same file. `first` writes go to a fresh clone and a fresh overlay each round, so both allocate; the others
 * to one that has data everywhere. `file` among these is a plain file beside them, written through the page cache as both
 * daemons write theirs: what nobody can exceed. `ratios` are to the file for passthrough and to the peers for the others.
 *
 * Before each run as much memory as the run can use is touched and freed: on a virtual host the first use of a page
 * that the host took back costs more than any of what is measured here.
 */
import { execFile, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync, statSync, writeFileSync, writeSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs, promisify } from 'node:util';
import { randomFillSync } from 'node:crypto';
import { table } from '../src/cli/kit.ts';
import { KIB, MIB } from '../src/core/limits.ts';
import { startService } from './lib/child.ts';
import { hostFacts, median } from './lib/facts.ts';
import { headOf } from './lib/record.ts';
import { abortOnSignals, failed, say } from './lib/scene.ts';

/** Ends what runs, and then all that was mounted for it. */
const signal = abortOnSignals();
const run = (program: string, args: readonly string[], options: { cwd?: string; maxBuffer?: number } = {}) =>
  promisify(execFile)(program, args, { ...options, signal });

interface Workload {
  readonly name: string;
  readonly rw: 'read' | 'write' | 'randread' | 'randwrite';
  readonly blockBytes: number;
  readonly jobs: number;
  readonly direct: boolean;
}

const IMAGE_WORKLOADS: readonly Workload[] = [
  { name: 'sequential 1 MiB', rw: 'read', blockBytes: MIB, jobs: 1, direct: false },
  { name: 'random 4 KiB', rw: 'randread', blockBytes: 4 * KIB, jobs: 1, direct: false },
  { name: 'random 4 KiB', rw: 'randread', blockBytes: 4 * KIB, jobs: 4, direct: false },
];
const CLONE_WORKLOADS: readonly Workload[] = [
  { name: 'sequential 1 MiB write', rw: 'write', blockBytes: MIB, jobs: 1, direct: true },
  { name: 'random 4 KiB read, direct', rw: 'randread', blockBytes: 4 * KIB, jobs: 1, direct: true },
  { name: 'random 4 KiB write, direct', rw: 'randwrite', blockBytes: 4 * KIB, jobs: 1, direct: true },
  { name: 'random 4 KiB read, direct', rw: 'randread', blockBytes: 4 * KIB, jobs: 4, direct: true },
];
const CEILING_WORKLOADS: readonly Workload[] = [
  { name: 'sequential 1 MiB write', rw: 'write', blockBytes: MIB, jobs: 1, direct: false },
];
const FRESH_WORKLOADS: readonly Workload[] = [
  { name: 'sequential 1 MiB write, first', rw: 'write', blockBytes: MIB, jobs: 1, direct: true },
];

interface Subject {
  readonly name:
    'file' | 'passthrough' | 'served' | 'fuse-native' | 'plain fuse-native' | 'clone' | 'qemu-storage-daemon';
  readonly file: string;
  /** A file of each round's own that nothing was written to; `file` is not used then. */
  readonly freshFile?: (round: number) => string;
  /** Drop the pages of the mount, and of nothing else, before each round. */
  readonly dropsPages: boolean;
  readonly workloads: readonly Workload[];
}

function options() {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string', default: '3' },
      seconds: { type: 'string', default: '2' },
      'size-mib': { type: 'string', default: '2048' },
      workers: { type: 'string' },
      json: { type: 'string' },
    },
  });
  const count = (name: 'runs' | 'seconds' | 'size-mib') => {
    const value = Number(values[name]);
    if (!Number.isSafeInteger(value) || value < 1)
      throw new RangeError(`--${name} ${values[name]}: write a whole number of at least 1`);
    return value;
  };
  return {
    values,
    settings: { runs: count('runs'), seconds: count('seconds'), sizeBytes: count('size-mib') * MIB },
  };
}

const { values, settings } = (() => {
  try {
    return options();
  } catch (error) {
    failed('bench io --case fuse', error);
    return process.exit();
  }
})();

/** One run of fio: MiB/s for large blocks, operations a second for small ones. */
async function fio(subject: Subject, workload: Workload, folder: string, round: number): Promise<number> {
  const file = subject.freshFile?.(round) ?? subject.file;
  // What the runs before have left to be written would be written during this one.
  if (workload.rw.endsWith('write')) await run('sync', [folder, '--file-system']);
  await run(process.execPath, ['-e', `Buffer.alloc(${settings.sizeBytes}, 1)`]);
  const share = Math.floor(settings.sizeBytes / workload.jobs / MIB) * MIB;
  const args = [
    ...['--name=bench', '--ioengine=psync', '--output-format=json', '--thread', '--group_reporting'],
    ...[`--filename=${file}`, `--rw=${workload.rw}`, `--bs=${workload.blockBytes}`],
    ...[`--numjobs=${workload.jobs}`, `--size=${share}`, `--offset_increment=${share}`],
    ...[`--runtime=${settings.seconds}`, `--direct=${workload.direct ? 1 : 0}`],
    ...[`--invalidate=${subject.dropsPages ? 1 : 0}`, '--fallocate=none', '--randrepeat=0'],
    // Where a block may be used twice; a run that ends with the file can be shorter than its own beginning.
    ...(!subject.dropsPages || (workload.direct && !subject.freshFile) ? ['--time_based'] : []),
  ];
  const { stdout } = await run('fio', args, { cwd: folder, maxBuffer: 16 * MIB });
  const { jobs } = JSON.parse(stdout.slice(stdout.indexOf('{'))) as {
    jobs: { read: { iops: number; bw_bytes: number }; write: { iops: number; bw_bytes: number } }[];
  };
  const side = workload.rw.endsWith('read') ? 'read' : 'write';
  const result = jobs[0]![side];
  return workload.blockBytes >= MIB ? result.bw_bytes / MIB : result.iops;
}

function makeFile(file: string): void {
  const block = randomFillSync(Buffer.alloc(16 * MIB));
  const fd = openSync(file, 'w');
  for (let at = 0; at < settings.sizeBytes; at += block.length) writeSync(fd, block, 0, block.length, at);
  closeSync(fd);
}

/** Both clones hold data everywhere before they are measured: a first write allocates, on either side. */
async function fill(file: string): Promise<void> {
  await run('dd', [
    'if=/dev/zero',
    `of=${file}`,
    'bs=1M',
    `count=${settings.sizeBytes / MIB}`,
    'conv=notrunc',
  ]);
}

async function subjects(stack: AsyncDisposableStack, folder: string): Promise<Subject[]> {
  const raw = path.join(folder, 'image.raw');
  say(`making an image of ${settings.sizeBytes / MIB} MiB`);
  makeFile(raw);
  const mounted = async (name: string, options: object): Promise<string> => {
    const mountpoint = path.join(folder, name);
    await mkdir(mountpoint);
    const workers = values.workers === undefined ? {} : { workers: Number(values.workers) };
    const service = await startService('bench/lib/fuse-mount.ts', [
      ...[mountpoint, raw, `${mountpoint}.layer`, String(settings.runs)],
      JSON.stringify({ ...workers, ...options }),
    ]);
    stack.defer(() => service.stop());
    return mountpoint;
  };
  const passthrough = await mounted('passthrough', {});
  const served = await mounted('served', { passthrough: false });
  const native = await mounted('native', { driver: 'fuse-native' }).catch((error: unknown) => {
    say(`fuse-native is left out: ${String(error)}`);
    return undefined;
  });
  const plain = path.join(folder, 'plain');
  if (native !== undefined) {
    await mkdir(plain);
    const service = await startService('bench/lib/plain-fuse-native.ts', [plain, raw]);
    stack.defer(() => service.stop());
  }
  const qemu = await exportOverlay(stack, folder, raw, 'overlay');
  const freshQemu: string[] = [];
  for (let round = 1; round <= settings.runs; round++)
    freshQemu.push(await exportOverlay(stack, folder, raw, `fresh-${round}`));
  const clone = path.join(served, 'clone');
  say('filling the clones');
  await fill(clone);
  await fill(qemu);
  const written = path.join(folder, 'written.raw');
  await fill(written);
  const image = { workloads: IMAGE_WORKLOADS };
  return [
    { name: 'file', file: raw, dropsPages: false, ...image },
    { name: 'passthrough', file: path.join(passthrough, 'image'), dropsPages: false, ...image },
    { name: 'served', file: path.join(served, 'image'), dropsPages: true, ...image },
    ...(native === undefined
      ? []
      : (['fuse-native', 'plain fuse-native'] as const).map((name) => ({
          name,
          file: path.join(name === 'fuse-native' ? native : plain, 'image'),
          dropsPages: true,
          ...image,
        }))),
    { name: 'file', file: written, dropsPages: false, workloads: CEILING_WORKLOADS },
    { name: 'clone', file: clone, dropsPages: true, workloads: CLONE_WORKLOADS },
    { name: 'qemu-storage-daemon', file: qemu, dropsPages: true, workloads: CLONE_WORKLOADS },
    {
      name: 'clone',
      file: '',
      freshFile: (round) => path.join(served, `fresh-${round}`),
      dropsPages: true,
      workloads: FRESH_WORKLOADS,
    },
    {
      name: 'qemu-storage-daemon',
      file: '',
      freshFile: (round) => freshQemu[round - 1]!,
      dropsPages: true,
      workloads: FRESH_WORKLOADS,
    },
  ];
}

async function exportOverlay(
  stack: AsyncDisposableStack,
  folder: string,
  raw: string,
  name: string,
): Promise<string> {
  const overlay = path.join(folder, `${name}.qcow2`);
  const file = path.join(folder, `${name}.raw`);
  await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', raw, '-F', 'raw', overlay]);
  writeFileSync(file, '');
  const daemon = spawn(
    'qemu-storage-daemon',
    [
      ...['--blockdev', `driver=file,node-name=file,filename=${overlay}`],
      ...['--blockdev', 'driver=qcow2,node-name=disk,file=file'],
      ...['--export', `type=fuse,id=export,node-name=disk,mountpoint=${file},writable=on`],
    ],
    { stdio: ['ignore', 'inherit', 'inherit'] },
  );
  const ended = once(daemon, 'exit');
  stack.defer(async () => {
    daemon.kill('SIGTERM');
    await ended;
  });
  for (let i = 0; i < 100; i++) {
    if ((await run('stat', ['-c', '%s', file])).stdout.trim() === String(settings.sizeBytes)) return file;
    await sleep(50);
  }
  throw new Error('qemu-storage-daemon did not export its overlay');
}

interface Row {
  readonly case: 'fuse';
  readonly subject: Subject['name'];
  readonly workload: string;
  readonly jobs: number;
  readonly value: number;
  readonly unit: 'MiB/s' | 'IOPS';
  readonly values: readonly number[];
  /** By subject. */
  readonly ratios?: Readonly<Partial<Record<Subject['name'], number>>>;
}

function rowsOf(all: readonly Subject[], measured: Map<string, number[]>): Row[] {
  const key = (subject: string, { name, jobs }: Workload) => `${subject}/${name}/${jobs}`;
  const peers: Partial<Record<Subject['name'], readonly Subject['name'][]>> = {
    passthrough: ['file'],
    served: ['fuse-native', 'plain fuse-native'],
    clone: ['qemu-storage-daemon', 'file'],
  };
  return all.flatMap((subject) =>
    subject.workloads.map((workload): Row => {
      const found = measured.get(key(subject.name, workload))!;
      const ratios = (peers[subject.name] ?? []).flatMap((peer) => {
        const against = measured.get(key(peer, workload));
        return against ? [[peer, median(found) / median(against)]] : [];
      });
      return {
        case: 'fuse',
        subject: subject.name,
        workload: workload.name,
        jobs: workload.jobs,
        value: median(found),
        unit: workload.blockBytes >= MIB ? 'MiB/s' : 'IOPS',
        values: found,
        ...(ratios.length === 0 ? {} : { ratios: Object.fromEntries(ratios) as Row['ratios'] & {} }),
      };
    }),
  );
}

async function main(): Promise<void> {
  for (const tool of ['fio', 'qemu-img', 'qemu-storage-daemon']) {
    if (spawnSync(tool, ['--version']).error)
      throw new Error(`${tool} is missing: apt-get install fio qemu-utils`);
  }
  await using stack = new AsyncDisposableStack();
  const folder = await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'gridvfs-bench-'));
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const all = await subjects(stack, folder);
  const measured = new Map<string, number[]>();
  for (let round = 1; round <= settings.runs; round++) {
    say(`round ${round} of ${settings.runs}`);
    for (const workload of [
      ...IMAGE_WORKLOADS,
      ...CEILING_WORKLOADS,
      ...CLONE_WORKLOADS,
      ...FRESH_WORKLOADS,
    ]) {
      for (const subject of all.filter(({ workloads }) => workloads.includes(workload))) {
        const key = `${subject.name}/${workload.name}/${workload.jobs}`;
        measured.set(key, [...(measured.get(key) ?? []), await fio(subject, workload, folder, round)]);
      }
    }
  }
  const rows = rowsOf(all, measured);
  process.stdout.write(
    table(
      ['SUBJECT', 'WORKLOAD', 'JOBS', 'MEDIAN', 'UNIT', 'RATIO TO'],
      rows.map((row) => [
        ...[row.subject, row.workload, row.jobs, Math.round(row.value), row.unit],
        Object.entries(row.ratios ?? {})
          .map(([peer, ratio]) => `${ratio.toFixed(2)} ${peer}`)
          .join(', '),
      ]),
    ) + '\n',
  );
  if (values.json !== undefined) {
    const facts = { ...hostFacts('none'), imageBytes: statSync(path.join(folder, 'image.raw')).size };
    writeFileSync(values.json, JSON.stringify({ ...headOf('fuse'), host: facts, rows }, null, 2) + '\n');
  }
}

try {
  await main();
} catch (error) {
  failed('bench io --case fuse', error);
}
