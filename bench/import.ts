/**
 * `node bench/import.ts`: how long it takes to bring an image into a store, against what people do with the same file
 * today: `qemu-img convert` to a compressed qcow2 (zstd), and `casync make` (content-defined chunks, zstd).
 *
 * Each subject runs as its own process from start to exit, on the same file, interleaved, so that a drift of the
 * machine's speed meets all alike. The source is in the page cache; what earlier runs have written is on the disk
 * before a clock starts. gridvfs is the only one whose result is durable when its clock stops: the others do not
 * flush, and are not made to.
 */
import { spawn } from 'node:child_process';
import { closeSync, openSync, readSync, statSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { bytesText, table } from '../src/cli/kit.ts';
import { MIB } from '../src/core/limits.ts';
import { syncFileSystem } from '../src/core/linux.ts';
import type { ImportResult } from '../src/store/index.ts';
import { buildGuest, guestCacheFolder } from './guest/build.ts';
import type { GuestName } from './guest/build.ts';
import { gridvfs } from './lib/child.ts';
import { hostFacts, median } from './lib/facts.ts';
import { failed } from './lib/scene.ts';
import { headOf } from './lib/record.ts';

const SUBJECTS = ['gridvfs import', 'gridvfs import again', 'qemu-img convert', 'casync make'] as const;
type Subject = (typeof SUBJECTS)[number];
/** What the ratios are to. */
const REFERENCE = 'qemu-img convert' satisfies Subject;

const say = (text: string) => process.stderr.write(`${text}\n`);

function options() {
  const { values } = parseArgs({
    options: {
      image: { type: 'string' },
      guest: { type: 'string', default: 'debian' },
      runs: { type: 'string', default: '5' },
      folder: { type: 'string', default: os.tmpdir() },
      json: { type: 'string' },
    },
  });
  const runs = Number(values.runs);
  if (!Number.isSafeInteger(runs) || runs < 1)
    throw new RangeError(`--runs ${values.runs}: write a whole number of at least 1`);
  const guest = (['small', 'debian'] as const).find((name) => name === values.guest);
  if (guest === undefined) throw new RangeError(`--guest ${values.guest}: write small or debian`);
  return { image: values.image, guest, runs, folder: values.folder, json: values.json };
}

/** Seconds from start to exit; throws with its last words where it fails. */
async function secondsOf(command: string, args: readonly string[]): Promise<number> {
  const startMs = performance.now();
  const child = spawn(command, args, { stdio: ['ignore', 'ignore', 'pipe'] });
  let errors = '';
  child.stderr.on('data', (part: Buffer) => (errors = (errors + part.toString('utf8')).slice(-4000)));
  const code = await new Promise<number | string>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (exit, signal) => resolve(exit ?? signal ?? 'unknown'));
  });
  if (code !== 0) throw new Error(`${command} failed (${code}): ${errors.trim().split('\n').at(-1) ?? ''}`);
  return (performance.now() - startMs) / 1000;
}

/** The file into the page cache; its dirty neighbours out of the way. */
function warm(file: string, folder: string): void {
  const buffer = Buffer.alloc(4 * MIB);
  const fd = openSync(file, 'r');
  while (readSync(fd, buffer, 0, buffer.length, null) > 0);
  closeSync(fd);
  const folderFd = openSync(folder, 'r');
  syncFileSystem(folderFd);
  closeSync(folderFd);
}

/** One run of one subject; `place` is a folder for what it makes. */
async function run(subject: Subject, image: string, place: string, store: string) {
  if (subject === 'qemu-img convert') {
    const args = ['convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', 'compression_type=zstd'];
    return { seconds: await secondsOf('qemu-img', [...args, image, path.join(place, 'out.qcow2')]) };
  }
  if (subject === 'casync make') {
    const args = ['make', '--compression=zstd', `--store=${path.join(place, 'casync')}`];
    return { seconds: await secondsOf('casync', [...args, path.join(place, 'image.caibx'), image]) };
  }
  const startMs = performance.now();
  const args = ['store', 'import', store, image, 'image:1', '--format', 'raw', '--replace', '--json'];
  const result = await gridvfs<ImportResult>(args);
  return { seconds: (performance.now() - startMs) / 1000, result };
}

