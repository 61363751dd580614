/**
 * What changes by the second, in memory: load and warm bytes as each host said last, and until when the broker waits
 * for it (monotonic). A broker that starts again knows none of it and gives every host a whole wait before it takes
 * its VMs for lost.
 */
import { LEASE_MARGIN_MS, LEASE_MS } from '../core/grid.ts';
import type { HostReport } from '../core/grid.ts';

export interface HostLoad {
  readonly load: number;
  readonly warmBytes: Readonly<Record<string, number>>;
}

export interface LeaseTimes {
  /** How long a host may go on without an answer. */
  readonly leaseMs: number;
  /** How much longer the broker waits. */
  readonly marginMs: number;
}

export const LEASE_TIMES: LeaseTimes = { leaseMs: LEASE_MS, marginMs: LEASE_MARGIN_MS };

export class Loads {
  readonly times: LeaseTimes;
  readonly #loads = new Map<string, HostLoad>();
  readonly #silentAtMs = new Map<string, number>();
  readonly #startedMs = performance.now();

  constructor(times: LeaseTimes = LEASE_TIMES) {
    this.times = times;
  }

  /** To be called just before the lease is answered: the host counts from when it asked, which was earlier. */
  renew(host: string): void {
    this.#silentAtMs.set(host, performance.now() + this.times.leaseMs + this.times.marginMs);
  }

  /** Whether `host` has been silent for longer than any lease of its own lasts. */
  isSilent(host: string): boolean {
    const atMs = this.#silentAtMs.get(host) ?? this.#startedMs + this.times.leaseMs + this.times.marginMs;
    return performance.now() > atMs;
  }

  take(report: HostReport): void {
    this.#loads.set(report.host, { load: report.load, warmBytes: report.warmBytes });
  }

  of(host: string): HostLoad {
    return this.#loads.get(host) ?? { load: 0, warmBytes: {} };
  }
}
