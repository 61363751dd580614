/** A grid that exists in a broker's tables only: hosts on LANs, VMs on them, by a seed. For queries at scale. */
import type { Queries, Value } from '../../src/broker/database.ts';
import type { Found, Query } from '../../src/broker/query/index.ts';
import { GIB, MIB } from '../../src/core/limits.ts';

export interface InventorySize {
  readonly hosts: number;
  readonly hostsPerNetwork: number;
  readonly vmsPerHost: number;
}

/** 32 bits, of mulberry32. */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Rows of one statement: PostgreSQL takes 65,535 parameters. */
const ROWS_AT_ONCE = 400;

async function insert(
  db: Queries,
  table: string,
  columns: readonly string[],
  rows: Value[][],
): Promise<void> {
  const one = `(${columns.map(() => '?').join(', ')})`;
  for (let at = 0; at < rows.length; at += ROWS_AT_ONCE) {
    const some = rows.slice(at, at + ROWS_AT_ONCE);
    await db.run(
      `INSERT INTO ${table} (${columns.join(', ')}) VALUES ${some.map(() => one).join(', ')}`,
      ...some.flat(),
    );
  }
}

/** Hosts have 16 to 256 GiB, a part of it free; VMs 128 MiB to 8 GiB. */
export async function fillInventory(db: Queries, size: InventorySize, seed: number): Promise<void> {
  const random = seeded(seed);
  const upTo = (most: number) => Math.floor(random() * most);
  const networks = Math.ceil(size.hosts / size.hostsPerNetwork);
  const networkOf = (host: number) => `lan${Math.floor(host / size.hostsPerNetwork)}`;
  await insert(
    db,
    'networks',
    ['id', 'created_ms'],
    Array.from({ length: networks }, (_, at) => [`lan${at}`, 0]),
  );
  const hosts = Array.from({ length: size.hosts }, (_, at) => {
    const memory = (1 + upTo(16)) * 16 * GIB;
    return { id: `h${at}`, network: networkOf(at), memory, free: upTo(memory / MIB) * MIB };
  });
  await insert(
    db,
    'hosts',
    [
      ...['id', 'incarnation', 'sequence', 'state', 'vcpus', 'memory_bytes', 'guest_vcpus'],
      ...['guest_memory_bytes', 'is_virtual', 'source', 'owner', 'registered_ms'],
    ],
    hosts.map(({ id, memory }) => [id, 'i', 0, 'up', 32, memory, 128, memory, 0, 's', 'hosts', 0]),
  );
  await insert(
    db,
    'host_networks',
    ['host', 'network'],
    hosts.map(({ id, network }) => [id, network]),
  );
  await insert(
    db,
    'futures',
    ['host', 'memory_bytes', 'vcpus', 'machines'],
    hosts.map(({ id, free }) => [id, free, 64, 200]),
  );
  await insert(
    db,
    'jobs',
    ['id', 'owner', 'kind', 'body', 'created_ms'],
    [['job', 'ada', 'request', '{}', 0]],
  );
  await insert(
    db,
    'vms',
    [
      ...['id', 'owner', 'job', 'name', 'image', 'version', 'host', 'network', 'generation', 'state'],
      ...['memory_bytes', 'vcpus', 'restart', 'wanted', 'created_ms'],
    ],
    hosts.flatMap(({ id, network }, host) =>
      Array.from({ length: size.vmsPerHost }, (_, at): Value[] => {
        const name = `v${host}-${at}`;
        const memory = (1 + upTo(64)) * 128 * MIB;
        return [
          ...[name, 'ada', 'job', name, 'debian', '12', id, network, 1, 'running'],
          ...[memory, 1, 0, 'running', 0],
        ];
      }),
    ),
  );
}

/** A query that has an answer, because a set that is one was there first. */
export interface SeededQuery {
  readonly kind: string;
  readonly query: Query;
}

