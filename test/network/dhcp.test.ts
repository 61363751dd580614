/** Addresses on a virtual network, asked for with the bytes that clients send. */
import assert from 'node:assert/strict';
import { suite, test } from 'node:test';
import { Dhcp, LEASE_SECONDS } from '../../src/network/dhcp.ts';
import { Switch } from '../../src/network/switch.ts';
import { BROADCAST, bytesOf, frame, macOf, Probe } from './kit.ts';

const DISCOVER = 1;
const REQUEST = 3;
const RELEASE = 7;

/** A client's message within UDP, IPv4 and Ethernet. */
function question(mac: string, kind: number, options: number[][] = []): Buffer {
  const bootp = Buffer.alloc(240);
  bootp.set([1, 1, 6, 0, 0xaa, 0xbb, 0xcc, 0xdd]);
  bytesOf(mac).copy(bootp, 28);
  bootp.writeUInt32BE(0x63825363, 236);
  const data = Buffer.concat([bootp, Buffer.from([53, 1, kind, ...options.flat(), 255])]);
  const head = Buffer.alloc(28);
  head.set([0x45, 0]);
  head.writeUInt16BE(28 + data.length, 2);
  head.set([64, 17], 8);
  head.fill(0xff, 16, 20);
  head.writeUInt16BE(68, 20);
  head.writeUInt16BE(67, 22);
  head.writeUInt16BE(8 + data.length, 24);
  return frame(BROADCAST, mac, Buffer.concat([head, data]), 0x0800);
}

/** Kind and address of an answer. */
function read(answer: Buffer | undefined): { kind: number; address: string; xid: string } | undefined {
  if (answer === undefined) return undefined;
  const bootp = answer.subarray(42);
  assert.equal(answer.readUInt16BE(36), 68);
  let sum = 0;
  for (let at = 14; at < 34; at += 2) sum += answer.readUInt16BE(at);
  assert.equal((sum & 0xffff) + (sum >>> 16), 0xffff, 'the checksum of the IP header');
  return {
    kind: bootp[242]!,
    address: [...bootp.subarray(16, 20)].join('.'),
    xid: bootp.toString('hex', 4, 8),
  };
}

suite('addresses on a virtual network', () => {
  test('a machine gets the address that its MAC address has, another one of the range, each always the same', () => {
    const dhcp = new Dhcp({
      server: '10.77.0.1/24',
      range: ['10.77.0.10', '10.77.0.11'],
      leases: [{ mac: macOf(1), address: '10.77.0.10', hostName: 'web-1' }],
    });
    const fabric = new Switch('blue', { dhcp, now: () => nowMs });
    let nowMs = 0;
    const [a, b] = [1, 2].map((index) => new Probe(fabric, `vm${index}`)) as [Probe, Probe];
    const trunk = new Probe(fabric, 'trunk', 'trunk');
    const ask = (from: Probe, mac: string, kind: number, options?: number[][]) => {
      from.give(question(mac, kind, options));
      return read(from.frames.splice(0)[0]);
    };
    assert.deepEqual(ask(a, macOf(1), DISCOVER), { kind: 2, address: '10.77.0.10', xid: 'aabbccdd' });
    assert.equal(ask(a, macOf(1), REQUEST, [[50, 4, 10, 77, 0, 10]])?.kind, 5);
    assert.equal(ask(a, macOf(1), REQUEST, [[50, 4, 10, 77, 0, 99]])?.kind, 6);
    assert.equal(ask(b, macOf(2), DISCOVER)?.address, '10.77.0.11');
    assert.equal(ask(b, macOf(2), REQUEST, [[50, 4, 10, 77, 0, 11]])?.kind, 5);
    // All are given; one that is not renewed, or is given back, is there for another.
    assert.equal(ask(b, macOf(3), DISCOVER), undefined);
    nowMs = (LEASE_SECONDS + 1) * 1000;
    assert.equal(ask(b, macOf(3), DISCOVER)?.address, '10.77.0.11');
    assert.equal(ask(b, macOf(3), RELEASE), undefined);
    assert.equal(ask(b, macOf(4), DISCOVER)?.address, '10.77.0.11');
    // A client that chose another server is not answered.
    assert.equal(
      ask(a, macOf(1), REQUEST, [
        [54, 4, 10, 0, 0, 1],
        [50, 4, 10, 77, 0, 10],
      ]),
      undefined,
    );
    // None of it went anywhere else: fails without the return of TO_NOBODY behind isFor.
    assert.deepEqual([a.frames.length, b.frames.length, trunk.frames.length], [0, 0, 0]);
  });

  test("its own address is found by ARP, and others' questions go on", () => {
    const fabric = new Switch('blue', { dhcp: new Dhcp({ server: '10.77.0.1/24' }) });
    const [a, b] = [1, 2].map((index) => new Probe(fabric, `vm${index}`)) as [Probe, Probe];
    const arp = (target: string) =>
      frame(
        BROADCAST,
        macOf(1),
        Buffer.from(
          `0001080006040001${bytesOf(macOf(1)).toString('hex')}0a4d0002000000000000${target}`,
          'hex',
        ),
        0x0806,
      );
    a.give(arp('0a4d0001'));
    const [answer] = a.frames.splice(0);
    assert.equal(answer?.toString('hex', 20, 22), '0002');
    assert.equal(answer?.toString('hex', 28, 32), '0a4d0001');
    a.give(arp('0a4d0002'));
    assert.deepEqual([a.frames.length, b.frames.length], [0, 1]);
  });

  test('messages cut anywhere and options of any kind neither crash it nor are answered wrongly', () => {
    const dhcp = new Dhcp({ server: '10.77.0.1/24', range: ['10.77.0.10', '10.77.0.200'] });
    const whole = question(macOf(1), DISCOVER, [
      [50, 4, 10, 77, 0, 10],
      [12, 3, 97, 98, 99],
    ]);
    for (let end = 14; end <= whole.length; end++) {
      const cut = whole.subarray(0, end);
      const answer = dhcp.isFor(cut, 0, cut.length) ? dhcp.answer(cut, 0) : undefined;
      if (answer !== undefined) assert.ok(end > 42 + 240);
    }
    for (let seed = 0; seed < 20_000; seed++) {
      const changed = Buffer.from(whole);
      for (let turn = 0; turn < 4; turn++) {
        changed[14 + Math.floor(Math.random() * (changed.length - 14))] = Math.random() * 256;
      }
      if (dhcp.isFor(changed, 0, changed.length)) dhcp.answer(changed, 0);
    }
  });

  test('an address outside the network, of the network itself, or of another machine is refused', () => {
    const dhcp = new Dhcp({ server: '10.77.0.1/24', leases: [{ mac: macOf(1), address: '10.77.0.5' }] });
    for (const address of ['10.78.0.5', '10.77.0.0', '10.77.0.255', 'web']) {
      assert.throws(() => dhcp.assign({ mac: macOf(2), address }), { code: 'bad-request' }, address);
    }
    for (const address of ['10.77.0.1', '10.77.0.5']) {
      assert.throws(() => dhcp.assign({ mac: macOf(2), address }), { code: 'exists' }, address);
    }
    assert.throws(() => new Dhcp({ server: '10.77.0.1' }), { code: 'bad-request' });
  });
});
