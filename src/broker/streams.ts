/**
 * Streams from users to their guests (`gridvfs workspace ssh`, and the console on the page). Hosts call the broker, so a user's request waits here
 * until the host of the VM, told by an order, has opened the other end:
 *
 *   GET /v1/vms/<vm>/connect?port=22                Upgrade: gridvfs-stream, under the user's token
 *   GET, POST /v1/vms/<vm>/console                  without an upgrade, for browsers: what the guest says, what is typed
 *   GET /v1/agent/streams/<stream>?host=…           Upgrade: gridvfs-stream, under that of the host's agent
 *
 * A stream has a name that cannot be guessed, is for one host, and is taken once.
 */
import { randomBytes } from 'node:crypto';
import type http from 'node:http';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, GridError } from '../core/errors.ts';
import { CONSOLE_PORT } from '../core/grid.ts';
import type { Access, Principal } from './access.ts';
import type { Database } from './database.ts';
import type { Requests } from './requests.ts';
import { giveOrder, placedAs } from './vm-table.ts';

const USER_PATH = /^\/v1\/vms\/([a-z0-9][a-z0-9._-]{0,127})\/connect$/;
const AGENT_PATH = /^\/v1\/agent\/streams\/([0-9a-f]{32})$/;
const WAIT_MS = 30_000;
const LOOK_MS = 200;
const STREAMS_MAX = 1_000;

const urlOf = (request: http.IncomingMessage) => new URL(request.url ?? '/', 'http://broker');

/** Whether a request for an upgrade is one for a stream. */
export function isStreamRequest(request: http.IncomingMessage): boolean {
  const { pathname } = urlOf(request);
  return USER_PATH.test(pathname) || AGENT_PATH.test(pathname);
}

/** Who asked, until the connection is gone. */
interface Leaving {
  once(event: 'close', listener: () => void): unknown;
}

interface Waiting {
  readonly host: string;
  take(socket: Duplex): void;
}

export interface StreamParts {
  readonly db: Database;
  readonly access: Access;
  readonly requests: Requests;
  /** A host has an order. */
  readonly wake: (host: string) => void;
  readonly log: (line: string) => void;
}

export class Streams {
  readonly #parts: StreamParts;
  readonly #waiting = new Map<string, Waiting>();
  /** Consoles that are open, by user and VM. */
  readonly #consoles = new Map<string, Duplex>();

  constructor(parts: StreamParts) {
    this.#parts = parts;
  }

