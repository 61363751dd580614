/**
 * Workspaces: machines that a user asks for together, by one request, and that are suspended, resumed, moved and ended
 * together. A workspace is a name for the VMs of one request (requests.ts) with what they share: a virtual network, and
 * a time at which all of it ends. What is done to it is done to each of its VMs, by lives.ts; the state is theirs.
 *
 *   request → coming → running ⇄ suspended → ended      ('mixed' while its VMs differ, 'failed' when one did not come)
 *
 * Its row, its VMs and their places on the network are written in one transaction, so an accepted one is whole.
 */
import { randomBytes } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import type { Principal } from './access.ts';
import type { Database, Queries } from './database.ts';
import { withoutOutput } from './requests.ts';
import type { Requests, VmInfo, VmRequest } from './requests.ts';
import { addressesOf, joinSegment } from './segments.ts';

export interface WorkspaceRequest extends Omit<VmRequest, 'name' | 'network'> {
  /** Its machines are named after it. */
  readonly name?: string;
  /** A virtual network that its machines are on, made when it is not there. */
  readonly network?: string;
  /** Ended by the broker after this; left out: when somebody ends it. */
  readonly lifetimeMs?: number;
}

export interface WorkspaceInfo {
  readonly id: string;
  readonly name: string;
  readonly owner: string;
  readonly state: 'coming' | 'running' | 'suspended' | 'mixed' | 'failed' | 'ended';
  readonly job: string;
  readonly network?: string;
  /** Data volumes of its machines. */
  readonly volumes?: readonly { readonly name: string; readonly vm: string; readonly readOnly: boolean }[];
  readonly created: string;
  readonly ends?: string;
  readonly fetchedBytes: number;
  readonly machines: readonly (VmInfo & { readonly address?: string })[];
}

export type WorkspaceVerb = 'suspend' | 'resume' | 'move' | 'end';

/** What is done to a single VM; `Lives` is it. */
export interface Lives {
  stop(principal: Principal, which: string, graceMs: number): Promise<unknown>;
  act(
    principal: Principal,
    which: string,
    verb: 'suspend' | 'resume' | 'move',
    options: { host?: string },
  ): Promise<unknown>;
}

interface WorkspaceRow {
  readonly id: string;
  readonly name: string;
  readonly owner: string;
  readonly job: string;
  readonly network: string | null;
  readonly created_ms: number;
  readonly ends_ms: number | null;
}

export const LIFETIME_MS_MAX = 366 * 24 * 3_600_000;
const GRACE_MS = 15_000;
const LISTED_MAX = 1_000;
const GONE = new Set(['stopped', 'failed', 'lost']);

export class Workspaces {
  readonly #db: Database;
  readonly #requests: Requests;
  readonly #lives: Lives;

  constructor(db: Database, requests: Requests, lives: Lives) {
    this.#db = db;
    this.#requests = requests;
    this.#lives = lives;
  }

