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
 *   DELETE /v1/calls/:id            cancels one of them
 *   …    /v1/vms                    see machine-routes.ts
 *   …    /v1/cache                  see cache-routes.ts
 *   GET  /metrics, /healthz         see metrics.ts
 */
import { chmodSync } from 'node:fs';
import fastify from 'fastify';
import type { ErrorCode } from '../core/errors.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { NAME_LENGTH_MAX } from '../core/limits.ts';
import type { CloneWork } from './clone-routes.ts';
import { serveClones } from './clone-routes.ts';
import { serveCache } from './cache-routes.ts';
import type { CacheWork } from './cache-routes.ts';
import type { Clones } from './clones.ts';
import { serveLongCalls } from './long-call.ts';
import { serveMachines, type MachineParts } from './machine-routes.ts';
import { serveMetrics } from './metrics.ts';
import type { ProxyMetrics, StatusForMetrics } from './metrics.ts';
import { body, mismatchText } from './schemas.ts';
import type { Mismatch } from './schemas.ts';

/** What the socket serves; the daemon's wiring gives it. */
export interface ControlParts extends MachineParts {
  readonly clones: Clones;
  readonly cache: CacheWork;
  status(): Promise<StatusForMetrics>;
  readonly metrics: ProxyMetrics;
  /** Base of a new clone. */
  resolve(reference: string): Promise<{ digest: string; manifest: { kind: string; sizeBytes: number } }>;
  readonly cloneWork: CloneWork;
  /** Such a call may have given a name another meaning. */
  namesMoved(): void;
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
  'no-permission': 403,
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

const MOVES_NAMES = /\/(?:commit|push|checkpoint|base-checkpoint|remove-checkpoint)$/;

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
    ajv: { customOptions: { removeAdditional: false, verbose: true } },
  });
  app.setErrorHandler((error, _request, reply) => {
    const { validation } = error as { validation?: readonly Mismatch[] };
    const known = validation
      ? new GridError('bad-request', mismatchText(validation, (error as Error).message))
      : asGridError(error, 'the proxy failed', 'bug');
    return reply.status(HTTP_STATUS[known.code]).send({ code: known.code, message: known.message });
  });
  app.setNotFoundHandler((request, reply) =>
    reply
      .status(404)
      .send({ code: 'not-found', message: `the control socket has no ${request.method} ${request.url}` }),
  );
  // Before the answer, for the next call; and after it, for one that took its time to say.
  app.addHook('onSend', async ({ url }, _reply, payload) => {
    if (MOVES_NAMES.test(url)) parts.namesMoved();
    return payload;
  });
  app.addHook('onResponse', async ({ url }) => {
    if (MOVES_NAMES.test(url)) parts.namesMoved();
  });
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
  serveLongCalls(app);
  serveClones(app, parts);
  serveMachines(app, parts);
  serveMetrics(app, parts.metrics, () => parts.status());
  serveCache(app, parts.cache, (reference) => parts.resolve(reference));
  await app.listen({ path: socketPath });
  chmodSync(socketPath, 0o600);
  return { close: () => app.close() };
}