  /** Takes the requests for streams of one listener. */
  serve(server: http.Server): { close(): void } {
    const sockets = new Set<Duplex>();
    server.on('upgrade', (request: http.IncomingMessage, socket: Duplex, head: Buffer) => {
      if (!isStreamRequest(request)) return;
      socket.on('error', () => {});
      sockets.add(socket);
      socket.once('close', () => sockets.delete(socket));
      if (head.length > 0) socket.unshift(head);
      this.#take(request, socket).catch((error: unknown) => {
        const { code, message } = asGridError(error, 'the stream failed', 'bug');
        this.#parts.log(`stream: ${message} [${code}]`);
        if (!socket.writable) return;
        const text = JSON.stringify({ code, detail: message });
        socket.end(
          `HTTP/1.1 403 Forbidden\r\ncontent-type: application/problem+json\r\ncontent-length: ${Buffer.byteLength(text)}\r\nconnection: close\r\n\r\n${text}`,
        );
      });
    });
    return {
      close() {
        for (const socket of sockets) socket.destroy();
      },
    };
  }

  async #take(request: http.IncomingMessage, socket: Duplex): Promise<void> {
    const { access } = this.#parts;
    const url = urlOf(request);
    const token = /^Bearer (\S{1,200})$/.exec(request.headers.authorization ?? '')?.[1];
    if (token === undefined || request.headers.upgrade !== 'gridvfs-stream')
      throw new GridError('denied', 'a stream takes a token');
    const principal = await access.authenticate(token);
    const stream = AGENT_PATH.exec(url.pathname)?.[1];
    if (stream !== undefined) return this.#takeAgent(principal, stream, url, socket);
    if (principal.role === 'agent') throw new GridError('denied', 'streams to guests are for users');
    const port = Number(url.searchParams.get('port') ?? Number.NaN);
    if (port !== CONSOLE_PORT && (!Number.isInteger(port) || port < 1 || port > 65_535))
      throw new GridError(
        'bad-request',
        `a port is a number from 1 to 65535, or ${CONSOLE_PORT}: the console`,
      );
    const far = await this.#connect(principal, USER_PATH.exec(url.pathname)![1]!, port, socket);
    accept(socket);
    join(socket, far);
  }

  async #takeAgent(principal: Principal, stream: string, url: URL, socket: Duplex): Promise<void> {
    const waiting = this.#waiting.get(stream);
    const [host] = await this.#parts.db.all<{ owner: string }>(
      'SELECT owner FROM hosts WHERE id = ?',
      url.searchParams.get('host'),
    );
    const may = principal.role === 'agent' && host?.owner === principal.user;
    if (!may || waiting?.host !== url.searchParams.get('host'))
      throw new GridError('denied', 'nobody waits for this stream');
    accept(socket);
    waiting.take(socket);
  }

  /** The console of a VM, in place of the one that the user had open. Throws like #connect. */
  async openConsole(principal: Principal, which: string, user: Leaving): Promise<Duplex> {
    const { db, requests } = this.#parts;
    const { id } = await requests.find(db, principal, which);
    const key = `${principal.user} ${id}`;
    const far = await this.#connect(principal, id, CONSOLE_PORT, user);
    // A console serves one at a time: this one waits at the host until the other is gone.
    this.#consoles.get(key)?.destroy();
    this.#consoles.set(key, far);
    far.once('close', () => {
      if (this.#consoles.get(key) === far) this.#consoles.delete(key);
    });
    return far;
  }

  /** Types to the console that the user has open. Throws not-found, closed. */
  async type(principal: Principal, which: string, text: string): Promise<void> {
    const { db, requests } = this.#parts;
    const { id, name } = await requests.find(db, principal, which);
    const far = this.#consoles.get(`${principal.user} ${id}`);
    if (far === undefined) throw new GridError('closed', `you have no console of VM '${name}' open`);
    far.write(text);
  }

  /** The other end. Throws not-found, in-use, timeout, and what the host answered. */
  async #connect(principal: Principal, which: string, port: number, user: Leaving): Promise<Duplex> {
    const { db, requests, wake } = this.#parts;
    const vm = await requests.find(db, principal, which);
    if (vm.state !== 'running' || vm.host === null)
      throw new GridError('in-use', `VM '${vm.name}' is ${vm.state}; only one that runs can be reached`);
    if (this.#waiting.size >= STREAMS_MAX) throw new GridError('in-use', 'too many streams are being opened');
    const stream = randomBytes(16).toString('hex');
    const order = `${placedAs(vm)}.connect.${stream}`;
    const { promise, resolve } = Promise.withResolvers<Duplex>();
    this.#waiting.set(stream, { host: vm.host, take: resolve });
    const leave = new AbortController();
    user.once('close', () => leave.abort());
    try {
      await giveOrder(db, vm.host, vm.id, { id: order, kind: 'connect', vm: placedAs(vm), stream, port });
      wake(vm.host);
      return await Promise.race([promise, this.#failed(order, leave)]);
    } finally {
      this.#waiting.delete(stream);
      leave.abort();
      await db.run(
        `UPDATE orders SET state = 'void', done_ms = ? WHERE id = ? AND state = 'open'`,
        Date.now(),
        order,
      );
    }
  }

  /** Rejects when the order has failed, takes too long, or nobody waits any more. */
  async #failed(order: string, { signal }: AbortController): Promise<never> {
    for (const endMs = performance.now() + WAIT_MS; performance.now() < endMs;) {
      await sleep(LOOK_MS, undefined, { signal }).catch(() => undefined);
      if (signal.aborted) throw new GridError('closed', 'nobody waits for the stream any more');
      const [row] = await this.#parts.db.all<{ state: string; error: string | null }>(
        'SELECT state, error FROM orders WHERE id = ?',
        order,
      );
      if (row?.state === 'failed') {
        const { message } = JSON.parse(row.error!) as { message: string };
        throw new GridError('vm-failed', message);
      }
    }
    throw new GridError('timeout', `the host did not open the stream within ${WAIT_MS} ms`);
  }
}

function accept(socket: Duplex): void {
  socket.write('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: gridvfs-stream\r\n\r\n');
}

function join(one: Duplex, other: Duplex): void {
  for (const [from, to] of [
    [one, other],
    [other, one],
  ] as const) {
    from.pipe(to);
    from.once('close', () => to.destroy());
  }
}
