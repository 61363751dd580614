/**
 * The server side: a ChunkSource behind the inter-proxy protocol (protocol.ts), over TCP, a unix socket, an ssh
 * channel or stdin/stdout. It keeps no state of its own, so any source may stand behind it: a store, or a cache
 * with another proxy behind it.
 *
 * Memory per batch is bounded: a batch is asked of the source in parts of a few MiB, at most two at a time, and no
 * further one while the reader is behind. A reader that goes away aborts what is being read for it.
 */
import { Console } from 'node:console';
import http from 'node:http';
import type { ServerResponse } from 'node:http';
import net from 'node:net';
import type { AddressInfo } from 'node:net';
import type { Duplex, Readable, Writable } from 'node:stream';
import Fastify from 'fastify';
import type { FastifyInstance, FastifyReply } from 'fastify';
import { compress } from '../src/core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { GridError, asGridError } from '../src/core/errors.ts';
import { CHUNK_BYTES_MAX, KIB, MIB, PROFILE_BYTES_MAX } from '../src/core/limits.ts';
import { encodeTags } from '../src/core/manifest.ts';
import type { ChunkSource, Priority } from '../src/core/source.ts';
import {
  BATCH_PATH,
  BATCH_TYPE,
  HELLO_PATH,
  HTTP_STATUS,
  PROTOCOL_VERSION,
  REQUEST_BYTES_MAX,
  SOFTWARE,
  TAGS_PATH,
  encodeChunkHeader,
  encodeEnd,
  encodeError,
  checkedObject,
  errorBody,
  parseBatchRequest,
  profilePath,
} from './protocol.ts';
import { holdRoutes } from './holds.ts';
import { HotChunks } from './hot-chunks.ts';
import { openingRoutes } from './openings.ts';
import type { ServedRoute, ServerMetrics } from './server-metrics.ts';
import { StreamSocket } from './stream-socket.ts';
import { uploadRoutes } from './upload-routes.ts';

/** Plain bytes of one part of a batch: 16 chunks of the default size keep a disk or a link behind us busy. */
const PART_BYTES = 4 * MIB;
/** To copy no more than this costs less than another write. */
const JOINED_BYTES_MAX = 32 * KIB;
/** Of a batch, held back for the end of a turn of the event loop. */
const HELD_BYTES_MAX = 128 * KIB;
/** Parts under way at once: while one is being sent the next is being read. */
const PARTS_MAX = 2;
/** Connections of one listener; each may hold two parts. */
const CONNECTIONS_MAX = 512;

const IMMUTABLE = 'public, max-age=31536000, immutable';

export interface ServerOptions {
  /** Counts, and is served at /metrics; without it there is no such path. */
  readonly metrics?: ServerMetrics;
  /** Lets everybody who was authenticated make new images; default false. */
  readonly acceptUploads?: boolean;
  /** Called with every failure that is not the asker's own, for a log. */
  readonly onError?: (error: GridError) => void;
}

export interface AttachOptions {
  /** Whoever is on this stream was authenticated: it may record profiles and hold images. */
  readonly authenticated?: boolean;
  /** It may also make new images; default: what `acceptUploads` says for those authenticated. */
  readonly mayUpload?: boolean;
  /** It is told that this many lanes may stand idle; default 0: each costs a process or a connection. */
  readonly idleLanes?: number;
}

export interface ProxyServer {
  /** Serves HTTP/1.1 on a stream that is already connected. Returns when the stream is taken over. */
  attach(stream: Duplex, options?: AttachOptions): Promise<void>;
  /** Starts a listener; several may be open at once. Throws in-use, local-io. */
  listen(where: { host: string; port: number } | { path: string }): Promise<AddressInfo | string>;
  /** Ends listeners, connections and reads under way. Idempotent. */
  close(): Promise<void>;
}

