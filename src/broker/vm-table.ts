/**
 * Rows of VMs and what goes with their changes: the capacity that a host promises, who carries whom, the time that is
 * accounted, and the jobs that wait for a VM. Every function runs inside the caller's transaction.
 *
 *   requested → placed → running ⇄ suspending → suspended → requested …
 *                  \________\_______\___________\→ stopping → stopped
 *                  \________\_______\→ requested (another generation), failed, lost (its host is silent)
 */
import type { ErrorCode } from '../core/errors.ts';
import type { Order } from '../core/grid.ts';
import type { Queries } from './database.ts';

export interface VmRow {
  readonly id: string;
  readonly owner: string;
  readonly job: string;
  readonly name: string;
  readonly image: string | null;
  readonly version: string | null;
  readonly host: string | null;
  readonly network: string | null;
  readonly generation: number;
  readonly state: VmState;
  readonly reason: string | null;
  readonly memory_bytes: number;
  readonly vcpus: number;
  readonly restart: number;
  readonly wanted: 'running' | 'suspended' | 'stopped';
  readonly timeline: string | null;
  readonly fetched_bytes: number | null;
  readonly console: string | null;
  readonly created_ms: number;
  readonly asked_ms: number | null;
  readonly placed_ms: number | null;
  readonly ended_ms: number | null;
  readonly checkpoint: string | null;
  readonly checkpoint_manifest: string | null;
  readonly checkpoint_accelerator: string | null;
  readonly checkpoint_ms: number | null;
  readonly checkpoint_every_ms: number | null;
  readonly target: string | null;
  readonly avoid: string | null;
  readonly failures: number;
  readonly ran_ms: number | null;
  readonly command: string | null;
  /** JSON of what became of it. */
  readonly command_result: string | null;
}

export const VM_STATES = [
  'requested',
  'placed',
  'running',
  'suspending',
  'suspended',
  'stopping',
  'stopped',
  'failed',
  'lost',
] as const;
export type VmState = (typeof VM_STATES)[number];

/** States in which a VM is on its host by the broker's leave. */
export const ON_HOST = `'placed', 'running', 'suspending', 'stopping'`;

/** VMs that take part of what their host promises. */
const HOLDING = `state IN (${ON_HOST}, 'lost') AND ended_ms IS NULL`;

/** Machines that one host promises at most, whatever its memory: each is a process of the host's. */
const MACHINES_PER_HOST_MAX = 256;

/** The name that a VM has on its host now. */
export const placedAs = (vm: Pick<VmRow, 'id' | 'generation'>) => `${vm.id}.${vm.generation}`;

/** What `host` promises beyond the VMs that it has. Never below nothing, also where a host came back smaller. */
export async function recountFutures(tx: Queries, host: string): Promise<void> {
  const left = (total: string, taken: string) =>
    `CASE WHEN h.${total} > ${taken} THEN h.${total} - ${taken} ELSE 0 END`;
  const sum = (column: string) =>
    `(SELECT coalesce(sum(${column}), 0) FROM vms WHERE host = h.id AND ${HOLDING})`;
  await tx.run(
    `INSERT INTO futures (host, memory_bytes, vcpus, machines)
     SELECT h.id, ${left('guest_memory_bytes', sum('memory_bytes'))}, ${left('guest_vcpus', sum('vcpus'))},
       CASE WHEN h.unusable IS NOT NULL THEN 0 ELSE ${MACHINES_PER_HOST_MAX} - (SELECT count(*) FROM vms WHERE host = h.id AND ${HOLDING}) END
     FROM hosts h WHERE h.id = ?
     ON CONFLICT (host) DO UPDATE SET memory_bytes = excluded.memory_bytes, vcpus = excluded.vcpus,
       machines = excluded.machines`,
    host,
  );
}

/** An order for the VM's host; the same id again changes nothing. */
export async function giveOrder(
  tx: Queries,
  host: string,
  vm: string | null,
  order: Order,
  job: string | null = null,
): Promise<void> {
  await tx.run(
    `INSERT INTO orders (id, host, vm, kind, body, state, created_ms, job) VALUES (?, ?, ?, ?, ?, 'open', ?, ?)
     ON CONFLICT (id) DO NOTHING`,
    ...[order.id, host, vm, order.kind, JSON.stringify(order), Date.now(), job],
  );
}

