/** What is done for a machine that goes on in a memory image: what of it is known and here is in the kernel's pages. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { globSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { createStarts } from '../../src/agent/starts.ts';
import { KIB, MIB } from '../../src/core/limits.ts';
import { makeHarness } from '../cache/harness.ts';

const run = promisify(execFile);
const CHUNK_BYTES = 64 * KIB;
const harness = await makeHarness({ sizeBytes: 20 * MIB + 512, seed: 41, chunkBytes: CHUNK_BYTES });
const { fixture, raw } = harness;
const indexes = [...fixture.table.entries()].map(({ index }) => index);
/** In place of the file on a mount. Not in /tmp, which may be a tmpfs: its pages are always there. */
const memory = path.join('/var/tmp', `gridvfs-starts-${process.pid}.raw`);
after(() => rmSync(memory, { force: true }));

async function residentBytes(): Promise<number> {
  const { stdout } = await run('fincore', ['--bytes', '--noheadings', '--output', 'RES', memory]);
  return Number(stdout);
}

/** Whether some process has the file open. */
function isOpen(): boolean {
  return globSync('/proc/[0-9]*/fd/*').some((link) => {
    try {
      return readlinkSync(link) === memory;
    } catch {
      return false; // gone meanwhile
    }
  });
}

async function coldMemory(): Promise<void> {
  writeFileSync(memory, raw);
  await run('dd', [`of=${memory}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0', 'status=none']);
  assert.equal(await residentBytes(), 0);
}

async function becomesResident(bytes: number): Promise<void> {
  for (let at = 0; at < 200 && (await residentBytes()) < bytes; at++) await sleep(20);
  await sleep(100);
  assert.equal(await residentBytes(), bytes);
}

/** Runs of neighbours, so that whole chunks are whole pages and no other chunk's. */
const chunks = indexes.filter((index) => index >= 8 && index < 80).slice(0, 40);

// Fails without `here` in prefetch.ts; an end of it fails without `finish` in starts.ts.
test('what the profile names is fetched, and read into the pages of the file that will be mapped', async () => {
  const folder = harness.fresh();
  const cache = await harness.open({ folder, source: await harness.source() });
  const recording = cache.startRecording(fixture.digest, 'resume');
  const image = await cache.openImage(fixture.digest);
  for (const index of chunks) await image.read(Buffer.alloc(16), index * CHUNK_BYTES);
  assert.ok(await recording.finish());
  await image.close();
  await cache.evict(fixture.digest);
  await coldMemory();
  const start = createStarts(cache, true, () => undefined).begin([fixture.digest], 'resume', {
    file: memory,
    image: fixture.digest,
  });
  await becomesResident(chunks.length * CHUNK_BYTES);
  assert.equal((await cache.presentRanges(fixture.digest)).length, chunks.length);
  for (let at = 0; at < 100 && isOpen(); at++) await sleep(50);
  assert.ok(!isOpen(), 'nobody has it open any more: the mount can be unmounted');
  start.gone();
  await cache.close();
});

test('where nothing is recorded, all that is here is read, and nothing fetched', async () => {
  const cache = await harness.open({ folder: harness.fresh(), source: await harness.source() });
  const image = await cache.openImage(fixture.digest);
  // From the end to the beginning: nothing is read ahead for such a reader.
  for (const index of chunks.slice(0, 9).toReversed())
    await image.read(Buffer.alloc(16), index * CHUNK_BYTES);
  await image.close();
  const here = 9;
  await coldMemory();
  const start = createStarts(cache, false, () => undefined).begin([fixture.digest], 'resume', {
    file: memory,
    image: fixture.digest,
  });
  await becomesResident(here * CHUNK_BYTES);
  start.gone();
  await cache.close();
});
