/** Calls of a proxy's control socket. Errors come back as the GridError that the proxy threw. */
import http from 'node:http';
import type { IncomingMessage } from 'node:http';
import { createInterface } from 'node:readline';
import type { ErrorCode } from '../core/errors.ts';
import { asGridError, ERROR_CODES, errnoOf, GridError } from '../core/errors.ts';
import { CALL_HEADER, LINES_TYPE } from './long-call.ts';

type Method = 'GET' | 'POST' | 'DELETE';

export interface LongCallOptions {
  readonly onProgress?: (done: number, total: number) => void;
  /** Cancels the call, which then rejects when the proxy has taken back what it made and let go of what it held. */
  readonly signal?: AbortSignal;
}

export class ControlClient {
  readonly #socketPath: string;

  constructor(socketPath: string) {
    this.#socketPath = socketPath;
  }

  /** One call; `T` is what the route answers (see control.ts). Throws not-found when nobody listens. */
  async call<T>(method: Method, route: string, body?: unknown): Promise<T> {
    const response = await this.#send(method, route, body);
    try {
      const parts: Buffer[] = [];
      for await (const part of response) parts.push(part as Buffer);
      const answer: unknown = JSON.parse(Buffer.concat(parts).toString('utf8'));
      const status = response.statusCode ?? 500;
      if (status >= 200 && status < 300) return answer as T;
      throw failureOf(answer);
    } catch (error) {
      throw this.#brokenOff(error);
    }
  }

  /** One call that tells how far it is (long-call.ts). Throws closed when it was cancelled. */
  async longCall<T>(
    method: Method,
    route: string,
    body: unknown,
    { onProgress, signal }: LongCallOptions,
  ): Promise<T> {
    let cancel: (() => void) | undefined;
    try {
      const response = await this.#send(method, route, body, { accept: LINES_TYPE }, signal);
      const id = response.headers[CALL_HEADER];
      cancel = () => {
        this.call('DELETE', `/v1/calls/${String(id)}`).catch(() => response.destroy());
      };
      if (signal?.aborted) cancel();
      else signal?.addEventListener('abort', cancel, { once: true });
      const lines = createInterface({ input: response });
      for await (const text of lines) {
        const line = JSON.parse(text) as { progress?: [number, number]; result?: T; error?: unknown };
        if (line.progress) onProgress?.(...line.progress);
        else if ('result' in line) return line.result;
        // A refusal of the router has its code and message at the top.
        else throw failureOf(line.error ?? line);
      }
    } catch (error) {
      if (signal?.aborted) throw new GridError('closed', 'cancelled', { cause: error });
      throw this.#brokenOff(error);
    } finally {
      if (cancel) signal?.removeEventListener('abort', cancel);
    }
    if (signal?.aborted) throw new GridError('closed', 'cancelled');
    throw this.#brokenOff(new Error('it hung up'));
  }

  #brokenOff(error: unknown): GridError {
    return asGridError(error, `the proxy at ${this.#socketPath} broke off`);
  }

  #send(
    method: Method,
    route: string,
    body: unknown,
    headers: Record<string, string> = {},
    signal?: AbortSignal,
  ): Promise<IncomingMessage> {
    return new Promise((resolve, reject) => {
      const request = http.request({
        socketPath: this.#socketPath,
        method,
        path: route,
        agent: false,
        headers: { ...headers, ...(body === undefined ? {} : { 'content-type': 'application/json' }) },
      });
      const giveUp = () => request.destroy();
      if (signal?.aborted) giveUp();
      signal?.addEventListener('abort', giveUp, { once: true });
      request.once('response', (response) => {
        signal?.removeEventListener('abort', giveUp); // from here on the caller cancels
        resolve(response);
      });
      request.on('error', (error) => {
        const gone = ['ECONNREFUSED', 'ENOENT'].includes(errnoOf(error) ?? '');
        reject(
          gone
            ? new GridError('not-found', `no proxy answers at ${this.#socketPath}`, { cause: error })
            : this.#brokenOff(error),
        );
      });
      request.end(body === undefined ? undefined : JSON.stringify(body));
    });
  }
}

function failureOf(answer: unknown): GridError {
  const { code, message } = Object(answer) as { code?: string; message?: string };
  return new GridError(
    code !== undefined && Object.hasOwn(ERROR_CODES, code) ? (code as ErrorCode) : 'bug',
    message ?? 'the proxy failed without a reason',
  );
}
