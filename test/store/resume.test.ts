/** An import that is killed at any moment, again and again, goes on where it was. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { MIB } from '../../src/core/limits.ts';
import { collectGarbage, importImage, verifyStore } from '../../src/store/index.ts';
import { randomBuffer, randomNumbers } from '../suites/fixtures.ts';
import { assertNothingTemporary, newStore, readBack, testFolder } from './helpers.ts';

const folder = testFolder('resume');
const KILLS = process.env['GRIDVFS_LONG'] === '1' ? 100 : 6;
const SEED = Number(process.env['GRIDVFS_SEED'] ?? 3);

const CHILD = `
  import { importImage, openStore } from ${JSON.stringify(path.resolve(import.meta.dirname, '../../src/store/index.ts'))};
  const [folder, file] = process.argv.slice(1);
  const store = await openStore(folder);
  await importImage(store, { path: file, reference: 'image:1', onProgress: () => process.stdout.write('.') });
  process.stdout.write('!');
`;

// Fails when ImportRun gives no chunk its name before the end (`#startFlush`): there is nothing to go on with then.
test(`an import killed ${KILLS} times stores each chunk once that was durable, and never anything half`, async () => {
  const next = randomNumbers(SEED);
  const file = path.join(folder, 'image');
  // Does not compress, so that there are several flushes.
  writeFileSync(file, randomBuffer(next, 104 * MIB));
  const chunks = 104 * 4;
  const units = 26;
  let store = await newStore(folder);
  let kept = 0;
  let inFlight = 0;
  let resumed = 0;
  // Kills count when they met an import in the middle; of a hundred, ten may come too late, of a few, three.
  const attempts = Math.max(Math.floor(KILLS / 0.9), KILLS + 3);
  for (let kill = 0; kill < attempts && inFlight < KILLS; kill++) {
    const child = spawn(process.execPath, ['--input-type=module', '-e', CHILD, store.layout.folder, file], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const ended = new Promise<NodeJS.Signals | null>((resolve) =>
      child.on('exit', (_, name) => resolve(name)),
    );
    // What is there already goes by in no time; kill in what is left, from its first unit to the publishing.
    const already = Math.floor((kept * units) / chunks);
    const dots = already + 1 + (next() % (units - already));
    let seen = 0;
    await new Promise<void>((resolve) => {
      child.stdout.on('data', (text: Buffer) => {
        seen += text.length;
        if (seen >= dots) resolve();
      });
      child.once('exit', () => resolve());
    });
    await sleep(next() % 40);
    child.kill('SIGKILL');
    const killed = (await ended) === 'SIGKILL';
    if (killed && readdirSync(store.layout.tmp).length > 0) inFlight++;
    const tags = await store.listTags();
    const { damaged, missing, unreferencedChunks } = await verifyStore(store);
    assert.deepEqual([damaged, missing], [[], []], `seed ${SEED}, kill ${kill}`);
    if (tags.length > 0 || unreferencedChunks >= chunks - 16) {
      // It was done, or all but: from the beginning, with the rest of the kills.
      const { newChunks } = await importImage(store, { path: file, reference: 'image:1' });
      assert.equal(newChunks, tags.length > 0 ? 0 : chunks - unreferencedChunks);
      store = await newStore(folder);
      kept = 0;
      continue;
    }
    assert.ok(unreferencedChunks >= kept, 'what was durable stays');
    if (unreferencedChunks > kept) resumed++;
    kept = unreferencedChunks;
    // The grace time keeps it for the next run.
    assert.equal((await collectGarbage(store)).removed.chunks, 0);
  }
  assert.equal(inFlight, KILLS, `${inFlight} of ${attempts} kills came in the middle, seed ${SEED}`);
  assert.ok(resumed > 0, 'some kill came after a flush');
  const result = await importImage(store, { path: file, reference: 'image:1' });
  assert.equal(result.newChunks, chunks - kept);
  assert.ok((await readBack(store, result.digest)).equals(readFileSync(file)));
  assertNothingTemporary(store);
});
