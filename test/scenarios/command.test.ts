/** What people meet on the command line: usage errors, exit codes, keys in the wrong place. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, copyFileSync, mkdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, suite, test } from 'node:test';
import { World } from './world.ts';

const MAIN = path.resolve(import.meta.dirname, '../../src/main.ts');

suite('the command', () => {
  const world = new World();
  after(() => world.dispose());

  test('usage errors are one line with a code, and end with 2', async () => {
    await world.refuses(2, /^gridvfs: .*\[bad-request\]$/m, 'mount');
    await world.refuses(2, /Did you mean --quota.*\[bad-request\]$/m, 'mount', '/a', '/b', '--quotta', '1G');
    await world.refuses(2, /unknown command.*\[bad-request\]$/m, 'muont');
    await world.refuses(2, /\[bad-request\]$/m, 'mount', '/a', '/b', '--quota', 'much');
  });

  test('demo and bench refuse unknown options with 2, and show help without root', async () => {
    await world.refuses(2, /^gridvfs: .*--nonsense.*\[bad-request\]$/m, 'demo', '--nonsense');
    const help = await world.run('demo', '--help');
    assert.equal(help.code, 0);
    assert.match(help.stdout, /--guest/);
    const user = await world.program(
      ...(['setpriv', '--reuid', '65534', '--clear-groups', process.execPath, MAIN, 'demo'] as const),
    );
    assert.equal(user.code, 1);
    assert.match(user.stderr, /^gridvfs: .*root.*\[unsupported\]\n$/);
  });

  test('sizes and durations in --help are as people write them', async () => {
    const { stdout } = await world.run('store', 'import', '--help');
    assert.match(stdout, /default: 256 KiB/);
    assert.match((await world.run('vm', 'run', '--help')).stdout, /default:\s+5\s+min/);
  });

  test('a server refuses a private key and an empty file as the list of who may come', async () => {
    assert.deepEqual(await world.json('store', 'init', world.store), { store: world.store });
    const empty = path.join(world.folder, 'empty');
    writeFileSync(empty, '# nobody yet\n');
    const serve = ['server', world.store, '--ssh', '127.0.0.1:0', '--authorized-keys'];
    await world.refuses(2, /private key.*id_ed25519\.pub/, ...serve, world.identity);
    await world.refuses(2, /no public key/, ...serve, empty);
    await world.refuses(1, /\[not-found\]/, ...serve, path.join(world.folder, 'missing'));
  });

  test('what this user may not read is no-permission', async () => {
    const closed = path.join(world.folder, 'closed');
    mkdirSync(closed, { mode: 0o700 });
    chmodSync(world.folder, 0o755);
    const outcome = await world.program(
      ...(['setpriv', '--reuid', '65534', '--clear-groups', process.execPath, MAIN] as const),
      ...['store', 'ls', path.join(closed, 'store')],
    );
    assert.equal(outcome.code, 1, outcome.stderr);
    assert.match(outcome.stderr, /\[no-permission\]/);
  });

  // Fails without `kill` on SIGINT in gridvfs.mjs: the wrapper waits for a program that nobody told.
  test('the command of a checkout passes on SIGINT that no terminal sent', async () => {
    const store = path.join(world.folder, 'interrupted');
    await world.json('store', 'init', store);
    const wrapper = path.resolve(import.meta.dirname, '../../src/setup/gridvfs.mjs');
    // Another Node than the pinned one starts that.
    const node = path.join(world.folder, 'node');
    copyFileSync(process.execPath, node);
    const words = [wrapper, 'server', store, '--listen', '127.0.0.1:0', '--json'];
    const server = spawn(node, words, { env: world.environment, stdio: ['ignore', 'pipe', 'inherit'] });
    const ended = once(server, 'exit');
    await once(server.stdout, 'data');
    server.kill('SIGINT');
    let isLate = false;
    const late = setTimeout(() => (isLate = server.kill('SIGTERM')), 5_000);
    const [code] = (await ended) as [number];
    clearTimeout(late);
    assert.deepEqual({ code, isLate }, { code: 0, isLate: false });
  });

  test('whoever stops reading the output is no failure', async () => {
    const child = spawn('sh', ['-c', '"$0" "$1" --help | true', process.execPath, MAIN], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    let said = '';
    child.stderr.on('data', (part: Buffer) => (said += part.toString('utf8')));
    await new Promise((resolve) => child.once('close', resolve));
    assert.equal(said, '');
  });
});
