/** The mounted-tree suite over the kernel driver, with images over plain files behind it. */
import { MountChild, Place } from './harness.ts';
import { mountedTreeSuite } from '../../suites/mounted-tree.ts';
import type { MountedTree } from '../../suites/mounted-tree.ts';
import type { FileSpec } from './file-tree.ts';
import { copyFileSync } from 'node:fs';
import { describe } from 'node:test';
import { loadFuseNative } from '../../../src/frontend/fuse/index.ts';
import type { Driver } from '../../../src/frontend/fuse/index.ts';

async function start(options: { indirect?: boolean; driver?: Driver }): Promise<MountedTree> {
  const { indirect = false, driver = 'kernel' } = options;
  const place = new Place();
  const image = place.source('image.raw', 9_000_123);
  const cold = place.source('cold.raw', 3_000_001);
  const cloneBase = place.source('clone.raw', 4 << 20);
  const reference = `${cloneBase}.reference`;
  copyFileSync(cloneBase, reference);
  const specs: FileSpec[] = [
    { path: 'images/debian/12/disk.raw', source: image, kind: 'image', contentId: 'one', indirect },
    { path: 'images/debian/13/disk.raw', source: cold, kind: 'cold', contentId: 'two', delayMs: 5, indirect },
    {
      ...{ path: 'images/gone/1/disk.raw', source: cold, kind: 'cold', contentId: 'four', indirect },
      goneFrom: 1 << 20,
    },
    { path: 'clones/c1/disk.raw', source: cloneBase, kind: 'clone', contentId: 'three', indirect },
  ];
  const child = await MountChild.start(place, {
    specs,
    options: { workers: indirect ? 2 : 4, driver },
  }).catch(async (error: unknown) => {
    await place.remove();
    throw error;
  });
  return {
    mountpoint: place.mountpoint,
    image: { path: specs[0]!.path, reference: image },
    cold: { path: specs[1]!.path, reference: cold },
    gone: { path: specs[2]!.path, reference: cold },
    clone: { path: specs[3]!.path, reference },
    trims: driver === 'kernel',
    opens: async () => (await child.statistics()).opens,
    async close() {
      await child.stop();
      await place.remove();
    },
  };
}

mountedTreeSuite('kernel driver, workers', () => start({}));
mountedTreeSuite('kernel driver, main thread alone', () => start({ indirect: true }));

let missing: string | false = false;
try {
  loadFuseNative();
} catch (error) {
  missing = (error as Error).message;
}
describe('with libfuse 2', { skip: missing }, () => {
  mountedTreeSuite('fuse-native driver', () => start({ driver: 'fuse-native' }));
});