/** Orders of a VM that are of no use any more. */
export async function voidOrders(tx: Queries, vm: string): Promise<void> {
  await tx.run(
    `UPDATE orders SET state = 'void', done_ms = ? WHERE vm = ? AND state = 'open'`,
    Date.now(),
    vm,
  );
}

export interface JobEnd {
  readonly error?: { readonly code: ErrorCode; readonly message: string };
  readonly result?: Readonly<Record<string, unknown>>;
}

/** Ends one job about a VM or an image, once. */
export async function endJob(tx: Queries, job: string, { error, result }: JobEnd): Promise<void> {
  await tx.run(
    `UPDATE jobs SET state = ?, error = ?, result = ?, ended_ms = ? WHERE id = ? AND state = 'running'`,
    ...[
      error ? 'failed' : 'done',
      error ? JSON.stringify(error) : null,
      result ? JSON.stringify(result) : null,
      Date.now(),
      job,
    ],
  );
}

/** Ends a job that several hosts work on, when none of its orders is open any more. */
export async function settleOrders(tx: Queries, job: string): Promise<void> {
  const orders = await tx.all<{ state: string; host: string; error: string | null }>(
    'SELECT state, host, error FROM orders WHERE job = ? ORDER BY host',
    job,
  );
  if (orders.some(({ state }) => state === 'open')) return;
  const bad = orders.find(({ state }) => state !== 'done');
  const error =
    bad &&
    (bad.error === null
      ? { code: 'unreachable' as const, message: `host ${bad.host} fell silent` }
      : (JSON.parse(bad.error) as JobEnd['error'])!);
  await endJob(tx, job, error ? { error } : { result: { hosts: orders.map(({ host }) => host) } });
}

/** Ends jobs of these kinds, or all, that are under way for a VM. Returns which. */
export async function endJobs(
  tx: Queries,
  vm: string,
  kinds: readonly string[] | 'all',
  end: JobEnd,
): Promise<string[]> {
  const of = kinds === 'all' ? '' : ` AND kind IN (${kinds.map(() => '?').join(', ')})`;
  const rows = await tx.all<{ id: string }>(
    `SELECT id FROM jobs WHERE vm = ? AND state = 'running'${of}`,
    ...[vm, ...(kinds === 'all' ? [] : kinds)],
  );
  for (const { id } of rows) await endJob(tx, id, end);
  return rows.map(({ id }) => id);
}

export type VmEnd = 'requested' | 'suspended' | 'stopped' | 'failed' | 'lost';

/** Takes a VM from its host: for good, or `requested` to be placed again, or `suspended` until somebody wants it. */
export async function endVm(
  tx: Queries,
  vm: VmRow,
  state: VmEnd,
  reason: string | null = null,
): Promise<void> {
  const nowMs = Date.now();
  await tx.run(
    'UPDATE usage SET ended_ms = ? WHERE vm = ? AND generation = ? AND ended_ms IS NULL',
    ...[nowMs, vm.id, vm.generation],
  );
  await tx.run(`DELETE FROM virtualization WHERE virtual_kind = 'vm' AND virtual_id = ?`, vm.id);
  await voidOrders(tx, vm.id);
  if (state !== 'requested') {
    await tx.run(
      'UPDATE vms SET command_result = ? WHERE id = ? AND command IS NOT NULL AND command_result IS NULL',
      ...[JSON.stringify({ error: `the VM was ${state} before it was over` }), vm.id],
    );
  }
  if (state === 'requested' || state === 'suspended') {
    await tx.run(
      `UPDATE vms SET state = ?, host = NULL, reason = ?, console = NULL, timeline = NULL, asked_ms = ? WHERE id = ?`,
      ...[state, reason, nowMs, vm.id],
    );
  } else {
    await tx.run(
      'UPDATE vms SET state = ?, reason = ?, ended_ms = ?, console = NULL WHERE id = ?',
      ...[state, reason, nowMs, vm.id],
    );
    const error = { code: 'vm-failed' as const, message: reason ?? `the VM is ${state}` };
    await endJobs(tx, vm.id, 'all', { error });
    // It writes to none any more: what it wrote is saved by a round of the broker's.
    await tx.run('UPDATE volumes SET writer = NULL WHERE writer = ?', vm.id);
  }
  if (vm.host !== null) await recountFutures(tx, vm.host);
}
