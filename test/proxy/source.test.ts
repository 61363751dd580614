/** The client as a ChunkSource, over every way there is: http, the built-in ssh endpoint, a stock sshd, a static
 * server; and that all of them leave no descriptor open. */
import assert from 'node:assert/strict';
import { createReadStream, existsSync, readFileSync, statSync } from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { connectSource, createServer } from '../../proxy/index.ts';
import { fingerprintOf } from '../../proxy/known-hosts.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import { openStore } from '../../src/store/index.ts';
import { SUITE_FIXTURE, chunkSourceSuite } from '../suites/chunk-source.ts';
import { clientOptions, makeGround, openDescriptors, refsOf, serveSsh, startSshd, until } from './kit.ts';
import type { Ground, Sshd } from './kit.ts';

let ground: Ground;
let sshd: Sshd;
let descriptors: number;

before(async () => {
  ground = await makeGround(SUITE_FIXTURE);
  sshd = await startSshd(ground);
  // The first connection of a process loads modules and opens the event loop's own descriptors.
  const warm = await overHttp();
  await warm.source.listTags();
  await warm.close();
  descriptors = openDescriptors();
});

after(async () => {
  await sshd.stop();
  ground.remove();
});

async function overHttp() {
  const store = await openStore(ground.fixture.storeFolder);
  const server = createServer(store);
  const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as net.AddressInfo;
  const source = await connectSource(`http://127.0.0.1:${port}`);
  return {
    source,
    fixture: ground.fixture,
    async close() {
      await source.close();
      await server.close();
      await store.close();
    },
  };
}

async function overEndpoint() {
  const serving = await serveSsh(ground);
  const source = await connectSource(serving.url, clientOptions(ground, serving.endpoint.fingerprint));
  return {
    source,
    fixture: ground.fixture,
    async close() {
      await source.close();
      await serving.close();
    },
  };
}

async function overSshd(channels = 3) {
  const { storeFolder } = ground.fixture;
  const source = await connectSource(`ssh://root@127.0.0.1:${sshd.port}${storeFolder}`, {
    ...clientOptions(ground, fingerprintOfFile(`${sshd.hostKey}.pub`)),
    remoteCommand: sshd.remoteCommand,
    channels,
  });
  return { source, fixture: ground.fixture, close: () => source.close() };
}

/** A web server that knows nothing but files. */
async function overStatic() {
  const server = http.createServer((request, response) => {
    const file = path.join(ground.fixture.storeFolder, decodeURIComponent(request.url!));
    if (request.method !== 'GET') response.writeHead(405).end('<h1>405</h1>');
    else if (!existsSync(file) || statSync(file).isDirectory()) response.writeHead(404).end('<h1>404</h1>');
    else createReadStream(file).pipe(response);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const source = await connectSource(`http://127.0.0.1:${(server.address() as net.AddressInfo).port}/`);
  return {
    source,
    fixture: ground.fixture,
    async close() {
      await source.close();
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

function fingerprintOfFile(file: string): string {
  return fingerprintOf(Buffer.from(readFileSync(file, 'utf8').split(' ')[1]!, 'base64'));
}

chunkSourceSuite('the client over http', overHttp);
chunkSourceSuite('the client over the built-in ssh endpoint', overEndpoint);
chunkSourceSuite('the client over a stock sshd', () => overSshd());
chunkSourceSuite('the client over a static web server', overStatic);

test('one channel is enough for demand and prefetch together', async () => {
  const subject = await overSshd(1);
  const { source } = subject;
  try {
    const refs = refsOf(ground.fixture).slice(0, 200);
    const seen = [new Set<number>(), new Set<number>()];
    await Promise.all(
      (['prefetch', 'demand'] as const).map((priority, i) =>
        source.readChunks(refs, { priority }, (index, chunk) => {
          decodeChunk(chunk, refs[index]!);
          seen[i]!.add(index);
        }),
      ),
    );
    assert.deepEqual(
      seen.map((set) => set.size),
      [200, 200],
    );
  } finally {
    await subject.close();
  }
});

test('demand reads of one turn share a round trip, and the counters say so', async () => {
  const subject = await overEndpoint();
  const { source } = subject;
  try {
    const refs = refsOf(ground.fixture).slice(0, 50);
    const before = source.statistics();
    let stored = 0;
    await Promise.all(
      refs.map((ref) =>
        source.readChunks([ref], { priority: 'demand' }, (_, chunk) => {
          decodeChunk(chunk, ref);
          stored += chunk.bytes.length;
        }),
      ),
    );
    const now = source.statistics();
    const distinct = new Set(refs.map(({ digest }) => digest)).size;
    assert.equal(now.roundTrips - before.roundTrips, 1);
    assert.equal(now.requests - before.requests, 50);
    assert.equal(now.chunksReceived - before.chunksReceived, distinct);
    assert.ok(now.bytesReceived > before.bytesReceived);
    assert.ok(distinct < 50 || now.bytesReceived - before.bytesReceived >= stored);
    assert.equal(now.reconnects, 0);
  } finally {
    await subject.close();
  }
});

test('a missing chunk in a shared batch fails only the call that asked for it', async () => {
  for (const over of [overHttp, overStatic]) {
    const subject = await over();
    const { source } = subject;
    try {
      const good = refsOf(ground.fixture).slice(0, 10);
      const absent = { digest: 'cd'.repeat(32), plainBytes: 4096 };
      let delivered = 0;
      const [first, second] = await Promise.allSettled([
        source.readChunks([absent], { priority: 'demand' }, () => assert.fail('delivered')),
        source.readChunks(good, { priority: 'demand' }, () => delivered++),
      ]);
      assert.equal(first.status, 'rejected');
      assert.equal(second.status, 'fulfilled');
      assert.equal(delivered, 10);
    } finally {
      await subject.close();
    }
  }
});

test('nothing stays open after all of that', async () => {
  await until(
    () => openDescriptors() <= descriptors,
    `${openDescriptors()} descriptors, ${descriptors} before`,
  );
});
