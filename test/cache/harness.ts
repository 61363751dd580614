/** What the cache's tests share: one fixture store per file, temp folders that go away, caches that get closed. */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after } from 'node:test';
import { openCache } from '../../cache/index.ts';
import type { Cache, CacheOptions, CachedImage, CachedImageStatus } from '../../cache/index.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ErrorCode } from '../../src/core/errors.ts';
import { openStore } from '../../src/store/index.ts';
import { FaultySource } from '../faults/faulty-source.ts';
import { makeFixtureStore, randomNumbers } from '../suites/fixtures.ts';
import type { FixtureOptions, FixtureStore } from '../suites/fixtures.ts';

export interface Harness {
  readonly folder: string;
  readonly fixture: FixtureStore;
  /** The image's bytes. */
  readonly raw: Buffer;
  /** Chunks that are not zero, and different ones among them. */
  readonly chunks: number;
  readonly distinctChunks: number;
  /** A source over the fixture's store, counted, without faults. */
  source(seed?: number): Promise<FaultySource>;
  /** A fresh folder name; nothing is there yet. */
  fresh(): string;
  /** Runs when the test file is done, before what was opened or deferred earlier. */
  defer(undo: () => void | Promise<void>): void;
  /** Opens a cache that is closed after the test file, if the test did not. */
  open(options: Omit<CacheOptions, 'log'>): Promise<Cache & { readonly lines: string[] }>;
}

/** Call at the top of a test file; everything is removed when its tests are done. */
export async function makeHarness(options: FixtureOptions): Promise<Harness> {
  const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-cache-'));
  const closers: (() => Promise<void>)[] = [];
  after(async () => {
    // All of them, also after a test that failed half way: a mount that stays would be the next one's trouble.
    const outcomes: PromiseSettledResult<void>[] = [];
    for (const close of closers.toReversed()) outcomes.push(...(await Promise.allSettled([close()])));
    rmSync(folder, { recursive: true });
    for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason;
  });
  const fixture = await makeFixtureStore(path.join(folder, 'fixture'), options);
  const raw = readFileSync(fixture.rawPath);
  let count = 0;
  return {
    folder,
    fixture,
    raw,
    chunks: fixture.table.entryCount,
    distinctChunks: new Set([...fixture.table.entries()].map(({ digest }) => digest)).size,
    async source(seed = 1) {
      const store = await openStore(fixture.storeFolder);
      closers.push(() => store.close());
      return new FaultySource(store, seed);
    },
    defer: (undo) => {
      closers.push(async () => undo());
    },
    fresh: () => path.join(folder, `cache-${++count}`),
    async open(cacheOptions) {
      const lines: string[] = [];
      const cache = await openCache({ ...cacheOptions, log: (line) => lines.push(line) });
      closers.push(() => cache.close());
      return Object.assign(cache, { lines });
    },
  };
}

/** The whole image as the cache gives it. */
export async function readAll(image: CachedImage): Promise<Buffer> {
  const all = Buffer.alloc(image.sizeBytes, 0xee);
  await image.read(all, 0);
  return all;
}

/** `times` reads of random length at random offsets, a few at once, each compared. */
export async function readAtRandom(
  image: CachedImage,
  raw: Buffer,
  times: number,
  seed: number,
  lengthMax = 700_000,
): Promise<void> {
  const next = randomNumbers(seed);
  const one = async () => {
    const offset = next() % image.sizeBytes;
    const length = Math.min(image.sizeBytes - offset, next() % lengthMax);
    const target = Buffer.alloc(length, 0xee);
    await image.read(target, offset);
    assert.ok(
      target.equals(raw.subarray(offset, offset + length)),
      `seed ${seed}: wrong bytes in ${length} bytes at ${offset}`,
    );
  };
  for (let done = 0; done < times; done += 8) {
    await Promise.all(Array.from({ length: Math.min(8, times - done) }, one));
  }
}

/** The cache's figures of its only image. */
export async function figures(cache: Cache): Promise<CachedImageStatus> {
  const { images } = await cache.status();
  assert.equal(images.length, 1);
  return images[0]!;
}

/** Rejects unless `promise` fails with this code. */
export async function failsWith(promise: Promise<unknown>, code: ErrorCode): Promise<GridError> {
  const outcome: unknown = await promise.then(
    () => 'it succeeded',
    (error: unknown) => error,
  );
  assert.ok(outcome instanceof GridError, `expected a GridError '${code}', got ${String(outcome)}`);
  assert.equal(outcome.code, code, outcome.message);
  return outcome;
}
