/** What a user may have at a time. Set by operators; nobody who has none is bounded. */
import { GridError } from '../core/errors.ts';
import type { Queries } from './database.ts';

export interface Quota {
  readonly machines?: number;
  readonly vcpus?: number;
  readonly memoryBytes?: number;
  /** Sizes of data volumes together. */
  readonly volumeBytes?: number;
}

export interface QuotaInfo extends Quota {
  readonly user: string;
  readonly used: Required<Quota>;
}

const LIMITS = [
  ['machines', 'machines', 'machines'],
  ['vcpus', 'vcpus', 'processors'],
  ['memoryBytes', 'memory_bytes', 'bytes of memory'],
  ['volumeBytes', 'volume_bytes', 'bytes of data volumes'],
] as const;

async function usedBy(db: Queries, user: string): Promise<Required<Quota>> {
  const [row] = await db.all<{ machines: number; vcpus: number | null; memory: number | null }>(
    `SELECT count(*) AS machines, sum(vcpus) AS vcpus, sum(memory_bytes) AS memory FROM vms
     WHERE owner = ? AND ended_ms IS NULL`,
    user,
  );
  const [volumes] = await db.all<{ bytes: number | null }>(
    'SELECT sum(size_bytes) AS bytes FROM volumes WHERE owner = ? AND removed_ms IS NULL',
    user,
  );
  return {
    machines: row?.machines ?? 0,
    vcpus: row?.vcpus ?? 0,
    memoryBytes: row?.memory ?? 0,
    volumeBytes: volumes?.bytes ?? 0,
  };
}

export async function quotaOf(db: Queries, user: string): Promise<QuotaInfo> {
  const [row] = await db.all<Record<string, number | null>>('SELECT * FROM quotas WHERE user_name = ?', user);
  const limits = LIMITS.flatMap(([name, column]) => {
    const limit = row?.[column];
    return limit === undefined || limit === null ? [] : [[name, limit] as const];
  });
  return { user, ...Object.fromEntries(limits), used: await usedBy(db, user) };
}

/** Replaces what a user may have. */
export async function setQuota(db: Queries, user: string, quota: Quota): Promise<QuotaInfo> {
  await db.run(
    `INSERT INTO quotas (user_name, machines, vcpus, memory_bytes, volume_bytes) VALUES (?, ?, ?, ?, ?)
     ON CONFLICT (user_name) DO UPDATE SET machines = excluded.machines, vcpus = excluded.vcpus,
       memory_bytes = excluded.memory_bytes, volume_bytes = excluded.volume_bytes`,
    ...[user, quota.machines ?? null, quota.vcpus ?? null, quota.memoryBytes ?? null],
    quota.volumeBytes ?? null,
  );
  return quotaOf(db, user);
}

/** In the transaction that takes it. Throws no-space and says what is asked for, what is there and what is allowed. */
export async function checkQuota(tx: Queries, user: string, asked: Quota): Promise<void> {
  const quota = await quotaOf(tx, user);
  for (const [name, , what] of LIMITS) {
    const [limit, more = 0] = [quota[name], asked[name]];
    // What asks for nothing of it is not refused, also where a quota was lowered below what is there.
    if (limit === undefined || more <= 0 || quota.used[name] + more <= limit) continue;
    throw new GridError(
      'no-space',
      `the quota of '${user}' is ${limit} ${what}: ${quota.used[name]} are in use, and this asks for ${more} more`,
    );
  }
}
