/** Several sources for one store: who is asked, who is left out and for how long, and that no chunk is missing,
 * doubled or wrong whatever one of them does. */
import assert from 'node:assert/strict';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, describe, test } from 'node:test';
import { FailoverSource, connectSource, connectSources, createServer } from '../../proxy/index.ts';
import type { Member, ProxyServer, SourceEvent } from '../../proxy/index.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import type { ChunkRef } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ChunkSource, Priority } from '../../src/core/source.ts';
import { openStore } from '../../src/store/index.ts';
import { FaultySource } from '../faults/faulty-source.ts';
import { SUITE_FIXTURE, chunkSourceSuite } from '../suites/chunk-source.ts';
import { freePort } from '../../src/core/ports.ts';
import { failsWith, makeGround, refsOf, until } from './kit.ts';
import type { Ground } from './kit.ts';

let ground: Ground;
let refs: ChunkRef[];

before(async () => {
  ground = await makeGround(SUITE_FIXTURE);
  refs = refsOf(ground.fixture).slice(0, 200);
});

after(() => ground.remove());

const store = () => openStore(ground.fixture.storeFolder);
const memberOf = (source: ChunkSource): Member => ({
  name: source.name,
  open: () => Promise.resolve(source),
});

/** Reads as a cache does: what does not decode is reported and asked for again, once. */
async function readAll(
  source: ChunkSource,
  wanted: readonly ChunkRef[],
  priority: Priority = 'demand',
): Promise<{ counts: number[]; corrupt: number }> {
  const counts = wanted.map(() => 0);
  const again: number[] = [];
  await source.readChunks(wanted, { priority }, (index, chunk) => {
    try {
      decodeChunk(chunk, wanted[index]!);
      counts[index]!++;
    } catch {
      source.reportCorrupt?.(wanted[index]!, chunk);
      again.push(index);
    }
  });
  await source.readChunks(
    again.map((index) => wanted[index]!),
    { priority },
    (place, chunk) => {
      decodeChunk(chunk, wanted[again[place]!]!);
      counts[again[place]!]!++;
    },
  );
  return { counts, corrupt: again.length };
}

const allOnce = ({ counts }: { counts: readonly number[] }) => counts.every((count) => count === 1);

/** A server over http on a port of its own, that can be stopped and started again. */
async function serveHttp(source?: ChunkSource) {
  const port = await freePort();
  let server: ProxyServer | undefined;
  const served = source ?? (await store());
  const start = async () => {
    server = createServer(served);
    await server.listen({ host: '127.0.0.1', port });
  };
  const stop = async () => {
    await server?.close();
    server = undefined;
  };
  await start();
  return {
    url: `http://127.0.0.1:${port}/`,
    start,
    stop,
    async close() {
      await stop();
      await served.close();
    },
  };
}

chunkSourceSuite('two sources for one store', async () => {
  const source = await FailoverSource.open([memberOf(await store()), memberOf(await store())]);
  return { source, fixture: ground.fixture, close: () => source.close() };
});

let seed = 0;
chunkSourceSuite('two sources of which the first fails every other time', async () => {
  const faulty = new FaultySource(await store(), ++seed);
  faulty.arm({ failWith: 'origin-failed', failShare: 0.5 });
  const source = await FailoverSource.open([memberOf(faulty), memberOf(await store())]);
  return { source, fixture: ground.fixture, close: () => source.close() };
});

