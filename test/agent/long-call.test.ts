/** Calls that take long, on a real socket: their progress, and what a cancel waits for. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import fastify from 'fastify';
import { ControlClient } from '../../src/agent/client.ts';
import { longCall, serveLongCalls } from '../../src/agent/long-call.ts';
import { GridError } from '../../src/core/errors.ts';

const TAKES_BACK_MS = 200;

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-long-call-'));
const socket = path.join(folder, 'control.sock');
const app = fastify({ forceCloseConnections: true });
const client = new ControlClient(socket);
let takenBack = 0;

before(async () => {
  serveLongCalls(app);
  app.post('/done', (request, reply) =>
    longCall(request, reply, async ({ onProgress }) => {
      onProgress(1, 2);
      return { done: true };
    }),
  );
  app.post('/endless', (request, reply) =>
    longCall(request, reply, async ({ signal, onProgress }) => {
      onProgress(1, 2);
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
      await sleep(TAKES_BACK_MS);
      takenBack++;
      throw new GridError('closed', 'cancelled');
    }),
  );
  await app.listen({ path: socket });
});

after(async () => {
  await app.close();
  rmSync(folder, { recursive: true, force: true });
});

test('a call tells how far it is, and what it came to', async () => {
  const seen: [number, number][] = [];
  const result = await client.longCall('POST', '/done', {}, { onProgress: (...share) => seen.push(share) });
  assert.deepEqual(result, { done: true });
  assert.deepEqual(seen, [[1, 2]]);
});

// Fails without `cancel` in client.ts's longCall (the socket destroyed instead): takenBack is 0 then.
test('a cancelled call rejects when everything is taken back, not before', { timeout: 10_000 }, async () => {
  const stop = new AbortController();
  const call = client.longCall(
    'POST',
    '/endless',
    {},
    { signal: stop.signal, onProgress: () => stop.abort() },
  );
  await assert.rejects(call, { code: 'closed', message: 'cancelled' });
  assert.equal(takenBack, 1);
});

test('a call cancelled before its answer begins rejects; one that ended cannot be cancelled', async () => {
  const stop = new AbortController();
  stop.abort();
  await assert.rejects(client.longCall('POST', '/endless', {}, { signal: stop.signal }), { code: 'closed' });
  await assert.rejects(client.call('DELETE', '/v1/calls/99'), { code: /bug|not-found/, message: /call 99/ });
});
