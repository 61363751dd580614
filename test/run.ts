/**
 * Runs the tests: `node test/run.ts [--long] [FILE…]`. Three files at a time on two cores: two left them idle for two
 * fifths of the time (tests wait for links, timeouts and each other). `--long` sets GRIDVFS_LONG=1, which the long
 * variants of tests ask for.
 */
import { globSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { run } from 'node:test';
import { spec } from 'node:test/reporters';

const ROOT = path.resolve(import.meta.dirname, '..');
const args = process.argv.slice(2);
const long = args.includes('--long');
const named = args.filter((argument) => !argument.startsWith('--'));
if (long) process.env['GRIDVFS_LONG'] = '1';

const files =
  named.length > 0
    ? named.map((file) => path.resolve(file))
    : globSync('test/**/*.test.ts', { cwd: ROOT }).map((file) => path.join(ROOT, file));
let failed = false;
/** Those that wait for guests first: what runs last runs beside nothing. */
const LONGEST = ['scenarios', 'vmm', 'bench', 'broker'];
const rank = (file: string) => {
  const at = LONGEST.indexOf(path.basename(path.dirname(file)));
  return at < 0 ? LONGEST.length : at;
};
const stream = run({
  files: files.toSorted((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1)),
  concurrency: Math.ceil(1.5 * os.availableParallelism()),
  timeout: long ? 3_600_000 : 300_000,
});
stream.on('test:fail', (data) => {
  if (data.todo === undefined || data.todo === false) failed = true;
});
stream.on('end', () => {
  process.exitCode = failed ? 1 : 0;
});
stream.compose(new spec()).pipe(process.stdout);
