/** Clones that go to the image server and to other hosts, through ssh and the real command. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { copyFileSync, existsSync, readdirSync, truncateSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

interface Clone {
  id: string;
  disk: string;
}

interface Commit {
  changedChunks: number;
  newChunks: number;
  newStoredBytes: number;
  digest: string;
}

const SIZE = 64 * MIB;
const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');

suite('clones and an image server behind ssh', () => {
  const world = new World();
  let server: ServerHandle;
  const expected = path.join(world.folder, 'expected.raw');

  before(async () => {
    const raw = path.join(world.folder, 'base.raw');
    writeFileSync(raw, randomBytes(20 * MIB));
    truncateSync(raw, SIZE);
    copyFileSync(raw, expected);
    await world.succeeds(process.execPath, MAIN, 'store', 'init', world.store);
    await world.json('store', 'import', world.store, raw, 'base:1');
    server = await world.server('--accept-uploads');
    await world.mount(server.url, server);
  });
  after(() => world.dispose());

  /** Writes the same to the disk and to what is expected of it. */
  const patch = async (disk: string, offset: number, bytes: Buffer) => {
    const piece = path.join(world.folder, 'piece');
    writeFileSync(piece, bytes);
    for (const target of [disk, expected]) {
      await world.succeeds(
        ...(['dd', `if=${piece}`, `of=${target}`, 'bs=1M', `seek=${offset}`] as const),
        ...['oflag=seek_bytes', 'conv=notrunc,fsync', 'status=none'],
      );
    }
  };

  test('a commit over the tunnel sends only what changed, and is the disk as it was', async () => {
    const { disk } = await world.json<Clone>('clone', 'create', 'base:1', '--name', 'work', '--persistent');
    await patch(disk, 3 * MIB + 100, randomBytes(300_000));
    await patch(disk, 40 * MIB, Buffer.alloc(MIB, 'same '));
    const result = await world.json<Commit>('clone', 'commit', 'work', 'base:2');
    assert.equal(result.changedChunks, 2 + 4);
    assert.ok(result.newChunks <= 2 + 4, JSON.stringify(result));
    assert.ok(result.newStoredBytes < 600_000, JSON.stringify(result));
    const committed = path.join(world.folder, 'committed.raw');
    await world.json('store', 'export', world.store, 'base:2', committed);
    await world.succeeds('cmp', expected, committed);
    const again = await world.json<Commit>('clone', 'commit', 'work', 'base:3', '--label', 'os=mine');
    assert.equal(again.newChunks, 0);
    const { manifest } = await world.json<{ manifest: { labels: Record<string, string> } }>(
      ...(['store', 'show', world.store, 'base:3'] as const),
    );
    assert.deepEqual([manifest.labels['os'], manifest.labels['commit.clone']], ['mine', 'work']);
  });

  test('progress is said on standard error, a line a second; Ctrl-C cancels an export and leaves nothing', async () => {
    const { disk } = await world.json<Clone>('clone', 'create', 'base:1', '--name', 'large', '--size', '3G');
    await world.succeeds(
      'dd',
      'if=/dev/zero',
      `of=${disk}`,
      'bs=1M',
      'count=600',
      'conv=notrunc',
      'status=none',
    );
    const archive = path.join(world.folder, 'large.tar');
    const child = spawn(process.execPath, [MAIN, 'clone', 'export', 'large', archive], {
      stdio: ['ignore', 'ignore', 'pipe'],
      env: world.environment,
    });
    let said = '';
    child.stderr.on('data', (part: Buffer) => {
      said += part.toString('utf8');
      if (said.includes('%')) child.kill('SIGINT');
    });
    const code = await new Promise((resolve) => child.once('close', resolve));
    assert.equal(code, 1);
    assert.match(said, /^export large: \d+ %\n(export large: \d+ %\n)*gridvfs: cancelled \[closed\]\n$/);
    // The proxy lets go of the clone when it has taken everything back.
    for (let tries = 0; (await world.run('clone', 'rm', 'large')).code !== 0; tries++) {
      assert.ok(tries < 20, 'the clone stays held');
    }
    assert.equal(existsSync(archive), false);
    assert.deepEqual(
      readdirSync(world.folder).filter((name) => name.startsWith('large')),
      [],
    );
  });
});
