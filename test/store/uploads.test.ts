/** New images from outside: what is not what it says is refused and leaves nothing; the tag moves last, or not at all. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { sha256 } from '../../src/core/bytes.ts';
import { encodeChunkTable } from '../../src/core/chunk-table.ts';
import { compress } from '../../src/core/chunk.ts';
import { encodeManifest } from '../../src/core/manifest.ts';
import type { Manifest } from '../../src/core/manifest.ts';
import type { NewChunk } from '../../src/core/uploads.ts';
import { collectGarbage, openStore, uploadImage, uploadVersion, verifyStore } from '../../src/store/index.ts';
import type { Store, UploadOptions } from '../../src/store/index.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';
import { assertNothingTemporary, failsWith, filesOf, newStore, readBack, testFolder } from './helpers.ts';

const CHUNK = 16 * 1024;
const folder = testFolder('uploads');
let made = 0;

const chunkOf = (plain: Buffer): NewChunk => ({
  digest: sha256(plain),
  plainBytes: plain.length,
  stored: compress(plain),
});

/** An image of these chunks, undefined for zeros, as it would be sent. */
function imageOf(chunks: readonly (NewChunk | undefined)[], more: Partial<Manifest> = {}, sizes?: number[]) {
  const entries = chunks.flatMap((chunk, index) =>
    chunk ? [{ index, digest: chunk.digest, storedBytes: sizes?.[index] ?? chunk.stored.length }] : [],
  );
  const table = encodeChunkTable(CHUNK, chunks.length, entries);
  const { bytes, digest } = encodeManifest({
    schema: 1,
    kind: 'disk',
    sizeBytes: chunks.length * CHUNK,
    chunkBytes: CHUNK,
    table: table.digest,
    nonzeroBytes: entries.length * CHUNK,
    labels: {},
    parts: {},
    created: new Date().toISOString(),
    ...more,
  });
  return { digest, manifest: bytes, table: compress(table.bytes), name: 'up', version: '1' };
}

async function assertSound(store: Store): Promise<void> {
  const { damaged, missing } = await verifyStore(store, {});
  assert.deepEqual({ damaged, missing }, { damaged: [], missing: [] });
  assertNothingTemporary(store);
}

const A = chunkOf(Buffer.alloc(CHUNK, 'a'));
const B = chunkOf(Buffer.alloc(CHUNK, 'b'));

test('chunks, then the image: it reads back, and sending everything again changes nothing', async () => {
  const store = await newStore(folder);
  const { uploads } = store;
  assert.deepEqual(await uploads.findChunks([A.digest, B.digest]), [0, 0]);
  await uploads.putChunks([A, B, A]);
  assert.deepEqual(await uploads.findChunks([A.digest, B.digest]), [A.stored.length, B.stored.length]);
  const image = imageOf([A, undefined, B]);
  const tag = await uploads.putImage(image);
  assert.equal(tag.manifest, image.digest);
  assert.ok(
    (await readBack(store, image.digest)).equals(
      Buffer.concat([Buffer.alloc(CHUNK, 'a'), Buffer.alloc(CHUNK), Buffer.alloc(CHUNK, 'b')]),
    ),
  );
  const before = filesOf(store.layout.v1);
  await uploads.putChunks([A, B]);
  await uploads.putImage({ ...image, expected: null }); // the answer to the first was lost: nobody else moved the tag
  assert.deepEqual(filesOf(store.layout.v1), before);
  await assertSound(store);
});

test('a chunk that is not what its digest says is refused with all that came with it', async () => {
  const store = await newStore(folder);
  const { uploads } = store;
  const flipped = Buffer.from(A.stored);
  flipped[flipped.length - 3]! ^= 1;
  const bad: [string, NewChunk][] = [
    ['another content', { ...A, stored: B.stored }],
    ['a flipped byte', { ...A, stored: flipped }],
    ['a wrong length', { ...A, plainBytes: CHUNK - 1 }],
    ['something after its end', { ...A, stored: Buffer.concat([A.stored, Buffer.from('and more')]) }],
    ['a bomb', { ...A, stored: compress(Buffer.alloc(64 * CHUNK)) }],
  ];
  for (const [what, chunk] of bad) {
    await assert.rejects(uploads.putChunks([B, chunk]), { code: 'corrupt' }, what);
  }
  assert.deepEqual(await uploads.findChunks([A.digest, B.digest]), [0, 0]);
  assertNothingTemporary(store);
  await failsWith(uploads.findChunks(['../../etc/passwd']), 'bad-request');
});

