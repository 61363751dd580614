/** The batch's frames: whatever comes in whatever pieces, a batch is complete or it is an error. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import fc from 'fast-check';
import {
  FrameReader,
  HTTP_STATUS,
  encodeBatchRequest,
  encodeChunkHeader,
  encodeEnd,
  encodeError,
  errorBody,
  parseBatchRequest,
  remoteError,
} from '../../proxy/protocol.ts';
import type { ChunkRef, StoredChunk } from '../../src/core/chunk.ts';
import { ERROR_CODES, GridError } from '../../src/core/errors.ts';
import type { ErrorCode } from '../../src/core/errors.ts';
import { BATCH_CHUNKS_MAX, CHUNK_BYTES_MAX, STORED_OVERHEAD_BYTES_MAX } from '../../src/core/limits.ts';

const digests = fc
  .uint8Array({ minLength: 32, maxLength: 32 })
  .map((bytes) => Buffer.from(bytes).toString('hex'));
const refArbitrary = fc.record(
  { digest: digests, plainBytes: fc.integer({ min: 1, max: CHUNK_BYTES_MAX }) },
  { noNullPrototype: true },
);
const chunkArbitrary = fc.record({
  encoding: fc.constantFrom('zstd' as const, 'plain' as const),
  bytes: fc.uint8Array({ minLength: 1, maxLength: 300 }).map((bytes) => Buffer.from(bytes)),
});

const ref = (plainBytes = 4096): ChunkRef => ({ digest: 'ab'.repeat(32), plainBytes });

function pushAll(reader: FrameReader, stream: Buffer, cuts: readonly number[] = []): void {
  let from = 0;
  for (const cut of [...cuts.map((cut) => cut % (stream.length + 1)), stream.length].toSorted(
    (a, b) => a - b,
  )) {
    reader.push(stream.subarray(from, cut));
    from = cut;
  }
}

function streamOf(chunks: readonly StoredChunk[], order: readonly number[]): Buffer {
  return Buffer.concat([
    ...order.flatMap((index) => [encodeChunkHeader(index, chunks[index]!), chunks[index]!.bytes]),
    encodeEnd(chunks.length),
  ]);
}

describe('batch requests', () => {
  test('what was encoded is parsed again', () => {
    fc.assert(
      fc.property(
        fc.array(refArbitrary, { minLength: 1, maxLength: BATCH_CHUNKS_MAX }),
        fc.constantFrom('demand' as const, 'prefetch' as const),
        (refs, priority) => {
          assert.deepEqual(parseBatchRequest(encodeBatchRequest(refs, priority)), { refs, priority });
        },
      ),
      { numRuns: 100 },
    );
  });

  test('any other bytes are refused as bad-request', () => {
    const good = encodeBatchRequest([ref(), ref()], 'demand');
    fc.assert(
      fc.property(
        fc.oneof(
          fc.uint8Array({ maxLength: 100 }).map((bytes) => Buffer.from(bytes)),
          fc.nat(good.length - 1).map((length) => good.subarray(0, length)),
          fc.uint8Array({ minLength: 1, maxLength: 8 }).map((more) => Buffer.concat([good, more])),
          fc.tuple(fc.nat(7), fc.integer({ min: 1, max: 255 })).map(([at, flip]) => {
            const bytes = Buffer.from(good);
            bytes[at]! ^= flip;
            return bytes;
          }),
        ),
        (bytes) => {
          try {
            // A flipped priority bit is the one change that is another valid request.
            assert.equal(parseBatchRequest(bytes).priority, 'prefetch');
          } catch (error) {
            assert.ok(error instanceof GridError && error.code === 'bad-request', String(error));
          }
        },
      ),
      { numRuns: 500 },
    );
  });
});

describe('batch responses', () => {
  test('come out the same however the stream is cut into pieces and whatever their order', () => {
    fc.assert(
      fc.property(
        fc.array(chunkArbitrary, { minLength: 1, maxLength: 12 }),
        fc.array(fc.nat(5000), { maxLength: 20 }),
        fc.infiniteStream(fc.nat()),
        (chunks, cuts, random) => {
          const order = chunks
            .map((_, index) => ({ index, rank: random.next().value }))
            .toSorted((a, b) => a.rank - b.rank)
            .map(({ index }) => index);
          const got = new Map<number, StoredChunk>();
          const reader = new FrameReader(
            chunks.map(() => ref()),
            'test',
            (index, chunk) => {
              assert.ok(!got.has(index));
              got.set(index, chunk);
            },
          );
          pushAll(reader, streamOf(chunks, order), cuts);
          assert.ok(reader.ended);
          assert.deepEqual(
            [...got.keys()].toSorted((a, b) => a - b),
            [...chunks.keys()],
          );
          for (const [index, chunk] of got) {
            assert.equal(chunk.encoding, chunks[index]!.encoding);
            assert.ok(chunks[index]!.bytes.equals(chunk.bytes));
          }
        },
      ),
      { numRuns: 200 },
    );
  });

  test('that are cut anywhere are not taken as complete', () => {
    const chunks: StoredChunk[] = [1, 2, 3].map((n) => ({ encoding: 'zstd', bytes: Buffer.alloc(n * 7, n) }));
    const stream = streamOf(chunks, [2, 0, 1]);
    for (let length = 0; length < stream.length; length++) {
      const reader = new FrameReader(
        chunks.map(() => ref()),
        'test',
        () => {},
      );
      reader.push(stream.subarray(0, length));
      assert.equal(reader.ended, false, `complete after ${length} of ${stream.length} bytes`);
    }
  });

  const chunk: StoredChunk = { encoding: 'zstd', bytes: Buffer.from('bytes') };
  const hostile: Record<string, Buffer> = {
    'has a chunk that was not asked for': Buffer.concat([encodeChunkHeader(2, chunk), chunk.bytes]),
    'has a chunk twice': Buffer.concat([
      encodeChunkHeader(0, chunk),
      chunk.bytes,
      encodeChunkHeader(0, chunk),
      chunk.bytes,
    ]),
    'ends before all chunks came': Buffer.concat([encodeChunkHeader(0, chunk), chunk.bytes, encodeEnd(1)]),
    'claims more chunks than it sent': encodeEnd(2),
    'has an empty chunk': encodeChunkHeader(0, { encoding: 'zstd', bytes: Buffer.alloc(0) }),
    'has a chunk over its bound': encodeChunkHeader(0, {
      encoding: 'zstd',
      bytes: Buffer.alloc(4096 + STORED_OVERHEAD_BYTES_MAX + 1),
    }),
    'has an unknown encoding': Buffer.from([1, 2, 0, 0, 5, 0, 0, 0]),
    'has an unknown frame': Buffer.from([4, 0, 0, 0, 1, 0, 0, 0]),
    'has an error of a gigabyte': Buffer.from([3, 0, 0, 0, 0, 0, 0, 64]),
  };
  for (const [what, stream] of Object.entries(hostile)) {
    test(`a stream that ${what} is refused as origin-failed`, () => {
      const reader = new FrameReader([ref(), ref()], 'test', () => {});
      assert.throws(
        () => pushAll(reader, stream),
        (error: unknown) => error instanceof GridError && error.code === 'origin-failed',
      );
      assert.equal(reader.ended, false);
    });
  }

  test('a stream that goes on after its end is refused', () => {
    const reader = new FrameReader([ref()], 'test', () => {});
    assert.throws(
      () => pushAll(reader, Buffer.concat([streamOf([chunk], [0]), Buffer.from([0])])),
      GridError,
    );
  });

  test('random and mutated streams end in GridError or nothing, and never deliver what was not asked for', () => {
    const chunks: StoredChunk[] = [1, 2, 3].map((n) => ({ encoding: 'zstd', bytes: Buffer.alloc(n * 7, n) }));
    const good = streamOf(chunks, [0, 1, 2]);
    fc.assert(
      fc.property(
        fc.oneof(
          fc.uint8Array({ maxLength: 200 }).map((bytes) => Buffer.from(bytes)),
          fc
            .array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { minLength: 1, maxLength: 4 })
            .map((edits) => {
              const bytes = Buffer.from(good);
              for (const [at, value] of edits) bytes[at] = value;
              return bytes;
            }),
        ),
        fc.array(fc.nat(300), { maxLength: 6 }),
        (stream, cuts) => {
          const seen = new Set<number>();
          const reader = new FrameReader(
            chunks.map(() => ref()),
            'test',
            (index, { bytes }) => {
              assert.ok(index < 3 && !seen.has(index) && bytes.length <= 4096 + STORED_OVERHEAD_BYTES_MAX);
              seen.add(index);
            },
          );
          try {
            pushAll(reader, stream, cuts);
          } catch (error) {
            assert.ok(error instanceof GridError, String(error));
          }
          if (reader.ended) assert.equal(seen.size, 3);
        },
      ),
      { numRuns: 2000 },
    );
  });
});

describe('errors on the wire', () => {
  test('every code has a status of an error, and comes back as a code that blames nobody here', () => {
    for (const code of Object.keys(ERROR_CODES) as ErrorCode[]) {
      const sent = new GridError(code, 'chunk 123 is unwell');
      assert.ok(HTTP_STATUS[code] >= 400 && HTTP_STATUS[code] < 600);
      const body = Buffer.from(JSON.stringify(errorBody(sent)));
      const seen = remoteError(body, HTTP_STATUS[code], 'reading');
      assert.match(seen.message, /chunk 123 is unwell/);
      assert.ok(!['local', 'bug'].includes(seen.blame), `${code} comes back as ${seen.code}`);
      const reader = new FrameReader([ref()], 'test', () => {});
      assert.throws(() => pushAll(reader, encodeError(sent)), { code: seen.code });
    }
  });

  test("a web server's page is judged by its status", () => {
    const page = Buffer.from('<h1>no</h1>');
    assert.equal(remoteError(page, 404, 'x').code, 'not-found');
    assert.equal(remoteError(page, 403, 'x').code, 'denied');
    assert.equal(remoteError(page, 502, 'x').code, 'origin-failed');
    const hostile = Buffer.from('{"code":"__proto__","message":"x"}');
    assert.equal(remoteError(hostile, 500, 'x').code, 'origin-failed');
    assert.match(remoteError(page, 301, 'x').message, /redirect/);
  });
});
