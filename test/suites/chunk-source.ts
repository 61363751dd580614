/**
 * What everything that gives chunks must do, whatever it is made of: run for the store, for a proxy's client, for
 * a cache. `make` gives a source over (a copy of, a way to) the fixture's store, which has the fixture's one tag
 * and more than BATCH_CHUNKS_MAX chunks that are not zero.
 */
import assert from 'node:assert/strict';
import { closeSync, openSync, readSync } from 'node:fs';
import { describe, test } from 'node:test';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ErrorCode } from '../../src/core/errors.ts';
import { BATCH_CHUNKS_MAX } from '../../src/core/limits.ts';
import { chunkLengthOf, parseManifest, parseReference } from '../../src/core/manifest.ts';
import type { ChunkSource, Priority } from '../../src/core/source.ts';
import type { FixtureOptions, FixtureStore } from './fixtures.ts';

/** Makes a fixture that the suite can use: about 340 small chunks that are not zero, 20 ms. */
export const SUITE_FIXTURE: FixtureOptions = { sizeBytes: 4096 * 512 + 1536, seed: 20, chunkBytes: 4096 };

export interface SourceUnderTest {
  readonly source: ChunkSource;
  readonly fixture: FixtureStore;
  /** Closes the source and whatever was started for it. Called once, after each test. */
  close(): Promise<void>;
}

/** Rejects unless `promise` fails with this code. */
async function failsWith(promise: Promise<unknown>, code: ErrorCode): Promise<GridError> {
  const outcome: unknown = await promise.then(
    () => 'it succeeded',
    (error: unknown) => error,
  );
  assert.ok(outcome instanceof GridError, `expected a GridError '${code}', got ${String(outcome)}`);
  assert.equal(outcome.code, code, outcome.message);
  return outcome;
}

/** All chunks of the fixture that are not zero, in order: where they lie and how to ask for them. */
function refsOf({ manifest, table }: FixtureStore): { index: number; ref: ChunkRef }[] {
  return [...table.entries()].map(({ index, digest }) => ({
    index,
    ref: { digest, plainBytes: chunkLengthOf(manifest, index) },
  }));
}

function plainChunk({ rawPath, manifest }: FixtureStore, index: number): Buffer {
  const plain = Buffer.alloc(chunkLengthOf(manifest, index));
  const fd = openSync(rawPath, 'r');
  try {
    assert.equal(readSync(fd, plain, 0, plain.length, index * manifest.chunkBytes), plain.length);
  } finally {
    closeSync(fd);
  }
  return plain;
}

const ABSENT: ChunkRef = { digest: 'ab'.repeat(32), plainBytes: 4096 };

const unwanted = (): void => assert.fail('a chunk was delivered');

