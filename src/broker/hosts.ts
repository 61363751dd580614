/**
 * Hosts: they register, report, and fall silent. A report is one transaction: results of orders, the VMs that the
 * host has, and the lease that it gets for that. What a host says is believed of its own VMs only.
 *
 *   registered → up, its futures recounted
 *   no report for a lease and the margin → silent: its VMs with a restart policy are asked for again, others are lost
 *   a report of a silent host, or of an earlier incarnation, is refused; the host registers again, and its list of
 *   VMs decides: a lost one that nobody replaced runs on, one that was replaced is ended there
 */
import { GridError } from '../core/errors.ts';
import type { HostFacts, HostReport, Lease, Order, ReportedVm } from '../core/grid.ts';
import { PLACED_VM, REPORT_EVERY_MS } from '../core/grid.ts';
import { isName } from '../core/manifest.ts';
import type { Principal } from './access.ts';
import type { Database, Queries } from './database.ts';
import { takeOffers } from './images.ts';
import type { Loads } from './loads.ts';
import { orderSuspend } from './lives.ts';
import { takeResult } from './results.ts';
import { noteCpu } from './usage.ts';
import { endJobs, endVm, ON_HOST, placedAs, recountFutures, settleOrders } from './vm-table.ts';
import type { VmRow } from './vm-table.ts';

export interface HostInfo {
  readonly id: string;
  readonly state: 'up' | 'silent';
  readonly vcpus: number;
  readonly memoryBytes: number;
  readonly accelerator?: string;
  readonly unusable?: string;
  readonly virtual: boolean;
  readonly networks: readonly string[];
  readonly source: string;
  readonly load: number;
  readonly warmBytes: Readonly<Record<string, number>>;
  /** What it promises beyond what runs. */
  readonly future: { readonly memoryBytes: number; readonly vcpus: number; readonly machines: number };
  readonly vms: number;
}

export class Hosts {
  readonly #db: Database;
  readonly #loads: Loads;
  /** Called with the jobs that something changed for. */
  readonly #changed: (jobs: Iterable<string>) => void;

  constructor(db: Database, loads: Loads, changed: (jobs: Iterable<string>) => void) {
    this.#db = db;
    this.#loads = loads;
    this.#changed = changed;
  }

