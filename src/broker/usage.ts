/**
 * What was used, from the beginning up to now: by VM (a row for each placement, for its host may be another then), by
 * workspace, by user, and of data volumes. A VM is charged for time, memory, what was fetched for its start, what its
 * checkpoints store, and the CPU time that its host's file service spent on it; a volume for its size as long as it had it, and
 * for what its versions store.
 */
import type { Principal } from './access.ts';
import type { Queries } from './database.ts';

export const USAGE_BY = ['vm', 'workspace', 'user', 'volume'] as const;
export type UsageBy = (typeof USAGE_BY)[number];
export type UsageRow = Readonly<Record<string, string | number | boolean>>;

/** Rows of one answer. */
const LISTED_MAX = 10_000;

/** Of all that `principal` may see: users their own, operators everybody's. */
export function usageOf(db: Queries, principal: Principal, by: UsageBy = 'vm'): Promise<UsageRow[]> {
  return { vm: byVm, workspace: byWorkspace, user: byUser, volume: byVolume }[by](db, principal);
}

/** Takes what a host says of a VM's CPU time; a host whose proxy has started again begins anew. */
export async function noteCpu(
  tx: Queries,
  vm: { readonly id: string; readonly generation: number },
  cpuSeconds: number,
): Promise<void> {
  const toldMs = Math.round(cpuSeconds * 1000);
  await tx.run(
    `UPDATE usage SET cpu_ms = cpu_ms + CASE WHEN cpu_told_ms > ? THEN ? ELSE ? - cpu_told_ms END, cpu_told_ms = ?
     WHERE vm = ? AND generation = ? AND cpu_told_ms <> ?`,
    ...[toldMs, toldMs, toldMs, toldMs, vm.id, vm.generation, toldMs],
  );
}

/** A volume has another size from now on, or none: it is removed. */
export async function noteVolumeSize(tx: Queries, volume: string, sizeBytes?: number): Promise<void> {
  const nowMs = Date.now();
  await tx.run(
    'UPDATE volume_sizes SET until_ms = ? WHERE volume = ? AND until_ms IS NULL',
    ...[nowMs, volume],
  );
  if (sizeBytes === undefined) return;
  await tx.run(
    `INSERT INTO volume_sizes (volume, since_ms, size_bytes) VALUES (?, ?, ?)
     ON CONFLICT (volume, since_ms) DO UPDATE SET size_bytes = excluded.size_bytes, until_ms = NULL`,
    ...[volume, nowMs, sizeBytes],
  );
}

const seen = (principal: Principal, owner: string) =>
  principal.role === 'operator'
    ? { sql: '1 = 1', values: [] }
    : { sql: `${owner} = ?`, values: [principal.user] };

async function byVm(db: Queries, principal: Principal): Promise<UsageRow[]> {
  const { sql, values } = seen(principal, 'u.owner');
  const rows = await db.all<{
    vm: string;
    name: string | null;
    workspace: string | null;
    generation: number;
    owner: string;
    host: string;
    memory_bytes: number;
    fetched_bytes: number | null;
    stored_bytes: number | null;
    cpu_ms: number;
    started_ms: number;
    ended_ms: number | null;
  }>(
    `SELECT u.*, m.name, w.name AS workspace FROM usage u
     LEFT JOIN vms m ON m.id = u.vm LEFT JOIN workspaces w ON w.job = m.job
     WHERE ${sql} ORDER BY u.started_ms, u.vm LIMIT ${LISTED_MAX}`,
    ...values,
  );
  const nowMs = Date.now();
  return rows.map((row) => {
    const seconds = ((row.ended_ms ?? nowMs) - row.started_ms) / 1000;
    return {
      vm: row.vm,
      generation: row.generation,
      name: row.name ?? row.vm,
      workspace: row.workspace ?? '',
      owner: row.owner,
      host: row.host,
      seconds,
      memoryByteSeconds: seconds * row.memory_bytes,
      fetchedBytes: row.fetched_bytes ?? 0,
      storedBytes: row.stored_bytes ?? 0,
      cpuSeconds: row.cpu_ms / 1000,
      running: row.ended_ms === null,
    };
  });
}

interface Sums {
  readonly vms: number;
  readonly running: number;
  readonly seconds: number;
  readonly memory_byte_seconds: number;
  readonly fetched_bytes: number;
  readonly stored_bytes: number;
  readonly cpu_ms: number;
}

