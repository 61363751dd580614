/** The switch of a virtual network: where frames go and where they do not, and what bounds it. */
import assert from 'node:assert/strict';
import { suite, test } from 'node:test';
import { FRAME_BYTES_MAX, FrameReader, withPrefix } from '../../src/network/frames.ts';
import { MAC_AGE_SECONDS, MacTable } from '../../src/network/mac-table.ts';
import { FLOOD_PER_SECOND_MAX, Switch } from '../../src/network/switch.ts';
import { BROADCAST, frame, macOf, Probe } from './kit.ts';

/** mulberry32: the same frames for the same seed. */
function randomOf(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let value = Math.imul(state ^ (state >>> 15), 1 | state);
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
}

suite('the switch of a virtual network', () => {
  test('a frame for an address that is known goes to its port alone, for one that is not to all others', () => {
    const fabric = new Switch('blue');
    const [a, b, c] = [1, 2, 3].map((index) => new Probe(fabric, `vm${index}`)) as [Probe, Probe, Probe];
    a.give(frame(macOf(2), macOf(1), 'who?'));
    assert.deepEqual([a.taken(), b.taken(), c.taken()], [[], ['who?'], ['who?']]);
    b.give(frame(macOf(1), macOf(2), 'me'));
    assert.deepEqual([a.taken(), b.taken(), c.taken()], [['me'], [], []]);
    a.give(
      frame(macOf(2), macOf(1), 'one'),
      frame(BROADCAST, macOf(1), 'all'),
      frame(macOf(2), macOf(1), 'two'),
    );
    assert.deepEqual([a.taken(), b.taken(), c.taken()], [[], ['one', 'all', 'two'], ['all']]);
    assert.deepEqual(
      [
        a.port.counters.framesIn,
        a.port.counters.bytesIn,
        b.port.counters.framesOut,
        b.port.counters.bytesOut,
      ],
      [4, 4 * 14 + 13, 4, 4 * 14 + 13],
    );
  });

  test('an address that moved is found at its new port, one that was silent for long at none', () => {
    let nowMs = 0;
    const fabric = new Switch('blue', { now: () => nowMs });
    const [a, b, c] = [1, 2, 3].map((index) => new Probe(fabric, `vm${index}`)) as [Probe, Probe, Probe];
    b.give(frame(macOf(1), macOf(9), ''));
    c.give(frame(macOf(1), macOf(9), ''));
    for (const one of [a, b, c]) one.taken();
    a.give(frame(macOf(9), macOf(1), 'moved'));
    assert.deepEqual([b.taken(), c.taken()], [[], ['moved']]);
    nowMs = (MAC_AGE_SECONDS + 1) * 1000;
    a.give(frame(macOf(9), macOf(1), 'old'));
    // Fails without the look at the age in MacTable.find.
    assert.deepEqual([b.taken(), c.taken()], [['old'], ['old']]);
  });

  test('a port that is gone is no one’s, and its name and place can be had again', () => {
    const fabric = new Switch('blue');
    const [a, b] = [1, 2].map((index) => new Probe(fabric, `vm${index}`)) as [Probe, Probe];
    b.give(frame(BROADCAST, macOf(2), ''));
    fabric.remove(b.port);
    const c = new Probe(fabric, 'vm2');
    a.give(frame(macOf(2), macOf(1), 'x'));
    assert.deepEqual([b.taken(), c.taken()], [[], ['x']]);
    assert.throws(() => new Probe(fabric, 'vm2'), /has a port 'vm2' already/);
    b.give(frame(BROADCAST, macOf(2), 'late'));
    assert.deepEqual(c.taken(), []);
  });

  test('what came by a trunk goes out by none, so a full mesh has no loop; the middle of a star passes it on', () => {
    const fabric = new Switch('blue');
    const vm = new Probe(fabric, 'vm1');
    const [x, y] = ['x', 'y'].map((name) => new Probe(fabric, name, 'trunk')) as [Probe, Probe];
    x.give(frame(BROADCAST, macOf(5), 'all'));
    // Fails without `mayPass` in the flood of #forward.
    assert.deepEqual([vm.taken(), y.taken()], [['all'], []]);
    y.give(frame(macOf(5), macOf(6), 'known'));
    // Fails without `mayPass` in #targetOf.
    assert.deepEqual([vm.taken(), x.taken()], [[], []]);
    vm.give(frame(BROADCAST, macOf(1), 'mine'));
    assert.deepEqual([x.taken(), y.taken()], [['mine'], ['mine']]);

    const middle = new Switch('blue', { relay: true });
    const [p, q] = ['p', 'q'].map((name) => new Probe(middle, name, 'trunk')) as [Probe, Probe];
    p.give(frame(BROADCAST, macOf(1), 'across'));
    assert.deepEqual([p.taken(), q.taken()], [[], ['across']]);
  });

  test('frames for bridges, to oneself, of no sender, and of no length end at the switch and are counted', () => {
    const fabric = new Switch('blue');
    const [a, b] = [1, 2].map((index) => new Probe(fabric, `vm${index}`)) as [Probe, Probe];
    a.give(frame('01:80:c2:00:00:00', macOf(1), 'spanning tree'));
    a.give(frame('01:80:c2:00:00:0e', macOf(1), 'discovery'));
    a.give(frame(macOf(1), macOf(1), 'to oneself'));
    a.give(frame(macOf(2), BROADCAST, 'from all'));
    a.give(Buffer.alloc(13), Buffer.alloc(0));
    assert.deepEqual(b.taken(), []);
    const { drops } = a.port.counters;
    assert.deepEqual({ ...drops }, { full: 0, flood: 0, filtered: 3, malformed: 3 });
    a.give(frame('01:80:c2:00:00:10', macOf(1), 'no bridge’s'));
    assert.equal(b.taken().length, 1);
  });

  test('a machine that floods is cut to its bound, and one that invents addresses forgets only its own', () => {
    let nowMs = 1_000;
    const fabric = new Switch('blue', { now: () => nowMs });
    const [loud, calm, other] = [1, 2, 3].map((index) => new Probe(fabric, `vm${index}`)) as [
      Probe,
      Probe,
      Probe,
    ];
    calm.give(frame(BROADCAST, macOf(2), ''));
    const flood = Array.from({ length: FLOOD_PER_SECOND_MAX + 500 }, (_, index) =>
      frame(
        BROADCAST,
        `02:00:00:${((1 << 24) + index)
          .toString(16)
          .slice(1)
          .replaceAll(/(..)(?=.)/g, '$1:')}`,
      ),
    );
    loud.give(...flood);
    assert.equal(loud.port.counters.drops.flood, 500);
    assert.equal(calm.frames.length, FLOOD_PER_SECOND_MAX);
    assert.ok(fabric.addresses <= 66, `${fabric.addresses} addresses`);
    other.taken();
    loud.taken();
    other.give(frame(macOf(2), macOf(3), 'still known'));
    assert.deepEqual(loud.taken(), []);
    nowMs += 1_000;
    other.taken();
    loud.give(frame(BROADCAST, macOf(1), 'a second later'));
    assert.deepEqual(other.taken(), ['a second later']);
  });

  test('the table of addresses stays within its bound whatever it learns, and each port within its own', () => {
    const table = new MacTable();
    const random = randomOf(1);
    for (let index = 0; index < 50_000; index++) {
      table.learn((random() * 0x10000) & 0xfefe, (random() * 2 ** 32) >>> 0, index % 7, index / 100, 1000);
    }
    assert.ok(table.size <= 4096);
    for (let port = 0; port < 7; port++) table.forget(port);
    assert.equal(table.size, 0);
  });

  test('a stream in pieces of any size gives the same frames, and a length that no frame has ends it', () => {
    const random = randomOf(7);
    const frames = Array.from({ length: 300 }, () =>
      Buffer.alloc(14 + Math.floor(random() ** 4 * 60_000), random() * 256),
    );
    const stream = Buffer.concat(frames.map(withPrefix));
    for (const piecesMax of [1, 3, 100, 70_000, 600_000]) {
      const seen: Buffer[] = [];
      const reader = new FrameReader((bytes, start, end) =>
        seen.push(Buffer.from(bytes.subarray(start, end))),
      );
      for (let at = 0; at < stream.length;) {
        const next = Math.min(stream.length, at + 1 + Math.floor(random() * piecesMax));
        // Both ways in: pieces of others, and reads into its own space.
        if (piecesMax > 1 && random() < 0.5) {
          const count = Math.min(next - at, reader.space().length);
          reader.space().set(stream.subarray(at, at + count));
          assert.ok(reader.filled(count));
          at += count;
        } else {
          assert.ok(reader.push(stream.subarray(at, next)));
          at = next;
        }
      }
      assert.ok(Buffer.concat(seen).equals(stream), `pieces of up to ${piecesMax}`);
    }
    const reader = new FrameReader(() => assert.fail('no frame'));
    const head = Buffer.alloc(4);
    head.writeUInt32BE(FRAME_BYTES_MAX + 1);
    // Fails without the bound in endOfWhole.
    assert.equal(reader.push(head), false);
  });

  const count = process.env['GRIDVFS_LONG'] === '1' ? 1_000_000 : 50_000;
  test(`${count} random frames on three networks: none crashes a switch, none is on another network, none twice at a port`, () => {
    const seed = Number(process.env['GRIDVFS_SEED'] ?? Math.floor(Math.random() * 2 ** 31));
    const random = randomOf(seed);
    let nowMs = 0;
    const networks = ['red', 'green', 'blue'].map((name) => {
      const fabric = new Switch(name, { now: () => nowMs });
      const ports = Array.from(
        { length: 5 },
        (_, index) => new Probe(fabric, `p${index}`, index < 3 ? 'machine' : 'trunk'),
      );
      return { name, fabric, ports };
    });
    let sent = 0;
    let delivered = 0;
    while (sent < count) {
      const from = networks[Math.floor(random() * 3)]!;
      const port = from.ports[Math.floor(random() * 5)]!;
      const batch: Buffer[] = [];
      for (let left = 1 + Math.floor(random() * 20); left > 0; left--) {
        const bytes = Buffer.alloc(Math.floor(random() * 90));
        for (let at = 0; at < bytes.length; at++) bytes[at] = random() * 256;
        // Half of them among few addresses, which are the same on all networks.
        if (bytes.length >= 40 && random() < 0.5) {
          Buffer.from([2, 0, 0, 0, 0, random() * 8]).copy(bytes, 0);
          Buffer.from([2, 0, 0, 0, 0, random() * 8]).copy(bytes, 6);
        }
        if (bytes.length >= 40) {
          bytes.write(`${from.name} ${sent}.`.padEnd(16), 20);
        }
        batch.push(bytes);
        sent++;
      }
      assert.ok(port.give(...batch), `seed ${seed}`);
      nowMs += random() * 10;
      for (const { name, ports } of networks) {
        for (const to of ports) {
          const seen = new Set<string>();
          for (const bytes of to.frames.splice(0)) {
            delivered++;
            assert.ok(bytes.length >= 14 && to !== port, `seed ${seed}`);
            if (bytes.length < 40) continue;
            const mark = bytes.toString('latin1', 20, 36);
            assert.ok(mark.startsWith(name + ' ') && !seen.has(mark), `seed ${seed}: '${mark}' on ${name}`);
            assert.ok(
              to.port.kind === 'machine' || port.port.kind === 'machine',
              `seed ${seed}: trunk to trunk`,
            );
            seen.add(mark);
          }
        }
      }
    }
    assert.ok(delivered > count / 10);
    for (const { fabric } of networks) assert.ok(fabric.addresses <= 4096);
  });
});
