/** The verbs that look after a store, as a person or a script runs them. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { chmodSync, readdirSync, truncateSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { importImage } from '../../src/store/index.ts';
import type { GcResult, VerifyResult } from '../../src/store/index.ts';
import { randomBuffer, randomNumbers } from '../suites/fixtures.ts';
import { newStore, testFolder } from './helpers.ts';

const folder = testFolder('verbs');
const MAIN = path.resolve(import.meta.dirname, '../../src/main.ts');

function gridvfs(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, 'store', ...args], {
    encoding: 'utf8',
  });
  return { status, stdout, stderr };
}

test('gc, pin and verify say what they did, and exit as scripts expect', async () => {
  const store = await newStore(folder);
  const place = store.layout.folder;
  const file = path.join(folder, 'image');
  writeFileSync(file, randomBuffer(randomNumbers(90), 1 * MIB));
  const { digest } = await importImage(store, { path: file, reference: 'image:1' });

  assert.match(gridvfs('pin', place, 'image:1').stdout, new RegExp(`^pinned ${digest}\n$`));
  await store.removeTag('image', '1');
  const gc = (...more: string[]) =>
    JSON.parse(gridvfs('gc', place, '--grace', '0s', '--json', ...more).stdout) as GcResult;
  assert.equal(gc().removed.chunks, 0);
  assert.equal(gridvfs('pin', place).stdout, `${digest}\n`);
  assert.equal(gridvfs('unpin', place, digest).status, 0);
  assert.equal(gridvfs('unpin', place, digest).status, 1);
  assert.deepEqual([gc('--dry-run').removed.chunks, gc('--dry-run').dryRun], [4, true]);
  assert.match(gridvfs('gc', place).stdout, /^removed 0 manifests, 0 tables, 0 chunks and 0 profiles: 0 B\n/);
  assert.equal(gridvfs('gc', place, '--grace', 'soon').status, 2);
  assert.equal(gc().removed.chunks, 4);

  await importImage(store, { path: file, reference: 'image:1' });
  assert.match(gridvfs('verify', place).stdout, /^6 objects \(1\.\d MiB\) checked: 0 damaged, 0 missing\n$/);
  const shard = path.join(store.layout.kind('chunks'), readdirSync(store.layout.kind('chunks'))[0]!);
  const victim = path.join(shard, readdirSync(shard)[0]!);
  chmodSync(victim, 0o644);
  truncateSync(victim, 100);
  const damaged = gridvfs('verify', place);
  assert.equal(damaged.status, 1);
  assert.ok(damaged.stdout.includes(`damaged: ${victim}: `) && damaged.stdout.includes('(image:1)'));
  const result = JSON.parse(gridvfs('verify', place, '--json').stdout) as VerifyResult;
  assert.deepEqual(
    result.damaged.map((one) => one.path),
    [victim],
  );
});
