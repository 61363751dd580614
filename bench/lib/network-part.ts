/**
 * The programs of `bench/network.ts`, each a process of its own, told what to do by lines of JSON on standard input:
 *   host    a host's networks: {"plug":{network,machine,socket}}, {"listen":true} → port, {"connect":{port,network}};
 *           {"reach":{port,network,cert}} connects to a broker
 *   broker  the middle of a star for one network, by TLS: {"serve":{network,key,cert}} → port
 *   machine a machine that speaks QEMU's format on a socket: {"say":mac}, {"send":{to,from,seconds,frameBytes}}, {"count":true}
 */
import { readFileSync } from 'node:fs';
import net from 'node:net';
import { createInterface } from 'node:readline';
import type { Duplex } from 'node:stream';
import tls from 'node:tls';
import ssh2 from 'ssh2';
import { Networks } from '../../src/network/index.ts';
import { withPrefix } from '../../src/network/frames.ts';

interface Command {
  readonly plug?: { network: string; machine: string; socket: string };
  readonly listen?: true;
  readonly connect?: { port: number; network: string };
  readonly serve?: { network: string; key: string; cert: string };
  readonly reach?: { port: number; network: string; cert: string };
  readonly say?: string;
  readonly send?: { to: string; from: string; seconds: number; frameBytes: number };
  readonly count?: true;
}

const [role = '', name = ''] = process.argv.slice(2);

function broker(): (command: Command) => Promise<unknown> {
  const networks = new Networks(name, (line) => process.stderr.write(line + '\n'), { relay: true });
  return async ({ serve }) => {
    if (!serve) return {};
    const { network, key, cert } = serve;
    const server = tls.createServer({ key: readFileSync(key), cert: readFileSync(cert) }, (socket) => {
      networks.join(network, socket).catch((error: unknown) => process.stderr.write(`${String(error)}\n`));
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    return { port: (server.address() as net.AddressInfo).port };
  };
}

function host(): (command: Command) => Promise<unknown> {
  const networks = new Networks(name, (line) => process.stderr.write(line + '\n'));
  return async ({ plug, listen, connect, reach }) => {
    if (plug) networks.plugIn(plug.network, plug.machine, plug.socket);
    if (listen) {
      const key = ssh2.utils.generateKeyPairSync('ed25519');
      const server = new ssh2.Server({ hostKeys: [key.private] }, (connection) => {
        connection.on('error', () => {});
        connection.on('authentication', (context) => context.accept());
        connection.on('session', (accept) => {
          accept().on('exec', (take, _refuse, { command }) => {
            networks
              .join(command, take())
              .catch((error: unknown) => process.stderr.write(`${String(error)}\n`));
          });
        });
      });
      // As the proxy's own endpoint has it.
      const listener = net.createServer({ noDelay: true }, (socket) => server.injectSocket(socket));
      await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
      return { port: (listener.address() as net.AddressInfo).port };
    }
    if (connect) {
      const client = new ssh2.Client();
      await new Promise<void>((resolve) => {
        client.once('ready', () => resolve());
        client.connect({ host: '127.0.0.1', port: connect.port, username: 'bench' });
      });
      client.setNoDelay(true);
      const channel = await new Promise<Duplex>((resolve, reject) =>
        client.exec(connect.network, (error, made) => (error ? reject(error) : resolve(made))),
      );
      return { joined: await networks.join(connect.network, channel) };
    }
    if (reach) {
      const { port, network, cert } = reach;
      const socket = tls.connect({ host: '127.0.0.1', port, ca: readFileSync(cert) });
      await new Promise((resolve, reject) => socket.once('secureConnect', resolve).once('error', reject));
      return { joined: await networks.join(network, socket) };
    }
    return {};
  };
}

function frameOf(to: string, from: string, length: number): Buffer {
  const bytes = Buffer.alloc(length, 0x5a);
  Buffer.from(to.replaceAll(':', ''), 'hex').copy(bytes);
  Buffer.from(from.replaceAll(':', ''), 'hex').copy(bytes, 6);
  bytes.writeUInt16BE(0x88b5, 12);
  return Buffer.from(withPrefix(bytes));
}

async function machine(): Promise<(command: Command) => Promise<unknown>> {
  const connected = Promise.withResolvers<net.Socket>();
  let received = 0;
  const server = net.createServer((socket) => {
    socket.on('error', () => {});
    socket.on('data', (piece: Buffer) => (received += piece.length));
    connected.resolve(socket);
  });
  await new Promise<void>((resolve) => server.listen(name, resolve));
  return async ({ say, send, count }) => {
    const socket = await connected.promise;
    if (say) socket.write(frameOf('ff:ff:ff:ff:ff:ff', say, 60));
    if (send) {
      // As many frames to a write as a socket's buffer has room for.
      const one = frameOf(send.to, send.from, send.frameBytes);
      const batch = Buffer.concat(Array.from({ length: Math.ceil(65_536 / one.length) }, () => one));
      const endMs = performance.now() + send.seconds * 1000;
      while (performance.now() < endMs) {
        if (!socket.write(batch)) await new Promise((resolve) => socket.once('drain', resolve));
      }
    }
    return count ? { received } : {};
  };
}

const answer = role === 'host' ? host() : role === 'broker' ? broker() : await machine();
process.stdout.write('{"ready":true}\n');
for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(JSON.stringify(await answer(JSON.parse(line) as Command)) + '\n');
}
process.exit(0);