/** A server for `source`, which stays the caller's to close. */
export function createServer(source: ChunkSource, options: ServerOptions = {}): ProxyServer {
  let server: http.Server | undefined;
  const app = Fastify({
    logger: false,
    bodyLimit: REQUEST_BYTES_MAX,
    serverFactory: (handler) => (server = http.createServer({ keepAliveTimeout: 75_000 }, handler)),
  });
  const stopping = new AbortController();
  const authenticatedStreams = new WeakSet<Duplex>();
  const uploadStreams = new WeakSet<Duplex>();
  const idleLanes = new WeakMap<Duplex, number>();
  defineRoutes(app, source, stopping.signal, options);
  app.get(HELLO_PATH, ({ raw }) => {
    const idle = idleLanes.get(raw.socket);
    return {
      protocol: PROTOCOL_VERSION,
      software: SOFTWARE,
      openings: true,
      ...(idle === undefined ? {} : { idleLanes: idle }),
    };
  });
  profileRoutes(app, source, authenticatedStreams);
  openingRoutes(app, source);
  holdRoutes(app, source, authenticatedStreams);
  uploadRoutes(app, source.uploads, ({ raw }) => uploadStreams.has(raw.socket));
  const ready = app.ready();
  ready.then(undefined, () => {}); // attach and listen report it
  const listeners = new Set<net.Server>();
  const streams = new Set<Duplex>();

  const attach = async (
    stream: Duplex,
    {
      authenticated = false,
      mayUpload = authenticated && options.acceptUploads === true,
      idleLanes: idle,
    }: AttachOptions = {},
  ) => {
    await ready;
    if (stopping.signal.aborted) {
      stream.destroy();
      return;
    }
    streams.add(stream);
    if (authenticated) authenticatedStreams.add(stream);
    if (mayUpload) uploadStreams.add(stream);
    if (idle !== undefined) idleLanes.set(stream, idle);
    stream.once('close', () => streams.delete(stream));
    stream.on('error', () => stream.destroy());
    server!.emit('connection', stream);
  };

  return {
    attach,
    async listen(where) {
      await ready;
      const listener = net.createServer({ noDelay: true, keepAlive: true }, (socket) => {
        // Who may open a unix socket is what its folder's permissions say; a TCP port lets everybody in.
        void attach(socket, { authenticated: 'path' in where });
      });
      listener.maxConnections = CONNECTIONS_MAX;
      await listenOn(listener, where);
      listeners.add(listener);
      return listener.address()!;
    },
    async close() {
      stopping.abort();
      const closed = [...listeners].map(
        (listener) => new Promise<void>((resolve) => listener.close(() => resolve())),
      );
      listeners.clear();
      for (const stream of streams) stream.destroy();
      await Promise.all(closed);
      await app.close();
    },
  };
}

/** listen(2) with a GridError: in-use names the address. */
export async function listenOn(
  listener: net.Server,
  where: { host: string; port: number } | { path: string },
): Promise<void> {
  const name = 'path' in where ? where.path : `${where.host}:${where.port}`;
  await new Promise<void>((resolve, reject) => {
    listener.once('error', (cause: NodeJS.ErrnoException) =>
      reject(
        cause.code === 'EADDRINUSE'
          ? new GridError('in-use', `cannot listen on ${name}: something else listens there`, { cause })
          : asGridError(cause, `cannot listen on ${name}`),
      ),
    );
    listener.listen(where, resolve);
  });
}

function defineRoutes(
  app: FastifyInstance,
  source: ChunkSource,
  stopping: AbortSignal,
  { metrics, onError = () => {} }: ServerOptions,
): void {
  const fail = (reply: FastifyReply, thrown: unknown) => {
    const error = asRequestError(thrown);
    if (error.blame !== 'caller') onError(error);
    metrics?.failed(error.code);
    return reply.code(HTTP_STATUS[error.code]).header('cache-control', 'no-store').send(errorBody(error));
  };
  app.setErrorHandler((error, _request, reply) => fail(reply, error));
  app.setNotFoundHandler((request, reply) =>
    fail(reply, new GridError('not-found', `no such path: ${request.method} ${request.url.slice(0, 200)}`)),
  );
  app.addContentTypeParser(
    [BATCH_TYPE, 'application/octet-stream'],
    { parseAs: 'buffer' },
    (_r, body, done) => done(null, body),
  );

  if (metrics) {
    app.addHook('onRequest', async (request, reply) => {
      reply.raw.once('close', metrics.begin(routeOf(request.routeOptions.url)));
    });
    app.addHook('onSend', async (request, _reply, payload) => {
      if (Buffer.isBuffer(payload)) metrics.sent(routeOf(request.routeOptions.url), payload.length);
      return payload;
    });
    app.get('/metrics', async (_request, reply) =>
      reply
        .header('cache-control', 'no-store')
        .type(metrics.contentType)
        .send(await metrics.text()),
    );
  }
  // 200 in both cases: who is degraded is not dead, and should not be killed for it.
  app.get('/healthz', async (_request, reply) => {
    reply.header('cache-control', 'no-store');
    try {
      await source.listTags();
      return { status: 'ok' };
    } catch (error) {
      return { status: 'degraded', reason: asGridError(error, `cannot read ${source.name}`).message };
    }
  });
  app.get(TAGS_PATH, async (_request, reply) =>
    reply
      .header('cache-control', 'no-cache')
      .type('application/json')
      .send(encodeTags(await source.listTags())),
  );

  const object = (
    kind: string,
    type: string,
    read: (digest: string, signal: AbortSignal) => Promise<Buffer>,
  ) => {
    app.get<{ Params: { ab: string; digest: string } }>(`/v1/${kind}/:ab/:digest`, async (request, reply) => {
      const digest = checkedObject(request.params);
      const signal = signalOf(reply.raw, stopping);
      return reply
        .header('cache-control', IMMUTABLE)
        .type(type)
        .send(await read(digest, signal));
    });
  };
  object('manifests', 'application/json', (digest) => source.readManifest(digest));
  object('tables', 'application/zstd', async (digest) => compress(await source.readTable(digest)));
  object('chunks', 'application/zstd', async (digest, signal) => {
    let found: StoredChunk | undefined;
    const ref = { digest, plainBytes: CHUNK_BYTES_MAX };
    await source.readChunks([ref], { priority: 'demand', signal }, (_index, chunk) => {
      found = chunk;
    });
    return found!.encoding === 'zstd' ? asBuffer(found!.bytes) : compress(found!.bytes);
  });

  const hot = new HotChunks(source);
  app.post(BATCH_PATH, async (request, reply) => {
    if (!Buffer.isBuffer(request.body)) throw new GridError('bad-request', 'batch request without a body');
    const { refs, priority } = parseBatchRequest(request.body);
    reply.hijack();
    const startMs = performance.now();
    const sent = { chunks: 0, bytes: 0 };
    const failure = await sendBatch(
      reply.raw,
      source.name,
      hot,
      { refs, priority },
      signalOf(reply.raw, stopping),
      sent,
    );
    if (failure && failure.blame !== 'caller') onError(failure);
    if (!metrics) return;
    if (failure) metrics.failed(failure.code);
    metrics.sent('batch', sent.bytes);
    metrics.batch(priority, sent.chunks, (performance.now() - startMs) / 1000, hot.takeHits());
  });
}

