/**
 * VMs that the broker would start elsewhere when this host falls silent, and the lease under which they run here.
 *
 * Never twice: such a VM runs only while the lease does. The lease counts from the moment its report was sent, on the
 * monotonic clock, so it ends here before it ends there. `PAUSE_EARLY` before its end these VMs are stopped in their
 * tracks (SIGSTOP: no guest instruction after it, whatever runs the machine). They go on when a later report's answer
 * names them, and are ended when it does not. Which VMs these are stands in a file: the next daemon of this host
 * pauses them until the broker has answered it.
 */
import { readFileSync } from 'node:fs';
import { rename, writeFile } from 'node:fs/promises';

export type MachineSignal = 'SIGSTOP' | 'SIGCONT' | 'SIGKILL';

/** What of a VM is looked at here. */
export interface LeasedVm {
  readonly id: string;
  readonly state: string;
  readonly pid?: number;
}

export interface LeaseParts {
  list(): readonly LeasedVm[];
  /** Where the names are kept. */
  readonly file: string;
  readonly log: (line: string) => void;
  /** Stops, continues and kills a machine's process; `process.kill` unless a test looks on. */
  readonly signal?: (pid: number, signal: MachineSignal) => void;
}

/** Part of a lease that is given up so that the pause is done when it ends, also on a host under load. */
const PAUSE_EARLY = 0.2;
const CHECK_EVERY_MS = 100;

export class LeasedVms {
  readonly #parts: LeaseParts;
  /** Until when they may run; monotonic milliseconds. */
  #endsMs = -Infinity;
  readonly #names: Set<string>;
  /** What the broker named as this host's in its last answer. */
  #allowed: ReadonlySet<string> = new Set();
  /** By name, the process that was stopped: a VM that was suspended and goes on has another. */
  readonly #paused = new Map<string, number>();
  readonly #timer: NodeJS.Timeout;
  #keeping = 0;

  constructor(parts: LeaseParts) {
    this.#parts = parts;
    this.#names = new Set(readNames(parts.file));
    this.#timer = setInterval(() => this.enforce(), CHECK_EVERY_MS);
    this.#timer.unref();
    this.enforce();
  }

  close(): void {
    clearInterval(this.#timer);
  }

  /** Whether they may run now. */
  get leased(): boolean {
    return performance.now() < this.#endsMs;
  }

  /** The broker answered a report that was sent at `sentMs`, and named what runs here by its leave. */
  renew(sentMs: number, leaseMs: number, allowed: ReadonlySet<string>): void {
    this.#endsMs = sentMs + leaseMs * (1 - PAUSE_EARLY);
    this.#allowed = allowed;
  }

  /** Whether a VM that stands still may go on: 'later' when nobody knows, 'never' when it is not this host's any more. */
  mayGoOn(id: string): 'now' | 'later' | 'never' {
    if (!this.#names.has(id)) return 'now';
    if (!this.leased) return 'later';
    return this.#allowed.has(id) ? 'now' : 'never';
  }

  /** On record when it resolves: also the next daemon pauses it. */
  async add(id: string): Promise<void> {
    this.#names.add(id);
    await this.#keep();
  }

  async drop(...ids: string[]): Promise<void> {
    let dropped = false;
    for (const id of ids) dropped = this.#names.delete(id) || dropped;
    if (dropped) await this.#keep();
  }

  /** Forgets all but those for which `stays` holds. */
  async dropUnless(stays: (id: string) => boolean): Promise<void> {
    const gone = [...this.#names].filter((id) => !stays(id));
    for (const id of gone) this.#paused.delete(id);
    await this.drop(...gone);
  }

  /** Pauses what must not run without a lease. */
  enforce(): void {
    if (this.leased || this.#names.size === 0) return;
    for (const { id, pid, state } of this.#parts.list()) {
      if (!this.#names.has(id) || pid === undefined || state === 'failed') continue;
      if (this.#paused.get(id) === pid || !this.#kill(pid, 'SIGSTOP')) continue;
      this.#paused.set(id, pid);
      this.#parts.log(`VM ${id} is paused: the broker has not renewed this host's lease`);
    }
  }

  /** Continues a paused one, under a lease. */
  proceed({ id, pid }: LeasedVm): void {
    if (!this.leased || !this.#paused.delete(id) || pid === undefined) return;
    this.#kill(pid, 'SIGCONT');
    this.#parts.log(`VM ${id} goes on`);
  }

  /** Ends a paused one without letting it run for another instant; others are left to whoever calls. */
  endPaused({ id, pid }: LeasedVm): void {
    if (this.#paused.delete(id) && pid !== undefined) this.#kill(pid, 'SIGKILL');
  }

  #kill(pid: number, signal: MachineSignal): boolean {
    try {
      (this.#parts.signal ?? process.kill.bind(process))(pid, signal);
      return true;
    } catch {
      return false; // it ended meanwhile
    }
  }

  async #keep(): Promise<void> {
    const { file } = this.#parts;
    const next = `${file}.${this.#keeping++}.new`;
    await writeFile(next, JSON.stringify([...this.#names]) + '\n', { mode: 0o600 });
    await rename(next, file);
  }
}

function readNames(file: string): string[] {
  try {
    const names: unknown = JSON.parse(readFileSync(file, 'utf8'));
    return Array.isArray(names) ? names.filter((name): name is string => typeof name === 'string') : [];
  } catch {
    return []; // none yet
  }
}
