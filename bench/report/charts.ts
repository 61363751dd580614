/**
 * The pictures of a report: what is drawn of which rows, as Vega-Lite specifications, rendered to SVG text without a browser.
 * Lines and letters take the colour of the page's text (`currentColor`), so one picture serves light, dark and paper.
 */
import { Error as ErrorLevel, parse, View } from 'vega';
import { compile } from 'vega-lite';
import type { TopLevelSpec } from 'vega-lite';
import type { BenchRecord, Row } from '../lib/record.ts';
import type { Heat } from '../lib/heat.ts';

export interface Chart {
  /** Of the picture's file, without its ending. */
  readonly name: string;
  readonly title: string;
  readonly caption: string;
  readonly svg: string;
}

interface Drawn {
  readonly name: string;
  readonly title: string;
  readonly caption: string;
  readonly spec: Record<string, unknown>;
}

const WIDTH = 640;
const MIB = 1024 * 1024;
const STATES = {
  domain: ['local', 'cold', 'cold, profile', 'warm', 'full copy', 'peer'],
  range: ['#7b8794', '#2f7ed8', '#2a9d6f', '#e8862e', '#a05fb4', '#c2528b'],
};
const CONFIG = {
  background: 'transparent',
  font: 'system-ui, sans-serif',
  view: { stroke: null },
  axis: {
    labelColor: 'currentColor',
    titleColor: 'currentColor',
    domainColor: 'currentColor',
    tickColor: 'currentColor',
    gridColor: 'currentColor',
    gridOpacity: 0.15,
    labelFontSize: 12,
    titleFontSize: 12,
    labelLimit: 220,
  },
  legend: {
    labelColor: 'currentColor',
    titleColor: 'currentColor',
    orient: 'bottom',
    labelFontSize: 12,
    labelLimit: 320,
  },
  header: {
    labelColor: 'currentColor',
    titleColor: 'currentColor',
    labelFontSize: 12,
    labelFontWeight: 'bold',
  },
  text: { color: 'currentColor' },
};

const stateOf = (subject: string): string => {
  if (subject === 'local') return 'local';
  if (/copy|full/.test(subject)) return 'full copy';
  if (/profile/.test(subject)) return 'cold, profile';
  return subject.endsWith('warm') ? 'warm' : 'cold';
};

const state = { field: 'state', type: 'nominal', scale: STATES, title: null };
const bars = (values: readonly object[], y: string, x: string, title: string) => ({
  data: { values },
  encoding: { y: { field: y, type: 'nominal', sort: null, title: null } },
  layer: [
    {
      mark: { type: 'bar', height: { band: 0.7 } },
      encoding: { x: { field: x, type: 'quantitative', title }, color: state },
    },
    {
      mark: { type: 'rule', color: 'currentColor', strokeWidth: 1.5 },
      encoding: {
        x: { field: 'low', type: 'quantitative' },
        x2: { field: 'high' },
      },
    },
    {
      mark: { type: 'text', align: 'left', dx: 6, fontSize: 11 },
      encoding: {
        x: { field: 'high', type: 'quantitative' },
        text: { field: x, type: 'quantitative', format: '.2f' },
      },
    },
  ],
});

const barsOf = (rows: readonly Row[], nameOf: (row: Row) => string, of: (row: Row) => string) =>
  rows.map((row) => ({
    name: nameOf(row),
    seconds: row.value,
    low: row.spread?.minimum ?? row.value,
    high: row.spread?.maximum ?? row.value,
    state: of(row),
  }));

function table(record: BenchRecord): Drawn[] {
  return (['reboot', 'application', 'full copy'] as const).flatMap((kind) => {
    const rows = record.rows.filter((row) => row.case === kind);
    if (rows.length === 0) return [];
    return {
      name: `instantiate-${kind.replace(' ', '-')}`,
      title: { reboot: 'Reboot', application: 'Application in the guest', 'full copy': 'A copy of its own' }[
        kind
      ],
      caption: 'Bars are medians, lines the fastest and the slowest run.',
      spec: bars(
        barsOf(
          rows,
          (row) => row.subject,
          (row) => stateOf(row.subject),
        ),
        'name',
        'seconds',
        kind === 'application' ? 'seconds it took' : 'seconds until the guest answered',
      ),
    };
  });
}

