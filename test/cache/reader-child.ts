/**
 * A process that reads an image through a cache until it is killed:
 * `reader-child.ts CACHE STORE DIGEST RAW SEED [QUOTA]`. Prints `recorded N unrecorded M` now and then, N chunks
 * that are in the map and M that are on their way there, `wrong` at the first wrong byte, `done` at the end.
 */
import { readFileSync, writeSync } from 'node:fs';
import { openCache } from '../../cache/index.ts';
import { openStore } from '../../src/store/index.ts';
import { randomNumbers } from '../suites/fixtures.ts';

const [folder, storeFolder, digest, rawPath, seed, quota] = process.argv.slice(2) as [
  string,
  string,
  string,
  string,
  string,
  string | undefined,
];
const say = (line: string) => writeSync(1, `${line}\n`);
const raw = readFileSync(rawPath);
const cache = await openCache({
  folder,
  source: await openStore(storeFolder),
  ...(quota === undefined ? {} : { quotaBytes: Number(quota) }),
});
const image = await cache.openImage(digest);
const next = randomNumbers(Number(seed));
const target = Buffer.alloc(4096);
for (;;) {
  const offset = next() % (raw.length - target.length);
  await image.read(target, offset);
  if (!target.equals(raw.subarray(offset, offset + target.length))) say('wrong');
  if (next() % 24 === 0) await cache.flush();
  if (next() % 4 !== 0) continue;
  const status = await cache.status();
  const { recordedChunks, presentChunks, chunks } = status.images[0]!;
  const underWay = presentChunks - recordedChunks + status.inFlightChunks;
  // After a flush with nothing new since there is nothing to lose.
  if (underWay === 0 && presentChunks < chunks) continue;
  say(`recorded ${recordedChunks} unrecorded ${underWay}`);
  // Slow enough that several commits come before the end.
  await new Promise((resolve) => setTimeout(resolve, 3));
  if (quota === undefined && presentChunks === chunks) break;
}
say('done');
setInterval(() => undefined, 1000);
