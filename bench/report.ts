/**
 * `gridvfs bench report FILE… --html PAGE`: the records of benches as one HTML page, and with `--pictures FOLDER` its
 * pictures as SVG files.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { readRecords } from './lib/record.ts';
import { failed, say } from './lib/scene.ts';
import { chartsOf } from './report/charts.ts';
import { pageOf } from './report/page.ts';

try {
  const { values, positionals } = parseArgs({
    options: { html: { type: 'string', default: 'report.html' }, pictures: { type: 'string' } },
    allowPositionals: true,
  });
  if (positionals.length === 0)
    throw new RangeError('name records: gridvfs bench report FILE.json… --html PAGE');
  const records = positionals.flatMap(readRecords);
  await writeFile(values.html, await pageOf(records));
  say(`report written to ${values.html}`);
  if (values.pictures !== undefined) {
    await mkdir(values.pictures, { recursive: true });
    for (const record of records) {
      for (const { name, svg } of await chartsOf(record))
        await writeFile(path.join(values.pictures, `${name}.svg`), svg);
    }
    say(`pictures written to ${values.pictures}`);
  }
} catch (error) {
  failed('bench report', error);
}
