/**
 * The record of a bench: `{ schema: 1, bench, command, host, made, rows, promises, … }`. Every figure that is shown
 * anywhere (the README, a report, a comparison) comes from such a file.
 */
import { writeFile } from 'node:fs/promises';
import os from 'node:os';
import { GridError } from '../../src/core/errors.ts';
import { readFileSync } from 'node:fs';
import type { HostFacts } from './facts.ts';
import { say } from './scene.ts';
import type { Scene } from './scene.ts';
import type { Interval } from './statistics.ts';

export interface Row {
  /** What was done: reboot, application, clones… */
  readonly case: string;
  /** By what, from where, in which state. */
  readonly subject: string;
  readonly value: number;
  readonly unit: string;
  /** To the case's reference; absent where there is none. */
  readonly ratio?: number;
  readonly ratioInterval?: Interval;
  readonly runs: readonly number[];
  readonly spread?: { readonly minimum: number; readonly maximum: number };
  readonly [more: string]: unknown;
}

/** What the README promises, with what was measured. */
export interface Promised {
  readonly what: string;
  readonly value: number;
  readonly interval?: Interval;
  readonly bound: number;
  /** 'broken': even the low end of the interval is over the bound. 'missed': the median is. */
  readonly verdict: 'kept' | 'missed' | 'broken';
}

export interface BenchRecord {
  readonly schema: 1;
  readonly bench: string;
  readonly command: string;
  readonly host: HostFacts & { readonly load: number };
  readonly made: string;
  readonly guest?: {
    readonly name: string;
    readonly sha256: Readonly<Record<string, string>>;
    readonly sizeBytes: number;
    readonly nonzeroBytes: number;
    readonly packages?: Readonly<Record<string, string>>;
  };
  readonly links?: { readonly emulator: string; readonly description: string } & Readonly<
    Record<string, unknown>
  >;
  readonly rows: readonly Row[];
  readonly promises: readonly Promised[];
  readonly [more: string]: unknown;
}

/** What every record begins with: the bench, the command without the file that it writes, and when. */
export function headOf(bench: string): Pick<BenchRecord, 'schema' | 'bench' | 'command' | 'made'> {
  const program = ['import', 'pull', 'clone', 'clone-commit'].includes(bench)
    ? `node bench/${bench}.ts`
    : bench === 'fuse'
      ? 'gridvfs bench io --case fuse'
      : process.env['GRIDVFS_BENCH_AS'] === 'demo'
        ? 'gridvfs demo'
        : `gridvfs bench ${bench}`;
  const given = process.argv.slice(2);
  const at = given.indexOf('--json');
  if (at >= 0) given.splice(at, 2);
  return { schema: 1, bench, command: [program, ...given].join(' '), made: new Date().toISOString() };
}

/** What every record of starts says of its scene. */
export function recordOf(
  bench: string,
  scene: Scene,
  links: Readonly<Record<string, unknown>>,
  host: HostFacts,
): Omit<BenchRecord, 'rows' | 'promises'> {
  const { guest, network, nonzeroBytes, measured } = scene;
  return {
    ...headOf(bench),
    host: { ...host, load: os.loadavg()[0]! },
    guest: {
      name: guest.name,
      sha256: guest.sha256,
      sizeBytes: guest.sizeBytes,
      nonzeroBytes,
      packages: guest.packages,
    },
    links: { emulator: network.emulator, description: network.description, ...links, measured },
  };
}

export function promise(what: string, value: number, bound: number, interval?: Interval): Promised {
  // An interval from very few runs says nothing about the median.
  const certain = interval && interval.confidence >= 0.9 ? interval.low : value;
  const verdict = value <= bound ? 'kept' : certain > bound ? 'broken' : 'missed';
  return { what, value, bound, verdict, ...(interval === undefined ? {} : { interval }) };
}

export function printPromises(promises: readonly Promised[]): void {
  for (const { what, value, bound, verdict, interval } of promises) {
    const between =
      interval === undefined ? '' : ` [${interval.low.toFixed(3)}, ${interval.high.toFixed(3)}]`;
    process.stdout.write(
      `${verdict.padEnd(6)}  ${what}: ${value.toFixed(3)}${between} (promised ${bound})\n`,
    );
  }
}

/** For `--check`: a promise that does not hold fails the bench. */
export function check(promises: readonly Promised[]): void {
  const broken = promises.filter(({ verdict }) => verdict === 'broken').map(({ what }) => what);
  if (broken.length > 0) throw new GridError('local-io', `promises broken: ${broken.join('; ')}`);
}

export async function writeRecord(file: string, record: unknown): Promise<void> {
  await writeFile(file, JSON.stringify(record, null, 2) + os.EOL);
  say(`rows written to ${file}`);
}

/** Throws bad-format, naming the file. */
export function readRecord(file: string): BenchRecord {
  return checkedRecord(readJson(file), file);
}

/** For reading alone: the record of a file, or those of the collection that the README is made of, with `runs` in every
 * row. Throws bad-format, naming the file. */
export function readRecords(file: string): BenchRecord[] {
  const raw = readJson(file);
  const { records } = (raw ?? {}) as { records?: Readonly<Record<string, unknown>> };
  return Object.values(records ?? { one: raw }).map((one) => {
    const record = checkedRecord(one, file);
    // Benches in one process have no guest, no links, and call their runs values.
    const rows = record.rows.map((row) => ({ ...row, runs: row.runs ?? row['values'] ?? [] })) as Row[];
    return { ...record, rows };
  });
}

function readJson(file: string): unknown {
  try {
    return JSON.parse(readFileSync(file, 'utf8'));
  } catch (error) {
    const reason = (error as Error).message.replaceAll(/\s+/g, ' ');
    throw new GridError('bad-format', `${file} is no record of a bench: ${reason}`, { cause: error });
  }
}

function checkedRecord(raw: unknown, file: string): BenchRecord {
  const record = raw as Partial<BenchRecord>;
  if (typeof record !== 'object' || record === null || !Array.isArray(record.rows))
    throw new GridError('bad-format', `${file} is no record of a bench: it has no rows`);
  if (record.schema !== 1)
    throw new GridError('newer-format', `${file} has schema ${String(record.schema)}, not 1`);
  return { promises: [], ...record } as BenchRecord;
}
