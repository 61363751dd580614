/**
 * Gives requested VMs a version and a host. Each VM is placed in one transaction that takes its part of the host's
 * future, writes the order, and says who carries it: a broker that is killed before has changed nothing, one that is
 * killed after finds the order still open. Runs one at a time; whoever wakes it while it runs makes it run again.
 */
import type { Principal } from './access.ts';
import type { Database, Queries, Value } from './database.ts';
import { listImages } from './images.ts';
import type { Loads } from './loads.ts';
import { hostMisfit, rankHosts } from './policies/hosts.ts';
import type { HostCandidate, HostNeed, RankedHost } from './policies/hosts.ts';
import { misfit, rankVersions } from './policies/versions.ts';
import type { RankedVersion } from './policies/versions.ts';
import { MEMORY_BYTES_DEFAULT, needOf } from './requests.ts';
import type { VmRequest } from './requests.ts';
import { giveOrder, placedAs } from './vm-table.ts';
import { segmentsOf } from './segments.ts';
import type { VmRow } from './vm-table.ts';
import { placeVolumes, volumeBytesOn, volumesToPlace } from './volumes.ts';
import type { PlacedVolumes } from './volumes.ts';

/** A guest that did not answer by then is taken for failed. */
const READY_TIMEOUT_MS = 300_000;
/** A host that failed to start a VM is not asked again for so long; others may do better meanwhile. */
const FAILED_THERE_MS = 30_000;
/** VMs that one round looks at; the next round goes on. */
const ROUND_MAX = 1000;

export interface Explanation {
  readonly versions: readonly { reference: string; why: string }[];
  readonly rejectedVersions: readonly { reference: string; why: string }[];
  readonly hosts: readonly { host: string; why: string }[];
  readonly rejectedHosts: readonly { host: string; why: string }[];
  /** What a request would get now; missing where nothing fits. */
  readonly choice?: { readonly image: string; readonly host: string };
}

/** What a machine is started from: an image version, or a checkpoint of one. */
interface Start {
  readonly image: string;
  readonly version: string;
  /** Whose warm bytes count. */
  readonly manifest: string;
  readonly checkpoint?: string;
}

export class Placement {
  readonly #db: Database;
  readonly #loads: Loads;
  readonly #placed: (host: string, job: string) => void;

  constructor(db: Database, loads: Loads, placed: (host: string, job: string) => void) {
    this.#db = db;
    this.#loads = loads;
    this.#placed = placed;
  }

