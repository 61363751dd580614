/** A process at hand: it becomes what it is told, word for word, and does not outlive who started it. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, realpathSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isRunning } from '../../src/core/linux.ts';
import { READ_WORDS, Spare, tellWords } from '../../src/core/spare.ts';
import { smallFaultsSpare } from '../../src/vmm/qemu/page-faults.ts';

const folder = realpathSync(mkdtempSync(path.join(os.tmpdir(), 'gridvfs-spare-')));
after(() => rmSync(folder, { recursive: true }));
const log = path.join(folder, 'log');

test('one that becomes QEMU is the same process, at home in its folder, with the words as they were', async () => {
  assert.equal(smallFaultsSpare!.take(), undefined, 'none was prepared');
  writeFileSync(log, 'before\n');
  smallFaultsSpare!.prepare();
  smallFaultsSpare!.prepare();
  const perl = smallFaultsSpare!.take()!;
  assert.equal(smallFaultsSpare!.take(), undefined, 'there was one');
  const script =
    'echo $$; pwd; grep Seccomp: /proc/self/status; cat; echo wrong >&2; for word; do echo "<$word>"; done';
  const words = ['', 'a b', '{"json": "ünïcode"}', 'two\nlines', '0'];
  tellWords(perl, [folder, log, '/bin/sh', '-c', script, 'sh', ...words]);
  const [code] = (await once(perl, 'exit')) as [number];
  assert.equal(code, 0);
  const said = [
    'before',
    String(perl.pid),
    folder,
    'Seccomp:\t2',
    'wrong',
    ...words.map((word) => `<${word}>`),
  ];
  assert.equal(readFileSync(log, 'utf8'), said.join('\n') + '\n');
});

test('what cannot be run is said in the log', async () => {
  smallFaultsSpare!.prepare();
  const perl = smallFaultsSpare!.take()!;
  tellWords(perl, [folder, log, '/nowhere/qemu']);
  const [code] = (await once(perl, 'exit')) as [number];
  assert.notEqual(code, 0);
  assert.match(readFileSync(log, 'utf8'), /\/nowhere\/qemu: No such file or directory/);
});

test('it keeps no process alive, and ends with the one that was killed', async () => {
  const program = (then: string) => `
    import { Spare, READ_WORDS } from '${new URL('../../src/core/spare.ts', import.meta.url).href}';
    const spare = new Spare(READ_WORDS + 'sleep 60;', []);
    spare.prepare();
    console.log(spare.take().pid);
    ${then}`;
  for (const then of ['process.kill(process.pid, "SIGKILL")', 'process.exit()']) {
    const child = spawn(process.execPath, ['--input-type=module', '--eval', program(then)], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const pid = Number(String((await once(child.stdout, 'data'))[0]));
    for (let left = 100; isRunning(pid) && left > 0; left--) await sleep(50);
    assert.equal(isRunning(pid), false, then);
  }
  new Spare(READ_WORDS, []).prepare(); // this file would not end
});
