/**
 * Rows of VMs and what goes with their changes: the capacity that a host promises, who carries whom, and the time
 * that is accounted. Every function runs inside the caller's transaction.
 *
 *   requested → placed → running → stopping → stopped
 *                  \________\________→ requested (another generation), failed, lost (its host is silent)
 */
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
  readonly wanted: 'running' | 'stopped';
  readonly timeline: string | null;
  readonly fetched_bytes: number | null;
  readonly console: string | null;
  readonly created_ms: number;
  readonly placed_ms: number | null;
  readonly ended_ms: number | null;
}

export type VmState = 'requested' | 'placed' | 'running' | 'stopping' | 'stopped' | 'failed' | 'lost';

/** VMs that take part of what their host promises. */
const HOLDING = `state IN ('placed', 'running', 'stopping', 'lost') AND ended_ms IS NULL`;

/** Machines that one host promises at most, whatever its memory: each is a process of the host's. */
const MACHINES_PER_HOST_MAX = 256;

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

/** Takes a placed VM from its host: for good, or `requested` to be placed again. */
export async function endVm(
  tx: Queries,
  vm: VmRow,
  state: 'requested' | 'stopped' | 'failed' | 'lost',
  reason: string | null = null,
): Promise<void> {
  const nowMs = Date.now();
  await tx.run(
    'UPDATE usage SET ended_ms = ? WHERE vm = ? AND generation = ? AND ended_ms IS NULL',
    nowMs,
    vm.id,
    vm.generation,
  );
  await tx.run(`DELETE FROM virtualization WHERE virtual_kind = 'vm' AND virtual_id = ?`, vm.id);
  await tx.run(`UPDATE orders SET state = 'void', done_ms = ? WHERE vm = ? AND state = 'open'`, nowMs, vm.id);
  if (state === 'requested') {
    await tx.run(
      `UPDATE vms SET state = 'requested', host = NULL, reason = ?, console = NULL, timeline = NULL WHERE id = ?`,
      ...[reason, vm.id],
    );
  } else {
    await tx.run(
      'UPDATE vms SET state = ?, reason = ?, ended_ms = ?, console = NULL WHERE id = ?',
      ...[state, reason, nowMs, vm.id],
    );
  }
  if (vm.host !== null) await recountFutures(tx, vm.host);
}
