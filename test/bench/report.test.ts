/** Reports, comparisons and the scaling model: made of records as the benches write them. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { compare } from '../../bench/compare.ts';
import { fitScale, predictSeconds } from '../../bench/lib/model.ts';
import { readRecord, readRecords } from '../../bench/lib/record.ts';
import type { Row } from '../../bench/lib/record.ts';
import { ratioOf, summaryOf } from '../../bench/lib/statistics.ts';
import { chartsOf } from '../../bench/report/charts.ts';
import { pageOf } from '../../bench/report/page.ts';

const folder = mkdtempSync(path.join(tmpdir(), 'gridvfs-report-'));
after(() => rmSync(folder, { recursive: true, force: true }));

function row(kind: string, subject: string, runs: number[], reference: number[], more: object = {}): Row {
  const ratio = ratioOf(runs, reference);
  return {
    ...{ case: kind, subject, unit: 's', ratio: ratio.value, ratioInterval: ratio.interval },
    ...summaryOf(runs),
    ...more,
  };
}

const LOCAL = [2, 2.1, 2.2, 2, 2.1, 2.3, 2.2];
const times = (factor: number) => LOCAL.map((each, index) => each * factor + index / 1000);
const common = {
  schema: 1,
  command: 'gridvfs bench <b>',
  made: '2026-11-21T00:00:00Z',
  host: { processor: 'one', cores: 2, kernel: '6', accelerator: 'tcg', qemu: 'QEMU', node: 'v26', load: 0.1 },
  guest: { name: 'small', sha256: { disk: 'ab'.repeat(32) }, sizeBytes: 1, nonzeroBytes: 1 },
  links: { emulator: 'packets', description: 'wan: TUN', wan: '30ms,100mbit' },
  promises: [],
};

function instantiate(coldFactor: number) {
  const phases = { 'disk made': 0.1, 'machine started': 0.3, 'guest ready': 2 };
  return {
    ...common,
    bench: 'instantiate',
    rows: [
      row('reboot', 'local', LOCAL, LOCAL, { phases }),
      row('reboot', 'wan-cold', times(coldFactor), LOCAL, {
        phases,
        founding: { seconds: 434, ratio: 9 },
        series: [
          [0, 0],
          [1, 5_000_000],
        ],
      }),
      row('application', 'wan-warm', times(1.01), LOCAL),
    ],
    heat: { chunkBytes: 262144, chunks: '.dleedl..d'.repeat(20), runs: 3 },
  };
}

function write(name: string, record: unknown): string {
  const file = path.join(folder, name);
  writeFileSync(file, JSON.stringify(record));
  return file;
}

test('every picture has data, axes and units, and the page holds them all', async () => {
  const point = (kind: string, count: number) =>
    row(kind, `${count} ${kind}`, [count * 3], [3], { count, originBytes: 14e6 * count });
  const records = [
    instantiate(1.8),
    {
      ...common,
      bench: 'peers',
      rows: [row('start', 'gridvfs', LOCAL, LOCAL, { link: 'wan', state: 'cold' })],
    },
    {
      ...common,
      bench: 'scale',
      rows: [point('clones', 1), point('clones', 4), point('hosts', 1), point('hosts', 2)],
      predictions: [{ hosts: 1000, seconds: 300 }],
    },
  ].map((record, index) => readRecord(write(`${index}.json`, record)));
  const charts = (await Promise.all(records.map(chartsOf))).flat();
  assert.deepEqual(
    charts.map(({ name }) => name),
    [
      ...['instantiate-reboot', 'instantiate-application', 'instantiate-founding', 'instantiate-waterfall'],
      ...['instantiate-bytes', 'instantiate-heat', 'peers-wan-cold', 'scale-seconds', 'scale-bytes'],
    ],
  );
  for (const { name, svg } of charts) {
    assert.match(svg, /^<svg[^>]+viewBox/, name);
    assert.match(svg, /role-axis-title|aria-label="[XY]-axis titled/, `${name} has axes with titles`);
    assert.match(svg, /mark-(rect|symbol|line)[^>]*>(?:<g>)?<path[^>]* d="M/, `${name} has marks`);
    assert.doesNotMatch(svg, /NaN|undefined|Infinity/, name);
  }
  assert.match(charts.find(({ name }) => name === 'scale-seconds')!.svg, /PREDICTION/);
  const page = await pageOf(records);
  assert.equal(page.split('<figure').length - 1, charts.length);
  assert.ok(page.includes('gridvfs bench &lt;b&gt;'), 'texts are escaped');
  assert.doesNotMatch(page, /(?:src|href)="(?!data:)/, 'it needs no other file');

  const chromium = spawnSync('sh', ['-c', 'command -v chromium']).stdout.toString().trim();
  if (chromium === '') return;
  const file = path.join(folder, 'page.html');
  const picture = path.join(folder, 'page.png');
  // An error of the page's script would show in its title.
  const watch = `<script>addEventListener('error', (e) => (document.title = 'ERROR ' + e.message))</script>`;
  writeFileSync(file, page.replace('<style>', `${watch}<style>`));
  const headless = ['--headless=new', '--no-sandbox', '--disable-gpu', `--user-data-dir=${folder}/browser`];
  const dom = execFileSync(chromium, [...headless, '--dump-dom', `file://${file}`], {
    stdio: 'pipe',
  }).toString();
  assert.match(dom, /<title>gridvfs: what it buys<\/title>/);
  execFileSync(
    chromium,
    [...headless, '--window-size=390,2000', `--screenshot=${picture}`, `file://${file}`],
    {
      stdio: 'pipe',
    },
  );
  assert.ok(existsSync(picture) && statSync(picture).size > 20_000, 'a picture with something on it');
  assert.equal(readFileSync(picture).toString('latin1', 1, 4), 'PNG');
});

test('a comparison says better or worse only where the difference exceeds the spread', () => {
  const old = instantiate(1.8);
  const verdicts = (now: { rows: Row[] }) =>
    Object.fromEntries(compare(old.rows, now.rows).map((each) => [each.row, each.verdict]));
  assert.equal(verdicts(instantiate(1.8))['reboot wan-cold'], 'within the spread');
  assert.equal(verdicts(instantiate(1.5))['reboot wan-cold'], 'better');
  assert.equal(verdicts(instantiate(2.2))['reboot wan-cold'], 'worse');
  const slower = instantiate(1.8);
  // The whole machine was slower that day: ratios to local stay.
  slower.rows[1] = row(
    'reboot',
    'wan-cold',
    times(1.8).map((each) => each * 3),
    LOCAL.map((each) => each * 3),
  );
  assert.equal(verdicts(slower)['reboot wan-cold'], 'within the spread');
  const few = { rows: [row('reboot', 'wan-cold', [9], LOCAL)] };
  assert.equal(verdicts(few)['reboot wan-cold'], 'too few runs');
});

test('benches without a guest, and the collection of records, can be shown and compared', async () => {
  const fuse = {
    schema: 1,
    bench: 'fuse',
    command: 'gridvfs bench io --case fuse',
    made: '2026-11-30',
    host: common.host,
    rows: [
      {
        case: 'fuse',
        subject: 'served',
        workload: 'random',
        jobs: 4,
        value: 2,
        unit: 'IOPS',
        values: [1, 2, 3],
      },
    ],
  };
  const [alone] = readRecords(write('fuse.json', fuse));
  const file = write('all.json', { schema: 1, records: { fuse, instantiate: instantiate(1.8) } });
  const records = readRecords(file);
  assert.equal(records.length, 2);
  assert.match(await pageOf(records), /random/);
  const faster = alone!.rows.map((each) => ({ ...each, value: 20, runs: [19, 20, 21, 20, 20, 20] }));
  const slow = alone!.rows.map((each) => ({ ...each, runs: [1, 2, 3, 2, 2, 2] }));
  assert.deepEqual(
    [compare(slow, faster), compare(faster, slow)].map(([row]) => row!.verdict),
    ['better', 'worse'],
    'more in a second is better',
  );
});

test('a file that is no record is refused by name', () => {
  assert.throws(() => readRecord(write('bad.json', { schema: 1 })), /bad\.json is no record of a bench/);
  assert.throws(() => readRecord(write('new.json', { schema: 9, rows: [] })), /schema 9/);
  const words = path.join(folder, 'words.md');
  writeFileSync(words, '# words\n\nand more\n');
  assert.throws(() => readRecords(words), /^GridError: \S+ is no record of a bench: .*$/);
});

test('the scaling model finds the parameters that made its points, and predicts from what hosts share', () => {
  // Each host brings 12.5 MB over 100 Mbit/s (1 s) and 0.05 s of the origin; all guests share one processor, 2 s each.
  const points = [1, 2, 4].map((hosts) => ({
    hosts,
    lastReadySeconds: 3 + 2 * hosts,
    originBytes: 12.5e6 * hosts,
    serverCpuSeconds: 0.05 * hosts,
  }));
  const model = fitScale(points, 100e6);
  assert.ok(Math.abs(model.bytesPerHost - 12.5e6) < 1 && Math.abs(model.measured.b - 2) < 1e-9);
  assert.ok(Math.abs(model.aloneSeconds - 4) < 1e-9, 'one host, less its second of the link');
  assert.ok(Math.abs(predictSeconds(model, 100) - 104) < 1e-6, 'the link is the scarcer');
  assert.ok(
    Math.abs(predictSeconds({ ...model, linkBitsPerSecond: 1e12 }, 100) - 9) < 1e-6,
    'then the origin',
  );
});
