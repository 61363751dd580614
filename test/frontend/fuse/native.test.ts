/** The life of a mount of the fuse-native driver: made, refused, busy, taken down by others, dead. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { closeSync, openSync, readFileSync, readSync, statSync } from 'node:fs';
import path from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { promisify } from 'node:util';
import { cleanDeadMount, describeMount, loadFuseNative } from '../../../src/frontend/fuse/index.ts';
import type { FileSpec } from './file-tree.ts';
import { MountChild, Place } from './harness.ts';

const run = promisify(execFile);

let skip: string | false = false;
try {
  loadFuseNative();
} catch (error) {
  skip = (error as Error).message;
}

describe('a mount of the fuse-native driver', { skip }, () => {
  let place: Place;
  let spec: FileSpec;
  const options = { driver: 'fuse-native' } as const;
  const file = (name: string) => path.join(place.mountpoint, name);

  before(() => {
    place = new Place();
    spec = {
      path: 'images/a/1/disk.raw',
      source: place.source('a', 2_000_000),
      kind: 'image',
      contentId: 'a1',
    };
  });
  afterEach(() => place.clean());
  after(() => place.remove());

  test('10 mounts in a row show each its own content and leave no mount, image or descriptor', async () => {
    const sources = Array.from({ length: 10 }, (_, index) => place.source(`row${index}`, 100_000 + index));
    const specOf = (index: number) => ({ ...spec, source: sources[index]!, contentId: `row${index}` });
    const child = await MountChild.start(place, { specs: [specOf(0)], options });
    const descriptors = [];
    for (let index = 0; index < 10; index++) {
      if (index > 0) await child.run({ do: 'mount', specs: [specOf(index)] });
      await run('cmp', [sources[index]!, file(spec.path)]);
      await child.run({ do: 'unmount' });
      assert.deepEqual(await child.run({ do: 'ended' }), { reason: 'unmounted' });
      assert.equal(await describeMount(place.mountpoint), undefined);
      const statistics = await child.statistics();
      assert.equal(statistics.openImages, 0);
      descriptors.push(statistics.descriptors);
    }
    assert.equal(descriptors.at(-1), descriptors[2]);
    await child.stop();
  });

  test('unmount of a mount in use says by whom, and works afterwards', async () => {
    const child = await MountChild.start(place, { specs: [spec], options });
    const fd = openSync(file(spec.path), 'r');
    await assert.rejects(
      child.run({ do: 'unmount' }),
      (error: Error & { code: string }) =>
        error.code === 'in-use' && error.message.includes(`(${process.pid})`),
    );
    assert.equal(readSync(fd, Buffer.alloc(10), 0, 10, 0), 10);
    closeSync(fd);
    await child.stop();
    assert.equal(await describeMount(place.mountpoint), undefined);
  });

  test('umount by somebody else ends the mount', async () => {
    const child = await MountChild.start(place, { specs: [spec], options });
    const ended = child.run({ do: 'ended' });
    await run('umount', [place.mountpoint]);
    assert.deepEqual(await ended, { reason: 'unmounted' });
    await child.stop();
  });

  test('kill -9 of the daemon leaves a dead mount that is recognised and cleaned', async () => {
    const child = await MountChild.start(place, { specs: [spec], options });
    await child.kill();
    assert.equal((await describeMount(place.mountpoint))?.state, 'dead');
    assert.equal(await cleanDeadMount(place.mountpoint), true);
  });

  test('a path keeps its content while it is open, and shows the moved tag after the last close', async () => {
    const child = await MountChild.start(place, { specs: [spec], options });
    const moved = place.source('moved', 1_234_567);
    const fd = openSync(file(spec.path), 'r');
    await child.run({ do: 'specs', specs: [{ ...spec, source: moved, contentId: 'a2' }] });
    await setTimeout(1200);
    await run('cmp', [spec.source, file(spec.path)]);
    const bytes = Buffer.alloc(1000);
    readSync(fd, bytes, 0, 1000, 1_999_000);
    assert.ok(bytes.equals(readFileSync(spec.source).subarray(1_999_000, 2_000_000)));
    closeSync(fd);
    await setTimeout(1200);
    await run('cmp', [moved, file(spec.path)]);
    assert.equal(statSync(file(spec.path)).size, 1_234_567);
    await child.stop();
  });
});
