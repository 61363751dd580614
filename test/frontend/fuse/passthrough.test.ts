/** Wholly local images that the kernel reads by itself: when they are, when not, and what falls back. */
import assert from 'node:assert/strict';
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import { execFile } from 'node:child_process';
import os from 'node:os';
import path from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { promisify } from 'node:util';
import { withMapping } from '../../suites/mapped-file.ts';
import type { FileSpec } from './file-tree.ts';
import { MountChild, Place } from './harness.ts';

const run = promisify(execFile);
const [major = 0, minor = 0] = os.release().split('.').map(Number);
const skip = major < 6 || (major === 6 && minor < 9) ? 'needs Linux 6.9' : false;

describe('passthrough', { skip }, () => {
  let place: Place;
  let spec: FileSpec;
  let expected: Buffer;
  let file: string;

  before(() => {
    place = new Place();
    const source = place.source('whole', 3_000_001);
    spec = { path: 'images/a/1/disk.raw', source, kind: 'image', contentId: 'a1', whole: true };
    expected = readFileSync(source);
    file = path.join(place.mountpoint, spec.path);
  });
  afterEach(() => place.clean());
  after(() => place.remove());

  const readsAll = (fd: number) => {
    const bytes = Buffer.alloc(expected.length + 10);
    let at = 0;
    for (let got = -1; got !== 0; at += got) got = readSync(fd, bytes, at, bytes.length - at, at);
    assert.ok(bytes.subarray(0, at).equals(expected));
  };
  const requestsOf = async (child: MountChild) => {
    const { directReads, indirectReads } = await child.statistics();
    return directReads + indirectReads;
  };
  /** RELEASE comes some time after close(2). */
  const released = async (child: MountChild) => {
    for (let i = 0; i < 100 && (await child.statistics()).openFiles > 0; i++) await setTimeout(10);
  };

  test('an image that is wholly here is read without a request, and claimed until its last release', async () => {
    const child = await MountChild.start(place, { specs: [spec] });
    const first = openSync(file, 'r');
    assert.equal((await child.statistics()).claims, 1);
    readsAll(first);
    const copy = path.join(place.folder, 'copy');
    await run('dd', [`if=${file}`, `of=${copy}`, 'bs=64k', 'iflag=direct']);
    assert.ok(readFileSync(copy).equals(expected));
    for (const how of ['shared-read', 'private'] as const) {
      withMapping(file, how, 8192, 100_000, (mapping) => {
        assert.ok(mapping.read(0, 100_000).equals(expected.subarray(8192, 108_192)));
      });
    }
    assert.equal(await requestsOf(child), 0);
    const statistics = await child.statistics();
    assert.equal(statistics.passthroughOpens, 4);
    assert.equal(statistics.claims, 1);
    closeSync(first);
    await released(child);
    assert.equal((await child.statistics()).openImages, 0);
    assert.deepEqual((await child.statistics()).logged, []);
    await child.stop();
  });

  test('a file that becomes whole while it is open stays served until the last release', async () => {
    const child = await MountChild.start(place, { specs: [{ ...spec, whole: false }] });
    const first = openSync(file, 'r');
    readSync(first, Buffer.alloc(10), 0, 10, 0);
    await child.run({ do: 'specs', specs: [spec] });
    // As passthrough this open would be EIO.
    const second = openSync(file, 'r');
    readsAll(second);
    closeSync(first);
    const third = openSync(file, 'r');
    closeSync(second);
    readsAll(third);
    closeSync(third);
    await released(child);
    assert.equal((await child.statistics()).passthroughOpens, 0);
    const fourth = openSync(file, 'r');
    readsAll(fourth);
    assert.equal((await child.statistics()).passthroughOpens, 1);
    closeSync(fourth);
    await child.stop();
  });

  test('a file that is whole no more while it is open stays claimed until the last release', async () => {
    const child = await MountChild.start(place, { specs: [spec] });
    const first = openSync(file, 'r');
    await child.run({ do: 'specs', specs: [{ ...spec, whole: false }] });
    const second = openSync(file, 'r');
    readsAll(second);
    closeSync(first);
    closeSync(second);
    assert.equal(await requestsOf(child), 0);
    await released(child);
    const third = openSync(file, 'r');
    readsAll(third);
    closeSync(third);
    assert.equal((await child.statistics()).passthroughOpens, 2);
    assert.notEqual(await requestsOf(child), 0);
    await child.stop();
  });

  test('50 opens and closes at once, again and again, never meet the other mode', async () => {
    const child = await MountChild.start(place, { specs: [spec] });
    for (let round = 0; round < 10; round++) {
      await child.run({ do: 'specs', specs: [{ ...spec, whole: round % 2 === 0 }] });
      const fds = Array.from({ length: 50 }, () => openSync(file, 'r'));
      for (const fd of fds) {
        const bytes = Buffer.alloc(100);
        readSync(fd, bytes, 0, 100, 1000);
        assert.ok(bytes.equals(expected.subarray(1000, 1100)));
        closeSync(fd);
      }
    }
    await child.stop();
  });

  test('a backing file that the kernel refuses means reads by workers, and its claim is given back', async () => {
    const child = await MountChild.start(place, { specs: [{ ...spec, whole: 'folder' }] });
    for (let i = 0; i < 2; i++) {
      const fd = openSync(file, 'r');
      readsAll(fd);
      assert.equal((await child.statistics()).claims, 0);
      closeSync(fd);
      await released(child);
    }
    const { passthroughOpens, logged } = await child.statistics();
    assert.equal(passthroughOpens, 0);
    assert.equal(logged.filter((line) => line.includes('no passthrough')).length, 1);
    await child.stop();
  });

  test('clones, and everything when passthrough is off, are served by workers', async () => {
    const clone: FileSpec = { ...spec, path: 'clones/c/disk.raw', kind: 'clone', contentId: 'c' };
    const child = await MountChild.start(place, {
      specs: [spec, clone],
      options: { passthrough: false },
    });
    const fd = openSync(file, 'r');
    readsAll(fd);
    closeSync(fd);
    await child.stop();
    const other = await MountChild.start(place, { specs: [clone] });
    const cloneFd = openSync(path.join(place.mountpoint, clone.path), 'r+');
    readsAll(cloneFd);
    closeSync(cloneFd);
    assert.equal((await other.statistics()).passthroughOpens, 0);
    await other.stop();
  });
});
