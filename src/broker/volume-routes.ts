/** Data volumes: what users call (volume-catalog.ts). `:id` is a name, an id, or OWNER/NAME with its slash encoded. */
import type { FastifyInstance } from 'fastify';
import { IMAGE_BYTES_MAX, MIB, NAME_LENGTH_MAX } from '../core/limits.ts';
import type { Broker } from './broker.ts';
import * as schemas from './schemas.ts';
import { principalOf } from './server.ts';
import type { VolumeRequest } from './volume-catalog.ts';

const config = { roles: ['user', 'operator'] as const };
const failures = { '4xx': schemas.problem, '5xx': schemas.problem };
const volume = { type: 'object', additionalProperties: true };
const sizeBytes = { type: 'integer', minimum: MIB, maximum: IMAGE_BYTES_MAX, multipleOf: 512 };
const version = { type: 'integer', minimum: 1, maximum: Number.MAX_SAFE_INTEGER };
const params = {
  type: 'object',
  properties: { id: schemas.volumeName },
  required: ['id'],
};
const users = schemas.object({ users: schemas.list(schemas.name, 1000) }, ['users']);

interface Call<Body> {
  Params: { id: string };
  Body: Body;
  Headers: { 'idempotency-key'?: string };
}

export function volumeRoutes(app: FastifyInstance, broker: Broker): void {
  const { volumes } = broker;
  const answers = (more: object) => ({
    config,
    schema: { ...more, response: { 200: volume, ...failures } },
  });
  app.post<{ Body: VolumeRequest }>(
    '/v1/volumes',
    {
      config,
      schema: {
        body: schemas.object(
          {
            name: { ...schemas.name, maxLength: VOLUME_NAME_LENGTH_MAX },
            sizeBytes,
            image: { type: 'string', maxLength: 2 * NAME_LENGTH_MAX },
            from: schemas.volumeName,
            version,
          },
          ['name'],
        ),
        response: { 201: volume, ...failures },
      },
    },
    async (request, reply) =>
      reply.status(201).send(await volumes.create(principalOf(request), request.body)),
  );
  app.get(
    '/v1/volumes',
    { config, schema: { response: { 200: schemas.list(volume), ...failures } } },
    (request) => volumes.list(principalOf(request)),
  );
  app.get<{ Params: { id: string } }>('/v1/volumes/:id', answers({ params }), (request) =>
    volumes.get(principalOf(request), request.params.id),
  );
  app.delete<{ Params: { id: string } }>('/v1/volumes/:id', answers({ params }), async (request) => {
    await volumes.remove(principalOf(request), request.params.id);
    return { removed: request.params.id };
  });
  app.post<Call<{ sizeBytes: number }>>(
    '/v1/volumes/:id/grow',
    answers({ params, body: schemas.object({ sizeBytes }, ['sizeBytes']) }),
    (request) => volumes.grow(principalOf(request), request.params.id, request.body.sizeBytes),
  );
  app.post<Call<{ version?: number }>>(
    '/v1/volumes/:id/revert',
    answers({ params, body: schemas.object({ version }) }),
    (request) => volumes.revert(principalOf(request), request.params.id, request.body.version),
  );
  for (const verb of ['share', 'unshare'] as const) {
    app.post<Call<{ users: string[] }>>(
      `/v1/volumes/:id/${verb}`,
      answers({ params, body: users }),
      (request) =>
        volumes.share(principalOf(request), request.params.id, request.body.users, verb === 'share'),
    );
  }

  const accepted = (body: object) => ({
    config,
    schema: { headers: schemas.keyHeaders, params, body, response: { 202: schemas.job, ...failures } },
  });
  app.post<Call<object>>('/v1/volumes/:id/snapshot', accepted(schemas.nothing), async (request, reply) => {
    const principal = principalOf(request);
    const job = await volumes.snapshot(principal, request.params.id, request.headers['idempotency-key']);
    return reply.status(202).send(await broker.requests.job(principal, job));
  });
  app.post<Call<{ vm: string; readOnly?: boolean }>>(
    '/v1/volumes/:id/attach',
    accepted(schemas.object({ vm: schemas.name, readOnly: { type: 'boolean' } }, ['vm'])),
    async (request, reply) => {
      const principal = principalOf(request);
      const { params: of, body, headers } = request;
      const job = await volumes.attach(principal, of.id, body, headers['idempotency-key']);
      return reply.status(202).send(await broker.requests.job(principal, job));
    },
  );
  app.post<Call<{ vm: string }>>(
    '/v1/volumes/:id/detach',
    accepted(schemas.object({ vm: schemas.name }, ['vm'])),
    async (request, reply) => {
      const principal = principalOf(request);
      const { params: of, body, headers } = request;
      const job = await volumes.detach(principal, of.id, body.vm, headers['idempotency-key']);
      return reply.status(202).send(await broker.requests.job(principal, job));
    },
  );
}

/** The guest sees it as the serial number of a virtio disk, which has 20 bytes. */
const VOLUME_NAME_LENGTH_MAX = 20;
