/** When lanes are opened, at a real transport that is watched. */
import assert from 'node:assert/strict';
import type { AddressInfo } from 'node:net';
import { test } from 'node:test';
import { httpTransport } from '../../proxy/http-transport.ts';
import { createServer } from '../../proxy/index.ts';
import { RemoteSource } from '../../proxy/remote-source.ts';
import { parseSshUrl, sshTransport } from '../../proxy/ssh-transport.ts';
import { openStore } from '../../src/store/index.ts';
import { SUITE_FIXTURE } from '../suites/chunk-source.ts';
import { clientOptions, makeGround, refsOf, serveSsh, until } from './kit.ts';

const TIMEOUT_MS = 10_000;

test('bulk that waits opens its lanes together, not one after the other; one chunk opens one', async () => {
  await using stack = new AsyncDisposableStack();
  const ground = await makeGround(SUITE_FIXTURE);
  stack.defer(() => ground.remove());
  const store = await openStore(ground.fixture.storeFolder);
  stack.defer(() => store.close());
  const server = createServer(store);
  stack.defer(() => server.close());
  const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as AddressInfo;
  const refs = refsOf(ground.fixture);

  /** The most lanes that were being opened at once while these chunks were read. */
  const openedTogether = async (count: number) => {
    const url = new URL(`http://127.0.0.1:${port}`);
    const way = httpTransport(url, { lanesMax: 9, connectTimeoutMs: TIMEOUT_MS });
    let opening = 0;
    let most = 0;
    const openLane = async () => {
      most = Math.max(most, ++opening);
      try {
        return await way.openLane();
      } finally {
        opening--;
      }
    };
    const bounds = { connectTimeoutMs: TIMEOUT_MS, reconnectTimeoutMs: TIMEOUT_MS };
    const source = await RemoteSource.connect({ ...way, openLane }, bounds);
    try {
      most = 0;
      await source.readChunks(refs.slice(0, count), { priority: 'prefetch' }, () => {});
      return most;
    } finally {
      await source.close();
    }
  };

  assert.equal(await openedTogether(1), 1);
  assert.equal(await openedTogether(4), 3);
});

// Fails without `standing` in lane-pool.ts, or without `idleLanes` in ssh-endpoint.ts.
test('where the far side bears idle lanes, they are there before anything is asked for', async () => {
  await using stack = new AsyncDisposableStack();
  const ground = await makeGround(SUITE_FIXTURE);
  stack.defer(() => ground.remove());
  const serving = await serveSsh(ground);
  stack.defer(() => serving.close());
  const { fingerprint } = serving.endpoint;
  const bounds = { lanesMax: 9, connectTimeoutMs: TIMEOUT_MS, idleTimeoutMs: TIMEOUT_MS };
  const options = { ...clientOptions(ground), hostKeyFingerprint: fingerprint };
  const way = sshTransport(parseSshUrl(new URL(serving.url)), options, bounds);
  let opened = 0;
  const openLane = async () => {
    const lane = await way.openLane();
    opened++;
    return lane;
  };
  const source = await RemoteSource.connect(
    { ...way, openLane },
    { connectTimeoutMs: TIMEOUT_MS, reconnectTimeoutMs: TIMEOUT_MS },
  );
  stack.defer(() => source.close());
  await until(() => opened === 4, 'four lanes are there');
  const { roundTrips } = source.statistics();
  await Promise.all(
    refsOf(ground.fixture).map((ref) => source.readChunks([ref], { priority: 'demand' }, () => {})),
  );
  assert.ok(source.statistics().roundTrips > roundTrips);
});
