/** Lanes over plain http or https: one TCP connection each. Certificates are always checked. */
import { X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import net from 'node:net';
import tls from 'node:tls';
import type { Socket } from 'node:net';
import { asGridError, errnoOf, GridError } from '../src/core/errors.ts';
import { exchangeThrough, lostLane } from './transport.ts';
import type { Lane, LaneTarget, Transport } from './transport.ts';

/** A cut that no RST tells of is noticed after this long without a byte. */
const IDLE_TIMEOUT_MS = 15_000;

export interface HttpOptions {
  /** Certificates (PEM) of further authorities to trust beside the usual ones, e.g. a site's own. */
  readonly caPaths?: readonly string[];
}

/** Throws bad-request for a file of authorities that is none. */
export function httpTransport(
  url: URL,
  options: HttpOptions & { lanesMax: number; connectTimeoutMs: number },
): Transport {
  const authorities = readAuthorities(options.caPaths ?? []);
  const target: LaneTarget = {
    secure: url.protocol === 'https:',
    host: url.hostname.replace(/^\[|\]$/g, ''),
    port: Number(url.port) || (url.protocol === 'https:' ? 443 : 80),
    prefix: url.pathname.replace(/\/+$/, ''),
  };
  const name = `${url.protocol}//${url.host}${target.prefix}`;
  const lanes = new Set<Lane>();
  let closed = false;

  const dial = (): Promise<Socket> =>
    new Promise((resolve, reject) => {
      const { host, port } = target;
      const socket = target.secure
        ? tls.connect({
            host,
            port,
            ...(net.isIP(host) ? {} : { servername: host }),
            ALPNProtocols: ['http/1.1'],
            ...(authorities ? { ca: authorities } : {}),
          })
        : net.connect({ host, port: port! });
      const timer = setTimeout(() => {
        socket.destroy();
        reject(new GridError('unreachable', `${name} did not answer within ${options.connectTimeoutMs} ms`));
      }, options.connectTimeoutMs);
      socket.once('error', (cause) => {
        clearTimeout(timer);
        reject(dialError(name, cause));
      });
      socket.once(target.secure ? 'secureConnect' : 'connect', () => {
        clearTimeout(timer);
        socket.removeAllListeners('error');
        socket.setNoDelay(true);
        resolve(socket);
      });
    });

  return {
    name,
    lanesMax: options.lanesMax,
    idleTimeoutMs: IDLE_TIMEOUT_MS,
    async connect() {
      const socket = await dial();
      socket.destroy();
      return true;
    },
    async openLane() {
      const socket = await dial();
      if (closed) {
        socket.destroy();
        throw new GridError('closed', `${name} was closed`);
      }
      const lane = socketLane(socket, target, name);
      lanes.add(lane);
      socket.once('close', () => lanes.delete(lane));
      return lane;
    },
    close() {
      closed = true;
      for (const lane of lanes) lane.close();
      return Promise.resolve();
    },
  };
}

/** A lane over a socket that is connected already. `explain` may know more of a break than the socket does. */
export function socketLane(
  socket: Socket,
  target: LaneTarget,
  name: string,
  explain?: () => Promise<GridError | undefined>,
): Lane {
  const Agent = target.secure ? https.Agent : http.Agent;
  const agent = new Agent({ keepAlive: true, maxSockets: 1, maxFreeSockets: 1 });
  let handed = false;
  agent.createConnection = () => {
    // The agent asks for another socket when this one has gone; a lane is only ever one.
    if (handed) throw lostLane(name);
    handed = true;
    return socket;
  };
  socket.on('error', () => {}); // the exchange under way reports it; an idle lane just dies
  const lane = {
    alive: true,
    exchange: (request: Parameters<Lane['exchange']>[0]) => exchangeThrough(agent, target, request),
    async explain(error: unknown): Promise<GridError> {
      if (error instanceof GridError) return error;
      const known = await explain?.();
      if (known) return known;
      if (error instanceof Error && error.name === 'AbortError') {
        return new GridError('closed', `a request to ${name} was cancelled`, { cause: error });
      }
      if (errnoOf(error)?.startsWith('HPE_')) {
        return new GridError('origin-failed', `${name} answers with something that is not HTTP`, {
          cause: error,
        });
      }
      return lostLane(name, error);
    },
    close() {
      lane.alive = false;
      socket.destroy();
      agent.destroy();
    },
  };
  socket.once('close', () => (lane.alive = false));
  return lane;
}

/** The usual authorities and those in `files`; undefined for the usual ones alone. */
function readAuthorities(files: readonly string[]): string[] | undefined {
  if (files.length === 0) return undefined;
  const added = files.flatMap((file) => {
    try {
      const blocks = readFileSync(file, 'utf8').match(PEM_CERTIFICATE) ?? [];
      if (blocks.length === 0) throw new Error('there is none in it');
      return blocks.map((block) => new X509Certificate(block).toString());
    } catch (cause) {
      const why = cause instanceof Error ? cause.message : String(cause);
      throw new GridError('bad-request', `cannot take certificates from ${file}: ${why}`, { cause });
    }
  });
  return [...tls.getCACertificates('default'), ...added];
}

const PEM_CERTIFICATE = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g;

const TLS_ERROR = /^(CERT_|ERR_TLS_CERT|DEPTH_ZERO|SELF_SIGNED|UNABLE_TO_)/;

function dialError(name: string, cause: unknown): GridError {
  const code = errnoOf(cause) ?? '';
  if (TLS_ERROR.test(code)) {
    return new GridError(
      'host-key',
      `the certificate of ${name} is not trusted: ${(cause as Error).message}`,
      {
        cause,
      },
    );
  }
  return asGridError(cause, `cannot reach ${name}`, 'unreachable');
}