  /** Places what can be placed now. */
  async round(): Promise<void> {
    const waiting = await this.#db.all<VmRow & { body: string; role: string | null }>(
      `SELECT v.*, j.body FROM vms v JOIN jobs j ON j.id = v.job
       WHERE v.state = 'requested' ORDER BY v.created_ms, v.id LIMIT ${ROUND_MAX}`,
    );
    for (const vm of waiting) {
      const request = JSON.parse(vm.body) as VmRequest;
      const host = await this.#db.transaction((tx) => this.#place(tx, vm, request));
      if (host !== undefined) this.#placed(host, vm.job);
    }
  }

  async #place(tx: Queries, vm: VmRow, request: VmRequest): Promise<string | undefined> {
    const [now] = await tx.all<VmRow>(`SELECT * FROM vms WHERE id = ? AND state = 'requested'`, vm.id);
    if (!now) return undefined;
    const need = hostNeed(request);
    const volumes = await volumesToPlace(tx, vm.id);
    if (typeof volumes === 'string') {
      if (now.reason !== volumes) await tx.run('UPDATE vms SET reason = ? WHERE id = ?', volumes, vm.id);
      return undefined;
    }
    for (const start of await this.#starts(tx, now, request)) {
      const [best] = rankHosts(await this.#hosts(tx, start, request, now, volumes), need);
      if (!best) continue;
      const taken = await tx.run(
        `UPDATE futures SET memory_bytes = memory_bytes - ?, vcpus = vcpus - ?, machines = machines - 1
         WHERE host = ? AND memory_bytes >= ? AND vcpus >= ? AND machines >= 1`,
        ...[need.memoryBytes, need.vcpus, best.host, need.memoryBytes, need.vcpus],
      );
      if (taken === 0) continue;
      const nowMs = Date.now();
      const generation = now.generation + 1;
      const segments = await segmentsOf(tx, vm);
      const placed = placedAs({ id: vm.id, generation });
      const carried = await placeVolumes(tx, volumes, best.host);
      await tx.run(
        `UPDATE vms SET state = 'placed', reason = ?, host = ?, image = ?, version = ?, generation = ?, placed_ms = ? WHERE id = ?`,
        ...[best.why, best.host, start.image, start.version, generation, nowMs, vm.id],
      );
      await giveOrder(tx, best.host, vm.id, {
        id: `${placed}.run`,
        kind: 'run',
        vm: placed,
        image: `${start.image}:${start.version}`,
        memoryBytes: need.memoryBytes,
        vcpus: need.vcpus,
        network: 'user',
        ...(segments.length === 0 ? {} : { segments }),
        // A checkpoint has them as they were then.
        ...(carried.length === 0 || start.checkpoint !== undefined ? {} : { volumes: carried }),
        ...(start.checkpoint === undefined ? seedOf(request, vm.name) : {}),
        restart: vm.restart === 1,
        readyTimeoutMs: READY_TIMEOUT_MS,
        ...(start.checkpoint === undefined ? {} : { checkpoint: start.checkpoint }),
      });
      await tx.run(
        `INSERT INTO virtualization (virtual_kind, virtual_id, physical_kind, physical_id, since_ms)
         VALUES ('vm', ?, 'host', ?, ?)`,
        ...[vm.id, best.host, nowMs],
      );
      await tx.run(
        `INSERT INTO usage (vm, generation, owner, host, memory_bytes, vcpus, started_ms) VALUES (?, ?, ?, ?, ?, ?, ?)`,
        ...[vm.id, generation, vm.owner, best.host, need.memoryBytes, need.vcpus, nowMs],
      );
      return best.host;
    }
    const where =
      now.target === null ? 'no host that is up' : `host ${now.target} is not up, or not one that`;
    const why = `${where} offers a fitting image and has room; it is placed when one does`;
    if (now.reason !== why) await tx.run('UPDATE vms SET reason = ? WHERE id = ?', why, vm.id);
    return undefined;
  }

  /** What the VM may start from, best first: its last checkpoint, where there is one, and nothing else then. */
  async #starts(tx: Queries, vm: VmRow, request: VmRequest): Promise<Start[]> {
    if (vm.checkpoint === null) return this.#versions(tx, { user: vm.owner, role: 'user' }, request);
    return [
      {
        image: vm.image!,
        version: vm.version!,
        manifest: vm.checkpoint_manifest!,
        checkpoint: vm.checkpoint,
      },
    ];
  }

  async #candidates(tx: Queries, principal: Principal) {
    const up = await tx.all<{ id: string }>(`SELECT id FROM hosts WHERE state = 'up'`);
    const images = (await listImages(tx, principal)).filter(({ kind }) => kind === 'disk');
    return images.map((one) => ({
      ...one,
      warmBytes: Math.max(0, ...up.map(({ id }) => this.#loads.of(id).warmBytes[one.manifest] ?? 0)),
    }));
  }

  async #versions(tx: Queries, principal: Principal, request: VmRequest): Promise<RankedVersion[]> {
    return rankVersions(await this.#candidates(tx, principal), needOf(request));
  }

  async #hosts(
    tx: Queries,
    start: Start,
    request: VmRequest,
    vm: VmRow | undefined,
    volumes: PlacedVolumes,
  ): Promise<HostCandidate[]> {
    const conditions: string[] = [];
    const values: Value[] = [];
    const add = (text: string, value: Value) => {
      conditions.push(`AND ${text}`);
      values.push(value);
    };
    if (request.network !== undefined) {
      add('EXISTS (SELECT 1 FROM host_networks n WHERE n.host = h.id AND n.network = ?)', request.network);
    }
    if (vm?.target) add('h.id = ?', vm.target);
    if (vm?.avoid) add('h.id <> ?', vm.avoid);
    // Another one would refuse the state of its processor.
    if (start.checkpoint !== undefined) add('h.accelerator = ?', vm?.checkpoint_accelerator ?? null);
    const rows = await tx.all<{
      id: string;
      memory_bytes: number;
      vcpus: number;
      machines: number;
      failures: number;
    }>(
      `SELECT h.id, f.memory_bytes, f.vcpus, f.machines,
         (SELECT count(*) FROM orders o WHERE o.vm = ? AND o.host = h.id AND o.kind = 'run' AND o.state = 'failed'
            AND o.created_ms >= ? AND o.done_ms >= ?) AS failures
       FROM hosts h JOIN futures f ON f.host = h.id
         JOIN host_versions o ON o.host = h.id AND o.image = ? AND o.version = ?
       WHERE h.state = 'up' AND h.is_virtual = 0 ${conditions.join(' ')}`,
      ...[vm?.id ?? '', vm?.ran_ms ?? 0, Date.now() - FAILED_THERE_MS, start.image, start.version, ...values],
    );
    return rows.map((row) => {
      const { load, warmBytes } = this.#loads.of(row.id);
      return {
        host: row.id,
        memoryBytes: row.memory_bytes,
        vcpus: row.vcpus,
        machines: row.machines,
        warmBytes: warmBytes[start.manifest] ?? 0,
        volumeBytes: volumeBytesOn(volumes, row.id, warmBytes),
        load,
        failedBefore: row.failures > 0,
      };
    });
  }

  /** What the matcher thinks of every version and host, without starting anything. */
  async explain(principal: Principal, request: VmRequest): Promise<Explanation> {
    const need = needOf(request);
    const candidates = await this.#candidates(this.#db, principal);
    const versions = rankVersions(candidates, need);
    const reference = (one: { image: string; version: string }) => `${one.image}:${one.version}`;
    let hosts: RankedHost[] = [];
    let rejectedHosts: { host: string; why: string }[] = [];
    let choice: { image: string; host: string } | undefined;
    for (const version of versions) {
      const all = await this.#hosts(this.#db, version, request, undefined, []);
      hosts = rankHosts(all, hostNeed(request));
      rejectedHosts = all.flatMap((host) => {
        const why = hostMisfit(host, hostNeed(request));
        return why === undefined ? [] : [{ host: host.host, why }];
      });
      if (hosts[0]) {
        choice = { image: reference(version), host: hosts[0].host };
        break;
      }
    }
    return {
      versions: versions.map((one) => ({ reference: reference(one), why: one.why })),
      rejectedVersions: candidates.flatMap((one) => {
        const why = misfit(one, need);
        return why === undefined ? [] : [{ reference: reference(one), why }];
      }),
      hosts: hosts.map(({ host, why }) => ({ host, why })),
      rejectedHosts,
      ...(choice === undefined ? {} : { choice }),
    };
  }
}

/** What a guest is told by its seed, where the request has something for one. */
function seedOf({ sshKeys, userData }: VmRequest, name: string) {
  if (sshKeys === undefined && userData === undefined) return {};
  return {
    ...(sshKeys === undefined ? {} : { sshKeys }),
    ...(userData === undefined ? {} : { userData }),
    hostName: name.replaceAll('_', '-'),
  };
}

function hostNeed(request: VmRequest): HostNeed {
  return {
    memoryBytes: request.memoryBytes ?? MEMORY_BYTES_DEFAULT,
    vcpus: request.vcpus ?? 1,
    policy: request.policy ?? 'warm',
  };
}
