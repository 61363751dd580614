/** A cache folder that is not what it was: damaged while the daemon was down, foreign, of another version, held. */
import assert from 'node:assert/strict';
import {
  closeSync,
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import fc from 'fast-check';
import { KIB, MIB } from '../../src/core/limits.ts';
import { randomNumbers } from '../suites/fixtures.ts';
import { failsWith, figures, makeHarness, readAll } from './harness.ts';

const CHUNK_BYTES = 64 * KIB;
const SEED_THAT_ENDS_IN_ZEROS = 40;
const harness = await makeHarness({ sizeBytes: 8 * MIB + 512, seed: 5, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;
const source = await harness.source();

/** A closed cache folder that has the whole image. */
async function warmFolder(): Promise<string> {
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source });
  await readAll(await cache.openImage(fixture.digest));
  await cache.close();
  return folder;
}

const warm = await warmFolder();

/** A copy of the warm folder that a test may damage. */
function copyOfWarm(): { folder: string; data: string; map: string } {
  const folder = harness.fresh();
  cpSync(warm, folder, { recursive: true });
  const image = path.join(folder, 'images', fixture.digest);
  return { folder, data: path.join(image, 'data'), map: path.join(image, 'map') };
}

function flipBit(file: string, offset: number, bit: number): void {
  const fd = openSync(file, 'r+');
  const byte = Buffer.alloc(1);
  readSync(fd, byte, 0, 1, offset);
  byte[0]! ^= 1 << bit;
  writeSync(fd, byte, 0, 1, offset);
  closeSync(fd);
}

/** Opens the folder, reads the image twice, checks every byte; gives the figures. */
async function readBack(folder: string) {
  const cache = await harness.open({ folder, source });
  try {
    const image = await cache.openImage(fixture.digest);
    assert.ok((await readAll(image)).equals(raw), 'first reading');
    assert.ok((await readAll(image)).equals(raw), 'second reading');
    await cache.flush();
    return { ...(await figures(cache)), droppedImages: (await cache.status()).droppedImages };
  } finally {
    await cache.close();
  }
}

test('bits flipped in the data while nobody looked are found, counted and fetched again, in holes too', async () => {
  const { folder, data } = copyOfWarm();
  const seed = 31;
  const next = randomNumbers(seed);
  const damaged = new Set<number>();
  for (let i = 0; i < 40; i++) {
    const offset = next() % raw.length;
    const index = Math.floor(offset / CHUNK_BYTES);
    if (damaged.has(index)) continue;
    damaged.add(index);
    flipBit(data, offset, next() % 8);
  }
  const holes = [...damaged].filter((index) => fixture.table.entryOf(index) < 0);
  assert.ok(holes.length > 0 && holes.length < damaged.size, `seed ${seed} damages data and holes`);
  const status = await readBack(folder);
  assert.equal(status.refetchedChunks, damaged.size);
  assert.equal(status.presentChunks, harness.chunks);
  assert.ok(status.fetchedChunks <= damaged.size - holes.length);
  assert.equal((await readBack(folder)).refetchedChunks, 0, 'what was found once is right on the disk');
});

const FLIPS = process.env['GRIDVFS_LONG'] === '1' ? 10_000 : 300;

test(`of ${FLIPS} bits flipped anywhere in data and map while nobody looked, none is ever read and all are counted`, async () => {
  const seed = Date.now() % 1_000_000;
  const next = randomNumbers(seed);
  const { folder, data, map } = copyOfWarm();
  const HEADER_BYTES = 4096;
  for (let done = 0; done < FLIPS;) {
    const damaged = new Set<number>();
    for (let i = 0; i < 60 && done < FLIPS; i++, done++) {
      if (next() % 3 > 0) {
        const offset = next() % raw.length;
        const index = Math.floor(offset / CHUNK_BYTES);
        // Two flips of one bit would be none.
        if (damaged.has(index)) continue;
        damaged.add(index);
        flipBit(data, offset, next() % 8);
      } else {
        const index = next() % fixture.table.count;
        if (damaged.has(index) || fixture.table.entryOf(index) < 0) continue;
        damaged.add(index);
        flipBit(map, HEADER_BYTES + index * 8 + (next() % 8), next() % 8);
      }
    }
    const status = await readBack(folder);
    assert.equal(status.refetchedChunks, damaged.size, `seed ${seed} after ${done} flips`);
    assert.equal(status.droppedImages, 0);
  }
});

test('scrub finds damage without a reader, counts it, and makes it good', async () => {
  const { folder, data } = copyOfWarm();
  const chunks = [...fixture.table.entries()].slice(0, 9).map(({ index }) => index);
  for (const index of chunks) flipBit(data, index * CHUNK_BYTES + 7, 3);
  const counted = await harness.source();
  const cache = await harness.open({ folder, source: counted });
  const progress: number[] = [];
  const result = await cache.scrub({ progress: (done) => progress.push(done) });
  assert.deepEqual(result, {
    images: 1,
    checkedChunks: harness.chunks,
    refetchedChunks: chunks.length,
    lostChunks: 0,
  });
  assert.equal(progress.at(-1), harness.chunks);
  // On a running daemon too: what was hashed once and has been damaged since.
  flipBit(data, chunks[0]! * CHUNK_BYTES + 9, 1);
  assert.equal((await cache.scrub({ manifest: fixture.digest })).refetchedChunks, 1);
  const asked = counted.chunksAskedFor;
  assert.ok((await readAll(await cache.openImage(fixture.digest))).equals(raw));
  assert.equal(counted.chunksAskedFor, asked);
  // With the source away, what is damaged is lost and never shown.
  flipBit(data, chunks[1]! * CHUNK_BYTES + 9, 1);
  counted.arm({ failWith: 'unreachable' });
  assert.equal((await cache.scrub()).lostChunks, 1);
  counted.disarm();
  assert.ok((await readAll(await cache.openImage(fixture.digest))).equals(raw));
});

test('data in the holes at the start, in the middle and at the end is found and never read', async () => {
  const other = await makeHarness({
    sizeBytes: 2 * MIB + 512,
    seed: SEED_THAT_ENDS_IN_ZEROS,
    chunkBytes: CHUNK_BYTES,
  });
  const folder = other.fresh();
  const cache = await other.open({ folder, source: await other.source() });
  await readAll(await cache.openImage(other.fixture.digest));
  await cache.close();
  const { table, manifest, digest } = other.fixture;
  const holes = Array.from({ length: table.count }, (_, i) => i).filter((i) => table.entryOf(i) < 0);
  assert.ok(holes.includes(table.count - 1), 'the image ends in zeros');
  for (const index of holes) {
    const length = Math.min(CHUNK_BYTES, manifest.sizeBytes - index * CHUNK_BYTES);
    flipBit(path.join(folder, 'images', digest, 'data'), index * CHUNK_BYTES + length - 1, 0);
  }
  const again = await other.open({ folder, source: await other.source() });
  const image = await again.openImage(digest);
  for (let reading = 0; reading < 2; reading++) assert.ok((await readAll(image)).equals(other.raw));
  assert.equal((await figures(again)).refetchedChunks, holes.length);
});

test('bits flipped in the records of the map cost a fetch and never a byte', async () => {
  const { folder, map } = copyOfWarm();
  const index = fixture.table.entries().next().value!.index;
  flipBit(map, 4096 + 8 * index, 3);
  const status = await readBack(folder);
  assert.equal(status.refetchedChunks, 1);
  assert.equal(status.droppedImages, 0);
});

test('a record for a chunk of zeros, and data swapped between chunks, mislead nobody', async () => {
  const { folder, data, map } = copyOfWarm();
  const entries = [...fixture.table.entries()];
  const [one, other] = [entries[0]!, entries.find(({ digest }) => digest !== entries[0]!.digest)!];
  const bytes = readFileSync(data);
  const fd = openSync(data, 'r+');
  writeSync(fd, bytes, one.index * CHUNK_BYTES, CHUNK_BYTES, other.index * CHUNK_BYTES);
  closeSync(fd);
  const hole = Array.from({ length: fixture.table.count }, (_, i) => i).find(
    (i) => fixture.table.entryOf(i) < 0,
  )!;
  flipBit(map, 4096 + 8 * hole, 0);
  const status = await readBack(folder);
  assert.equal(status.refetchedChunks, 1);
});

const DROPPED: [string, (files: { data: string; map: string }) => void][] = [
  ['an empty map', ({ map }) => truncateSync(map, 0)],
  ['a map cut in its header', ({ map }) => truncateSync(map, 100)],
  ['a map cut in its records', ({ map }) => truncateSync(map, statSync(map).size - 8)],
  ['a map that is too long', ({ map }) => truncateSync(map, statSync(map).size + 4096)],
  ['a foreign map', ({ map }) => writeFileSync(map, Buffer.alloc(statSync(map).size, 'x'))],
  ['a map whose header has one other bit', ({ map }) => flipBit(map, 17, 0)],
  ['no map', ({ map }) => rmSync(map)],
  ['a folder for a map', ({ map }) => (rmSync(map), mkdirSync(map))],
  ['a short data file', ({ data }) => truncateSync(data, raw.length - 1)],
  ['a long data file', ({ data }) => truncateSync(data, raw.length + 1)],
  ['no data file', ({ data }) => rmSync(data)],
  [
    'a file where its folder should be',
    ({ data }) => (rmSync(path.dirname(data), { recursive: true }), writeFileSync(path.dirname(data), '')),
  ],
];

for (const [what, damage] of DROPPED) {
  test(`an image with ${what} is dropped, counted, and fetched again`, async () => {
    const files = copyOfWarm();
    damage(files);
    const status = await readBack(files.folder);
    assert.equal(status.droppedImages, 1);
    assert.ok(status.fetchedChunks >= harness.distinctChunks);
    const later = await readBack(files.folder);
    assert.deepEqual([later.droppedImages, later.fetchedChunks], [0, 0]);
  });
}

test('a map of another image is dropped although it is whole', async () => {
  const other = await makeHarness({ sizeBytes: 8 * MIB + 512, seed: 6, chunkBytes: CHUNK_BYTES });
  const otherFolder = other.fresh();
  const cache = await other.open({ folder: otherFolder, source: await other.source() });
  await readAll(await cache.openImage(other.fixture.digest));
  await cache.close();
  const files = copyOfWarm();
  cpSync(path.join(otherFolder, 'images', other.fixture.digest, 'map'), files.map);
  assert.equal((await readBack(files.folder)).droppedImages, 1);
});

test('whatever happens to the map’s bytes, no wrong byte is read', async () => {
  const { folder, map } = copyOfWarm();
  const whole = readFileSync(map);
  const edit = fc.record({
    at: fc.nat(whole.length - 1),
    bytes: fc.uint8Array({ minLength: 1, maxLength: 40 }),
  });
  const property = fc.asyncProperty(
    fc.array(edit, { minLength: 1, maxLength: 6 }),
    fc.option(fc.nat(whole.length), { freq: 5 }),
    async (edits, cut) => {
      const mutated = Buffer.from(whole);
      for (const { at, bytes } of edits) mutated.set(bytes.subarray(0, mutated.length - at), at);
      rmSync(path.dirname(map), { recursive: true, force: true });
      cpSync(path.dirname(path.join(warm, 'images', fixture.digest, 'map')), path.dirname(map), {
        recursive: true,
      });
      writeFileSync(map, cut === null ? mutated : mutated.subarray(0, cut));
      await readBack(folder).catch((error: unknown) => {
        // A magic of a later version is refused, not dropped.
        if (mutated.subarray(0, 7).equals(whole.subarray(0, 7)) && mutated[7]! > whole[7]!) return;
        throw error;
      });
    },
  );
  await fc.assert(property, { numRuns: 40, interruptAfterTimeLimit: 5_000 });
});

test('a cache or an image of a newer version is refused and left as it is', async () => {
  const { folder, map } = copyOfWarm();
  const fd = openSync(map, 'r+');
  writeSync(fd, 'GVFSMAP2', 0);
  closeSync(fd);
  const cache = await harness.open({ folder, source });
  const refusal = await failsWith(cache.openImage(fixture.digest), 'newer-format');
  assert.match(refusal.message, /newer gridvfs/);
  await cache.close();
  assert.ok(existsSync(map));
  writeFileSync(path.join(folder, 'gridvfs-cache.json'), '{"format":"gridvfs-cache","version":2}');
  const error = await failsWith(harness.open({ folder, source }), 'newer-format');
  assert.ok(error.message.includes(folder));
});

test('a folder that is something else is refused and nothing is added to it', async () => {
  const folder = harness.fresh();
  mkdirSync(folder);
  writeFileSync(path.join(folder, 'precious.txt'), 'mine');
  const error = await failsWith(harness.open({ folder, source }), 'bad-format');
  assert.match(error.message, /precious.txt/);
  assert.deepEqual(readdirSync(folder), ['precious.txt']);
  writeFileSync(path.join(folder, 'gridvfs-cache.json'), '{"format":"gridvfs-store","version":1}');
  await failsWith(harness.open({ folder, source }), 'bad-format');
  writeFileSync(path.join(folder, 'gridvfs-cache.json'), 'null');
  await failsWith(harness.open({ folder, source }), 'bad-format');
  const file = harness.fresh();
  writeFileSync(file, '');
  await failsWith(harness.open({ folder: file, source }), 'exists');
});

test('a second opener is refused with the holder’s process id, and admitted after it', async () => {
  const folder = harness.fresh();
  const first = await harness.open({ folder, source });
  const error = await failsWith(harness.open({ folder, source }), 'in-use');
  assert.match(error.message, new RegExp(`process ${process.pid}\\b`));
  await first.close();
  await (await harness.open({ folder, source })).close();
});

test('symbolic links in the folder are never written through', async () => {
  const outside = harness.fresh();
  mkdirSync(outside);
  writeFileSync(path.join(outside, 'victim'), 'untouched');
  const { folder, data, map } = copyOfWarm();
  // The link leads to the very bytes that should be there, and is not followed all the same.
  renameSync(data, path.join(outside, 'data'));
  const outsideBytes = readFileSync(path.join(outside, 'data'));
  symlinkSync(path.join(outside, 'data'), data);
  rmSync(path.join(folder, 'tags.json'), { force: true });
  symlinkSync(path.join(outside, 'victim'), path.join(folder, 'tags.json'));
  rmSync(path.join(folder, 'manifests', fixture.digest));
  symlinkSync(path.join(outside, 'victim'), path.join(folder, 'manifests', fixture.digest));
  assert.equal((await readBack(folder)).droppedImages, 1);
  const cache = await harness.open({ folder, source });
  await cache.listTags();
  await cache.close();
  assert.equal(readFileSync(path.join(outside, 'victim'), 'utf8'), 'untouched');
  assert.ok(lstatSync(path.join(folder, 'tags.json')).isFile());
  rmSync(path.dirname(map), { recursive: true });
  symlinkSync(outside, path.dirname(map));
  assert.equal((await readBack(folder)).droppedImages, 1);
  assert.deepEqual(readdirSync(outside), ['data', 'victim']);
  assert.ok(readFileSync(path.join(outside, 'data')).equals(outsideBytes));
  rmSync(path.join(folder, 'images'), { recursive: true });
  symlinkSync(outside, path.join(folder, 'images'));
  await failsWith(harness.open({ folder, source }), 'bad-format');
});

test('what a start that died left half-made is removed by the next', async () => {
  const { folder } = copyOfWarm();
  mkdirSync(path.join(folder, 'images', '.new-1-1'));
  writeFileSync(path.join(folder, 'images', '.new-1-1', 'data'), 'x');
  writeFileSync(path.join(folder, 'tables', '.new-1-2'), 'x');
  assert.equal((await readBack(folder)).refetchedChunks, 0);
  assert.deepEqual(readdirSync(path.join(folder, 'images')), [fixture.digest]);
  assert.deepEqual(readdirSync(path.join(folder, 'tables')), [fixture.manifest.table]);
});
