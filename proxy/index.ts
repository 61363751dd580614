/** The proxy's public face: a client for a source behind a URL, a server for a source, and the ways between them. */
import { GridError } from '../src/core/errors.ts';
import { CONNECT_TIMEOUT_MS, RECONNECT_TIMEOUT_MS, SSH_CHANNELS_MAX } from '../src/core/limits.ts';
import { FailoverSource } from './failover.ts';
import type { Member } from './failover.ts';
import { httpTransport } from './http-transport.ts';
import type { HttpOptions } from './http-transport.ts';
import { RemoteSource } from './remote-source.ts';
import type { SourceEvent } from './statistics.ts';
import { parseSshUrl, sshTransport } from './ssh-transport.ts';
import type { SshOptions } from './ssh-transport.ts';

export { checkAuthorizedKeys } from './authorized-keys.ts';
export { FailoverSource } from './failover.ts';
export type { FailoverStatistics, Member, MemberStatistics } from './failover.ts';
export { RemoteSource } from './remote-source.ts';
export type { SourceEvent, SourceStatistics } from './statistics.ts';
export { createServer, serveStdio } from './server.ts';
export type { ProxyServer, ServerOptions } from './server.ts';
export type { ServerMetrics } from './server-metrics.ts';
export { createSshEndpoint } from './ssh-endpoint.ts';
export type { SshEndpoint, SshEndpointOptions } from './ssh-endpoint.ts';
export type { SshOptions } from './ssh-transport.ts';

export interface ConnectOptions extends SshOptions, HttpOptions {
  /** Channels or connections at most, the one for demand included. Default SSH_CHANNELS_MAX. */
  readonly channels?: number;
  readonly connectTimeoutMs?: number;
  /** How long a read waits for a broken way before it fails with `unreachable`. */
  readonly reconnectTimeoutMs?: number;
  /** What happens to the connection, for a log. */
  readonly onEvent?: (event: SourceEvent) => void;
}

/**
 * A source behind ssh://[user@]host[:port]/path, http://… or https://… . Connects once: throws bad-request for the
 * URL, unreachable, host-key, denied, not-found (no store there), origin-failed or newer-format with the reason.
 */
export async function connectSource(url: string, options: ConnectOptions = {}): Promise<RemoteSource> {
  const parsed = parseUrl(url);
  const connectTimeoutMs = options.connectTimeoutMs ?? CONNECT_TIMEOUT_MS;
  const reconnectTimeoutMs = options.reconnectTimeoutMs ?? RECONNECT_TIMEOUT_MS;
  const lanesMax = options.channels ?? SSH_CHANNELS_MAX;
  if (!Number.isInteger(lanesMax) || lanesMax < 1 || lanesMax > 64) {
    throw new GridError('bad-request', `channels must be a whole number from 1 to 64, not ${lanesMax}`);
  }
  const transport =
    parsed.protocol === 'ssh:'
      ? sshTransport(parseSshUrl(parsed), options, {
          lanesMax,
          connectTimeoutMs,
          // The watch over the connection notices a cut much earlier; this is for a far side that hangs.
          idleTimeoutMs: Math.max(reconnectTimeoutMs, connectTimeoutMs),
        })
      : httpTransport(parsed, { ...options, lanesMax, connectTimeoutMs });
  const { onEvent } = options;
  return RemoteSource.connect(transport, {
    connectTimeoutMs,
    reconnectTimeoutMs,
    ...(onEvent ? { onEvent } : {}),
  });
}

/** With several sources a read waits only this long for one before the next is asked: an ssh connection on a long
 * link is made again in a second. */
export const FAILOVER_TIMEOUT_MS = 3_000;

/**
 * Several sources for one store, in order of preference: URLs for `connectSource`, or what opens a source (it should
 * give up after FAILOVER_TIMEOUT_MS). Resolves when one can be used; throws as `connectSource` does for the first,
 * and bad-request of any.
 */
export function connectSources(
  sources: readonly (string | Member)[],
  options: ConnectOptions = {},
): Promise<FailoverSource> {
  const { onEvent, reconnectTimeoutMs = RECONNECT_TIMEOUT_MS } = options;
  const each = { ...options, reconnectTimeoutMs: Math.min(FAILOVER_TIMEOUT_MS, reconnectTimeoutMs) };
  const members = sources.map((one) =>
    typeof one === 'string' ? { name: withoutPassword(one), open: () => connectSource(one, each) } : one,
  );
  return FailoverSource.open(members, { reconnectTimeoutMs, ...(onEvent ? { onEvent } : {}) });
}

function parseUrl(url: string): URL {
  const bad = (why: string) =>
    new GridError(
      'bad-request',
      `'${withoutPassword(url)}' ${why}: write ssh://[user@]host[:port]/path or https://host/path`,
    );
  let parsed: URL;
  try {
    parsed = new URL(url);
  } catch {
    throw bad('is not an address');
  }
  if (!['ssh:', 'http:', 'https:'].includes(parsed.protocol)) throw bad(`has an unknown scheme`);
  if (parsed.hostname === '') throw bad('has no host');
  if (parsed.protocol === 'ssh:') return parsed;
  if (parsed.username !== '' || parsed.password !== '')
    throw bad('has a user or password, which http does not take');
  if (parsed.search !== '' || parsed.hash !== '') throw bad('has a query or fragment');
  return parsed;
}

/** For messages: a password that somebody typed into a URL is not repeated. */
function withoutPassword(url: string): string {
  return url.replace(/\/\/([^/@:]*):[^/@]*@/, '//$1:…@');
}