export function chunkSourceSuite(name: string, make: () => Promise<SourceUnderTest>): void {
  const on = (sentence: string, body: (subject: SourceUnderTest) => Promise<void>): void => {
    test(sentence, async () => {
      const subject = await make();
      try {
        await body(subject);
      } finally {
        await subject.close();
      }
    });
  };

  describe(`${name} as a ChunkSource`, () => {
    on('lists the tags that there are', async ({ source, fixture }) => {
      const tags = await source.listTags();
      const { name: tagName, version } = parseReference(fixture.reference);
      assert.deepEqual(
        tags.map((tag) => [tag.name, tag.version, tag.manifest]),
        [[tagName, version, fixture.digest]],
      );
    });

    on('gives manifest and table as bytes that match their digests', async ({ source, fixture }) => {
      const manifest = parseManifest(await source.readManifest(fixture.digest), fixture.digest);
      assert.deepEqual(manifest, fixture.manifest);
      const table = ChunkTable.parse(await source.readTable(manifest.table), manifest.table);
      assert.ok(table.bytes.equals(fixture.table.bytes));
    });

    on('answers not-found for a manifest and a table that are not there', async ({ source }) => {
      await failsWith(source.readManifest(ABSENT.digest), 'not-found');
      await failsWith(source.readTable(ABSENT.digest), 'not-found');
    });

    on('refuses what is not a digest, before it can become a path or an address', async ({ source }) => {
      for (const hostile of ['', '../../../etc/passwd', 'AB'.repeat(32), 'ab'.repeat(32) + '/..']) {
        await failsWith(source.readManifest(hostile), 'bad-request');
        await failsWith(source.readTable(hostile), 'bad-request');
        await failsWith(
          source.readChunks([{ digest: hostile, plainBytes: 4096 }], { priority: 'demand' }, unwanted),
          'bad-request',
        );
      }
    });

    for (const priority of ['demand', 'prefetch'] satisfies Priority[]) {
      on(`delivers every chunk of a full ${priority} batch once, and it decodes`, async (subject) => {
        const { source, fixture } = subject;
        const wanted = refsOf(fixture).slice(0, BATCH_CHUNKS_MAX);
        assert.equal(wanted.length, BATCH_CHUNKS_MAX, 'the fixture has a full batch of chunks');
        const seen = new Set<number>();
        await source.readChunks(
          wanted.map(({ ref }) => ref),
          { priority },
          (i, chunk) => {
            assert.ok(!seen.has(i), `chunk ${i} was delivered twice`);
            seen.add(i);
            assert.ok(decodeChunk(chunk, wanted[i]!.ref).equals(plainChunk(fixture, wanted[i]!.index)));
          },
        );
        assert.equal(seen.size, wanted.length);
      });
    }

    on('gives the short last chunk of an image', async ({ source, fixture }) => {
      const last = refsOf(fixture).at(-1)!;
      assert.ok(last.ref.plainBytes < fixture.manifest.chunkBytes, 'the fixture ends in a short chunk');
      let plain: Buffer | undefined;
      await source.readChunks(
        [last.ref],
        { priority: 'demand' },
        (_, chunk) => (plain = decodeChunk(chunk, last.ref)),
      );
      assert.ok(plain?.equals(plainChunk(fixture, last.index)));
    });

    on('delivers a chunk that is asked for several times in one batch each time', async (subject) => {
      const [first, second] = refsOf(subject.fixture);
      const refs = [first!.ref, second!.ref, first!.ref, first!.ref];
      const delivered: number[] = [];
      await subject.source.readChunks(refs, { priority: 'demand' }, (i, chunk) => {
        decodeChunk(chunk, refs[i]!);
        delivered.push(i);
      });
      assert.deepEqual(
        delivered.toSorted((a, b) => a - b),
        [0, 1, 2, 3],
      );
    });

    on('delivers bytes that the receiver may keep', async ({ source, fixture }) => {
      const wanted = refsOf(fixture)
        .slice(0, 64)
        .map(({ ref }) => ref);
      const kept: StoredChunk[] = [];
      await source.readChunks(wanted, { priority: 'demand' }, (i, chunk) => void (kept[i] = chunk));
      await source.readChunks(wanted, { priority: 'demand' }, () => {});
      for (const [i, chunk] of kept.entries()) decodeChunk(chunk, wanted[i]!);
    });

    on('serves batches that run at the same time', async ({ source, fixture }) => {
      const wanted = refsOf(fixture).map(({ ref }) => ref);
      const batches = Array.from({ length: 12 }, (_, i) => wanted.slice(i * 20, i * 20 + 40));
      const counts = await Promise.all(
        batches.map(async (refs, i) => {
          let count = 0;
          await source.readChunks(refs, { priority: i % 2 ? 'prefetch' : 'demand' }, (k, chunk) => {
            decodeChunk(chunk, refs[k]!);
            count++;
          });
          return count;
        }),
      );
      assert.deepEqual(
        counts,
        batches.map((refs) => refs.length),
      );
    });

    on('resolves an empty batch and delivers nothing', async ({ source }) => {
      await source.readChunks([], { priority: 'demand' }, unwanted);
    });

    on('refuses a batch that is too long', async ({ source, fixture }) => {
      const ref = refsOf(fixture)[0]!.ref;
      const refs = Array.from({ length: BATCH_CHUNKS_MAX + 1 }, () => ref);
      await failsWith(source.readChunks(refs, { priority: 'demand' }, unwanted), 'bad-request');
    });

    on('fails with not-found and delivers nothing more when a chunk is not there', async (subject) => {
      const { source, fixture } = subject;
      const refs = refsOf(fixture)
        .slice(0, 40)
        .map(({ ref }) => ref);
      refs.splice(20, 0, ABSENT);
      let failed = false;
      const delivered = new Set<number>();
      const error = await failsWith(
        source.readChunks(refs, { priority: 'demand' }, (i, chunk) => {
          assert.ok(!failed, 'delivered after it failed');
          assert.notEqual(i, 20);
          decodeChunk(chunk, refs[i]!);
          delivered.add(i);
        }),
        'not-found',
      );
      failed = true;
      assert.ok(error.message.includes(ABSENT.digest.slice(0, 12)), `names the chunk: ${error.message}`);
      await new Promise((resolve) => setTimeout(resolve, 30));
      // The source is good for the next batch.
      await source.readChunks([refs[0]!], { priority: 'demand' }, (_, chunk) => {
        decodeChunk(chunk, refs[0]!);
      });
    });

    on('fails with closed, at once and for good, when the batch is aborted', async ({ source, fixture }) => {
      const refs = refsOf(fixture)
        .slice(0, BATCH_CHUNKS_MAX)
        .map(({ ref }) => ref);
      const abort = new AbortController();
      let delivered = 0;
      await failsWith(
        source.readChunks(refs, { priority: 'demand', signal: abort.signal }, () => {
          if (++delivered === 3) abort.abort();
          assert.ok(delivered <= 3, 'delivered after the abort');
        }),
        'closed',
      );
      await new Promise((resolve) => setTimeout(resolve, 30));
      assert.equal(delivered, 3);
      await failsWith(
        source.readChunks(refs, { priority: 'demand', signal: abort.signal }, unwanted),
        'closed',
      );
      await source.readChunks([refs[0]!], { priority: 'demand' }, () => {});
    });

    on('rejects what is under way when it is closed; closing again does nothing', async (subject) => {
      const { source, fixture } = subject;
      const refs = refsOf(fixture)
        .slice(0, BATCH_CHUNKS_MAX)
        .map(({ ref }) => ref);
      let closed = false;
      const reading = failsWith(
        source.readChunks(refs, { priority: 'demand' }, () => assert.ok(!closed, 'delivered after close')),
        'closed',
      );
      const closing = source.close();
      closed = true;
      await Promise.all([reading, closing]);
      await source.close();
      await failsWith(source.readChunks(refs.slice(0, 1), { priority: 'demand' }, unwanted), 'closed');
    });
  });
}
