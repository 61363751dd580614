/** What agents call: see core/grid.ts for the protocol. */
import type { FastifyInstance } from 'fastify';
import { ORDERS_WAIT_MS } from '../core/grid.ts';
import type { HostFacts, HostReport } from '../core/grid.ts';
import type { Broker } from './broker.ts';
import * as schemas from './schemas.ts';
import { principalOf } from './server.ts';

const config = { roles: ['agent'] as const };

export function agentRoutes(app: FastifyInstance, broker: Broker): void {
  app.post<{ Body: HostFacts }>(
    '/v1/agent/register',
    { config, schema: { body: schemas.hostFacts, response: { 200: schemas.lease } } },
    async (request) => {
      const lease = await broker.hosts.register(principalOf(request), request.body);
      broker.wake();
      return lease;
    },
  );
  app.post<{ Body: HostReport }>(
    '/v1/agent/report',
    { config, schema: { body: schemas.hostReport, response: { 200: schemas.lease } } },
    (request) => broker.hosts.report(principalOf(request), request.body),
  );
  app.get<{ Querystring: { host: string; incarnation: string; known?: string } }>(
    '/v1/agent/orders',
    {
      config,
      schema: {
        querystring: {
          type: 'object',
          properties: {
            host: schemas.name,
            incarnation: schemas.name,
            /** How many open orders the agent works on already: it is answered when there are others. */
            known: { type: 'string', maxLength: 256 * 1024 },
          },
          required: ['host', 'incarnation'],
        },
        response: { 200: schemas.list({ type: 'object', additionalProperties: true }) },
      },
    },
    async (request) => {
      const { host, incarnation } = request.query;
      const known = new Set((request.query.known ?? '').split(','));
      const gone = new AbortController();
      request.raw.once('close', () => gone.abort());
      const endMs = performance.now() + ORDERS_WAIT_MS;
      for (;;) {
        const leftMs = endMs - performance.now();
        // Listens before it looks: an order that comes in between is not missed.
        const woken = broker.wait(`host:${host}`, Math.max(0, leftMs), gone.signal);
        const orders = (await broker.hosts.orders(principalOf(request), host, incarnation)).filter(
          ({ id }) => !known.has(id),
        );
        if (orders.length > 0 || leftMs <= 0 || broker.closed || gone.signal.aborted) {
          gone.abort();
          return orders;
        }
        await woken;
      }
    },
  );
}
