/**
 * The host's side of a broker: registers, reports, asks for orders and carries them out through the agent's own
 * machines and cache. Everything is a call of ours (see core/grid.ts), so a host behind NAT needs no open port.
 *
 * Never twice: a VM that the broker would start elsewhere when this host falls silent runs only while the lease
 * does. The lease counts from the moment its report was sent, on the monotonic clock, so it ends here before it ends
 * there. `PAUSE_EARLY` before its end such VMs are stopped in their tracks (SIGSTOP: no guest instruction after it,
 * whatever runs the machine). They go on when a later report's answer names them, and are ended when it does not.
 * Which VMs these are stands in a file: the next daemon of this host pauses them until the broker has answered it.
 */
import { readFileSync } from 'node:fs';
import { rename, writeFile } from 'node:fs/promises';
import os from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, GridError } from '../core/errors.ts';
import { ORDERS_WAIT_MS, PLACED_VM } from '../core/grid.ts';
import type { HostFacts, HostReport, Lease, OfferedVersion, Order, OrderResult } from '../core/grid.ts';
import type { BrokerClient } from './broker-client.ts';

/** What the link needs of the agent's machines; the `Machines` of machines.ts are it. */
export interface LinkMachines {
  list(): readonly LinkVm[];
  run(request: {
    image: string;
    name: string;
    memoryBytes: number;
    vcpus: number;
    network: 'user' | 'none';
  }): Promise<LinkVm>;
  status(id: string): LinkVm;
  ready(id: string, timeoutMs: number): Promise<LinkVm>;
  stop(id: string, graceMs: number): Promise<void>;
}

export interface LinkVm {
  readonly id: string;
  readonly state: string;
  readonly pid?: number;
  readonly reason?: string;
  readonly readyText?: string;
  readonly consoleSocket: string;
  readonly timeline: { readonly clonedMs?: number; readonly startedMs?: number; readonly readyMs?: number };
}

export interface LinkParts {
  readonly client: BrokerClient;
  readonly facts: HostFacts;
  readonly machines: LinkMachines;
  /** Plain bytes here by manifest, and bytes fetched since the proxy started. */
  cache(): Promise<{ warmBytes: Record<string, number>; fetchedBytes: number }>;
  /** What the source offers. */
  versions(): Promise<OfferedVersion[]>;
  /** Fetches an image ahead. */
  warm(image: string): Promise<void>;
  /** Where the names of VMs with a restart policy are kept. */
  readonly file: string;
  readonly log: (line: string) => void;
  /** Stops, continues and kills a machine's process; `process.kill` unless a test looks on. */
  readonly signal?: (pid: number, signal: MachineSignal) => void;
}

export type MachineSignal = 'SIGSTOP' | 'SIGCONT' | 'SIGKILL';

/** Part of a lease that is given up so that the pause is done when it ends, also on a host under load. */
const PAUSE_EARLY = 0.2;
const CHECK_EVERY_MS = 100;
const RETRY_MS_MIN = 200;
const RETRY_MS_MAX = 5_000;
/** The source's list of versions is looked at this often. */
const VERSIONS_EVERY_MS = 10_000;
/** Orders that are done, by id: one that was on its way meanwhile is not carried out again. */
const DONE_KEPT_MAX = 10_000;

export class BrokerLink {
  readonly #parts: LinkParts;
  readonly #end = new AbortController();
  /** Until when VMs with a restart policy may run; monotonic milliseconds. */
  #leaseEndsMs = -Infinity;
  /** Registered, as the broker saw it last. */
  #registered = false;
  #reportEveryMs = 1_000;
  #sequence = 0;
  readonly #restart: Set<string>;
  readonly #paused = new Set<string>();
  readonly #working = new Map<string, Promise<void>>();
  /** By VM: its start, which a stop of it waits for. */
  readonly #starting = new Map<string, Promise<unknown>>();
  readonly #done = new Set<string>();
  readonly #results: OrderResult[] = [];
  #versionsSent = '';
  #versionsAtMs = -Infinity;
  #versions: OfferedVersion[] = [];
  #wake = Promise.withResolvers<void>();
  readonly #loops: Promise<void>[];
  readonly #timer: NodeJS.Timeout;

  constructor(parts: LinkParts) {
    this.#parts = parts;
    this.#restart = new Set(readNames(parts.file));
    this.#timer = setInterval(() => this.#enforce(), CHECK_EVERY_MS);
    this.#timer.unref();
    this.#enforce();
    this.#loops = [this.#reportLoop(), this.#orderLoop()];
  }

  /** Whether VMs with a restart policy may run now. */
  get leased(): boolean {
    return performance.now() < this.#leaseEndsMs;
  }

