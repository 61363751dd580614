/**
 * `gridvfs bench compare OLD NEW`: two records of one bench, row by row. A verdict only where the difference exceeds the
 * spread: the intervals of both medians (or, of few runs, all their runs) must not touch. Rows with a ratio to a
 * reference of their own run are compared by it, because it does not depend on the machine's speed that day.
 */
import { parseArgs } from 'node:util';
import { table } from '../src/cli/kit.ts';
import { readRecords, writeRecord } from './lib/record.ts';
import type { BenchRecord, Row } from './lib/record.ts';
import { failed } from './lib/scene.ts';
import { medianInterval } from './lib/statistics.ts';

export interface Compared {
  readonly row: string;
  /** What is compared: the ratio, or the value in its unit. */
  readonly by: string;
  readonly old: number;
  readonly new: number;
  readonly change: number;
  readonly verdict: 'better' | 'worse' | 'within the spread' | 'too few runs';
}

/** Fewer runs have no spread worth the name. */
const RUNS_MIN = 3;

const nameOf = (row: Row) =>
  [row.case, row['link'], row.subject, row['workload'], row['jobs'], row['state']]
    .filter((part) => typeof part === 'string' || typeof part === 'number')
    .join(' ');

interface Measure {
  readonly by: string;
  readonly value: number;
  readonly low: number;
  readonly high: number;
  readonly runs: number;
}

function measureOf(row: Row): Measure {
  const runs = row.runs.length;
  const isReference = row.ratio === 1;
  if (row.ratio !== undefined && row.ratioInterval !== undefined && !isReference) {
    const { low, high } = row.ratioInterval;
    return { by: 'ratio', value: row.ratio, low, high, runs };
  }
  const { low, high } = medianInterval(row.runs);
  return { by: row.unit, value: row.value, low, high, runs };
}

/** Smaller is better of seconds and their ratios, larger of rates. */
function verdictOf(old: Measure, now: Measure): Compared['verdict'] {
  if (Math.min(old.runs, now.runs) < RUNS_MIN) return 'too few runs';
  const isRate = /\/s$|^IOPS$/.test(now.by);
  if (now.high < old.low) return isRate ? 'worse' : 'better';
  if (now.low > old.high) return isRate ? 'better' : 'worse';
  return 'within the spread';
}

export function compare(oldRows: readonly Row[], newRows: readonly Row[]): Compared[] {
  const before = new Map(oldRows.map((row) => [nameOf(row), row]));
  return newRows.flatMap((row) => {
    const earlier = before.get(nameOf(row));
    if (!earlier) return [];
    const old = measureOf(earlier);
    const now = measureOf(row);
    if (old.by !== now.by) return [];
    const change = now.value / old.value - 1;
    return [
      { row: nameOf(row), by: now.by, old: old.value, new: now.value, change, verdict: verdictOf(old, now) },
    ];
  });
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    options: { json: { type: 'string' } },
    allowPositionals: true,
  });
  const [oldFile, newFile, ...rest] = positionals;
  if (oldFile === undefined || newFile === undefined || rest.length > 0)
    throw new RangeError('name two records: gridvfs bench compare OLD.json NEW.json');
  const before = new Map(readRecords(oldFile).map((record) => [record.bench, record]));
  const pairs = readRecords(newFile).flatMap((now) => {
    const old = before.get(now.bench);
    return old ? [{ old, now }] : [];
  });
  if (pairs.length === 0)
    throw new RangeError(
      `${oldFile} is of bench ${[...before.keys()].join(', ')}, ${newFile} of another: nothing to compare`,
    );
  const rows = pairs.flatMap(({ old, now }) => {
    if (pairs.length > 1) process.stdout.write(`\n${now.bench}\n`);
    return show(old, now);
  });
  if (values.json !== undefined) await writeRecord(values.json, { schema: 1, bench: 'compare', rows });
}

function show(old: BenchRecord, now: BenchRecord): Compared[] {
  const rows = compare(old.rows, now.rows);
  const text = table(
    ['ROW', 'BY', 'OLD', 'NEW', 'CHANGE', 'VERDICT'],
    rows.map((row) => [
      row.row,
      row.by,
      row.old.toFixed(3),
      row.new.toFixed(3),
      `${row.change > 0 ? '+' : ''}${(100 * row.change).toFixed(1)} %`,
      row.verdict,
    ]),
  );
  process.stdout.write(`${text}\n`);
  for (const fact of ['processor', 'cores', 'kernel', 'accelerator'] as const) {
    if (old.host[fact] !== now.host[fact])
      process.stdout.write(`not the same ${fact}: ${old.host[fact]}, then ${now.host[fact]}\n`);
  }
  if (old.guest?.sha256['disk'] !== now.guest?.sha256['disk']) process.stdout.write('not the same guest\n');
  if (old.links?.emulator !== now.links?.emulator)
    process.stdout.write(`not the same links: ${old.links?.emulator}, then ${now.links?.emulator}\n`);
  return rows;
}

if (import.meta.main) {
  // Whoever reads it has enough.
  process.stdout.on('error', () => process.exit());
  try {
    await main();
  } catch (error) {
    failed('bench compare', error);
  }
}
