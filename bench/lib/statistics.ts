/** Medians and what can be said of them: the figures of a bench are few, and never normally distributed. */
import { median } from './facts.ts';

export interface Interval {
  readonly low: number;
  readonly high: number;
  /** The share of such intervals that hold the true median: 0.95 or more, or what so few values allow. */
  readonly confidence: number;
}

const CONFIDENCE = 0.95;

/**
 * The interval of the median from order statistics (the sign test's): the narrowest [k-th smallest, k-th largest] that
 * holds the true median with 95 %. It asks nothing of the distribution. With fewer than six values none does; then it is
 * [smallest, largest] and `confidence` says how little that is.
 */
export function medianInterval(values: readonly number[]): Interval {
  const sorted = values.toSorted((a, b) => a - b);
  const n = sorted.length;
  /** Probability that at most k of n fair coins fall heads. */
  const atMost = (k: number) => {
    let term = 0.5 ** n;
    let sum = term;
    for (let heads = 1; heads <= k; heads++) sum += term *= (n - heads + 1) / heads;
    return sum;
  };
  let skip = 0;
  while (2 * (skip + 1) < n && 1 - 2 * atMost(skip + 1) >= CONFIDENCE) skip++;
  return { low: sorted[skip]!, high: sorted[n - 1 - skip]!, confidence: Math.max(0, 1 - 2 * atMost(skip)) };
}

export interface Summary {
  /** Median. */
  readonly value: number;
  readonly runs: readonly number[];
  readonly spread: { readonly minimum: number; readonly maximum: number };
  readonly interval: Interval;
}

export function summaryOf(runs: readonly number[]): Summary {
  return {
    value: median(runs),
    runs,
    spread: { minimum: Math.min(...runs), maximum: Math.max(...runs) },
    interval: medianInterval(runs),
  };
}

/**
 * Of runs that were interleaved with those of a reference, the ratio: each run to the reference's run of the same round where
 * there is one for each, else to the reference's median.
 */
export function ratioOf(runs: readonly number[], reference: readonly number[]): Summary {
  const middle = median(reference);
  const paired = runs.length === reference.length;
  return summaryOf(runs.map((run, round) => run / (paired ? reference[round]! : middle)));
}
