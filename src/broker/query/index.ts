/** Answers a query: candidates network by network, sets of each, until enough, all, or the time is over. */
import { setImmediate } from 'node:timers/promises';
import type { Principal } from '../access.ts';
import type { Queries, Value } from '../database.ts';
import { candidates } from './compile.ts';
import type { Answer, Found, Query } from './form.ts';
import { composeSets } from './search.ts';

export { querySchema } from './form.ts';
export type { Answer, Found, Query } from './form.ts';

/** Groups that are not searched to their end while others have not been looked at. */
const WAITING_MAX = 1024;
/** How far one of them is searched before the next has its turn: some milliseconds. */
const PAUSES_PER_TURN = 8;
/** Networks of one statement: few round trips, and the clock is looked at between two. */
const NETWORKS_AT_ONCE = 64;
/** Rows that one statement should give: some milliseconds. */
const ROWS_AT_ONCE = 2_000;
/** What is read surely in a millisecond, with time left to search it. */
const ROWS_PER_MS = 50;
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
  const { limit = 1 } = query;
  if (isPlain(query)) {
    const { items, cut } = await readTogether(db, principal, query);
    const elapsedMs = performance.now() - startMs;
    return { sets: items.map((one) => [one]), complete: !cut || items.length >= limit, elapsedMs };
  }
  const sets: Found[][] = [];
  const seen = new Set<string>();
  let complete = true;
  for await (const set of search(db, principal, query, endMs)) {
    if (set === 'cut') {
      complete = false;
      continue;
    }
    // Hosts on two networks meet on both.
    const key = set
      .map(({ id }) => id)
      .toSorted()
      .join('\n');
    if (seen.has(key)) continue;
    seen.add(key);
    sets.push([...set]);
    if (sets.length < limit) continue;
    complete = true;
    break;
  }
  return { sets, complete, elapsedMs: performance.now() - startMs };
}

/**
 * Sets as they are found, and 'cut' where not all of them will be. A group that has many sets of nearly the right
 * totals could take all the time: each gets its turn, and only those that are not through get another.
 */
async function* search(
  db: Queries,
  principal: Principal,
  query: Query,
  endMs: number,
): AsyncGenerator<readonly Found[] | 'cut'> {
  const { count = 1, total = [] } = query;
  let sliceMs = performance.now();
  const pause = async () => {
    if (performance.now() - sliceMs < SLICE_MS) return;
    await setImmediate();
    sliceMs = performance.now();
  };
  let waiting: Composition[] = [];
  const turn = async function* (sets: Composition, pausesMax: number): AsyncGenerator<readonly Found[]> {
    for (let pauses = 0; ;) {
      const { value, done } = sets.next();
      if (done) return;
      if (value) yield value;
      if (!value && ++pauses >= pausesMax) break;
      if (performance.now() > endMs) break;
      await pause();
    }
    waiting.push(sets);
  };
  for await (const group of groups(db, principal, query, endMs)) {
    if (group === 'late') {
      yield 'cut';
      break;
    }
    if (group.cut) yield 'cut';
    const sets = composeSets(group.items, count, query.approximate ? [] : total);
    if (performance.now() > endMs) waiting.push(sets);
    else yield* turn(sets, waiting.length < WAITING_MAX ? 1 : Infinity);
  }
  while (waiting.length > 0) {
    if (performance.now() > endMs) {
      yield 'cut';
      return;
    }
    const now = waiting;
    waiting = [];
    for (const sets of now) {
      if (performance.now() > endMs) waiting.push(sets);
      else yield* turn(sets, PAUSES_PER_TURN);
    }
  }
}

type Composition = ReturnType<typeof composeSets>;

/** Candidates that may be in one set. */
async function* groups(
  db: Queries,
  principal: Principal,
  query: Query,
  endMs: number,
): AsyncGenerator<{ items: Found[]; cut: boolean } | 'late'> {
  if (query.same === undefined) {
    yield await readTogether(db, principal, query);
    return;
  }
  const { text, values } = candidates(query, principal);
  const networks = (await db.all<{ id: string }>('SELECT id FROM networks ORDER BY id')).map(({ id }) => id);
  if (query.nondeterministic) shuffle(networks);
  const column = query.find === 'vms' ? 'v.network' : 'n.network';
  // The first are few, because nobody knows how many candidates they have.
  let atOnce = 4;
  for (let at = 0; at < networks.length;) {
    if (performance.now() > endMs) {
      yield 'late';
      return;
    }
    const some: Value[] = networks.slice(at, at + atOnce);
    at += some.length;
    const rows = await db.all<CandidateRow>(
      `${text} AND ${column} IN (${some.map(() => '?').join(', ')}) ORDER BY ${orderOf(query)} LIMIT ?`,
      ...[...values, ...some, CANDIDATES_MAX + 1],
    );
    const cut = rows.length > CANDIDATES_MAX;
    const byNetwork = Map.groupBy(rows, ({ network }) => network);
    for (const network of some) {
      const members = byNetwork.get(network as string);
      if (members && members.length >= (query.count ?? 1)) yield { items: members.map(found), cut };
    }
    // Powers of two: few different statements.
    if (rows.length < ROWS_AT_ONCE / 2 && atOnce < NETWORKS_AT_ONCE) atOnce *= 2;
    else if (rows.length > ROWS_AT_ONCE && atOnce > 1) atOnce /= 2;
  }
}

/** Candidates without regard to networks. */
async function readTogether(db: Queries, principal: Principal, query: Query) {
  const { text, values } = candidates(query, principal);
  const most = isPlain(query)
    ? Math.min(CANDIDATES_MAX, query.limit ?? 1)
    : Math.min(CANDIDATES_MAX, ROWS_PER_MS * (query.withinMs ?? Infinity));
  const rows = await db.all<CandidateRow>(`${text} ORDER BY ${orderOf(query)} LIMIT ?`, ...values, most + 1);
  return { items: rows.slice(0, most).map(found), cut: rows.length > most };
}

/** Each resource by itself is an answer. */
const isPlain = ({ count = 1, total, same }: Query) =>
  count === 1 && total === undefined && same === undefined;

/** Where not all can be read, those that most likely are in a set. */
function orderOf({ nondeterministic, total }: Query): string {
  if (nondeterministic) return 'random()';
  const [first] = total ?? [];
  const column = first && { memoryBytes: 'memory_bytes', vcpus: 'vcpus' }[first.field];
  if (first?.atMost === undefined && first?.atLeast !== undefined) return `${column} DESC, id`;
  if (first?.atLeast === undefined && first?.atMost !== undefined) return `${column}, id`;
  return 'id';
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
