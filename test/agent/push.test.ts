/**
 * Pushes and pulls in one process, against a store: what is noted when, and what a failure in between leaves.
 *
 * Guarded line, tried by taking it out: clone-push.ts push, the look at `state.pending` (a push whose answer was lost
 * is taken for somebody else's).
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, test } from 'node:test';
import { pushWork } from '../../src/cli/clone-push.ts';
import type { LongTask } from '../../src/agent/long-call.ts';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ChunkSource } from '../../src/core/source.ts';
import { readBack } from '../store/helpers.ts';
import { hasCode } from '../suites/image.ts';
import { CloneWorld, SIZE } from './clone-world.ts';

const control: LongTask = { signal: new AbortController().signal, onProgress: () => {} };
let world: CloneWorld;
/** The store, with an image call that a test may make fail before or after it was done. */
let source: ChunkSource;
let fault: 'before' | 'after' | undefined;

before(async () => {
  world = await CloneWorld.create();
  const { store } = world;
  source = {
    name: store.name,
    listTags: () => store.listTags(),
    readManifest: (digest) => store.readManifest(digest),
    readTable: (digest) => store.readTable(digest),
    readChunks: (refs, options, deliver) => store.readChunks(refs, options, deliver),
    close: () => Promise.resolve(),
    uploads: {
      findChunks: (digests) => store.uploads.findChunks(digests),
      putChunks: (chunks) => store.uploads.putChunks(chunks),
      async putImage(image) {
        const failure = new GridError('tunnel-lost', 'the tunnel is gone');
        if (fault === 'before') throw failure;
        const tag = await store.uploads.putImage(image);
        if (fault === 'after') throw failure;
        return tag;
      },
      removeCheckpoint: (name, version) => store.uploads.removeCheckpoint(name, version),
    },
  };
});
after(() => world.dispose());

interface Pushed {
  generation: number;
  unchanged: boolean;
  newChunks: number;
}

function push(name: string, reference?: string): Promise<Pushed> {
  const work = pushWork({ cache: world.cache, clones: world.clones, source });
  return world.clones.atMoment(name, (snapshot, record) =>
    work.push(snapshot, record, reference === undefined ? {} : { reference }, control),
  ) as Promise<Pushed>;
}

const contentOf = async (reference: string) =>
  readBack(world.store, (await world.store.resolve(reference)).manifest);

test('each push is the next generation, unless nothing is new; a restart of the host does not forget it', async () => {
  await world.make('work', { kind: 'persistent' });
  await world.write('work', 5000, Buffer.alloc(9000, 1));
  assert.equal((await push('work')).generation, 1);
  assert.ok((await contentOf('work:pushed')).equals(await world.read('work')));
  assert.deepEqual((await push('work')).unchanged, true);
  await world.reload();
  await world.write('work', 100_000, Buffer.alloc(10, 2));
  const second = await push('work');
  assert.deepEqual([second.generation, second.unchanged], [2, false]);
  assert.ok((await contentOf('work:pushed')).equals(await world.read('work')));
});

test('a push that fails before the tag moves is made good by the next one, and so is one whose answer is lost', async () => {
  for (const when of ['before', 'after'] as const) {
    const { generation } = world.clones.get('work').pushed!;
    await world.write('work', 200_000, Buffer.from(`fails ${when} it is done`));
    fault = when;
    await assert.rejects(push('work'), hasCode('tunnel-lost'));
    fault = undefined;
    await world.reload(); // the proxy may have died in the middle as well
    const again = await push('work');
    assert.deepEqual([again.generation, again.unchanged], [generation + 1, when === 'after'], when);
    assert.ok((await contentOf('work:pushed')).equals(await world.read('work')), when);
  }
});

test('who does not have the last generation is refused and told whose it is; a tag of something else is left alone', async () => {
  const { pushed } = world.clones.get('work');
  await world.make('stale', {
    kind: 'persistent',
    pushed: { ...pushed!, generation: pushed!.generation - 1, manifest: world.digest },
  });
  const tags = await world.store.listTags();
  await assert.rejects(push('stale'), (error: unknown) => {
    assert.ok(error instanceof GridError && error.code === 'exists');
    assert.match(
      error.message,
      new RegExp(`generation ${pushed!.generation} of it was pushed from .*: pull`),
    );
    return true;
  });
  await assert.rejects(push('stale', 'test:1'), hasCode('exists'));
  await world.make('passing');
  await assert.rejects(push('passing'), hasCode('bad-request'));
  assert.deepEqual(await world.store.listTags(), tags);
  assert.equal((await push('stale', 'stale:own')).generation, 1);
});

