/**
 * What becomes of clones whose image loses its name at the server and is collected there: a server that knows of the
 * clones keeps it; where it did not know, what was not fetched yet is an error that says why, never other bytes, and
 * the clone is whole again when the same content is imported again.
 *
 * Guarded lines, each tried by taking it out: gc.ts #mark, the holds (the first test); clone-parts.ts openBase, `gone`
 * (the second: the message is of a chunk).
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { MIB } from '../../src/core/limits.ts';
import { World } from './world.ts';

interface Collected {
  removed: { manifests: number; chunks: number };
}

const LONG = process.env['GRIDVFS_LONG'] === '1';

suite('clones whose image is collected at the server', { skip: LONG ? false : 'a long test' }, () => {
  const world = new World();
  const holds = path.join(world.store, 'holds');
  const main = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
  let log = '';
  const rawOf = (name: string) => path.join(world.folder, `${name}.raw`);

  before(async () => {
    await world.succeeds(process.execPath, main, 'store', 'init', world.store);
    for (const name of ['kept', 'lost']) {
      writeFileSync(rawOf(name), randomBytes(6 * MIB));
      await world.json('store', 'import', world.store, rawOf(name), `${name}:1`);
    }
    const server = await world.server();
    ({ log } = await world.json<{ log: string }>(
      ...(['mount', server.url, world.mountpoint, ...world.proxyOptions(server)] as const),
    ));
  });
  after(() => world.dispose());

  /** A clone, once the server has heard of it. */
  const make = async (name: string) => {
    const { disk, base } = await world.json<{ disk: string; base: string }>(
      ...(['clone', 'create', `${name}:1`, '--name', name, '--persistent'] as const),
    );
    const isHeld = () =>
      readdirSync(holds).some((holder) => readFileSync(path.join(holds, holder), 'utf8').includes(base));
    for (const endMs = performance.now() + 30_000; ; await sleep(50)) {
      try {
        if (isHeld()) return disk;
      } catch {
        // The folder comes with the first of them.
      }
      assert.ok(performance.now() < endMs, `the server has not heard of clone ${name}`);
    }
  };
  const forget = async (name: string) => {
    await world.json('store', 'rm', world.store, `${name}:1`);
    return world.json<Collected>('store', 'gc', world.store, '--grace', '0s');
  };

  test('while a host has a clone of it, a collection leaves the image, and takes it when the clone is gone', async () => {
    const disk = await make('kept');
    assert.equal((await forget('kept')).removed.manifests, 0);
    await world.succeeds('cmp', rawOf('kept'), disk);
    await world.json('clone', 'rm', 'kept');
    let removed = 0;
    for (const endMs = performance.now() + 30_000; removed === 0; await sleep(200)) {
      assert.ok(performance.now() < endMs, 'the server still keeps it');
      removed = (await world.json<Collected>('store', 'gc', world.store, '--grace', '0s')).removed.manifests;
    }
    assert.equal(removed, 1);
  });

  test('where the server knew of no clone, what is gone is an error that says so, until the content is there again', async () => {
    const disk = await make('lost');
    const mine = randomBytes(4096);
    const patch = path.join(world.folder, 'patch');
    writeFileSync(patch, mine);
    await world.succeeds('dd', `if=${patch}`, `of=${disk}`, 'conv=notrunc,fsync', 'status=none');
    rmSync(holds, { recursive: true });
    assert.equal((await forget('lost')).removed.manifests, 1);
    world.dropPageCache();

    const read = await world.program('cmp', rawOf('lost'), disk, '4096', '4096');
    assert.match(read.stderr, /Input\/output error/);
    const own = await world.program('cmp', '-n', '4096', patch, disk);
    assert.equal(own.code, 0, 'what was written to the clone is there');
    const why = /the source has no longer all of it: a garbage collection took/;
    const fill = ['clone', 'create', '--from', 'lost', '--name', 'full', '--full', '--wait'];
    await world.refuses(1, why, ...fill);
    await world.json('clone', 'rm', 'full');
    assert.match(readFileSync(log, 'utf8'), why);

    await world.json('store', 'import', world.store, rawOf('lost'), 'again:1');
    await world.succeeds('cmp', rawOf('lost'), disk, '4096', '4096');
  });
});
