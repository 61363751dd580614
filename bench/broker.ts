/**
 * `node bench/broker.ts`: what a broker answers, in a process of its own beside this one:
 *   reads    500 a second, of the kinds that users and their tools make, at moments that do not wait for answers: the
 *            time from the moment that a call was due to its last byte
 *   queries  compositional ones over 10,000 hosts and 100,000 VMs, each with `within 100 ms` and with an answer that is
 *            there: how long an answer takes, and how many hold a valid set
 *
 * `--database postgres://…` measures that one instead of the embedded one; it must be empty.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { BrokerClient } from '../src/agent/broker-client.ts';
import { Access } from '../src/broker/access.ts';
import { openDatabase } from '../src/broker/database.ts';
import type { Database } from '../src/broker/database.ts';
import type { Answer } from '../src/broker/index.ts';
import { table } from '../src/cli/kit.ts';
import { startService } from './lib/child.ts';
import { hostFacts } from './lib/facts.ts';
import { fillInventory, isValidSet, satisfiableQueries, seeded } from './lib/inventory.ts';

interface Row {
  readonly case: 'reads' | 'queries';
  readonly subject: string;
  readonly value: number;
  readonly unit: string;
}

const WITHIN_MS = 100;
const READS_INVENTORY = { hosts: 100, hostsPerNetwork: 25, vmsPerHost: 10 };
const QUERY_INVENTORY = { hosts: 10_000, hostsPerNetwork: 25, vmsPerHost: 10 };

const { values } = parseArgs({
  options: {
    database: { type: 'string' },
    rate: { type: 'string', default: '500' },
    seconds: { type: 'string', default: '30' },
    queries: { type: 'string', default: '120' },
    seed: { type: 'string', default: '1' },
    json: { type: 'string' },
  },
});
const seed = Number(values.seed);

const quantile = (sorted: readonly number[], share: number) =>
  sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]!;

/** Runs `work` against a broker over a database that `fill` has filled. */
async function withBroker<T>(
  fill: (db: Database) => Promise<void>,
  work: (client: BrokerClient, db: Database) => Promise<T>,
): Promise<T> {
  await using stack = new AsyncDisposableStack();
  const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-bench-broker-'));
  stack.defer(() => rmSync(folder, { recursive: true, force: true }));
  const database = values.database ?? path.join(folder, 'broker.db');
  const db = await openDatabase(database);
  stack.defer(() => db.close());
  await fill(db);
  const { token } = await new Access(db).create('ada', 'user');
  const socket = path.join(folder, 'broker.sock');
  const broker = await startService('src/main.ts', [
    ...['broker', 'run', '--database', database, '--state-dir', folder, '--socket', socket, '--json'],
  ]);
  stack.defer(() => broker.stop());
  const client = new BrokerClient({ url: `unix:${socket}`, token });
  stack.defer(() => client.close());
  return await work(client, db);
}

async function reads(rate: number, seconds: number): Promise<Row[]> {
  return withBroker(
    (db) =>
      db.transaction(async (tx) => {
        await fillInventory(tx, READS_INVENTORY, seed);
        // One user among fifty: it has 20 of the VMs.
        await tx.run(
          `INSERT INTO jobs (id, owner, kind, body, created_ms) VALUES ('mine', 'ada', 'request', '{}', 0)`,
        );
        const mine = `id LIKE 'v1-%' OR id LIKE 'v2-%'`;
        await tx.run(`UPDATE vms SET owner = 'others' WHERE NOT (${mine})`);
        await tx.run(`UPDATE vms SET job = 'mine' WHERE ${mine}`);
        for (let at = 0; at < 50; at++) {
          await tx.run('INSERT INTO images (name, created_ms) VALUES (?, 0)', `image${at}`);
          await tx.run(
            `INSERT INTO versions (image, version, manifest, kind, size_bytes, created) VALUES (?, '1', ?, 'disk', 1, '')`,
            ...[`image${at}`, String(at)],
          );
          await tx.run(
            `INSERT INTO labels (image, version, name, value) VALUES (?, '1', 'os', 'debian')`,
            `image${at}`,
          );
        }
      }),
    async (client) => {
      const random = seeded(seed);
      const routes = [
        '/v1/vms',
        '/v1/vms/v1-3',
        '/v1/jobs/mine',
        '/v1/images',
        '/v1/vms/v2-7',
        '/v1/usage',
        '/v1/hosts',
      ];
      const call = async (dueMs: number) => {
        await client.call('GET', routes[Math.floor(random() * routes.length)]!);
        return performance.now() - dueMs;
      };
      for (let at = 0; at < 500; at++) await call(0); // the code is compiled, the connections are there
      const calls: Promise<number>[] = [];
      const startMs = performance.now();
      for (let at = 0; at < rate * seconds; at++) {
        const dueMs = startMs + (at * 1000) / rate;
        const waitMs = dueMs - performance.now();
        if (waitMs > 1) await sleep(waitMs);
        calls.push(call(dueMs));
      }
      const times = (await Promise.all(calls)).toSorted((a, b) => a - b);
      const tookS = (performance.now() - startMs) / 1000;
      return [
        { case: 'reads', subject: 'answered', value: times.length / tookS, unit: '1/s' },
        { case: 'reads', subject: 'median', value: quantile(times, 0.5), unit: 'ms' },
        { case: 'reads', subject: 'p99', value: quantile(times, 0.99), unit: 'ms' },
        { case: 'reads', subject: 'longest', value: times.at(-1)!, unit: 'ms' },
      ];
    },
  );
}

async function queries(count: number): Promise<Row[]> {
  return withBroker(
    (db) => db.transaction((tx) => fillInventory(tx, QUERY_INVENTORY, seed)),
    async (client, db) => {
      const asked = await satisfiableQueries(db, count, seed);
      await client.call<Answer>('POST', '/v1/query', asked[0]!.query);
      const times: number[] = [];
      let valid = 0;
      let complete = 0;
      for (const { kind, query } of asked) {
        const startMs = performance.now();
        const answer = await client.call<Answer>('POST', '/v1/query', { ...query, withinMs: WITHIN_MS });
        times.push(performance.now() - startMs);
        if (answer.complete) complete++;
        if (answer.sets.length === 1 && isValidSet(query, answer.sets[0]!)) valid++;
        else process.stderr.write(`no valid set: ${kind} ${JSON.stringify(query)}\n`);
      }
      const sorted = times.toSorted((a, b) => a - b);
      return [
        { case: 'queries', subject: 'answered with a valid set', value: valid / count, unit: 'of 1' },
        { case: 'queries', subject: 'marked complete', value: complete / count, unit: 'of 1' },
        { case: 'queries', subject: 'median', value: quantile(sorted, 0.5), unit: 'ms' },
        { case: 'queries', subject: 'p95', value: quantile(sorted, 0.95), unit: 'ms' },
        { case: 'queries', subject: 'longest', value: sorted.at(-1)!, unit: 'ms' },
      ];
    },
  );
}

const rows = [
  ...(Number(values.seconds) > 0 ? await reads(Number(values.rate), Number(values.seconds)) : []),
  ...(Number(values.queries) > 0 ? await queries(Number(values.queries)) : []),
];
process.stdout.write(
  table(
    ['CASE', 'SUBJECT', 'VALUE', 'UNIT'],
    rows.map((row) => [row.case, row.subject, row.value.toFixed(2), row.unit]),
  ) + '\n',
);
if (values.json !== undefined) {
  writeFileSync(values.json, JSON.stringify({ schema: 1, host: hostFacts('none'), rows }, null, 2) + '\n');
}
