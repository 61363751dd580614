/** What a server says of itself on /metrics and /healthz. */
import assert from 'node:assert/strict';
import type { AddressInfo } from 'node:net';
import { after, before, test } from 'node:test';
import { connectSource, createServer } from '../../proxy/index.ts';
import { createServerMetrics } from '../../proxy/server-metrics.ts';
import { openStore } from '../../src/store/index.ts';
import { FaultySource } from '../faults/faulty-source.ts';
import { SUITE_FIXTURE } from '../suites/chunk-source.ts';
import { failsWith, makeGround, refsOf, until } from './kit.ts';
import type { Ground } from './kit.ts';

let ground: Ground;

before(async () => {
  ground = await makeGround(SUITE_FIXTURE);
});

after(() => ground.remove());

test('requests, bytes, errors by code and batch times are counted; health says what is wrong', async () => {
  const faulty = new FaultySource(await openStore(ground.fixture.storeFolder), 1);
  const server = createServer(faulty, { metrics: createServerMetrics() });
  const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as AddressInfo;
  const url = `http://127.0.0.1:${port}`;
  const source = await connectSource(url);
  const scrape = async () => {
    const text = await (await fetch(`${url}/metrics`)).text();
    return (name: string) =>
      Number(
        text
          .split('\n')
          .find((line) => line.startsWith(`${name} `))
          ?.split(' ')[1],
      );
  };
  try {
    const refs = refsOf(ground.fixture).slice(0, 50);
    const distinct = new Set(refs.map(({ digest }) => digest)).size;
    let stored = 0;
    const seen = new Set<string>();
    await source.readChunks(refs, { priority: 'demand' }, (index, chunk) => {
      if (!seen.has(refs[index]!.digest)) stored += chunk.bytes.length;
      seen.add(refs[index]!.digest);
    });
    await source.readManifest(ground.fixture.digest);
    await failsWith(source.readManifest('ab'.repeat(32)), 'not-found');
    let value = await scrape();
    assert.equal(value('gridvfs_server_requests_total{route="batch"}'), 1);
    assert.equal(value('gridvfs_server_requests_total{route="opening"}'), 2);
    assert.equal(
      value('gridvfs_server_requests_total{route="manifest"}'),
      1,
      'what is not there is asked for alone',
    );
    assert.equal(value('gridvfs_server_sent_bytes_total{route="batch"}'), stored);
    assert.equal(value('gridvfs_server_batch_chunks_total{priority="demand"}'), distinct);
    assert.equal(value('gridvfs_server_batch_duration_seconds_count{priority="demand"}'), 1);
    assert.equal(value('gridvfs_server_errors_total{code="not-found"}'), 2);
    assert.equal(value('gridvfs_server_requests_in_flight'), 1, 'the scrape itself');
    assert.deepEqual(await (await fetch(`${url}/healthz`)).json(), { status: 'ok' });

    await source.readChunks(refs.slice(0, 1), { priority: 'demand' }, () => {});
    assert.equal((await scrape())('gridvfs_server_memory_chunks_total'), 1);

    const others = refsOf(ground.fixture)
      .filter(({ digest }) => !seen.has(digest))
      .slice(0, 50);
    faulty.arm({ failWith: 'local-io' });
    await failsWith(
      source.readChunks(others, { priority: 'demand' }, () => {}),
      'origin-failed',
    );
    value = await scrape();
    assert.equal(value('gridvfs_server_errors_total{code="local-io"}'), 1);
    const health = (await (await fetch(`${url}/healthz`)).json()) as { status: string; reason: string };
    assert.equal(health.status, 'degraded');
    assert.match(health.reason, /fails as it was told to/);

    // A reader that goes away in the middle leaves nothing in flight.
    faulty.arm({ hang: true });
    const abort = new AbortController();
    const reading = source.readChunks(others, { priority: 'demand', signal: abort.signal }, () => {});
    await until(() => faulty.calls === 3, 'the read has come');
    abort.abort();
    await failsWith(reading, 'closed');
    faulty.disarm();
    for (let inFlight = 2, left = 100; inFlight > 1 && left > 0; left--) {
      inFlight = (await scrape())('gridvfs_server_requests_in_flight');
    }
    assert.equal((await scrape())('gridvfs_server_requests_in_flight'), 1);
  } finally {
    await source.close();
    await server.close();
    await faulty.close();
  }
});

test('without metrics there is no such path', async () => {
  const store = await openStore(ground.fixture.storeFolder);
  const server = createServer(store);
  const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as AddressInfo;
  try {
    assert.equal((await fetch(`http://127.0.0.1:${port}/metrics`)).status, 404);
  } finally {
    await server.close();
    await store.close();
  }
});
