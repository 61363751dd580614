/** gridvfs workspace ssh, connect, console: to a machine, by a stream through the broker and its host. */
import { spawn } from 'node:child_process';
import path from 'node:path';
import type { Command } from 'commander';
import type { VmInfo } from '../broker/index.ts';
import { asGridError } from '../core/errors.ts';
import { CONSOLE_PORT } from '../core/grid.ts';
import { withBroker, withClient } from './broker-kit.ts';
import type { Connection } from './broker-kit.ts';
import { parseCount, verb } from './kit.ts';
import { attachTo } from './vm-console.ts';

const MAIN = path.resolve(import.meta.dirname, '..', `main${path.extname(import.meta.filename)}`);
const SSH_PORT = 22;

interface SshOptions extends Connection {
  user: string;
  identity?: string;
  knownHosts?: string;
  port: number;
}

const quoted = (word: string) => `'${word.replaceAll("'", String.raw`'\''`)}'`;

function sshVerb(): Command {
  return withBroker(
    verb('ssh', 'Log in to a machine, or run a command there, with ssh; its network need not lead here.', [
      'gridvfs workspace ssh lab-1',
      'gridvfs workspace ssh lab-1 --user debian --identity ~/.ssh/id_ed25519 -- uptime',
    ]),
  )
    .argument('<vm>')
    .argument('[command...]', 'and its arguments, behind --')
    .option('--user <name>', 'of the guest', 'root')
    .option('--identity <file>', 'private key')
    .option('--known-hosts <file>', 'where ssh keeps the keys of machines (default: where it always does)')
    .option('--port <number>', 'of its ssh server', parseCount, SSH_PORT)
    .action(async (which: string, command: string[], options: SshOptions) => {
      const vm = await withClient(options, (client) =>
        client.call<VmInfo>('GET', `/v1/vms/${encodeURIComponent(which)}`),
      );
      const { broker, tokenFile, brokerCa, user, identity, knownHosts, port } = options;
      const proxy = [
        ...[process.execPath, MAIN, 'workspace', 'connect', vm.id, '--port', String(port)],
        ...(broker === undefined ? [] : ['--broker', broker]),
        ...(tokenFile === undefined ? [] : ['--token-file', tokenFile]),
        ...(brokerCa === undefined ? [] : ['--broker-ca', brokerCa]),
      ];
      const args = [
        // ssh puts what % stands for into it.
        ...['-o', `ProxyCommand=${proxy.map(quoted).join(' ').replaceAll('%', '%%')}`],
        // A machine is known by its id, wherever it runs; one that is new is taken as it is, one that changed is not.
        ...['-o', `HostKeyAlias=gridvfs-${vm.id}`, '-o', 'StrictHostKeyChecking=accept-new'],
        ...(knownHosts === undefined ? [] : ['-o', `UserKnownHostsFile=${knownHosts}`]),
        ...(identity === undefined ? [] : ['-i', identity]),
        ...[`${user}@${vm.name}`, ...command],
      ];
      process.exitCode = await new Promise<number>((resolve, reject) => {
        const child = spawn('ssh', args, { stdio: 'inherit' });
        child.once('error', (error) => reject(asGridError(error, 'cannot run ssh', 'unsupported')));
        child.once('exit', (code) => resolve(code ?? 1));
      });
    });
}

function connectVerb(): Command {
  return withBroker(
    verb('connect', 'Join standard input and output with a TCP port of a machine’s guest; `ssh` uses it.', [
      'gridvfs workspace connect lab-1 --port 80',
    ]),
  )
    .argument('<vm>')
    .option('--port <number>', 'of the guest', parseCount, SSH_PORT)
    .action(async (which: string, options: Connection & { port: number }) => {
      await withClient(options, async (client) => {
        const route = `/v1/vms/${encodeURIComponent(which)}/connect?port=${options.port}`;
        const stream = await client.upgrade(route, 'gridvfs-stream');
        process.stdin.pipe(stream);
        stream.pipe(process.stdout, { end: false });
        await new Promise((resolve) => stream.once('close', resolve));
        process.stdin.destroy();
      });
    });
}

function consoleVerb(): Command {
  return withBroker(
    verb(
      'console',
      'Attach this terminal to the serial console of a machine, wherever it runs; Ctrl-] ends it.',
      ['gridvfs workspace console lab-1'],
    ),
  )
    .argument('<vm>')
    .action(async (which: string, options: Connection) => {
      await withClient(options, async (client) => {
        const route = `/v1/vms/${encodeURIComponent(which)}/connect?port=${CONSOLE_PORT}`;
        const stream = await client.upgrade(route, 'gridvfs-stream');
        await attachTo(stream, new Promise((resolve) => stream.once('close', () => resolve())));
      });
    });
}

export const sshVerbs = (): Command[] => [sshVerb(), connectVerb(), consoleVerb()];