test('an image that lacks a chunk or part, or whose table lies, is refused, and there is no tag', async () => {
  const store = await newStore(folder);
  const { uploads } = store;
  await uploads.putChunks([A]);
  const before = filesOf(store.layout.folder);
  await failsWith(uploads.putImage(imageOf([A, B])), 'not-found');
  await failsWith(uploads.putImage(imageOf([A], { parts: { kernel: 'cd'.repeat(32) } })), 'not-found');
  await failsWith(uploads.putImage(imageOf([A], {}, [A.stored.length + 1])), 'bad-request');
  await failsWith(uploads.putImage(imageOf([A], { sizeBytes: 9 * CHUNK })), 'bad-format');
  await failsWith(uploads.putImage(imageOf([A], { table: 'ef'.repeat(32) })), 'corrupt');
  await failsWith(uploads.putImage({ ...imageOf([A]), table: compress(Buffer.alloc(100)) }), 'corrupt');
  await failsWith(uploads.putImage({ ...imageOf([A]), name: '../x' }), 'bad-request');
  await failsWith(uploads.putImage({ ...imageOf([A]), manifest: Buffer.from('{}') }), 'bad-format');
  assert.deepEqual(filesOf(store.layout.folder), before);
});

test('of two who expect the tag where it is, the second is refused and the tag stays with the first', async () => {
  const store = await newStore(folder);
  const { uploads } = store;
  await uploads.putChunks([A, B]);
  const first = imageOf([A]);
  const second = imageOf([B]);
  const third = imageOf([A, B]);
  await uploads.putImage({ ...first, expected: null });
  await failsWith(uploads.putImage({ ...second, expected: null }), 'exists');
  await failsWith(uploads.putImage({ ...second, expected: third.digest }), 'exists');
  assert.equal((await store.resolve('up:1')).manifest, first.digest);
  await uploads.putImage({ ...second, expected: first.digest });
  await failsWith(uploads.putImage({ ...third, expected: first.digest }), 'exists');
  assert.equal((await store.resolve('up:1')).manifest, second.digest);
  await uploads.putImage(third);
  assert.equal((await store.resolve('up:1')).manifest, third.digest);
});

/** A store with an image, and a disk made from it that a test changes. */
async function makeDisk(sizeBytes: number) {
  const fixture = await makeFixtureStore(path.join(folder, `world${++made}`), {
    sizeBytes,
    seed: made,
    chunkBytes: CHUNK,
    labels: { os: 'debian' },
  });
  const store = await openStore(fixture.storeFolder);
  const content = readFileSync(fixture.rawPath);
  const reads: number[] = [];
  const options = (changed: readonly number[], more: Partial<UploadOptions> = {}): UploadOptions => ({
    parent: fixture.digest,
    reference: 'test:2',
    sizeBytes: content.length,
    changed: () => changed,
    read: async (target, offset) => {
      reads.push(offset / CHUNK);
      content.copy(target, 0, offset, offset + target.length);
    },
    ...more,
  });
  return { fixture, store, content, reads, options };
}

test('of a changed disk only the changed chunks are read, and only new ones sent; a collection keeps all of it', async () => {
  const { store, content, reads, options } = await makeDisk(2000 * CHUNK);
  content.fill(1, 3 * CHUNK, 4 * CHUNK);
  content.fill(1, 700 * CHUNK, 701 * CHUNK); // the same chunk again
  content.fill(0, 1500 * CHUNK, 1501 * CHUNK);
  content.write('some text', 1999 * CHUNK + 77);
  const done: number[] = [];
  const changed = [3, 700, 1500, 1999, 12];
  const result = await uploadImage(
    store,
    options(changed, { labels: { 'push.clone': 'w' }, onProgress: (bytes) => done.push(bytes) }),
  );
  assert.deepEqual(
    reads.toSorted((a, b) => a - b),
    [3, 12, 700, 1500, 1999],
  );
  assert.equal(result.changedChunks, 5);
  assert.equal(result.newChunks, 2, 'chunk 12 is as it was, 3 and 700 are one, 1500 is zeros');
  assert.equal(done.at(-1), 5 * CHUNK);
  assert.equal(result.manifest.labels['os'], 'debian');
  assert.ok((await readBack(store, result.digest)).equals(content));
  await collectGarbage(store, { graceMs: 0 });
  assert.ok((await readBack(store, (await store.resolve('test:2')).manifest)).equals(content));
  await assertSound(store);
});

