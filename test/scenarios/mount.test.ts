/** From an image file to a mount and back, through the real command, the ssh tunnel and the kernel. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import {
  cpSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  closeSync,
  readFileSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

interface Status {
  cache: { fetchedChunks: number; refetchedChunks: number; presentBytes: number };
}

/** A sparse raw disk: data here and there, holes between, an odd tail. */
function makeRaw(file: string): void {
  const fd = openSync(file, 'w');
  ftruncateSync(fd, 48 * MIB + 5 * 512);
  for (const [offset, length] of [
    [0, 3 * MIB],
    [10 * MIB + 4096, 5 * MIB],
    [40 * MIB - 700, 2 * MIB],
    [48 * MIB, 5 * 512],
  ] as const) {
    writeSync(fd, randomBytes(length), 0, length, offset);
  }
  closeSync(fd);
}

/** Reads random ranges of both files in a child process and says where they differ. */
const COMPARE_RANDOM = `
  const [a, b] = process.argv.slice(1).map((file) => require('node:fs').openSync(file, 'r'));
  const { readSync, fstatSync } = require('node:fs');
  const size = fstatSync(a).size;
  if (fstatSync(b).size !== size) throw new Error('sizes differ');
  const left = Buffer.alloc(1 << 20), right = Buffer.alloc(1 << 20);
  for (let i = 0; i < 1000; i++) {
    const length = 1 + Math.floor(Math.random() ** 3 * (left.length - 1));
    const offset = Math.floor(Math.random() * size);
    const got = readSync(a, left, 0, length, offset);
    if (readSync(b, right, 0, length, offset) !== got) throw new Error('lengths differ at ' + offset);
    if (left.compare(right, 0, got, 0, got) !== 0) throw new Error('bytes differ at ' + offset + ', ' + length);
  }
`;

