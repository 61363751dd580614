/**
 * The holder: a process that does nothing but keep the mount's devices and its ledger open, and start the proxy that
 * serves them. When the proxy dies, the kernel keeps the mount, because the devices are still open; a successor
 * reads the ledger and goes on. The holder takes no request and touches no image, so there is little to die of.
 *
 *   holder ── stdio 3: messages below; 4: the ledger, a file without a name; 5…: /dev/fuse, once for each worker
 *     └─ gridvfs proxy serve (the proxy)
 *
 * A proxy says 'ready' when it serves and 'over' before it ends on purpose. One that ends without 'over' has died:
 * a successor follows at once, later each time when they die young, and after DEATHS_MAX such deaths in a row the
 * holder gives up and unmounts. A mount that cannot be taken over (fuse-native, a kernel before 6.9) ends with its
 * proxy. An upgrade has the successor load and connect first, then kills the old proxy: the same way from there.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, openSync, rmSync } from 'node:fs';
import path from 'node:path';
import { GridError } from '../core/errors.ts';
import type { ErrorCode } from '../core/errors.ts';
import type { ProxyRecord } from './registry.ts';

/** From a proxy to its holder. */
export type ToHolder =
  | { readonly kind: 'ready'; readonly record: ProxyRecord; readonly outlives: boolean }
  | { readonly kind: 'failed'; readonly code: ErrorCode; readonly message: string }
  | { readonly kind: 'over'; readonly how: 'stopped' | 'failed' }
  /** A successor is loaded and connected, and waits for 'go'. */
  | { readonly kind: 'standby' }
  /** Asks for a successor; answered by 'successor' or 'refused', and then 'handover' means: now. */
  | { readonly kind: 'upgrade' }
  | { readonly kind: 'handover' };

/** From the holder to a proxy. */
export type FromHolder =
  | { readonly kind: 'go' }
  | { readonly kind: 'successor'; readonly pid: number }
  | { readonly kind: 'refused'; readonly code: ErrorCode; readonly message: string };

/** The proxy's descriptors beyond the standard ones. */
export const LEDGER_FD = 4;
export const FIRST_DEVICE_FD = 5;

/** A proxy that dies sooner than this after it was ready died young. */
const YOUNG_MS = 1_000;
/** Deaths in a row, each young, after which nobody is started any more. */
const DEATHS_MAX = 6;
/** Before the second try; twice as long before each further one. */
const PAUSE_MS = 100;

export interface HolderOptions {
  /** Of `gridvfs proxy serve`. */
  readonly args: readonly string[];
  readonly mountpoint: string;
  /** How many devices to hold; 0: the mount ends with its proxy. */
  readonly devices: number;
  /** Where the ledger's file is made, and unlinked at once. */
  readonly folder: string;
  readonly log: (line: string) => void;
  /** Called once, when the first proxy serves. */
  readonly ready: (record: ProxyRecord) => void;
}

interface Member {
  readonly process: ChildProcess;
  readyAtMs?: number;
  over?: 'stopped' | 'failed';
  failure?: GridError;
}

/** Runs proxies until one ends on purpose; resolves to how. Throws what kept the first one from starting. */
export function hold(options: HolderOptions): Promise<'stopped' | 'failed'> {
  return new Holder(options).run();
}

class Holder {
  readonly #options: HolderOptions;
  readonly #held: readonly number[];
  readonly #result = Promise.withResolvers<'stopped' | 'failed'>();
  #serving: Member | undefined;
  /** Loaded and waiting, or on the way there. */
  #standby: Member | undefined;
  #wasReady = false;
  #outlives = false;
  #stopping = false;
  #deaths = 0;

  constructor(options: HolderOptions) {
    this.#options = options;
    this.#held = options.devices > 0 ? openHeld(options) : [];
  }

  run(): Promise<'stopped' | 'failed'> {
    for (const signal of ['SIGTERM', 'SIGINT'] as const) {
      process.on(signal, () => {
        this.#stopping = true;
        this.#serving?.process.kill(signal);
      });
    }
    process.on('SIGHUP', () => {});
    this.#serving = this.#start([]);
    return this.#result.promise;
  }

