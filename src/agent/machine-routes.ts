/**
 * The control socket's calls about VMs (the others: control.ts).
 *
 *   GET  /v1/vms                    also suspended ones, and those that failed lately
 *   POST /v1/vms                    RunRequest
 *   GET  /v1/vms/:id
 *   GET  /v1/vms/:id/ready          ?timeoutMs= waits for the guest
 *   POST /v1/vms/:id/stop           { graceMs? } a suspended one is thrown away
 *   POST /v1/vms/:id/suspend        {}
 *   POST /v1/vms/:id/resume         {}
 *   POST /v1/vms/:id/checkpoint     { reference } a version in the store behind the proxy
 *   POST /v1/vms/resume             { checkpoint, name? } a VM that goes on from a checkpoint in the store
 */
import type { FastifyInstance } from 'fastify';
import { CHUNK_BYTES_MIN, LABEL_LENGTH_MAX, MIB } from '../core/limits.ts';
import type { Checkpoints } from './checkpoints.ts';
import type { Forks } from './forks.ts';
import type { Machines } from './machines.ts';
import { body, name, params, reference } from './schemas.ts';
import type { RunRequest } from './vm-record.ts';

const VCPUS_MAX = 256;
const MEMORY_BYTES_MAX = 16 * 1024 * 1024 * MIB;
const TIMEOUT_MS_MAX = 3_600_000;

interface Id {
  Params: { id: string };
}

/** What runs VMs. */
export interface MachineParts {
  readonly machines: Machines;
  readonly checkpoints: Checkpoints;
  readonly forks: Forks;
}

export function serveMachines(app: FastifyInstance, { machines, checkpoints, forks }: MachineParts): void {
  app.get('/v1/vms', async () => [...machines.list(), ...checkpoints.list()]);
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
  app.post<{ Body: { checkpoint: string; name?: string } }>(
    '/v1/vms/resume',
    { schema: { body: body({ checkpoint: reference, name }, ['checkpoint']) } },
    (request) => forks.run(request.body.checkpoint, request.body.name),
  );
  app.get<Id>('/v1/vms/:id', { schema: { params } }, async ({ params: { id } }) =>
    checkpoints.has(id) ? checkpoints.status(id) : machines.status(id),
  );
  app.get<Id & { Querystring: { timeoutMs: number } }>(
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
  app.post<Id & { Body: { graceMs?: number } }>(
    '/v1/vms/:id/stop',
    { schema: { params, body: body({ graceMs: { type: 'integer', minimum: 0, maximum: TIMEOUT_MS_MAX } }) } },
    async ({ params: { id }, body: { graceMs } }) => {
      if (checkpoints.has(id)) await checkpoints.discard(id);
      else await machines.stop(id, graceMs);
      return { stopped: id };
    },
  );
  app.post<Id>('/v1/vms/:id/suspend', { schema: { params, body: body({}) } }, (request) =>
    checkpoints.suspend(request.params.id),
  );
  app.post<Id>('/v1/vms/:id/resume', { schema: { params, body: body({}) } }, (request) =>
    checkpoints.resume(request.params.id),
  );
  app.post<Id & { Body: { reference: string } }>(
    '/v1/vms/:id/checkpoint',
    { schema: { params, body: body({ reference }, ['reference']) } },
    (request) => checkpoints.publish(request.params.id, request.body.reference),
  );
}