suite('images served over ssh and mounted', () => {
  const world = new World();
  let server: ServerHandle;
  const raw = path.join(world.folder, 'disk.raw');
  const qcow2 = path.join(world.folder, 'disk.qcow2');
  const mounted = (name: string) => path.join(world.mountpoint, 'images', name, '1', 'disk.raw');
  const status = () => world.json<Status>('proxy', 'status');

  before(async () => {
    makeRaw(raw);
    await world.succeeds('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', raw, qcow2);
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json('store', 'import', world.store, raw, 'plain:1');
    await world.json('store', 'import', world.store, qcow2, 'packed:1');
    server = await world.server();
  });
  after(() => world.dispose());

  test('every imported image reads back equal after the page cache was dropped, and random reads are equal', async () => {
    await world.mount(server.url, server);
    for (const name of ['plain', 'packed']) {
      world.dropPageCache();
      await world.succeeds('cmp', raw, mounted(name));
      world.dropPageCache();
      await world.succeeds(process.execPath, '-e', COMPARE_RANDOM, raw, mounted(name));
    }
    assert.ok((await status()).cache.fetchedChunks > 0);
    await world.json('umount', world.mountpoint);
  });

  test('a second mount finds everything in the cache and fetches nothing', async () => {
    await world.mount(server.url, server);
    world.dropPageCache();
    await world.succeeds('cmp', raw, mounted('plain'));
    const { cache } = await status();
    assert.equal(cache.fetchedChunks, 0);
    assert.equal(cache.refetchedChunks, 0);
    await world.json('umount', world.mountpoint);
  });

  test('after kill -9 of the proxy and its holder a remount has what was there, and no byte is wrong', async () => {
    const proxy = await world.mount(server.url, server);
    await world.succeeds('cmp', raw, mounted('plain'));
    await world.killWhole(proxy);
    const dead = await world.program('ls', world.mountpoint);
    assert.notEqual(dead.code, 0, 'the mount of a killed proxy answers nothing');
    await world.mount(server.url, server);
    world.dropPageCache();
    await world.succeeds('cmp', raw, mounted('plain'));
    assert.equal((await status()).cache.fetchedChunks, 0);
    await world.json('umount', world.mountpoint);
  });

  test('a clone keeps what was written to it over unmount and kill -9, and its image stays as it was', async () => {
    const first = await world.mount(server.url, server);
    const { disk } = await world.json<{ disk: string }>('clone', 'create', 'plain:1', '--name', 'work');
    const expected = readFileSync(raw);
    const patch = randomBytes(300_000);
    const patchFile = path.join(world.folder, 'patch');
    writeFileSync(patchFile, patch);
    const put = (offset: number) =>
      world.succeeds(
        'dd',
        `if=${patchFile}`,
        `of=${disk}`,
        'bs=4M',
        `seek=${offset}`,
        'oflag=seek_bytes',
        'conv=notrunc,fsync',
      );
    await put(123_457);
    patch.copy(expected, 123_457);
    await world.killWhole(first);
    await world.mount(server.url, server);
    await put(30 * MIB + 1);
    patch.copy(expected, 30 * MIB + 1);
    await world.json('umount', world.mountpoint);
    await world.mount(server.url, server);
    world.dropPageCache();
    const sum = (await world.succeeds('sha256sum', disk)).split(' ')[0];
    assert.equal(sum, createHash('sha256').update(expected).digest('hex'));
    await world.succeeds('cmp', raw, mounted('plain'));
    await world.json('clone', 'rm', 'work');
    assert.deepEqual(await world.json('clone', 'ls'), []);
    assert.equal(existsSync(path.join(world.folder, 'state', 'clones', 'work')), false);
    await world.json('umount', world.mountpoint);
  });

  test('a source that went away is no hindrance to what is in the cache', async () => {
    const other = await world.server();
    await world.mount(other.url, other);
    await world.succeeds('cmp', raw, mounted('plain'));
    await other.stop();
    world.dropPageCache();
    await world.succeeds('cmp', raw, mounted('plain'));
    await world.json('umount', world.mountpoint);
  });

  test('of several mounts that begin together at one mount point, one is mounted and the others are refused', async () => {
    const outcomes = await Promise.all(
      [1, 2, 3].map(() => world.run('mount', server.url, world.mountpoint, ...world.proxyOptions(server))),
    );
    const refusals = outcomes.filter(({ code }) => code !== 0).map(({ stderr }) => stderr);
    assert.equal(refusals.length, 2, JSON.stringify(outcomes));
    for (const refusal of refusals) assert.match(refusal, /\[in-use\]/);
    assert.equal(world.mountsLeft().length, 1);
    await world.succeeds('cmp', raw, mounted('plain'));
    await world.json('umount', world.mountpoint);
  });

  test('bad input gets one clear line, the right exit code, and leaves nothing', async () => {
    const options = world.proxyOptions(server);
    const folderOf = (name: string) => path.join(world.folder, name);
    await world.refuses(2, /mount/, 'mount', server.url);
    await world.refuses(2, /unknown/i, 'mount', server.url, world.mountpoint, '--no-such-option');
    await world.refuses(2, /lower-case/, 'store', 'import', world.store, raw, 'Not/A:Name');
    await world.refuses(1, /no-such-file/, 'store', 'import', world.store, folderOf('no-such-file'), 'x:1');
    await world.refuses(1, /store init/, 'mount', folderOf('no-store'), world.mountpoint, ...options);
    await world.refuses(
      1,
      /127\.0\.0\.1:1\b/,
      'mount',
      'ssh://grid@127.0.0.1:1/store',
      world.mountpoint,
      ...options,
    );
    await world.refuses(
      1,
      /SHA256:/,
      ...['mount', server.url, world.mountpoint, '--name', 'w2', '--identity', world.identity],
      ...[
        '--host-key',
        `SHA256:${'A'.repeat(43)}`,
        '--cache-dir',
        folderOf('c2'),
        '--state-dir',
        folderOf('s2'),
      ],
    );
    await world.refuses(
      1,
      /mount point|not-found|no such/i,
      'mount',
      server.url,
      folderOf('no-mountpoint'),
      ...options,
    );

    const truncated = folderOf('truncated.qcow2');
    cpSync(qcow2, truncated);
    truncateSync(truncated, 3 * MIB);
    await world.refuses(1, /--replace/, 'store', 'import', world.store, raw, 'plain:1');
    await world.refuses(1, /truncated\.qcow2/, 'store', 'import', world.store, truncated, 'broken:1');
    const images = await world.json<unknown[]>('store', 'ls', world.store);
    assert.equal(images.length, 2, 'the truncated image has no tag');

    const newer = folderOf('newer');
    mkdirSync(newer);
    writeFileSync(path.join(newer, 'gridvfs-store.json'), '{"format":"gridvfs-store","version":99}');
    await world.refuses(1, /newer/, 'mount', newer, world.mountpoint, ...options);
    assert.deepEqual(world.mountsLeft(), []);

    await world.mount(server.url, server);
    await world.refuses(1, /in-use/, 'mount', server.url, world.mountpoint, ...options);
    const second = folderOf('mnt2');
    mkdirSync(second);
    await world.refuses(
      1,
      /cache/,
      ...['mount', server.url, second, '--name', 'w3', '--cache-dir', folderOf('cache')],
      ...['--state-dir', folderOf('s3'), '--identity', world.identity, '--host-key', server.fingerprint],
    );
    await world.refuses(1, /no image nothing:1/, 'clone', 'create', 'nothing:1');
    await world.refuses(1, /no VM 'nobody'/, 'vm', 'stop', 'nobody');
    const holder = await holdOpen(world, mounted('plain'));
    await world.refuses(1, /in-use/, 'umount', world.mountpoint);
    await holder.release();
    await world.json('umount', world.mountpoint);
    await world.refuses(1, /no gridvfs proxy/, 'umount', world.mountpoint);
  });
});

/** A child process that keeps a file open until it is released. */
async function holdOpen(world: World, file: string): Promise<{ release(): Promise<void> }> {
  const child = spawn('sh', ['-c', 'exec 3<"$0"; echo open; read answer', file], {
    stdio: ['pipe', 'pipe', 'inherit'],
    env: world.environment,
  });
  await new Promise((resolve) => child.stdout.once('data', resolve));
  return {
    release: () =>
      new Promise((resolve) => {
        child.once('exit', () => resolve());
        child.stdin.end('\n');
      }),
  };
}
