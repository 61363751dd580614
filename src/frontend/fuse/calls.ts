/**
 * Requests under way in the main thread, each answered at most once, and what INTERRUPT does to them.
 *
 * The kernel sends one INTERRUPT for the first signal of whatever kind. A file's read(2) must not fail with EINTR
 * because a timer or a child's end made a signal, so a call is given up only when its thread is being killed or
 * gone, and that is looked up again and again because a later signal is not announced.
 */
import { readFile } from 'node:fs/promises';
import { constants } from 'node:os';
import { encodeErrorReply, encodeReply, errnoNumberOf, errnoOfContent } from './protocol.ts';
import { FALLOCATE, FSYNC, READ, Refusal, WRITE, writeReplyHeader } from './protocol.ts';
import type { Request } from './protocol.ts';
import { millisecondsSince, OperationTimes, stampMicroseconds } from './operation-times.ts';
import type { OperationFigures } from '../../core/usage.ts';

export class Call {
  readonly request: Request;
  answered = false;
  /** When its request was read from the device. */
  readonly stamp: number;
  readonly #reply: (bytes: Buffer) => void;

  constructor(request: Request, reply: (bytes: Buffer) => void) {
    this.request = request;
    this.stamp = request.stamp || stampMicroseconds();
    this.#reply = reply;
  }

  answer(body: Uint8Array): void {
    if (!this.answered) this.#send(encodeReply(this.request.unique, body));
  }

  /** `reply` has room for its header in front: no copy. */
  answerWhole(reply: Buffer): void {
    if (this.answered) return;
    writeReplyHeader(reply, this.request.unique);
    this.#send(reply);
  }

  refuse(error: unknown): void {
    if (this.answered) return;
    const errno = ON_CONTENT.has(this.request.opcode) ? errnoOfContent(error) : errnoNumberOf(error);
    this.#send(encodeErrorReply(this.request.unique, errno));
  }

  #send(reply: Buffer): void {
    this.answered = true;
    this.#reply(reply);
  }
}

const ON_CONTENT: ReadonlySet<number> = new Set([READ, WRITE, FALLOCATE, FSYNC]);

/** How often an interrupted call looks whether its thread is being killed. */
const KILL_POLL_MS = 100;
/** Interrupts whose request we do not have: it was answered by a worker, or comes a moment later. */
const EARLY_INTERRUPTS_MAX = 256;

const { SIGCHLD, SIGCONT, SIGURG, SIGWINCH, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU } = constants.signals;

/** Signals that do not end a process that does nothing about them. */
const HARMLESS_SIGNALS = [SIGCHLD, SIGCONT, SIGURG, SIGWINCH, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU]
  .map((signal) => 1n << BigInt(signal - 1))
  .reduce((mask, bit) => mask | bit);

export class CallTable {
  readonly #interruptible = new Map<bigint, Call>();
  readonly #all = new Set<Call>();
  readonly #early = new Set<bigint>();
  readonly #watched = new Set<Call>();
  readonly #times = new OperationTimes();
  #timer: NodeJS.Timeout | undefined;
  #interrupted = 0;

  /** How long calls took includes their wait for the main thread. */
  statistics(): {
    readonly interrupted: number;
    readonly inFlight: number;
    readonly operations: readonly OperationFigures[];
  } {
    return {
      interrupted: this.#interrupted,
      inFlight: this.#all.size,
      operations: this.#times.figures(),
    };
  }

  add(call: Call, interruptible: boolean): void {
    this.#all.add(call);
    if (!interruptible) return;
    const { unique } = call.request;
    this.#interruptible.set(unique, call);
    // Another worker may have been faster with the INTERRUPT than its own with the request.
    if (this.#early.delete(unique)) this.#watch(call);
  }

  remove(call: Call): void {
    this.#all.delete(call);
    this.#times.count(call.request.opcode, millisecondsSince(call.stamp));
    this.#interruptible.delete(call.request.unique);
    this.#watched.delete(call);
  }

  interrupt(unique: bigint): void {
    const call = this.#interruptible.get(unique);
    if (call) {
      this.#watch(call);
      return;
    }
    this.#early.add(unique);
    if (this.#early.size > EARLY_INTERRUPTS_MAX) {
      for (const oldest of this.#early) {
        this.#early.delete(oldest);
        break;
      }
    }
  }

  #watch(call: Call): void {
    this.#watched.add(call);
    this.#timer ??= setTimeout(() => void this.#poll(), 0);
  }

  async #poll(): Promise<void> {
    for (const call of this.#watched) {
      if (await isBeingKilled(call.request.pid)) {
        if (!call.answered) this.#interrupted++;
        call.refuse(new Refusal('EINTR'));
        this.#watched.delete(call);
      }
    }
    this.#timer = undefined;
    if (this.#watched.size > 0) {
      this.#timer = setTimeout(() => void this.#poll(), KILL_POLL_MS);
      this.#timer.unref();
    }
  }

  /** No call is answered any more. */
  abandon(): void {
    clearTimeout(this.#timer);
    this.#watched.clear();
    for (const call of this.#all) call.answered = true;
  }
}

/** Whether a thread has a signal pending that will end it, is gone, or is not ours to see. */
async function isBeingKilled(pid: number): Promise<boolean> {
  if (pid === 0) return true;
  const status = await readFile(`/proc/${pid}/status`, 'latin1').catch(() => undefined);
  if (status === undefined) return true;
  const mask = (field: string) => {
    const digits = new RegExp(`^${field}:\\s*([0-9a-f]+)$`, 'm').exec(status)?.[1];
    return BigInt(`0x${digits ?? '0'}`);
  };
  const handled = mask('SigBlk') | mask('SigIgn') | mask('SigCgt') | HARMLESS_SIGNALS;
  return ((mask('SigPnd') | mask('ShdPnd')) & ~handled) !== 0n;
}
