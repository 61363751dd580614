/** Starts as the rows of the founding table: their medians, intervals, ratios to local, and what they cost beside time. */
import { bytesText, table } from '../../src/cli/kit.ts';
import { GridError } from '../../src/core/errors.ts';
import { median } from './facts.ts';
import { promise } from './record.ts';
import type { Promised, Row } from './record.ts';
import type { Scene } from './scene.ts';
import type { GridFigures, Start } from './starts.ts';
import { ratioOf, summaryOf } from './statistics.ts';
import type { Interval } from './statistics.ts';

/** From where on a boot is one of a whole system. */
const LONG_BOOT_SECONDS = 5;

/** Counted starts by subject, in the table's order. */
export type Runs = Map<string, Start[]>;

/** Seconds on a dual Pentium 4 with a 1.3 GB image, 2003: the table that founded the field. */
const FOUNDING: Record<'reboot' | 'resume', Record<string, number>> = {
  reboot: { local: 48, 'lan-cold': 121, 'lan-warm': 52, 'wan-cold': 434, 'wan-warm': 56 },
  resume: { local: 4, 'lan-cold': 80, 'lan-warm': 7, 'wan-cold': 1386, 'wan-warm': 16 },
};

/** The table's order; what is not named here comes last. */
const ORDER = [
  'local',
  'lan-cold',
  'lan-warm',
  'wan-cold',
  'wan-warm',
  'lan-cold-profile',
  'wan-cold-profile',
  'lan-cold-unknown',
  'wan-cold-unknown',
];

export interface StartRow extends Row {
  readonly case: 'reboot' | 'resume' | 'application' | 'full copy';
  readonly seconds: number;
  readonly unit: 's';
  readonly ratio: number;
  readonly spread: { readonly minimum: number; readonly maximum: number };
  readonly interval: Interval;
  readonly ratioInterval: Interval;
  readonly founding?: { readonly seconds: number; readonly ratio: number };
  readonly pageCache: string;
  readonly plainBytesFetched: number;
  readonly storedBytesFetched: number;
  readonly chunksFetched: number;
  readonly linkBytes?: number;
  readonly roundTrips?: number;
  /** Of the chunks that the run touched, the share that was here already. Absent for local. */
  readonly hitRate?: number;
  readonly mountSeconds?: number;
  readonly proxyCpuSeconds?: number;
  readonly serverCpuSeconds?: number;
  readonly filledSeconds?: number;
  readonly phases?: Readonly<Record<string, number>>;
  readonly series?: readonly (readonly [number, number])[];
}

/** The median of a figure over the runs that have it. */
function figure(starts: readonly Start[], of: (start: Start) => number | undefined): number | undefined {
  const values = starts.map(of).filter((value) => value !== undefined);
  return values.length === 0 ? undefined : median(values);
}

function withFigures(starts: readonly Start[]) {
  const of = (name: keyof GridFigures) => figure(starts, (start) => start.grid?.[name]);
  const worst = (name: keyof GridFigures) => Math.max(...starts.map((start) => start.grid?.[name] ?? 0));
  const touched = worst('touchedChunks');
  const first = starts[0]!;
  const optional = {
    linkBytes: figure(starts, (start) => start.linkBytes),
    roundTrips: of('roundTrips'),
    mountSeconds: of('mountSeconds'),
    proxyCpuSeconds: of('proxyCpuSeconds'),
    serverCpuSeconds: of('serverCpuSeconds'),
    filledSeconds: of('filledSeconds'),
    hitRate: touched === 0 ? undefined : 1 - worst('missedChunks') / touched,
    series: first.series,
  };
  return {
    pageCache: starts.every((start) => start.pageCache === 'dropped') ? 'dropped' : 'kept',
    plainBytesFetched: worst('fetchedPlainBytes'),
    storedBytesFetched: worst('fetchedStoredBytes'),
    chunksFetched: worst('fetchedChunks'),
    phases: first.phases,
    ...Object.fromEntries(Object.entries(optional).filter(([, value]) => value !== undefined)),
  };
}

