/**
 * Sets of candidates whose totals are within bounds. First those that are near at hand (`likely`), then all: depth
 * first over candidates sorted by the first total, cutting off where the largest or the smallest that the rest can add
 * misses a bound. Exact; a set may come twice. Its time is bounded by whoever takes from it, because it pauses (yields
 * undefined) every so often.
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
    return { values, ...extremes(values, field === first), atLeast, atMost };
  });
  const fits = (set: readonly Found[]) =>
    totals.every(({ field, atLeast = 0, atMost = Infinity }) => {
      const sum = set.reduce((all, one) => all + one[field], 0);
      return sum >= atLeast && sum <= atMost;
    });
  // No set at all, which most groups of a hard query turn out to have.
  const reachable = bounds.every(
    ({ largest, smallest, atLeast, atMost }) =>
      items.length >= count && largest(0, count) >= atLeast && smallest(0, count) <= atMost,
  );
  if (!reachable) return;
  if (bounds[0] && count > 1) {
    for (const set of likely(items, count, bounds[0])) if (fits(set)) yield set;
  }
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
          (sums[at]! + largest(next, missing) >= atLeast && sums[at]! + smallest(next, missing) <= atMost),
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

type Extreme = (from: number, count: number) => number;

/** The most and the least that `count` of the values from `from` on add up to, or bounds of these. */
function extremes(values: readonly number[], sorted: boolean): { largest: Extreme; smallest: Extreme } {
  const { length } = values;
  if (sorted) {
    const before = new Float64Array(length + 1);
    for (const [at, value] of values.entries()) before[at + 1] = before[at]! + value;
    return {
      largest: (from: number, count: number) => before[from + count]! - before[from]!,
      smallest: (_from: number, count: number) => before[length]! - before[length - count]!,
    };
  }
  const largest = new Float64Array(length + 1);
  const smallest = new Float64Array(length + 1).fill(Infinity);
  for (let at = length - 1; at >= 0; at--) {
    largest[at] = Math.max(largest[at + 1]!, values[at]!);
    smallest[at] = Math.min(smallest[at + 1]!, values[at]!);
  }
  return {
    largest: (from: number, count: number) => count * largest[from]!,
    smallest: (from: number, count: number) => count * smallest[from]!,
  };
}

/**
 * Runs of neighbours in the sorted order, from the largest to the smallest; where one is too large and the next too
 * small, what is between them: members replaced one by one. Sums go down in small steps then, so that a window of totals
 * that some set fits is hit nearly always.
 */
function* likely(
  items: readonly Found[],
  count: number,
  { largest, atLeast, atMost }: { largest: Extreme; atLeast: number; atMost: number },
): Generator<readonly Found[]> {
  for (let at = 0; at + count <= items.length; at++) {
    const sum = largest(at, count);
    if (sum < atLeast) return;
    if (sum <= atMost) yield items.slice(at, at + count);
    if (sum <= atMost || at + count >= items.length || largest(at + 1, count) >= atLeast) continue;
    for (let from = count - 1; from > 0; from--) {
      // The run without `from`, and with the one behind it instead.
      yield [...items.slice(at, at + from), ...items.slice(at + from + 1, at + count + 1)];
    }
  }
}
