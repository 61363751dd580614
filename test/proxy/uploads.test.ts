/** Uploads through the tunnel: who may, what travels, and what a cut in the middle does. */
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import { after, before, describe, test } from 'node:test';
import fc from 'fast-check';
import { LinkRelay } from '../../bench/link/relay.ts';
import { connectSource, createServer } from '../../proxy/index.ts';
import {
  encodeChunks,
  encodeFind,
  encodeImage,
  parseChunks,
  parseFind,
  parseImage,
} from '../../proxy/upload-protocol.ts';
import { GridError } from '../../src/core/errors.ts';
import type { UploadTarget } from '../../src/core/uploads.ts';
import { openStore, uploadImage, verifyStore } from '../../src/store/index.ts';
import type { UploadOptions } from '../../src/store/index.ts';
import { readBack } from '../store/helpers.ts';
import { randomBuffer, randomNumbers } from '../suites/fixtures.ts';
import { clientOptions, failsWith, makeGround, serveSsh, until } from './kit.ts';
import type { Ground } from './kit.ts';

const CHUNK = 256 * 1024;
const SIZE = 48 * CHUNK;
let ground: Ground;
let original: Buffer;

before(async () => {
  ground = await makeGround({ sizeBytes: SIZE, seed: 5 });
  original = readFileSync(ground.fixture.rawPath);
});

after(() => ground.remove());

/** What makes a version of the fixture's image in which chunks `changed` are incompressible bytes. */
function changedDisk(reference: string, changed: readonly number[], more: Partial<UploadOptions> = {}) {
  const content = Buffer.from(original);
  const next = randomNumbers(changed.length + reference.length);
  for (const index of changed) randomBuffer(next, CHUNK).copy(content, index * CHUNK);
  const options: UploadOptions = {
    parent: ground.fixture.digest,
    reference,
    sizeBytes: SIZE,
    changed: () => changed,
    read: async (target, offset) => void content.copy(target, 0, offset, offset + target.length),
    ...more,
  };
  return { content, options };
}

async function assertStored(reference: string, content: Buffer): Promise<void> {
  const store = await openStore(ground.fixture.storeFolder);
  try {
    assert.ok((await readBack(store, (await store.resolve(reference)).manifest)).equals(content));
    const { damaged, missing } = await verifyStore(store, {});
    assert.deepEqual({ damaged, missing }, { damaged: [], missing: [] });
  } finally {
    await store.close();
  }
}

test('a server that accepts uploads takes a new version through ssh; what it has does not travel again', async () => {
  const serving = await serveSsh(ground, undefined, 0, { acceptUploads: true });
  const source = await connectSource(serving.url, clientOptions(ground, serving.endpoint.fingerprint));
  try {
    const { content, options } = changedDisk('test:2', [1, 2, 40]);
    const first = await uploadImage(source, options);
    assert.deepEqual([first.changedChunks, first.newChunks], [3, 3]);
    assert.equal((await source.listTags()).find(({ version }) => version === '2')?.manifest, first.digest);
    await assertStored('test:2', content);
    const again = await uploadImage(source, { ...options, reference: 'test:3' });
    assert.deepEqual([again.changedChunks, again.newChunks], [3, 0]);
    await failsWith(uploadImage(source, { ...options, expected: null }), 'exists', /somebody else moved it/);
    await failsWith(
      uploadImage(source, { ...options, parent: 'ab'.repeat(32) }),
      'not-found',
      /manifest|abab/,
    );
  } finally {
    await source.close();
    await serving.close();
  }
});

describe('who may upload', () => {
  const tryWith = async (line: string, acceptUploads: boolean) => {
    writeFileSync(ground.authorizedKeys, line, { mode: 0o600 });
    const serving = await serveSsh(ground, undefined, 0, { acceptUploads });
    const source = await connectSource(serving.url, clientOptions(ground, serving.endpoint.fingerprint));
    try {
      await source.uploads.findChunks(['ab'.repeat(32)]);
      return 'accepted';
    } catch (error) {
      return error instanceof GridError ? error.code : String(error);
    } finally {
      await source.close();
      await serving.close();
    }
  };

  test('is what the operator says, for all or beside a single key', async () => {
    const key = readFileSync(`${ground.key}.pub`, 'utf8');
    const path = ground.fixture.storeFolder;
    try {
      assert.equal(await tryWith(key, true), 'accepted');
      assert.equal(await tryWith(key, false), 'denied');
      const forced = `command="gridvfs server --stdio --accept-uploads ${path}" ${key}`;
      assert.equal(await tryWith(forced, false), 'accepted');
      assert.equal(await tryWith(`command="gridvfs server --stdio ${path}" ${key}`, false), 'denied');
    } finally {
      writeFileSync(ground.authorizedKeys, key, { mode: 0o600 });
    }
  });

  test('is nobody over plain http, though the server accepts uploads, nor with a client that asks for it', async () => {
    const store = await openStore(ground.fixture.storeFolder);
    const server = createServer(store, { acceptUploads: true });
    const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as AddressInfo;
    const source = await connectSource(`http://127.0.0.1:${port}`);
    const serving = await serveSsh(ground);
    const asking = await connectSource(serving.url, {
      ...clientOptions(ground, serving.endpoint.fingerprint),
      remoteCommand: 'gridvfs server --stdio --accept-uploads',
    });
    try {
      for (const one of [source, asking]) {
        await failsWith(one.uploads.findChunks(['ab'.repeat(32)]), 'denied', /no uploads from here/);
        await failsWith(uploadImage(one, changedDisk('test:x', [1]).options), 'denied');
      }
    } finally {
      await asking.close();
      await serving.close();
      await source.close();
      await server.close();
      await store.close();
    }
  });
});

