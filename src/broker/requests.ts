/**
 * What users ask for: VMs, and their end. A request is accepted in one transaction with everything that is needed to
 * carry it out later, so an accepted one survives whatever happens to the broker; `placement.ts` carries it out.
 */
import { createHash, randomBytes } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import { GIB, MIB } from '../core/limits.ts';
import type { Order } from '../core/grid.ts';
import type { Principal } from './access.ts';
import type { Database, Queries, Value } from './database.ts';
import { listImages } from './images.ts';
import { misfit } from './policies/versions.ts';
import type { VersionNeed } from './policies/versions.ts';
import type { Policy } from './policies/hosts.ts';
import { inRange } from './policies/labels.ts';
import { endVm } from './vm-table.ts';
import type { VmRow } from './vm-table.ts';

export interface VmRequest {
  readonly count?: number;
  /** Of the VMs; a number is added when there are several. */
  readonly name?: string;
  /** name or name:version. */
  readonly image?: string;
  /** Ranges of labels: { kernel: '>=6.1 <7' }. */
  readonly labels?: Readonly<Record<string, string>>;
  readonly os?: string;
  readonly kernel?: string;
  readonly libraries?: Readonly<Record<string, string>>;
  readonly memoryBytes?: number;
  readonly vcpus?: number;
  /** A network that the host must be on. */
  readonly network?: string;
  readonly policy?: Policy;
  /** Placed again when its host falls silent or the VM dies. */
  readonly restart?: boolean;
}

export const COUNT_MAX = 1000;
export const MEMORY_BYTES_DEFAULT = 512 * MIB;
export const MEMORY_BYTES_MAX = 4096 * GIB;
/** Idempotency keys are kept this long. */
const KEY_KEPT_MS = 24 * 3_600_000;

export interface VmInfo {
  readonly id: string;
  readonly name: string;
  readonly owner: string;
  readonly job: string;
  readonly state: VmRow['state'];
  readonly image?: string;
  readonly host?: string;
  readonly network?: string;
  /** Its name on the host. */
  readonly placedAs?: string;
  readonly reason?: string;
  readonly memoryBytes: number;
  readonly vcpus: number;
  readonly restart: boolean;
  readonly timeline?: Readonly<Record<string, number>>;
  readonly fetchedBytes?: number;
  readonly console?: string;
  readonly created: string;
}

export interface JobInfo {
  readonly id: string;
  readonly kind: string;
  readonly state: 'running' | 'done' | 'failed';
  readonly done: number;
  readonly total: number;
  readonly created: string;
  readonly vms: readonly VmInfo[];
}

/** The labels that a request needs, however it names them. */
export function needOf(request: VmRequest): VersionNeed {
  const labels = {
    ...Object.fromEntries(
      Object.entries(request.libraries ?? {}).map(([name, range]) => [`library.${name}`, range]),
    ),
    ...(request.os === undefined ? {} : { os: request.os }),
    ...(request.kernel === undefined ? {} : { kernel: request.kernel }),
    ...request.labels,
  };
  return { ...(request.image === undefined ? {} : { image: request.image }), labels };
}

function vmInfo(row: VmRow): VmInfo {
  return {
    id: row.id,
    name: row.name,
    owner: row.owner,
    job: row.job,
    state: row.state,
    ...(row.image === null ? {} : { image: `${row.image}:${row.version}` }),
    ...(row.host === null ? {} : { host: row.host, placedAs: `${row.id}.${row.generation}` }),
    ...(row.network === null ? {} : { network: row.network }),
    ...(row.reason === null ? {} : { reason: row.reason }),
    memoryBytes: row.memory_bytes,
    vcpus: row.vcpus,
    restart: row.restart === 1,
    ...(row.timeline === null ? {} : { timeline: JSON.parse(row.timeline) as Record<string, number> }),
    ...(row.fetched_bytes === null ? {} : { fetchedBytes: row.fetched_bytes }),
    ...(row.console === null ? {} : { console: row.console }),
    created: new Date(row.created_ms).toISOString(),
  };
}

/** SQL that holds for rows that `principal` may see. */
function owned(principal: Principal): { sql: string; values: Value[] } {
  return principal.role === 'operator'
    ? { sql: '1 = 1', values: [] }
    : { sql: 'owner = ?', values: [principal.user] };
}

