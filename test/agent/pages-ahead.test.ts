/** What is said to be here, and nothing else, is brought into the page cache; looked at with fincore of util-linux. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { promisify } from 'node:util';
import { readPagesAhead } from '../../src/agent/pages-ahead.ts';
import { KIB, MIB } from '../../src/core/limits.ts';

const run = promisify(execFile);
// Not in /tmp, which may be a tmpfs: its pages are always there.
const folder = mkdtempSync(path.join('/var/tmp', `gridvfs-${os.userInfo().uid}-`));
after(() => rmSync(folder, { recursive: true }));

/** A file of which no page is in memory. */
async function coldFile(): Promise<string> {
  const file = path.join(folder, 'memory.raw');
  writeFileSync(file, randomFillSync(Buffer.alloc(64 * MIB)));
  await run('dd', [`of=${file}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0', 'status=none']);
  assert.equal(await residentBytes(file), 0);
  return file;
}

async function residentBytes(file: string): Promise<number> {
  const { stdout } = await run('fincore', ['--bytes', '--noheadings', '--output', 'RES', file]);
  return Number(stdout);
}

const range = (startBytes: number, lengthBytes: number) => ({
  startBytes,
  endBytes: startBytes + lengthBytes,
});

// Fails without POSIX_FADV_RANDOM: the kernel reads on beyond each range then.
test('exactly the ranges are read, those that come later as well', async () => {
  const file = await coldFile();
  const pages = readPagesAhead(file);
  for (let at = 8 * MIB; at < 11 * MIB; at += 64 * KIB) pages.here(range(at, 64 * KIB));
  pages.here(range(1 * MIB, 16 * KIB));
  await new Promise((resolve) => setTimeout(resolve, 20));
  pages.here(range(40 * MIB, 128 * KIB));
  pages.finish();
  await pages.ended;
  assert.equal(await residentBytes(file), 3 * MIB + 16 * KIB + 128 * KIB);
});

test('nothing more is read for a machine that is gone, and the file is closed', async () => {
  const file = await coldFile();
  const pages = readPagesAhead(file);
  pages.here(range(0, 64 * KIB));
  pages.stop();
  pages.stop();
  await pages.ended;
  pages.here(range(1 * MIB, 64 * KIB));
  pages.finish();
  assert.ok((await residentBytes(file)) <= 64 * KIB);
});

test('a file that is not there is nobody\u2019s trouble', async () => {
  const pages = readPagesAhead(path.join(folder, 'none.raw'));
  pages.here(range(0, 64 * KIB));
  pages.finish();
  await pages.ended;
});
