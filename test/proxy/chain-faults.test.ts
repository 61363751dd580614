/**
 * Faults under a running reader, through the real chain: store, server, tunnel, client, cache, image. A cut is a
 * pause, a second source takes over, and a flipped bit, wherever it falls, is never a wrong byte. The long run
 * (GRIDVFS_LONG=1) has the promised sizes: 60 s of cut, 10,000 flips.
 */
import assert from 'node:assert/strict';
import { chmodSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, describe, test } from 'node:test';
import { LinkRelay } from '../../bench/link/relay.ts';
import { openCache } from '../../cache/index.ts';
import type { Cache, CachedImage } from '../../cache/index.ts';
import { connectSource, connectSources, createServer } from '../../proxy/index.ts';
import type { RemoteSource } from '../../proxy/index.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ChunkSource } from '../../src/core/source.ts';
import { openStore } from '../../src/store/index.ts';
import { FlippingRelay } from '../faults/flipping-relay.ts';
import { makeFixtureStore, randomNumbers } from '../suites/fixtures.ts';
import type { FixtureStore } from '../suites/fixtures.ts';
import { freePort } from '../../src/core/ports.ts';
import { clientOptions, makeGround, serveSsh } from './kit.ts';
import type { Ground } from './kit.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';
const CUT_MS = LONG ? 60_000 : 3_000;
const FLIPS = LONG ? 10_000 : 300;

let ground: Ground;
let raw: Buffer;
let caches = 0;

before(async () => {
  ground = await makeGround({ sizeBytes: 24 << 20, seed: 31 });
  raw = readFileSync(ground.fixture.rawPath);
});

after(() => ground.remove());

const openCacheOver = (source: ChunkSource): Promise<Cache> => {
  mkdirSync(path.join(ground.folder, 'caches'), { recursive: true });
  return openCache({ folder: path.join(ground.folder, 'caches', String(++caches)), source });
};

/** Reads all of the image in order, compares, and gives the longest that one read took. */
async function readThrough(
  image: CachedImage,
  expected: Buffer,
  onOffset: (offset: number) => void,
): Promise<number> {
  const piece = Buffer.alloc(128 << 10);
  let longestMs = 0;
  for (let offset = 0; offset < expected.length; offset += piece.length) {
    onOffset(offset);
    const target = piece.subarray(0, Math.min(piece.length, expected.length - offset));
    const startMs = performance.now();
    await image.read(target, offset);
    longestMs = Math.max(longestMs, performance.now() - startMs);
    assert.ok(target.equals(expected.subarray(offset, offset + target.length)), `wrong bytes at ${offset}`);
  }
  return longestMs;
}

describe('under a running reader', () => {
  // Fails without `this.#requeue(batch)` in RemoteSource.#afterFailure: the read under way never ends.
  test(
    `a tunnel cut for ${CUT_MS / 1000} s is a pause, not an error`,
    { timeout: CUT_MS + 60_000 },
    async () => {
      const serving = await serveSsh(ground);
      const relay = await LinkRelay.start({
        listen: { host: '127.0.0.1', port: 0 },
        to: { host: '127.0.0.1', port: serving.endpoint.address.port },
        rttMs: 10,
        bitsPerSecond: 60e6,
      });
      const source = await connectSource(
        `ssh://x@127.0.0.1:${relay.address.port}${ground.fixture.storeFolder}`,
        clientOptions(ground, serving.endpoint.fingerprint),
      );
      const cache = await openCacheOver(source);
      const image = await cache.openImage(ground.fixture.digest);
      try {
        let cutting: Promise<void> | undefined;
        const longestMs = await readThrough(image, raw, (offset) => {
          if (offset < raw.length / 3) return;
          cutting ??= (async () => {
            await relay.cut();
            await sleep(CUT_MS);
            await relay.restore();
          })();
        });
        await cutting;
        assert.ok(longestMs > CUT_MS * 0.8, `the longest read took ${longestMs} ms: the cut was not felt`);
        // Two seconds of backoff and a handshake; the rest is for a machine that has other things to do.
        assert.ok(longestMs < CUT_MS + 25_000, `the longest read took ${longestMs} ms`);
        assert.ok(source.statistics().reconnects >= 1);
      } finally {
        await image.close();
        await cache.close();
        await source.close();
        await relay.close();
        await serving.close();
      }
    },
  );

  // Fails without the loop over sources in FailoverSource.#ask.
  test('the first of two sources dies: the second takes over within seconds', async () => {
    const stores = [await openStore(ground.fixture.storeFolder), await openStore(ground.fixture.storeFolder)];
    const servers = stores.map((store) => createServer(store));
    const urls: string[] = [];
    for (const server of servers) {
      const port = await freePort();
      await server.listen({ host: '127.0.0.1', port });
      urls.push(`http://127.0.0.1:${port}/`);
    }
    const source = await connectSources(urls);
    const cache = await openCacheOver(source);
    const image = await cache.openImage(ground.fixture.digest);
    try {
      let dying: Promise<void> | undefined;
      const longestMs = await readThrough(image, raw, (offset) => {
        if (offset >= raw.length / 3) dying ??= servers[0]!.close();
      });
      await dying;
      assert.ok(longestMs < 8_000, `the longest read took ${longestMs} ms`);
      const [first, second] = source.statistics().sources;
      assert.equal(first!.state, 'down');
      assert.ok(second!.chunksReceived! > 0);
    } finally {
      await image.close();
      await cache.close();
      await source.close();
      for (const server of servers) await server.close();
      for (const store of stores) await store.close();
    }
  });
});

