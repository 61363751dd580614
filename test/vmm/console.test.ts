/** The watch over a console's log: a real file that grows as a guest's console does. */
import assert from 'node:assert/strict';
import { appendFileSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { ConsoleLog, ConsoleWatch, lastWords, LOG_KEPT_BYTES } from '../../src/vmm/console.ts';

const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-console-'));
after(() => rmSync(temporary, { recursive: true, force: true }));

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
let files = 0;
const newLog = (text = '') => {
  const file = path.join(temporary, `console-${++files}.log`);
  writeFileSync(file, text);
  return file;
};

/** The outcome, or 'nothing' when there is none within `ms`. */
async function within(ms: number, watch: ConsoleWatch) {
  const { promise, resolve } = Promise.withResolvers<'nothing'>();
  const timer = setTimeout(() => resolve('nothing'), ms);
  const outcome = await Promise.race([watch.outcome, promise]);
  clearTimeout(timer);
  return outcome;
}

test('the text is found across writes that cut a character in two', async () => {
  const log = newLog();
  const watch = new ConsoleWatch(log, 'bereit für alles');
  const bytes = Buffer.from('[    1.0] bereit für alles\r\n');
  const cut = bytes.indexOf(0xc3) + 1;
  appendFileSync(log, bytes.subarray(0, cut));
  assert.equal(await within(50, watch), 'nothing');
  appendFileSync(log, bytes.subarray(cut));
  assert.equal(await within(5000, watch), 'ready');
  await watch.close();
});

test('the text that came before the watch began, and text after much else, is found', async () => {
  const early = new ConsoleWatch(newLog('ready now\n'), 'ready now');
  assert.equal(await within(5000, early), 'ready');
  await early.close();
  const late = new ConsoleWatch(
    newLog('x'.repeat(300_000) + '\n' + 'line\n'.repeat(50_000) + 'ready'),
    'ready',
  );
  assert.equal(await within(5000, late), 'ready');
  await late.close();
});

test('two halves of the text on two lines are not the text', async () => {
  const log = newLog('guest-\nready\n');
  const watch = new ConsoleWatch(log, 'guest-ready');
  assert.equal(await within(400, watch), 'nothing');
  await watch.close();
});

test('what was written just before the watch is closed still counts', async () => {
  const log = newLog();
  const watch = new ConsoleWatch(log, 'ready');
  await pause(20);
  appendFileSync(log, 'ready\n');
  await watch.close();
  assert.equal(await within(10, watch), 'ready');
});

test('a kernel panic ends the wait', async () => {
  const watch = new ConsoleWatch(
    newLog('[ 1.9] Kernel panic - not syncing: VFS: no root\r\n[ 1.9] CPU\n'),
    'ready',
  );
  assert.deepEqual(await within(5000, watch), { panic: 'Kernel panic - not syncing: VFS: no root' });
  await watch.close();
});

test('last words are one readable line, without control characters and escape sequences', async () => {
  const log = newLog('first\r\n\x1b[0;32mOK\x1b[0m second\r\n\x07\x1b[6n\n\nthird\r\n');
  assert.equal(await lastWords(log, 2), 'OK second / third');
  assert.equal(await lastWords(log, 9), 'first / OK second / third');
  assert.equal(await lastWords(path.join(temporary, 'none'), 3), '');
});

test('a console that talks without end takes a bounded space, and its last mebibyte is whole', () => {
  const file = newLog();
  const log = new ConsoleLog(file);
  const line = `${'x'.repeat(1023)}\n`;
  let text = '';
  for (let round = 0; round < 6; round++) {
    const part = line.repeat(1024);
    appendFileSync(file, part);
    text += part;
    log.look();
    // Without punchHole in ConsoleLog.look this grows to 6 MiB.
    assert.ok(statSync(file).blocks * 512 <= 2 * LOG_KEPT_BYTES + 64 * 1024);
  }
  log.close();
  const kept = readFileSync(file);
  assert.equal(kept.length, text.length);
  assert.equal(kept.subarray(-LOG_KEPT_BYTES).toString(), text.slice(-LOG_KEPT_BYTES));
});
