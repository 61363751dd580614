/**
 * Makes a broken way again, with backoff, for as long as somebody waits for it. Says what happens to the way, and
 * the same failure once only, so that a log does not repeat it every few seconds.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { GridError } from '../src/core/errors.ts';
import type { SourceEvent } from './statistics.ts';
import type { Transport } from './transport.ts';

const BACKOFF_MIN_MS = 50;
/** What a guest waits at most after the way is back; a connection that is refused costs nobody much. */
const BACKOFF_MAX_MS = 2_000;

export class Recovery {
  readonly #transport: Transport;
  readonly #backoffMaxMs: number;
  readonly #onEvent: (event: SourceEvent) => void;
  #backoffMs = BACKOFF_MIN_MS;
  /** The last failed attempt. */
  #said = '';

  /** A caller waits `reconnectTimeoutMs` at most: within that time there are several attempts. */
  constructor(transport: Transport, reconnectTimeoutMs: number, onEvent: (event: SourceEvent) => void) {
    this.#transport = transport;
    this.#backoffMaxMs = Math.min(BACKOFF_MAX_MS, reconnectTimeoutMs / 8);
    this.#onEvent = onEvent;
  }

  /** The way works: the next attempt, should there be one, comes soon. */
  worked(): void {
    this.#backoffMs = BACKOFF_MIN_MS;
  }

  /**
   * Tries until the way is there ('again' when it had to be made, 'there' when it was), nobody waits any more or
   * `signal` is aborted ('unwanted'), or somebody refuses for good: then it resolves with why.
   */
  async run(
    isWaitedFor: () => boolean,
    signal: AbortSignal,
  ): Promise<'again' | 'there' | 'unwanted' | GridError> {
    while (isWaitedFor() && !signal.aborted) {
      const jitter = 0.75 + Math.random() / 2;
      await sleep(this.#backoffMs * jitter, undefined, { signal }).catch(() => {});
      this.#backoffMs = Math.min(this.#backoffMs * 2, this.#backoffMaxMs);
      if (signal.aborted) break;
      try {
        if (!(await this.#transport.connect())) return 'there';
        this.#said = '';
        return 'again';
      } catch (error) {
        const reason = error as GridError;
        if (reason.message !== this.#said) this.#onEvent({ type: 'retry', message: reason.message });
        this.#said = reason.message;
        if (reason.blame !== 'tunnel') return reason;
      }
    }
    return 'unwanted';
  }
}
