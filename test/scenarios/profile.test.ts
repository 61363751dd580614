/** Boots that are recorded on one host and replayed on another, through the real command and the ssh tunnel. */
import assert from 'node:assert/strict';
import { readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { World } from './world.ts';
import type { CacheView, ServerHandle } from './world.ts';

suite('profiles of boots', () => {
  const world = new World();
  let server: ServerHandle;

  before(async () => {
    await world.storeWithGuest();
    server = await world.server();
  });
  after(() => world.dispose());

  /** One boot on a host that has nothing; the figures of its disk. */
  async function coldBoot(...options: string[]) {
    rmSync(path.join(world.folder, 'cache'), { recursive: true, force: true });
    await world.json('mount', server.url, world.mountpoint, ...world.proxyOptions(server), ...options);
    await world.json('vm', 'run', 'small:1', '--name', 'one');
    await world.json('vm', 'stop', 'one', '--now');
    const { images } = await world.json<CacheView>('cache', 'status');
    return images.find(({ names }) => names.includes('small:1'))!;
  }

  test('the second host finds ahead of it what the boot on the first one touched', async () => {
    const first = await coldBoot();
    assert.ok(first.touchedChunks > 0 && first.missedChunks > 0);
    assert.deepEqual(
      await world.json('cache', 'warm', 'small:1', '--purpose', 'boot').then((r) => r['fetchedChunks']),
      0,
    );
    await world.json('umount', world.mountpoint);
    const kept = readdirSync(path.join(world.store, 'v1', 'profiles'), { recursive: true, encoding: 'utf8' });
    assert.equal(kept.filter((name) => name.endsWith('boot.json')).length, 3, 'disk, kernel and initrd');
    const second = await coldBoot();
    assert.ok(
      second.prefetchedChunks >= 0.9 * first.touchedChunks,
      `${second.prefetchedChunks} chunks ahead`,
    );
    assert.ok(second.prefetchedUsedChunks >= 0.9 * second.prefetchedChunks);
    await world.json('umount', world.mountpoint);
  });

  const skip = process.env['GRIDVFS_LONG'] === '1' ? false : 'a boot more; in the long run';
  test('without profiles nothing is replayed', { skip }, async () => {
    const disk = await coldBoot('--no-profile');
    assert.ok(disk.prefetchedChunks <= disk.touchedChunks / 2, `${disk.prefetchedChunks} chunks ahead`);
    await world.json('umount', world.mountpoint);
  });
});
