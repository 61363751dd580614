/**
 * The performance section of the README, and nothing else makes it: `node bench/readme.ts RECORD…` puts the records that
 * benches wrote with --json into bench/results/performance.json (a record of the same bench takes the place of an older
 * one) and writes the section anew; without arguments it only writes the section. A test holds README and file together.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { bytesText } from '../src/cli/kit.ts';
import { readRecord } from './lib/record.ts';
import type { BenchRecord, Row } from './lib/record.ts';
import { failed, say } from './lib/scene.ts';

const ROOT = path.resolve(import.meta.dirname, '..');
export const RESULTS_FILE = path.join(ROOT, 'bench', 'results', 'performance.json');
const README = path.join(ROOT, 'README.md');
export const BEGIN = '<!-- performance:begin -->';
export const END = '<!-- performance:end -->';

/** What makes a record long and no sentence of the README needs. */
const LEFT_OUT = new Set(['series', 'heat', 'packages', 'commands', 'phases', 'guestOfRow', 'measured']);

type Cell = (row: Row) => string;

interface Section {
  readonly title: string;
  /** What the columns mean. */
  readonly words: string;
  readonly wanted?: (row: Row) => boolean;
  readonly columns: Readonly<Record<string, Cell>>;
}

const text = (value: unknown): string =>
  value === undefined || value === null ? '–' : typeof value === 'string' ? value : JSON.stringify(value);
const field =
  (name: string): Cell =>
  (row) =>
    text(row[name]);
const bytes =
  (name: string): Cell =>
  (row) =>
    typeof row[name] === 'number' ? bytesText(row[name]) : '–';
const value: Cell = (row) =>
  row.unit === 's' ? `${row.value.toFixed(2)} s` : `${Number(row.value.toPrecision(3))} ${row.unit}`;
const spread: Cell = (row) => {
  const low = row.spread?.minimum ?? Math.min(...(row.runs ?? []));
  const high = row.spread?.maximum ?? Math.max(...(row.runs ?? []));
  return Number.isFinite(low) && Number.isFinite(high) && (row.runs?.length ?? 0) > 1
    ? `${low.toFixed(2)}–${high.toFixed(2)} (${row.runs.length})`
    : '–';
};
const ratio: Cell = (row) => (row.ratio === undefined ? '–' : row.ratio.toFixed(3));
const founding: Cell = (row) => (row['founding'] as { ratio: number } | undefined)?.ratio.toFixed(2) ?? '–';
const ratios: Cell = (row) =>
  Object.entries((row['ratios'] as Record<string, number> | undefined) ?? {})
    .map(([to, by]) => `${by.toFixed(2)} × ${to}`)
    .join(', ') || '–';

/** In the README's order. */
export const SECTIONS: Readonly<Record<string, Section>> = {
  instantiate: {
    title: 'Cold and warm starts',
    words:
      'Seconds from the request until the guest answers; ratio to local; in 2003: the ratio of the table that founded the field. A cold resume has the working set that the publication of its checkpoint left at the origin; with `profile`, the one that another cold resume left; with `unknown`, none. A cold reboot has one with `profile` alone.',
    columns: {
      what: (row) => row.case,
      from: field('subject'),
      median: value,
      'min–max (runs)': spread,
      ratio,
      'in 2003': founding,
      'over the link': bytes('linkBytes'),
      chunks: field('chunksFetched'),
    },
  },
  peers: {
    title: 'The same starts through others',
    words:
      'Ratio to gridvfs in the same state on the same link: above 1 the other one is slower, below 1 it is ahead. Where others are ahead, it is warm with a copy of the whole on this disk, or over a link that carries what is not compressed in no time worth naming.',
    columns: {
      link: field('link'),
      state: field('state'),
      through: field('subject'),
      median: value,
      'min–max (runs)': spread,
      ratio,
      'over the link': bytes('linkBytes'),
    },
  },
  io: {
    title: 'A recorded boot, replayed at full speed',
    words:
      'No guest in the way. Ratio to the limit: compressed bytes of the touched chunks ÷ bandwidth + two round trips.',
    columns: {
      link: field('link'),
      subject: field('subject'),
      median: value,
      'min–max (runs)': spread,
      'to the limit': ratio,
      'over the link': bytes('linkBytes'),
    },
  },
  scale: {
    title: 'Many at once',
    words: 'Seconds until the last guest answers; all of them share this one machine.',
    columns: {
      'at once': field('subject'),
      'last ready': value,
      'from the origin': bytes('originBytes'),
      'to one': (row) => Number(row['originBytesRatio']).toFixed(3),
    },
  },
  'clone-commit': {
    title: 'A new version of an image, made of a clone',
    words:
      'One per cent of the 4 KiB blocks of 10 GiB, all of them data, differently spread. Ratio to importing the whole image.',
    wanted: (row) => row.ratio !== undefined,
    columns: { what: field('subject'), time: value, ratio },
  },
  pull: {
    title: 'A whole image, a fat link, demand beside prefetch',
    words: 'What the ratio is to stands in the first column.',
    columns: { case: field('case'), subject: field('subject'), median: value, ratio },
  },
  import: {
    title: 'Bringing an image in',
    words: 'Ratio to qemu-img convert with zstd.',
    columns: { subject: field('subject'), median: value, 'min–max (runs)': spread, ratio },
  },
  fuse: {
    title: 'The mount itself',
    words: 'fio; what the kernel has in its pages is dropped before each run.',
    wanted: (row) => row.unit !== undefined,
    columns: {
      subject: field('subject'),
      workload: field('workload'),
      jobs: field('jobs'),
      median: value,
      ratio: ratios,
    },
  },
};

