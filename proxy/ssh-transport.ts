/**
 * Lanes over ssh: one connection, one exec channel per lane, each a `gridvfs server --stdio PATH` of its own at a
 * stock sshd, or a channel of the built-in endpoint. The host key is always checked (known-hosts.ts). Keys come
 * from identity files, then from the agent. A connection that is silent for SILENCE_MS although it was pinged
 * counts as cut.
 */
import { readFileSync } from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as setTimeoutPromise } from 'node:timers/promises';
import type { Socket } from 'node:net';
import ssh2 from 'ssh2';
import type { AnyAuthMethod, ClientChannel, ParsedKey } from 'ssh2';
import { asGridError, errnoOf, GridError } from '../src/core/errors.ts';
import { MIB } from '../src/core/limits.ts';
import { socketLane } from './http-transport.ts';
import { HostKeyPolicy } from './known-hosts.ts';
import { SOFTWARE } from './protocol.ts';
import { CIPHERS } from './ssh-endpoint.ts';
import { widenWindow } from './ssh-window.ts';
import { StreamSocket } from './stream-socket.ts';
import type { Lane, Transport } from './transport.ts';
import { lostLane } from './transport.ts';
import { tunnelCommand } from './tunnel-command.ts';

const PING_MS = 3_000;
const SILENCE_MS = 12_000;
/** stderr of a remote command: its last line may go into a message. */
const STDERR_BYTES_MAX = 4096;
/** Beside ssh2's 2 MiB. What a source asks for at once (bulk-window.ts) is the bound of memory, not this: so many lanes
 * as a batch's share of it takes must not stand still for their windows. */
const CHANNEL_WINDOW_BYTES = 6 * MIB;
/** How long to wait for the exit status of a command whose output has ended. */
const EXIT_STATUS_MS = 1000;

export interface SshOptions {
  readonly identityPaths?: readonly string[];
  readonly agentSocket?: string;
  readonly knownHostsPaths?: readonly string[];
  readonly hostKeyFingerprint?: string;
  readonly remoteCommand?: string;
}

export interface SshTarget {
  readonly name: string;
  readonly user: string;
  readonly host: string;
  readonly port: number;
  readonly path: string;
}

/** Parts of ssh://[user@]host[:port]/path; a path that starts with /~/ is below the remote home. */
export function parseSshUrl(url: URL): SshTarget {
  const host = url.hostname.replace(/^\[|\]$/g, '');
  if (host === '' || url.password !== '' || url.search !== '' || url.hash !== '') {
    throw new GridError('bad-request', `write ssh://[user@]host[:port]/path, without a password`);
  }
  let folder: string;
  let user: string;
  try {
    folder = decodeURIComponent(url.pathname) || '/';
    user = decodeURIComponent(url.username) || os.userInfo().username;
  } catch (cause) {
    throw new GridError('bad-request', `the path of the ssh address has a wrong % sequence`, { cause });
  }
  // oxlint-disable-next-line no-control-regex -- they have no place in a command line
  if (/[\0-\x1f\x7f]/.test(folder)) throw new GridError('bad-request', 'the path has control characters');
  const at = url.username === '' ? '' : `${user}@`;
  const port = Number(url.port) || 22;
  return {
    name: `ssh://${at}${url.host}${url.pathname}`,
    user,
    host,
    port,
    path: folder.startsWith('/~/') ? './' + folder.slice(3) : folder,
  };
}

interface Connection {
  readonly client: ssh2.Client;
  readonly socket: Socket;
  /** Set once the connection has gone. */
  lost: GridError | undefined;
}