function founding(record: BenchRecord): Drawn[] {
  const values = record.rows.flatMap((row) => {
    const then = row['founding'] as { ratio: number } | undefined;
    if (then === undefined || row.subject === 'local') return [];
    return [
      { name: row.subject, who: 'this run', ratio: row.ratio },
      { name: row.subject, who: 'founding table, 2003', ratio: then.ratio },
    ];
  });
  if (values.length === 0) return [];
  return [
    {
      name: 'instantiate-founding',
      title: 'Against the founding table',
      caption: 'Seconds divided by those of the same machine’s local disk; 1 is as fast as local.',
      spec: {
        data: { values },
        mark: { type: 'point', filled: true, size: 110 },
        encoding: {
          y: { field: 'name', type: 'nominal', sort: null, title: null },
          x: { field: 'ratio', type: 'quantitative', scale: { type: 'log' }, title: 'ratio to local (log)' },
          color: {
            field: 'who',
            type: 'nominal',
            title: null,
            scale: { domain: ['this run', 'founding table, 2003'], range: ['#2f7ed8', '#e8862e'] },
          },
          shape: { field: 'who', type: 'nominal', title: null },
        },
      },
    },
  ];
}

function waterfall(record: BenchRecord): Drawn[] {
  const values = record.rows
    .filter((row) => row.case === 'reboot' || row.case === 'full copy')
    .flatMap((row) => {
      let from = 0;
      return Object.entries((row['phases'] as Record<string, number> | undefined) ?? {}).map(
        ([phase, to]) => {
          const piece = { name: row.subject, phase: `until ${phase}`, from, to };
          from = to;
          return piece;
        },
      );
    });
  if (values.length === 0) return [];
  return [
    {
      name: 'instantiate-waterfall',
      title: 'What one start consists of',
      caption: 'The first counted run of each row.',
      spec: {
        data: { values },
        mark: { type: 'bar', height: { band: 0.6 } },
        encoding: {
          y: { field: 'name', type: 'nominal', sort: null, title: null },
          x: { field: 'from', type: 'quantitative', title: 'seconds since the request' },
          x2: { field: 'to' },
          color: {
            field: 'phase',
            type: 'nominal',
            title: null,
            sort: null,
            scale: { range: ['#a05fb4', '#e8862e', '#2a9d6f', '#2f7ed8'] },
          },
        },
      },
    },
  ];
}

function bytesOverTime(record: BenchRecord): Drawn[] {
  const values = record.rows.flatMap((row) =>
    ((row['series'] as [number, number][] | undefined) ?? []).map(([seconds, bytes]) => ({
      name: row.subject,
      seconds,
      mib: bytes / MIB,
    })),
  );
  if (values.length === 0) return [];
  return [
    {
      name: 'instantiate-bytes',
      title: 'Bytes over the link during a start',
      caption:
        'Towards the host, summed up, from the request until the guest answered; the first run of each row.',
      spec: {
        data: { values },
        mark: { type: 'line', strokeWidth: 2 },
        encoding: {
          x: { field: 'seconds', type: 'quantitative', title: 'seconds since the request' },
          y: { field: 'mib', type: 'quantitative', title: 'MiB' },
          color: { field: 'name', type: 'nominal', title: null, scale: { scheme: 'tableau10' } },
        },
        height: 280,
      },
    },
  ];
}

const HEAT: Record<string, string> = {
  '.': 'zeros',
  d: 'not touched',
  l: 'touched late',
  e: 'touched early',
};

function heatMap(record: BenchRecord): Drawn[] {
  const heat = record['heat'] as Heat | undefined;
  if (heat === undefined) return [];
  const columns = heat.chunks.length > 1024 ? 128 : 32;
  const values = Array.from(heat.chunks, (letter, index) => ({
    x: index % columns,
    y: Math.floor(index / columns),
    what: HEAT[letter],
  }));
  const mib = heat.chunkBytes / MIB;
  return [
    {
      name: 'instantiate-heat',
      title: 'Which chunks of the disk a boot touches',
      caption: `Each cell is a chunk of ${heat.chunkBytes / 1024} KiB, row by row from the start of the disk; ${heat.runs} recorded starts.`,
      spec: {
        data: { values },
        mark: { type: 'rect' },
        encoding: {
          x: {
            field: 'x',
            type: 'ordinal',
            title: `chunk within its row (${columns * mib} MiB a row)`,
            axis: { values: [0, columns / 4, columns / 2, (3 * columns) / 4], labelAngle: 0 },
          },
          y: { field: 'y', type: 'ordinal', title: 'row' },
          color: {
            field: 'what',
            type: 'nominal',
            title: null,
            scale: { domain: Object.values(HEAT), range: ['#88888822', '#9aa5b1', '#e8b04b', '#d1495b'] },
          },
        },
        height: Math.max(60, Math.ceil(heat.chunks.length / columns) * (WIDTH / columns)),
      },
    },
  ];
}

