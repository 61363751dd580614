/** How a batch leaves the server: together what is there together, and nothing waits for what is not. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { PassThrough, Writable } from 'node:stream';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
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
  /** No write is done before this. */
  stands = Promise.resolve();

  override _write(piece: Buffer, _encoding: string, done: () => void): void {
    this.pieces.push(piece);
    void this.#finish(done);
  }

  async #finish(done: () => void): Promise<void> {
    await this.stands;
    setImmediate(done);
  }

  get bytes(): Buffer {
    return Buffer.concat(this.pieces);
  }
}

/** All chunks of a call in one turn, but for the first `early` ones, which do not wait for `rest`. */
class Source implements ChunkSource {
  readonly name = 'test';
  readonly #plains: ReadonlyMap<string, Buffer>;
  readonly #early: number;
  readonly #rest: Promise<void>;
  delivered = 0;

  constructor(plains: readonly Buffer[], early: number, rest: Promise<void>) {
    this.#plains = new Map(plains.map((plain) => [sha256(plain), plain]));
    this.#early = early;
    this.#rest = rest;
  }

  readonly #unused = () => Promise.reject(new Error('unused'));
  readonly listTags = this.#unused;
  readonly readManifest = this.#unused;
  readonly readTable = this.#unused;

  readonly readChunks: ChunkSource['readChunks'] = async (refs, _options, deliver) => {
    for (const [index, { digest }] of refs.entries()) {
      if (index === this.#early) await this.#rest;
      this.delivered++;
      deliver(index, { encoding: 'plain', bytes: this.#plains.get(digest)! });
    }
  };

  close(): Promise<void> {
    return Promise.resolve();
  }
}

async function ask(
  plains: readonly Buffer[],
  options: { early?: number; rest?: Promise<void>; stands?: Promise<void> } = {},
) {
  const source = new Source(plains, options.early ?? 0, options.rest ?? Promise.resolve());
  const server = createServer(source);
  const input = new PassThrough();
  const tunnel = new Tunnel();
  if (options.stands) tunnel.stands = options.stands;
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
  return { source, tunnel, refs, ended };
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
  const { tunnel, refs, ended } = await ask(plains, { early: 2, rest: rest.promise });
  await until(() => tunnel.bytes.includes(plains[1]!), 'the first two came');
  assert.ok(!tunnel.bytes.includes(plains[2]!));
  rest.resolve();
  await ended();
  checkAnswer(tunnel.bytes, refs);
});

// Fails without `drained` in server.ts.
test('a tunnel that stands still is not read for', async () => {
  const stands = Promise.withResolvers<void>();
  const plains = Array.from({ length: 128 }, () => randomBytes(256 * KIB));
  const { source, tunnel, refs, ended } = await ask(plains, { stands: stands.promise });
  await until(() => tunnel.pieces.length > 0, 'the first piece came');
  await sleep(200);
  assert.ok(source.delivered <= 48, `${source.delivered} chunks were read`);
  stands.resolve();
  await ended();
  checkAnswer(tunnel.bytes, refs);
  assert.ok(tunnel.pieces.length >= refs.length / 2, `${tunnel.pieces.length} pieces`);
});