  async register(principal: Principal, facts: HostFacts): Promise<Lease> {
    for (const name of [facts.host, ...facts.networks]) {
      if (!isName(name))
        throw new GridError('bad-request', `'${String(name)}' cannot be the name of a host or network`);
    }
    await this.#db.transaction(async (tx) => {
      const [known] = await tx.all<{ owner: string }>('SELECT owner FROM hosts WHERE id = ?', facts.host);
      if (known && known.owner !== principal.user) {
        throw new GridError('denied', `host '${facts.host}' was registered with another agent's token`);
      }
      await tx.run(
        `INSERT INTO hosts (id, incarnation, sequence, state, vcpus, memory_bytes, guest_vcpus, guest_memory_bytes,
           accelerator, unusable, is_virtual, source, owner, registered_ms)
         VALUES (?, ?, -1, 'up', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT (id) DO UPDATE SET incarnation = excluded.incarnation, sequence = -1, state = 'up',
           vcpus = excluded.vcpus, memory_bytes = excluded.memory_bytes, guest_vcpus = excluded.guest_vcpus,
           guest_memory_bytes = excluded.guest_memory_bytes, accelerator = excluded.accelerator,
           unusable = excluded.unusable, is_virtual = excluded.is_virtual, source = excluded.source,
           registered_ms = excluded.registered_ms`,
        ...[
          facts.host,
          facts.incarnation,
          facts.vcpus,
          facts.memoryBytes,
          facts.guestVcpus,
          facts.guestMemoryBytes,
        ],
        ...[facts.accelerator ?? null, facts.unusable ?? null, facts.virtual ? 1 : 0, facts.source],
        ...[principal.user, Date.now()],
      );
      await tx.run('DELETE FROM host_networks WHERE host = ?', facts.host);
      for (const network of facts.networks) {
        await tx.run(
          'INSERT INTO networks (id, created_ms) VALUES (?, ?) ON CONFLICT (id) DO NOTHING',
          ...[network, Date.now()],
        );
        await tx.run(
          'INSERT INTO host_networks (host, network) VALUES (?, ?) ON CONFLICT DO NOTHING',
          facts.host,
          network,
        );
      }
      await recountFutures(tx, facts.host);
      await this.#grant(tx, facts.host, facts.incarnation);
    });
    return this.#lease(facts.host, []);
  }

  async report(principal: Principal, report: HostReport): Promise<Lease> {
    const jobs = new Set<string>();
    const allowed = await this.#db.transaction(async (tx) => {
      jobs.clear();
      await this.#current(tx, principal, report);
      await tx.run('UPDATE hosts SET sequence = ? WHERE id = ?', report.sequence, report.host);
      for (const result of report.results) await takeResult(tx, report.host, result, jobs);
      if (report.versions) await takeOffers(tx, report.host, report.versions);
      await this.#judge(tx, report, jobs);
      await recountFutures(tx, report.host);
      await this.#grant(tx, report.host, report.incarnation);
      const rows = await tx.all<{ id: string; generation: number }>(
        `SELECT id, generation FROM vms WHERE host = ? AND state IN (${ON_HOST})`,
        report.host,
      );
      return rows.map(placedAs);
    });
    this.#loads.take(report);
    if (jobs.size > 0) this.#changed(jobs);
    return this.#lease(report.host, allowed);
  }

  /** Throws denied for a foreign host, closed where the host has to register (again). */
  async #current(
    tx: Queries,
    principal: Principal,
    of: { host: string; incarnation: string; sequence?: number },
  ) {
    const [host] = await tx.all<{ owner: string; incarnation: string; sequence: number; state: string }>(
      'SELECT owner, incarnation, sequence, state FROM hosts WHERE id = ?',
      of.host,
    );
    if (host && host.owner !== principal.user) {
      throw new GridError('denied', `host '${of.host}' was registered with another agent's token`);
    }
    if (!host || host.incarnation !== of.incarnation || host.state !== 'up') {
      throw new GridError('closed', `host '${of.host}' has to register again`);
    }
    if (of.sequence !== undefined && of.sequence <= host.sequence) {
      throw new GridError('closed', `a later report of host '${of.host}' is here already`);
    }
  }

  /** Orders that are not carried out yet, oldest first. */
  async orders(principal: Principal, host: string, incarnation: string): Promise<Order[]> {
    await this.#current(this.#db, principal, { host, incarnation });
    const rows = await this.#db.all<{ body: string }>(
      `SELECT body FROM orders WHERE host = ? AND state = 'open' ORDER BY created_ms, id`,
      host,
    );
    return rows.map((row) => JSON.parse(row.body) as Order);
  }

  /** Compares the VMs that the host should have with those that it says it has. */
  async #judge(tx: Queries, report: HostReport, jobs: Set<string>): Promise<void> {
    const there = new Map<string, ReportedVm>(
      report.vms.filter(({ name }) => PLACED_VM.test(name)).map((vm) => [vm.name, vm]),
    );
    const rows = await tx.all<VmRow>(
      `SELECT * FROM vms WHERE host = ? AND state IN (${ON_HOST}, 'lost') AND ended_ms IS NULL`,
      report.host,
    );
    for (const vm of rows) {
      const seen = there.get(placedAs(vm));
      const alive = seen !== undefined && seen.state !== 'failed' && seen.state !== 'stopped';
      if (alive) {
        if (seen.cpuSeconds) await noteCpu(tx, vm, seen.cpuSeconds);
        if (seen.consoleSocket !== undefined && vm.console !== seen.consoleSocket) {
          await tx.run('UPDATE vms SET console = ? WHERE id = ?', seen.consoleSocket, vm.id);
        }
        if (vm.state === 'lost') {
          await tx.run(`UPDATE vms SET state = 'running', reason = NULL WHERE id = ?`, vm.id);
          jobs.add(vm.job);
        }
        if (seen.state === 'suspended' && (vm.state === 'lost' || vm.state === 'running')) {
          await this.#suspendedThere(tx, vm);
        }
      } else if (vm.state === 'running') {
        jobs.add(vm.job);
        const reason = seen?.reason ?? 'its host does not have it any more';
        await endVm(tx, vm, vm.restart === 1 ? 'requested' : 'failed', reason);
      } else if (vm.state === 'lost') {
        await endVm(tx, vm, 'lost', 'its host came back without it');
        jobs.add(vm.job);
      }
      // 'placed', 'suspending' and 'stopping' wait for the result of their order.
    }
  }

  /** Suspended there while the broker takes it for running: on its host's own command line, or by an order whose
   * result was given up. It becomes a checkpoint that others can resume, too. */
  async #suspendedThere(tx: Queries, vm: VmRow): Promise<void> {
    const [open] = await tx.all(`SELECT id FROM orders WHERE vm = ? AND state = 'open' LIMIT 1`, vm.id);
    if (open) return; // a checkpoint is being made: it goes on
    await tx.run(`UPDATE vms SET state = 'suspending', wanted = 'suspended' WHERE id = ?`, vm.id);
    await orderSuspend(tx, vm, null);
  }

  /** Takes hosts that were silent for too long out of service. True when VMs have to be placed again. */
  async expire(): Promise<boolean> {
    let again = false;
    const up = await this.#db.all<{ id: string }>(`SELECT id FROM hosts WHERE state = 'up'`);
    for (const { id } of up) {
      if (!this.#loads.isSilent(id)) continue;
      const jobs = new Set<string>();
      await this.#db.transaction(async (tx) => {
        jobs.clear();
        // A report may have come while this waited for its turn.
        if (!this.#loads.isSilent(id)) return;
        await tx.run(`UPDATE hosts SET state = 'silent' WHERE id = ?`, id);
        const given = await tx.all<{ job: string }>(
          `SELECT DISTINCT job FROM orders WHERE host = ? AND state = 'open' AND vm IS NULL AND job IS NOT NULL`,
          id,
        );
        await tx.run(
          `UPDATE orders SET state = 'void', done_ms = ? WHERE host = ? AND state = 'open'`,
          Date.now(),
          id,
        );
        for (const { job } of given) {
          await settleOrders(tx, job);
          jobs.add(job);
        }
        const vms = await tx.all<VmRow>(`SELECT * FROM vms WHERE host = ? AND state IN (${ON_HOST})`, id);
        for (const vm of vms) {
          jobs.add(vm.job);
          const error = { code: 'unreachable' as const, message: `host ${id} fell silent` };
          for (const job of await endJobs(tx, vm.id, 'all', { error })) jobs.add(job);
          if (vm.restart === 1 && vm.wanted !== 'stopped') {
            await tx.run(`UPDATE vms SET wanted = 'running' WHERE id = ?`, vm.id);
            await endVm(tx, vm, 'requested', `host ${id} fell silent`);
            again = true;
          } else {
            await tx.run(
              `UPDATE vms SET state = 'lost', reason = ? WHERE id = ?`,
              `host ${id} fell silent`,
              vm.id,
            );
          }
        }
      });
      if (jobs.size > 0) this.#changed(jobs);
    }
    return again;
  }

  async #grant(tx: Queries, host: string, incarnation: string): Promise<void> {
    await tx.run(
      `INSERT INTO leases (host, incarnation, granted_ms, lease_ms) VALUES (?, ?, ?, ?)
       ON CONFLICT (host) DO UPDATE SET incarnation = excluded.incarnation, granted_ms = excluded.granted_ms,
         lease_ms = excluded.lease_ms`,
      ...[host, incarnation, Date.now(), this.#loads.times.leaseMs],
    );
    // Inside the transaction: nobody finds the host silent between its report and its lease.
    this.#loads.renew(host);
  }

  #lease(host: string, vms: readonly string[]): Lease {
    this.#loads.renew(host);
    const { leaseMs } = this.#loads.times;
    return { leaseMs, reportEveryMs: Math.min(REPORT_EVERY_MS, leaseMs / 5), vms };
  }

  async list(): Promise<HostInfo[]> {
    const rows = await this.#db.all<{
      id: string;
      state: 'up' | 'silent';
      vcpus: number;
      memory_bytes: number;
      accelerator: string | null;
      unusable: string | null;
      is_virtual: number;
      source: string;
      future_memory: number | null;
      future_vcpus: number | null;
      machines: number | null;
      vms: number;
    }>(
      `SELECT h.*, f.memory_bytes AS future_memory, f.vcpus AS future_vcpus, f.machines,
         (SELECT count(*) FROM vms v WHERE v.host = h.id AND v.state IN (${ON_HOST})) AS vms
       FROM hosts h LEFT JOIN futures f ON f.host = h.id ORDER BY h.id`,
    );
    const networks = await this.#db.all<{ host: string; network: string }>(
      'SELECT host, network FROM host_networks ORDER BY network',
    );
    return rows.map((row) => ({
      id: row.id,
      state: row.state,
      vcpus: row.vcpus,
      memoryBytes: row.memory_bytes,
      ...(row.accelerator === null ? {} : { accelerator: row.accelerator }),
      ...(row.unusable === null ? {} : { unusable: row.unusable }),
      virtual: row.is_virtual === 1,
      networks: networks.filter(({ host }) => host === row.id).map(({ network }) => network),
      source: row.source,
      ...this.#loads.of(row.id),
      future: {
        memoryBytes: row.future_memory ?? 0,
        vcpus: row.future_vcpus ?? 0,
        machines: row.machines ?? 0,
      },
      vms: row.vms,
    }));
  }
}
