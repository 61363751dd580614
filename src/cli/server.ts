/** gridvfs server: a store for other hosts, through the built-in ssh endpoint, stdio under a stock sshd, or http. */
import path from 'node:path';
import { isIP } from 'node:net';
import type { Command } from 'commander';
import { checkAuthorizedKeys, createServer, createSshEndpoint, serveStdio } from '../../proxy/index.ts';
import { GridError } from '../core/errors.ts';
import { giveBackMemory } from '../core/memory.ts';
import { openStore } from '../store/index.ts';
import { applyConfig } from './config.ts';
import { jsonOption, parseListen, verb } from './kit.ts';
import { configPath, stateRoot } from './paths.ts';

interface Options {
  stdio?: boolean;
  acceptUploads?: boolean;
  ssh?: { host: string; port: number };
  listen?: { host: string; port: number };
  hostKey?: string;
  authorizedKeys?: string;
  config?: string;
  json?: boolean;
}

export function serverVerb(): Command {
  const command = verb('server', 'Serve a store to the proxies of other hosts.', [
    'gridvfs server /srv/store --ssh 0.0.0.0:2222 --authorized-keys /etc/gridvfs/authorized_keys',
    'gridvfs server /srv/store --listen 127.0.0.1:8080   # plain http, loopback only',
    'gridvfs server /srv/store --stdio                   # what a stock sshd runs for a proxy',
  ])
    .argument('<store>', 'folder')
    .option('--ssh <host:port>', 'built-in ssh endpoint: offers the tunnel and nothing else', parseListen)
    .option(
      '--listen <host:port>',
      'plain http, without authentication: loopback only; also /metrics and /healthz',
      parseListen,
    )
    .option('--stdio', 'serve standard input and output: the remote command of a stock sshd')
    .option(
      '--accept-uploads',
      'let everybody who comes over ssh make new images and move tags (clone push, clone commit); for single keys: the same in their forced command=',
    )
    .option('--host-key <file>', 'private host key of the ssh endpoint; made on first use')
    .option('--authorized-keys <file>', 'public keys that the ssh endpoint lets in')
    .option('--config <file>', 'configuration file (TOML)')
    .addOption(jsonOption());
  return command.action(async (folder: string) => {
    const given = command.opts<Options>();
    applyConfig(command, 'server', given.config);
    await serve(path.resolve(folder), command.opts<Options>());
  });
}

async function serve(folder: string, options: Options): Promise<void> {
  if (!options.stdio && !options.ssh && !options.listen) {
    throw new GridError('bad-request', 'say how to serve: --ssh HOST:PORT, --listen HOST:PORT or --stdio');
  }
  if (options.listen && !isLoopback(options.listen.host)) {
    throw new GridError(
      'bad-request',
      `--listen ${options.listen.host} is not a loopback address, and plain http lets everybody in; use --ssh for other hosts`,
    );
  }
  const authorizedKeys = options.authorizedKeys ?? path.join(path.dirname(configPath()), 'authorized_keys');
  if (options.ssh) checkAuthorizedKeys(authorizedKeys);
  const store = await openStore(folder);
  // Loaded where somebody can scrape it: a stdio server starts once for each channel and should start fast.
  const metrics = options.stdio
    ? undefined
    : (await import('../../proxy/server-metrics.ts')).createServerMetrics();
  const server = createServer(store, {
    ...(metrics ? { metrics } : {}),
    ...(options.acceptUploads === undefined ? {} : { acceptUploads: options.acceptUploads }),
  });
  await using stack = new AsyncDisposableStack();
  stack.defer(() => store.close());
  stack.defer(() => server.close());
  stack.defer(giveBackMemory());
  if (options.stdio) {
    await serveStdio(server);
    return;
  }
  const listening: Record<string, string> = {};
  if (options.ssh) {
    const endpoint = await createSshEndpoint({
      server,
      hostKeyPath: options.hostKey ?? path.join(stateRoot(), 'ssh_host_ed25519_key'),
      authorizedKeysPath: authorizedKeys,
      listen: options.ssh,
      paths: [folder],
    });
    stack.defer(() => endpoint.close());
    listening['ssh'] = `ssh://${endpoint.address.address}:${endpoint.address.port}${folder}`;
    listening['fingerprint'] = endpoint.fingerprint;
  }
  if (options.listen) {
    const address = await server.listen(options.listen);
    if (typeof address === 'object') listening['http'] = `http://${options.listen.host}:${address.port}/`;
  }
  // Before it is said that there is something to end.
  const ended = new Promise<void>((resolve) => {
    process.once('SIGTERM', resolve);
    process.once('SIGINT', resolve);
  });
  process.stdout.write(
    options.json
      ? JSON.stringify({ store: folder, ...listening }) + '\n'
      : [`serving ${folder}`, ...Object.entries(listening).map(([key, value]) => `  ${key}: ${value}`)].join(
          '\n',
        ) + '\n',
  );
  await ended;
}

function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'));
}
