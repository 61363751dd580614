/** The report as one HTML page that needs nothing else: figures, pictures, the machine, the commands. It prints well, is
 * light or dark as the reader's system is, and gives each picture as SVG or PNG. */
import type { BenchRecord, Row } from '../lib/record.ts';
import { chartsOf } from './charts.ts';
import type { Chart } from './charts.ts';

const escaped = (text: unknown) =>
  String(text)
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;');

const STYLE = `
:root { color-scheme: light dark; --ink: #1c2733; --paper: #fff; --soft: #5b6875; --line: #d8dee5; --bad: #b3261e; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --paper: #12181f; --soft: #9aa7b4; --line: #2c3742; --bad: #ff8a80; --good: #6fd79e; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 0; }
p, figcaption, dd { color: var(--soft); } code { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; padding: 1rem 0 0; border-top: 1px solid var(--line); break-inside: avoid; }
.picture, .rows { overflow-x: auto; } .picture svg { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; } th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
button { font: inherit; font-size: .8rem; color: inherit; background: none; border: 1px solid var(--line); border-radius: .3rem; padding: .1rem .6rem; cursor: pointer; }
.kept { color: var(--good); } .missed, .broken { color: var(--bad); }
@media (max-width: 40rem) { .picture svg { min-width: 30rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #333; --line: #bbb; } button { display: none; } .rows { overflow: visible; } table { white-space: normal; font-size: .7rem; } }
`;

const SCRIPT = `
const save = (name, blob) => { const a = document.createElement('a'); a.href = URL.createObjectURL(blob); a.download = name; a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000); };
for (const button of document.querySelectorAll('button[data-as]')) button.addEventListener('click', () => {
  const figure = button.closest('figure'), svg = figure.querySelector('svg');
  const text = new XMLSerializer().serializeToString(svg);
  const blob = new Blob([text], { type: 'image/svg+xml' });
  if (button.dataset.as === 'svg') return save(figure.id + '.svg', blob);
  const image = new Image(), { width, height } = svg.viewBox.baseVal;
  image.onload = () => { const canvas = document.createElement('canvas'); canvas.width = width * 2; canvas.height = height * 2;
    const pen = canvas.getContext('2d'); pen.fillStyle = '#fff'; pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(image, 0, 0, canvas.width, canvas.height); canvas.toBlob((png) => save(figure.id + '.png', png)); };
  image.src = URL.createObjectURL(blob);
});`;

const figureOf = (chart: Chart) => `<figure id="${escaped(chart.name)}">
<h3>${escaped(chart.title)}</h3><div class="picture" role="img" aria-label="${escaped(chart.title)}">${chart.svg}</div>
<figcaption>${escaped(chart.caption)} <button data-as="svg">SVG</button> <button data-as="png">PNG</button></figcaption></figure>`;

const cell = (value: unknown) =>
  typeof value === 'number' ? value.toFixed(3) : value === undefined ? '–' : escaped(value);

/** Columns that are a figure or a word in some row. */
function tableOf(rows: readonly Row[]): string {
  const plain = (value: unknown) => typeof value === 'number' || typeof value === 'string';
  const skipped = new Set(['value', 'seconds', 'version']);
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter(
    (name) => !skipped.has(name) && rows.some((row) => plain(row[name])),
  );
  const head = [...columns.slice(0, 2), 'value', ...columns.slice(2), 'runs'];
  const body = rows.map((row) =>
    [...head.slice(0, -1).map((name) => (plain(row[name]) ? cell(row[name]) : '–')), row.runs.length]
      .map((text) => `<td>${text}</td>`)
      .join(''),
  );
  return `<div class="rows"><table><thead><tr>${head.map((name) => `<th>${escaped(name)}</th>`).join('')}</tr></thead>
<tbody>${body.map((row) => `<tr>${row}</tr>`).join('\n')}</tbody></table></div>`;
}

async function sectionOf(record: BenchRecord): Promise<string> {
  const { host, guest, links, promises } = record;
  const facts: Record<string, unknown> = {
    command: record.command,
    made: record.made,
    machine: `${host.processor}, ${host.cores} cores, kernel ${host.kernel}, ${host.accelerator}, ${host.qemu}, Node ${host.node}`,
    'load before': host.load?.toFixed(2),
    guest:
      guest &&
      `${guest.name}, sha256 ${(guest.sha256['disk'] ?? '').slice(0, 12)}, ${(guest.nonzeroBytes / 2 ** 20).toFixed(1)} MiB of data`,
    links: Array.isArray(links)
      ? JSON.stringify(links)
      : links &&
        `${links.emulator}: ${links.description}; ${['lan', 'wan']
          .filter((name) => name in links)
          .map((name) => `${name} ${String(links[name])}`)
          .join(', ')}`,
  };
  const list = Object.entries(facts)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `<dt>${escaped(name)}</dt><dd>${escaped(value)}</dd>`);
  const kept = promises.map(
    ({ what, value, bound, verdict }) =>
      `<li><b class="${verdict ?? ''}">${escaped(verdict ?? '')}</b> ${escaped(what)}: ${value.toFixed(3)} (promised ${bound})</li>`,
  );
  const charts = await chartsOf(record);
  return `<section><h2>${escaped(record.bench ?? 'io')}</h2><dl>${list.join('')}</dl>
${kept.length === 0 ? '' : `<ul>${kept.join('')}</ul>`}
${charts.map(figureOf).join('\n')}
<details><summary>All figures</summary>${tableOf(record.rows)}</details></section>`;
}

export async function pageOf(records: readonly BenchRecord[]): Promise<string> {
  const sections: string[] = [];
  for (const record of records) sections.push(await sectionOf(record));
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>gridvfs: what it buys</title><link rel="icon" href="data:,"><style>${STYLE}</style></head>
<body><h1>gridvfs: what it buys on this machine</h1>
<p>Medians of interleaved runs. Ratios are within one run on one machine; absolute figures are for orientation.</p>
${sections.join('\n')}
<script>${SCRIPT}</script></body></html>
`;
}
