/**
 * What the client needs of a way to the far side: HTTP/1.1 on lanes. A lane is one byte stream (a TCP connection
 * or an ssh channel) with at most one exchange on it. Transports know addresses, keys and channels, and never what
 * an exchange means; errors of the way are tunnel-lost, unreachable, host-key, denied or origin-failed.
 */
import type { Agent as HttpAgent, IncomingMessage } from 'node:http';
import http from 'node:http';
import https from 'node:https';
import { GridError } from '../src/core/errors.ts';

export interface Exchange {
  readonly method: 'GET' | 'POST';
  readonly path: string;
  readonly type?: string;
  readonly body?: Buffer;
  readonly signal?: AbortSignal;
}

export interface Lane {
  /** Headers of the answer; the caller reads the body to its end or destroys it, then the lane is free again. */
  exchange(request: Exchange): Promise<IncomingMessage>;
  /** Whether the lane can carry another exchange. */
  readonly alive: boolean;
  /** Why the lane or an exchange on it broke, as a GridError. */
  explain(error: unknown): Promise<GridError>;
  close(): void;
}

export interface Transport {
  /** The URL without secrets. */
  readonly name: string;
  readonly lanesMax: number;
  /** How long an exchange may stand still before the way counts as broken. */
  readonly idleTimeoutMs: number;
  /** Makes the way if it is not there (true: it was not); never tries twice. One attempt at a time, shared. */
  connect(): Promise<boolean>;
  /** A new lane; connects first. */
  openLane(): Promise<Lane>;
  close(): Promise<void>;
}

export interface LaneTarget {
  readonly secure: boolean;
  readonly host: string;
  readonly port?: number;
  /** Before every path, without a slash at its end. */
  readonly prefix: string;
}

/** One exchange through `agent`. Rejects with whatever node:http says; `Lane.explain` makes it a GridError. */
export function exchangeThrough(
  agent: HttpAgent | https.Agent,
  target: LaneTarget,
  request: Exchange,
): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    const options: https.RequestOptions = {
      agent,
      host: target.host,
      port: target.port,
      method: request.method,
      path: target.prefix + request.path,
      headers: {
        accept: '*/*',
        ...(request.body ? { 'content-type': request.type, 'content-length': request.body.length } : {}),
      },
      ...(request.signal ? { signal: request.signal } : {}),
    };
    const sent = target.secure ? https.request(options) : http.request(options);
    sent.once('response', resolve);
    // Stays after the response: a connection that breaks later says so here as well as on the response.
    sent.on('error', reject);
    sent.end(request.body);
  });
}

/** The error of a lane that ended without a reason of its own. */
export function lostLane(name: string, cause?: unknown): GridError {
  const why = cause instanceof Error ? `: ${cause.message}` : '';
  return new GridError('tunnel-lost', `the connection to ${name} broke${why}`, { cause });
}
