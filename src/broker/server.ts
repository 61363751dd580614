/**
 * The broker's API: HTTP and JSON below /v1 on a unix socket and on TCP. Failures are Problem+JSON (RFC 9457) with
 * our `code`; every body is checked against a schema (schemas.ts) before a handler sees it, and the OpenAPI document
 * at /v1/openapi.json is made of the same schemas.
 *
 * Every call but the document's carries `Authorization: Bearer gvt_…`; each route names the roles that may call it.
 * Plain http is for the loopback address; other addresses want TLS.
 */
import { chmodSync } from 'node:fs';
import rateLimit from '@fastify/rate-limit';
import swagger from '@fastify/swagger';
import fastify from 'fastify';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { ErrorCode } from '../core/errors.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { MIB, NAME_LENGTH_MAX } from '../core/limits.ts';
import type { Principal, Role } from './access.ts';
import { agentRoutes } from './agent-routes.ts';
import type { Broker } from './broker.ts';
import { pageRoutes } from './page-routes.ts';
import { serveTrunks } from './segments.ts';
import { userRoutes } from './user-routes.ts';
import { volumeRoutes } from './volume-routes.ts';
import { workspaceRoutes } from './workspace-routes.ts';

declare module 'fastify' {
  interface FastifyRequest {
    principal: Principal | null;
  }
  interface FastifyContextConfig {
    /** Who may call it; nobody when left out. */
    roles?: readonly Role[];
    /** For everybody, without a token. */
    open?: boolean;
  }
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
  denied: 403,
  'origin-failed': 502,
  'vm-failed': 500,
  timeout: 504,
  closed: 409,
  bug: 500,
} as const satisfies Record<ErrorCode, number>;

/** A report names every VM, warm image and version of a host. */
const BODY_BYTES_MAX = 32 * MIB;
const USER_BODY_BYTES_MAX = MIB;

export interface ServeOptions {
  readonly socketPath?: string;
  readonly listen?: { readonly host: string; readonly port: number };
  readonly tls?: { readonly key: Buffer; readonly cert: Buffer };
  /** Calls a minute that one token, or one address without a token, may make. */
  readonly callsPerMinute?: number;
}

export const CALLS_PER_MINUTE = 60_000;

export interface BrokerServer {
  /** Of the TCP listener. */
  readonly port?: number;
  close(): Promise<void>;
}

/** The routes without a listener: what the tests of the document look at, too. */
export async function createApi(broker: Broker, options: ServeOptions = {}): Promise<FastifyInstance> {
  const app = fastify({
    logger: false,
    forceCloseConnections: true,
    bodyLimit: BODY_BYTES_MAX,
    // Addresses that no route could have: they fail before there is a route whose handler would answer.
    frameworkErrors(error, _request, reply) {
      answerProblem(error, reply);
    },
    routerOptions: { maxParamLength: 2 * NAME_LENGTH_MAX },
    ajv: { customOptions: { removeAdditional: false, coerceTypes: false, allowUnionTypes: true } },
    ...(options.tls === undefined ? {} : { https: options.tls }),
  }) as FastifyInstance;
  app.setErrorHandler((error, _request, reply) => answerProblem(error, reply));
  app.setNotFoundHandler(async (request) => {
    throw new GridError('not-found', `the broker has no ${request.method} ${request.url.slice(0, 200)}`);
  });
  app.decorateRequest('principal', null);
  app.addHook('onRequest', async (request) => authorize(broker, request));
  await app.register(swagger, {
    openapi: {
      openapi: '3.1.0',
      info: { title: 'gridvfs broker', version: '1' },
      components: { securitySchemes: { token: { type: 'http', scheme: 'bearer' } } },
      security: [{ token: [] }],
    },
  });
  await app.register(rateLimit, {
    // After authorization, which knows the caller; a flood of wrong tokens is counted by address below.
    hook: 'preHandler',
    max: options.callsPerMinute ?? CALLS_PER_MINUTE,
    timeWindow: 60_000,
    keyGenerator: (request) => request.principal?.user ?? request.ip,
    errorResponseBuilder: (_request, context) =>
      Object.assign(new GridError('in-use', `too many calls; try again in ${context.after}`), {
        statusCode: 429,
      }),
  });
  await app.register(
    async (users) => {
      userRoutes(users, broker);
      workspaceRoutes(users, broker);
      volumeRoutes(users, broker);
    },
    { bodyLimit: USER_BODY_BYTES_MAX } as object,
  );
  const trunks = serveTrunks(app.server, broker);
  const streams = broker.streams.serve(app.server);
  app.addHook('preClose', async () => {
    trunks.close();
    streams.close();
  });
  await app.register(async (agents) => agentRoutes(agents, broker));
  await app.register(async (page) => pageRoutes(page, broker));
  app.get('/v1/openapi.json', { config: { open: true }, schema: { hide: true } }, async () => app.swagger());
  app.get('/healthz', { config: { open: true }, schema: { hide: true } }, async () => {
    await broker.db.all('SELECT 1 AS one');
    return { ok: true };
  });
  await app.ready();
  return app;
}

