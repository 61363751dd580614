/** Answers that are cut or hostile, servers that know less, and readers that stand still or go away: what the
 * client makes of the first and the server of the others. */
import assert from 'node:assert/strict';
import http from 'node:http';
import net from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, describe, test } from 'node:test';
import { connectSource, createServer } from '../../proxy/index.ts';
import type { ConnectOptions } from '../../proxy/index.ts';
import { encodeBatchRequest, encodeChunkHeader, encodeEnd, parseBatchRequest } from '../../proxy/protocol.ts';
import { compress, decodeChunk } from '../../src/core/chunk.ts';
import type { ChunkRef } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { encodeTags } from '../../src/core/manifest.ts';
import type { ChunkSource, Priority } from '../../src/core/source.ts';
import { openStore } from '../../src/store/index.ts';
import { clientOptions, failsWith, makeGround, refsOf, serveSsh, until } from './kit.ts';
import type { Ground } from './kit.ts';

let ground: Ground;
let refs: ChunkRef[];

before(async () => {
  ground = await makeGround({ sizeBytes: 64 << 20, seed: 11 });
  refs = refsOf(ground.fixture);
});

after(() => ground.remove());

/** Reads all of `refs` as a cache does, and counts what was delivered of each. */
async function readAll(
  source: ChunkSource,
  wanted: readonly ChunkRef[],
  priority: Priority,
): Promise<number[]> {
  const counts = wanted.map(() => 0);
  await source.readChunks(wanted, { priority }, (index, chunk) => {
    decodeChunk(chunk, wanted[index]!);
    counts[index]!++;
  });
  return counts;
}

const allOnce = (counts: readonly number[]) => counts.every((count) => count === 1);

