/**
 * Syncs that nobody waits for now. What is made for a VM goes with it, and with the host should its power fail: the
 * VM's start need not wait for the disk's journal, eight times, while the cache keeps it busy. Somebody who is
 * about to make more of it (a suspended VM, a base for another clone) asks for it then; else it is done a moment later.
 */

/** By then a start is over, or has other things to wait for. */
const PUT_OFF_MS = 2_000;

interface Waiting {
  readonly sync: () => Promise<void>;
  readonly timer?: NodeJS.Timeout;
}

export class PutOff {
  readonly #waiting = new Map<string, Waiting>();
  readonly #underWay = new Map<string, Promise<void>>();
  readonly #failed: (name: string, error: unknown) => void;

  /** `failed`: nobody had asked for it. Who asks for it then is told himself. */
  constructor(failed: (name: string, error: unknown) => void) {
    this.#failed = failed;
  }

  add(name: string, sync: () => Promise<void>): void {
    const timer = setTimeout(() => {
      this.done(name).catch((error: unknown) => this.#failed(name, error));
    }, PUT_OFF_MS).unref();
    this.#waiting.set(name, { timer, sync });
  }

  /** Resolves when it is done. Throws what it throws; it is still to be done then. */
  async done(name: string): Promise<void> {
    const waiting = this.#waiting.get(name);
    if (!waiting) return this.#underWay.get(name);
    const { sync } = waiting;
    this.#drop(name);
    const running = sync().then(
      () => void this.#underWay.delete(name),
      (error: unknown) => {
        this.#underWay.delete(name);
        this.#waiting.set(name, { sync });
        throw error;
      },
    );
    this.#underWay.set(name, running);
    return running;
  }

  /** Nobody needs it any more; resolves when nothing of it is under way. */
  async drop(name: string): Promise<void> {
    this.#drop(name);
    await this.#underWay.get(name)?.catch(() => undefined);
    this.#drop(name);
  }

  #drop(name: string): void {
    clearTimeout(this.#waiting.get(name)?.timer);
    this.#waiting.delete(name);
  }

  /** Does what is left, and ends; never rejects. */
  async close(): Promise<void> {
    const names = new Set([...this.#waiting.keys(), ...this.#underWay.keys()]);
    for (const name of names) {
      await this.done(name).catch((error: unknown) => this.#failed(name, error));
      this.#drop(name);
    }
  }
}
