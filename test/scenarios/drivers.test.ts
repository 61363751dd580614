/** The ways a mount is read, through the real command and cache: passthrough, workers, fuse-native. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { loadFuseNative } from '../../src/frontend/fuse/index.ts';
import { World } from './world.ts';

interface Status {
  cache: { fetchedChunks: number };
  mount: { passthroughOpens: number; directReads: number; indirectReads: number };
}

const [major = 0, minor = 0] = os.release().split('.').map(Number);
const noPassthrough = major < 6 || (major === 6 && minor < 9) ? 'needs Linux 6.9' : false;
let noNative: string | false = false;
try {
  loadFuseNative();
} catch (error) {
  noNative = (error as Error).message;
}

suite('a mount read in each of its ways', () => {
  const world = new World();
  const raw = path.join(world.folder, 'disk.raw');
  const file = path.join(world.mountpoint, 'images', 'plain', '1', 'disk.raw');
  const mount = (...options: string[]) =>
    world.json('mount', world.store, world.mountpoint, ...world.proxyOptions(), ...options);
  const status = () => world.json<Status>('proxy', 'status');

  before(async () => {
    writeFileSync(raw, randomBytes(6_000_128));
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json('store', 'import', world.store, raw, 'plain:1');
  });
  after(() => world.dispose());

  test(
    'an image is served while it comes, and passed through when it is opened after all of it is here',
    { skip: noPassthrough },
    async () => {
      await mount();
      await world.succeeds('cmp', raw, file);
      const cold = (await status()).mount;
      assert.equal(cold.passthroughOpens, 0);
      await world.succeeds('cmp', raw, file);
      const warm = (await status()).mount;
      assert.equal(warm.passthroughOpens, 1);
      assert.equal(warm.directReads + warm.indirectReads, cold.directReads + cold.indirectReads);
      await world.json('umount', world.mountpoint);
    },
  );

  test('with --no-passthrough workers answer, and every byte is the same', async () => {
    await mount('--no-passthrough');
    for (let i = 0; i < 2; i++) {
      world.dropPageCache();
      await world.succeeds('cmp', raw, file);
    }
    assert.equal((await status()).mount.passthroughOpens, 0);
    await world.json('umount', world.mountpoint);
  });

  test(
    'with --driver fuse-native every byte is the same, and umount ends the proxy',
    { skip: noNative },
    async () => {
      await mount('--driver', 'fuse-native');
      await world.succeeds('cmp', raw, file);
      const { mount: counts, cache } = await status();
      assert.ok(counts.indirectReads > 0);
      assert.equal(cache.fetchedChunks, 0);
      await world.json('umount', world.mountpoint);
    },
  );
});
