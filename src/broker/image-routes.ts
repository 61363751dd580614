/** What users call about images, and operators about what hosts hold of them. */
import type { FastifyInstance } from 'fastify';
import type { Broker } from './broker.ts';
import { changeImage, listImages } from './images.ts';
import type { ImageChange } from './images.ts';
import * as schemas from './schemas.ts';
import { principalOf } from './server.ts';
import type { ScheduleRequest } from './warming.ts';

const users = { roles: ['user', 'operator'] as const };
const operators = { roles: ['operator'] as const };

export function imageRoutes(app: FastifyInstance, broker: Broker): void {
  const failures = { '4xx': schemas.problem, '5xx': schemas.problem };

  app.get(
    '/v1/images',
    { config: users, schema: { response: { 200: schemas.list(schemas.image), ...failures } } },
    (request) => listImages(broker.db, principalOf(request)),
  );
  app.patch<{ Params: { id: string }; Body: ImageChange }>(
    '/v1/images/:id',
    { config: users, schema: { params: schemas.nameParams, body: schemas.imageChange, response: failures } },
    async (request) => {
      await changeImage(broker.db, principalOf(request), request.params.id, request.body);
      return { changed: request.params.id };
    },
  );
  app.post<{
    Params: { id: string };
    Body: { version: string; hosts?: number };
    Headers: { 'idempotency-key'?: string };
  }>(
    '/v1/images/:id/warm',
    {
      config: operators,
      schema: {
        description: 'Hosts fetch a version ahead of whoever asks for it.',
        headers: schemas.keyHeaders,
        params: schemas.nameParams,
        body: schemas.warmRequest,
        response: { 202: schemas.job, ...failures },
      },
    },
    async (request, reply) => {
      const principal = principalOf(request);
      const { version, hosts = 1 } = request.body;
      const key = request.headers['idempotency-key'];
      const job = await broker.warming.warm(principal, request.params.id, version, hosts, key);
      return reply
        .status(202)
        .header('location', `/v1/jobs/${job}`)
        .send(await broker.requests.job(principal, job));
    },
  );
  app.get(
    '/v1/schedules',
    { config: operators, schema: { response: { 200: schemas.list(schemas.schedule), ...failures } } },
    () => broker.warming.schedules(),
  );
  app.post<{ Body: ScheduleRequest }>(
    '/v1/schedules',
    {
      config: operators,
      schema: { body: schemas.scheduleRequest, response: { 201: schemas.schedule, ...failures } },
    },
    async (request, reply) =>
      reply.status(201).send(await broker.warming.addSchedule(principalOf(request), request.body)),
  );
  app.delete<{ Params: { id: string } }>(
    '/v1/schedules/:id',
    { config: operators, schema: { params: schemas.nameParams, response: failures } },
    async (request) => {
      await broker.warming.removeSchedule(request.params.id);
      return { removed: request.params.id };
    },
  );
}
