/**
 * Networks over real sockets and a real ssh tunnel: what QEMU speaks on one side, another host on the other. Machines
 * are programs here that speak QEMU's format; guests are in guests.test.ts.
 */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { Duplex, duplexPair } from 'node:stream';
import { after, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import ssh2 from 'ssh2';
import { withPrefix } from '../../src/network/frames.ts';
import { Networks } from '../../src/network/index.ts';
import { QUEUE_BYTES_MAX, StreamOutlet } from '../../src/network/outlet.ts';
import type { Outlet } from '../../src/network/switch.ts';
import { greetingBytes } from '../../src/network/trunk.ts';
import { BROADCAST, frame, macOf } from './kit.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-network-'));

/** A machine's end: listens as QEMU does, keeps what comes. */
class FakeMachine {
  readonly socketPath: string;
  readonly server: net.Server;
  bytes = Buffer.alloc(0);
  connection: net.Socket | undefined;

  constructor(name: string) {
    this.socketPath = path.join(folder, `${name}.sock`);
    this.server = net.createServer((connection) => {
      this.connection = connection;
      connection.on('error', () => {});
      connection.on('data', (piece: Buffer) => (this.bytes = Buffer.concat([this.bytes, piece])));
    });
    this.server.listen(this.socketPath);
  }

  async connected(): Promise<net.Socket> {
    await until(() => this.connection !== undefined);
    return this.connection!;
  }

  close(): void {
    this.connection?.destroy();
    this.server.close();
  }
}

async function until(what: () => boolean): Promise<void> {
  const endMs = performance.now() + 20_000;
  while (!what()) {
    if (performance.now() > endMs) assert.fail('it did not happen in time');
    await sleep(5);
  }
}