test('a tunnel that is cut in the middle of every call only delays an upload', async () => {
  const serving = await serveSsh(ground, undefined, 0, { acceptUploads: true });
  const relay = await LinkRelay.start({
    listen: { host: '127.0.0.1', port: 0 },
    to: { host: '127.0.0.1', port: serving.endpoint.address.port },
    rttMs: 2,
    bitsPerSecond: 400e6,
  });
  const url = `ssh://x@127.0.0.1:${relay.address.port}${ground.fixture.storeFolder}`;
  const source = await connectSource(url, {
    ...clientOptions(ground, serving.endpoint.fingerprint),
    reconnectTimeoutMs: 60_000,
  });
  try {
    const changed = Array.from({ length: 40 }, (_, i) => i);
    const { content, options } = changedDisk('test:cut', changed);
    const cutOnTheWay: UploadTarget['putChunks'] = async (chunks) => {
      const before = relay.bytes().forward;
      const sending = source.uploads.putChunks(chunks);
      await until(() => relay.bytes().forward > before + CHUNK, 'something of the call was sent', 20_000);
      await relay.cut();
      await relay.restore();
      await sending;
    };
    const cutting: Parameters<typeof uploadImage>[0] = {
      name: source.name,
      listTags: () => source.listTags(),
      readManifest: (digest) => source.readManifest(digest),
      readTable: (digest) => source.readTable(digest),
      readChunks: (refs, how, deliver) => source.readChunks(refs, how, deliver),
      uploads: {
        findChunks: (digests) => source.uploads.findChunks(digests),
        putChunks: cutOnTheWay,
        putImage: (image) => source.uploads.putImage(image),
        removeCheckpoint: (name, version) => source.uploads.removeCheckpoint(name, version),
      },
    };
    const result = await uploadImage(cutting, options);
    assert.equal(result.newChunks, 40);
    assert.ok(source.statistics().reconnects > 0, 'it was cut');
    await assertStored('test:cut', content);
    const again = await uploadImage(source, { ...options, reference: 'test:cut2' });
    assert.equal(again.newChunks, 0);
  } finally {
    await source.close();
    await relay.close();
    await serving.close();
  }
});

test('bodies read back as they were written, and anything else is refused with bad-request', () => {
  const digest = fc
    .uint8Array({ minLength: 32, maxLength: 32 })
    .map((bytes) => Buffer.from(bytes).toString('hex'));
  const bytes = fc.uint8Array({ minLength: 1, maxLength: 50 }).map((one) => Buffer.from(one));
  const chunk = fc.record(
    { digest, plainBytes: fc.integer({ min: 50, max: 1000 }), stored: bytes },
    { noNullPrototype: true },
  );
  const image = fc.record(
    {
      manifest: bytes,
      table: bytes,
      name: fc.constant('a'),
      version: fc.constant('1'),
      expected: fc.option(digest),
    },
    { requiredKeys: ['manifest', 'table', 'name', 'version'], noNullPrototype: true },
  );
  fc.assert(
    fc.property(
      fc.array(digest, { minLength: 1, maxLength: 9 }),
      fc.array(chunk, { minLength: 1, maxLength: 5 }),
      image,
      fc.nat(),
      fc.integer({ min: 1, max: 255 }),
      (digests, chunks, sent, at, flip) => {
        const bodies = [encodeFind(digests), encodeChunks(chunks), encodeImage(sent)] as const;
        assert.deepEqual(parseFind(bodies[0]), digests);
        assert.deepEqual(parseChunks(bodies[1]), chunks);
        assert.deepEqual(parseImage(bodies[2]), sent);
        for (const [i, parse] of [parseFind, parseChunks, parseImage].entries()) {
          const body = bodies[i]!;
          const wild = Buffer.from(body);
          wild[at % wild.length]! ^= flip;
          for (const odd of [
            body.subarray(0, at % body.length),
            Buffer.concat([body, Buffer.from('x')]),
            wild,
          ]) {
            try {
              parse(odd);
            } catch (error) {
              assert.ok(error instanceof GridError && error.code === 'bad-request', String(error));
              continue;
            }
            assert.equal(odd, wild, 'a body that was cut or goes on was taken');
          }
        }
      },
    ),
    { numRuns: 300 },
  );
});
