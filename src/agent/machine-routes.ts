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
 *   POST /v1/vms/:id/attach         AttachRequest
 *   POST /v1/vms/:id/detach         { name, timeoutMs? }
 *   POST /v1/vms/:id/limits         IoLimits; what is left out has no bound
 *   POST /v1/vms/:id/checkpoint     { reference, base? } a version in the store behind the proxy; `base`: of its image
 *   POST /v1/vms/resume             { checkpoint, name?, same? } a VM that goes on from a checkpoint in the store
 *   POST /v1/may-checkpoint         { checkpoint } fails with what would keep it from being made
 *   POST /v1/rehearse               { checkpoint } → Rehearsed: resumed once, so that its working set is known
 *   POST /v1/remove-checkpoint      { checkpoint } → { removed } takes its names away at the store
 *   POST /v1/base-checkpoint        BaseRequest → { checkpoint } from which such a VM need not boot
 */
import type { FastifyInstance } from 'fastify';
import { CHUNK_BYTES_MIN, KIB, LABEL_LENGTH_MAX, MIB } from '../core/limits.ts';
import { PUBLIC_KEY_PATTERN } from '../core/machine.ts';
import type { IoLimits } from '../core/machine.ts';
import type { BaseRequest } from './base-checkpoints.ts';
import type { Checkpoints } from './checkpoints.ts';
import type { Forks } from './forks.ts';
import type { Machines } from './machines.ts';
import { rehearse } from './rehearsal.ts';
import { body, name, params, reference } from './schemas.ts';
import type { RunRequest, VmStatus } from './vm-record.ts';
import type { Spending, VmSpending } from './vm-spending.ts';
import { DETACH_TIMEOUT_MS } from './vm-volumes.ts';
import type { AttachRequest, Volumes } from './vm-volumes.ts';

const VCPUS_MAX = 256;
const MEMORY_BYTES_MAX = 16 * 1024 * 1024 * MIB;
const TIMEOUT_MS_MAX = 3_600_000;
const memoryBytes = { type: 'integer', minimum: CHUNK_BYTES_MIN, maximum: MEMORY_BYTES_MAX };
const vcpus = { type: 'integer', minimum: 1, maximum: VCPUS_MAX };
const SSH_KEYS_MAX = 64;
const SSH_KEY_LENGTH_MAX = 16 * KIB;
/** A host's name in the sense of RFC 1123, with its dots. */
const hostName = {
  type: 'string',
  pattern: '^[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?$',
  maxLength: 253,
  description: 'a host name: letters, digits, dots and hyphens',
};
const positive = { type: 'integer', minimum: 1, maximum: Number.MAX_SAFE_INTEGER };
const limits = body({ bytesPerSecond: positive, operationsPerSecond: positive });

interface Id {
  Params: { id: string };
}

/** What runs VMs. */
export interface MachineParts {
  readonly machines: Machines;
  readonly checkpoints: Checkpoints;
  readonly forks: Forks;
  readonly volumes: Volumes;
  readonly spending: Spending;
  /** See checkpoint-removal.ts. */
  readonly removeCheckpoint: (reference: string) => Promise<{ readonly removed: readonly string[] }>;
}

export function serveMachines(
  app: FastifyInstance,
  { machines, checkpoints, forks, volumes, spending, removeCheckpoint }: MachineParts,
): void {
  const withSpending = async (vm: VmStatus): Promise<VmStatus & { readonly spent?: VmSpending }> => {
    const spent = (await spending.all()).get(vm.id);
    return spent === undefined ? vm : { ...vm, spent };
  };
  app.get('/v1/vms', () => Promise.all([...machines.list(), ...checkpoints.list()].map(withSpending)));
  app.post<{ Body: RunRequest }>(
    '/v1/vms',
    {
      schema: {
        body: body({
          image: reference,
          clone: name,
          name,
          vmm: { enum: ['qemu', 'container'] },
          memoryBytes,
          vcpus,
          network: {
            description: "'user', 'none' or a bridge, whose name has at most 15 characters",
            anyOf: [
              { enum: ['user', 'none'] },
              body({ bridge: { type: 'string', minLength: 1, maxLength: 15 } }, ['bridge']),
            ],
          },
          limits,
          sshKeys: {
            type: 'array',
            maxItems: SSH_KEYS_MAX,
            items: { type: 'string', pattern: PUBLIC_KEY_PATTERN, maxLength: SSH_KEY_LENGTH_MAX },
          },
          hostName,
          userData: { type: 'string', maxLength: 256 * KIB },
          commandLine: { type: 'string', maxLength: LABEL_LENGTH_MAX },
          readyText: { type: 'string', minLength: 1, maxLength: LABEL_LENGTH_MAX },
        }),
      },
    },
    (request) => machines.run(request.body),
  );
  app.post<{ Body: { checkpoint: string; name?: string; same?: boolean } }>(
    '/v1/vms/resume',
    { schema: { body: body({ checkpoint: reference, name, same: { type: 'boolean' } }, ['checkpoint']) } },
    ({ body: { checkpoint, name: vm, same } }) => forks.run(checkpoint, vm, same),
  );
  app.post<{ Body: BaseRequest }>(
    '/v1/base-checkpoint',
    { schema: { body: body({ image: reference, memoryBytes, vcpus }, ['image']) } },
    async (request) => ({ checkpoint: await forks.findBase(request.body) }),
  );
  app.post<{ Body: { checkpoint: string } }>(
    '/v1/may-checkpoint',
    { schema: { body: body({ checkpoint: reference }, ['checkpoint']) } },
    async (request) => {
      await checkpoints.check(request.body.checkpoint);
      return {};
    },
  );
  app.post<{ Body: { checkpoint: string } }>(
    '/v1/rehearse',
    { schema: { body: body({ checkpoint: reference }, ['checkpoint']) } },
    (request) => rehearse({ forks, machines }, request.body.checkpoint),
  );
  app.post<{ Body: { checkpoint: string } }>(
    '/v1/remove-checkpoint',
    { schema: { body: body({ checkpoint: reference }, ['checkpoint']) } },
    (request) => removeCheckpoint(request.body.checkpoint),
  );
  app.get<Id>('/v1/vms/:id', { schema: { params } }, async ({ params: { id } }) =>
    withSpending(checkpoints.has(id) ? checkpoints.status(id) : machines.status(id)),
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
  app.post<Id & { Body: AttachRequest }>(
    '/v1/vms/:id/attach',
    {
      schema: {
        params,
        body: body({ image: reference, clone: name, name, readOnly: { type: 'boolean' } }),
      },
    },
    (request) => volumes.attach(request.params.id, request.body),
  );
  app.post<Id & { Body: { name: string; timeoutMs?: number } }>(
    '/v1/vms/:id/detach',
    {
      schema: {
        params,
        body: body({ name, timeoutMs: { type: 'integer', minimum: 1, maximum: TIMEOUT_MS_MAX } }, ['name']),
      },
    },
    ({ params: { id }, body: { name: volume, timeoutMs = DETACH_TIMEOUT_MS } }) =>
      volumes.detach(id, volume, timeoutMs),
  );
  app.post<Id & { Body: IoLimits }>('/v1/vms/:id/limits', { schema: { params, body: limits } }, (request) =>
    machines.setLimits(request.params.id, request.body),
  );
  app.post<Id & { Body: { reference: string; base?: boolean } }>(
    '/v1/vms/:id/checkpoint',
    { schema: { params, body: body({ reference, base: { type: 'boolean' } }, ['reference']) } },
    ({ params: { id }, body: { reference: to, base } }) => checkpoints.publish(id, to, base),
  );
}
