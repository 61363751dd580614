/**
 * The host's side of a broker: registers, reports, asks for orders and has them carried out (broker-orders.ts) through
 * the agent's own machines and cache. Everything is a call of ours (see core/grid.ts), so a host behind NAT needs no
 * open port. What runs here only by the broker's leave is in broker-lease.ts.
 */
import os from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, GridError } from '../core/errors.ts';
import { ORDERS_WAIT_MS, PLACED_VM } from '../core/grid.ts';
import type { HostFacts, HostReport, Lease, OfferedVersion, Order, OrderResult } from '../core/grid.ts';
import type { BrokerClient } from './broker-client.ts';
import { LeasedVms } from './broker-lease.ts';
import type { MachineSignal } from './broker-lease.ts';
import { OrderWork } from './broker-orders.ts';
import type { LinkVm, OrderParts } from './broker-orders.ts';

export interface LinkParts extends OrderParts {
  readonly client: BrokerClient;
  readonly facts: HostFacts;
  /** What the source offers. */
  versions(): Promise<OfferedVersion[]>;
  /** Where the names of VMs with a restart policy are kept. */
  readonly file: string;
  /** What the file service spent on VMs, by their names here. */
  spent?(): Promise<ReadonlyMap<string, { readonly cpuSeconds: number }>>;
  readonly signal?: (pid: number, signal: MachineSignal) => void;
}

const RETRY_MS_MIN = 200;
const RETRY_MS_MAX = 5_000;
/** The source's list of versions is looked at this often. */
const VERSIONS_EVERY_MS = 10_000;
/** Orders that are done, by id: one that was on its way meanwhile is not carried out again. */
const DONE_KEPT_MAX = 10_000;

export class BrokerLink {
  readonly #parts: LinkParts;
  readonly #end = new AbortController();
  readonly #leased: LeasedVms;
  readonly #orders: OrderWork;
  /** Registered, as the broker saw it last. */
  #registered = false;
  #reportEveryMs = 1_000;
  #sequence = 0;
  readonly #working = new Map<string, Promise<void>>();
  readonly #done = new Set<string>();
  readonly #results: OrderResult[] = [];
  #versionsSent = '';
  #versionsAtMs = -Infinity;
  #versions: OfferedVersion[] = [];
  #wake = Promise.withResolvers<void>();
  readonly #loops: Promise<void>[];

  constructor(parts: LinkParts) {
    this.#parts = parts;
    const { machines, file, log, signal } = parts;
    this.#leased = new LeasedVms({
      list: () => machines.list(),
      file,
      log,
      ...(signal === undefined ? {} : { signal }),
    });
    this.#orders = new OrderWork(parts, this.#leased, () => this.lookAgain());
    this.#loops = [this.#reportLoop(), this.#orderLoop()];
  }

  /** Whether VMs with a restart policy may run now. */
  get leased(): boolean {
    return this.#leased.leased;
  }

  /** The source may offer something else now: it is looked at before the next report, which comes at once. */
  lookAgain(): void {
    this.#versionsAtMs = -Infinity;
    this.#wake.resolve();
  }

  async close(): Promise<void> {
    this.#leased.close();
    this.#orders.close();
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
    const spent = await this.#parts.spent?.();
    // From here to the snapshot nothing is awaited: results and VMs are of one moment.
    const results = [...this.#results];
    const vms = machines.list().filter(({ id }) => PLACED_VM.test(id));
    // One that is just being suspended or resumed may be in neither list of the agent's.
    const hidden = this.#orders.busy().filter((name) => !vms.some(({ id }) => id === name));
    const report: HostReport = {
      host: facts.host,
      incarnation: facts.incarnation,
      sequence: this.#sequence++,
      load: os.loadavg()[0] ?? 0,
      warmBytes: cache.warmBytes,
      vms: [
        ...vms.map((vm) => ({
          name: vm.id,
          state: vm.state,
          ...(vm.reason === undefined ? {} : { reason: vm.reason }),
          consoleSocket: vm.consoleSocket,
          ...(spent?.has(vm.id) ? { cpuSeconds: spent.get(vm.id)!.cpuSeconds } : {}),
        })),
        ...hidden.map((name) => ({ name, state: 'changing' })),
      ],
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
    this.#leased.renew(sentMs, lease.leaseMs, new Set(lease.vms));
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
    const { machines, log } = this.#parts;
    const allowed = new Set(lease.vms);
    const busy = new Set(this.#orders.busy());
    for (const vm of reported) {
      if (allowed.has(vm.id)) {
        this.#leased.proceed(vm);
        continue;
      }
      if (!['running', 'paused', 'suspended'].includes(vm.state)) continue;
      this.#leased.endPaused(vm);
      // What is done to it ends first, and soon: a stopped process answers nobody, a killed one is known to be gone.
      if (busy.has(vm.id)) continue;
      log(`VM ${vm.id} is not this host's any more: it is ended`);
      void this.#leased.drop(vm.id);
      machines.stop(vm.id, 0).catch((error: unknown) => log(`cannot end VM ${vm.id}: ${String(error)}`));
    }
    const there = new Set(machines.list().map(({ id }) => id));
    void this.#leased.dropUnless((id) => there.has(id) || busy.has(id) || allowed.has(id));
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
    this.#results.push(await this.#orders.carryOut(order));
    if (order.kind === 'commit') this.lookAgain();
    this.#wake.resolve();
  }
}
