/** Compositional queries against a brute-force oracle, on both databases, and against the clock. */
import assert from 'node:assert/strict';
import fc from 'fast-check';
import { after, before, suite, test } from 'node:test';
import { openDatabase } from '../../src/broker/database.ts';
import type { Database } from '../../src/broker/database.ts';
import { answerQuery } from '../../src/broker/query/index.ts';
import type { Query } from '../../src/broker/query/index.ts';
import { GIB, MIB } from '../../src/core/limits.ts';
import { Databases, DIALECTS } from './harness.ts';

interface Host {
  memoryGib: number;
  freeGib: number;
  networks: number[];
  virtual: boolean;
}
interface Vm {
  memoryMib: number;
  network: number | undefined;
}
interface Inventory {
  hosts: Host[];
  vms: Vm[];
}

const OPERATOR = { user: 'operator', role: 'operator' } as const;
const NETWORKS = 3;

const inventories = fc.record({
  hosts: fc.array(
    fc.record({
      memoryGib: fc.integer({ min: 1, max: 4 }),
      freeGib: fc.integer({ min: 0, max: 2 }),
      networks: fc.subarray([0, 1, 2]),
      virtual: fc.boolean(),
    }),
    { maxLength: 7 },
  ),
  vms: fc.array(
    fc.record({
      memoryMib: fc.integer({ min: 1, max: 6 }).map((n) => 64 * n),
      network: fc.option(fc.integer({ min: 0, max: NETWORKS - 1 }), { nil: undefined }),
    }),
    { maxLength: 9 },
  ),
});

async function fill(db: Database, { hosts, vms }: Inventory): Promise<void> {
  await db.transaction(async (tx) => {
    for (const table of ['vms', 'jobs', 'futures', 'host_networks', 'links', 'networks', 'hosts']) {
      await tx.run(`DELETE FROM ${table}`);
    }
    for (let id = 0; id < NETWORKS; id++) await tx.run('INSERT INTO networks VALUES (?, 0)', `n${id}`);
    await tx.run(`INSERT INTO links (a, b) VALUES ('n0', 'n1')`);
    for (const [at, host] of hosts.entries()) {
      await tx.run(
        `INSERT INTO hosts (id, incarnation, sequence, state, vcpus, memory_bytes, guest_vcpus, guest_memory_bytes, is_virtual, source, owner, registered_ms)
         VALUES (?, 'i', 0, 'up', 4, ?, 4, 0, ?, 's', 'o', 0)`,
        ...[`h${at}`, host.memoryGib * GIB, host.virtual ? 1 : 0],
      );
      await tx.run('INSERT INTO futures VALUES (?, ?, 4, 10)', `h${at}`, host.freeGib * GIB);
      for (const network of host.networks)
        await tx.run('INSERT INTO host_networks VALUES (?, ?)', `h${at}`, `n${network}`);
    }
    await tx.run(
      `INSERT INTO jobs (id, owner, kind, body, created_ms) VALUES ('j', 'ada', 'request', '{}', 0)`,
    );
    for (const [at, vm] of vms.entries()) {
      await tx.run(
        `INSERT INTO vms (id, owner, job, name, network, generation, state, memory_bytes, vcpus, restart, wanted, created_ms)
         VALUES (?, 'ada', 'j', ?, ?, 1, 'running', ?, 1, 0, 'running', 0)`,
        ...[`v${at}`, `v${at}`, vm.network === undefined ? null : `n${vm.network}`, vm.memoryMib * MIB],
      );
    }
  });
}

/** All subsets of `count` indices. */
function subsets(length: number, count: number, from = 0): number[][] {
  if (count === 0) return [[]];
  const all: number[][] = [];
  for (let first = from; first <= length - count; first++) {
    for (const rest of subsets(length, count - 1, first + 1)) all.push([first, ...rest]);
  }
  return all;
}

const keys = (sets: readonly (readonly { id: string }[])[]) =>
  sets
    .map((set) =>
      set
        .map(({ id }) => id)
        .toSorted()
        .join(' '),
    )
    .toSorted();

