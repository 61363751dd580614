/**
 * The lanes of one source: which are free, which is reserved for demand, and when another is opened. Lanes are
 * opened only when work waits or is about to come, for at a stock sshd each starts a process.
 */
import type { GridError } from '../src/core/errors.ts';
import type { Lane, Transport } from './transport.ts';

/** Lanes that are being opened at once: opening takes two round trips, and several together take no longer. */
const OPENING_MAX = 4;

export class LanePool {
  readonly #transport: Transport;
  readonly #onOpened: () => void;
  readonly #onFailed: (error: GridError) => void;
  readonly #idle: Lane[] = [];
  readonly #lanes = new Set<Lane>();
  /** Bulk never takes it (unless it is the only one allowed). */
  #reserved: Lane | undefined;
  /** So many are opened with the first one, and stand idle: what a start asks for first waits for no lane. */
  standing = 1;
  #opening = 0;
  #closed = false;

  /** `onFailed` is called when no lane could be opened and there is no other. */
  constructor(transport: Transport, onOpened: () => void, onFailed: (error: GridError) => void) {
    this.#transport = transport;
    this.#onOpened = onOpened;
    this.#onFailed = onFailed;
  }

  add(lane: Lane): void {
    if (this.#reserved?.alive !== true) this.#reserved = lane;
    this.#lanes.add(lane);
    this.release(lane);
    if (this.#lanes.size === 1) this.expect(this.standing);
  }

  /** The exchange on a lane is over. */
  release(lane: Lane): void {
    if (lane.alive && !this.#closed) this.#idle.push(lane);
    else this.discard(lane);
  }

  discard(lane: Lane): void {
    lane.close();
    this.#lanes.delete(lane);
    if (this.#reserved === lane) this.#reserved = undefined;
  }

  /** An idle lane that may take the work, the reserved one first for demand; where none is free another is opened
   * (`onOpened` follows) as far as the transport allows. */
  take(bulk: boolean): Lane | undefined {
    const idle = this.#idle;
    for (let i = idle.length - 1; i >= 0; i--) if (!idle[i]!.alive) this.discard(idle.splice(i, 1)[0]!);
    const anyLane = !bulk || this.#transport.lanesMax === 1;
    const reservedAt = idle.findIndex((lane) => lane === this.#reserved);
    let at = idle.findLastIndex((_lane, i) => i !== reservedAt);
    if (anyLane && reservedAt >= 0) at = reservedAt;
    if (at >= 0) return idle.splice(at, 1)[0];
    if (this.#opening < OPENING_MAX) this.expect(this.#lanes.size + this.#opening + 1);
    return undefined;
  }

  /** Work for `count` lanes is about to come: opens those that are missing, as far as the transport allows. */
  expect(count: number): void {
    const wanted = Math.min(count, this.#transport.lanesMax);
    while (!this.#closed && this.#lanes.size + this.#opening < wanted) void this.#open();
  }

  close(): void {
    this.#closed = true;
    for (const lane of this.#lanes) lane.close();
  }

  async #open(): Promise<void> {
    this.#opening++;
    try {
      const lane = await this.#transport.openLane();
      this.#opening--;
      if (this.#closed) lane.close();
      else this.add(lane);
    } catch (error) {
      this.#opening--;
      // Where another lane works, the far side only has a lower bound on them: go on with what there is.
      if (this.#lanes.size > 0) return;
      this.#onFailed(error as GridError);
    }
    this.#onOpened();
  }
}