/** Rows of starts that booted, and of starts that were resumed; either may be left out. */
export function rowsOf(scene: Scene, runs: Runs, resumes: Runs = new Map()): StartRow[] {
  const guest = {
    name: scene.guest.name,
    sha256: scene.guest.sha256.disk,
    nonzeroBytes: scene.nonzeroBytes,
  };
  const row = (
    kind: StartRow['case'],
    subject: string,
    seconds: readonly number[],
    reference: readonly number[],
    more: Partial<StartRow>,
  ): StartRow => {
    const ratio = ratioOf(seconds, reference);
    const { value, ...summary } = summaryOf(seconds);
    return {
      case: kind,
      subject,
      seconds: value,
      value,
      unit: 's',
      ...summary,
      ratio: ratio.value,
      ratioInterval: ratio.interval,
      pageCache: 'dropped',
      plainBytesFetched: 0,
      storedBytesFetched: 0,
      chunksFetched: 0,
      ...more,
      guest,
    };
  };
  const rank = (subject: string) => (ORDER.indexOf(subject) + ORDER.length + 1) % (ORDER.length + 1);
  const subjectsOf = (all: Runs) => [...all.keys()].toSorted((a, b) => rank(a) - rank(b));
  const startRows = (kind: 'reboot' | 'resume', all: Runs) => {
    const localSeconds = (all.get('local') ?? []).map((start) => start.seconds);
    return subjectsOf(all).map((subject) => {
      const starts = all.get(subject)!;
      const founding = FOUNDING[kind][subject];
      return row(
        /copy|full/.test(subject) ? 'full copy' : kind,
        subject,
        starts.map((start) => start.seconds),
        localSeconds,
        {
          ...withFigures(starts),
          ...(founding === undefined
            ? {}
            : { founding: { seconds: founding, ratio: founding / FOUNDING[kind]['local']! } }),
        },
      );
    });
  };
  /** In the order of the rounds; not in all of them. */
  const applied = (subject: string) =>
    runs.get(subject)!.filter((start) => start.applicationSeconds !== undefined);
  const subjects = subjectsOf(runs).filter((subject) => applied(subject).length > 0);
  const sums = new Set(subjects.flatMap((subject) => applied(subject).map((start) => start.applicationSum)));
  if (sums.size > 1) throw new GridError('corrupt', 'the application read different bytes in different runs');
  const applicationSeconds = (subject: string) => applied(subject).map((start) => start.applicationSeconds!);
  const applications = subjects.map((subject) =>
    row('application', subject, applicationSeconds(subject), applicationSeconds('local'), {}),
  );
  return [...startRows('reboot', runs), ...startRows('resume', resumes), ...applications];
}

/**
 * What the README says of these rows. Of a guest that boots in three seconds nothing is promised of a cold boot, nor of a
 * resume beside a boot: how long its bytes take over the link, not the service, decides there.
 */
export function promisesOf(rows: readonly StartRow[], memoryNonzeroBytes?: number): Promised[] {
  const promises: Promised[] = [];
  const bootsLong = (rows.find(({ case: kind }) => kind === 'reboot')?.seconds ?? 0) >= LONG_BOOT_SECONDS;
  const find = (kind: StartRow['case'], subject: string) =>
    rows.find((each) => each.case === kind && each.subject === subject);
  const add = (kind: StartRow['case'], subject: string, bound: number) => {
    const row = find(kind, subject);
    if (row) promises.push(promise(`${kind} ${subject} to local`, row.ratio, bound, row.ratioInterval));
  };
  for (const link of ['lan', 'wan']) {
    add('reboot', `${link}-warm`, 1.03);
    const interval = find('reboot', `${link}-warm`)?.ratioInterval;
    if (interval && interval.confidence >= 0.95)
      promises.push(promise(`reboot ${link}-warm to local, the interval's end`, interval.high, 1.05));
  }
  if (bootsLong) add('reboot', 'lan-cold-profile', 1.1);
  if (bootsLong) add('reboot', 'wan-cold-profile', 1.15);
  for (const link of ['lan', 'wan']) add('application', `${link}-warm`, 1.04);
  for (const link of ['lan', 'wan']) {
    add('resume', `${link}-warm`, 1.05);
    const [resume, reboot] = [find('resume', `${link}-warm`), find('reboot', `${link}-warm`)];
    if (resume && reboot && bootsLong)
      promises.push(
        promise(`resume ${link}-warm to reboot ${link}-warm`, resume.seconds / reboot.seconds, 0.1),
      );
  }
  add('resume', 'lan-cold', 1.5);
  add('resume', 'wan-cold-profile', 3);
  const cold = find('resume', 'wan-cold-profile') ?? find('resume', 'lan-cold');
  if (cold && memoryNonzeroBytes !== undefined) {
    const share = cold.plainBytesFetched / memoryNonzeroBytes;
    promises.push(promise(`resume ${cold.subject}: bytes fetched to nonzero bytes of memory`, share, 0.4));
  }
  return promises;
}