test('a pull is the pushed disk over the same base, without what did not change; where the base is gone, it is whole', async () => {
  const { pull } = pushWork({ cache: world.cache, clones: world.clones, source });
  await assert.rejects(pull({ reference: 'work:pushed' }, control), hasCode('exists'));
  await assert.rejects(pull({ reference: 'test:1' }, control), hasCode('bad-request'));
  const expected = await world.read('work');
  await world.clones.remove('work');
  const stopped: LongTask = { ...control, signal: AbortSignal.abort() };
  await assert.rejects(pull({ reference: 'work:pushed' }, stopped), hasCode('closed'));
  const before = world.layers().length;
  const pulled = await pull({ reference: 'work:pushed', name: 'back' }, control);
  assert.deepEqual(
    [pulled.kind, pulled.base, world.layers().length],
    ['persistent', world.digest, before + 1],
  );
  assert.ok((await world.read('back')).equals(expected));
  assert.ok(world.clones.status('back').allocatedBytes < 4 * 256 * 1024, 'only chunks that changed');
  assert.equal((await push('back')).unchanged, true);

  await world.clones.remove('back');
  const { digest } = world;
  const forgetful = new Proxy(world.cache, {
    get(cache, key) {
      if (key === 'readManifest') {
        return (wanted: string) =>
          wanted === digest
            ? Promise.reject(new GridError('not-found', 'the base is gone'))
            : cache.readManifest(wanted);
      }
      const value: unknown = Reflect.get(cache, key, cache);
      return typeof value === 'function' ? (value.bind(cache) as unknown) : value;
    },
  });
  const work = pushWork({ cache: forgetful, clones: world.clones, source });
  assert.equal((await work.pull({ reference: 'work:pushed' }, control)).kind, 'full');
  assert.ok((await world.read('work')).equals(expected));
});

/** Guards `isPatchOver` in clone-push.ts: without it the pull makes whole chunks of patched ones, and sends them back. */
test('few blocks here and there are pushed, pulled and pushed on as such, also over a base that has such itself', async () => {
  const { pull } = pushWork({ cache: world.cache, clones: world.clones, source });
  const storedBytes = async () => (await world.store.statistics()).storedBytes;
  let base = world.digest;
  let content = world.content;
  for (const round of [1, 2, 3]) {
    const reference = `strewn${round}:pushed`;
    await world.make('strewn', { base, kind: 'persistent' });
    const expected = Buffer.from(content);
    for (let at = 8192 * round; at + 4096 <= SIZE; at += 200 * 1024) {
      const bytes = randomBytes(4096);
      await world.write('strewn', at, bytes);
      bytes.copy(expected, at);
    }
    await world.write('strewn', 4096 * round, Buffer.alloc(4096));
    expected.fill(0, 4096 * round, 4096 * (round + 1));
    const before = await storedBytes();
    await push('strewn', reference);
    const sentBytes = (await storedBytes()) - before;
    assert.ok(sentBytes < 48 * 4096 + 2 * 256 * 1024, `${sentBytes} bytes were sent`);
    assert.ok((await contentOf(reference)).equals(expected));
    await world.clones.remove('strewn');
    await pull({ reference, name: 'strewn' }, control);
    assert.ok((await world.read('strewn')).equals(expected));
    assert.equal((await push('strewn')).unchanged, true);
    assert.equal(await storedBytes(), before + sentBytes);
    const { allocatedBytes } = world.clones.status('strewn');
    assert.ok(allocatedBytes < 2 * 1024 * 1024, `${allocatedBytes} bytes of layer`);
    await world.clones.remove('strewn');
    base = (await world.store.resolve(reference)).manifest;
    content = expected;
  }
  const { manifest } = await world.store.resolve('strewn3:pushed');
  const { table } = JSON.parse(String(await world.store.readManifest(manifest))) as { table: string };
  assert.ok(ChunkTable.parse(await world.store.readTable(table), table).patchCount > 6);
});
