/**
 * A host tells its source which images its clones lie on: when that changes, under one name, and without a flood. And
 * what a clone says whose image is gone there all the same.
 *
 * Guarded line, tried by taking it out: clone-parts.ts openBase, `gone` at the read (a code that is of the clone).
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { Holds } from '../../src/agent/holds.ts';
import { GridError } from '../../src/core/errors.ts';
import { collectGarbage, importImage } from '../../src/store/index.ts';
import { hasCode } from '../suites/image.ts';
import { CloneWorld } from './clone-world.ts';

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

test('a clone whose image was collected says so, keeps what is its own, and is whole when the content is there again', async () => {
  const world = await CloneWorld.create();
  try {
    const { store, content } = world;
    const { chunkBytes } = await world.cache.readManifest(world.digest);
    const own = Buffer.alloc(4096, 7);
    await world.make('a', { kind: 'persistent' });
    await world.write('a', 0, own);
    for (const { name, version } of await store.listTags()) await store.removeTag(name, version);
    assert.equal((await collectGarbage(store, { graceMs: 0 })).removed.manifests, 1);
    await assert.rejects(() => world.read('a'), hasCode('wrong-base'));
    const mine = Buffer.alloc(4096);
    await world.using('a', (disk) => disk.read(mine, 0));
    assert.ok(mine.equals(own));

    const raw = path.join(world.folder, 'again.raw');
    writeFileSync(raw, content);
    await importImage(store, { path: raw, reference: 'again:1', chunkBytes, format: 'raw' });
    own.copy(content);
    assert.ok((await world.read('a')).equals(content));
  } finally {
    await world.dispose();
  }
});
