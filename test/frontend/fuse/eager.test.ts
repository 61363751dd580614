/** A worker that asks for a moment before it sleeps: when it does, and when it gives that up. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { closeSync, constants, mkdtempSync, openSync, readSync, rmSync, writeSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { isReadable } from '../../../src/core/linux.ts';
import { Eager, newEager } from '../../../src/frontend/fuse/eager.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-eager-'));
const pipe = path.join(folder, 'pipe');
execFileSync('mkfifo', [pipe]);
const fd = openSync(pipe, constants.O_RDWR | constants.O_NONBLOCK);
after(() => {
  closeSync(fd);
  rmSync(folder, { recursive: true });
});

/** Whether it looked for something at all, by the time that it took. */
function asks(eager: Eager): boolean {
  const startMs = performance.now();
  eager.ask();
  return performance.now() - startMs >= 0.05;
}

test('what is there is seen without waiting, and what is not is given up soon', () => {
  const eager = new Eager(newEager(), fd);
  assert.equal(isReadable(fd), false);
  assert.equal(asks(eager), true);
  writeSync(fd, 'x');
  assert.equal(isReadable(fd), true);
  eager.ask();
  readSync(fd, Buffer.alloc(1));
  assert.equal(isReadable(fd), false);
});

test('after four moments in which nothing came it sleeps at once, and tries again later', () => {
  const eager = new Eager(newEager(), fd);
  for (let i = 0; i < 4; i++) assert.equal(asks(eager), true, `moment ${i}`);
  let asked = 0;
  for (let i = 0; i < 64; i++) {
    if (asks(eager)) asked++;
  }
  assert.ok(asked >= 1 && asked < 32, `${asked} of 64`);
});

test('one of a mount asks at a time', () => {
  const shared = newEager();
  const eager = new Eager(shared, fd);
  new Int32Array(shared)[0] = 1;
  // Nothing was tried, so nothing failed: it asks as soon as the other is done.
  for (let i = 0; i < 10; i++) eager.ask();
  assert.equal(new Int32Array(shared)[0], 1);
  new Int32Array(shared)[0] = 0;
  assert.equal(asks(eager), true);
  assert.equal(new Int32Array(shared)[0], 0);
});
