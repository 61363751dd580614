/**
 * The control socket of a host's proxy: HTTP and JSON on a unix socket that only its owner can open. The command
 * line and, later, a broker's connector use the same calls. Failures are `{ code, message }` with the code of
 * errors.ts; every body is checked against a schema before a handler sees it.
 *
 *   GET  /v1/status                 the proxy, its images and counters
 *   POST /v1/shutdown               { force } unmounts and ends; in-use while VMs run or files are open
 *   POST /v1/upgrade                starts a successor, answers { from, to } (pids), and makes room for it
 *   GET  /v1/clones                 POST CloneRequest            GET|DELETE /v1/clones/:id
 *   POST /v1/clones/:id/quota       { quotaBytes? } of its own layer; without: none
 *   POST /v1/clones/:id/commit      { reference, store?, labels? } a new version in the source, or a store on this host
 *   POST /v1/clones/:id/export      { file } the archive of src/image/archive.ts
 *   POST /v1/clones/import          { file, name?, image? }
 *   POST /v1/clones/:id/push        { reference? } the disk as it is now, also while a VM runs, to the source
 *   POST /v1/clones/pull            { reference, name? }
 *                                   (these five tell how far they are, and end when the caller goes: long-call.ts)
 *   GET  /v1/vms                    POST RunRequest              GET /v1/vms/:id
 *   GET  /v1/vms/:id/ready          ?timeoutMs= waits for the guest
 *   POST /v1/vms/:id/stop           { graceMs? }
 *   …    /v1/cache                  see cache-routes.ts
 *   GET  /metrics, /healthz         see metrics.ts
 */
import { chmodSync } from 'node:fs';
import fastify from 'fastify';
import type { FastifyInstance } from 'fastify';
import type { ErrorCode } from '../core/errors.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { CHUNK_BYTES_MIN, LABEL_LENGTH_MAX, MIB, NAME_LENGTH_MAX } from '../core/limits.ts';
import type { CloneWork } from './clone-routes.ts';
import { serveClones } from './clone-routes.ts';
import { serveCache } from './cache-routes.ts';
import type { CacheWork } from './cache-routes.ts';
import type { Clones } from './clones.ts';
import type { Machines, RunRequest } from './machines.ts';
import { serveMetrics } from './metrics.ts';
import type { ProxyMetrics, StatusForMetrics } from './metrics.ts';
import { body, name, params, reference } from './schemas.ts';

/** What the socket serves; the daemon's wiring gives it. */
export interface ControlParts {
  readonly clones: Clones;
  readonly machines: Machines;
  readonly cache: CacheWork;
  status(): Promise<StatusForMetrics>;
  readonly metrics: ProxyMetrics;
  /** Base of a new clone. */
  resolve(reference: string): Promise<{ digest: string; manifest: { kind: string; sizeBytes: number } }>;
  readonly cloneWork: CloneWork;
  /** Starts a successor; `handOver` has it take this proxy's place at once. Missing where there is no holder. */
  readonly prepareSuccessor?: () => Promise<{ readonly pid: number; handOver(): void }>;
  /** Resolves when the mount is gone. Throws in-use. */
  shutdown(force: boolean): Promise<void>;
  /** Called when the answer to a successful shutdown has been sent. */
  ended(): void;
}

const HTTP_STATUS = {
  'bad-request': 400,
  'not-found': 404,
  exists: 409,
  'in-use': 409,
  'read-only': 403,
  'no-space': 507,
  'local-io': 500,
  unsupported: 501,
  'bad-format': 422,
  'newer-format': 422,
  corrupt: 422,
  'wrong-base': 422,
  unreachable: 503,
  'tunnel-lost': 503,
  'host-key': 502,
  denied: 502,
  'origin-failed': 502,
  'vm-failed': 500,
  timeout: 504,
  closed: 503,
  bug: 500,
} as const satisfies Record<ErrorCode, number>;

const VCPUS_MAX = 256;
const MEMORY_BYTES_MAX = 16 * 1024 * 1024 * MIB;
const TIMEOUT_MS_MAX = 3_600_000;

