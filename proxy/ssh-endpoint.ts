/**
 * The ssh endpoint built into `gridvfs server`: an ssh server that offers nothing but the tunnel. A client with a
 * key from authorized_keys may `exec` the one command that names a path served here and gets the HTTP server on
 * that channel; no process is started. Shells, terminals, subsystems (sftp), forwarding of any kind, other
 * commands, passwords and SHA-1 signatures are refused.
 *
 * Bounds: connections, those not yet authenticated, time and attempts to authenticate, channels per connection.
 */
import { chmodSync, linkSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import path from 'node:path';
import ssh2 from 'ssh2';
import type { AuthContext, Connection, ParsedKey, ServerChannel } from 'ssh2';
import { asGridError, errnoOf, GridError } from '../src/core/errors.ts';
import { SSH_CHANNELS_MAX } from '../src/core/limits.ts';
import { mayUse, readAuthorizedKeys } from './authorized-keys.ts';
import type { AuthorizedKey } from './authorized-keys.ts';
import { fingerprintOf } from './known-hosts.ts';
import { SOFTWARE } from './protocol.ts';
import { listenOn } from './server.ts';
import { makeSshKey } from './ssh-key.ts';
import type { ProxyServer } from './server.ts';
import { StreamSocket } from './stream-socket.ts';
import { parseTunnelCommand } from './tunnel-command.ts';

const CONNECTIONS_MAX = 256;
/** sshd's MaxStartups starts to drop at 10. */
const UNAUTHENTICATED_MAX = 16;
const LOGIN_TIMEOUT_MS = 20_000;
/** sshd's MaxAuthTries. */
const AUTH_ATTEMPTS_MAX = 6;
/** One more than our own client opens. */
const CHANNELS_MAX = SSH_CHANNELS_MAX + 1;
const KEEPALIVE_MS = 15_000;

/** Fast AEAD ciphers first; the rest for clients that have nothing better. */
export const CIPHERS = [
  'aes128-gcm@openssh.com',
  'aes256-gcm@openssh.com',
  'chacha20-poly1305@openssh.com',
  'aes128-ctr',
  'aes256-ctr',
] as const;

export interface SshEndpointOptions {
  readonly server: ProxyServer;
  /** ed25519 key of this host; made with mode 0600 when it is not there. */
  readonly hostKeyPath: string;
  readonly authorizedKeysPath: string;
  readonly listen: { readonly host: string; readonly port: number };
  /** Paths that clients may name, beside `/`: the store's own. */
  readonly paths?: readonly string[];
  /** For a log: who came, who was refused and why. */
  readonly onEvent?: (message: string) => void;
}

export interface SshEndpoint {
  readonly address: AddressInfo;
  /** SHA256:… as `ssh-keygen -l` prints it. */
  readonly fingerprint: string;
  /** The host key's public half as a line for known_hosts, without the host name. */
  readonly publicKey: string;
  close(): Promise<void>;
}

/** Starts the endpoint. Throws in-use, bad-format (host key), denied (authorized keys), local-io. */
export async function createSshEndpoint(options: SshEndpointOptions): Promise<SshEndpoint> {
  const hostKey = loadHostKey(options.hostKeyPath);
  readAuthorizedKeys(options.authorizedKeysPath); // so that a wrong path is said now, not to the first client
  const blob = parsedKey(hostKey, options.hostKeyPath).getPublicSSH();
  const log = options.onEvent ?? (() => {});
  const sockets = new Map<string, Socket>();
  const waiting = new Set<string>();
  const ssh = new ssh2.Server(
    {
      hostKeys: [hostKey],
      ident: SOFTWARE.replace('/', '_'),
      algorithms: { cipher: [...CIPHERS] },
      keepaliveInterval: KEEPALIVE_MS,
      keepaliveCountMax: 3,
    },
    (connection, info) => {
      const peer = peerName(info.ip, info.port);
      const socket = sockets.get(peer);
      if (socket) serveConnection(connection, socket, peer, options, log, () => waiting.delete(peer));
      else connection.end();
    },
  );

  const listener = net.createServer({ noDelay: true, keepAlive: true }, (socket) => {
    const peer = peerName(socket.remoteAddress, socket.remotePort);
    if (waiting.size >= UNAUTHENTICATED_MAX) {
      log(`${peer}: refused, ${waiting.size} connections are logging in already`);
      socket.destroy();
      return;
    }
    // Each channel that waits for room listens for it.
    socket.setMaxListeners(4 * CHANNELS_MAX);
    sockets.set(peer, socket);
    waiting.add(peer);
    const timer = setTimeout(() => {
      if (waiting.has(peer)) {
        log(`${peer}: did not log in within ${LOGIN_TIMEOUT_MS / 1000} s`);
        socket.destroy();
      }
    }, LOGIN_TIMEOUT_MS);
    timer.unref();
    socket.once('close', () => {
      clearTimeout(timer);
      sockets.delete(peer);
      waiting.delete(peer);
    });
    ssh.injectSocket(socket);
  });
  listener.maxConnections = CONNECTIONS_MAX;
  await listenOn(listener, options.listen);
  return {
    address: listener.address() as AddressInfo,
    fingerprint: fingerprintOf(blob),
    publicKey: `ssh-ed25519 ${blob.toString('base64')}`,
    close() {
      return new Promise((resolve) => {
        listener.close(() => resolve());
        for (const socket of sockets.values()) socket.destroy();
      });
    },
  };
}

function peerName(address: string | undefined, port: number | undefined): string {
  return `${address}:${port}`;
}

function serveConnection(
  connection: Connection,
  socket: Socket,
  peer: string,
  options: SshEndpointOptions,
  log: (message: string) => void,
  onLogin: () => void,
): void {
  let attempts = 0;
  let user: AuthorizedKey | undefined;
  connection.on('error', () => socket.destroy()); // a broken or hostile peer; 'close' follows
  connection.on('authentication', (context) => {
    const key = authenticate(context, options.authorizedKeysPath, socket.remoteAddress ?? '', log, peer);
    if (!key && context.method !== 'none' && ++attempts >= AUTH_ATTEMPTS_MAX) {
      log(`${peer}: too many attempts to log in`);
      socket.destroy();
      return;
    }
    if (!key) {
      context.reject(['publickey']);
      return;
    }
    // Without a signature the client only asks whether the key would do; ssh2 answers that itself on accept.
    if (context.method === 'publickey' && context.signature) user = key;
    context.accept();
  });
  connection.once('ready', () => {
    onLogin();
    log(`${peer}: logged in with ${user ? fingerprintOf(user.blob) : 'no key'}`);
  });
  let channels = 0;
  connection.on('session', (accept, reject) => {
    if (!user || channels >= CHANNELS_MAX) {
      reject();
      return;
    }
    channels++;
    const session = accept();
    session.once('close', () => channels--);
    const refuse = (what: string) => (acceptRequest: (() => ServerChannel) | undefined) => {
      log(`${peer}: refused ${what}`);
      const channel = acceptRequest?.();
      if (channel)
        refuseChannel(channel, `gridvfs: ${what} is not offered here; this is a gridvfs tunnel only`);
    };
    session.on('shell', refuse('a shell'));
    session.on('exec', (acceptExec, rejectExec, info) => {
      const forced = user?.command;
      const asked = parseTunnelCommand(forced ?? info.command);
      if (asked === undefined || !servesPath(asked.path, options.paths)) {
        const path = asked && JSON.stringify(asked.path.slice(0, 200));
        const what = path === undefined ? 'this command' : `the path ${path}`;
        refuse(what)(acceptExec);
        return;
      }
      const channel = acceptExec();
      if (!channel) {
        rejectExec?.();
        return;
      }
      const stream = new StreamSocket(channel, channel, socket);
      // What a client asks for itself permits nothing; what the operator wrote beside its key does.
      const mayUpload = forced !== undefined && asked.acceptUploads;
      void options.server.attach(stream, {
        authenticated: true,
        idleLanes: CHANNELS_MAX,
        ...(mayUpload ? { mayUpload } : {}),
      });
    });
  });
}

/** A line on stderr and an exit status, like a program that refuses; then the channel ends. */
function refuseChannel(channel: ServerChannel, line: string): void {
  channel.on('error', () => {});
  channel.stderr.write(line + '\n');
  channel.exit(1);
  channel.end();
}

function servesPath(asked: string, paths: readonly string[] = []): boolean {
  const wanted = path.posix.normalize(asked + '/');
  return ['/', ...paths].some((served) => path.posix.normalize(served + '/') === wanted);
}

/** The key that lets this request in, or undefined. */
function authenticate(
  context: AuthContext,
  file: string,
  address: string,
  log: (message: string) => void,
  peer: string,
): AuthorizedKey | undefined {
  if (context.method !== 'publickey') return undefined;
  let keys: AuthorizedKey[];
  try {
    keys = readAuthorizedKeys(file);
  } catch (error) {
    log(`${peer}: refused: ${asGridError(error, file).message}`);
    return undefined;
  }
  // ssh2 names the key type in `algo` and the hash apart; without one it is RSA with SHA-1.
  if (context.key.algo === 'ssh-rsa' && context.hashAlgo === undefined) return undefined;
  const blob = context.key.data;
  const key = keys.find((each) => each.blob.equals(blob) && mayUse(each, address, Date.now()));
  if (!key) {
    log(`${peer}: refused key ${fingerprintOf(blob)}`);
    return undefined;
  }
  if (!context.signature) return key;
  const parsed = ssh2.utils.parseKey(`${key.type} ${key.blob.toString('base64')}`);
  if (parsed instanceof Error || !context.blob) return undefined;
  const one = (Array.isArray(parsed) ? parsed[0] : parsed) as ParsedKey;
  return one.verify(context.blob, context.signature, context.hashAlgo) ? key : undefined;
}

function parsedKey(text: Buffer, file: string): ParsedKey {
  const parsed = ssh2.utils.parseKey(text);
  const key = (Array.isArray(parsed) ? parsed[0] : parsed) as ParsedKey | Error;
  if (key instanceof Error || !key.isPrivateKey()) {
    throw new GridError('bad-format', `${file} is not an ssh host key: remove it and a new one is made`, {
      cause: key,
    });
  }
  if (key.type !== 'ssh-ed25519') {
    throw new GridError('bad-format', `the host key in ${file} is ${key.type}; it must be ssh-ed25519`);
  }
  return key;
}

/** The host key, made on first use: a temp file with mode 0600, linked to its name so that a race has one winner. */
function loadHostKey(file: string): Buffer {
  try {
    try {
      return readPrivate(file);
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw error;
    }
    mkdirSync(path.dirname(file), { recursive: true, mode: 0o700 });
    const temp = `${file}.${process.pid}.tmp`;
    const { private: text } = makeSshKey('gridvfs');
    writeFileSync(temp, text, { mode: 0o600, flag: 'wx' });
    try {
      chmodSync(temp, 0o600);
      linkSync(temp, file);
    } catch (error) {
      if (errnoOf(error) !== 'EEXIST') throw error;
    } finally {
      rmSync(temp, { force: true });
    }
    return readPrivate(file);
  } catch (error) {
    throw asGridError(error, `cannot use the host key ${file}`);
  }
}

function readPrivate(file: string): Buffer {
  if ((statSync(file).mode & 0o077) !== 0) {
    throw new GridError('denied', `the host key ${file} is open to others: run chmod 600 on it`);
  }
  return readFileSync(file);
}