async function guestDisk(guest: GuestName): Promise<string> {
  const folder = path.join(guestCacheFolder(), guest);
  return (await buildGuest({ guest, folder, progress: say })).disk;
}

async function main(): Promise<void> {
  const settings = options();
  for (const [program, install] of [
    ['qemu-img', 'qemu-utils'],
    ['casync', 'casync'],
  ] as const) {
    await secondsOf(program, ['--version']).catch((cause: unknown) => {
      throw new Error(`${program} is not here: apt-get install ${install}`, { cause });
    });
  }
  const image = settings.image ?? (await guestDisk(settings.guest));
  const folder = await mkdtemp(path.join(settings.folder, 'gridvfs-bench-import-'));
  const seconds = new Map<Subject, number[]>(SUBJECTS.map((subject) => [subject, []]));
  let first: ImportResult | undefined;
  let again: ImportResult | undefined;
  try {
    for (let round = 1; round <= settings.runs; round++) {
      const store = path.join(folder, `store-${round}`);
      await secondsOf(process.execPath, [
        path.resolve(import.meta.dirname, '../src/main.ts'),
        ...['store', 'init', store],
      ]);
      for (const subject of SUBJECTS) {
        const place = path.join(folder, 'out');
        await mkdir(place);
        warm(image, folder);
        const one = await run(subject, image, place, store);
        await rm(place, { recursive: true });
        seconds.get(subject)!.push(one.seconds);
        if (subject === 'gridvfs import') first = one.result;
        if (subject === 'gridvfs import again') again = one.result;
        say(`[${round}/${settings.runs}] ${subject.padEnd(22)} ${one.seconds.toFixed(2)} s`);
      }
      await rm(store, { recursive: true });
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
  const reference = median(seconds.get(REFERENCE)!);
  const rows = SUBJECTS.map((subject) => {
    const runs = seconds.get(subject)!;
    return {
      case: 'import',
      subject,
      value: median(runs),
      unit: 's',
      ratio: median(runs) / reference,
      runs,
      spread: { minimum: Math.min(...runs), maximum: Math.max(...runs) },
      pageCache: 'warm',
      ...(subject === 'gridvfs import'
        ? { newChunks: first!.newChunks, storedBytes: first!.newStoredBytes }
        : {}),
      ...(subject === 'gridvfs import again' ? { newChunks: again!.newChunks } : {}),
    };
  });
  process.stdout.write(
    `\n${table(
      ['SUBJECT', 'SECONDS', 'MIN', 'MAX', 'RUNS', 'RATIO', 'NEW CHUNKS'],
      rows.map((row) => [
        row.subject,
        row.value.toFixed(2),
        row.spread.minimum.toFixed(2),
        row.spread.maximum.toFixed(2),
        row.runs.length,
        row.ratio.toFixed(2),
        row.newChunks ?? '-',
      ]),
    )}\n\n${path.basename(image)}: ${bytesText(statSync(image).size)}, ${bytesText(first!.nonzeroBytes)} of it data; ` +
      `casync ÷ gridvfs: ${(rows[3]!.value / rows[0]!.value).toFixed(1)}\n`,
  );
  if (settings.json !== undefined) {
    const record = {
      ...headOf('import'),
      host: hostFacts('none'),
      image: { name: path.basename(image), sizeBytes: first!.sizeBytes, nonzeroBytes: first!.nonzeroBytes },
      rows,
    };
    await writeFile(settings.json, JSON.stringify(record, null, 2) + os.EOL);
    say(`rows written to ${settings.json}`);
  }
}

try {
  await main();
} catch (error) {
  failed('bench import', error);
}