export function sshTransport(
  target: SshTarget,
  options: SshOptions,
  bounds: { lanesMax: number; connectTimeoutMs: number; idleTimeoutMs: number },
): Transport {
  const { name } = target;
  const home = os.homedir();
  const files = options.knownHostsPaths ?? [path.join(home, '.ssh/known_hosts'), '/etc/ssh/ssh_known_hosts'];
  const command = tunnelCommand(options.remoteCommand ?? 'gridvfs server --stdio', target.path);
  const hostKey = () =>
    new HostKeyPolicy(target.host, target.port, {
      files,
      ...(options.hostKeyFingerprint === undefined ? {} : { fingerprint: options.hostKeyFingerprint }),
    });
  hostKey(); // a malformed fingerprint is refused at the door
  let current: Promise<Connection> | undefined;
  const closing = new AbortController();

  const connected = (): Promise<Connection> => {
    if (closing.signal.aborted) return Promise.reject(new GridError('closed', `${name} was closed`));
    if (current) return current;
    const dialling = dial(target, options, hostKey(), bounds.connectTimeoutMs, closing.signal);
    current = dialling;
    const forget = () => {
      if (current === dialling) current = undefined;
    };
    dialling.then(({ client }) => void client.once('close', forget), forget);
    return dialling;
  };

  return {
    name,
    lanesMax: bounds.lanesMax,
    idleTimeoutMs: bounds.idleTimeoutMs,
    async connect() {
      const known = current;
      await connected();
      return known !== current;
    },
    async openLane() {
      const connection = await connected();
      return openChannel(connection, command, name, bounds.connectTimeoutMs);
    },
    async close() {
      closing.abort();
      const dialled = await current?.catch(() => undefined);
      if (!dialled || dialled.socket.destroyed) return;
      await new Promise<void>((resolve) => {
        dialled.socket.once('close', () => resolve());
        dialled.socket.destroy();
      });
    },
  };
}

/** One attempt: TCP, handshake with the host key checked, login. */
function dial(
  target: SshTarget,
  options: SshOptions,
  hostKey: HostKeyPolicy,
  timeoutMs: number,
  closing: AbortSignal,
): Promise<Connection> {
  const { name, host, port } = target;
  const { methods, tried } = authMethods(target.user, options);
  return new Promise((resolve, reject) => {
    const socket = net.connect({ host, port, noDelay: true });
    const client = new ssh2.Client();
    const connection: Connection = { client, socket, lost: undefined };
    let judged: GridError | undefined;
    let watchdog: NodeJS.Timeout | undefined;
    let ready = false;
    const lose = (error: GridError) => {
      connection.lost ??= judged ?? error;
      clearTimeout(timer);
      clearInterval(watchdog);
      closing.removeEventListener('abort', onClose);
      socket.destroy();
      if (!ready) reject(connection.lost);
    };
    const timer = setTimeout(
      () => lose(new GridError('unreachable', `${name} did not answer within ${timeoutMs} ms`)),
      timeoutMs,
    );
    const onClose = () => lose(new GridError('closed', `${name} was closed`));
    closing.addEventListener('abort', onClose);
    client.on('error', (cause) => lose(dialError(name, target.user, cause, tried, ready)));
    client.on('close', () => lose(lostLane(name)));
    client.once('ready', () => {
      ready = true;
      clearTimeout(timer);
      watchdog = watch(socket, () =>
        lose(new GridError('tunnel-lost', `${name} is silent for ${SILENCE_MS / 1000} s`)),
      );
      resolve(connection);
    });
    try {
      client.connect({
        sock: socket,
        host,
        port,
        username: target.user,
        ident: SOFTWARE.replace('/', '_'),
        readyTimeout: 0, // ours covers TCP as well
        algorithms: { cipher: [...CIPHERS], serverHostKey: hostKey.algorithms() },
        hostVerifier: (key: Buffer) => {
          judged = hostKey.judge(key);
          return judged === undefined;
        },
        authHandler: (_left, _partial, next) => next(methods.shift() ?? (false as never)),
        keepaliveInterval: PING_MS,
        // ssh2 counts only replies to its pings; bulk data on a slow link may hold those up. `watch` sees bytes.
        keepaliveCountMax: 1_000_000,
      });
    } catch (cause) {
      lose(asGridError(cause, `cannot connect to ${name}`, 'bug'));
    }
  });
}

/** Calls `onSilence` when no byte came for SILENCE_MS; pings go out every PING_MS, so a live peer is never silent. */
function watch(socket: Socket, onSilence: () => void): NodeJS.Timeout {
  let seenBytes = socket.bytesRead;
  let silentTicks = 0;
  const timer = setInterval(() => {
    silentTicks = socket.bytesRead === seenBytes ? silentTicks + 1 : 0;
    seenBytes = socket.bytesRead;
    // Ticks, not the clock: after the host slept, the peer gets its time to answer.
    if (silentTicks * 1000 >= SILENCE_MS) onSilence();
  }, 1000);
  timer.unref();
  return timer;
}