/** With the present time for its two question marks. */
const SUMS = `count(DISTINCT u.vm) AS vms, sum(CASE WHEN u.ended_ms IS NULL THEN 1 ELSE 0 END) AS running,
  sum((coalesce(u.ended_ms, ?) - u.started_ms) / 1000.0) AS seconds,
  sum((coalesce(u.ended_ms, ?) - u.started_ms) / 1000.0 * u.memory_bytes) AS memory_byte_seconds,
  sum(coalesce(u.fetched_bytes, 0)) AS fetched_bytes, sum(coalesce(u.stored_bytes, 0)) AS stored_bytes,
  sum(u.cpu_ms) AS cpu_ms`;

const summed = (row: Sums) => ({
  vms: row.vms,
  seconds: row.seconds,
  memoryByteSeconds: row.memory_byte_seconds,
  fetchedBytes: row.fetched_bytes,
  storedBytes: row.stored_bytes,
  cpuSeconds: row.cpu_ms / 1000,
  running: row.running > 0,
});

async function byWorkspace(db: Queries, principal: Principal): Promise<UsageRow[]> {
  const { sql, values } = seen(principal, 'u.owner');
  const nowMs = Date.now();
  const rows = await db.all<Sums & { id: string; name: string; owner: string }>(
    `SELECT w.id, w.name, w.owner, ${SUMS} FROM usage u
     JOIN vms m ON m.id = u.vm JOIN workspaces w ON w.job = m.job
     WHERE ${sql} GROUP BY w.id, w.name, w.owner, w.created_ms ORDER BY w.created_ms, w.id LIMIT ${LISTED_MAX}`,
    ...[nowMs, nowMs, ...values],
  );
  return rows.map(({ id, name, owner, ...sums }) => ({ workspace: id, name, owner, ...summed(sums) }));
}

async function byUser(db: Queries, principal: Principal): Promise<UsageRow[]> {
  const { sql, values } = seen(principal, 'u.owner');
  const nowMs = Date.now();
  const rows = await db.all<Sums & { owner: string }>(
    `SELECT u.owner, ${SUMS} FROM usage u WHERE ${sql} GROUP BY u.owner ORDER BY u.owner LIMIT ${LISTED_MAX}`,
    ...[nowMs, nowMs, ...values],
  );
  const machines = new Map(rows.map(({ owner, ...sums }) => [owner, summed(sums)]));
  const volumes = Map.groupBy(await volumeRows(db, principal), ({ owner }) => owner);
  const none = { vms: 0, running: 0, seconds: 0, memory_byte_seconds: 0, fetched_bytes: 0, stored_bytes: 0 };
  return [...new Set([...machines.keys(), ...volumes.keys()])].toSorted().map((user) => {
    const own = volumes.get(user) ?? [];
    const sum = (of: (row: VolumeSums) => number) => own.reduce((total, row) => total + of(row), 0);
    return {
      user,
      ...(machines.get(user) ?? summed({ ...none, cpu_ms: 0 })),
      volumes: own.length,
      volumeByteSeconds: sum((row) => row.byte_seconds),
      volumeStoredBytes: sum((row) => row.stored_bytes),
    };
  });
}

interface VolumeSums {
  readonly id: string;
  readonly name: string;
  readonly owner: string;
  readonly size_bytes: number;
  readonly stored_bytes: number;
  readonly removed_ms: number | null;
  readonly seconds: number;
  readonly byte_seconds: number;
}

function volumeRows(db: Queries, principal: Principal): Promise<VolumeSums[]> {
  const { sql, values } = seen(principal, 'v.owner');
  const nowMs = Date.now();
  return db.all<VolumeSums>(
    `SELECT v.id, v.name, v.owner, v.size_bytes, v.stored_bytes, v.removed_ms,
       sum((coalesce(s.until_ms, ?) - s.since_ms) / 1000.0) AS seconds,
       sum((coalesce(s.until_ms, ?) - s.since_ms) / 1000.0 * s.size_bytes) AS byte_seconds
     FROM volumes v JOIN volume_sizes s ON s.volume = v.id WHERE ${sql}
     GROUP BY v.id, v.name, v.owner, v.size_bytes, v.stored_bytes, v.removed_ms, v.created_ms
     ORDER BY v.created_ms, v.id LIMIT ${LISTED_MAX}`,
    ...[nowMs, nowMs, ...values],
  );
}

async function byVolume(db: Queries, principal: Principal): Promise<UsageRow[]> {
  return (await volumeRows(db, principal)).map((row) => ({
    volume: row.id,
    name: row.name,
    owner: row.owner,
    sizeBytes: row.size_bytes,
    seconds: row.seconds,
    byteSeconds: row.byte_seconds,
    storedBytes: row.stored_bytes,
    there: row.removed_ms === null,
  }));
}
