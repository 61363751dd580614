/** Calls of a broker's API, by agents and by the command line. Errors come back as the GridError that it answered. */
import { readFileSync } from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import { createInterface } from 'node:readline';
import type { Duplex } from 'node:stream';
import type { ErrorCode } from '../core/errors.ts';
import { asGridError, errnoOf, ERROR_CODES, GridError } from '../core/errors.ts';

export interface BrokerAddress {
  /** `https://host:port`, `http://127.0.0.1:port`, or `unix:/path` of its socket. */
  readonly url: string;
  readonly token: string;
  /** PEM of an authority of the site's own. */
  readonly ca?: Buffer;
}

export interface CallOptions {
  readonly headers?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal;
  /** Without an answer by then the call fails with timeout. */
  readonly timeoutMs?: number;
}

const CALL_TIMEOUT_MS = 30_000;

/** Reads a token's file, the bearer of which is then allowed to do what the token is for. */
export function readToken(file: string): string {
  try {
    return readFileSync(file, 'utf8').trim();
  } catch (error) {
    throw asGridError(error, `cannot read the token file ${file}`);
  }
}

export class BrokerClient {
  readonly #address: BrokerAddress;
  readonly #base: { socketPath: string } | { protocol: 'http:' | 'https:'; hostname: string; port: string };
  readonly #agent: http.Agent;

  /** Throws bad-request for an address that is none, or that would send the token in the clear to another host. */
  constructor(address: BrokerAddress) {
    this.#address = address;
    const socket = /^unix:(\/.*)$/.exec(address.url)?.[1];
    if (socket !== undefined) {
      this.#base = { socketPath: socket };
      this.#agent = new http.Agent({ keepAlive: true });
      return;
    }
    const url = URL.canParse(address.url) ? new URL(address.url) : undefined;
    if (!url || (url.protocol !== 'http:' && url.protocol !== 'https:')) {
      throw new GridError(
        'bad-request',
        `'${address.url}' is no broker's address: https://host:port or unix:/path`,
      );
    }
    const hostname = url.hostname.replace(/^\[|\]$/g, '');
    if (url.protocol === 'http:' && !/^(127\.[\d.]+|localhost|::1)$/.test(hostname)) {
      throw new GridError('bad-request', `${address.url} would show the token to the network: use https`);
    }
    this.#base = { protocol: url.protocol, hostname, port: url.port };
    this.#agent =
      url.protocol === 'https:'
        ? new https.Agent({ keepAlive: true, ...(address.ca === undefined ? {} : { ca: address.ca }) })
        : new http.Agent({ keepAlive: true });
  }

  get url(): string {
    return this.#address.url;
  }

  async call<T>(
    method: 'GET' | 'POST' | 'PUT' | 'PATCH' | 'DELETE',
    route: string,
    body?: unknown,
    options: CallOptions = {},
  ): Promise<T> {
    const signals = [AbortSignal.timeout(options.timeoutMs ?? CALL_TIMEOUT_MS)];
    if (options.signal) signals.push(options.signal);
    const signal = AbortSignal.any(signals);
    try {
      const response = await this.#send(method, route, body, options.headers, signal);
      const parts: Buffer[] = [];
      for await (const part of response) parts.push(part as Buffer);
      return parseAnswer(response.statusCode ?? 500, Buffer.concat(parts).toString('utf8'), this.url) as T;
    } catch (error) {
      throw this.#failed(error, options.signal, signal);
    }
  }

  /** The values of a stream of server-sent events, to its end. */
  async *events<T>(route: string, signal?: AbortSignal): AsyncGenerator<T> {
    try {
      const response = await this.#send('GET', route, undefined, {}, signal);
      if (response.statusCode !== 200) {
        const parts: Buffer[] = [];
        for await (const part of response) parts.push(part as Buffer);
        parseAnswer(response.statusCode ?? 500, Buffer.concat(parts).toString('utf8'), this.url);
        return;
      }
      for await (const line of createInterface({ input: response })) {
        if (line.startsWith('data: ')) yield JSON.parse(line.slice(6)) as T;
      }
    } catch (error) {
      throw this.#failed(error, signal, signal);
    }
  }

  /** A stream both ways in place of a call. Throws denied, unreachable. */
  async upgrade(route: string, protocol: string): Promise<Duplex> {
    const signal = AbortSignal.timeout(CALL_TIMEOUT_MS);
    try {
      return await new Promise((resolve, reject) => {
        const secure = 'protocol' in this.#base && this.#base.protocol === 'https:';
        const { ca } = this.#address;
        const request = (secure ? https : http).request({
          ...this.#base,
          ...(secure && ca !== undefined ? { ca } : {}),
          path: route,
          headers: {
            authorization: `Bearer ${this.#address.token}`,
            connection: 'upgrade',
            upgrade: protocol,
          },
          signal,
        });
        request.once('upgrade', (_response, socket, head) => {
          if (head.length > 0) socket.unshift(head);
          resolve(socket);
        });
        request.once('response', (response) => {
          const refuse = async () => {
            const parts: Buffer[] = [];
            for await (const part of response) parts.push(part as Buffer);
            if (parts.length > 0)
              parseAnswer(response.statusCode ?? 500, Buffer.concat(parts).toString('utf8'), this.url);
            throw new GridError(
              'denied',
              `the broker at ${this.url} answered ${response.statusCode} to ${route}`,
            );
          };
          refuse().catch(reject);
        });
        request.on('error', reject);
        request.end();
      });
    } catch (error) {
      throw this.#failed(error, undefined, signal);
    }
  }

  close(): void {
    this.#agent.destroy();
  }

  #send(
    method: string,
    route: string,
    body: unknown,
    headers: Readonly<Record<string, string>> | undefined,
    signal: AbortSignal | undefined,
  ): Promise<http.IncomingMessage> {
    return new Promise((resolve, reject) => {
      const send =
        'protocol' in this.#base && this.#base.protocol === 'https:' ? https.request : http.request;
      const request = send(
        {
          ...this.#base,
          agent: this.#agent,
          method,
          path: route,
          headers: {
            authorization: `Bearer ${this.#address.token}`,
            ...(body === undefined ? {} : { 'content-type': 'application/json' }),
            ...headers,
          },
          ...(signal === undefined ? {} : { signal }),
        },
        resolve,
      );
      request.on('error', reject);
      request.end(body === undefined ? undefined : JSON.stringify(body));
    });
  }

  #failed(error: unknown, given: AbortSignal | undefined, signal: AbortSignal | undefined): GridError {
    if (error instanceof GridError) return error;
    if (given?.aborted) return new GridError('closed', 'the call was given up', { cause: error });
    if (signal?.aborted) {
      return new GridError('timeout', `the broker at ${this.url} did not answer in time`, { cause: error });
    }
    const what = `cannot reach the broker at ${this.url}`;
    // A socket that is not there is a broker that does not run, not something that was asked for in vain.
    if (errnoOf(error) === 'ENOENT') return new GridError('unreachable', what, { cause: error });
    return asGridError(error, what, 'unreachable');
  }
}

function parseAnswer(status: number, text: string, url: string): unknown {
  let answer: unknown;
  try {
    answer = JSON.parse(text);
  } catch (error) {
    throw new GridError('origin-failed', `${url} answered ${status} and no JSON: is it a broker?`, {
      cause: error,
    });
  }
  if (status >= 200 && status < 300) return answer;
  const { code, detail } = answer as { code?: string; detail?: string };
  throw new GridError(
    code !== undefined && code in ERROR_CODES ? (code as ErrorCode) : 'origin-failed',
    detail ?? `the broker at ${url} answered ${status}`,
  );
}
