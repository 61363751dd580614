/** Freed memory goes back to the system, in a process of its own: what it has is read from the kernel. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { test } from 'node:test';
import { promisify } from 'node:util';

const PROGRAM = `
import { setTimeout as sleep } from 'node:timers/promises';
import { giveBackMemory } from '${new URL('../../src/core/memory.ts', import.meta.url).href}';
const MIB = 1024 * 1024;
const megabytes = () => Math.round(process.memoryUsage.rss() / MIB);
const before = megabytes();
const stop = giveBackMemory(20);
// As chunks come and go beside what stays: too small for the allocator to ask the system for each.
let all = Array.from({ length: 4000 }, () => Buffer.allocUnsafeSlow(100 * 1024).fill(1));
const taken = megabytes();
// While it is in use it cannot be given back, which is tried.
await sleep(100);
const kept = all.filter((_, index) => index % 100 === 0);
all = [];
for (let round = 0; round < 3; round++) { gc(); await sleep(50); }
await sleep(1500);
stop();
console.log(JSON.stringify({ before, taken, after: megabytes(), kept: kept.length }));
`;

async function run() {
  const { stdout } = await promisify(execFile)(process.execPath, [
    ...['--expose-gc', '--input-type=module', '--eval', PROGRAM],
  ]);
  return JSON.parse(stdout) as { before: number; taken: number; after: number };
}

// Fails without trimMemory: all of it is still there.
test('what was freed between things that stay is given back', async () => {
  const { before, taken, after } = await run();
  assert.ok(taken > before + 300, `${taken} MB taken`);
  assert.ok(after < before + 120, `${after} MB of ${taken} are left, of ${before} before`);
});