const dash = <T>(value: T | undefined, text: (value: T) => string) =>
  value === undefined ? '-' : text(value);

export function printStarts(
  scene: Scene,
  rows: readonly StartRow[],
  asked: Readonly<Record<string, string>>,
): void {
  const seconds = (value: number) => value.toFixed(2);
  const head = ['SECONDS', 'MIN', 'MAX', 'RUNS', 'RATIO', '95 % OF RATIO'];
  const cells = (row: StartRow) => [
    row.subject,
    seconds(row.seconds),
    seconds(row.spread.minimum),
    seconds(row.spread.maximum),
    row.runs.length,
    row.ratio.toFixed(3),
    row.runs.length < 6 ? '-' : `${row.ratioInterval.low.toFixed(3)}–${row.ratioInterval.high.toFixed(3)}`,
  ];
  const costs = (row: StartRow) => [
    dash(row.linkBytes, bytesText),
    dash(row.roundTrips, (value) => value.toFixed(0)),
    dash(row.hitRate, (value) => `${(100 * value).toFixed(1)} %`),
    dash(row.proxyCpuSeconds, seconds),
    dash(row.serverCpuSeconds, seconds),
    row.pageCache,
  ];
  const of = (kind: StartRow['case']) => rows.filter((row) => row.case === kind);
  const sections = [
    table(
      [
        ...['REBOOT FROM', ...head, '2003'],
        ...['OVER THE LINK', 'ROUND TRIPS', 'HIT RATE', 'PROXY CPU', 'SERVER CPU', 'PAGE CACHE'],
      ],
      of('reboot').map((row) => [...cells(row), dash(row.founding?.ratio, seconds), ...costs(row)]),
    ),
  ];
  if (of('resume').length > 0) {
    sections.push(
      table(
        [
          ...['RESUME FROM', ...head, '2003'],
          ...['OVER THE LINK', 'ROUND TRIPS', 'HIT RATE', 'PROXY CPU', 'SERVER CPU', 'PAGE CACHE'],
        ],
        of('resume').map((row) => [...cells(row), dash(row.founding?.ratio, seconds), ...costs(row)]),
      ),
    );
  }
  if (of('application').length > 0) {
    sections.push(
      table(
        ['APPLICATION IN', ...head, 'OVERHEAD'],
        of('application').map((row) => [...cells(row), `${(100 * (row.ratio - 1)).toFixed(1)} %`]),
      ),
    );
  }
  if (of('full copy').length > 0) {
    sections.push(
      table(
        ['A COPY OF ITS OWN', ...head, 'WHOLE AFTER', 'OVER THE LINK'],
        of('full copy').map((row) => [
          ...cells(row),
          dash(row.filledSeconds ?? row.phases?.['copied'], seconds),
          dash(row.linkBytes, bytesText),
        ]),
      ),
    );
  }
  const { guest, network, nonzeroBytes } = scene;
  const links = Object.entries(asked).map(
    ([name, text]) => `${name.toUpperCase()} ${text.replace(',', ' round trip, ')}`,
  );
  process.stdout.write(
    `\n${sections.join('\n\n')}\n\nguest ${guest.name}, sha256 ${guest.sha256.disk.slice(0, 12)}, ${bytesText(nonzeroBytes)} of data; ${links.join('; ')} (${network.emulator}: ${network.description})\n` +
      'seconds: median from the request for the VM until its guest answered; ratio: to local; 2003: the founding table\n',
  );
}
