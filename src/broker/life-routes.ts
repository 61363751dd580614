/** What users call to do something to a VM that is there. All but the stop answer with a job. */
import type { FastifyInstance } from 'fastify';
import type { Broker } from './broker.ts';
import type { LifeOptions, LifeVerb } from './lives.ts';
import * as schemas from './schemas.ts';
import { principalOf } from './server.ts';

const config = { roles: ['user', 'operator'] as const };
const failures = { '4xx': schemas.problem, '5xx': schemas.problem };
const STOP_GRACE_MS = 15_000;

interface Call<Body> {
  Params: { id: string };
  Body: Body;
  Headers: { 'idempotency-key'?: string };
}

const BODIES = {
  suspend: schemas.nothing,
  checkpoint: schemas.nothing,
  resume: schemas.placeRequest,
  move: schemas.placeRequest,
} as const satisfies Record<LifeVerb, object>;

export function lifeRoutes(app: FastifyInstance, broker: Broker): void {
  app.post<{ Params: { id: string }; Body: { graceMs?: number } }>(
    '/v1/vms/:id/stop',
    {
      config,
      schema: {
        params: schemas.nameParams,
        body: schemas.stopRequest,
        response: { 200: schemas.vm, ...failures },
      },
    },
    async (request) => {
      const principal = principalOf(request);
      const { graceMs = STOP_GRACE_MS } = request.body;
      return broker.requests.vm(principal, await broker.lives.stop(principal, request.params.id, graceMs));
    },
  );
  app.get<{ Params: { id: string } }>(
    '/v1/vms/:id/console',
    {
      config,
      schema: {
        description:
          'The end of what its guest said on its first serial console, and what it says from then on.',
        params: schemas.nameParams,
        response: failures,
      },
    },
    async (request, reply) => {
      const { raw } = reply;
      const far = await broker.streams.openConsole(principalOf(request), request.params.id, raw);
      reply.hijack();
      raw.writeHead(200, {
        'content-type': 'application/octet-stream',
        'cache-control': 'no-store',
        'x-content-type-options': 'nosniff',
      });
      raw.flushHeaders();
      far.pipe(raw);
      far.once('close', () => raw.end());
      raw.once('close', () => far.destroy());
      return reply;
    },
  );
  app.post<{ Params: { id: string }; Body: { text: string } }>(
    '/v1/vms/:id/console',
    {
      config,
      schema: {
        description: 'Types to the console that one has open.',
        params: schemas.nameParams,
        body: schemas.object({ text: { type: 'string', maxLength: 4096 } }, ['text']),
        response: { 200: schemas.nothing, ...failures },
      },
    },
    async (request) => {
      await broker.streams.type(principalOf(request), request.params.id, request.body.text);
      return {};
    },
  );
  const accepted = (body: object) => ({
    config,
    schema: {
      headers: schemas.keyHeaders,
      params: schemas.nameParams,
      body,
      response: { 202: schemas.job, ...failures },
    },
  });
  for (const verb of Object.keys(BODIES) as LifeVerb[]) {
    app.post<Call<LifeOptions>>(`/v1/vms/:id/${verb}`, accepted(BODIES[verb]), async (request, reply) => {
      const principal = principalOf(request);
      const { params, body, headers } = request;
      const job = await broker.lives.act(principal, params.id, verb, body, headers['idempotency-key']);
      return reply
        .status(202)
        .header('location', `/v1/jobs/${job}`)
        .send(await broker.requests.job(principal, job));
    });
  }
  app.post<Call<{ reference: string; labels?: Record<string, string> }>>(
    '/v1/vms/:id/commit',
    accepted(schemas.commitRequest),
    async (request, reply) => {
      const principal = principalOf(request);
      const { params, body, headers } = request;
      const job = await broker.lives.commit(principal, params.id, body, headers['idempotency-key']);
      return reply
        .status(202)
        .header('location', `/v1/jobs/${job}`)
        .send(await broker.requests.job(principal, job));
    },
  );
}