/** Two ends of one channel of an ssh connection. */
async function tunnel(): Promise<{ near: Duplex; far: Duplex; close: () => void }> {
  const host = ssh2.utils.generateKeyPairSync('ed25519');
  const far = Promise.withResolvers<Duplex>();
  const server = new ssh2.Server({ hostKeys: [host.private] }, (connection) => {
    connection.on('error', () => {});
    connection.on('authentication', (context) => context.accept());
    connection.on('session', (accept) => {
      accept().on('exec', (acceptExec) => far.resolve(acceptExec()));
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const client = new ssh2.Client();
  client.on('error', () => {});
  await new Promise<void>((resolve) => {
    client.once('ready', () => resolve());
    const { port } = server.address() as net.AddressInfo;
    client.connect({ host: '127.0.0.1', port, username: 'x' });
  });
  const near = await new Promise<Duplex>((resolve, reject) =>
    client.exec('trunk', (error, channel) => (error ? reject(error) : resolve(channel))),
  );
  return {
    near,
    far: await far.promise,
    close: () => {
      client.end();
      server.close();
    },
  };
}

suite('networks of hosts', () => {
  after(() => rmSync(folder, { recursive: true, force: true }));
  const quiet = () => {};

  test('frames cross two hosts through an ssh tunnel whole and in order, counted per machine, and stay on their network', async () => {
    const [one, two] = [new Networks('one', quiet), new Networks('two', quiet)];
    const [a, b, stranger] = ['a', 'b', 'stranger'].map((name) => new FakeMachine(name)) as [
      FakeMachine,
      FakeMachine,
      FakeMachine,
    ];
    const { near, far, close } = await tunnel();
    try {
      one.plugIn('blue', 'a', a.socketPath);
      two.plugIn('blue', 'b', b.socketPath);
      two.plugIn('red', 'stranger', stranger.socketPath);
      assert.throws(() => one.plugIn('blue', 'a', a.socketPath), { code: 'exists' });
      assert.deepEqual(await Promise.all([one.join('blue', near), two.join('blue', far)]), ['two', 'one']);
      const [toA, toB] = [await a.connected(), await b.connected()];
      await stranger.connected();
      await until(() => [one, two].every((each) => each.status()[0]!.ports.length === 2));
      toB.write(withPrefix(frame(BROADCAST, macOf(2), 'here')));
      await until(() => a.bytes.length > 0);
      a.bytes = Buffer.alloc(0);
      const digest = createHash('sha256');
      let sentBytes = 0;
      for (let batch = 0; batch < 60; batch++) {
        const frames = Array.from({ length: 40 }, (_, index) =>
          withPrefix(
            frame(macOf(2), macOf(1), Buffer.alloc(46 + (((batch * 40 + index) * 37) % 9000), batch + index)),
          ),
        );
        const bytes = Buffer.concat(frames);
        digest.update(bytes);
        sentBytes += bytes.length;
        if (!toA.write(bytes)) await new Promise((resolve) => toA.once('drain', resolve));
      }
      await until(() => b.bytes.length >= sentBytes);
      assert.equal(createHash('sha256').update(b.bytes).digest('hex'), digest.digest('hex'));
      assert.equal(stranger.bytes.length, 0);
      const { counters } = two.status()[0]!.ports.find(({ name }) => name === 'b')!;
      assert.equal(counters.framesOut, 2400);
      assert.equal(counters.bytesOut, sentBytes - 4 * 2400);
      assert.equal(two.plugOut('blue', 'b')!.framesIn, 1);
      await until(() => b.connection!.destroyed);
    } finally {
      one.closeAll();
      two.closeAll();
      for (const machine of [a, b, stranger]) machine.close();
      close();
    }
    await until(() => one.status().length === 0);
  });

  test('a machine whose socket closed is connected again, and its count goes on', async () => {
    const host = new Networks('one', quiet);
    const [a, b] = ['c', 'd'].map((name) => new FakeMachine(name)) as [FakeMachine, FakeMachine];
    try {
      for (const [name, machine] of [
        ['c', a],
        ['d', b],
      ] as const)
        host.plugIn('blue', name, machine.socketPath);
      (await a.connected()).write(withPrefix(frame(BROADCAST, macOf(1), 'first')));
      await until(() => b.bytes.length > 0);
      const before = a.connection!;
      a.connection = undefined;
      before.destroy();
      (await a.connected()).write(withPrefix(frame(BROADCAST, macOf(1), 'second')));
      await until(() => b.bytes.includes('second'));
      // Fails without the copy of `past` in #keepConnected.
      assert.equal(host.plugOut('blue', 'c')!.framesIn, 2);
    } finally {
      host.closeAll();
      a.close();
      b.close();
    }
  });

  test('a machine that takes nothing holds others up for a moment only, and its own frames are dropped', async () => {
    const host = new Networks('one', quiet);
    const [source, stuck, other] = ['e', 'f', 'g'].map((name) => new FakeMachine(name)) as [
      FakeMachine,
      FakeMachine,
      FakeMachine,
    ];
    try {
      for (const [name, machine] of [
        ['e', source],
        ['f', stuck],
        ['g', other],
      ] as const) {
        host.plugIn('blue', name, machine.socketPath);
      }
      const from = await source.connected();
      (await stuck.connected()).write(withPrefix(frame(BROADCAST, macOf(2), '')));
      (await other.connected()).write(withPrefix(frame(BROADCAST, macOf(3), '')));
      await until(() => source.bytes.length >= 36);
      stuck.connection!.pause();
      const bulk = Buffer.concat(
        Array.from({ length: 64 }, () => withPrefix(frame(macOf(2), macOf(1), Buffer.alloc(1500)))),
      );
      for (let batch = 0; batch < 80; batch++) {
        if (!from.write(bulk)) await new Promise((resolve) => from.once('drain', resolve));
      }
      const sentMs = performance.now();
      from.write(withPrefix(frame(macOf(3), macOf(1), 'in time')));
      await until(() => other.bytes.includes('in time'));
      assert.ok(performance.now() - sentMs < 2_000);
      const counters = () => host.status()[0]!.ports.find(({ name }) => name === 'f')!.counters;
      assert.ok(counters().drops.full > 1000, JSON.stringify(counters()));
      // Once it takes them again, it gets what comes: fails without `#stalled = false` in #caughtUp.
      stuck.connection!.resume();
      await until(() => {
        from.write(withPrefix(frame(macOf(2), macOf(1), 'back again')));
        return stuck.bytes.includes('back again');
      });
    } finally {
      host.closeAll();
      for (const machine of [source, stuck, other]) machine.close();
    }
  });

  test('a stream whose own queue is larger than ours is waited for, given up, and used again when it has caught up', async () => {
    const taken: (() => void)[] = [];
    const stream = new Duplex({
      writableHighWaterMark: 64 * QUEUE_BYTES_MAX,
      read() {},
      write: (_piece, _encoding, done) => void taken.push(done),
    });
    const outlet = new StreamOutlet(stream);
    const holds: string[] = [];
    const source: Outlet = {
      send: () => true,
      patience: true,
      hold() {},
      pause: () => void holds.push('pause'),
      proceed: () => void holds.push('proceed'),
    };
    while (outlet.send(Buffer.alloc(QUEUE_BYTES_MAX / 4)));
    outlet.hold(source);
    outlet.hold(source);
    await until(() => !outlet.patience);
    assert.deepEqual(holds, ['pause', 'proceed']);
    // Fails with a wait for 'drain' in place of #caughtUp.
    await until(() => {
      for (const done of taken.splice(0)) done();
      return outlet.patience;
    });
    assert.ok(outlet.send(Buffer.alloc(100)));
    stream.destroy();
  });

  test('a trunk that is for another network, leads back, or is none is refused', async () => {
    const host = new Networks('one', quiet);
    const pair = () => {
      const [near, far] = duplexPair();
      far.on('error', quiet);
      return { near, far };
    };
    for (const [bytes, code] of [
      [greetingBytes({ network: 'red', host: 'two' }), 'denied'],
      [greetingBytes({ network: 'blue', host: 'one' }), 'denied'],
      [Buffer.from('GET / HTTP/1.1\r\n'), 'bad-format'],
      [Buffer.concat([Buffer.from('GVNTRNK1'), Buffer.from([0xff, 0xff])]), 'bad-format'],
      [Buffer.concat([Buffer.from('GVNTRNK1'), Buffer.from([0, 2]), Buffer.from('[]')]), 'bad-format'],
    ] as const) {
      const { near, far } = pair();
      far.write(bytes);
      await assert.rejects(host.join('blue', near), { code });
    }
    const { near, far } = pair();
    const joined = host.join('blue', near);
    far.destroy();
    near.destroy();
    await assert.rejects(joined, { code: 'tunnel-lost' });
    assert.equal(host.status().length, 0);
  });
});
