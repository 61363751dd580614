/** What is the same for every kind of machine: waiting for its guest's first word, and stopping it once. */
import { GridError } from '../core/errors.ts';
import type { MachineStatus } from '../core/machine.ts';
import { lastWords } from './console.ts';
import type { ConsoleWatch } from './console.ts';
import { within } from './within.ts';

/** Of a console, for whoever has to find out why nothing came of a start. */
export const CONSOLE_LINES = 3;

export interface Guest {
  readonly name: string;
  readonly readyText: string | undefined;
  /** What looks for it; none where nobody does. */
  readonly watch: ConsoleWatch | undefined;
  readonly consoleLog: string;
  readonly ended: Promise<MachineStatus>;
  isReady(): boolean;
}

/** See Machine.ready. */
export async function guestReady(guest: Guest, timeoutMs: number): Promise<void> {
  const { name, readyText, watch, consoleLog, ended } = guest;
  if (guest.isReady()) return;
  if (watch === undefined || readyText === undefined) {
    throw new GridError(
      'bad-request',
      `${name} was started without readyText, so nobody can know when it is ready`,
    );
  }
  const outcome = await within(timeoutMs, Promise.race([watch.outcome, ended]));
  if (outcome === 'ready' || guest.isReady()) return;
  const words = (await lastWords(consoleLog, CONSOLE_LINES)) || 'nothing';
  if (outcome === undefined) {
    const text = `${name} did not say "${readyText}" within ${timeoutMs} ms; its console's last words: ${words}`;
    throw new GridError('timeout', text);
  }
  if ('panic' in outcome) throw new GridError('vm-failed', `the kernel of ${name} gave up: ${outcome.panic}`);
  const why = outcome.reason ?? `it powered down; its console's last words: ${words}`;
  throw new GridError('vm-failed', `${name} ended before it was ready: ${why}`);
}

/** A machine is being stopped by one call at a time, unless another is more urgent. */
export class Stopping {
  /** Somebody wants its end. */
  asked = false;
  #stopping: Promise<void> | undefined;

  /** See Machine.stop. */
  stop(graceMs: number, work: (graceMs: number) => Promise<void>): Promise<void> {
    if (!Number.isFinite(graceMs) || graceMs < 0) {
      const text = `graceMs must be a number from 0, not ${graceMs}`;
      return Promise.reject(new GridError('bad-request', text));
    }
    // A second call that is more urgent than the first must not wait for the first one's grace.
    if (this.#stopping !== undefined && graceMs > 0) return this.#stopping;
    this.asked = true;
    const stopping = work(graceMs).finally(() => {
      if (this.#stopping === stopping) this.#stopping = undefined;
    });
    this.#stopping = stopping;
    return stopping;
  }
}
