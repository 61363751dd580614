/** Workspaces, what was used, and what users may have: what users and operators call. */
import type { FastifyInstance } from 'fastify';
import type { Broker } from './broker.ts';
import { quotaOf, setQuota } from './quotas.ts';
import type { Quota } from './quotas.ts';
import * as schemas from './schemas.ts';
import { principalOf } from './server.ts';
import { USAGE_BY, usageOf } from './usage.ts';
import type { UsageBy } from './usage.ts';
import { LIFETIME_MS_MAX } from './workspaces.ts';
import type { WorkspaceRequest, WorkspaceVerb } from './workspaces.ts';

const users = { roles: ['user', 'operator'] as const };
const failures = { '4xx': schemas.problem, '5xx': schemas.problem };
const KEY_LENGTH_MAX = 200;

const lifetimeMs = { type: 'integer', minimum: 1_000, maximum: LIFETIME_MS_MAX };
const { name: _, network: __, ...common } = schemas.vmRequest.properties;
const workspaceRequest = schemas.object({
  ...common,
  name: { ...schemas.name, maxLength: 100 },
  network: schemas.name,
  lifetimeMs,
});
const count = { type: 'integer', minimum: 0, maximum: Number.MAX_SAFE_INTEGER };
const workspace = {
  type: 'object',
  additionalProperties: true,
  properties: {
    id: { type: 'string' },
    name: { type: 'string' },
    owner: { type: 'string' },
    state: { type: 'string' },
    job: { type: 'string' },
    network: { type: 'string' },
    volumes: schemas.list({ type: 'object', additionalProperties: true }),
    created: { type: 'string' },
    ends: { type: 'string' },
    fetchedBytes: { type: 'integer' },
    machines: schemas.list(schemas.vm),
  },
};
const quota = {
  type: 'object',
  additionalProperties: true,
  properties: { user: { type: 'string' }, used: { type: 'object', additionalProperties: true } },
};

const VERBS = ['suspend', 'resume', 'move', 'end'] as const satisfies readonly WorkspaceVerb[];

export function workspaceRoutes(app: FastifyInstance, broker: Broker): void {
  app.post<{ Body: WorkspaceRequest; Headers: { 'idempotency-key'?: string } }>(
    '/v1/workspaces',
    {
      config: users,
      schema: {
        headers: {
          type: 'object',
          properties: { 'idempotency-key': { type: 'string', minLength: 1, maxLength: KEY_LENGTH_MAX } },
        },
        body: workspaceRequest,
        response: { 202: workspace, ...failures },
      },
    },
    async (request, reply) => {
      const key = request.headers['idempotency-key'];
      const made = await broker.workspaces.request(principalOf(request), request.body, key);
      return reply.status(202).header('location', `/v1/workspaces/${made.id}`).send(made);
    },
  );
  app.get<{ Querystring: { all?: 'true' | 'false' } }>(
    '/v1/workspaces',
    {
      config: users,
      schema: {
        querystring: { type: 'object', properties: { all: { type: 'string', enum: ['true', 'false'] } } },
        response: { 200: schemas.list(workspace), ...failures },
      },
    },
    (request) => broker.workspaces.list(principalOf(request), { all: request.query.all === 'true' }),
  );
  app.get<{ Params: { id: string } }>(
    '/v1/workspaces/:id',
    { config: users, schema: { params: schemas.nameParams, response: { 200: workspace, ...failures } } },
    (request) => broker.workspaces.get(principalOf(request), request.params.id),
  );
  for (const verb of VERBS) {
    app.post<{ Params: { id: string }; Body: { host?: string } }>(
      `/v1/workspaces/:id/${verb}`,
      {
        config: users,
        schema: {
          params: schemas.nameParams,
          body: schemas.object(verb === 'resume' || verb === 'move' ? { host: schemas.name } : {}),
          response: { 200: workspace, ...failures },
        },
      },
      (request) => broker.workspaces.act(principalOf(request), request.params.id, verb, request.body),
    );
  }
  app.post<{ Params: { id: string }; Body: { lifetimeMs: number } }>(
    '/v1/workspaces/:id/extend',
    {
      config: users,
      schema: {
        params: schemas.nameParams,
        body: schemas.object({ lifetimeMs }, ['lifetimeMs']),
        response: { 200: workspace, ...failures },
      },
    },
    (request) => broker.workspaces.extend(principalOf(request), request.params.id, request.body.lifetimeMs),
  );

  interface UsageCall {
    Querystring: { by?: UsageBy };
  }
  const querystring = { type: 'object', properties: { by: { type: 'string', enum: USAGE_BY } } };
  app.get<UsageCall>(
    '/v1/usage',
    {
      config: users,
      schema: {
        description: 'Rows by VM and placement, or `by` workspace, user or data volume.',
        querystring,
        response: { 200: schemas.list({ type: 'object', additionalProperties: true }), ...failures },
      },
    },
    (request) => usageOf(broker.db, principalOf(request), request.query.by),
  );
  app.get<UsageCall>(
    '/v1/usage.csv',
    {
      config: users,
      schema: { description: 'The rows of /v1/usage as CSV (RFC 4180).', querystring, response: failures },
    },
    async (request, reply) =>
      reply
        .type('text/csv; charset=utf-8')
        .header('content-disposition', 'attachment; filename="usage.csv"')
        .send(csvOf(await usageOf(broker.db, principalOf(request), request.query.by))),
  );
  app.get('/v1/quota', { config: users, schema: { response: { 200: quota, ...failures } } }, (request) =>
    quotaOf(broker.db, principalOf(request).user),
  );
  app.put<{ Params: { id: string }; Body: Quota }>(
    '/v1/quotas/:id',
    {
      config: { roles: ['operator'] },
      schema: {
        description: 'Replaces what a user may have at a time; what is left out has no bound.',
        params: schemas.nameParams,
        body: schemas.object({ machines: count, vcpus: count, memoryBytes: count, volumeBytes: count }),
        response: { 200: quota, ...failures },
      },
    },
    (request) => setQuota(broker.db, request.params.id, request.body),
  );
}

/** Cells that a spreadsheet would take for a formula get a quote in front. */
export function csvOf(rows: readonly Record<string, unknown>[]): string {
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (value: unknown) => {
    const text = typeof value === 'string' ? value : JSON.stringify(value ?? '').replace(/^""$/, '');
    const safe = typeof value === 'string' && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return [columns, ...rows.map((row) => columns.map((column) => row[column]))]
    .map((row) => row.map(cell).join(',') + '\r\n')
    .join('');
}
