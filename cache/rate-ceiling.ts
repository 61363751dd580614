/** How fast prefetch may go: --prefetch-rate, and while machines are being started (fetcher.ts). */

/** At most so many bytes per second over any second or two: a bucket that holds `burstSeconds` worth. */
export class RateCeiling {
  readonly #bytesPerSecond: number;
  /** What may be under way at once without an overdraft that is felt. */
  readonly burstBytes: number;
  #tokens = 0;
  #atMs = 0;

  constructor(bytesPerSecond: number, burstSeconds = 0.5) {
    this.#bytesPerSecond = bytesPerSecond;
    this.burstBytes = bytesPerSecond * burstSeconds;
  }

  /** How long the next request has to wait. */
  waitMs(nowMs: number): number {
    if (this.#bytesPerSecond === Infinity) return 0;
    const gained = ((nowMs - this.#atMs) / 1000) * this.#bytesPerSecond;
    this.#tokens = Math.min(this.burstBytes, this.#tokens + gained);
    this.#atMs = nowMs;
    return this.#tokens > 0 ? 0 : Math.max(1, (-this.#tokens / this.#bytesPerSecond) * 1000);
  }

  /** What came counts, so a request may overdraw by what was under way; the next ones wait for it. */
  spend(bytes: number, nowMs: number): void {
    this.waitMs(nowMs);
    this.#tokens -= bytes;
  }
}
