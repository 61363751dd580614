/** Compositional queries over 10,000 hosts and 100,000 VMs, with a time bound: what bench/broker.ts measures. */
import assert from 'node:assert/strict';
import { randomInt } from 'node:crypto';
import { after, before, suite, test } from 'node:test';
import { fillInventory, isValidSet, satisfiableQueries } from '../../bench/lib/inventory.ts';
import { openDatabase } from '../../src/broker/database.ts';
import { answerQuery } from '../../src/broker/query/index.ts';
import { Databases } from './harness.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';
const USER = { user: 'ada', role: 'user' } as const;
/** The bound that is promised holds on a machine that does nothing else; an ordinary run has tests beside it. */
const WITHIN_MS = LONG ? 100 : 5_000;
const LATE_MAX = 1.5;

for (const dialect of LONG ? (['sqlite', 'postgres'] as const) : (['sqlite'] as const)) {
  suite(`queries at scale on ${dialect}`, () => {
    const databases = new Databases(dialect);
    before(() => databases.start());
    after(() => databases.stop());

    test('with a time bound an answer nearly always holds a valid set where there is one', async (t) => {
      const seed = randomInt(2 ** 31);
      t.diagnostic(`seed ${seed}`);
      const db = await openDatabase(await databases.fresh());
      try {
        const size = { hosts: 10_000, hostsPerNetwork: 25, vmsPerHost: 10 };
        await db.transaction((tx) => fillInventory(tx, size, seed));
        if (dialect === 'postgres') await db.run('ANALYZE');
        const asked = await satisfiableQueries(db, LONG ? 120 : 30, seed);
        const times: number[] = [];
        let valid = 0;
        for (const { kind, query } of asked) {
          const answer = await answerQuery(db, USER, { ...query, withinMs: WITHIN_MS });
          times.push(answer.elapsedMs);
          if (answer.sets.some((set) => isValidSet(query, set))) valid++;
          else t.diagnostic(`none after ${answer.elapsedMs.toFixed(0)} ms: ${kind}`);
          assert.ok(
            answer.sets.every((set) => isValidSet(query, set)),
            kind,
          );
        }
        const sorted = times.toSorted((a, b) => a - b);
        t.diagnostic(
          `${valid} of ${asked.length} valid; median ${sorted[asked.length >> 1]!.toFixed(1)} ms, longest ${sorted.at(-1)!.toFixed(1)} ms`,
        );
        // What is under way when the time is over may end: a statement, a round of repairs.
        assert.ok(sorted.at(-1)! <= LATE_MAX * WITHIN_MS, `the longest took ${sorted.at(-1)!.toFixed(1)} ms`);
        assert.ok(valid >= 0.95 * asked.length, `${valid} of ${asked.length}`);
      } finally {
        await db.close();
      }
    });
  });
}
