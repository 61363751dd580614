/** The link emulator against its settings. Tolerances are wide enough for a busy machine: a wrong computation is
 * off by far more. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import net from 'node:net';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, describe, test } from 'node:test';
import { LinkRelay, QUEUE_BYTES } from '../../bench/link/relay.ts';
import { parseAddress, parseDuration, parseRate } from '../../bench/link/units.ts';

const MBIT = 1e6;

/** Far end: `e` echoes, `s<n>` sends n bytes, `h` hashes what comes and answers at its end, `w` reads nothing. */
let far: net.Server;
let to: { host: string; port: number };
const farSockets = new Set<net.Socket>();

before(async () => {
  far = net.createServer({ noDelay: true, allowHalfOpen: true }, (socket) => {
    farSockets.add(socket);
    socket.once('close', () => farSockets.delete(socket));
    socket.on('error', () => {});
    socket.once('data', (first: Buffer) => {
      const mode = String.fromCharCode(first[0]!);
      if (mode === 'e') {
        socket.write(first.subarray(1));
        socket.on('data', (piece) => socket.write(piece));
      } else if (mode === 's') socket.end(Buffer.alloc(Number(first.subarray(1).toString()), 7));
      else if (mode === 'w') socket.pause();
      else {
        const hash = createHash('sha256').update(first.subarray(1));
        socket.on('data', (piece) => hash.update(piece));
        socket.once('end', () => socket.end(hash.digest('hex')));
      }
    });
  });
  far.listen(0, '127.0.0.1');
  await once(far, 'listening');
  to = { host: '127.0.0.1', port: (far.address() as net.AddressInfo).port };
});

after(() => {
  for (const socket of farSockets) socket.destroy();
  far.close();
});

async function withRelay(
  rttMs: number,
  bitsPerSecond: number,
  body: (relay: LinkRelay) => Promise<void>,
): Promise<void> {
  const relay = await LinkRelay.start({ listen: { host: '127.0.0.1', port: 0 }, to, rttMs, bitsPerSecond });
  try {
    await body(relay);
  } finally {
    await relay.close();
  }
  assert.equal(relay.sockets, 0, 'the relay keeps no socket');
}

async function connect(relay: LinkRelay): Promise<net.Socket> {
  const socket = net.connect({ ...relay.address, noDelay: true, allowHalfOpen: true });
  socket.on('error', () => {});
  await once(socket, 'connect');
  return socket;
}

/** From the request to the last byte: a reader that comes late to the first one must not take the rest for fast. */
async function bitsPerSecondOf(relay: LinkRelay, bytes: number): Promise<number> {
  const socket = await connect(relay);
  const startMs = performance.now();
  socket.write(`s${bytes}`);
  let received = 0;
  socket.on('data', (piece: Buffer) => (received += piece.length));
  await once(socket, 'end');
  const elapsedMs = performance.now() - startMs;
  socket.destroy();
  return (received * 8000) / elapsedMs;
}

