#!/usr/bin/env node
/**
 * The `gridvfs` command of a checkout: plain JavaScript, because the system's Node may be older than what the
 * program needs. With Node 24 or newer it loads the program in this very process; else it starts the pinned one.
 */
import { spawn } from 'node:child_process';
import { existsSync, readFileSync, realpathSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const root = path.resolve(path.dirname(realpathSync(fileURLToPath(import.meta.url))), '..', '..');
const main = path.join(root, 'src', 'main.ts');
const pinned = path.join(root, 'node_modules', '.bin', 'node');

/** Whether a terminal's Ctrl-C goes to this process, and to its child with it. */
function isForeground() {
  const [, , processGroup, , , foregroundGroup] = readFileSync('/proc/self/stat', 'utf8')
    .slice(-1_000)
    .replace(/^.*\) /s, '')
    .split(' ');
  return foregroundGroup === processGroup;
}

if (existsSync(pinned) && realpathSync(process.execPath) !== realpathSync(pinned)) {
  const child = spawn(pinned, [main, ...process.argv.slice(2)], { stdio: 'inherit' });
  // Signals from the terminal reach the child by themselves; those sent to us alone are passed on.
  for (const signal of ['SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal));
  process.on('SIGINT', () => {
    if (!isForeground()) child.kill('SIGINT');
  });
  child.on('error', (error) => {
    process.stderr.write(`gridvfs: cannot start ${pinned}: ${error.message}\n`);
    process.exit(1);
  });
  child.on('exit', (code, signal) => process.exit(code ?? (signal === 'SIGINT' ? 130 : 143)));
} else if (Number(process.versions.node.split('.')[0]) >= 24) {
  process.argv[1] = main;
  await import(pathToFileURL(main).href);
} else {
  process.stderr.write(
    `gridvfs: needs Node 24 or newer, this is ${process.version}; run \`npm run setup\` in ${root}, which brings one\n`,
  );
  process.exit(1);
}
