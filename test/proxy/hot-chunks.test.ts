/** Small chunks that a server keeps in memory: each file is read once, and nothing wrong stays. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { HotChunks } from '../../proxy/hot-chunks.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { compress, decodeChunk } from '../../src/core/chunk.ts';
import type { ChunkEncoding, ChunkRef, StoredChunk } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import { KIB } from '../../src/core/limits.ts';
import type { ChunkSource } from '../../src/core/source.ts';

const DEMAND = { priority: 'demand' } as const;

/** A disk of chunks that notes what is read of it. */
class Disk implements Pick<ChunkSource, 'readChunks'> {
  readonly files = new Map<string, StoredChunk>();
  readonly reads: string[] = [];

  add(sizeBytes: number, encoding: ChunkEncoding = 'zstd'): ChunkRef & { readonly plain: Buffer } {
    const plain = randomBytes(sizeBytes);
    const digest = sha256(plain);
    this.files.set(digest, { encoding, bytes: encoding === 'zstd' ? compress(plain) : plain });
    return { digest, plainBytes: sizeBytes, plain };
  }

  async readChunks(
    refs: readonly ChunkRef[],
    _options: unknown,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    for (const [index, { digest }] of refs.entries()) {
      this.reads.push(digest);
      const chunk = this.files.get(digest);
      if (!chunk) throw new GridError('not-found', `no ${digest}`);
      deliver(index, chunk);
    }
  }
}

async function readAll(hot: HotChunks, refs: readonly ChunkRef[]): Promise<StoredChunk[]> {
  const chunks: StoredChunk[] = [];
  await hot.readChunks(refs, DEMAND, (index, chunk) => {
    assert.equal(chunks[index], undefined, `chunk ${index} was delivered before`);
    chunks[index] = chunk;
  });
  return chunks;
}

test('small chunks are read from the disk once, whatever else is asked for with them', async () => {
  const disk = new Disk();
  const hot = new HotChunks(disk);
  const small = Array.from({ length: 6 }, (_, i) => disk.add((i + 1) * 8 * KIB));
  const large = disk.add(256 * KIB);
  await readAll(hot, [small[0]!, small[2]!]);
  const all = [large, ...small];
  for (let round = 0; round < 3; round++) {
    const chunks = await readAll(hot, all);
    for (const [i, chunk] of chunks.entries()) assert.ok(decodeChunk(chunk, all[i]!).equals(all[i]!.plain));
  }
  const readsOf = ({ digest }: ChunkRef) => disk.reads.filter((read) => read === digest).length;
  assert.deepEqual(small.map(readsOf), [1, 1, 1, 1, 1, 1]);
  assert.equal(readsOf(large), 3);
  assert.equal(hot.takeHits(), 2 + 6 + 6);
  assert.equal(hot.takeHits(), 0);
});

test('a chunk that was damaged on the disk is read again until it is right', async () => {
  const disk = new Disk();
  const hot = new HotChunks(disk);
  const ref = disk.add(16 * KIB);
  const right = disk.files.get(ref.digest)!;
  const damaged = Buffer.from(right.bytes);
  damaged[damaged.length >> 1]! ^= 1;
  disk.files.set(ref.digest, { encoding: 'zstd', bytes: damaged });
  const [first] = await readAll(hot, [ref]);
  assert.throws(() => decodeChunk(first!, ref), { code: 'corrupt' });
  disk.files.set(ref.digest, right);
  for (let round = 0; round < 3; round++) {
    const [chunk] = await readAll(hot, [ref]);
    assert.ok(decodeChunk(chunk!, ref).equals(ref.plain));
  }
  assert.equal(disk.reads.length, 2);
});

test('what comes plain, from a cache, is not kept, and a wrong length is not answered from memory', async () => {
  const disk = new Disk();
  const hot = new HotChunks(disk);
  const plain = disk.add(16 * KIB, 'plain');
  await readAll(hot, [plain]);
  await readAll(hot, [plain]);
  assert.equal(disk.reads.length, 2);
  const ref = disk.add(16 * KIB);
  await readAll(hot, [ref]);
  await readAll(hot, [ref]);
  await readAll(hot, [{ ...ref, plainBytes: 8 * KIB }]);
  assert.equal(disk.reads.length, 4);
});

test('what is kept is not delivered to somebody who has gone, and a failure is the source’s', async () => {
  const disk = new Disk();
  const hot = new HotChunks(disk);
  const ref = disk.add(16 * KIB);
  await readAll(hot, [ref]);
  const options = { ...DEMAND, signal: AbortSignal.abort() };
  let delivered = 0;
  await hot.readChunks([ref], options, () => delivered++);
  assert.deepEqual([delivered, disk.reads.length], [1, 2], 'the source decides what an abort means');
  const gone = { digest: sha256(Buffer.from('gone')), plainBytes: 4 };
  await assert.rejects(readAll(hot, [ref, gone]), { code: 'not-found' });
});
