/** The packet-level link emulator: its queue against the arithmetic, and whole links as a TCP client finds them. Bounds of
 * time are wide enough for a busy machine: a wrong computation is off by far more. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync, readlinkSync } from 'node:fs';
import net from 'node:net';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseLink, startNetwork } from '../../bench/link/network.ts';
import { PacketQueue } from '../../bench/link/packet-queue.ts';
import { isRoot, isRunning } from '../../src/core/linux.ts';

const namespace = () => readlinkSync('/proc/thread-self/ns/net');
/** 100 Mbit/s are 12,500 bytes a millisecond. */
const queue = (queueBytes: number) =>
  new PacketQueue({ delayMs: 15, bitsPerSecond: 100e6, queueBytes, packetBytesMax: 1500 });

describe('a packet queue', () => {
  test('delivers each packet when its bytes have been sent and the delay is over, in order and whole', () => {
    const link = queue(375_000);
    for (let each = 0; each < 200; each++) {
      link.space().fill(each, 0, 1250);
      assert.ok(link.push(1250, each % 3, 0));
    }
    const seen: number[] = [];
    const take = (atMs: number) =>
      link.deliver(atMs, (packet, receiver) => {
        assert.equal(receiver, seen.length % 3);
        assert.ok(packet.length === 1250 && packet.every((byte) => byte === seen.length));
        seen.push(packet[0]!);
      });
    take(15);
    assert.equal(seen.length, 0, 'none before the first is sent and has arrived');
    assert.ok(Math.abs(link.nextMs - 15.1) < 1e-6);
    take(15.1001);
    assert.equal(seen.length, 1);
    take(25.0001);
    assert.equal(seen.length, 100, '10 ms more are 100 packets of 0.1 ms');
    take(1000);
    assert.equal(seen.length, 200);
    assert.equal(link.nextMs, Infinity);
    assert.equal(link.deliveredBytes, 250_000);
  });

  test('drops what finds the queue full, and only that', () => {
    const link = queue(125_000);
    let taken = 0;
    for (let each = 0; each < 300; each++) if (link.push(link.space().length, 0, 0)) taken++;
    // 125,000 bytes are 83 packets of 1500.
    assert.equal(taken, 83);
    assert.equal(link.droppedPackets, 217);
    // Two packets' time later there is room for two.
    for (let each = 0; each < 5; each++) if (link.push(link.space().length, 0, 0.2401)) taken++;
    assert.equal(taken, 85);
  });

  test('keeps packets whole while its ring goes round many times, whatever their lengths', () => {
    const link = queue(30_000);
    let sent = 0;
    let got = 0;
    let now = 0;
    for (let each = 0; each < 20_000; each++) {
      const bytes = 20 + ((each * 7919) % 1481);
      link.space().fill(sent % 251, 0, bytes);
      if (link.push(bytes, 0, now)) sent++;
      now += 0.05;
      link.deliver(now, (packet) => {
        if (packet[0] !== got % 251 || packet.at(-1) !== got % 251) assert.fail(`packet ${got} is damaged`);
        got++;
      });
    }
    assert.ok(got > 10_000, `${got}`);
    link.deliver(Infinity, () => got++);
    assert.equal(got, sent);
  });
});

describe('hosts behind links of packets', { skip: isRoot() ? false : 'needs root', timeout: 150_000 }, () => {
  test('a round trip and a rate are as asked for, for each host, and nothing is left after', async () => {
    const before = namespace();
    const links = [parseLink('lan', '0.2ms,1gbit'), parseLink('wan', '40ms,20mbit')];
    const network = await startNetwork('packets', links, 2);
    try {
      assert.notEqual(namespace(), before, 'the test is the first host now');
      // Never much better than asked for (a reader that was late finds more waiting); and as good, as soon as the machine lets the link run.
      for (let asGood = false; !asGood;) {
        const wan = await network.measure('wan');
        assert.ok(wan.rttMs >= 39.9, `${wan.rttMs} ms`);
        assert.ok(wan.bitsPerSecond < 30e6, `${wan.bitsPerSecond} is more than the rate`);
        asGood = wan.rttMs < 60 && wan.bitsPerSecond > 16e6;
      }
      const lan = await network.measure('lan');
      assert.ok(lan.bitsPerSecond < 1.02e9, JSON.stringify(lan));
      for (const link of ['lan', 'wan']) {
        const { toHostsBytes, toOriginBytes } = await network.carried(link);
        assert.ok(toHostsBytes > 1e5 && toOriginBytes > 1e3, `${link}: ${toHostsBytes}`);
      }
      // The second host reaches the origin over the same link: a handshake costs a round trip.
      const server = net.createServer((socket) => socket.end(String(socket.remoteAddress)));
      await network.atOrigin(async () => {
        server.listen(0, network.listen);
        await once(server, 'listening');
      });
      const { host, port } = await network.reach('wan', (server.address() as AddressInfo).port);
      const program = `const s = require('net').connect(${port}, '${host}'); s.pipe(process.stdout)`;
      const child = network.onHost(1, () =>
        spawn(process.execPath, ['-e', program], { stdio: ['ignore', 'pipe', 'inherit'] }),
      );
      const [said] = (await once(child.stdout, 'data')) as [Buffer];
      assert.equal(said.toString(), '10.77.1.3');
      await once(child, 'close');
      server.close();
      await once(server, 'close');
    } finally {
      await network.close();
    }
    assert.equal(namespace(), before, 'the test is where it was');
    const devices = execFileSync('ip', ['-o', 'link']).toString();
    assert.ok(!/\b(lan|wan)\d*[:@]/.test(devices), devices);
  });

  test('a bench that is killed leaves no process and no device', async () => {
    const file = path.resolve(import.meta.dirname, '../../bench/link/network.ts');
    const program = `
      const { parseLink, startNetwork } = await import(${JSON.stringify(file)});
      await startNetwork('packets', [parseLink('wan', '40ms,20mbit')]);
      const { execFileSync } = await import('node:child_process');
      console.log(execFileSync('pgrep', ['-P', String(process.pid), 'node']).toString().trim());
      setInterval(() => {}, 1000);`;
    const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string];
    const pid = Number(line);
    assert.ok(isRunning(pid) && readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('tun.ts'), line);
    child.kill('SIGKILL');
    await once(child, 'close');
    while (isRunning(pid)) await sleep(20);
    assert.ok(!existsSync(`/proc/${pid}/ns/net`));
  });

  test('a wrong setting is refused before anything is made', async () => {
    const before = namespace();
    await assert.rejects(startNetwork('packets', [parseLink('wan', '40ms,none')]), /needs a rate/);
    assert.throws(() => parseLink('wan', '40ms'), /--wan 40ms: write RTT,RATE/);
    assert.throws(() => parseLink('wan', '1min,1mbit'), /10 s at most/);
    assert.equal(namespace(), before);
  });
});
