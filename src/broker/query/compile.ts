/** The SQL of a query's candidates. Names of columns come from the tables here, every value is a parameter. */
import { GridError } from '../../core/errors.ts';
import type { Principal } from '../access.ts';
import type { Value } from '../database.ts';
import type { Condition, Query } from './form.ts';

export interface Sql {
  readonly text: string;
  readonly values: readonly Value[];
}

type Kind = 'text' | 'number';

const FIELDS: Record<Query['find'], Record<string, readonly [column: string, kind: Kind]>> = {
  hosts: {
    id: ['h.id', 'text'],
    memoryBytes: ['h.memory_bytes', 'number'],
    vcpus: ['h.vcpus', 'number'],
    accelerator: ['h.accelerator', 'text'],
    source: ['h.source', 'text'],
  },
  vms: {
    id: ['v.id', 'text'],
    name: ['v.name', 'text'],
    image: ['v.image', 'text'],
    version: ['v.version', 'text'],
    host: ['v.host', 'text'],
    network: ['v.network', 'text'],
    memoryBytes: ['v.memory_bytes', 'number'],
    vcpus: ['v.vcpus', 'number'],
  },
  futures: {
    id: ['h.id', 'text'],
    memoryBytes: ['f.memory_bytes', 'number'],
    vcpus: ['f.vcpus', 'number'],
    machines: ['f.machines', 'number'],
  },
};

/** Networks at most so many links from one; UNION ends cycles. */
const NEAR = `WITH RECURSIVE near (id, hops) AS (
  SELECT CAST(? AS TEXT), 0
  UNION SELECT CASE WHEN l.a = near.id THEN l.b ELSE l.a END, near.hops + 1
    FROM near JOIN links l ON l.a = near.id OR l.b = near.id WHERE near.hops < ?)`;

/** Rows (id, memory_bytes, vcpus, network) of resources that may be in a set. */
export function candidates(query: Query, principal: Principal): Sql {
  const conditions: string[] = [];
  const values: Value[] = [];
  const add = (text: string, ...more: Value[]) => {
    conditions.push(text);
    values.push(...more);
  };
  const near: Value[] = query.scope ? [query.scope.network, query.scope.hops] : [];
  const network = query.find === 'vms' ? 'v.network' : 'n.network';
  const grouped = query.same === 'network';
  let from: string;
  if (query.find === 'vms') {
    from = 'vms v';
    add(`v.state = 'running'`);
    // Networks are read one after the other: by the index of those, and not by the owner's.
    if (principal.role !== 'operator') add(grouped ? `v.owner || '' = ?` : 'v.owner = ?', principal.user);
    if (query.scope) add('v.network IN (SELECT id FROM near)');
    if (query.canRun) throw new GridError('bad-request', 'canRun is asked of hosts and futures');
  } else {
    from = `hosts h JOIN futures f ON f.host = h.id${grouped ? ' JOIN host_networks n ON n.host = h.id' : ''}`;
    add(`h.state = 'up'`);
    if (!query.virtual) add('h.is_virtual = 0');
    const { memoryBytes, vcpus, machines } = query.canRun ?? {};
    if (memoryBytes !== undefined) add('f.memory_bytes >= ?', memoryBytes);
    if (vcpus !== undefined) add('f.vcpus >= ?', vcpus);
    if (query.canRun) add('f.machines >= ?', machines ?? 1);
    if (query.scope && grouped) add('n.network IN (SELECT id FROM near)');
    else if (query.scope) {
      add(
        'EXISTS (SELECT 1 FROM host_networks m WHERE m.host = h.id AND m.network IN (SELECT id FROM near))',
      );
    }
  }
  for (const condition of [...(query.where ?? []), ...shares(query)]) {
    const [column, value] = checked(query, condition);
    add(`${column} ${condition.operator === '!=' ? '<>' : condition.operator} ?`, value);
  }
  for (const { text, value } of reachable(query)) add(text, ...value);
  if (grouped) add(`${network} IS NOT NULL`);
  const { memoryBytes, vcpus, id } = FIELDS[query.find];
  const shown = grouped || query.find === 'vms' ? network : 'NULL';
  return {
    text: `${query.scope ? NEAR : ''} SELECT ${id![0]} AS id, ${memoryBytes![0]} AS memory_bytes, ${vcpus![0]} AS vcpus,
      ${shown} AS network FROM ${from} WHERE ${conditions.join(' AND ')}`,
    values: [...near, ...values],
  };
}

/** A resource that is in a set leaves room for the others: what the smallest of them need, and the largest can add.
 * Those that cannot be in any set are not read. */
function reachable(query: Query): { text: string; value: Value[] }[] {
  if (query.approximate) return [];
  const others = (query.count ?? 1) - 1;
  const [table, where] = {
    hosts: ['hosts', ''],
    futures: ['futures', ''],
    vms: ['vms', ` WHERE state = 'running'`],
  }[query.find];
  return (query.total ?? []).flatMap(({ field, atLeast, atMost }) => {
    const column = FIELDS[query.find][field]![0];
    const extreme = (which: string) => `(SELECT ${which}(${column.slice(2)}) FROM ${table}${where})`;
    const room = (operator: string, bound: number, which: string) => ({
      text: `${column} ${operator} CAST(? AS BIGINT) - CAST(? AS BIGINT) * ${extreme(which)}`,
      value: [bound, others],
    });
    return [
      ...(atLeast === undefined ? [] : [room('>=', atLeast, 'max')]),
      ...(atMost === undefined ? [] : [room('<=', atMost, 'min')]),
    ];
  });
}

/** `approximate`: what each of a set must have for its total. */
function shares(query: Query): Condition[] {
  if (!query.approximate) return [];
  const count = query.count ?? 1;
  return (query.total ?? []).flatMap(({ field, atLeast, atMost }): Condition[] => [
    ...(atLeast === undefined ? [] : [{ field, operator: '>=' as const, value: Math.ceil(atLeast / count) }]),
    ...(atMost === undefined ? [] : [{ field, operator: '<=' as const, value: Math.floor(atMost / count) }]),
  ]);
}

function checked(query: Query, { field, operator, value }: Condition): readonly [string, Value] {
  const fields = FIELDS[query.find];
  const known = Object.hasOwn(fields, field) ? fields[field] : undefined;
  if (!known) {
    throw new GridError(
      'bad-request',
      `${query.find} have no field '${field.slice(0, 64)}'; they have ${Object.keys(fields).join(', ')}`,
    );
  }
  const [column, kind] = known;
  if (kind === 'number' && typeof value !== 'number') {
    throw new GridError('bad-request', `${field} ${operator} wants a number`);
  }
  if (kind === 'text' && typeof value !== 'string')
    throw new GridError('bad-request', `${field} ${operator} wants a text`);
  return [column, value];
}
