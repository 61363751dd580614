/**
 * What is counted of requests, cheaply and in shared memory: any thread may add, any may look. `Usage` is of one
 * image or clone, whichever frontend reads it; `LatencyHistogram` is of one kind of operation.
 */

export interface UsageFigures {
  readonly reads: number;
  readonly readBytes: number;
  readonly writes: number;
  readonly writeBytes: number;
}

/** Requests of frontends for one image or clone, and their bytes. What the kernel answers by itself (kept pages,
 * passthrough) is in no count. */
export class Usage {
  /** Four u64, in the order of `UsageFigures`. */
  readonly counters: SharedArrayBuffer;
  readonly #view: BigUint64Array;

  constructor(counters = new SharedArrayBuffer(4 * BigUint64Array.BYTES_PER_ELEMENT)) {
    this.counters = counters;
    this.#view = new BigUint64Array(counters);
  }

  countRead(bytes: number): void {
    Atomics.add(this.#view, 0, 1n);
    Atomics.add(this.#view, 1, BigInt(bytes));
  }

  countWrite(bytes: number): void {
    Atomics.add(this.#view, 2, 1n);
    Atomics.add(this.#view, 3, BigInt(bytes));
  }

  figures(): UsageFigures {
    const [reads, readBytes, writes, writeBytes] = [...this.#view].map(Number) as [
      number,
      number,
      number,
      number,
    ];
    return { reads, readBytes, writes, writeBytes };
  }
}

/** Upper bounds of the buckets of request times: from a page that is here to a tunnel that was cut for a minute. */
export const LATENCY_BUCKETS_SECONDS = [
  0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1, 2.5,
  10, 60,
];

const BUCKETS_MS = Float64Array.from(LATENCY_BUCKETS_SECONDS, (seconds) => seconds * 1000);

/** Doubles of one histogram: seconds in all, then requests by bucket, the last for those above every bound. */
export const HISTOGRAM_DOUBLES = LATENCY_BUCKETS_SECONDS.length + 2;

/** Adds one request to the histogram that begins at `at` in `doubles`, which only the calling thread writes. */
export function countLatency(doubles: Float64Array, at: number, ms: number): void {
  let bucket = 0;
  while (bucket < BUCKETS_MS.length && ms > BUCKETS_MS[bucket]!) bucket++;
  doubles[at]! += ms / 1000;
  doubles[at + 1 + bucket]!++;
}

/** One operation's times, as a status says them. */
export interface OperationFigures {
  /** read, write, lookup, … */
  readonly operation: string;
  /** A worker thread by itself, or the main thread. */
  readonly answeredBy: 'worker' | 'main';
  /** Seconds of all of them together. */
  readonly seconds: number;
  /** Requests per bucket of LATENCY_BUCKETS_SECONDS, and of those above the last. */
  readonly buckets: readonly number[];
}