test('a larger disk over a last chunk that was short; nothing new makes nothing; a cancel and a failing read leave the tag', async () => {
  const { store, fixture, content, options } = await makeDisk(5 * CHUNK + 512);
  const grown = Buffer.concat([content, Buffer.alloc(3 * CHUNK)]);
  const read: UploadOptions['read'] = async (target, offset) => void grown.copy(target, 0, offset);
  const { digest } = await uploadImage(store, options([], { sizeBytes: grown.length, read }));
  assert.ok((await readBack(store, digest)).equals(grown));

  const same = await uploadImage(store, options([1], { before: fixture.manifest.table }));
  assert.deepEqual([same.tag, same.newChunks], [undefined, 0]);

  const tags = await store.listTags();
  content.fill(9, 0, CHUNK);
  await failsWith(uploadImage(store, options([0], { signal: AbortSignal.abort() })), 'closed');
  const dying: UploadOptions['read'] = () => Promise.reject(new Error('the disk died'));
  await assert.rejects(uploadImage(store, options([0], { read: dying })), /the disk died/);
  const readOnly: Parameters<typeof uploadImage>[0] = {
    name: 'a static server',
    listTags: () => store.listTags(),
    readManifest: (one) => store.readManifest(one),
    readTable: (one) => store.readTable(one),
    readChunks: (refs, how, deliver) => store.readChunks(refs, how, deliver),
  };
  await failsWith(uploadImage(readOnly, options([0])), 'denied');
  const memory = uploadVersion(store, {
    reference: 'test:1',
    kind: 'memory',
    sizeBytes: CHUNK,
    chunkBytes: CHUNK,
    changed: () => [0],
    read,
  });
  await failsWith(memory, 'exists');
  assert.deepEqual(await store.listTags(), tags);
  assertNothingTemporary(store);
});

test('a checkpoint’s names go with those of its parts, unless a host needs it or they mean something else by now', async () => {
  const store = await newStore(folder);
  const { uploads } = store;
  await uploads.putChunks([A, B]);
  const put = async (name: string, image: ReturnType<typeof imageOf>) => {
    await uploads.putImage({ ...image, name });
    return image.digest;
  };
  const disk = await put('web.disk', imageOf([A, undefined]));
  const state = await put('web.state', imageOf([B], { kind: 'state' }));
  const memory = { kind: 'memory', parts: { disk, state } } as const;
  await put('web', imageOf([B, A], memory));
  await put('web.other', imageOf([A]));
  const names = async () => (await store.listTags()).map(({ name }) => name).toSorted();

  await failsWith(uploads.removeCheckpoint('web.disk', '1'), 'bad-request');
  await failsWith(uploads.removeCheckpoint('../web', '1'), 'bad-request');
  await store.hold('host-a', [disk]);
  await assert.rejects(uploads.removeCheckpoint('web', '1'), {
    code: 'in-use',
    message: /host-a lie on web:1/,
  });
  assert.deepEqual(await names(), ['web', 'web.disk', 'web.other', 'web.state']);
  await store.hold('host-a', []);
  const moved = await put('web.state', imageOf([A, A], { kind: 'state' }));
  assert.deepEqual((await uploads.removeCheckpoint('web', '1')).toSorted(), ['web.disk:1', 'web:1']);
  assert.deepEqual(await uploads.removeCheckpoint('web', '1'), [], 'the answer to the first was lost');
  assert.deepEqual(await names(), ['web.other', 'web.state']);
  assert.equal((await store.resolve('web.state:1')).manifest, moved);
  await assertSound(store);
});