  async close(): Promise<void> {
    clearInterval(this.#timer);
    this.#end.abort();
    this.#wake.resolve();
    await Promise.allSettled(this.#loops);
    this.#parts.client.close();
  }

  async #reportLoop(): Promise<void> {
    const { log } = this.#parts;
    let retryMs = RETRY_MS_MIN;
    let told = '';
    while (!this.#end.signal.aborted) {
      try {
        if (!this.#registered) await this.#register();
        await this.#report();
        if (told !== '') log('the broker answers again');
        told = '';
        retryMs = RETRY_MS_MIN;
        if (this.#results.length === 0) {
          await Promise.race([this.#wake.promise, this.#pause(this.#reportEveryMs)]);
        }
        this.#wake = Promise.withResolvers();
      } catch (error) {
        if (this.#end.signal.aborted) break;
        const known = asGridError(error, 'the report failed', 'bug');
        if (known.code === 'closed') this.#registered = false;
        if (known.message !== told) log(`broker: ${known.message} [${known.code}]`);
        told = known.message;
        await this.#pause(retryMs);
        retryMs = Math.min(RETRY_MS_MAX, 2 * retryMs);
      }
    }
  }

  #pause(ms: number): Promise<void> {
    return sleep(ms, undefined, { signal: this.#end.signal, ref: false }).catch(() => undefined);
  }

  async #register(): Promise<void> {
    await this.#parts.client.call<Lease>(
      'POST',
      '/v1/agent/register',
      this.#parts.facts,
      this.#callOptions(),
    );
    this.#registered = true;
    this.#versionsSent = '';
    this.#parts.log(`registered as ${this.#parts.facts.host} with the broker at ${this.#parts.client.url}`);
  }

  /** A call that outlives the lease is of no use. */
  #callOptions() {
    return { signal: this.#end.signal, timeoutMs: 10_000 };
  }

  async #report(): Promise<void> {
    const { machines, facts } = this.#parts;
    const cache = await this.#parts.cache();
    const versions = await this.#offered();
    // From here to the snapshot nothing is awaited: results and VMs are of one moment.
    const results = [...this.#results];
    const vms = machines.list().filter(({ id }) => PLACED_VM.test(id));
    const report: HostReport = {
      host: facts.host,
      incarnation: facts.incarnation,
      sequence: this.#sequence++,
      load: os.loadavg()[0] ?? 0,
      warmBytes: cache.warmBytes,
      vms: vms.map((vm) => ({
        name: vm.id,
        state: vm.state,
        ...(vm.reason === undefined ? {} : { reason: vm.reason }),
        consoleSocket: vm.consoleSocket,
      })),
      results,
      ...(versions === undefined ? {} : { versions }),
    };
    const sentMs = performance.now();
    const lease = await this.#parts.client.call<Lease>(
      'POST',
      '/v1/agent/report',
      report,
      this.#callOptions(),
    );
    this.#leaseEndsMs = sentMs + lease.leaseMs * (1 - PAUSE_EARLY);
    this.#reportEveryMs = lease.reportEveryMs;
    if (versions !== undefined) this.#versionsSent = JSON.stringify(versions);
    this.#results.splice(0, results.length);
    for (const { order } of results) {
      this.#working.delete(order);
      this.#remember(order);
    }
    this.#follow(lease, vms);
  }

  #remember(order: string): void {
    this.#done.add(order);
    const oldest = this.#done.values().next();
    if (this.#done.size > DONE_KEPT_MAX && !oldest.done) this.#done.delete(oldest.value);
  }

  /** What the broker let run goes on; what it did not is ended. Only VMs of the report count: others came later. */
  #follow(lease: Lease, reported: readonly LinkVm[]): void {
    const allowed = new Set(lease.vms);
    let dropped = false;
    for (const vm of reported) {
      if (allowed.has(vm.id)) {
        if (this.#paused.has(vm.id) && this.leased) this.#proceed(vm);
        continue;
      }
      if (vm.state !== 'running' && vm.state !== 'paused') continue;
      dropped = this.#restart.delete(vm.id) || dropped;
      this.#parts.log(`VM ${vm.id} is not this host's any more: it is ended`);
      this.#endPaused(vm);
      this.#parts.machines
        .stop(vm.id, 0)
        .catch((error: unknown) => this.#parts.log(`cannot end VM ${vm.id}: ${String(error)}`));
    }
    const there = new Set(this.#parts.machines.list().map(({ id }) => id));
    for (const id of this.#restart) {
      if (there.has(id) || this.#starting.has(id) || allowed.has(id)) continue;
      this.#restart.delete(id);
      this.#paused.delete(id);
      dropped = true;
    }
    if (dropped) void this.#keep();
  }

  #kill(pid: number, signal: MachineSignal): boolean {
    try {
      (this.#parts.signal ?? process.kill.bind(process))(pid, signal);
      return true;
    } catch {
      return false; // it ended meanwhile
    }
  }

  /** Pauses what must not run without a lease. */
  #enforce(): void {
    if (this.leased || this.#restart.size === 0) return;
    for (const vm of this.#parts.machines.list()) {
      if (
        !this.#restart.has(vm.id) ||
        this.#paused.has(vm.id) ||
        vm.pid === undefined ||
        vm.state === 'failed'
      )
        continue;
      if (!this.#kill(vm.pid, 'SIGSTOP')) continue;
      this.#paused.add(vm.id);
      this.#parts.log(`VM ${vm.id} is paused: the broker has not renewed this host's lease`);
    }
  }

  /** Continues a paused one. */
  #proceed(vm: LinkVm): void {
    if (!this.#paused.delete(vm.id) || vm.pid === undefined) return;
    this.#kill(vm.pid, 'SIGCONT');
    this.#parts.log(`VM ${vm.id} goes on`);
  }

  /** Ends a paused one without letting it run for another instant; others are left to whoever calls. */
  #endPaused(vm: LinkVm): void {
    if (this.#paused.delete(vm.id) && vm.pid !== undefined) this.#kill(vm.pid, 'SIGKILL');
  }

  async #offered(): Promise<OfferedVersion[] | undefined> {
    const nowMs = performance.now();
    if (nowMs - this.#versionsAtMs >= VERSIONS_EVERY_MS) {
      this.#versionsAtMs = nowMs;
      try {
        this.#versions = await this.#parts.versions();
      } catch (error) {
        this.#parts.log(`cannot list what the source offers: ${String(error)}`);
      }
    }
    return JSON.stringify(this.#versions) === this.#versionsSent ? undefined : this.#versions;
  }

  async #orderLoop(): Promise<void> {
    const { client, facts } = this.#parts;
    const query = `host=${facts.host}&incarnation=${facts.incarnation}`;
    while (!this.#end.signal.aborted) {
      if (!this.#registered) {
        await this.#pause(RETRY_MS_MIN / 2);
        continue;
      }
      try {
        const known = encodeURIComponent([...this.#working.keys()].join(','));
        const orders = await client.call<Order[]>(
          'GET',
          `/v1/agent/orders?${query}&known=${known}`,
          undefined,
          {
            signal: this.#end.signal,
            timeoutMs: 2 * ORDERS_WAIT_MS,
          },
        );
        for (const order of orders) {
          if (this.#working.has(order.id) || this.#done.has(order.id)) continue;
          this.#working.set(order.id, this.#carryOut(order));
        }
        // All of them known: the broker has not taken the results yet.
        if (orders.every(({ id }) => this.#done.has(id)) && orders.length > 0)
          await this.#pause(RETRY_MS_MIN);
      } catch (error) {
        if (error instanceof GridError && error.code === 'closed' && !this.#end.signal.aborted) {
          this.#registered = false;
          this.#wake.resolve();
        }
        await this.#pause(RETRY_MS_MIN);
      }
    }
  }

  async #carryOut(order: Order): Promise<void> {
    let result: OrderResult;
    try {
      result = { order: order.id, ...(await this.#execute(order)) };
    } catch (error) {
      const { code, message } = asGridError(error, `cannot carry out ${order.id}`, 'bug');
      result = { order: order.id, error: { code, message } };
    }
    this.#results.push(result);
    this.#wake.resolve();
  }

  async #execute(order: Order): Promise<Omit<OrderResult, 'order'>> {
    const { machines } = this.#parts;
    if (order.kind === 'warm') {
      await this.#parts.warm(order.image);
      return {};
    }
    if (order.kind === 'stop') {
      await this.#starting.get(order.vm)?.catch(() => undefined);
      try {
        const vm = machines.status(order.vm);
        if (this.leased) this.#proceed(vm);
        else this.#endPaused(vm);
        await machines.stop(order.vm, order.graceMs);
      } catch (error) {
        if (!(error instanceof GridError) || error.code !== 'not-found') throw error;
      }
      if (this.#restart.delete(order.vm)) await this.#keep();
      return {};
    }
    const before = (await this.#parts.cache()).fetchedBytes;
    if (order.restart) {
      this.#restart.add(order.vm);
      await this.#keep();
      if (!this.leased) throw new GridError('closed', 'this host has no lease to start it under');
    }
    const start = this.#start(order);
    this.#starting.set(order.vm, start);
    let vm: LinkVm;
    try {
      vm = await start;
    } finally {
      this.#starting.delete(order.vm);
    }
    this.#enforce();
    if (vm.readyText !== undefined) vm = await machines.ready(order.vm, order.readyTimeoutMs);
    return {
      timeline: vm.timeline,
      fetchedBytes: Math.max(0, (await this.#parts.cache()).fetchedBytes - before),
    };
  }

  /** An order that comes again finds its VM. */
  async #start(order: Extract<Order, { kind: 'run' }>): Promise<LinkVm> {
    const { machines } = this.#parts;
    const { vm: name, image, memoryBytes, vcpus, network } = order;
    const there = machines.list().find(({ id, state }) => id === name && state !== 'failed');
    return there ?? (await machines.run({ name, image, memoryBytes, vcpus, network }));
  }

  async #keep(): Promise<void> {
    const { file } = this.#parts;
    const next = `${file}.${this.#keeping++}.new`;
    await writeFile(next, JSON.stringify([...this.#restart]) + '\n', { mode: 0o600 });
    await rename(next, file);
  }

  #keeping = 0;
}

function readNames(file: string): string[] {
  try {
    const names: unknown = JSON.parse(readFileSync(file, 'utf8'));
    return Array.isArray(names) ? names.filter((name): name is string => typeof name === 'string') : [];
  } catch {
    return []; // none yet
  }
}
