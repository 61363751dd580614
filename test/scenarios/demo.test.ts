/** The demo as a user runs it: its rows, and that it leaves nothing, also when it is interrupted. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { after, suite, test } from 'node:test';
import { World } from './world.ts';

interface Row {
  subject: string;
  seconds: number;
  ratio: number;
  plainBytesFetched: number;
  chunksFetched: number;
  pageCache: string;
  hitRate?: number;
}

suite('the demo', () => {
  const world = new World();
  const main = path.resolve(import.meta.dirname, '../../src/main.ts');
  // The demo's own folder is made below this world's, so that everything it starts can be found by it.
  const environment = { ...process.env, TMPDIR: world.folder };
  const leftFolders = () => readdirSync(world.folder).filter((name) => name.startsWith('gridvfs-demo-'));
  after(() => world.dispose());

  test('has a row for each subject, fetches what cold starts touch, and nothing for warm ones', async () => {
    const file = path.join(world.folder, 'rows.json');
    const child = spawn(process.execPath, [main, 'demo', '--runs', '1', '--json', file], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: environment,
    });
    let said = '';
    child.stdout.on('data', (part: Buffer) => (said += part.toString('utf8')));
    child.stderr.on('data', (part: Buffer) => (said += part.toString('utf8')));
    const code = await new Promise((resolve) => child.once('close', resolve));
    assert.equal(code, 0, said);
    const { rows, guest } = JSON.parse(readFileSync(file, 'utf8')) as {
      rows: Row[];
      guest: { nonzeroBytes: number };
    };
    assert.ok(guest.nonzeroBytes > 0);
    assert.deepEqual(
      rows.map((row) => row.subject),
      ['local', 'lan-cold', 'lan-warm', 'wan-cold', 'wan-warm', 'lan-cold-profile', 'wan-cold-profile'],
    );
    for (const row of rows) {
      assert.ok(row.seconds > 0 && row.ratio > 0, JSON.stringify(row));
      assert.equal(row.pageCache, 'dropped');
      const cold = row.subject.includes('cold');
      assert.equal(row.chunksFetched > 0, cold, JSON.stringify(row));
      assert.equal(row.plainBytesFetched > 0, cold, JSON.stringify(row));
      if (row.subject.endsWith('warm')) assert.equal(row.hitRate, 1);
    }
    assert.deepEqual(leftFolders(), []);
    assert.deepEqual(world.mountsLeft(), []);
    assert.deepEqual(world.processesLeft(), []);
  });

  test('Ctrl-C while a VM boots over the mount leaves nothing running, mounted or on the disk', async () => {
    // A process group of its own stands for the terminal's: Ctrl-C reaches all of it at once.
    const child = spawn(process.execPath, [main, 'demo', '--runs', '1'], {
      stdio: ['ignore', 'ignore', 'pipe'],
      env: environment,
      detached: true,
    });
    let said = '';
    const booting = new Promise<void>((resolve) => {
      child.stderr.on('data', (part: Buffer) => {
        said += part.toString('utf8');
        if (said.includes('import:')) resolve();
      });
    });
    // Not its output's end: whatever it wrongly left would keep that open.
    const ended = new Promise<number | null>((resolve) => child.once('exit', resolve));
    await booting;
    while (!world.processesLeft().some((line) => line.includes('qemu') && line.includes('/mnt/'))) {
      assert.equal(child.exitCode, null, said);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    process.kill(-child.pid!, 'SIGINT');
    assert.notEqual(await ended, 0, said);
    assert.deepEqual(leftFolders(), []);
    assert.deepEqual(world.mountsLeft(), []);
    assert.deepEqual(world.processesLeft(), []);
  });
});