export class Requests {
  readonly #db: Database;
  /** Something has to be placed or carried out. */
  readonly #wake: (jobs: Iterable<string>) => void;

  constructor(db: Database, wake: (jobs: Iterable<string>) => void) {
    this.#db = db;
    this.#wake = wake;
  }

  /**
   * Accepts a request. With a `key`, the same request again gives the same job; another request under the key is
   * refused. Throws not-found when no image can serve it, bad-request, exists.
   */
  async submit(principal: Principal, request: VmRequest, key?: string): Promise<JobInfo> {
    const need = needOf(request);
    for (const range of Object.values(need.labels)) inRange('0', range); // throws for a malformed one
    // As its placement will: an operator's right to see does not make another's image the operator's to start.
    const candidates = await listImages(this.#db, { user: principal.user, role: 'user' });
    const misfits = candidates
      .filter(({ kind }) => kind === 'disk')
      .map((one) => [`${one.image}:${one.version}`, misfit({ ...one, warmBytes: 0 }, need)] as const);
    if (!misfits.some(([, reason]) => reason === undefined)) {
      const reasons = misfits.slice(0, 5).map(([name, reason]) => `${name} ${reason}`);
      throw new GridError(
        'not-found',
        `no image serves this request${reasons.length === 0 ? ': no host offers any' : `: ${reasons.join('; ')}`}`,
      );
    }
    const body = JSON.stringify(request);
    const hash = createHash('sha256').update(body).digest('hex');
    const nowMs = Date.now();
    const id = await this.#db.transaction(async (tx) => {
      if (key !== undefined) {
        const [known] = await tx.all<{ job: string; request_hash: string }>(
          'SELECT job, request_hash FROM idempotency_keys WHERE owner = ? AND name = ? AND created_ms > ?',
          ...[principal.user, key, nowMs - KEY_KEPT_MS],
        );
        if (known && known.request_hash !== hash) {
          throw new GridError('exists', `the idempotency key '${key}' belongs to another request`);
        }
        if (known) return known.job;
      }
      const job = `job-${randomBytes(6).toString('hex')}`;
      await tx.run(
        `INSERT INTO jobs (id, owner, kind, body, created_ms) VALUES (?, ?, 'request', ?, ?)`,
        ...[job, principal.user, body, nowMs],
      );
      if (key !== undefined) {
        await tx.run('DELETE FROM idempotency_keys WHERE created_ms <= ?', nowMs - KEY_KEPT_MS);
        await tx.run(
          'INSERT INTO idempotency_keys (owner, name, request_hash, job, created_ms) VALUES (?, ?, ?, ?, ?)',
          ...[principal.user, key, hash, job, nowMs],
        );
      }
      const count = request.count ?? 1;
      for (let index = 1; index <= count; index++) {
        const vm = `g${randomBytes(6).toString('hex')}`;
        const name =
          request.name === undefined ? vm : count === 1 ? request.name : `${request.name}-${index}`;
        await tx.run(
          `INSERT INTO vms (id, owner, job, name, network, generation, state, memory_bytes, vcpus, restart, wanted, created_ms)
           VALUES (?, ?, ?, ?, ?, 0, 'requested', ?, ?, ?, 'running', ?)`,
          ...[
            vm,
            principal.user,
            job,
            name,
            request.network ?? null,
            request.memoryBytes ?? MEMORY_BYTES_DEFAULT,
          ],
          ...[request.vcpus ?? 1, request.restart ? 1 : 0, nowMs],
        );
      }
      return job;
    });
    this.#wake([id]);
    return this.job(principal, id);
  }

  async job(principal: Principal, id: string): Promise<JobInfo> {
    const { sql, values } = owned(principal);
    const [row] = await this.#db.all<{ id: string; kind: string; created_ms: number }>(
      `SELECT id, kind, created_ms FROM jobs WHERE id = ? AND ${sql}`,
      ...[id, ...values],
    );
    if (!row) throw new GridError('not-found', `there is no job '${id}'`);
    const vms = (await this.#db.all<VmRow>('SELECT * FROM vms WHERE job = ? ORDER BY name, id', id)).map(
      vmInfo,
    );
    const settled = vms.filter(({ state }) => !['requested', 'placed'].includes(state));
    const failed = vms.some(({ state }) => state === 'failed');
    return {
      id,
      kind: row.kind,
      state: settled.length < vms.length ? 'running' : failed ? 'failed' : 'done',
      done: settled.length,
      total: vms.length,
      created: new Date(row.created_ms).toISOString(),
      vms,
    };
  }

  /** VMs that are there or on their way; with `all` also those that ended. */
  async list(principal: Principal, options: { all?: boolean } = {}): Promise<VmInfo[]> {
    const { sql, values } = owned(principal);
    const which = options.all ? '' : 'AND ended_ms IS NULL';
    const rows = await this.#db.all<VmRow>(
      `SELECT * FROM vms WHERE ${sql} ${which} ORDER BY created_ms DESC, name, id LIMIT ${LISTED_MAX}`,
      ...values,
    );
    return rows.map(vmInfo);
  }

  async #find(queries: Queries, principal: Principal, which: string): Promise<VmRow> {
    const { sql, values } = owned(principal);
    const rows = await queries.all<VmRow>(
      `SELECT * FROM vms WHERE (id = ? OR (name = ? AND ended_ms IS NULL)) AND ${sql} LIMIT 2`,
      ...[which, which, ...values],
    );
    if (rows.length > 1) throw new GridError('bad-request', `several VMs are named '${which}'; use the id`);
    if (!rows[0])
      throw new GridError('not-found', `there is no VM '${which}'; \`gridvfs broker vms\` lists them`);
    return rows[0];
  }

  async vm(principal: Principal, which: string): Promise<VmInfo> {
    return vmInfo(await this.#find(this.#db, principal, which));
  }

  /** Asks for the end of a VM, by id or name. Done when its state is `stopped`. Idempotent. */
  async stop(principal: Principal, which: string, graceMs: number): Promise<VmInfo> {
    const row = await this.#db.transaction(async (tx) => {
      const vm = await this.#find(tx, principal, which);
      if (vm.ended_ms !== null || vm.state === 'stopping') return vm;
      await tx.run(`UPDATE vms SET wanted = 'stopped' WHERE id = ?`, vm.id);
      if (vm.state === 'requested' || vm.state === 'lost') {
        // A lost one whose host comes back is ended there: it is not among those that may run.
        await endVm(tx, vm, 'stopped');
      } else {
        const placed = `${vm.id}.${vm.generation}`;
        const order: Order = { id: `${placed}.stop`, kind: 'stop', vm: placed, graceMs };
        await tx.run(
          `UPDATE orders SET state = 'void', done_ms = ? WHERE vm = ? AND state = 'open'`,
          Date.now(),
          vm.id,
        );
        await tx.run(
          `INSERT INTO orders (id, host, vm, kind, body, state, created_ms) VALUES (?, ?, ?, 'stop', ?, 'open', ?)`,
          ...[order.id, vm.host, vm.id, JSON.stringify(order), Date.now()],
        );
        await tx.run(`UPDATE vms SET state = 'stopping' WHERE id = ?`, vm.id);
      }
      return { ...vm, state: 'stopping' as const };
    });
    this.#wake([row.job]);
    return this.vm(principal, row.id);
  }

  /** Time, memory and bytes of VMs, those that run still up to now. */
  async usage(principal: Principal): Promise<Record<string, unknown>[]> {
    const { sql, values } = owned(principal);
    const rows = await this.#db.all<{
      vm: string;
      generation: number;
      owner: string;
      host: string;
      memory_bytes: number;
      fetched_bytes: number | null;
      started_ms: number;
      ended_ms: number | null;
    }>(`SELECT * FROM usage WHERE ${sql} ORDER BY started_ms, vm LIMIT ${LISTED_MAX}`, ...values);
    const nowMs = Date.now();
    return rows.map((row) => ({
      vm: row.vm,
      generation: row.generation,
      owner: row.owner,
      host: row.host,
      seconds: ((row.ended_ms ?? nowMs) - row.started_ms) / 1000,
      memoryByteSeconds: (((row.ended_ms ?? nowMs) - row.started_ms) / 1000) * row.memory_bytes,
      fetchedBytes: row.fetched_bytes ?? 0,
      running: row.ended_ms === null,
    }));
  }
}

/** Rows of one answer. */
const LISTED_MAX = 10_000;