  /** Throws as `Requests.submit` does; exists (the name is taken), denied (another's network), no-space (quota). */
  async request(principal: Principal, request: WorkspaceRequest, key?: string): Promise<WorkspaceInfo> {
    const { lifetimeMs, network, name: given, ...common } = request;
    const id = `w${randomBytes(6).toString('hex')}`;
    const name = given ?? id;
    const nowMs = Date.now();
    // The name is part of what the key stands for only when the caller chose it.
    const vms: VmRequest = { ...common, ...(given === undefined ? {} : { name: given }) };
    const job = await this.#requests.submit(principal, vms, key, async (tx, made, machines) => {
      const [taken] = await tx.all(
        'SELECT id FROM workspaces WHERE owner = ? AND name = ? AND ended_ms IS NULL',
        ...[principal.user, name],
      );
      if (taken) throw new GridError('exists', `you have a workspace '${name}' already`);
      await tx.run(
        'INSERT INTO workspaces (id, name, owner, job, network, created_ms, ends_ms) VALUES (?, ?, ?, ?, ?, ?, ?)',
        ...[id, name, principal.user, made, network ?? null, nowMs],
        lifetimeMs === undefined ? null : nowMs + lifetimeMs,
      );
      if (network !== undefined) await joinSegment(tx, principal, network, machines);
    });
    // The same key again gives the workspace that it gave before.
    const [row] = await this.#db.all<WorkspaceRow>('SELECT * FROM workspaces WHERE job = ?', job.id);
    if (!row) throw new GridError('exists', `the idempotency key '${key}' belongs to another request`);
    return this.#info(principal, row);
  }

  async #find(queries: Queries, principal: Principal, which: string): Promise<WorkspaceRow> {
    const { sql, values } = owned(principal);
    const rows = await queries.all<WorkspaceRow>(
      `SELECT * FROM workspaces WHERE (id = ? OR (name = ? AND ended_ms IS NULL)) AND ${sql} LIMIT 2`,
      ...[which, which, ...values],
    );
    if (rows.length > 1)
      throw new GridError('bad-request', `several workspaces are named '${which}'; use the id`);
    if (!rows[0]) {
      throw new GridError(
        'not-found',
        `there is no workspace '${which}'; \`gridvfs workspace ls\` lists them`,
      );
    }
    return rows[0];
  }

  async get(principal: Principal, which: string): Promise<WorkspaceInfo> {
    return this.#info(principal, await this.#find(this.#db, principal, which));
  }

  /** Those that are there; with `all` also those that ended. */
  async list(principal: Principal, options: { all?: boolean } = {}): Promise<WorkspaceInfo[]> {
    const { sql, values } = owned(principal);
    const rows = await this.#db.all<WorkspaceRow>(
      `SELECT * FROM workspaces WHERE ${sql} ${options.all ? '' : 'AND ended_ms IS NULL'}
       ORDER BY created_ms DESC, id LIMIT ${LISTED_MAX}`,
      ...values,
    );
    const all = await Promise.all(rows.map((row) => this.#info(principal, row)));
    return all.map((one) => ({ ...one, machines: one.machines.map(withoutOutput) }));
  }

  async #info(principal: Principal, row: WorkspaceRow): Promise<WorkspaceInfo> {
    const { vms } = await this.#requests.job(principal, row.job);
    const volumes = await this.#db.all<{ name: string; vm: string; read_only: number }>(
      `SELECT u.name, m.name AS vm, u.read_only FROM vm_volumes u JOIN vms m ON m.id = u.vm
       WHERE m.job = ? ORDER BY u.name, m.name`,
      row.job,
    );
    const addresses = row.network === null ? undefined : await addressesOf(this.#db, row.job);
    return {
      id: row.id,
      name: row.name,
      owner: row.owner,
      state: stateOf(vms),
      job: row.job,
      ...(row.network === null ? {} : { network: row.network }),
      ...(volumes.length === 0
        ? {}
        : { volumes: volumes.map(({ name, vm, read_only }) => ({ name, vm, readOnly: read_only === 1 })) }),
      created: new Date(row.created_ms).toISOString(),
      ...(row.ends_ms === null ? {} : { ends: new Date(row.ends_ms).toISOString() }),
      fetchedBytes: vms.reduce((sum, vm) => sum + (vm.fetchedBytes ?? 0), 0),
      machines: vms.map((vm) => {
        const address = addresses?.get(vm.id);
        return address === undefined ? vm : { ...vm, address };
      }),
    };
  }

  /** Does it to all machines that it can be done to. The first refusal is thrown when it could be done to none. */
  async act(
    principal: Principal,
    which: string,
    verb: WorkspaceVerb,
    options: { host?: string } = {},
  ): Promise<WorkspaceInfo> {
    const row = await this.#find(this.#db, principal, which);
    const { vms } = await this.#requests.job(principal, row.job);
    let done = 0;
    let refusal: unknown;
    for (const vm of vms) {
      // A lost one may come back with its host, unless it is ended.
      if ((GONE.has(vm.state) && !(verb === 'end' && vm.state === 'lost')) || vm.state === 'stopping')
        continue;
      try {
        if (verb === 'end') await this.#lives.stop(principal, vm.id, GRACE_MS);
        else await this.#lives.act(principal, vm.id, verb, options);
        done++;
      } catch (error) {
        refusal ??= error;
      }
    }
    if (done === 0 && refusal !== undefined) throw refusal;
    if (verb === 'end') await this.#ended(row.id);
    return this.get(principal, row.id);
  }

  async #ended(id: string): Promise<void> {
    await this.#db.run(
      'UPDATE workspaces SET ended_ms = ? WHERE id = ? AND ended_ms IS NULL',
      Date.now(),
      id,
    );
  }

  /** From now on it lives this long. */
  async extend(principal: Principal, which: string, lifetimeMs: number): Promise<WorkspaceInfo> {
    const id = await this.#db.transaction(async (tx) => {
      const { id: found, name, ends_ms: ends } = await this.#find(tx, principal, which);
      const endsMs = Date.now() + lifetimeMs;
      if (ends !== null && endsMs < ends) {
        const until = new Date(ends).toISOString();
        throw new GridError(
          'bad-request',
          `workspace '${name}' lives until ${until} already; say a longer time, which counts from now`,
        );
      }
      await tx.run('UPDATE workspaces SET ends_ms = ? WHERE id = ?', endsMs, found);
      return found;
    });
    return this.get(principal, id);
  }

  /** Ends those whose time is over; those whose machines have all ended are over, too. */
  async expire(): Promise<void> {
    await this.#db.run(
      `UPDATE workspaces SET ended_ms = ? WHERE ended_ms IS NULL AND NOT EXISTS (
         SELECT 1 FROM vms v WHERE v.job = workspaces.job AND v.ended_ms IS NULL)`,
      Date.now(),
    );
    const due = await this.#db.all<WorkspaceRow>(
      'SELECT * FROM workspaces WHERE ended_ms IS NULL AND ends_ms IS NOT NULL AND ends_ms <= ?',
      Date.now(),
    );
    for (const { id, owner } of due) await this.act({ user: owner, role: 'user' }, id, 'end');
  }
}

function owned(principal: Principal): { sql: string; values: string[] } {
  return principal.role === 'operator'
    ? { sql: '1 = 1', values: [] }
    : { sql: 'owner = ?', values: [principal.user] };
}

function stateOf(vms: readonly VmInfo[]): WorkspaceInfo['state'] {
  const states = new Set<string>(vms.map(({ state }) => state));
  const only = (...names: string[]) => [...states].every((state) => names.includes(state));
  if (only('stopped', 'lost', 'failed'))
    return states.has('failed') && !states.has('stopped') ? 'failed' : 'ended';
  if (states.has('failed')) return 'failed';
  if (only('running')) return 'running';
  if (only('suspended')) return 'suspended';
  if (only('requested', 'placed', 'running')) return 'coming';
  return 'mixed';
}
