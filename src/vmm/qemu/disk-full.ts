/**
 * A machine whose disk is full: a quota is reached, or the file system that its clone is on has no space. QEMU's way
 * (werror=enospc, its default) is to stop the machine with the write that failed kept, so that the guest does not
 * learn of it: nothing in it is lost, and no journal is given up. Here the machine is let go again and again; the
 * write is tried each time, and when there is room the guest goes on as if the disk had been slow.
 */
import type { QmpEvent } from './qmp.ts';

const RETRY_MS = 1000;

interface FullMachine {
  execute(command: string): Promise<unknown>;
  /** Whether its guest is meant to run now: not while it is captured. */
  isMeantToRun(): boolean;
  log(text: string): void;
}

export class DiskFull {
  readonly #machine: FullMachine;
  #timer: NodeJS.Timeout | undefined;
  #isTold = false;

  constructor(machine: FullMachine) {
    this.#machine = machine;
  }

  /** While it waits. */
  get reason(): string | undefined {
    return this.#isTold ? 'its disk is full: it waits until there is room' : undefined;
  }

  heard({ event, data }: QmpEvent): void {
    if (event !== 'BLOCK_IO_ERROR' || data['action'] !== 'stop') return;
    const known = this.reason;
    this.#isTold = true;
    if (known === undefined) this.#machine.log(this.reason!);
    this.#retryLater();
  }

  close(): void {
    clearTimeout(this.#timer);
  }

  #retryLater(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#retry(), RETRY_MS);
    this.#timer.unref();
  }

  async #retry(): Promise<void> {
    try {
      const { status } = (await this.#machine.execute('query-status')) as { status: string };
      if (status === 'io-error') {
        if (this.#machine.isMeantToRun()) await this.#machine.execute('cont');
        // Where the disk is still full, the next event comes before this.
        this.#retryLater();
      } else if (status === 'running' && this.#isTold) {
        this.#isTold = false;
        this.#machine.log('there is room on its disk again');
      }
    } catch {
      // It ends, and says why elsewhere.
    }
  }
}