// A lost wake-up hangs: say so in seconds, not when the runner gives up.
describe('the link emulator', { timeout: 60_000 }, () => {
  test('a round trip takes its time, and a new connection one more', async () => {
    await withRelay(40, 100 * MBIT, async (relay) => {
      // Never less; and not more either, when the machine lets the relay run: the best of a few tries.
      let firstMs = Infinity;
      for (let attempt = 0; attempt < 5 && firstMs >= 130; attempt++) {
        const startMs = performance.now();
        const one = await connect(relay);
        one.write('ex');
        await once(one, 'data');
        firstMs = Math.min(firstMs, performance.now() - startMs);
        one.destroy();
      }
      assert.ok(firstMs >= 79 && firstMs < 130, `first answer after ${firstMs} ms`);
      const socket = await connect(relay);
      socket.write('ex');
      await once(socket, 'data');
      const trips: number[] = [];
      for (let i = 0; i < 15; i++) {
        const sentMs = performance.now();
        socket.write('y');
        await once(socket, 'data');
        trips.push(performance.now() - sentMs);
      }
      socket.destroy();
      trips.sort((a, b) => a - b);
      assert.ok(trips[0]! >= 39.5, `shortest ${trips[0]} ms`);
      assert.ok(trips[2]! < 46, `third of fifteen ${trips[2]} ms`);
    });
  });

  for (const [rate, bytes] of [
    [100 * MBIT, 6e6],
    [1000 * MBIT, 60e6],
  ] as const) {
    test(`${rate / MBIT} Mbit/s is that much and not more`, async () => {
      await withRelay(20, rate, async (relay) => {
        // Never more than the rate; and the rate, when the machine lets the relay run: the best of a few tries.
        let best = 0;
        for (let attempt = 0; attempt < 5 && best < rate * 0.9; attempt++) {
          const measured = await bitsPerSecondOf(relay, bytes);
          assert.ok(measured < rate * 1.05, `${measured / MBIT} Mbit/s`);
          best = Math.max(best, measured);
        }
        assert.ok(best > rate * (rate > 500 * MBIT ? 0.3 : 0.8), `${best / MBIT} Mbit/s at best`);
      });
    });
  }

  test('connections share the rate of a direction, and the directions do not share', async () => {
    await withRelay(10, 80 * MBIT, async (relay) => {
      let bestMs = Infinity;
      let tries = 0;
      for (; tries < 5 && bestMs >= 700; tries++) {
        const startMs = performance.now();
        await Promise.all([
          bitsPerSecondOf(relay, 2e6),
          bitsPerSecondOf(relay, 2e6),
          upload(relay, randomBytes(4e6)),
        ]);
        bestMs = Math.min(bestMs, performance.now() - startMs);
      }
      // 4 MB at 10 MB/s each way; one after the other would be 800.
      assert.ok(bestMs > 400 && bestMs < 700, `${bestMs} ms`);
      const { forward, backward } = relay.bytes();
      assert.ok(forward >= tries * 4e6 && forward < tries * (4e6 + 1000), `${forward} forward`);
      assert.ok(backward >= tries * 4e6 && backward < tries * (4e6 + 1000), `${backward} backward`);
    });
  });

  async function upload(relay: LinkRelay, content: Buffer): Promise<void> {
    const socket = await connect(relay);
    socket.write('h');
    socket.end(content);
    const [digest] = (await once(socket, 'data')) as [Buffer];
    assert.equal(digest.toString(), createHash('sha256').update(content).digest('hex'));
    socket.destroy();
  }

  test('content arrives in order and whole, also the end of a half-closed connection', async () => {
    await withRelay(5, Infinity, async (relay) => {
      await Promise.all(Array.from({ length: 8 }, () => upload(relay, randomBytes(3e6))));
    });
  });

  test('a sender is held back when the far end does not read', async () => {
    await withRelay(20, 1000 * MBIT, async (relay) => {
      const socket = await connect(relay);
      socket.write('w');
      await sleep(100);
      for (let i = 0; i < 64; i++) socket.write(Buffer.alloc(1024 * 1024));
      await sleep(500);
      // Delivered to the far socket's buffers at most: the pipe's own bound, and what the kernel takes.
      const inRelay = relay.bytes().forward;
      assert.ok(inRelay < 32 * QUEUE_BYTES, `${inRelay} bytes were taken`);
      socket.destroy();
    });
  });

  test('a stall delays and loses nothing', async () => {
    await withRelay(2, 100 * MBIT, async (relay) => {
      const socket = await connect(relay);
      socket.write('e');
      await sleep(50);
      relay.stall(300);
      const sentMs = performance.now();
      socket.write('z');
      const [echo] = (await once(socket, 'data')) as [Buffer];
      assert.equal(echo.toString(), 'z');
      const waitedMs = performance.now() - sentMs;
      assert.ok(waitedMs >= 299 && waitedMs < 600, `${waitedMs} ms`);
      socket.destroy();
    });
  });

  test('a cut drops connections and refuses new ones until it is restored on the same port', async () => {
    await withRelay(2, 100 * MBIT, async (relay) => {
      const { port } = relay.address;
      const socket = await connect(relay);
      const dropped = new Promise((resolve) => {
        socket.once('end', resolve);
        socket.once('close', resolve);
      });
      socket.resume();
      await relay.cut();
      await dropped;
      socket.destroy();
      const refused = net.connect(relay.address);
      refused.once('connect', () => refused.destroy(new Error('was let in')));
      const [error] = (await once(refused, 'error')) as [NodeJS.ErrnoException];
      assert.equal(error.code, 'ECONNREFUSED');
      await relay.restore();
      assert.equal(relay.address.port, port);
      await upload(relay, randomBytes(1000));
    });
  });

  test('as a process it says where it listens, obeys, and counts on SIGTERM', async () => {
    const main = path.resolve(import.meta.dirname, '../../bench/link/main.ts');
    const child = spawn(
      process.execPath,
      [main, '--to', `127.0.0.1:${to.port}`, '--rtt', '4ms', '--rate', '50mbit'],
      { stdio: ['pipe', 'pipe', 'inherit'] },
    );
    try {
      const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
      const next = async () => JSON.parse((await lines.next()).value as string) as Record<string, unknown>;
      const { listening } = await next();
      const socket = net.connect(parseAddress(String(listening)));
      socket.on('error', () => {});
      socket.write('s1000');
      socket.resume();
      await once(socket, 'end');
      socket.destroy();
      child.stdin.write('stall 1ms\n');
      assert.equal((await next())['done'], 'stall');
      child.stdin.write('jump\n');
      assert.match(String((await next())['reason']), /jump/);
      child.kill('SIGTERM');
      assert.deepEqual(await next(), { forward: 5, backward: 1000 });
      if (child.exitCode === null) await once(child, 'exit');
      assert.equal(child.exitCode, 0);
    } finally {
      child.kill('SIGKILL');
    }
  });

  test('durations, rates and addresses are read as written, and nonsense is refused', () => {
    assert.deepEqual(['0', '30ms', '1.5s', '500us', '1min'].map(parseDuration), [0, 30, 1500, 0.5, 60_000]);
    assert.deepEqual(['100mbit', '1Gbit', '64kbit/s', 'none'].map(parseRate), [
      100 * MBIT,
      1000 * MBIT,
      64_000,
      Infinity,
    ]);
    assert.deepEqual(parseAddress('[::1]:22'), { host: '::1', port: 22 });
    for (const text of ['', '30', '-1ms', 'ms', '1e3ms'])
      assert.throws(() => parseDuration(text), RangeError);
    for (const text of ['', '0mbit', '100', 'fast', '-5mbit'])
      assert.throws(() => parseRate(text), RangeError);
    for (const text of ['host', ':22', 'host:99999']) assert.throws(() => parseAddress(text), RangeError);
  });
});
