/** What the proxy's tests share: a fixture store, keys, a stock sshd, and a check that nothing stays open. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { createServer, createSshEndpoint } from '../../proxy/index.ts';
import type { ConnectOptions, ProxyServer, ServerOptions, SshEndpoint } from '../../proxy/index.ts';
import type { ChunkRef } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ErrorCode } from '../../src/core/errors.ts';
import { chunkLengthOf } from '../../src/core/manifest.ts';
import { freePort } from '../../src/core/ports.ts';
import type { ChunkSource } from '../../src/core/source.ts';
import { openStore } from '../../src/store/index.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';
import type { FixtureOptions, FixtureStore } from '../suites/fixtures.ts';

export interface Ground {
  readonly folder: string;
  readonly fixture: FixtureStore;
  /** Private keys; the first is let in by `authorizedKeys`. */
  readonly key: string;
  readonly otherKey: string;
  readonly authorizedKeys: string;
  readonly knownHosts: string;
  readonly hostKey: string;
  remove(): void;
}

export async function makeGround(options: FixtureOptions): Promise<Ground> {
  const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-proxy-'));
  const fixture = await makeFixtureStore(path.join(folder, 'fixture'), options);
  const key = path.join(folder, 'id_ed25519');
  const otherKey = path.join(folder, 'id_other');
  keygen(key);
  keygen(otherKey);
  const authorizedKeys = path.join(folder, 'authorized_keys');
  writeFileSync(authorizedKeys, readFileSync(`${key}.pub`), { mode: 0o600 });
  const knownHosts = path.join(folder, 'known_hosts');
  return {
    folder,
    fixture,
    key,
    otherKey,
    authorizedKeys,
    knownHosts,
    hostKey: path.join(folder, 'keys', 'ssh_host_ed25519_key'),
    remove: () => rmSync(folder, { recursive: true, force: true }),
  };
}

export function keygen(file: string, ...args: string[]): void {
  execFileSync('ssh-keygen', ['-q', '-N', '', '-f', file, ...(args.length > 0 ? args : ['-t', 'ed25519'])]);
}

/** Options of a client that trusts only `fingerprint`, or the ground's known_hosts, and has only the ground's key. */
export function clientOptions(ground: Ground, fingerprint?: string): ConnectOptions {
  return {
    identityPaths: [ground.key],
    agentSocket: '',
    knownHostsPaths: [ground.knownHosts],
    connectTimeoutMs: 10_000,
    ...(fingerprint === undefined ? {} : { hostKeyFingerprint: fingerprint }),
  };
}

export interface Serving {
  readonly url: string;
  readonly source: ChunkSource;
  readonly server: ProxyServer;
  readonly endpoint: SshEndpoint;
  close(): Promise<void>;
}

/** The built-in endpoint over `source` (the fixture's store when left out), which is closed with it. */
export async function serveSsh(
  ground: Ground,
  source?: ChunkSource,
  port = 0,
  options: ServerOptions = {},
): Promise<Serving> {
  const served = source ?? (await openStore(ground.fixture.storeFolder));
  const server = createServer(served, options);
  const endpoint = await createSshEndpoint({
    server,
    hostKeyPath: ground.hostKey,
    authorizedKeysPath: ground.authorizedKeys,
    listen: { host: '127.0.0.1', port },
    paths: [ground.fixture.storeFolder],
  });
  return {
    url: `ssh://gridvfs@127.0.0.1:${endpoint.address.port}${ground.fixture.storeFolder}`,
    source: served,
    server,
    endpoint,
    async close() {
      await endpoint.close();
      await server.close();
      await served.close();
    },
  };
}

/** All chunks of the fixture that are not zero. */
export function refsOf({ manifest, table }: FixtureStore): ChunkRef[] {
  return [...table.entries()].map(({ index, digest }) => ({
    digest,
    plainBytes: chunkLengthOf(manifest, index),
  }));
}

export async function failsWith(
  promise: Promise<unknown>,
  code: ErrorCode,
  text?: RegExp,
): Promise<GridError> {
  const outcome: unknown = await promise.then(
    () => 'it succeeded',
    (error: unknown) => error,
  );
  assert.ok(outcome instanceof GridError, `expected a GridError '${code}', got ${String(outcome)}`);
  assert.equal(outcome.code, code, outcome.message);
  if (text) assert.match(outcome.message, text);
  return outcome;
}

/** Waits until `holds`, at most `timeoutMs`. */
export async function until(holds: () => boolean, what: string, timeoutMs = 5000): Promise<void> {
  const end = Date.now() + timeoutMs;
  while (!holds()) {
    assert.ok(Date.now() < end, `still not: ${what}`);
    await sleep(10);
  }
}

/** Descriptors of this process that are sockets or pipes or regular files: what a leak would add to. */
export function openDescriptors(): number {
  return readdirSync('/proc/self/fd').length;
}

export interface Sshd {
  readonly port: number;
  readonly hostKey: string;
  readonly remoteCommand: string;
  stop(): Promise<void>;
}

/** OpenSSH's own server on loopback, with keys of its own, as root. */
export async function startSshd(ground: Ground): Promise<Sshd> {
  const folder = path.join(ground.folder, 'sshd');
  mkdirSync(folder);
  const hostKey = path.join(folder, 'host_key');
  keygen(hostKey);
  const port = await freePort();
  const config = path.join(folder, 'sshd_config');
  writeFileSync(
    config,
    [
      `Port ${port}`,
      'ListenAddress 127.0.0.1',
      `HostKey ${hostKey}`,
      `AuthorizedKeysFile ${ground.authorizedKeys}`,
      `PidFile ${path.join(folder, 'pid')}`,
      'PermitRootLogin prohibit-password',
      'PasswordAuthentication no',
      'KbdInteractiveAuthentication no',
      'UsePAM no',
      // The folder is below /tmp, which everybody can write.
      'StrictModes no',
      'MaxSessions 10',
    ].join('\n') + '\n',
  );
  if (!existsSync('/run/sshd')) mkdirSync('/run/sshd', { mode: 0o755 });
  const log = path.join(folder, 'log');
  const child = spawn('/usr/sbin/sshd', ['-D', '-f', config, '-E', log], { stdio: 'ignore' });
  await answering(port, child, log);
  const script = path.resolve(import.meta.dirname, 'stdio-server.ts');
  return {
    port,
    hostKey,
    remoteCommand: `${process.execPath} ${script}`,
    async stop() {
      const gone = new Promise((resolve) => child.once('exit', resolve));
      if (child.exitCode === null) {
        child.kill('SIGTERM');
        await gone;
      }
    },
  };
}

async function answering(port: number, child: ChildProcess, log: string): Promise<void> {
  for (let attempt = 0; attempt < 100; attempt++) {
    const connected = await new Promise<boolean>((resolve) => {
      const socket = net.connect(port, '127.0.0.1');
      socket.once('data', () => (socket.destroy(), resolve(true)));
      socket.once('error', () => resolve(false));
    });
    if (connected) return;
    assert.equal(
      child.exitCode,
      null,
      `sshd did not start: ${existsSync(log) ? readFileSync(log, 'utf8') : ''}`,
    );
    await sleep(50);
  }
  assert.fail('sshd did not answer');
}
