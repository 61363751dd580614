/** The bulk window against a link that is computed, not waited for. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { KIB } from '../../src/core/limits.ts';
import { BulkWindow } from '../../proxy/bulk-window.ts';

const CHUNK = { storedBytes: 80 * KIB, plainBytes: 256 * KIB };

/** A link with bulk to carry without end. */
class Link {
  readonly window = new BulkWindow();
  nowMs = 1000;
  #underWayBytes = 0;
  #freeMs = 0;
  /** When each chunk under way arrives, in order. */
  readonly #arrivals: { atMs: number; firstOfAnswer: boolean }[] = [];
  readonly #rtMs: number;
  readonly #bytesPerMs: number;

  constructor(rtMs: number, bitsPerSecond: number) {
    this.#rtMs = rtMs;
    this.#bytesPerMs = bitsPerSecond / 8000;
  }

  get productBytes(): number {
    return this.#rtMs * this.#bytesPerMs;
  }

  /** Bulk for `ms`; what of the link it used, from 0 to 1. */
  run(ms: number): number {
    const untilMs = this.nowMs + ms;
    let bytes = 0;
    while (this.nowMs < untilMs) {
      let first = true;
      while (!this.window.isFull(this.#underWayBytes)) {
        this.#freeMs = Math.max(this.#freeMs, this.nowMs) + CHUNK.storedBytes / this.#bytesPerMs;
        this.#arrivals.push({ atMs: this.#freeMs + this.#rtMs, firstOfAnswer: first });
        this.#underWayBytes += CHUNK.storedBytes;
        first = false;
      }
      this.window.onHeldBack();
      const { atMs, firstOfAnswer } = this.#arrivals.shift()!;
      const sentMs = this.nowMs;
      this.nowMs = atMs;
      if (firstOfAnswer) this.window.onRoundTrip(Math.max(this.#rtMs, atMs - sentMs), atMs);
      this.#underWayBytes -= CHUNK.storedBytes;
      bytes += CHUNK.storedBytes;
      this.window.onChunk(CHUNK.storedBytes, CHUNK.plainBytes, atMs);
    }
    return bytes / (ms * this.#bytesPerMs);
  }
}

for (const [rtMs, mbit] of [
  [30, 100],
  [150, 50],
  [50, 1000],
] as const) {
  test(`${rtMs} ms, ${mbit} Mbit/s: the link is full within ten round trips, and little queues on it`, () => {
    const link = new Link(rtMs, mbit * 1e6);
    link.run(Math.max(10 * rtMs, 600));
    const used = link.run(2000);
    assert.ok(used > 0.95, `${(100 * used).toFixed(0)} % used`);
    const products = link.window.bytes / link.productBytes;
    assert.ok(products > 1.5 && products < 2.6, `${products.toFixed(2)} × bandwidth × delay`);
  });
}

test('the first second of bulk uses most of a link of 150 ms and 50 Mbit/s', () => {
  const used = new Link(150, 50e6).run(1000);
  assert.ok(used > 0.7, `${(100 * used).toFixed(0)} % used`);
});

test('the first half second of bulk uses much of a link of 50 ms and 1 Gbit/s', () => {
  const used = new Link(50, 1e9).run(500);
  assert.ok(used > 0.4, `${(100 * used).toFixed(0)} % used`);
});

test('bulk goes out again when a batch has room, not for each chunk that came', () => {
  const { window } = new Link(30, 100e6);
  assert.equal(window.isFull(0), false);
  assert.equal(window.isFull(window.bytes - 1), true);
  assert.equal(window.isFull(0.95 * window.bytes), true);
  assert.equal(window.isFull(0.85 * window.bytes), false);
});

test('a time in which little was asked for makes no smaller window', () => {
  const link = new Link(30, 100e6);
  link.run(2000);
  const before = link.window.bytes;
  for (let nth = 0; nth < 200; nth++)
    link.window.onChunk(CHUNK.storedBytes, CHUNK.plainBytes, (link.nowMs += 40));
  assert.ok(link.window.bytes >= before * 0.95, `${link.window.bytes} of ${before}`);
});

test('one answer of some chunks says what the link carries, and many slow ones do not make it forget', () => {
  const window = new BulkWindow();
  let nowMs = 1000;
  const answer = (bytesPerMs: number) => {
    const train = { startBytes: 0 };
    for (let nth = 0; nth < 12; nth++)
      window.onChunk(CHUNK.storedBytes, CHUNK.plainBytes, (nowMs += CHUNK.storedBytes / bytesPerMs), train);
    nowMs += 1000;
  };
  assert.equal(window.bytesPerSecond, undefined);
  answer(6250);
  const rate = window.bytesPerSecond!;
  assert.ok(rate > 6.0e6 && rate < 6.5e6, `${rate}`);
  for (let nth = 0; nth < 20; nth++) answer(1000);
  assert.ok(window.bytesPerSecond! >= rate, `${window.bytesPerSecond}`);
});

test('a link that became slower gets a smaller window', () => {
  const fast = new Link(30, 100e6);
  fast.run(2000);
  const { window } = fast;
  const before = window.bytes;
  for (let nth = 0; nth < 200; nth++) {
    window.onHeldBack();
    window.onChunk(CHUNK.storedBytes, CHUNK.plainBytes, (fast.nowMs += 40));
  }
  assert.ok(window.bytes < before / 2, `${window.bytes} of ${before}`);
});

test('a stand-still of this process does not pass for a fast link', () => {
  const link = new Link(30, 100e6);
  link.run(2000);
  const before = link.window.bytes;
  // What came meanwhile is read at once: all that was under way.
  link.nowMs += 400;
  const chunks = Math.floor(before / CHUNK.storedBytes);
  for (let nth = 0; nth < chunks; nth++)
    link.window.onChunk(CHUNK.storedBytes, CHUNK.plainBytes, (link.nowMs += 0.1));
  link.run(1000);
  assert.ok(link.window.bytes < before * 1.5, `${link.window.bytes} after ${before}`);
});