/** The label of a route: one of few, whatever was asked for. */
function routeOf(pattern: string | undefined): ServedRoute {
  switch (pattern) {
    case TAGS_PATH:
      return 'tags';
    case BATCH_PATH:
      return 'batch';
    case '/v1/openings/:ab/:digest':
      return 'opening';
    case '/v1/manifests/:ab/:digest':
      return 'manifest';
    case '/v1/tables/:ab/:digest':
      return 'table';
    case '/v1/chunks/:ab/:digest':
      return 'chunk';
    case PROFILE_ROUTE:
      return 'profile';
    default:
      return 'other';
  }
}

const PROFILE_ROUTE = '/v1/profiles/:ab/:digest/:file';

function profileRoutes(app: FastifyInstance, source: ChunkSource, authenticated: WeakSet<Duplex>): void {
  type Params = { ab: string; digest: string; file: string };
  const parse = ({ ab, digest, file }: Params) => {
    const purpose = file.replace(/\.json$/, '');
    if (ab !== digest.slice(0, 2) || `${purpose}.json` !== file) {
      throw new GridError('bad-request', `'${file.slice(0, 80)}' is not a profile's name`);
    }
    profilePath(digest, purpose); // refuses what could be a path
    return { digest, purpose };
  };
  app.get<{ Params: Params }>(PROFILE_ROUTE, async (request, reply) => {
    const { digest, purpose } = parse(request.params);
    const bytes = await source.readProfile?.(digest, purpose);
    if (!bytes) {
      throw new GridError('not-found', `there is no profile '${purpose}' of ${digest.slice(0, 12)}`);
    }
    return reply.header('cache-control', 'no-cache').type('application/json').send(bytes);
  });
  app.post<{ Params: Params }>(
    PROFILE_ROUTE,
    {
      bodyLimit: PROFILE_BYTES_MAX,
      // Before the body is read.
      onRequest: async (request) => {
        if (!authenticated.has(request.raw.socket)) {
          throw new GridError(
            'denied',
            'profiles are recorded over ssh only: plain http does not say who comes',
          );
        }
        if (!source.recordProfile) throw new GridError('denied', `${source.name} keeps no profiles`);
      },
    },
    async (request) => {
      const { digest, purpose } = parse(request.params);
      if (!Buffer.isBuffer(request.body)) throw new GridError('bad-request', 'a recording without a body');
      await source.recordProfile!(digest, purpose, request.body);
      return { recorded: purpose };
    },
  );
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.isBuffer(bytes) ? bytes : Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** fastify's own refusals (body too large, wrong type, bad URL) are the asker's. */
function asRequestError(thrown: unknown): GridError {
  if (thrown instanceof GridError) return thrown;
  const status = thrown instanceof Error && 'statusCode' in thrown ? thrown.statusCode : undefined;
  const code = typeof status === 'number' && status >= 400 && status < 500 ? 'bad-request' : 'bug';
  return asGridError(thrown, 'request refused', code);
}

/** Aborted when the reader goes away before the response is complete, or the server stops. */
function signalOf(response: ServerResponse, stopping: AbortSignal): AbortSignal {
  const gone = new AbortController();
  const abort = () => gone.abort();
  if (stopping.aborted) abort();
  stopping.addEventListener('abort', abort);
  response.once('close', () => {
    stopping.removeEventListener('abort', abort);
    if (!response.writableFinished) abort();
  });
  return gone.signal;
}

/**
 * Streams a batch: its status and headers go out with the first chunk, so a failure before that has its own. Counts
 * in `sent`; resolves with the failure that it answered with.
 */
async function sendBatch(
  response: ServerResponse,
  name: string,
  source: Pick<ChunkSource, 'readChunks'>,
  { refs, priority }: { refs: readonly ChunkRef[]; priority: Priority },
  signal: AbortSignal,
  sent: { chunks: number; bytes: number },
): Promise<GridError | undefined> {
  response.on('error', () => {}); // 'close' says what matters
  const parts = new Set<Promise<void>>();
  const outcome: { failure?: GridError } = {};
  // What comes in one turn of the event loop goes out together, the last of it with the end: on a tunnel each write is
  // a packet of its own to seal and to open, and small chunks come in dozens. It is held in the socket, because not every
  // Node lets go of what a response holds before it ends that. (There is none yet where another answer comes first.)
  const { socket } = response;
  let heldBytes = 0;
  const letGo = () => {
    if (heldBytes === 0) return;
    heldBytes = 0;
    socket?.uncork();
  };
  const send = (index: number, chunk: StoredChunk) => {
    if (response.destroyed) return;
    if (!response.headersSent) {
      response.writeHead(200, { 'content-type': BATCH_TYPE, 'cache-control': 'no-store' });
    }
    if (heldBytes === 0) {
      socket?.cork();
      setImmediate(letGo);
    }
    const header = encodeChunkHeader(index, chunk);
    if (chunk.bytes.length <= JOINED_BYTES_MAX) response.write(Buffer.concat([header, chunk.bytes]));
    else {
      response.write(header);
      response.write(chunk.bytes);
    }
    sent.chunks++;
    sent.bytes += chunk.bytes.length;
    heldBytes += chunk.bytes.length;
    if (heldBytes >= HELD_BYTES_MAX) letGo();
  };
  let next = 0;
  while (next < refs.length && !outcome.failure && !signal.aborted) {
    const first = next;
    for (
      let bytes = 0;
      next < refs.length && (next === first || bytes + refs[next]!.plainBytes <= PART_BYTES);
    )
      bytes += refs[next++]!.plainBytes;
    const part = source
      .readChunks(refs.slice(first, next), { priority, signal }, (index, chunk) => {
        if (!outcome.failure) send(first + index, chunk);
      })
      .catch((error: unknown) => {
        outcome.failure ??= asGridError(error, `cannot read from ${name}`, 'bug');
      });
    const tracked = part.finally(() => parts.delete(tracked));
    parts.add(tracked);
    while (parts.size >= PARTS_MAX || (next === refs.length && parts.size > 0)) await Promise.race(parts);
    const out = response.socket ?? response;
    if (out.writableNeedDrain && !signal.aborted) await drained(out);
  }
  await Promise.all(parts);
  let { failure } = outcome;
  if (!failure && signal.aborted) failure = new GridError('closed', 'the batch was cut short');
  if (response.destroyed) return failure;
  if (!failure) response.end(encodeEnd(refs.length));
  else if (response.headersSent) response.end(encodeError(failure));
  else {
    response.writeHead(HTTP_STATUS[failure.code], { 'content-type': 'application/json' });
    response.end(JSON.stringify(errorBody(failure)));
  }
  return failure;
}

function drained(out: net.Socket | ServerResponse): Promise<void> {
  return new Promise((resolve) => {
    const go = () => {
      out.off('drain', go);
      out.off('close', go);
      resolve();
    };
    out.once('drain', go);
    out.once('close', go);
  });
}

/**
 * Serves on this process's stdin and stdout: what `gridvfs server --stdio` runs behind sshd. Whatever else would
 * print to stdout goes to stderr. Resolves when the far side has gone.
 */
export async function serveStdio(server: ProxyServer): Promise<void> {
  globalThis.console = new Console({ stdout: process.stderr, stderr: process.stderr });
  const stream = new StreamSocket(openInput(), openOutput());
  const ended = new Promise<void>((resolve) => stream.once('close', resolve));
  await server.attach(stream, { authenticated: true });
  await ended;
}

// process.stdout writes to pipes synchronously: a reader that stands still would stop every other request.
function openInput(): Readable {
  try {
    return new net.Socket({ fd: 0, readable: true, writable: false });
  } catch {
    return process.stdin; // a file or a terminal
  }
}

function openOutput(): Writable {
  try {
    return new net.Socket({ fd: 1, readable: false, writable: true });
  } catch {
    return process.stdout;
  }
}
