/** Small writes that go to a file together: each byte where it belongs, each failure told to whom it concerns. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { closeSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { GatheredWrites } from '../../cache/gathered-writes.ts';
import { KIB } from '../../src/core/limits.ts';
import { isRoot } from '../../src/core/linux.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-gathered-'));
after(() => rmSync(folder, { recursive: true }));

test('neighbours, what lies alone and what ends short come where they belong', async () => {
  const file = path.join(folder, 'data');
  const fd = openSync(file, 'w+');
  const writes = new GatheredWrites(fd);
  const expected = Buffer.alloc(4096 * KIB);
  const places = Array.from({ length: 200 }, (_, index) => index).filter((index) => index % 7 !== 3);
  const shuffled = places.toSorted((a, b) => ((a * 37) % 200) - ((b * 37) % 200));
  const write = async (index: number) => {
    const bytes = randomBytes(index === 198 ? 100 : 16 * KIB);
    bytes.copy(expected, index * 16 * KIB);
    await writes.write(bytes, index * 16 * KIB);
  };
  await Promise.all(shuffled.map(write));
  // And of a later turn.
  await write(3);
  closeSync(fd);
  const got = readFileSync(file);
  assert.equal(got.length, 198 * 16 * KIB + 100);
  assert.ok(got.equals(expected.subarray(0, got.length)));
});

test(
  'a disk that is full fails those that it had no room for',
  { skip: !isRoot() && 'root only' },
  async () => {
    const small = path.join(folder, 'small');
    mkdirSync(small);
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=64k', 'gridvfs-test', small]);
    try {
      const file = path.join(small, 'data');
      const fd = openSync(file, 'w+');
      const writes = new GatheredWrites(fd);
      const fits = randomBytes(32 * KIB);
      await writes.write(fits, 0);
      // Two neighbours, of which the first would fit.
      const results = await Promise.allSettled([
        writes.write(randomBytes(32 * KIB), 32 * KIB),
        writes.write(randomBytes(32 * KIB), 64 * KIB),
      ]);
      for (const result of results)
        assert.equal(result.status === 'rejected' && (result.reason as NodeJS.ErrnoException).code, 'ENOSPC');
      closeSync(fd);
      assert.ok(readFileSync(file).subarray(0, fits.length).equals(fits));
    } finally {
      execFileSync('umount', [small]);
    }
  },
);
