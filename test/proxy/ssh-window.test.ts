/** The wider window of a channel, between ssh2's own client and server. */
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import net from 'node:net';
import type { AddressInfo } from 'node:net';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import ssh2 from 'ssh2';
import type { ClientChannel, ServerChannel } from 'ssh2';
import { makeSshKey } from '../../proxy/ssh-key.ts';
import { widenWindow } from '../../proxy/ssh-window.ts';
import { MIB } from '../../src/core/limits.ts';

/** ssh2's window, and the half of it that it gives once more before its own buffer is full. */
const SSH2_BYTES = 3 * MIB;

interface Pair extends AsyncDisposable {
  readonly near: ClientChannel;
  readonly far: ServerChannel;
  /** Bytes that came over the connection. */
  received(): number;
}

async function channelPair(): Promise<Pair> {
  const far = Promise.withResolvers<ServerChannel>();
  const server = new ssh2.Server({ hostKeys: [makeSshKey('test').private] }, (connection) => {
    connection.on('error', () => {});
    connection.on('authentication', (context) => context.accept());
    connection.on('session', (accept) => accept().on('exec', (take) => far.resolve(take())));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const socket = net.connect((server.address() as AddressInfo).port, '127.0.0.1');
  const client = new ssh2.Client();
  client.connect({ sock: socket, username: 'test', password: 'test' });
  await new Promise<void>((resolve, reject) => client.once('ready', resolve).once('error', reject));
  const near = await new Promise<ClientChannel>((resolve, reject) =>
    client.exec('test', (error, channel) => (error ? reject(error) : resolve(channel))),
  );
  return {
    near,
    far: await far.promise,
    received: () => socket.bytesRead,
    async [Symbol.asyncDispose]() {
      client.destroy();
      await new Promise<void>((resolve) => server.close(() => resolve()));
    },
  };
}

/** What came over the connection once nothing more comes. */
async function settled(pair: Pair): Promise<number> {
  for (let before = -1; ;) {
    const now = pair.received();
    if (now === before && now > MIB) return now;
    before = now;
    await sleep(150);
  }
}

test('a reader that stands still has so much more under way, no further, and gets every byte', async () => {
  await using pair = await channelPair();
  assert.equal(widenWindow(pair.near, 6 * MIB), true);
  const bytes = randomBytes(40 * MIB);
  pair.far.write(bytes);
  const held = await settled(pair);
  assert.ok(held > SSH2_BYTES + 5.9 * MIB && held < SSH2_BYTES + 6.5 * MIB, `${held} bytes held`);
  // The count of ssh2 was 0 on the way, at which it drops what comes.
  const hash = createHash('sha256');
  let length = 0;
  for await (const piece of pair.near) {
    hash.update(piece as Buffer);
    length += (piece as Buffer).length;
    if (length === bytes.length) break;
  }
  assert.equal(hash.digest('hex'), createHash('sha256').update(bytes).digest('hex'));
});

test('a channel that looks otherwise inside stays as it was', () => {
  assert.equal(widenWindow({} as ClientChannel, MIB), false);
});