describe('with several sources', { timeout: 30_000 }, () => {
  // Fails without `left = left.filter(…)` in FailoverSource.readChunks: the second is asked for all of them.
  test('the second takes over in the middle of a read: every chunk once', async () => {
    const slow = new FaultySource(await store(), 1);
    const first = await serveHttp();
    const second = await serveHttp(slow);
    const source = await connectSources([first.url, second.url], { reconnectTimeoutMs: 500 });
    try {
      let count = 0;
      const early: string[] = [];
      const counts = refs.map(() => 0);
      const broken = Promise.withResolvers<void>();
      await source.readChunks(refs, { priority: 'demand' }, (index, chunk) => {
        decodeChunk(chunk, refs[index]!);
        counts[index]!++;
        if (++count <= 10) early.push(refs[index]!.digest);
        if (count === 20) first.stop().then(broken.resolve, broken.reject);
      });
      await broken.promise;
      assert.ok(allOnce({ counts }));
      assert.ok(slow.chunksAskedFor > 0);
      assert.deepEqual(
        early.filter((digest) => slow.askedFor.has(digest)),
        [],
        'only what was missing is asked for again',
      );
      assert.ok(allOnce(await readAll(source, refs)), 'the second has all of them');
    } finally {
      await source.close();
      await first.close();
      await second.close();
    }
  });

  // Guards the call of #probe in #afterFailure: without it the first is never asked again.
  test('the first is asked again after it came back, and nobody waits for it in between', async () => {
    const first = await serveHttp();
    const backup = new FaultySource(await store(), 2);
    const events: SourceEvent[] = [];
    const source = await connectSources([first.url, memberOf(backup)], {
      reconnectTimeoutMs: 200,
      onEvent: (event) => events.push(event),
    });
    const states = () => source.statistics().sources.map(({ state }) => state);
    try {
      assert.ok(allOnce(await readAll(source, refs)));
      assert.equal(backup.calls, 0, 'the second is not asked while the first is up');
      await first.stop();
      assert.ok(allOnce(await readAll(source, refs)));
      assert.deepEqual(states(), ['down', 'up']);
      const { sources } = source.statistics();
      assert.match(sources[0]!.reason!, /127\.0\.0\.1/);
      assert.ok(sources[0]!.failovers >= 1);
      let fastestMs = Infinity;
      for (let attempt = 0; attempt < 5 && fastestMs >= 150; attempt++) {
        const startMs = performance.now();
        assert.ok(allOnce(await readAll(source, refs)));
        fastestMs = Math.min(fastestMs, performance.now() - startMs);
      }
      assert.ok(fastestMs < 150, 'a source that is down is not waited for');
      await first.start();
      await until(() => states()[0] === 'up', 'the first is up', 8000);
      const asked = backup.calls;
      assert.ok(allOnce(await readAll(source, refs)));
      assert.equal(backup.calls, asked, 'the first answers again');
      assert.ok(
        events.some(({ type, message }) => type === 'reconnected' && message.includes('there again')),
      );
    } finally {
      await source.close();
      await first.close();
    }
  });

  // Guards #putAside in reportCorrupt, and `aside` in #inOrder.
  test('one that sends wrong bytes is put aside for a time and counted; every chunk is right', async () => {
    const liar = new FaultySource(await store(), 3);
    const honest = new FaultySource(await store(), 4);
    liar.arm({ corruptShare: 0.3 });
    const source = await FailoverSource.open([memberOf(liar), memberOf(honest)], { asideMs: 3_000 });
    try {
      const result = await readAll(source, refs);
      assert.ok(allOnce(result));
      assert.ok(result.corrupt > 20, `${result.corrupt} corrupt`);
      const { sources, corruptChunks } = source.statistics();
      assert.equal(corruptChunks, result.corrupt);
      assert.deepEqual(
        sources.map(({ state, corruptChunks: own }) => [state, own]),
        [
          ['aside', result.corrupt],
          ['up', 0],
        ],
      );
      const asked = liar.calls;
      assert.ok(allOnce(await readAll(source, refs)));
      assert.equal(liar.calls, asked, 'it is not asked while it is aside');
      liar.disarm();
      await until(() => source.statistics().sources[0]!.state === 'up', 'its time to be over', 20_000);
      await readAll(source, refs);
      assert.equal(liar.calls, asked + 1, 'it is asked again after that');
    } finally {
      await source.close();
    }
  });

  test('a wrong manifest or table comes from the other', async () => {
    const liar = new FaultySource(await store(), 5);
    liar.arm({ corruptShare: 1 });
    const source = await FailoverSource.open([memberOf(liar), memberOf(await store())]);
    try {
      const { digest, manifest, table } = ground.fixture;
      assert.ok((await source.readManifest(digest)).length > 0);
      assert.ok((await source.readTable(manifest.table)).equals(table.bytes));
      assert.equal(source.statistics().sources[0]!.corruptChunks, 1, 'once it is aside it is asked no more');
    } finally {
      await source.close();
    }
  });

  test('one that has sent wrong bytes still serves when no other can', async () => {
    const liar = new FaultySource(await store(), 6);
    const other = new FaultySource(await store(), 7);
    const source = await FailoverSource.open([memberOf(liar), memberOf(other)]);
    try {
      liar.arm({ corruptShare: 1 });
      await readAll(source, refs.slice(0, 1));
      liar.disarm();
      other.arm({ failWith: 'unreachable' });
      assert.ok(allOnce(await readAll(source, refs)));
    } finally {
      await source.close();
    }
  });

  test('what one lacks comes from another; what none has is not-found', async () => {
    const lacking = new FaultySource(await store(), 8);
    lacking.arm({ missing: new Set([refs[3]!.digest]) });
    const source = await FailoverSource.open([memberOf(lacking), memberOf(await store())]);
    try {
      assert.ok(allOnce(await readAll(source, refs.slice(0, 10))));
      assert.equal(source.statistics().sources[0]!.state, 'up', 'it is still asked for the rest');
      const absent = { digest: 'ef'.repeat(32), plainBytes: 4096 };
      await failsWith(readAll(source, [absent]), 'not-found');
    } finally {
      await source.close();
    }
  });

  test('none reachable: reads wait and go on when one comes back, and fail after the bound when none does', async () => {
    const first = await serveHttp();
    const second = await serveHttp();
    const source = await connectSources([first.url, second.url], { reconnectTimeoutMs: 1500 });
    try {
      await first.stop();
      await second.stop();
      const startMs = performance.now();
      const error = await failsWith(readAll(source, refs), 'unreachable', /within 1\.5 s/);
      assert.equal(error.blame, 'tunnel');
      assert.ok(performance.now() - startMs >= 1500);
      const reading = readAll(source, refs);
      await sleep(300);
      await second.start();
      assert.ok(allOnce(await reading));
      const abort = new AbortController();
      await second.stop();
      const waiting = source.readChunks(refs, { priority: 'demand', signal: abort.signal }, () => {});
      setTimeout(() => abort.abort(), 100);
      await failsWith(waiting, 'closed');
    } finally {
      await source.close();
      await first.close();
      await second.close();
    }
  });

  test('one that is not there at the start joins later; the start does not wait for it', async () => {
    const late = await serveHttp();
    await late.stop();
    const source = await connectSources([late.url, memberOf(await store())]);
    try {
      assert.ok(allOnce(await readAll(source, refs)));
      assert.equal(source.statistics().sources[0]!.state, 'down');
      await late.start();
      await until(() => source.statistics().sources[0]!.state === 'up', 'the late one is up', 8000);
    } finally {
      await source.close();
      await late.close();
    }
  });

  test('a wrong address is refused at once, and so is a start without any source', async () => {
    await failsWith(connectSources(['http://127.0.0.1:1/', 'gopher://x/']), 'bad-request');
    await failsWith(connectSources(['http://127.0.0.1:1/', 'http://127.0.0.1:2/']), 'unreachable', /:1/);
    await failsWith(
      FailoverSource.open([
        { name: 'a', open: () => Promise.reject(new GridError('host-key', 'a has another key')) },
        { name: 'b', open: () => Promise.reject(new GridError('denied', 'b refused')) },
      ]),
      'host-key',
    );
  });

  test('close ends reads that wait', async () => {
    const first = await serveHttp();
    const source = await connectSources([first.url, first.url]);
    await first.stop();
    const reading = failsWith(readAll(source, refs), 'closed');
    await sleep(50);
    await source.close();
    await reading;
    await first.close();
  });
});