  #start(extra: readonly string[]): Member {
    const held = this.#held.length > 0 ? ['--held', String(this.#options.devices)] : [];
    const child = spawn(
      process.execPath,
      [process.argv[1]!, 'proxy', 'serve', ...this.#options.args, ...held, ...extra],
      { stdio: ['ignore', 'inherit', 'inherit', 'ipc', ...this.#held] },
    );
    const member: Member = { process: child };
    child.on('message', (message: ToHolder) => this.#hear(member, message));
    child.on('error', (error) => this.#options.log(`cannot start a proxy: ${error.message}`));
    // Not 'exit' alone: its last message may still be on the way.
    child.on('close', (code, signal) => this.#gone(member, signal ?? `exit code ${code}`));
    return member;
  }

  #hear(member: Member, message: ToHolder): void {
    switch (message.kind) {
      case 'ready':
        member.readyAtMs = performance.now();
        this.#outlives = message.outlives;
        if (this.#wasReady) this.#options.log(`the proxy is pid ${member.process.pid} now`);
        else this.#options.ready(message.record);
        this.#wasReady = true;
        break;
      case 'failed':
        member.failure = new GridError(message.code, message.message);
        break;
      case 'over':
        member.over = message.how;
        break;
      case 'upgrade':
        this.#upgrade(member);
        break;
      case 'standby':
        if (this.#serving) tell(this.#serving, { kind: 'successor', pid: member.process.pid! });
        else this.#promote(member);
        break;
      case 'handover':
        member.process.kill('SIGKILL');
        break;
    }
  }

  #upgrade(member: Member): void {
    if (!this.#outlives || this.#standby) {
      const code = this.#standby ? 'in-use' : 'unsupported';
      const message = this.#standby
        ? 'an upgrade of this proxy is under way'
        : 'this mount ends with its proxy: unmount it and mount it again';
      tell(member, { kind: 'refused', code, message });
      return;
    }
    this.#standby = this.#start(['--takeover', '--standby']);
  }

  #promote(member: Member): void {
    this.#serving = member;
    this.#standby = undefined;
    tell(member, { kind: 'go' });
  }

  #gone(member: Member, how: string): void {
    if (member === this.#standby) {
      this.#standby = undefined;
      const { code = 'bug', message = `the new proxy ended (${how})` } = member.failure ?? {};
      this.#options.log(`no upgrade: ${message}`);
      if (this.#serving) tell(this.#serving, { kind: 'refused', code, message });
      return;
    }
    this.#serving = undefined;
    if (member.over) this.#result.resolve(member.over);
    else if (!this.#wasReady) {
      const early = this.#stopping
        ? new GridError('closed', 'interrupted before it was mounted; nothing is left')
        : new GridError('bug', `the proxy ended before it was ready (${how})`);
      this.#result.reject(member.failure ?? early);
    } else this.#succeed(member, how);
  }

  /** The proxy died. */
  #succeed(member: Member, how: string): void {
    const { log, mountpoint } = this.#options;
    const isYoung = member.readyAtMs === undefined || performance.now() - member.readyAtMs < YOUNG_MS;
    this.#deaths = isYoung ? this.#deaths + 1 : 0;
    const died = `the proxy (pid ${member.process.pid}) died (${member.failure?.message ?? how})`;
    if (this.#stopping || !this.#outlives || this.#deaths >= DEATHS_MAX) {
      const why = this.#stopping
        ? ' while it was stopping'
        : this.#outlives
          ? ` and so did ${this.#deaths - 1} before it`
          : '; this mount cannot outlive it';
      log(`${died}${why}: ${mountpoint} is unmounted`);
      this.#result.resolve('failed');
      return;
    }
    const pauseMs = this.#deaths <= 1 ? 0 : PAUSE_MS * 2 ** (this.#deaths - 2);
    log(`${died}; a successor takes over${pauseMs > 0 ? ` in ${pauseMs} ms` : ''}`);
    const standby = this.#standby;
    // One that is still loading is promoted when it says that it stands by.
    if (standby) {
      this.#promote(standby);
      return;
    }
    setTimeout(() => {
      if (this.#stopping) this.#result.resolve('failed');
      else this.#serving = this.#start(['--takeover']);
    }, pauseMs);
  }
}

function tell(member: Member, message: FromHolder): void {
  if (member.process.connected) member.process.send(message);
}

/** Closed at exec except in the proxies that get them, as all descriptors that Node opens. */
function openHeld({ folder, devices }: HolderOptions): number[] {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const file = path.join(folder, `.ledger-${process.pid}`);
  const ledger = openSync(file, 'wx+', 0o600);
  rmSync(file);
  return [ledger, ...Array.from({ length: devices }, () => openSync('/dev/fuse', 'r+'))];
}