/** Keys to try, and what to say of each when none was taken. */
function authMethods(username: string, options: SshOptions): { methods: AnyAuthMethod[]; tried: string[] } {
  const methods: AnyAuthMethod[] = [];
  const tried: string[] = [];
  const files =
    options.identityPaths ??
    ['id_ed25519', 'id_ecdsa', 'id_rsa'].map((file) => path.join(os.homedir(), '.ssh', file));
  for (const file of files) {
    let text: Buffer;
    try {
      text = readFileSync(file);
    } catch (error) {
      if (options.identityPaths || errnoOf(error) !== 'ENOENT') tried.push(`${file} cannot be read`);
      continue;
    }
    const parsed = ssh2.utils.parseKey(text);
    const key = (Array.isArray(parsed) ? parsed[0] : parsed) as ParsedKey | Error;
    if (key instanceof Error) {
      const encrypted = /passphrase|encrypted/i.test(key.message);
      tried.push(
        encrypted ? `${file} has a passphrase (add it to ssh-agent)` : `${file} is not a private key`,
      );
    } else if (!key.isPrivateKey()) tried.push(`${file} is a public key`);
    else {
      methods.push({ type: 'publickey', username, key });
      tried.push(file);
    }
  }
  const agent = options.agentSocket ?? process.env['SSH_AUTH_SOCK'];
  if (agent) {
    methods.push({ type: 'agent', username, agent });
    tried.push(`the agent at ${agent}`);
  }
  return { methods, tried };
}

function dialError(name: string, user: string, cause: unknown, tried: string[], ready: boolean): GridError {
  const error = cause as Error & { level?: string };
  if (ready) return lostLane(name, cause);
  if (error.level === 'client-authentication' || error.level === 'agent') {
    const keys =
      tried.length > 0 ? `tried ${tried.join(', ')}` : 'there is no key to try; give --identity FILE';
    return new GridError('denied', `${name} does not let user ${user} in: ${keys}`, { cause });
  }
  if (error.level === 'client-socket') return asGridError(cause, `cannot reach ${name}`, 'unreachable');
  if (error.level === 'handshake' && /no matching/i.test(error.message)) {
    return new GridError(
      'origin-failed',
      `${name} and we have no ssh algorithm in common: ${error.message}`,
      {
        cause,
      },
    );
  }
  return new GridError('unreachable', `no ssh connection to ${name}: ${error.message}`, { cause });
}

function openChannel(
  connection: Connection,
  command: string,
  name: string,
  timeoutMs: number,
): Promise<Lane> {
  return new Promise((resolve, reject) => {
    if (connection.lost) {
      reject(connection.lost);
      return;
    }
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      reject(new GridError('timeout', `${name} opened no channel within ${timeoutMs} ms`));
    }, timeoutMs);
    connection.client.exec(command, (error, channel) => {
      clearTimeout(timer);
      if (!error) {
        // Here and not after an await: exit status and stderr may be in the very same packet.
        const lane = channelLane(connection, channel, name, command);
        if (late) lane.close();
        else resolve(lane);
      } else if ('reason' in error) {
        reject(
          new GridError('origin-failed', `${name} refuses a channel: ${error.message}`, { cause: error }),
        );
      } else reject(connection.lost ?? lostLane(name, error));
    });
  });
}

/** A lane over an exec channel; when the remote command ends, its status and last words are the reason. */
function channelLane(connection: Connection, channel: ClientChannel, name: string, command: string): Lane {
  let words = '';
  let status: string | undefined;
  channel.stderr.on('data', (piece: Buffer) => {
    words = (words + piece.toString('utf8')).slice(-STDERR_BYTES_MAX);
  });
  channel.on('exit', (code: number | null, signal?: string) => {
    status = code === null ? `was ended by ${signal}` : `ended with status ${code}`;
  });
  widenWindow(channel, CHANNEL_WINDOW_BYTES);
  const stream = new StreamSocket(channel, channel);
  const last = () => words.trim().split('\n').at(-1)!.trim();
  const closed = new Promise<void>((resolve) => {
    channel.once('close', resolve);
  });
  const target = { secure: false, host: 'gridvfs', prefix: '' };
  return socketLane(stream as unknown as Socket, target, name, async () => {
    // Only a command that never answered is the far side's fault; one that dies later is started again.
    if (stream.bytesRead > 0) return connection.lost;
    // sshd sends the end of stdout first and the exit status when the command was reaped.
    await Promise.race([closed, setTimeoutPromise(EXIT_STATUS_MS, undefined, { ref: false })]);
    if (connection.lost || status === undefined) return connection.lost;
    const saying = last() === '' ? '' : `: ${last()}`;
    const hint = status.endsWith(' 127') ? ' (is gridvfs installed there? see --remote-command)' : '';
    return new GridError('origin-failed', `'${command}' at ${name} ${status}${saying}${hint}`);
  });
}