describe('profiles on the wire', () => {
  const recording = () =>
    Buffer.from(
      JSON.stringify({
        schema: 1,
        manifest: ground.fixture.digest,
        purpose: 'boot',
        runs: 1,
        early: [[0, 3]],
        late: [[5, 2]],
      }),
    );

  test('plain http gives profiles and takes no recordings; a unix socket takes them', async () => {
    const { digest } = ground.fixture;
    const served = await store();
    const server = createServer(served);
    const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as AddressInfo;
    const source = await connectSource(`http://127.0.0.1:${port}`);
    try {
      assert.equal(await source.readProfile(digest, 'boot'), undefined);
      await failsWith(source.recordProfile(digest, 'boot', recording()), 'denied', /ssh/);
      assert.equal(await source.readProfile(digest, 'boot'), undefined, 'nothing was recorded');
      await served.recordProfile(digest, 'boot', recording());
      const profile = JSON.parse((await source.readProfile(digest, 'boot'))!.toString()) as {
        early: unknown;
      };
      assert.deepEqual(profile.early, [[0, 3]]);
      await failsWith(source.readProfile(digest, '../../x'), 'bad-request');
      await failsWith(source.readProfile('../../x', 'boot'), 'bad-request');
    } finally {
      await source.close();
      await server.close();
      await served.close();
    }
  });

  test('images are held over a unix socket and not over plain http, and only by what is a digest', async () => {
    const { digest } = ground.fixture;
    const served = await store();
    const server = createServer(served);
    const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as AddressInfo;
    const socketPath = path.join(ground.folder, 'holds.sock');
    await server.listen({ path: socketPath });
    const source = await connectSource(`http://127.0.0.1:${port}`);
    const post = (body: string) =>
      new Promise<number>((resolve, reject) => {
        const headers = { 'content-type': 'application/octet-stream' };
        http
          .request({ socketPath, path: '/v1/holds/host-a', method: 'POST', headers }, (answer) => {
            answer.resume();
            resolve(answer.statusCode!);
          })
          .on('error', reject)
          .end(body);
      });
    try {
      await failsWith(source.hold('host-a', [digest]), 'denied', /ssh/);
      assert.deepEqual(await served.listHolds(), []);
      assert.equal(await post(JSON.stringify([digest])), 200);
      const held = (await served.listHolds()).map(({ holder, manifests }) => [holder, manifests]);
      assert.deepEqual(held, [['host-a', [digest]]]);
      for (const body of ['', '{}', '["../lock"]', JSON.stringify([digest, 7])]) {
        assert.equal(await post(body), 400, body);
      }
      await failsWith(source.hold('../../x', [digest]), 'bad-request');
      assert.equal(await post('[]'), 200);
      assert.deepEqual(await served.listHolds(), []);
    } finally {
      await source.close();
      await server.close();
      await served.close();
    }
  });
});