interface Results {
  readonly schema: 1;
  readonly records: Readonly<Record<string, BenchRecord>>;
}

export function readResults(): Results {
  return JSON.parse(readFileSync(RESULTS_FILE, 'utf8')) as Results;
}

function tableOf(rows: readonly Row[], columns: Section['columns']): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const heads = Object.keys(columns);
  return [
    line(heads),
    line(heads.map(() => '---')),
    ...rows.map((row) => line(Object.values(columns).map((cell) => cell(row).replaceAll('|', '\\|')))),
  ].join('\n');
}

/** The section between the README's two marks. */
export function performanceSection({ records }: Results): string {
  const parts = Object.entries(SECTIONS).flatMap(([name, section]) => {
    const record = records[name];
    if (!record) return [];
    const { host, guest, links } = record;
    const facts = [
      `made ${record.made.slice(0, 10)} on ${host.processor}, ${host.cores} processors, Linux ${host.kernel}, Node ${host.node}, ${host.accelerator === 'none' ? 'no guest' : `QEMU with ${host.accelerator}`}`,
      guest && `guest ${guest.name}, ${bytesText(guest.nonzeroBytes)} of data`,
      links?.description,
    ].filter((fact) => fact !== undefined);
    const promises = (record.promises ?? []).map((each) => {
      const kept = each.verdict ?? (each.value <= each.bound ? 'kept' : 'missed');
      return `* ${each.what}: ${each.value.toFixed(3)}, promised ${each.bound}: ${kept}`;
    });
    const ahead = ((record['ahead'] as string[] | undefined) ?? []).map((words) => `* ${words}`);
    return [
      `### ${section.title}`,
      `\`${record.command}\`: ${facts.join('; ')}. ${section.words}`,
      tableOf(record.rows.filter(section.wanted ?? (() => true)), section.columns),
      ...(promises.length > 0 ? [promises.join('\n')] : []),
      ...(ahead.length > 0 ? [`Where another is ahead:\n\n${ahead.join('\n')}`] : []),
    ];
  });
  return parts.join('\n\n');
}

function slim(_key: string, entry: unknown): unknown {
  return LEFT_OUT.has(_key)
    ? undefined
    : typeof entry === 'number' && !Number.isInteger(entry)
      ? Number(entry.toPrecision(6))
      : entry;
}

function main(files: readonly string[]): void {
  const records: Record<string, unknown> = {};
  try {
    Object.assign(records, readResults().records);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  for (const file of files) {
    const record = readRecord(file);
    if (!(record.bench in SECTIONS))
      throw new RangeError(
        `${file} is of bench '${record.bench}': there are ${Object.keys(SECTIONS).join(', ')}`,
      );
    records[record.bench] = record;
  }
  mkdirSync(path.dirname(RESULTS_FILE), { recursive: true });
  writeFileSync(RESULTS_FILE, JSON.stringify({ schema: 1, records }, slim, 1) + '\n');
  const readme = readFileSync(README, 'utf8');
  const from = readme.indexOf(BEGIN);
  const to = readme.indexOf(END);
  if (from < 0 || to < from) throw new RangeError(`${README} has no ${BEGIN} … ${END}`);
  const section = performanceSection(readResults());
  writeFileSync(README, `${readme.slice(0, from)}${BEGIN}\n\n${section}\n\n${readme.slice(to)}`);
  say(`${README}: performance section from ${Object.keys(records).join(', ')}`);
}

if (import.meta.main) {
  try {
    main(process.argv.slice(2));
  } catch (error) {
    failed('bench/readme.ts', error);
  }
}
