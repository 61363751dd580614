/**
 * The web page, served as it lies in page/ (plain modules, nothing is built), and the events that keep it live. The page
 * itself is open to everybody; what it shows comes by the API under the token of whoever logs in. It runs nothing but
 * its own files, sends nothing anywhere else, and nobody can frame it.
 */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import type { FastifyInstance } from 'fastify';
import type { Principal } from './access.ts';
import type { Broker } from './broker.ts';
import { listImages } from './images.ts';
import * as schemas from './schemas.ts';
import { principalOf } from './server.ts';

const FOLDER = path.join(import.meta.dirname, 'page');
const FILES = {
  'index.html': 'text/html; charset=utf-8',
  'page.css': 'text/css; charset=utf-8',
  'icon.svg': 'image/svg+xml',
  'main.mjs': 'text/javascript; charset=utf-8',
  'api.mjs': 'text/javascript; charset=utf-8',
  'dom.mjs': 'text/javascript; charset=utf-8',
  'machines.mjs': 'text/javascript; charset=utf-8',
  'request.mjs': 'text/javascript; charset=utf-8',
  'inventory.mjs': 'text/javascript; charset=utf-8',
  'console.mjs': 'text/javascript; charset=utf-8',
  'volumes.mjs': 'text/javascript; charset=utf-8',
  'waterfall.mjs': 'text/javascript; charset=utf-8',
} as const;

const HEADERS = {
  'content-security-policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'cache-control': 'no-cache',
};

/** The lists are looked at this often: load and warmth are in no table whose change could wake us. */
const LOOK_EVERY_MS = 500;
const HOSTS_EVERY_MS = 2_000;
/** A stream sends something this often, so that whoever is between keeps it open. */
const EVENTS_EVERY_MS = 5_000;
/** VMs that ended are shown this long: whoever looks sees how it went. */
const ENDED_SHOWN_MS = 600_000;
/** Streams of one user at a time: each has its lists read again and again. */
const STREAMS_MAX = 20;

export function pageRoutes(app: FastifyInstance, broker: Broker): void {
  for (const [name, type] of Object.entries(FILES)) {
    const bytes = readFileSync(path.join(FOLDER, name));
    for (const url of name === 'index.html' ? ['/', '/page/'] : [`/page/${name}`]) {
      app.get(url, { config: { open: true }, schema: { hide: true } }, async (_request, reply) =>
        reply.headers(HEADERS).type(type).send(bytes),
      );
    }
  }

  const streams = new Map<string, number>();
  app.get(
    '/v1/events',
    {
      config: { roles: ['user', 'operator'] },
      schema: {
        description:
          'Server-sent events: `you`, then `hosts`, `images`, `vms`, `workspaces` and `volumes`, each as a whole list when it has changed.',
        response: { '4xx': schemas.problem, '5xx': schemas.problem },
      },
    },
    async (request, reply) => {
      const principal = principalOf(request);
      const count = (streams.get(principal.user) ?? 0) + 1;
      if (count > STREAMS_MAX) {
        return reply
          .status(429)
          .type('application/problem+json')
          .send({
            type: 'about:blank',
            title: 'in-use',
            status: 429,
            detail: `there are ${STREAMS_MAX} streams of events for '${principal.user}' already`,
            code: 'in-use',
          });
      }
      streams.set(principal.user, count);
      reply.hijack();
      const { raw } = reply;
      const gone = new AbortController();
      raw.once('close', () => gone.abort());
      raw.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
      const send = (event: string, data: unknown) =>
        void raw.write(`event: ${event}\ndata: ${JSON.stringify(data)}\n\n`);
      try {
        send('you', { ...principal, now: new Date().toISOString() });
        await tellChanges(broker, principal, send, () => void raw.write(': still here\n\n'), gone.signal);
      } finally {
        gone.abort();
        const left = streams.get(principal.user)! - 1;
        if (left === 0) streams.delete(principal.user);
        else streams.set(principal.user, left);
        raw.end();
      }
      return reply;
    },
  );
}

/** Until the caller is gone or the broker ends. */
async function tellChanges(
  broker: Broker,
  principal: Principal,
  send: (event: string, data: unknown) => void,
  sendNothing: () => void,
  gone: AbortSignal,
): Promise<void> {
  const last = new Map<string, string>();
  let saidMs = performance.now();
  let hostsMs = -Infinity;
  let isWoken = true;
  /** Whether it was news. */
  const tell = (event: string, data: unknown): boolean => {
    const text = JSON.stringify(data);
    if (last.get(event) === text) return false;
    last.set(event, text);
    send(event, data);
    saidMs = performance.now();
    return true;
  };
  while (!gone.aborted && !broker.closed) {
    const woken = broker.wait('changed', LOOK_EVERY_MS, gone);
    const vms = await broker.requests.list(principal, { endedAfterMs: Date.now() - ENDED_SHOWN_MS });
    const isNews = tell('vms', vms);
    const isDue = performance.now() - hostsMs >= HOSTS_EVERY_MS;
    if (isNews || isDue) tell('workspaces', await workspacesOf(broker, principal));
    if (isWoken || isDue) tell('volumes', await broker.volumes.list(principal));
    if (isDue) {
      hostsMs = performance.now();
      tell('hosts', await broker.hosts.list());
      tell('images', await listImages(broker.db, principal));
    }
    if (performance.now() - saidMs >= EVENTS_EVERY_MS) {
      sendNothing();
      saidMs = performance.now();
    }
    isWoken = await woken;
  }
}

/** Without their machines, which the page has: only their addresses. */
async function workspacesOf(broker: Broker, principal: Principal): Promise<object[]> {
  const all = await broker.workspaces.list(principal);
  return all.map(({ id, name, state, job, network, ends, machines }) => ({
    ...{ id, name, state, job, network, ends },
    addresses: Object.fromEntries(
      machines.flatMap(({ id, address }) => (address === undefined ? [] : [[id, address]])),
    ),
  }));
}
