/** Answers a query: candidates network by network, sets of each, until enough, all, or the time is over. */
import { setImmediate } from 'node:timers/promises';
import type { Principal } from '../access.ts';
import type { Queries, Value } from '../database.ts';
import { candidates } from './compile.ts';
import type { Answer, Found, Query } from './form.ts';
import { composeSets } from './search.ts';

export { querySchema } from './form.ts';
export type { Answer, Found, Query } from './form.ts';

/** Networks of one statement: few round trips, and the clock is looked at between two. */
const NETWORKS_AT_ONCE = 32;
/** Candidates of one group; more are sampled, and the answer says that it is not complete. */
const CANDIDATES_MAX = 20_000;
/** Other work gets its turn after this long. */
const SLICE_MS = 5;

interface CandidateRow {
  readonly id: string;
  readonly memory_bytes: number;
  readonly vcpus: number;
  readonly network: string | null;
}

export async function answerQuery(db: Queries, principal: Principal, query: Query): Promise<Answer> {
  const startMs = performance.now();
  const endMs = startMs + (query.withinMs ?? Infinity);
  const { count = 1, limit = 1, total = [] } = query;
  const sets: Found[][] = [];
  const seen = new Set<string>();
  let complete = true;
  let sliceMs = startMs;
  search: for await (const group of groups(db, principal, query)) {
    if (group.cut) complete = false;
    for (const set of composeSets(group.items, count, query.approximate ? [] : total)) {
      const nowMs = performance.now();
      if (nowMs > endMs) {
        complete = false;
        break search;
      }
      if (set) {
        // Hosts on two networks meet on both.
        const key = set
          .map(({ id }) => id)
          .toSorted()
          .join('\n');
        if (seen.has(key)) continue;
        seen.add(key);
        sets.push([...set]);
        if (sets.length >= limit) {
          complete = true;
          break search;
        }
      }
      if (nowMs - sliceMs > SLICE_MS) {
        await setImmediate();
        sliceMs = performance.now();
      }
    }
    if (performance.now() > endMs) {
      complete = false;
      break;
    }
  }
  return { sets, complete, elapsedMs: performance.now() - startMs };
}

/** Candidates that may be in one set. */
async function* groups(
  db: Queries,
  principal: Principal,
  query: Query,
): AsyncGenerator<{ items: Found[]; cut: boolean }> {
  const { text, values } = candidates(query, principal);
  const order = query.nondeterministic ? 'random()' : 'id';
  const plain = query.count === undefined && query.total === undefined;
  const most = plain ? Math.min(CANDIDATES_MAX, query.limit ?? 1) : CANDIDATES_MAX;
  if (query.same === undefined) {
    const rows = await db.all<CandidateRow>(`${text} ORDER BY ${order} LIMIT ?`, ...values, most + 1);
    yield { items: rows.slice(0, most).map(found), cut: rows.length > most };
    return;
  }
  const networks = (await db.all<{ id: string }>('SELECT id FROM networks ORDER BY id')).map(({ id }) => id);
  if (query.nondeterministic) shuffle(networks);
  const column = query.find === 'vms' ? 'v.network' : 'n.network';
  for (let at = 0; at < networks.length; at += NETWORKS_AT_ONCE) {
    const some: Value[] = networks.slice(at, at + NETWORKS_AT_ONCE);
    const rows = await db.all<CandidateRow>(
      `${text} AND ${column} IN (${some.map(() => '?').join(', ')}) ORDER BY ${order} LIMIT ?`,
      ...[...values, ...some, CANDIDATES_MAX + 1],
    );
    const cut = rows.length > CANDIDATES_MAX;
    const byNetwork = Map.groupBy(rows, ({ network }) => network);
    for (const network of some) {
      const members = byNetwork.get(network as string);
      if (members && members.length >= (query.count ?? 1)) yield { items: members.map(found), cut };
    }
  }
}

function found(row: CandidateRow): Found {
  return {
    id: row.id,
    memoryBytes: row.memory_bytes,
    vcpus: row.vcpus,
    ...(row.network === null ? {} : { network: row.network }),
  };
}

/** Fisher and Yates. */
function shuffle(items: unknown[]): void {
  for (let at = items.length - 1; at > 0; at--) {
    const other = Math.floor(Math.random() * (at + 1));
    [items[at], items[other]] = [items[other], items[at]];
  }
}