/** An HTTP server that speaks the protocol until the batch, and then does what the test wants. */
async function hostile(
  onBatch: (wanted: ChunkRef[], response: http.ServerResponse) => void,
  hello: unknown = { protocol: 1, software: 'hostile' },
): Promise<{ url: string; close(): Promise<void> }> {
  const server = http.createServer((request, response) => {
    const pieces: Buffer[] = [];
    request.on('data', (piece: Buffer) => pieces.push(piece));
    request.on('end', () => {
      if (request.url === '/v1/') response.end(JSON.stringify(hello));
      else if (request.url === '/v1/tags.json') response.end(encodeTags([]));
      else if (request.method === 'POST') onBatch(parseBatchRequest(Buffer.concat(pieces)).refs, response);
      else response.writeHead(404).end();
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${(server.address() as net.AddressInfo).port}`,
    async close() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

async function against(
  onBatch: Parameters<typeof hostile>[0],
  body: (source: Awaited<ReturnType<typeof connectSource>>) => Promise<void>,
  options: ConnectOptions = {},
): Promise<void> {
  const server = await hostile(onBatch);
  const source = await connectSource(server.url, options);
  try {
    await body(source);
  } finally {
    await source.close();
    await server.close();
  }
}

const PLAINS = [1, 2, 3, 4].map((n) => Buffer.alloc(5000, n));
const WANTED: ChunkRef[] = PLAINS.map((plain) => ({ digest: sha256(plain), plainBytes: plain.length }));
const frameOf = (index: number, ref: ChunkRef) => {
  const bytes = compress(PLAINS[WANTED.findIndex(({ digest }) => digest === ref.digest)]!);
  return Buffer.concat([encodeChunkHeader(index, { encoding: 'zstd', bytes }), bytes]);
};

describe('answers', () => {
  test('that are cut after some chunks are asked for again, only for the rest', async () => {
    const asked: number[] = [];
    await against(
      (wanted, response) => {
        asked.push(wanted.length);
        for (let i = 0; i < Math.min(wanted.length, 2); i++) response.write(frameOf(i, wanted[i]!));
        if (wanted.length > 2) setTimeout(() => response.destroy(), 20);
        else response.end(encodeEnd(wanted.length));
      },
      async (source) => {
        assert.ok(allOnce(await readAll(source, WANTED, 'demand')));
        assert.deepEqual(asked, [4, 2]);
      },
    );
  });

  // Fails (hangs until its timeout) without `this.#bound` in RemoteSource.#recover.
  test(
    'one that goes on over another lane while the way is broken has its bound all the same',
    {
      timeout: 20_000,
    },
    async () => {
      const wanted = WANTED.slice(0, 2).map((ref) => ({ ...ref, storedBytes: 200 * 1024 })); // a batch each
      let held: http.ServerResponse | undefined;
      await against(
        (refs, response) => {
          if (!held) {
            held = response;
            response.writeHead(200).flushHeaders();
            return;
          }
          // Nobody can connect any more; what is connected stays.
          (response.req.socket as unknown as { server: http.Server }).server.close();
          response.destroy();
          const other = wanted.find(({ digest }) => digest !== refs[0]!.digest)!;
          setTimeout(() => held!.write(frameOf(0, other)), 50);
        },
        async (source) => {
          const counts = [0, 0];
          const reading = source.readChunks(
            wanted,
            { priority: 'prefetch' },
            (index) => void counts[index]!++,
          );
          await failsWith(reading, 'unreachable');
          assert.equal(counts[0]! + counts[1]!, 1);
        },
        { reconnectTimeoutMs: 500 },
      );
    },
  );

  test('that end properly, but without the END frame, count as cut', async () => {
    let times = 0;
    await against(
      (wanted, response) => {
        for (const [i, ref] of wanted.slice(0, 3).entries()) response.write(frameOf(i, ref));
        response.end(++times === 1 ? '' : encodeEnd(wanted.length));
      },
      async (source) => {
        assert.ok(allOnce(await readAll(source, WANTED, 'demand')));
        assert.equal(times, 2);
      },
    );
  });

  test('with frames that break the protocol fail the read with origin-failed, once', async () => {
    let times = 0;
    await against(
      (wanted, response) => {
        times++;
        response.write(frameOf(0, wanted[0]!));
        response.end(Buffer.from([9, 9, 9, 9, 9, 9, 9, 9]));
      },
      async (source) => {
        await failsWith(readAll(source, WANTED, 'demand'), 'origin-failed', /malformed frame/);
        assert.equal(times, 1);
      },
    );
  });

  test('that never come end with closed when the source is closed', async () => {
    await against(
      () => {},
      async (source) => {
        const reading = failsWith(readAll(source, WANTED, 'demand'), 'closed');
        await sleep(50);
        await source.close();
        await reading;
      },
    );
  });

  test('of servers that cut every batch at once fail with unreachable when no chunk came within the bound', async () => {
    let times = 0;
    await against(
      (_wanted, response) => {
        times++;
        response.destroy();
      },
      async (source) => {
        await failsWith(readAll(source, WANTED, 'demand'), 'unreachable');
        assert.ok(times > 2 && times < 40, `asked ${times} times: with backoff`);
      },
      { reconnectTimeoutMs: 1500 },
    );
  });

  test('of a POST that a web server in front does not allow make the client take single chunks', async () => {
    for (const status of [404, 405, 501]) {
      const server = http.createServer((request, response) => {
        if (request.url === '/v1/') response.end('{"protocol":1}');
        else if (request.method === 'POST') response.writeHead(status).end('<h1>no</h1>');
        else {
          const at = WANTED.findIndex(
            ({ digest }) => request.url === `/v1/chunks/${digest.slice(0, 2)}/${digest}`,
          );
          response.end(compress(PLAINS[at]!));
        }
      });
      await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
      const source = await connectSource(`http://127.0.0.1:${(server.address() as net.AddressInfo).port}`);
      try {
        assert.ok(allOnce(await readAll(source, WANTED, 'demand')));
        assert.ok(allOnce(await readAll(source, WANTED, 'prefetch')));
      } finally {
        await source.close();
        server.closeAllConnections();
        await new Promise((resolve) => server.close(resolve));
      }
    }
  });

  test('that greet with a newer protocol are refused as newer-format; no store is not-found', async () => {
    const newer = await hostile(() => {}, { protocol: 2 });
    await failsWith(connectSource(newer.url), 'newer-format', /protocol 2/);
    await failsWith(connectSource(`${newer.url}/elsewhere`), 'not-found', /no gridvfs store/);
    await newer.close();
    const plain = net.createServer((socket) => {
      socket.on('error', () => {});
      socket.resume();
      socket.end('220 mail.example ESMTP\r\n');
    });
    await new Promise<void>((resolve) => plain.listen(0, '127.0.0.1', resolve));
    await failsWith(
      connectSource(`http://127.0.0.1:${(plain.address() as net.AddressInfo).port}`),
      'origin-failed',
      /not HTTP/,
    );
    await new Promise((resolve) => plain.close(resolve));
  });
});

/** A source whose chunks are large and counted. */
function countingSource(): ChunkSource & { reads: number; aborted: number } {
  const bytes = Buffer.alloc(256 * 1024, 1);
  const counting = {
    name: 'counting',
    reads: 0,
    aborted: 0,
    listTags: () => Promise.resolve([]),
    readManifest: () => Promise.reject(new GridError('not-found', 'none')),
    readTable: () => Promise.reject(new GridError('not-found', 'none')),
    async readChunks(
      wanted: readonly ChunkRef[],
      { signal }: { signal?: AbortSignal },
      deliver: (index: number, chunk: { encoding: 'plain'; bytes: Buffer }) => void,
    ) {
      for (const index of wanted.keys()) {
        await sleep(1);
        if (signal?.aborted) {
          counting.aborted++;
          throw new GridError('closed', 'aborted');
        }
        counting.reads++;
        deliver(index, { encoding: 'plain', bytes });
      }
    },
    close: () => Promise.resolve(),
  };
  return counting;
}

describe('a reader', () => {
  const batch = () =>
    encodeBatchRequest(
      Array.from({ length: 256 }, (_, i) => ({ digest: sha256(Buffer.from([i])), plainBytes: 256 * 1024 })),
      'prefetch',
    );

  test('that stands still makes the server read a few chunks ahead, not the batch; going away aborts the rest', async () => {
    const source = countingSource();
    const server = createServer(source);
    const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as net.AddressInfo;
    const socket = net.connect(port, '127.0.0.1');
    socket.pause();
    const body = batch();
    socket.write(
      `POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: ${body.length}\r\n\r\n`,
    );
    socket.write(body);
    await until(() => source.reads > 8, 'the server reads');
    await sleep(400);
    const ahead = source.reads;
    await sleep(300);
    assert.equal(source.reads, ahead, 'the server waits for the reader');
    // Two parts of 16 chunks, and what the kernel's socket buffers took.
    assert.ok(ahead < 128, `${ahead} chunks of 256 were read`);
    socket.destroy();
    await sleep(100);
    assert.ok(source.reads <= ahead + 32);
    await server.close();
  });

  test('that goes away in the middle aborts what is read for it', async () => {
    const source = countingSource();
    const serving = await serveSsh(ground, source);
    const client = await connectSource(serving.url, clientOptions(ground, serving.endpoint.fingerprint));
    const abort = new AbortController();
    const wanted = parseBatchRequest(batch()).refs;
    let delivered = 0;
    await failsWith(
      client.readChunks(wanted, { priority: 'demand', signal: abort.signal }, () => {
        if (++delivered === 10) abort.abort();
      }),
      'closed',
    );
    await until(() => source.aborted > 0, 'the source was aborted');
    assert.ok(source.reads < 120, `${source.reads} were read`);
    await client.close();
    await serving.close();
  });

  test('of an unknown path, a wrong digest or a malformed batch gets a JSON error with a code', async () => {
    const server = createServer(countingSource());
    const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as net.AddressInfo;
    const ask = async (url: string, init?: RequestInit) => {
      const response = await fetch(`http://127.0.0.1:${port}${url}`, init);
      return { status: response.status, code: ((await response.json()) as { code?: string }).code };
    };
    assert.deepEqual(await ask('/v1/nothing'), { status: 404, code: 'not-found' });
    assert.deepEqual(await ask('/v1/chunks/ab/xyz'), { status: 400, code: 'bad-request' });
    assert.deepEqual(await ask(`/v1/chunks/00/${'ab'.repeat(32)}`), { status: 400, code: 'bad-request' });
    assert.deepEqual(await ask(`/v1/tables/ab/${'ab'.repeat(32)}`), { status: 404, code: 'not-found' });
    const type = { 'content-type': 'application/octet-stream' };
    const post = (body: Uint8Array<ArrayBuffer>) => ask('/v1/batch', { method: 'POST', headers: type, body });
    assert.deepEqual(await post(new Uint8Array(10)), { status: 400, code: 'bad-request' });
    assert.deepEqual(await post(new Uint8Array(100_000)), { status: 400, code: 'bad-request' });
    assert.equal((await ask('/v1/batch', { method: 'POST' })).status, 400);
    assert.deepEqual(await ask('/healthz'), { status: 200, code: undefined });
    await server.close();
  });

  test('sees immutable objects and a tag list that expires', async () => {
    const { storeFolder, digest } = ground.fixture;
    const store = await openStore(storeFolder);
    const server = createServer(store);
    const { port } = (await server.listen({ host: '127.0.0.1', port: 0 })) as net.AddressInfo;
    const object = await fetch(`http://127.0.0.1:${port}/v1/manifests/${digest.slice(0, 2)}/${digest}`);
    assert.match(object.headers.get('cache-control')!, /immutable/);
    assert.equal(sha256(new Uint8Array(await object.arrayBuffer())), digest);
    const chunk = refs[0]!;
    const stored = await fetch(
      `http://127.0.0.1:${port}/v1/chunks/${chunk.digest.slice(0, 2)}/${chunk.digest}`,
    );
    assert.match(stored.headers.get('cache-control')!, /immutable/);
    decodeChunk({ encoding: 'zstd', bytes: new Uint8Array(await stored.arrayBuffer()) }, chunk);
    const tags = await fetch(`http://127.0.0.1:${port}/v1/tags.json`);
    assert.equal(tags.headers.get('cache-control'), 'no-cache');
    await tags.arrayBuffer();
    await server.close();
    await store.close();
  });
});
