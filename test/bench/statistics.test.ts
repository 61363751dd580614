/** Intervals of medians against the binomial's own numbers, ratios of interleaved runs, and verdicts of promises. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { promise } from '../../bench/lib/record.ts';
import { medianInterval, ratioOf, summaryOf } from '../../bench/lib/statistics.ts';

test('the interval of a median is that of the sign test', () => {
  const to = (n: number) => Array.from({ length: n }, (_, index) => index + 1);
  // 1 - 2 · (1/2)^7, and so on: tables of the sign test.
  assert.deepEqual(medianInterval(to(7)), { low: 1, high: 7, confidence: 1 - 2 / 128 });
  const nine = medianInterval(to(9));
  assert.deepEqual([nine.low, nine.high], [2, 8]);
  assert.ok(Math.abs(nine.confidence - (1 - 2 * (10 / 512))) < 1e-12);
  const twenty = medianInterval(to(20));
  assert.deepEqual([twenty.low, twenty.high], [6, 15]);
  assert.ok(medianInterval(to(5)).confidence < 0.95, 'five values cannot say it with 95 %');
  assert.deepEqual(medianInterval([4]), { low: 4, high: 4, confidence: 0 });
});

test('an interval holds its median, whatever the values', () => {
  fc.assert(
    fc.property(fc.array(fc.double({ min: 0.1, max: 1e6, noNaN: true }), { minLength: 1 }), (values) => {
      const { value, interval, spread } = summaryOf(values);
      assert.ok(interval.low <= value && value <= interval.high);
      assert.ok(spread.minimum <= interval.low && interval.high <= spread.maximum);
    }),
  );
});

test('runs are compared with the reference of their own round, so a drift of the machine cancels', () => {
  const local = [10, 20, 40];
  assert.deepEqual(ratioOf([11, 22, 44], local).runs, [1.1, 1.1, 1.1]);
  assert.deepEqual(ratioOf([30], local).runs, [1.5], 'without pairs, with the median');
});

test('a promise is broken only when the interval says so', () => {
  const seven = (low: number) => medianInterval(Array.from({ length: 7 }, (_, index) => low + index / 100));
  assert.equal(promise('p', 1.02, 1.03, seven(1)).verdict, 'kept');
  assert.equal(promise('p', 1.06, 1.03, seven(1.02)).verdict, 'missed');
  assert.equal(promise('p', 1.07, 1.03, seven(1.04)).verdict, 'broken');
  assert.equal(promise('p', 1.06, 1.03, medianInterval([1.0, 1.06])).verdict, 'broken', 'too few runs');
});
