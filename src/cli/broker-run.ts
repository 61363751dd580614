/** gridvfs broker run: the broker in the foreground, and where it keeps things. */
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import type { Command } from 'commander';
import { BrokerClient, readToken } from '../agent/broker-client.ts';
import { Broker, serveBroker } from '../broker/index.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { Networks } from '../network/index.ts';
import { applyConfig } from './config.ts';
import { jsonOption, parseListen, verb } from './kit.ts';
import { runtimeRoot, stateRoot } from './paths.ts';

export const brokerSocket = () => path.join(runtimeRoot(), 'broker.sock');
export const stateFolder = () => path.join(stateRoot(), 'broker');
/** The first operator's token, made with the database. */
export const operatorToken = (folder: string) => path.join(folder, 'operator.token');

export function readFile(file: string): Buffer {
  try {
    return readFileSync(file);
  } catch (error) {
    throw asGridError(error, `cannot read ${file}`);
  }
}

interface RunOptions {
  database?: string;
  stateDir?: string;
  socket?: string;
  listen?: { host: string; port: number };
  tlsKey?: string;
  tlsCert?: string;
  config?: string;
  json?: boolean;
}

/** gridvfs broker run */
export function runVerb(): Command {
  const command = verb('run', 'Run the broker in the foreground, for systemd and containers.', [
    'gridvfs broker run',
    'gridvfs broker run --listen 0.0.0.0:7443 --tls-key key.pem --tls-cert cert.pem',
    'gridvfs broker run --database postgres://grid@db.example.org/grid',
  ])
    .option('--database <where>', 'file, or postgres://… (default: a file in the state folder)')
    .option('--state-dir <folder>', 'where the database and the first operator’s token are kept')
    .option('--socket <path>', 'unix socket to listen on')
    .option('--listen <host:port>', 'TCP address; other than loopback only with TLS', parseListen)
    .option('--tls-key <file>', 'private key (PEM)')
    .option('--tls-cert <file>', 'certificate chain (PEM)')
    .option('--config <file>', 'configuration file (TOML)')
    .addOption(jsonOption());
  return command.action(async () => {
    applyConfig(command, 'broker', command.opts<RunOptions>().config);
    await runBroker(command.opts<RunOptions>());
  });
}

async function runBroker(options: RunOptions): Promise<void> {
  const { listen, tlsKey, tlsCert } = options;
  if ((tlsKey === undefined) !== (tlsCert === undefined)) {
    throw new GridError('bad-request', '--tls-key and --tls-cert go together');
  }
  if (listen && tlsKey === undefined && !/^(127\.[\d.]+|localhost|::1)$/.test(listen.host)) {
    throw new GridError(
      'bad-request',
      `--listen ${listen.host} is not a loopback address: tokens would cross the network in the clear; add --tls-key and --tls-cert`,
    );
  }
  const log = (line: string) => void process.stderr.write(`${new Date().toISOString()} ${line}\n`);
  const folder = path.resolve(options.stateDir ?? stateFolder());
  const socket = path.resolve(options.socket ?? brokerSocket());
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  mkdirSync(path.dirname(socket), { recursive: true, mode: 0o700 });
  await using stack = new AsyncDisposableStack();
  const ended = new Promise<string>((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => resolve(signal));
  });
  const broker = await Broker.open({
    database: options.database ?? path.join(folder, 'broker.db'),
    log,
    relay: new Networks('broker', log, { relay: true }),
  });
  stack.defer(() => broker.close());
  const tokenFile = operatorToken(folder);
  if (await broker.access.isEmpty()) {
    writeFileSync(tokenFile, (await broker.access.create('operator', 'operator')).token + '\n', {
      mode: 0o600,
    });
  }
  await refuseSecond(socket, tokenFile);
  const server = await serveBroker(broker, {
    socketPath: socket,
    ...(listen === undefined ? {} : { listen }),
    ...(tlsKey === undefined ? {} : { tls: { key: readFile(tlsKey), cert: readFile(tlsCert!) } }),
  });
  stack.defer(() => server.close());
  const scheme = tlsKey === undefined ? 'http' : 'https';
  const ready = {
    socket,
    ...(listen === undefined ? {} : { url: `${scheme}://${listen.host}:${server.port}` }),
    operatorTokenFile: tokenFile,
  };
  process.stdout.write(
    options.json
      ? JSON.stringify(ready) + '\n'
      : Object.entries(ready)
          .map(([key, value]) => `${key}: ${value}\n`)
          .join(''),
  );
  log(`${await ended}: stopping`);
}

/** A socket that a killed broker left is removed; one that somebody answers is not ours to take. */
async function refuseSecond(socket: string, tokenFile: string): Promise<void> {
  if (!existsSync(socket)) return;
  const client = new BrokerClient({
    url: `unix:${socket}`,
    token: existsSync(tokenFile) ? readToken(tokenFile) : 'none',
  });
  try {
    await client.call('GET', '/healthz', undefined, { timeoutMs: 2_000 });
  } catch (error) {
    if (error instanceof GridError && error.code === 'unreachable') {
      rmSync(socket, { force: true });
      return;
    }
  } finally {
    client.close();
  }
  throw new GridError('in-use', `another broker listens on ${socket}; stop it, or choose with --socket`);
}
