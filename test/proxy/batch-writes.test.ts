/** How a batch leaves the server: together what is there together, and nothing waits for what is not. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { PassThrough, Writable } from 'node:stream';
import { test } from 'node:test';
import { createServer } from '../../proxy/index.ts';
import { BATCH_TYPE, encodeBatchRequest, FrameReader } from '../../proxy/protocol.ts';
import { StreamSocket } from '../../proxy/stream-socket.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import type { ChunkRef } from '../../src/core/chunk.ts';
import { KIB } from '../../src/core/limits.ts';
import type { ChunkSource } from '../../src/core/source.ts';
import { until } from './kit.ts';

/** What was written to a tunnel, write by write. */
class Tunnel extends Writable {
  readonly pieces: Buffer[] = [];

  override _write(piece: Buffer, _encoding: string, done: () => void): void {
    this.pieces.push(piece);
    setImmediate(done);
  }

  get bytes(): Buffer {
    return Buffer.concat(this.pieces);
  }
}

/** All chunks of a call in one turn, but for the first `early` ones, which do not wait for `rest`. */
function sourceOf(plains: readonly Buffer[], early: number, rest: Promise<void>): ChunkSource {
  const unused = () => Promise.reject(new Error('unused'));
  return {
    name: 'test',
    listTags: unused,
    readManifest: unused,
    readTable: unused,
    async readChunks(refs, _options, deliver) {
      const give = (index: number) => {
        const plain = plains.find((one) => sha256(one) === refs[index]!.digest)!;
        deliver(index, { encoding: 'plain', bytes: plain });
      };
      for (let index = 0; index < early; index++) give(index);
      if (early < refs.length) await rest;
      for (let index = early; index < refs.length; index++) give(index);
    },
    close: () => Promise.resolve(),
  };
}

async function ask(plains: readonly Buffer[], early = 0, rest = Promise.resolve()) {
  const server = createServer(sourceOf(plains, early, rest));
  const input = new PassThrough();
  const tunnel = new Tunnel();
  await server.attach(new StreamSocket(input, tunnel), { authenticated: true });
  const refs = plains.map((plain): ChunkRef => ({ digest: sha256(plain), plainBytes: plain.length }));
  const body = encodeBatchRequest(refs, 'prefetch');
  const head = `POST /v1/batch HTTP/1.1\r\nhost: x\r\ncontent-type: ${BATCH_TYPE}\r\ncontent-length: ${body.length}\r\n\r\n`;
  input.write(Buffer.concat([Buffer.from(head), body]));
  const ended = async () => {
    await until(() => tunnel.bytes.subarray(-7).toString() === '\r\n0\r\n\r\n', 'the answer ended');
    input.end();
    await server.close();
  };
  return { tunnel, refs, ended };
}

/** The frames within the HTTP chunks of an answer are those of all the chunks asked for. */
function checkAnswer(bytes: Buffer, refs: readonly ChunkRef[]): void {
  let got = 0;
  const reader = new FrameReader(refs, 'test', (index, chunk) => {
    decodeChunk(chunk, refs[index]!);
    got++;
  });
  for (let at = bytes.indexOf('\r\n\r\n') + 4; ;) {
    const lineEnd = bytes.indexOf('\r\n', at);
    const length = Number.parseInt(bytes.toString('latin1', at, lineEnd), 16);
    if (length === 0) break;
    reader.push(bytes.subarray(lineEnd + 2, lineEnd + 2 + length));
    at = lineEnd + 2 + length + 2;
  }
  assert.ok(reader.ended);
  assert.equal(got, refs.length);
}

test('small chunks that were read together are one write, with the end of the batch', async () => {
  for (const count of [1, 32]) {
    const { tunnel, refs, ended } = await ask(Array.from({ length: count }, () => randomBytes(1 * KIB)));
    await ended();
    checkAnswer(tunnel.bytes, refs);
    assert.equal(tunnel.pieces.length, 1);
  }
});

// Fails without `setImmediate(letGo)` in server.ts.
test('what was read is on its way before the rest is', async () => {
  const rest = Promise.withResolvers<void>();
  const plains = Array.from({ length: 4 }, () => randomBytes(1 * KIB));
  const { tunnel, refs, ended } = await ask(plains, 2, rest.promise);
  await until(() => tunnel.bytes.includes(plains[1]!), 'the first two came');
  assert.ok(!tunnel.bytes.includes(plains[2]!));
  rest.resolve();
  await ended();
  checkAnswer(tunnel.bytes, refs);
});

test('large chunks go one after the other, and no more than a tunnel takes', async () => {
  const { tunnel, refs, ended } = await ask(Array.from({ length: 40 }, () => randomBytes(256 * KIB)));
  await ended();
  checkAnswer(tunnel.bytes, refs);
  assert.ok(tunnel.pieces.length >= refs.length);
});
