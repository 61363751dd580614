/**
 * What users ask for: VMs, and what became of it. A request is accepted in one transaction with everything that is needed to
 * carry it out later, so an accepted one survives whatever happens to the broker; `placement.ts` carries it out.
 */
import { createHash, randomBytes } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import { GIB, MIB } from '../core/limits.ts';
import type { Principal } from './access.ts';
import type { Database, Queries, Value } from './database.ts';
import { listImages } from './images.ts';
import { checkQuota } from './quotas.ts';
import { misfit } from './policies/versions.ts';
import type { VersionNeed } from './policies/versions.ts';
import type { Policy } from './policies/hosts.ts';
import { inRange } from './policies/labels.ts';
import { placedAs } from './vm-table.ts';
import { claimVolumes } from './volumes.ts';
import type { VolumeUse } from './volumes.ts';
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
  /** A checkpoint this often: what `restart` goes on from. */
  readonly checkpointEveryMs?: number;
  readonly volumes?: readonly VolumeUse[];
  /** Public keys that let one in as the guest's first user, and cloud-init's user-data: by the guest's seed. */
  readonly sshKeys?: readonly string[];
  readonly userData?: string;
  /** A shell command that is run in each guest when it has booted. */
  readonly command?: string;
}

interface NamedVm {
  readonly id: string;
  readonly name: string;
}

export const COUNT_MAX = 1000;
/** A checkpoint stops its guest for a moment, and fills the store. */
export const CHECKPOINT_EVERY_MS_MIN = 10_000;
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
  readonly command?: CommandInfo;
  /** Its last checkpoint, and when that was made. */
  readonly checkpoint?: string;
  readonly checkpointed?: string;
  readonly created: string;
  /** Since when it waits, or waited, for its last placement: the request, a resumption, a move. */
  readonly asked: string;
  /** When its last placement was made. */
  readonly placed?: string;
}

/** A command that is run in a guest; neither exit code nor error: it is not over. */
export interface CommandInfo {
  readonly command: string;
  readonly exitCode?: number;
  /** The end of what it said. */
  readonly output?: string;
  readonly error?: string;
}

export interface JobInfo {
  readonly id: string;
  readonly kind: string;
  readonly state: 'running' | 'done' | 'failed';
  readonly done: number;
  readonly total: number;
  readonly created: string;
  readonly vms: readonly VmInfo[];
  /** Why it failed, where it is about one VM or image. */
  readonly error?: JobError;
  readonly result?: Readonly<Record<string, unknown>>;
}

interface JobError {
  readonly code: string;
  readonly message: string;
}

interface JobRow {
  readonly id: string;
  readonly kind: string;
  readonly created_ms: number;
  readonly vm: string | null;
  /** Null of requests: that of their VMs. */
  readonly state: 'running' | 'done' | 'failed' | null;
  readonly error: string | null;
  readonly result: string | null;
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
  const askedMs = row.asked_ms ?? row.created_ms;
  return {
    id: row.id,
    name: row.name,
    owner: row.owner,
    job: row.job,
    state: row.state,
    ...(row.image === null ? {} : { image: `${row.image}:${row.version}` }),
    ...(row.host === null ? {} : { host: row.host, placedAs: placedAs(row) }),
    ...(row.network === null ? {} : { network: row.network }),
    ...(row.reason === null ? {} : { reason: row.reason }),
    memoryBytes: row.memory_bytes,
    vcpus: row.vcpus,
    restart: row.restart === 1,
    ...(row.timeline === null ? {} : { timeline: JSON.parse(row.timeline) as Record<string, number> }),
    ...(row.fetched_bytes === null ? {} : { fetchedBytes: row.fetched_bytes }),
    ...(row.console === null ? {} : { console: row.console }),
    ...(row.command === null ? {} : { command: commandInfo(row.command, row.command_result) }),
    ...(row.checkpoint === null ? {} : { checkpoint: row.checkpoint }),
    ...(row.checkpoint_ms === null ? {} : { checkpointed: new Date(row.checkpoint_ms).toISOString() }),
    created: new Date(row.created_ms).toISOString(),
    asked: new Date(askedMs).toISOString(),
    // One of before is told no more.
    ...(row.placed_ms === null || row.placed_ms < askedMs
      ? {}
      : { placed: new Date(row.placed_ms).toISOString() }),
  };
}

function commandInfo(command: string, result: string | null): CommandInfo {
  return { command, ...(JSON.parse(result ?? '{}') as Partial<CommandInfo>) };
}