/** What became of flipped bits. */
interface Tally {
  /** Noticed: the chunk did not match its digest. */
  corrupt: number;
  /** Noticed: it broke the protocol, and the exchange was made again or refused. */
  broken: number;
  /** Changed nothing that counts: a header's date, a bit that zstd does not use. */
  harmless: number;
}

/** Reads one chunk of a cache that has none yet, and compares. An error is an answer, other bytes are not. */
async function readChunkAt(
  image: CachedImage,
  expected: Buffer,
  offset: number,
): Promise<GridError | undefined> {
  const { length } = expected.subarray(offset, offset + 32_768);
  const target = Buffer.alloc(length, 0xee);
  try {
    await image.read(target, offset);
  } catch (error) {
    assert.ok(error instanceof GridError, String(error));
    return error;
  }
  assert.ok(target.equals(expected.subarray(offset, offset + length)), `wrong bytes at ${offset}`);
  return undefined;
}

// Both fail without `sha256(plain) !== ref.digest` in decodeChunk (src/core/chunk.ts).
describe('flipped bits', { timeout: LONG ? 3_000_000 : 120_000 }, () => {
  let fixture: FixtureStore;
  let plain: Buffer;

  before(async () => {
    fixture = await makeFixtureStore(path.join(ground.folder, 'small'), {
      sizeBytes: 12 << 20,
      seed: 32,
      chunkBytes: 32_768,
    });
    plain = readFileSync(fixture.rawPath);
  });

  /** One entry for each different chunk, in an order that no read-ahead follows; for ever. */
  function* rounds(seed: number) {
    const next = randomNumbers(seed);
    for (;;) {
      const entries = [
        ...new Map([...fixture.table.entries()].map((entry) => [entry.digest, entry])).values(),
      ];
      for (let i = entries.length - 1; i > 0; i--) {
        const k = next() % (i + 1);
        [entries[i], entries[k]] = [entries[k]!, entries[i]!];
      }
      yield entries;
    }
  }

  test(`${FLIPS / 2} in replies: no wrong byte, all noticed or harmless`, async (context) => {
    const seed = 41;
    const next = randomNumbers(seed);
    const store = await openStore(fixture.storeFolder);
    const server = createServer(store);
    const port = await freePort();
    await server.listen({ host: '127.0.0.1', port });
    const relay = await FlippingRelay.start({ host: '127.0.0.1', port });
    const source: RemoteSource = await connectSource(`http://127.0.0.1:${relay.port}/`);
    const tally: Tally = { corrupt: 0, broken: 0, harmless: 0 };
    try {
      for (const entries of rounds(seed)) {
        if (relay.flips >= FLIPS / 2) break;
        const cache = await openCacheOver(source);
        const image = await cache.openImage(fixture.digest);
        for (const { index, storedBytes } of entries) {
          if (relay.flips >= FLIPS / 2) break;
          const before = { flips: relay.flips, ...source.statistics() };
          relay.arm(next() % (storedBytes + 300), next() % 8);
          const error = await readChunkAt(image, plain, index * 32_768);
          relay.disarm();
          if (error) assert.equal(await readChunkAt(image, plain, index * 32_768), undefined, `seed ${seed}`);
          if (relay.flips === before.flips) continue;
          const now = source.statistics();
          if (now.corruptChunks > before.corruptChunks) tally.corrupt++;
          else if (error || now.roundTrips > before.roundTrips + 1) tally.broken++;
          else tally.harmless++;
        }
        await image.close();
        await cache.close();
      }
      context.diagnostic(`${relay.flips} flips: ${JSON.stringify(tally)}`);
      assert.equal(tally.corrupt + tally.broken + tally.harmless, relay.flips);
      assert.equal(source.statistics().corruptChunks, tally.corrupt, 'each wrong chunk is counted once');
      assert.ok(tally.corrupt > relay.flips * 0.8, JSON.stringify(tally));
    } finally {
      await source.close();
      await relay.close();
      await server.close();
      await store.close();
    }
  });

  test(`${FLIPS / 2} in chunk objects: no wrong byte, all refused or harmless`, async (context) => {
    const seed = 42;
    const next = randomNumbers(seed);
    const store = await openStore(fixture.storeFolder);
    const tally: Tally = { corrupt: 0, broken: 0, harmless: 0 };
    let flips = 0;
    try {
      for (const entries of rounds(seed)) {
        if (flips >= FLIPS / 2) break;
        const cache = await openCacheOver(store);
        const image = await cache.openImage(fixture.digest);
        let counted = 0;
        for (const { index, digest } of entries) {
          if (flips++ >= FLIPS / 2) break;
          const file = path.join(fixture.storeFolder, 'v1/chunks', digest.slice(0, 2), digest);
          const good = readFileSync(file);
          const bad = Buffer.from(good);
          bad[next() % bad.length]! ^= 1 << (next() % 8);
          chmodSync(file, 0o644);
          writeFileSync(file, bad);
          const error = await readChunkAt(image, plain, index * 32_768);
          writeFileSync(file, good);
          if (!error) tally.harmless++;
          else {
            assert.equal(error.code, 'corrupt', error.message);
            tally.corrupt++;
            counted += 2; // asked once more before it is refused
            assert.equal(await readChunkAt(image, plain, index * 32_768), undefined, 'healed in the store');
          }
        }
        assert.equal((await cache.status()).corruptChunks, counted);
        await image.close();
        await cache.close();
      }
      context.diagnostic(JSON.stringify(tally));
      assert.ok(tally.corrupt > (FLIPS / 2) * 0.9, JSON.stringify(tally));
    } finally {
      await store.close();
    }
  });
});
