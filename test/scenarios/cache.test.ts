/** What an operator does with a host's cache through the real command, and what many readers at once cost. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { closeSync, ftruncateSync, openSync, writeFileSync, writeSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { KIB, MIB } from '../../src/core/limits.ts';
import { World } from './world.ts';

const READERS = 50;
const DATA_CHUNKS = 60;
const CHUNK_BYTES = 256 * KIB;

interface View {
  readonly usedBytes: number;
  readonly evictedChunks: number;
  readonly images: readonly {
    readonly names: readonly string[];
    readonly chunks: number;
    readonly presentChunks: number;
    readonly fetchedChunks: number;
    readonly refetchedChunks: number;
    readonly hitRate?: number;
    readonly pinned: readonly string[];
  }[];
}

suite('the cache of a host', () => {
  const world = new World();
  const raw = path.join(world.folder, 'image.raw');
  const kernel = path.join(world.folder, 'kernel');
  const inMount = path.join(world.mountpoint, 'images', 'test', '1', 'disk.raw');
  const status = () => world.json<View>('cache', 'status');
  const disk = async () => {
    const found = (await status()).images.find(({ names }) => names.includes('test:1'));
    assert.ok(found);
    return found;
  };

  before(async () => {
    const fd = openSync(raw, 'w');
    ftruncateSync(fd, 40 * MIB);
    for (let at = 0; at < DATA_CHUNKS; at++) {
      writeSync(fd, randomBytes(CHUNK_BYTES), 0, CHUNK_BYTES, (at * 2 + (at % 2)) * CHUNK_BYTES);
    }
    closeSync(fd);
    writeFileSync(kernel, randomBytes(700_000));
    await world.succeeds(process.execPath, path.resolve('src/main.ts'), 'store', 'init', world.store);
    await world.json('store', 'import', world.store, raw, 'test:1', '--kernel', kernel);
    const server = await world.server();
    await world.mount(server.url, server);
  });
  after(() => world.dispose());

  test(`${READERS} processes that read a cold image at once cost the origin each chunk once`, async () => {
    const outcomes = await Promise.all(
      Array.from({ length: READERS }, () => world.program('cmp', raw, inMount)),
    );
    for (const { code, stdout, stderr } of outcomes) assert.equal(code, 0, stdout + stderr);
    const image = await disk();
    assert.deepEqual([image.fetchedChunks, image.presentChunks], [DATA_CHUNKS, DATA_CHUNKS]);
    const { sources } = await world.json<{ sources: { chunksReceived: number }[] }>('proxy', 'status');
    assert.equal(sources[0]?.chunksReceived, DATA_CHUNKS);
  });

  test('warm, pin, evict, unpin and scrub do what they say, for an image with its parts', async () => {
    assert.deepEqual(await world.json('cache', 'warm', 'test:1'), {
      images: 2,
      chunks: DATA_CHUNKS + 3,
      fetchedChunks: 3,
    });
    assert.equal((await world.json<{ images: number }>('cache', 'pin', 'test:1')).images, 2);
    assert.deepEqual((await disk()).pinned, ['all']);
    await world.refuses(1, /test:1 is pinned; unpin it first \[in-use\]/, 'cache', 'evict', 'test:1');
    await world.json('cache', 'unpin', 'test:1');
    await world.refuses(1, /not pinned \[not-found\]/, 'cache', 'unpin', 'test:1');
    assert.deepEqual(await world.json('cache', 'scrub', 'test:1'), {
      images: 2,
      checkedChunks: DATA_CHUNKS + 3,
      refetchedChunks: 0,
      lostChunks: 0,
    });
    assert.deepEqual(await world.json('cache', 'evict', 'test:1'), { chunks: DATA_CHUNKS + 3 });
    assert.ok((await status()).usedBytes < MIB);
    // The kernel may have kept pages of the mounted file; a reader is right either way.
    await world.succeeds('cmp', raw, inMount);
    const text = await world.succeeds(process.execPath, path.resolve('src/main.ts'), 'cache', 'status');
    assert.match(text, /IMAGE .*HITS/);
    assert.match(text, /test:1/);
  });

  test('what cannot be done is said in one line', async () => {
    await world.refuses(1, /no image test:9 .*\[not-found\]/, 'cache', 'warm', 'test:9');
    await world.refuses(
      1,
      /no profile 'boot' yet.*\[not-found\]/,
      'cache',
      'warm',
      'test:1',
      '--purpose',
      'boot',
    );
    await world.refuses(2, /missing required argument/, 'cache', 'pin');
    await world.refuses(2, /\[bad-request\]/, 'cache', 'warm', 'test:1', '--purpose', '../x');
  });
});
