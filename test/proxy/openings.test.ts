/** What comes along with a manifest: asked for once, checked like all else, and never needed. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { connectSource, createServer } from '../../proxy/index.ts';
import { encodeOpening, parseOpening } from '../../proxy/openings.ts';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import { KIB, MIB } from '../../src/core/limits.ts';
import { encodeTags, parseManifest } from '../../src/core/manifest.ts';
import type { ChunkSource } from '../../src/core/source.ts';
import { openStore } from '../../src/store/index.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';
import { hasCode } from '../suites/image.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-openings-'));
after(() => rmSync(folder, { recursive: true, force: true }));
const STATE = Buffer.concat([randomBytes(3000), Buffer.alloc(200 * KIB, 7)]);
const statePath = path.join(folder, 'state');
writeFileSync(statePath, STATE);
const fixture = await makeFixtureStore(path.join(folder, 'fixture'), {
  // More chunks than a table may have that comes along.
  sizeBytes: 4 * MIB,
  seed: 91,
  chunkBytes: 4 * KIB,
  parts: [{ name: 'state', kind: 'state', path: statePath }],
});

/** A damaged chunk is asked for again, as a cache does. */
async function readContent(source: ChunkSource, digest: string, damaged = 0): Promise<Buffer> {
  const manifest = parseManifest(await source.readManifest(digest), digest);
  const table = ChunkTable.parse(await source.readTable(manifest.table), manifest.table);
  const refs = [...table.entries()].map((entry) => ({
    digest: entry.digest,
    plainBytes: Math.min(manifest.chunkBytes, manifest.sizeBytes - entry.index * manifest.chunkBytes),
  }));
  const parts: Buffer[] = [];
  const read = () =>
    source.readChunks(refs, { priority: 'demand' }, (index, chunk) => {
      parts[index] = decodeChunk(chunk, refs[index]!);
    });
  for (let times = 0; times < damaged; times++) await assert.rejects(read(), hasCode('corrupt'));
  await read();
  return Buffer.concat(parts);
}

async function serve(stack: AsyncDisposableStack) {
  const store = await openStore(fixture.storeFolder);
  stack.defer(() => store.close());
  const server = createServer(store);
  stack.defer(() => server.close());
  const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as AddressInfo;
  return `http://127.0.0.1:${port}`;
}

// Fails without `known` being set in remote-source.ts.
test('a small part of an image costs no round trip of its own; it is asked for when it is read again', async () => {
  await using stack = new AsyncDisposableStack();
  const source = await connectSource(await serve(stack));
  stack.defer(() => source.close());
  const before = source.statistics().roundTrips;
  const manifest = parseManifest(await source.readManifest(fixture.digest), fixture.digest);
  assert.deepEqual(manifest, fixture.manifest);
  assert.ok((await readContent(source, manifest.parts['state']!)).equals(STATE));
  assert.equal(source.statistics().roundTrips - before, 1);
  await source.readTable(manifest.table);
  assert.equal(source.statistics().roundTrips - before, 2, 'a large table does not come along');
  const state = manifest.parts['state']!;
  const { table } = parseManifest(await source.readManifest(state), state);
  assert.equal(source.statistics().roundTrips - before, 3, 'nothing is kept that was read');
  await source.readTable(table);
  await source.readTable(table);
  assert.equal(source.statistics().roundTrips - before, 4, 'the first one came along again');
});

/** Passes all on to `to` but what `change` answers itself. */
async function between(
  stack: AsyncDisposableStack,
  to: string,
  change: (url: string, body: Buffer) => Buffer | 'not-found' | undefined,
): Promise<string> {
  const server = http.createServer((request, response) => {
    const pieces: Buffer[] = [];
    request.on('data', (piece: Buffer) => pieces.push(piece));
    request.on('end', () => {
      void (async () => {
        const { method, url, headers } = request;
        const type = headers['content-type'];
        const answer = await fetch(to + url, {
          method: method!,
          ...(type === undefined ? {} : { headers: { 'content-type': type } }),
          ...(pieces.length > 0 ? { body: Buffer.concat(pieces) } : {}),
        });
        const body = Buffer.from(await answer.arrayBuffer());
        const changed = change(url!, body);
        if (changed === 'not-found')
          response.writeHead(404).end('{"code":"not-found","message":"no such path"}');
        else response.writeHead(answer.status).end(changed ?? body);
      })();
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  stack.defer(async () => {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

test('a wrong object that came along is refused by its digest, and asked for by itself', async () => {
  await using stack = new AsyncDisposableStack();
  const damaged = await between(stack, await serve(stack), (url, body) => {
    if (!url.startsWith('/v1/openings/')) return undefined;
    const objects = parseOpening(body, 'the opening');
    assert.ok(objects.some(({ kind }) => kind === 'chunks'));
    return encodeOpening(
      objects.map((object) =>
        object.kind === 'chunks' ? { ...object, bytes: object.bytes.map((byte) => byte ^ 1) } : object,
      ),
    );
  });
  const source = await connectSource(damaged);
  stack.defer(() => source.close());
  const manifest = parseManifest(await source.readManifest(fixture.digest), fixture.digest);
  const state = manifest.parts['state']!;
  assert.ok((await readContent(source, state, 1)).equals(STATE));
});

test('an answer that is no opening, or one without the manifest, is bad-format; the next one is asked for anew', async () => {
  await using stack = new AsyncDisposableStack();
  let answer: Buffer | undefined;
  const hostile = await between(stack, await serve(stack), (url) =>
    url.startsWith('/v1/openings/') ? answer : undefined,
  );
  const source = await connectSource(hostile);
  stack.defer(() => source.close());
  const whole = encodeOpening([
    { kind: 'manifests', digest: 'cd'.repeat(32), encoding: 'plain', bytes: Buffer.from('x') },
  ]);
  for (const bad of [
    Buffer.alloc(0),
    whole,
    whole.subarray(0, -1),
    whole.subarray(0, 30),
    Buffer.alloc(50, 9),
  ]) {
    answer = bad;
    await assert.rejects(source.readManifest(fixture.digest), hasCode('bad-format'));
  }
  answer = undefined;
  assert.ok(parseManifest(await source.readManifest(fixture.digest), fixture.digest));
});

test('a server that had openings and has none any more is asked for manifests alone', async () => {
  await using stack = new AsyncDisposableStack();
  let isOld = false;
  const asked: string[] = [];
  const changed = await between(stack, await serve(stack), (url) => {
    asked.push(url);
    return isOld && url.startsWith('/v1/openings/') ? 'not-found' : undefined;
  });
  const source = await connectSource(changed);
  stack.defer(() => source.close());
  await assert.rejects(source.readManifest('ef'.repeat(32)), hasCode('not-found'));
  isOld = true;
  for (let times = 0; times < 2; times++)
    assert.ok(parseManifest(await source.readManifest(fixture.digest), fixture.digest));
  assert.equal(asked.filter((url) => url.includes(fixture.digest)).length, 3);
});

test('a server that has no openings is asked for the manifest alone', async () => {
  await using stack = new AsyncDisposableStack();
  const asked: string[] = [];
  const old = await between(stack, await serve(stack), (url) => {
    asked.push(url);
    if (url === '/v1/') return Buffer.from('{"protocol":1,"software":"gridvfs/0.0.9"}');
    return url === '/v1/tags.json' ? encodeTags([]) : undefined;
  });
  const source = await connectSource(old);
  stack.defer(() => source.close());
  assert.ok((await readContent(source, fixture.manifest.parts['state']!)).equals(STATE));
  assert.ok(!asked.some((url) => url.includes('openings')));
});
