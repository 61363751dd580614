/**
 * Sets of candidates whose totals are within bounds: depth first over candidates sorted by the first total, cutting
 * off where the largest or the smallest that the rest can add misses a bound. Exact; its time is bounded by whoever
 * takes from it, because it pauses (yields undefined) every so often.
 */
import type { Found, Total } from './form.ts';

/** Steps between two pauses: well below a millisecond. */
const STEPS = 2048;

export function* composeSets(
  candidates: readonly Found[],
  count: number,
  totals: readonly Total[],
): Generator<readonly Found[] | undefined> {
  const first = totals[0]?.field;
  // A stable sort: among equals, the order in which they came.
  const items = first === undefined ? candidates : candidates.toSorted((a, b) => b[first] - a[first]);
  const bounds = totals.map(({ field, atLeast = 0, atMost = Infinity }) => {
    const values = items.map((item) => item[field]);
    const largest = new Float64Array(items.length + 1);
    const smallest = new Float64Array(items.length + 1).fill(Infinity);
    for (let at = items.length - 1; at >= 0; at--) {
      largest[at] = Math.max(largest[at + 1]!, values[at]!);
      smallest[at] = Math.min(smallest[at + 1]!, values[at]!);
    }
    return { values, largest, smallest, atLeast, atMost };
  });
  const chosen: number[] = [];
  const sums = bounds.map(() => 0);
  let steps = 0;
  let next = 0;
  for (;;) {
    if (++steps % STEPS === 0) yield undefined;
    const missing = count - chosen.length;
    const possible =
      items.length - next >= missing &&
      bounds.every(
        ({ largest, smallest, atLeast, atMost }, at) =>
          missing === 0 ||
          (sums[at]! + missing * largest[next]! >= atLeast &&
            sums[at]! + missing * smallest[next]! <= atMost),
      );
    if (missing === 0) {
      if (bounds.every(({ atLeast, atMost }, at) => sums[at]! >= atLeast && sums[at]! <= atMost)) {
        yield chosen.map((index) => items[index]!);
      }
    } else if (possible) {
      chosen.push(next);
      for (const [at, { values }] of bounds.entries()) sums[at]! += values[next]!;
      next++;
      continue;
    }
    // Back: the last one that was chosen makes room for the one behind it.
    const last = chosen.pop();
    if (last === undefined) return;
    for (const [at, { values }] of bounds.entries()) sums[at]! -= values[last]!;
    next = last + 1;
  }
}
