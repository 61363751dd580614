/** Child process of clones.test.ts: makes a clone of the last clone and writes block i of it, until it is killed. */
import { writeSync } from 'node:fs';
import { openCache } from '../../cache/index.ts';
import { Clones } from '../../src/agent/clones.ts';
import { cloneParts } from '../../src/cli/clone-parts.ts';
import { openStore } from '../../src/store/index.ts';
import { SIZE } from './clone-world.ts';

const [storeFolder, cacheFolder, state, digest] = process.argv.slice(2) as [string, string, string, string];
const cache = await openCache({ folder: cacheFolder, source: await openStore(storeFolder) });
const clones = await Clones.load(state, cloneParts(cache), () => {});
writeSync(1, 'ready\n');
for (let i = 0; i < 100; i++) {
  await clones.create({
    image: 'test:1',
    base: digest,
    sizeBytes: SIZE,
    name: `c${i}`,
    ...(i === 0 ? {} : { from: `c${i - 1}` }),
  });
  const disk = await clones.open(`c${i}`);
  await disk.write(Buffer.alloc(4096, 1 + i), i * 4096);
  await disk.close();
  writeSync(1, `done ${i}\n`);
}
for (;;) await new Promise((resolve) => setTimeout(resolve, 1000));
