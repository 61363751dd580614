/** How long requests took that the main thread answered, by operation: few names, so that a scraper keeps few series. */
import { countLatency, HISTOGRAM_DOUBLES } from '../../core/usage.ts';
import type { OperationFigures } from '../../core/usage.ts';
import {
  FALLOCATE,
  FSYNC,
  GETATTR,
  LOOKUP,
  OPEN,
  OPENDIR,
  READ,
  READDIR,
  READDIRPLUS,
  STATFS,
  WRITE,
} from './protocol.ts';

const NAMES = new Map([
  [LOOKUP, 'lookup'],
  [GETATTR, 'getattr'],
  [OPEN, 'open'],
  [READ, 'read'],
  [WRITE, 'write'],
  [FALLOCATE, 'trim'],
  [FSYNC, 'fsync'],
  [OPENDIR, 'readdir'],
  [READDIR, 'readdir'],
  [READDIRPLUS, 'readdir'],
  [STATFS, 'statfs'],
]);

export class OperationTimes {
  readonly #histograms = new Map<string, Float64Array>();

  /** One request with this opcode took so long. */
  count(opcode: number, ms: number): void {
    this.countNamed(NAMES.get(opcode) ?? 'other', ms);
  }

  countNamed(operation: string, ms: number): void {
    let histogram = this.#histograms.get(operation);
    if (!histogram) this.#histograms.set(operation, (histogram = new Float64Array(HISTOGRAM_DOUBLES)));
    countLatency(histogram, 0, ms);
  }

  figures(): OperationFigures[] {
    return [...this.#histograms].map(([operation, histogram]) =>
      operationFigures(operation, 'main', (index) => histogram[index]!),
    );
  }
}

/** `doubleAt` gives the doubles of one histogram, summed over threads where there are several. */
export function operationFigures(
  operation: string,
  answeredBy: 'worker' | 'main',
  doubleAt: (index: number) => number,
): OperationFigures {
  const buckets = Array.from({ length: HISTOGRAM_DOUBLES - 1 }, (_, bucket) => doubleAt(1 + bucket));
  return { operation, answeredBy, seconds: doubleAt(0), buckets };
}

/** Microseconds of the monotonic clock that all threads share, as a u32 that wraps after 71 minutes; never 0. */
export function stampMicroseconds(): number {
  return Number((process.hrtime.bigint() / 1000n) & 0xffff_ffffn) || 1;
}

/** Milliseconds since a stamp. */
export function millisecondsSince(stamp: number): number {
  return ((stampMicroseconds() - stamp) >>> 0) / 1000;
}
