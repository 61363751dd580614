/**
 * `gridvfs bench all`: the benches one after the other, each in a process of its own that writes its record, and one
 * report of all records. A bench that fails is said and does not hold up the others; the exit code is then 1.
 */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { failed, say } from './lib/scene.ts';

/** Arguments of the full run, and of the quick one. */
const BENCHES: Record<string, { full: string[]; quick: string[] }> = {
  instantiate: { full: [], quick: ['--quick'] },
  peers: { full: ['--runs', '3'], quick: ['--links', 'wan'] },
  scale: { full: [], quick: ['--clones', '1,4', '--hosts', '1,2,3'] },
  io: { full: [], quick: ['--runs', '1', '--link', '30ms,100mbit'] },
};

const interrupted = new AbortController();

/** Its exit code. Ctrl-C reaches the program by itself; here it only ends the row of benches. */
function run(program: string, args: readonly string[]): Promise<number> {
  const child = spawn(process.execPath, [path.join(import.meta.dirname, program), ...args], {
    stdio: 'inherit',
  });
  const stop = () => child.kill('SIGTERM');
  interrupted.signal.addEventListener('abort', stop, { once: true });
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('exit', (code) => resolve(code ?? 1));
  });
}

try {
  const { values } = parseArgs({
    options: {
      out: { type: 'string', default: 'bench-results' },
      guest: { type: 'string', default: 'small' },
      quick: { type: 'boolean', default: false },
      only: { type: 'string', default: Object.keys(BENCHES).join(',') },
    },
  });
  if (values.guest !== 'small' && values.guest !== 'debian')
    throw new RangeError(`--guest ${values.guest}: write small or debian`);
  const names = values.only.split(',');
  for (const name of names)
    if (!(name in BENCHES))
      throw new RangeError(`--only ${name}: there are ${Object.keys(BENCHES).join(', ')}`);
  process.on('SIGINT', () => interrupted.abort());
  process.on('SIGTERM', () => interrupted.abort());
  await mkdir(values.out, { recursive: true });
  const records: string[] = [];
  const without: string[] = [];
  for (const name of names) {
    if (interrupted.signal.aborted) break;
    say(`== ${name}`);
    const file = path.join(values.out, `${name}.json`);
    await rm(file, { force: true });
    const args = BENCHES[name]![values.quick ? 'quick' : 'full'];
    const code = await run(`${name}.ts`, [...args, '--guest', values.guest, '--json', file]);
    if (existsSync(file)) records.push(file);
    if (code !== 0) without.push(name);
  }
  if (records.length > 0 && !interrupted.signal.aborted)
    await run('report.ts', [...records, '--html', path.join(values.out, 'report.html')]);
  if (interrupted.signal.aborted) throw new Error('interrupted');
  if (without.length > 0) throw new Error(`failed: ${without.join(', ')}`);
} catch (error) {
  failed('bench all', error);
}