interface Item {
  readonly id: string;
  readonly network: string;
  readonly memory: number;
}

const sumOf = (items: readonly Item[]) => items.reduce((sum, { memory }) => sum + memory, 0);
const largest = (items: readonly Item[], count: number) =>
  items.toSorted((a, b) => b.memory - a.memory).slice(0, count);

/** Queries of the four example shapes over what `fillInventory` made; the `only` ones have their answer on one network. */
export async function satisfiableQueries(db: Queries, count: number, seed: number): Promise<SeededQuery[]> {
  const random = seeded(seed);
  const pick = <T>(items: readonly T[]) => items[Math.floor(random() * items.length)]!;
  const some = (items: readonly Item[], of: number) => {
    const left = [...items];
    return Array.from({ length: of }, () => left.splice(Math.floor(random() * left.length), 1)[0]!);
  };
  const hosts = await db.all<Item>(
    'SELECT h.id, n.network, h.memory_bytes AS memory FROM hosts h JOIN host_networks n ON n.host = h.id ORDER BY h.id',
  );
  const vms = await db.all<Item>('SELECT id, network, memory_bytes AS memory FROM vms ORDER BY id');
  const free = await db.all<{ memory: number }>('SELECT memory_bytes AS memory FROM futures ORDER BY host');
  const hostGroups = [...Map.groupBy(hosts, ({ network }) => network).values()];
  const vmGroups = [...Map.groupBy(vms, ({ network }) => network).values()];
  const most = (groups: Item[][], of: number) =>
    Math.max(...groups.map((group) => sumOf(largest(group, of))));
  const hostsMost = most(hostGroups, 16);
  const vmsMost = most(vmGroups, 4);
  const kinds: (() => SeededQuery)[] = [
    () => ({
      kind: 'a host that can run a VM',
      query: { find: 'hosts', canRun: { memoryBytes: pick(free).memory } },
    }),
    () => {
      const sum = sumOf(some(pick(vmGroups), 4));
      const total = [{ field: 'memoryBytes' as const, atLeast: sum - 32 * MIB, atMost: sum + 32 * MIB }];
      return { kind: 'four VMs on a network', query: { find: 'vms', count: 4, same: 'network', total } };
    },
    () => ({
      kind: 'sixteen hosts on a LAN',
      query: {
        ...{ find: 'hosts', count: 16, same: 'network' },
        total: [{ field: 'memoryBytes', atLeast: sumOf(some(pick(hostGroups), 16)) }],
      },
    }),
    () => {
      const sum = sumOf(some(hosts, 16));
      const total = [{ field: 'memoryBytes' as const, atLeast: sum - GIB, atMost: sum + GIB }];
      return { kind: 'sixteen hosts anywhere', query: { find: 'hosts', count: 16, total } };
    },
    () => ({
      kind: 'four VMs, on the only network that has them',
      query: {
        ...{ find: 'vms', count: 4, same: 'network' },
        total: [{ field: 'memoryBytes', atLeast: vmsMost }],
      },
    }),
    () => ({
      kind: 'sixteen hosts, on the only LAN that has them',
      query: {
        ...{ find: 'hosts', count: 16, same: 'network' },
        total: [{ field: 'memoryBytes', atLeast: hostsMost }],
      },
    }),
  ];
  return Array.from({ length: count }, (_, at) => kinds[at % kinds.length]!());
}

/** Whether a set is what the query asks for, as far as its own members tell. */
export function isValidSet(query: Query, set: readonly Found[]): boolean {
  const { count = 1, total = [], same } = query;
  return (
    set.length === count &&
    new Set(set.map(({ id }) => id)).size === count &&
    (same === undefined || new Set(set.map(({ network }) => network)).size === 1) &&
    total.every(({ field, atLeast = 0, atMost = Infinity }) => {
      const sum = set.reduce((all, one) => all + one[field], 0);
      return sum >= atLeast && sum <= atMost;
    })
  );
}
