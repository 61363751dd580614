/** A host tells its source which images its clones lie on: when that changes, under one name, and without a flood. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { Holds } from '../../src/agent/holds.ts';
import { GridError } from '../../src/core/errors.ts';

const A = 'a'.repeat(64);
const B = 'b'.repeat(64);
const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-holds-'));
after(() => rmSync(folder, { recursive: true }));

test('it is told when it changes, also that nothing is left, and after a restart under the same name', async () => {
  const told: [string, readonly string[]][] = [];
  const log: string[] = [];
  let bases: string[] = [];
  const refusal: { error?: GridError } = {};
  const start = () =>
    new Holds({
      source: {
        name: 'store',
        hold(holder, manifests) {
          told.push([holder, manifests]);
          return refusal.error ? Promise.reject(refusal.error) : Promise.resolve();
        },
      },
      stateFolder: folder,
      bases: () => bases,
      log: (line) => log.push(line),
    });
  const look = async (holds: Holds) => {
    holds.look();
    await new Promise(setImmediate);
    return told.splice(0).map(([, manifests]) => manifests);
  };

  let holds = start();
  assert.deepEqual(await look(holds), [], 'a host that never had a clone says nothing');
  bases = [B, A, B];
  const first = look(holds);
  const [name] = told[0]!;
  assert.deepEqual(await first, [[A, B]]);
  assert.deepEqual(await look(holds), [], 'nothing has changed');
  bases = [];
  assert.deepEqual(await look(holds), [[]]);
  holds.close();

  holds = start();
  assert.equal(told[0]![0], name);
  assert.deepEqual(await look(holds), [[]], 'what the last process told may be another');
  refusal.error = new GridError('denied', 'no holds here');
  bases = [A];
  assert.deepEqual(await look(holds), [[A]]);
  assert.deepEqual(await look(holds), [], 'it was refused: later');
  assert.equal(log.length, 1);
  assert.match(log[0]!, /no holds here.*gridvfs store pin/);
  holds.close();
});
