/** Chunks decoded in a thread of their own: the same bytes and refusals as without it. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { after, test } from 'node:test';
import type { Worker } from 'node:worker_threads';
import { sha256 } from '../../src/core/bytes.ts';
import { compress } from '../../src/core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../../src/core/chunk.ts';
import { ChunkDecoder } from '../../src/core/decoder.ts';
import { GridError } from '../../src/core/errors.ts';
import { KIB } from '../../src/core/limits.ts';

const SIZES = [1, 100, 4 * KIB, 40 * KIB, 64 * KIB, 100 * KIB, 256 * KIB];

const decoder = new ChunkDecoder();
after(() => decoder.close());

function chunkOf(plain: Buffer, encoding: 'zstd' | 'plain' = 'zstd'): { chunk: StoredChunk; ref: ChunkRef } {
  const bytes = encoding === 'zstd' ? compress(plain) : plain;
  return { chunk: { encoding, bytes }, ref: { digest: sha256(plain), plainBytes: plain.length } };
}

const isCode = (code: string) => (error: unknown) => error instanceof GridError && error.code === code;

test('chunks of all sizes and both encodings come back as they were, and the stored bytes stay the caller’s', async () => {
  const plains = SIZES.flatMap((size) => [randomBytes(size), Buffer.alloc(size, 'so it goes ')]);
  const all = plains.flatMap((plain) => [chunkOf(plain), chunkOf(plain, 'plain')]);
  const stored = all.map(({ chunk }) => Buffer.from(chunk.bytes));
  const decoded = await Promise.all(all.map(({ chunk, ref }) => decoder.decode(chunk, ref)));
  for (const [index, plain] of decoded.entries()) {
    assert.ok(plain.equals(plains[index >> 1]!), `chunk ${index}`);
    assert.ok(stored[index]!.equals(all[index]!.chunk.bytes), `stored bytes of chunk ${index}`);
  }
});

test('small chunks that come together are decoded together, whatever their sizes make in all', async () => {
  for (const sizes of [[5, 300, 4 * KIB], Array.from({ length: 40 }, () => 16 * KIB)]) {
    const plains = sizes.map((size) => randomBytes(size));
    const all = plains.map((plain) => chunkOf(plain));
    const decoded = await Promise.all(all.map(({ chunk, ref }) => decoder.decode(chunk, ref)));
    assert.deepEqual(decoded, plains);
  }
});

test('a wrong chunk is corrupt, its neighbours are not', async () => {
  const good = chunkOf(randomBytes(64 * KIB));
  const bomb = { ...chunkOf(Buffer.alloc(1024 * KIB)), ref: good.ref };
  const cut = { chunk: { ...good.chunk, bytes: good.chunk.bytes.subarray(1) }, ref: good.ref };
  const other = { ...chunkOf(randomBytes(64 * KIB)), ref: good.ref };
  for (const wrong of [bomb, cut, other]) {
    const [before, between, behind] = await Promise.allSettled(
      [good, wrong, good].map(({ chunk, ref }) => decoder.decode(chunk, ref)),
    );
    assert.equal(before!.status, 'fulfilled');
    assert.ok(between!.status === 'rejected' && isCode('corrupt')(between!.reason));
    assert.equal(behind!.status, 'fulfilled');
  }
});

test('when the thread dies, the caller’s decodes what was given to it and what follows', async () => {
  const orphaned = new ChunkDecoder();
  const born = once(process, 'worker') as Promise<[Worker]>;
  const { chunk, ref } = chunkOf(randomBytes(256 * KIB));
  const small = chunkOf(randomBytes(16 * KIB));
  const waiting = Array.from({ length: 50 }, () => orphaned.decode(chunk, ref));
  const [worker] = await born;
  const ended = worker.terminate();
  // Gathered, and perhaps sent to a thread that does not live to hear of it.
  const behind = Array.from({ length: 50 }, () => orphaned.decode(small.chunk, small.ref));
  await ended;
  for (const plain of await Promise.all(waiting)) assert.equal(sha256(plain), ref.digest);
  for (const plain of await Promise.all(behind)) assert.equal(sha256(plain), small.ref.digest);
  assert.equal(sha256(await orphaned.decode(chunk, ref)), ref.digest);
  await orphaned.close();
});

test('closed meanwhile: what was not decoded says so', async () => {
  const closing = new ChunkDecoder();
  const { chunk, ref } = chunkOf(randomBytes(256 * KIB));
  const small = chunkOf(randomBytes(16 * KIB));
  const waiting = Promise.allSettled(Array.from({ length: 50 }, () => closing.decode(chunk, ref)));
  const gathered = Promise.allSettled(
    Array.from({ length: 5 }, () => closing.decode(small.chunk, small.ref)),
  );
  await closing.close();
  assert.ok((await gathered).every(({ status }) => status === 'rejected'));
  const rejected = (await waiting).filter((one) => one.status === 'rejected');
  assert.ok(rejected.length > 0);
  for (const { reason } of rejected) assert.ok(isCode('closed')(reason));
});