/** For lists: what a command said is told of single machines and workspaces. */
export function withoutOutput<T extends Pick<VmInfo, 'command'>>(vm: T): T {
  if (vm.command === undefined) return vm;
  const { output: _, ...command } = vm.command;
  return { ...vm, command };
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
   * refused. `within` does what belongs to it in its transaction. Throws not-found when no image can serve it, bad-request, exists.
   */
  async submit(
    principal: Principal,
    request: VmRequest,
    key?: string,
    within?: (tx: Queries, job: string, vms: readonly NamedVm[]) => Promise<void>,
  ): Promise<JobInfo> {
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
    const nowMs = Date.now();
    const id = await this.#db.transaction((tx) =>
      this.once(tx, principal, key, request, 'request', null, async (job) => {
        const count = request.count ?? 1;
        await checkQuota(tx, principal.user, {
          machines: count,
          vcpus: count * (request.vcpus ?? 1),
          memoryBytes: count * (request.memoryBytes ?? MEMORY_BYTES_DEFAULT),
        });
        const vms: NamedVm[] = [];
        for (let index = 1; index <= count; index++) {
          const vm = `g${randomBytes(6).toString('hex')}`;
          const name =
            request.name === undefined ? vm : count === 1 ? request.name : `${request.name}-${index}`;
          vms.push({ id: vm, name });
          await tx.run(
            `INSERT INTO vms (id, owner, job, name, network, generation, state, memory_bytes, vcpus, restart,
             checkpoint_every_ms, wanted, created_ms, command)
           VALUES (?, ?, ?, ?, ?, 0, 'requested', ?, ?, ?, ?, 'running', ?, ?)`,
            ...[
              vm,
              principal.user,
              job,
              name,
              request.network ?? null,
              request.memoryBytes ?? MEMORY_BYTES_DEFAULT,
            ],
            ...[request.vcpus ?? 1, request.restart ? 1 : 0, request.checkpointEveryMs ?? null, nowMs],
            request.command ?? null,
          );
        }
        await claimVolumes(tx, principal, request.volumes ?? [], vms, request.restart);
        await within?.(tx, job, vms);
      }),
    );
    this.#wake([id]);
    return this.job(principal, id);
  }

  /**
   * Makes a job and does `begin` with its id, in the caller's transaction. With a `key`, the same call again gives the
   * same job; another call under the key is refused with exists.
   */
  async once(
    tx: Queries,
    principal: Principal,
    key: string | undefined,
    body: object,
    kind: string,
    vm: string | null,
    begin: (job: string) => Promise<void>,
  ): Promise<string> {
    const nowMs = Date.now();
    const text = JSON.stringify(body);
    const hash = createHash('sha256').update(text).digest('hex');
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
      'INSERT INTO jobs (id, owner, kind, body, created_ms, vm, state) VALUES (?, ?, ?, ?, ?, ?, ?)',
      ...[job, principal.user, kind, text, nowMs, vm, kind === 'request' ? null : 'running'],
    );
    if (key !== undefined) {
      await tx.run('DELETE FROM idempotency_keys WHERE created_ms <= ?', nowMs - KEY_KEPT_MS);
      await tx.run(
        'INSERT INTO idempotency_keys (owner, name, request_hash, job, created_ms) VALUES (?, ?, ?, ?, ?)',
        ...[principal.user, key, hash, job, nowMs],
      );
    }
    await begin(job);
    return job;
  }

  async job(principal: Principal, id: string): Promise<JobInfo> {
    const { sql, values } = owned(principal);
    const [row] = await this.#db.all<JobRow>(
      `SELECT id, kind, created_ms, vm, state, error, result FROM jobs WHERE id = ? AND ${sql}`,
      ...[id, ...values],
    );
    if (!row) throw new GridError('not-found', `there is no job '${id}'`);
    const [column, value] = row.kind === 'request' ? ['job', id] : ['id', row.vm];
    const vms = (
      await this.#db.all<VmRow>(`SELECT * FROM vms WHERE ${column} = ? ORDER BY name, id`, value)
    ).map(vmInfo);
    const common = { id, kind: row.kind, created: new Date(row.created_ms).toISOString(), vms };
    if (row.state !== null) {
      const [orders] = await this.#db.all<{ total: number; done: number }>(
        `SELECT count(*) AS total, count(done_ms) AS done FROM orders WHERE job = ? AND vm IS NULL`,
        id,
      );
      const several = orders!.total > 0;
      return {
        ...common,
        state: row.state,
        done: several ? orders!.done : row.state === 'running' ? 0 : 1,
        total: several ? orders!.total : 1,
        ...(row.error === null ? {} : { error: JSON.parse(row.error) as JobError }),
        ...(row.result === null ? {} : { result: JSON.parse(row.result) as Record<string, unknown> }),
      };
    }
    const settled = vms.filter(({ state }) => !['requested', 'placed'].includes(state));
    const failed = vms.some(({ state }) => state === 'failed');
    return {
      ...common,
      state: settled.length < vms.length ? 'running' : failed ? 'failed' : 'done',
      done: settled.length,
      total: vms.length,
    };
  }

  /** VMs that are there or on their way; with `all` also those that ended, else those that
   * ended after `endedAfterMs`. */
  async list(
    principal: Principal,
    options: { all?: boolean; endedAfterMs?: number } = {},
  ): Promise<VmInfo[]> {
    const { sql, values } = owned(principal);
    const which = options.all ? '' : 'AND (ended_ms IS NULL OR ended_ms > ?)';
    const rows = await this.#db.all<VmRow>(
      `SELECT * FROM vms WHERE ${sql} ${which} ORDER BY created_ms DESC, name, id LIMIT ${LISTED_MAX}`,
      ...values,
      ...(options.all ? [] : [options.endedAfterMs ?? Number.MAX_SAFE_INTEGER]),
    );
    return rows.map((row) => withoutOutput(vmInfo(row)));
  }

  /** By id, or by name where one of that name is there. Throws not-found, bad-request. */
  async find(queries: Queries, principal: Principal, which: string): Promise<VmRow> {
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
    return vmInfo(await this.find(this.#db, principal, which));
  }
}

/** Rows of one answer. */
const LISTED_MAX = 10_000;
