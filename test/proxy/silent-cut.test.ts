/** A cut that nobody tells of: the link carries nothing more, and no connection is reset. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { LinkRelay } from '../../bench/link/relay.ts';
import { connectSource } from '../../proxy/index.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import { clientOptions, makeGround, refsOf, serveSsh } from './kit.ts';

test('a silent cut is noticed within 15 s over ssh, and the read goes on once a new connection is possible', async () => {
  const ground = await makeGround({ sizeBytes: 4 << 20, seed: 5 });
  const serving = await serveSsh(ground);
  const listen = { host: '127.0.0.1', port: 0 };
  const to = { host: '127.0.0.1', port: serving.endpoint.address.port };
  const relay = await LinkRelay.start({ listen, to, rttMs: 2, bitsPerSecond: 1e9 });
  const lost: string[] = [];
  let restored: Promise<void> | undefined;
  const source = await connectSource(`ssh://x@127.0.0.1:${relay.address.port}/`, {
    ...clientOptions(ground, serving.endpoint.fingerprint),
    onEvent: ({ type, message }) => {
      if (type !== 'lost') return;
      lost.push(message);
      restored = relay.cut().then(() => relay.restore());
    },
  });
  try {
    relay.stall(120_000);
    const startMs = Date.now();
    const ref = refsOf(ground.fixture)[0]!;
    let delivered = 0;
    await source.readChunks([ref], { priority: 'demand' }, (_, chunk) => {
      decodeChunk(chunk, ref);
      delivered++;
    });
    await restored;
    assert.equal(delivered, 1);
    assert.match(lost[0]!, /silent/);
    assert.ok(Date.now() - startMs < 17_000, `${Date.now() - startMs} ms`);
  } finally {
    await source.close();
    await relay.close();
    await serving.close();
    ground.remove();
  }
});
