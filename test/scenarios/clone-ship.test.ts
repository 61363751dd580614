/** Clones that go to the image server and to other hosts, through ssh and the real command. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { copyFileSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
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

interface Pushed {
  reference: string;
  generation: number;
  unchanged: boolean;
  newChunks: number;
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

  test('of blocks here and there only these go over the tunnel, in either direction', async () => {
    const { disk } = await world.json<Clone>('clone', 'create', 'base:1', '--name', 'strewn');
    const handle = await open(disk, 'r+');
    const blocks = 200;
    for (let i = 0; i < blocks; i++) await handle.write(randomBytes(4096), 0, 4096, 4096 * (5 + 61 * i));
    await handle.sync();
    await handle.close();
    const result = await world.json<Commit>('clone', 'commit', 'strewn', 'base:strewn');
    // Those of chunks that were zeros are wholes of their own, and compress to what was written.
    assert.ok(result.newStoredBytes < 1.1 * blocks * 4096, JSON.stringify(result));
    const { chunks } = await world.json<{ chunks: { count: number; patched: number } }>(
      ...(['store', 'show', world.store, 'base:strewn'] as const),
    );
    assert.ok(chunks.patched > 50, JSON.stringify(chunks));
    const before = (await world.json<{ fetchedStoredBytes: number }>('cache', 'status')).fetchedStoredBytes;
    await world.json('cache', 'warm', 'base:1');
    const warm = (await world.json<{ fetchedStoredBytes: number }>('cache', 'status')).fetchedStoredBytes;
    const image = path.join(world.mountpoint, 'images', 'base', 'strewn', 'disk.raw');
    await world.succeeds('cmp', disk, image);
    const after = (await world.json<{ fetchedStoredBytes: number }>('cache', 'status')).fetchedStoredBytes;
    assert.ok(after - warm < 1.1 * blocks * 4096, `${warm - before} for the parent, ${after - warm} for it`);
    await world.json('clone', 'rm', 'strewn');
  });

  /** A program that counts upwards on a disk, each number at its start and, once that is written, at its end. */
  const counter = (disk: string) => {
    const script = `
      const fs = require('node:fs');
      const fd = fs.openSync(process.argv[1], 'r+');
      const end = fs.fstatSync(fd).size - 4096;
      for (let i = 1; ; i++) {
        const bytes = Buffer.alloc(4096);
        for (let at = 0; at < 4096; at += 4) bytes.writeUInt32LE(i, at);
        fs.writeSync(fd, bytes, 0, 4096, 0);
        fs.writeSync(fd, bytes, 0, 4096, end);
        fs.writeSync(fd, bytes, 0, 4096, 4096 * (8000 + (i % 4000)));
        if (i % 100 === 0) fs.fsyncSync(fd);
        if (i % 200 === 0) fs.writeSync(1, i + '\\n');
      }`;
    const child = spawn(process.execPath, ['-e', script, disk], { stdio: ['ignore', 'pipe', 'inherit'] });
    let last = 0;
    child.stdout.on(
      'data',
      (part: Buffer) => (last = Number(part.toString('utf8').trimEnd().split('\n').at(-1))),
    );
    return {
      last: () => last,
      async stop() {
        const gone = new Promise((resolve) => child.once('exit', resolve));
        child.kill('SIGKILL');
        await gone;
      },
    };
  };

  const exported = (reference: string) => {
    const file = path.join(world.folder, reference.replace(':', '-'));
    rmSync(file, { force: true });
    return world.json('store', 'export', world.store, reference, file).then(() => file);
  };

  test('a clone is pushed while a program writes to it: the version is the disk of one moment', async () => {
    const { disk } = await world.json<Clone>('clone', 'create', 'base:1', '--name', 'busy', '--persistent');
    const program = counter(disk);
    try {
      for (const generation of [1, 2, 3]) {
        const before = program.last() + 400;
        while (program.last() < before) await sleep(20);
        const acknowledged = program.last();
        const pushed = await world.json<Pushed>('clone', 'push', 'busy');
        assert.deepEqual([pushed.reference, pushed.generation], ['busy:pushed', generation]);
        const bytes = readFileSync(await exported('busy:pushed'));
        const [first, last] = [bytes.subarray(0, 4096), bytes.subarray(-4096)];
        const [a, b] = [first.readUInt32LE(0), last.readUInt32LE(0)];
        assert.ok(b >= acknowledged, `${acknowledged} was acknowledged, ${b} is in`);
        assert.ok(a === b || a === b + 1, `${a} at the start and ${b} at the end`);
        for (const block of [first, last]) assert.ok(block.equals(Buffer.alloc(4096, block.subarray(0, 4))));
        for (let i = Math.max(1, b - 3999); i < b; i++) {
          assert.equal(bytes.readUInt32LE(4096 * (8000 + (i % 4000))), i, 'an earlier write is not in');
        }
        assert.ok(program.last() > 0);
      }
    } finally {
      await program.stop();
    }
    await world.json('clone', 'rm', 'busy');
  });

  test('a pushed clone goes on on another host, and comes back; only what is new travels, and who has not the last is refused', async () => {
    const second = World.onSecondHost(world);
    try {
      await second.mount(server.url, server);
      const first = await world.json<Pushed>('clone', 'push', 'work', '--as', 'shared:work');
      assert.equal(first.newChunks, 0, 'its commit is there');
      assert.equal((await world.json<Pushed>('clone', 'push', 'work')).unchanged, true);

      const here = await second.json<Clone>('clone', 'pull', 'shared:work');
      assert.equal(here.id, 'work');
      await second.succeeds('cmp', expected, here.disk);
      await patch(here.disk, 50 * MIB, randomBytes(MIB));
      await patch(here.disk, 3 * MIB, Buffer.alloc(8192));
      await second.succeeds('cmp', expected, here.disk);
      await second.refuses(
        1,
        /generation 1 of it already/,
        'clone',
        'pull',
        'shared:work',
        '--name',
        'again',
      );
      const back = await second.json<Pushed>('clone', 'push', 'work');
      assert.equal(back.generation, 2);
      assert.ok(back.newChunks <= 6, JSON.stringify(back));

      await world.refuses(
        1,
        /generation 2 of it was pushed from .*this clone has 1: pull/,
        'clone',
        'push',
        'work',
      );
      await world.refuses(1, /remove it, then pull generation 2/, 'clone', 'pull', 'shared:work');
      await world.json('clone', 'rm', 'work');
      await world.json('store', 'gc', world.store, '--grace', '0');
      const again = await world.json<Clone>('clone', 'pull', 'shared:work', '--name', 'home');
      await world.succeeds('cmp', expected, again.disk);
      assert.equal((await world.json<Pushed>('clone', 'push', 'home')).unchanged, true);

      await world.refuses(2, /an image and not a clone/, 'clone', 'pull', 'base:1');
      await world.refuses(1, /has no none:1/, 'clone', 'pull', 'none:1');
      await world.refuses(1, /is something else already/, 'clone', 'push', 'home', '--as', 'base:1');
      await world.json('clone', 'create', 'base:1', '--name', 'gone');
      await world.refuses(2, /goes with its VM/, 'clone', 'push', 'gone');
    } finally {
      await second.dispose();
    }
  });

  test('an image server that was not told to takes nothing, and a clone that was not pushed stays as it is', async () => {
    const strict = await world.server();
    const other = World.onSecondHost(world);
    try {
      await other.mount(strict.url, strict);
      await other.json('clone', 'create', 'base:1', '--name', 'mine', '--persistent');
      await other.refuses(1, /takes no uploads from here.*denied/, 'clone', 'push', 'mine');
      await other.refuses(1, /denied/, 'clone', 'commit', 'mine', 'base:9');
      const { pushed } = await other.json<{ pushed?: unknown }>('clone', 'show', 'mine');
      assert.equal(pushed, undefined);
    } finally {
      await other.dispose();
      await strict.stop();
    }
  });

  test('progress is said on standard error, a line a second; Ctrl-C cancels an export and leaves nothing', async () => {
    const { disk } = await world.json<Clone>('clone', 'create', 'base:1', '--name', 'large', '--size', '6G');
    await world.succeeds(
      'dd',
      'if=/dev/zero',
      `of=${disk}`,
      'bs=1M',
      'count=1500',
      'conv=notrunc',
      'status=none',
    );
    const exports: [string[], RegExp][] = [
      [['large.tar'], /^export large: \d+ %\n(export large: \d+ %\n)*gridvfs: cancelled \[closed\]\n$/],
      [['large.qcow2', '--qcow2'], /^export large: \d+ %\n(export large: \d+ %\n)*gridvfs: .* \[closed\]\n$/],
    ];
    for (const [[file, ...options], words] of exports) {
      const child = spawn(
        process.execPath,
        [MAIN, 'clone', 'export', 'large', path.join(world.folder, file!), ...options],
        { stdio: ['ignore', 'ignore', 'pipe'], env: world.environment },
      );
      let said = '';
      let told = false;
      child.stderr.on('data', (part: Buffer) => {
        said += part.toString('utf8');
        if (said.includes('%') && !told) told = child.kill('SIGINT'); // a second one would end it at once
      });
      const code = await new Promise((resolve) => child.once('close', resolve));
      assert.equal(code, 1);
      assert.match(said, words);
    }
    // Who is told "cancelled" finds the clone let go of: the second export above, and this.
    await world.json('clone', 'rm', 'large');
    assert.deepEqual(
      readdirSync(world.folder).filter((name) => name.startsWith('large')),
      [],
    );
  });
});