/** Starts the server on `socketPath` (mode 0600). Returns what closes it. */
export async function serveControl(
  socketPath: string,
  parts: ControlParts,
): Promise<{ close(): Promise<void> }> {
  const app = fastify({
    logger: false,
    forceCloseConnections: true,
    // The router's own bound is 100 characters: shorter than a name may be.
    routerOptions: { maxParamLength: 2 * NAME_LENGTH_MAX },
    ajv: { customOptions: { removeAdditional: false } },
  });
  app.setErrorHandler((error, _request, reply) => {
    const validation = (error as { validation?: unknown }).validation !== undefined;
    const known = validation
      ? new GridError('bad-request', (error as Error).message)
      : asGridError(error, 'the proxy failed', 'bug');
    return reply.status(HTTP_STATUS[known.code]).send({ code: known.code, message: known.message });
  });
  app.setNotFoundHandler((request, reply) =>
    reply
      .status(404)
      .send({ code: 'not-found', message: `the control socket has no ${request.method} ${request.url}` }),
  );
  app.get('/v1/status', () => parts.status());
  app.post<{ Body: { force?: boolean } }>(
    '/v1/shutdown',
    { schema: { body: body({ force: { type: 'boolean' } }) } },
    async (request, reply) => {
      await parts.shutdown(request.body.force ?? false);
      // Whoever asked may be gone by now (Ctrl-C); the proxy ends all the same.
      if (reply.raw.destroyed) parts.ended();
      else reply.raw.once('close', () => parts.ended());
      return { ended: true };
    },
  );
  app.post('/v1/upgrade', async (_request, reply) => {
    if (!parts.prepareSuccessor) {
      throw new GridError('unsupported', 'this proxy runs without a holder: unmount it and mount it again');
    }
    const successor = await parts.prepareSuccessor();
    // Whoever asked may be gone by now; the successor has loaded and takes over all the same.
    if (reply.raw.destroyed) successor.handOver();
    else reply.raw.once('close', () => successor.handOver());
    return { from: process.pid, to: successor.pid };
  });
  serveClones(app, parts);
  vmRoutes(app, parts.machines);
  serveMetrics(app, parts.metrics, () => parts.status());
  serveCache(app, parts.cache, (reference) => parts.resolve(reference));
  await app.listen({ path: socketPath });
  chmodSync(socketPath, 0o600);
  return { close: () => app.close() };
}

function vmRoutes(app: FastifyInstance, machines: Machines): void {
  app.get('/v1/vms', async () => machines.list());
  app.post<{ Body: RunRequest }>(
    '/v1/vms',
    {
      schema: {
        body: body({
          image: reference,
          clone: name,
          name,
          memoryBytes: { type: 'integer', minimum: CHUNK_BYTES_MIN, maximum: MEMORY_BYTES_MAX },
          vcpus: { type: 'integer', minimum: 1, maximum: VCPUS_MAX },
          network: { enum: ['user', 'none'] },
          commandLine: { type: 'string', maxLength: LABEL_LENGTH_MAX },
          readyText: { type: 'string', minLength: 1, maxLength: LABEL_LENGTH_MAX },
        }),
      },
    },
    (request) => machines.run(request.body),
  );
  app.get<{ Params: { id: string } }>('/v1/vms/:id', { schema: { params } }, async (request) =>
    machines.status(request.params.id),
  );
  app.get<{ Params: { id: string }; Querystring: { timeoutMs: number } }>(
    '/v1/vms/:id/ready',
    {
      schema: {
        params,
        querystring: {
          type: 'object',
          properties: { timeoutMs: { type: 'integer', minimum: 1, maximum: TIMEOUT_MS_MAX } },
          required: ['timeoutMs'],
        },
      },
    },
    (request) => machines.ready(request.params.id, request.query.timeoutMs),
  );
  app.post<{ Params: { id: string }; Body: { graceMs?: number } }>(
    '/v1/vms/:id/stop',
    { schema: { params, body: body({ graceMs: { type: 'integer', minimum: 0, maximum: TIMEOUT_MS_MAX } }) } },
    async (request) => {
      await machines.stop(request.params.id, request.body.graceMs);
      return { stopped: request.params.id };
    },
  );
}
