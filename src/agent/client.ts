/** Calls of a proxy's control socket. Errors come back as the GridError that the proxy threw. */
import http from 'node:http';
import type { ErrorCode } from '../core/errors.ts';
import { asGridError, ERROR_CODES, errnoOf, GridError } from '../core/errors.ts';

export class ControlClient {
  readonly #socketPath: string;

  constructor(socketPath: string) {
    this.#socketPath = socketPath;
  }

  /** One call; `T` is what the route answers (see control.ts). Throws not-found when nobody listens. */
  async call<T>(method: 'GET' | 'POST' | 'DELETE', route: string, body?: unknown): Promise<T> {
    const { status, text } = await this.#exchange(method, route, body);
    const answer: unknown = JSON.parse(text);
    if (status >= 200 && status < 300) return answer as T;
    const { code, message } = answer as { code: string; message: string };
    throw new GridError(code in ERROR_CODES ? (code as ErrorCode) : 'bug', message);
  }

  #exchange(method: string, route: string, body: unknown): Promise<{ status: number; text: string }> {
    return new Promise((resolve, reject) => {
      const fail = (error: unknown) => {
        const gone = ['ECONNREFUSED', 'ENOENT'].includes(errnoOf(error) ?? '');
        reject(
          gone
            ? new GridError('not-found', `no proxy answers at ${this.#socketPath}`, { cause: error })
            : asGridError(error, `the proxy at ${this.#socketPath} broke off`),
        );
      };
      const request = http.request(
        {
          socketPath: this.#socketPath,
          method,
          path: route,
          agent: false,
          headers: body === undefined ? {} : { 'content-type': 'application/json' },
        },
        (response) => {
          const parts: Buffer[] = [];
          response.on('data', (part: Buffer) => parts.push(part));
          response.on('end', () =>
            resolve({ status: response.statusCode ?? 500, text: Buffer.concat(parts).toString('utf8') }),
          );
          response.on('error', fail);
        },
      );
      request.on('error', fail);
      request.end(body === undefined ? undefined : JSON.stringify(body));
    });
  }
}