function peers(record: BenchRecord): Drawn[] {
  const groups = Map.groupBy(record.rows, (row) => `${String(row['link'])}, ${String(row['state'])}`);
  return [...groups].map(([group, rows]) => ({
    name: `peers-${group.replace(', ', '-')}`,
    title: `The same start through others: ${group}`,
    caption: 'Bars are medians, lines the fastest and the slowest run.',
    spec: bars(
      barsOf(
        rows.toSorted((a, b) => a.value - b.value),
        (row) => row.subject,
        (row) =>
          row.subject.startsWith('gridvfs')
            ? String(row['state'])
            : row.subject === 'local'
              ? 'local'
              : 'peer',
      ),
      'name',
      'seconds',
      'seconds until the guest answered',
    ),
  }));
}

function scaling(record: BenchRecord): Drawn[] {
  const values = record.rows.map((row) => ({
    count: row['count'],
    kind: `${row.case}, measured on one machine`,
    seconds: row.value,
    mib: Number(row['originBytes']) / MIB,
  }));
  const predicted = (record['predictions'] as { hosts: number; seconds: number }[] | undefined) ?? [];
  const times = [
    ...values,
    ...predicted.map(({ hosts, seconds }) => ({
      count: hosts,
      kind: 'PREDICTION: hosts with processors of their own',
      seconds,
    })),
  ];
  const kind = {
    field: 'kind',
    type: 'nominal',
    title: null,
    sort: null,
    legend: { columns: 1, labelLimit: 400 },
    scale: { range: ['#2f7ed8', '#e8862e', '#a05fb4'] },
  };
  const dash = {
    condition: { test: "indexof(datum.kind, 'PREDICTION') === 0", value: [6, 4] },
    value: [1, 0],
  };
  const count = { field: 'count', type: 'quantitative', scale: { type: 'log' }, title: 'at once (log)' };
  const curve = (data: readonly object[], field: string, title: string) => ({
    data: { values: data },
    height: 260,
    mark: { type: 'line', point: true, strokeWidth: 2 },
    encoding: {
      x: count,
      y: { field, type: 'quantitative', title, scale: { type: 'log' } },
      color: kind,
      strokeDash: { ...dash, field: undefined },
    },
  });
  return [
    {
      name: 'scale-seconds',
      title: 'Many at once: when the last guest answers',
      caption:
        'Solid: measured, all guests on this machine’s processor. Dashed: a prediction from the fitted model.',
      spec: curve(times, 'seconds', 'seconds until the last guest answered (log)'),
    },
    {
      name: 'scale-bytes',
      title: 'Many at once: what the origin sends',
      caption: 'Clones of one host share its cache; hosts have one each.',
      spec: curve(values, 'mib', 'MiB from the origin (log)'),
    },
  ];
}

function replays(record: BenchRecord): Drawn[] {
  const groups = Map.groupBy(record.rows, (row) => String(row['link']));
  return [...groups].map(([link, rows]) => ({
    name: `io-${link.replaceAll(/[^a-z0-9]+/gi, '-')}`,
    title: `A recorded boot replayed: ${link}`,
    caption: '`limit` is what the link itself asks for.',
    spec: bars(
      barsOf(
        rows,
        (row) => row.subject,
        (row) => (row.subject.startsWith('grid') || row.subject === 'local' ? stateOf(row.subject) : 'peer'),
      ),
      'name',
      'seconds',
      'seconds',
    ),
  }));
}

function drawn(record: BenchRecord): Drawn[] {
  switch (record.bench) {
    case 'peers':
      return peers(record);
    case 'scale':
      return scaling(record);
    case 'instantiate':
      return [table, founding, waterfall, bytesOverTime, heatMap].flatMap((draw) => draw(record));
    default:
      return record.rows.some((row) => row.case === 'boot-replay') ? replays(record) : [];
  }
}

/** Every picture that can be drawn of this record. */
export async function chartsOf(record: BenchRecord): Promise<Chart[]> {
  const charts: Chart[] = [];
  for (const { spec, ...about } of drawn(record)) {
    const whole = { width: WIDTH, ...spec, config: CONFIG };
    const view = new View(parse(compile(whole as unknown as TopLevelSpec).spec), {
      renderer: 'none',
      logLevel: ErrorLevel,
    });
    charts.push({ ...about, svg: await view.toSVG() });
    view.finalize();
  }
  return charts;
}