/** The three example queries (the sets smaller than in the text, so that small inventories have some). */
const QUERIES: { query: Query; oracle: (inventory: Inventory) => string[] }[] = [
  {
    query: { find: 'hosts', canRun: { memoryBytes: GIB } },
    oracle: ({ hosts }) =>
      hosts.flatMap((host, at) => (host.freeGib >= 1 && !host.virtual ? [`h${at}`] : [])),
  },
  {
    query: {
      ...{ find: 'vms', count: 4, same: 'network' },
      total: [{ field: 'memoryBytes', atLeast: 512 * MIB, atMost: GIB }],
    },
    oracle: ({ vms }) =>
      subsets(vms.length, 4)
        .filter((set) => {
          const memory = set.reduce((sum, at) => sum + vms[at]!.memoryMib, 0);
          const { network } = vms[set[0]!]!;
          return (
            network !== undefined &&
            set.every((at) => vms[at]!.network === network) &&
            memory >= 512 &&
            memory <= 1024
          );
        })
        .map((set) => set.map((at) => `v${at}`).join(' ')),
  },
  {
    query: { find: 'hosts', count: 3, same: 'network', total: [{ field: 'memoryBytes', atLeast: 8 * GIB }] },
    oracle: ({ hosts }) =>
      subsets(hosts.length, 3)
        .filter(
          (set) =>
            set.every((at) => !hosts[at]!.virtual) &&
            [0, 1, 2].some((network) => set.every((at) => hosts[at]!.networks.includes(network))) &&
            set.reduce((sum, at) => sum + hosts[at]!.memoryGib, 0) >= 8,
        )
        .map((set) => set.map((at) => `h${at}`).join(' ')),
  },
  {
    query: { find: 'hosts', count: 2, virtual: true, scope: { network: 'n0', hops: 1 } },
    oracle: ({ hosts }) =>
      subsets(hosts.length, 2)
        .filter((set) => set.every((at) => hosts[at]!.networks.some((network) => network < 2)))
        .map((set) => set.map((at) => `h${at}`).join(' ')),
  },
];

for (const dialect of DIALECTS) {
  suite(`compositional queries on ${dialect}`, () => {
    const databases = new Databases(dialect);
    let db: Database;
    before(async () => {
      await databases.start();
      db = await openDatabase(await databases.fresh());
    });
    after(async () => {
      await db.close();
      await databases.stop();
    });

    test('the examples give exactly the sets that trying all of them gives', async () => {
      await fc.assert(
        fc.asyncProperty(inventories, async (inventory) => {
          await fill(db, inventory);
          for (const { query, oracle } of QUERIES) {
            const expected = oracle(inventory).toSorted();
            const answer = await answerQuery(db, OPERATOR, { ...query, limit: 10_000 });
            assert.deepEqual(keys(answer.sets), expected);
            assert.equal(answer.complete, true);
            const one = await answerQuery(db, OPERATOR, { ...query, limit: 1, nondeterministic: true });
            assert.equal(one.sets.length, Math.min(1, expected.length));
            assert.ok(keys(one.sets).every((set) => expected.includes(set)));
            // Sets of resources that each have their share have it together.
            const near = await answerQuery(db, OPERATOR, { ...query, limit: 10_000, approximate: true });
            assert.ok(keys(near.sets).every((set) => expected.includes(set)));
          }
        }),
        { numRuns: dialect === 'sqlite' ? 40 : 12 },
      );
    });

    test('a user finds its own VMs only, and what is no field or no fitting value is refused', async () => {
      await fill(db, { hosts: [], vms: [{ memoryMib: 64, network: 0 }] });
      const find = (user: string) => answerQuery(db, { user, role: 'user' }, { find: 'vms', limit: 10 });
      assert.equal((await find('ada')).sets.length, 1);
      assert.equal((await find('bob')).sets.length, 0);
      for (const condition of [
        { field: `id' OR 1=1 --`, operator: '=', value: 'x' },
        { field: 'constructor', operator: '=', value: 'x' },
        { field: 'memoryBytes', operator: '>', value: '1; DROP TABLE vms' },
      ] as const) {
        await assert.rejects(answerQuery(db, OPERATOR, { find: 'vms', where: [condition] }), {
          code: 'bad-request',
        });
      }
    });
  });
}