/** Listens at both; each has its own instance of the same routes. */
export async function serveBroker(broker: Broker, options: ServeOptions): Promise<BrokerServer> {
  await using stack = new AsyncDisposableStack();
  let port: number | undefined;
  if (options.socketPath !== undefined) {
    const { tls: _, ...plain } = options;
    const app = await createApi(broker, plain);
    stack.defer(() => app.close());
    await app.listen({ path: options.socketPath });
    chmodSync(options.socketPath, 0o666); // who may do what is the token's matter
  }
  if (options.listen !== undefined) {
    const app = await createApi(broker, options);
    stack.defer(() => app.close());
    await app.listen({ host: options.listen.host, port: options.listen.port });
    const address = app.server.address();
    if (typeof address === 'object' && address !== null) port = address.port;
  }
  const kept = stack.move();
  return { ...(port === undefined ? {} : { port }), close: () => kept.disposeAsync() };
}

function answerProblem(error: unknown, reply: FastifyReply): FastifyReply {
  const { known, status } = describe(error);
  return reply
    .status(status)
    .type('application/problem+json')
    .send({ type: 'about:blank', title: known.code, status, detail: known.message, code: known.code });
}

function describe(error: unknown): { known: GridError; status: number } {
  const raw = error as { validation?: unknown; statusCode?: number; message?: string };
  if (raw.validation !== undefined) {
    return {
      known: new GridError('bad-request', raw.message ?? 'the request does not fit its schema'),
      status: 400,
    };
  }
  if (error instanceof GridError) {
    return { known: error, status: raw.statusCode ?? HTTP_STATUS[error.code] };
  }
  // Fastify's own: a body that is no JSON, too large, of a type that nobody reads.
  if (raw.statusCode !== undefined && raw.statusCode >= 400 && raw.statusCode < 500) {
    return {
      known: new GridError('bad-request', raw.message ?? 'the request is malformed'),
      status: raw.statusCode,
    };
  }
  return { known: asGridError(error, 'the broker failed', 'bug'), status: 500 };
}

async function authorize(broker: Broker, request: FastifyRequest): Promise<void> {
  if (request.is404) return;
  const { roles = [], open = false } = request.routeOptions.config;
  if (open) return;
  const match = /^Bearer (\S{1,200})$/.exec(request.headers.authorization ?? '');
  if (!match) {
    throw Object.assign(new GridError('denied', 'a token is needed: Authorization: Bearer gvt_…'), {
      statusCode: 401,
    });
  }
  const principal = await broker.access.authenticate(match[1]!).catch((error: unknown) => {
    throw error instanceof GridError ? Object.assign(error, { statusCode: 401 }) : error;
  });
  if (!roles.includes(principal.role)) {
    throw new GridError(
      'denied',
      `a token of role '${principal.role}' cannot do this; it takes ${roles.join(' or ')}`,
    );
  }
  request.principal = principal;
}

/** The caller, on routes that name roles. */
export function principalOf(request: FastifyRequest): Principal {
  if (!request.principal) throw new GridError('bug', 'a route without roles asks who called it');
  return request.principal;
}
