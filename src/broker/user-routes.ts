/** What users and operators call. */
import type { FastifyInstance } from 'fastify';
import type { Role } from './access.ts';
import type { Broker } from './broker.ts';
import { lifeRoutes } from './life-routes.ts';
import { imageRoutes } from './image-routes.ts';
import type { VmRequest } from './requests.ts';
import { answerQuery, querySchema } from './query/index.ts';
import type { Query } from './query/index.ts';
import * as schemas from './schemas.ts';
import { principalOf } from './server.ts';
import { listNetworks, removeLink, setLink } from './topology.ts';
import type { LinkRequest } from './topology.ts';

const users = { roles: ['user', 'operator'] as const };
const operators = { roles: ['operator'] as const };

/** A stream sends something this often, so that whoever is between keeps it open. */
const EVENTS_EVERY_MS = 5_000;

export function userRoutes(app: FastifyInstance, broker: Broker): void {
  const failures = { '4xx': schemas.problem, '5xx': schemas.problem };

  app.get(
    '/v1/hosts',
    { config: users, schema: { response: { 200: schemas.list(schemas.host), ...failures } } },
    () => broker.hosts.list(),
  );
  app.get(
    '/v1/networks',
    { config: users, schema: { response: { 200: schemas.list(schemas.network), ...failures } } },
    () => listNetworks(broker.db),
  );
  app.put<{ Body: LinkRequest }>(
    '/v1/links',
    { config: operators, schema: { body: schemas.linkRequest, response: failures } },
    async (request) => {
      await setLink(broker.db, request.body);
      return { linked: [request.body.a, request.body.b] };
    },
  );
  app.delete<{ Params: { a: string; b: string } }>(
    '/v1/links/:a/:b',
    {
      config: operators,
      schema: {
        params: { type: 'object', properties: { a: schemas.name, b: schemas.name }, required: ['a', 'b'] },
        response: failures,
      },
    },
    async ({ params: { a, b } }) => {
      await removeLink(broker.db, a, b);
      return { unlinked: [a, b] };
    },
  );
  imageRoutes(app, broker);

  app.post<{ Body: VmRequest; Headers: { 'idempotency-key'?: string } }>(
    '/v1/vms',
    {
      config: users,
      schema: {
        headers: schemas.keyHeaders,
        body: schemas.vmRequest,
        response: { 202: schemas.job, ...failures },
      },
    },
    async (request, reply) => {
      const job = await broker.requests.submit(
        principalOf(request),
        request.body,
        request.headers['idempotency-key'],
      );
      return reply.status(202).header('location', `/v1/jobs/${job.id}`).send(job);
    },
  );
  app.post<{ Body: VmRequest }>(
    '/v1/vms/explain',
    {
      config: users,
      schema: { body: schemas.vmRequest, response: { 200: schemas.explanation, ...failures } },
    },
    (request) => broker.placement.explain({ user: principalOf(request).user, role: 'user' }, request.body),
  );
  app.get<{ Querystring: { all?: 'true' | 'false' } }>(
    '/v1/vms',
    {
      config: users,
      schema: {
        querystring: { type: 'object', properties: { all: { type: 'string', enum: ['true', 'false'] } } },
        response: { 200: schemas.list(schemas.vm), ...failures },
      },
    },
    (request) => broker.requests.list(principalOf(request), { all: request.query.all === 'true' }),
  );
  app.get<{ Params: { id: string } }>(
    '/v1/vms/:id',
    { config: users, schema: { params: schemas.nameParams, response: { 200: schemas.vm, ...failures } } },
    (request) => broker.requests.vm(principalOf(request), request.params.id),
  );
  lifeRoutes(app, broker);
  app.post<{ Body: Query }>(
    '/v1/query',
    { config: users, schema: { body: querySchema, response: { 200: schemas.queryAnswer, ...failures } } },
    (request) => answerQuery(broker.db, principalOf(request), request.body),
  );
  app.get<{ Params: { id: string } }>(
    '/v1/jobs/:id',
    { config: users, schema: { params: schemas.nameParams, response: { 200: schemas.job, ...failures } } },
    (request) => broker.requests.job(principalOf(request), request.params.id),
  );
  app.get<{ Params: { id: string } }>(
    '/v1/jobs/:id/events',
    {
      config: users,
      schema: {
        description: 'Server-sent events: the job, whenever it changed, until it has ended.',
        params: schemas.nameParams,
        response: failures,
      },
    },
    async (request, reply) => {
      const principal = principalOf(request);
      const { id } = request.params;
      const first = await broker.requests.job(principal, id); // a failure is still an answer, not a stream
      reply.hijack();
      const { raw } = reply;
      const gone = new AbortController();
      raw.once('close', () => gone.abort());
      raw.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
      let last = '';
      try {
        for (let job = first; ; job = await broker.requests.job(principal, id)) {
          const woken = broker.wait(`job:${id}`, EVENTS_EVERY_MS, gone.signal);
          const text = JSON.stringify(job);
          raw.write(text === last ? ': still here\n\n' : `data: ${text}\n\n`);
          last = text;
          if (job.state !== 'running' || gone.signal.aborted || broker.closed) break;
          await woken;
        }
      } finally {
        gone.abort();
        raw.end();
      }
    },
  );

  app.get(
    '/v1/tokens',
    { config: operators, schema: { response: { 200: schemas.list(schemas.token), ...failures } } },
    () => broker.access.list(),
  );
  app.post<{ Body: { user: string; role: Role } }>(
    '/v1/tokens',
    {
      config: operators,
      schema: {
        body: schemas.tokenRequest,
        response: {
          201: { type: 'object', properties: { token: { type: 'string' }, info: schemas.token } },
          ...failures,
        },
      },
    },
    async (request, reply) =>
      reply.status(201).send(await broker.access.create(request.body.user, request.body.role)),
  );
  app.delete<{ Params: { id: string } }>(
    '/v1/tokens/:id',
    { config: operators, schema: { params: schemas.nameParams, response: failures } },
    async (request) => {
      await broker.access.revoke(request.params.id);
      return { revoked: request.params.id };
    },
  );
}
