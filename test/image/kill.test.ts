/**
 * kill -9 of a process that writes, with what it acknowledged recorded outside of it (a pipe). Every acknowledged
 * write is there afterwards; the one that was under way may be there in part.
 *
 * Guarded lines, each tried by taking it out: direct-io.ts #commit, #writeMap (first writes are gone); layer.ts
 * #trimStep, the write of the map (trimmed blocks are back); layer-files.ts openLayer, `mapHeader.bootId ===`
 * turned to false (all is as of the last flush).
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { createLayer, openClone, openLayer } from '../../src/image/index.ts';
import { FileImage } from './file-image.ts';
import { BASE, baseContent, SIZE_BYTES } from './kill-record.ts';
import type { RecordLine } from './kill-record.ts';

const KILLS = process.env['GRIDVFS_LONG'] === '1' ? 200 : 8;

test(`${KILLS} kills lose no acknowledged write`, async (t) => {
  const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-kill-'));
  t.after(() => rmSync(folder, { recursive: true }));
  const layerFolder = path.join(folder, 'layer');
  const baseFile = path.join(folder, 'base');
  await createLayer(layerFolder, { baseDigest: BASE, sizeBytes: SIZE_BYTES });
  const content = Buffer.alloc(SIZE_BYTES);
  baseContent().copy(content);
  const firstSeed = Math.floor(Math.random() * 2000);
  t.diagnostic(`first seed ${firstSeed}`);
  let inFlight = 0;
  let operations = 0;

  for (let kill = 0; kill < KILLS; kill++) {
    const child = spawn(
      process.execPath,
      [path.join(import.meta.dirname, 'kill-child.ts'), layerFolder, baseFile, String(firstSeed + kill)],
      { stdio: ['ignore', 'pipe', 'inherit'] },
    );
    let text = '';
    child.stdout.setEncoding('utf8');
    child.stdout.on('data', (part: string) => (text += part));
    const closed = once(child, 'close');
    await Promise.race([once(child.stdout, 'data'), closed]);
    await sleep(20 + Math.random() * 150);
    child.kill('SIGKILL');
    await closed;
    assert.equal(child.signalCode, 'SIGKILL', 'it worked until it was killed');

    let pending: { offset: number; length: number; bytes: Buffer } | undefined;
    // The last line may be cut off: what it would have said did not begin, or is not known as acknowledged.
    for (const line of text.split('\n').slice(0, -1)) {
      const record = JSON.parse(line) as RecordLine;
      if ('begin' in record) {
        const { offset, length, stamp } = record.begin;
        const word = Buffer.alloc(4);
        word.writeUInt32LE(stamp);
        pending = { offset, length, bytes: Buffer.alloc(length, word) };
      } else if ('done' in record) {
        pending!.bytes.copy(content, pending!.offset);
        pending = undefined;
        operations++;
      }
    }
    if (pending) inFlight++;

    const clone = openClone(
      new FileImage(baseFile, baseContent(), undefined, 0),
      await openLayer(layerFolder, { baseDigest: BASE }),
    );
    const now = Buffer.alloc(SIZE_BYTES);
    await clone.read(now, 0);
    await clone.close();
    for (let at = 0; at < SIZE_BYTES; at += 4) {
      if (now.readUInt32LE(at) === content.readUInt32LE(at)) continue;
      const byPending =
        pending &&
        at >= pending.offset &&
        at < pending.offset + pending.length &&
        now.readUInt32LE(at) === pending.bytes.readUInt32LE(0);
      assert.ok(
        byPending,
        `kill ${kill}: offset ${at} is ${now.readUInt32LE(at)}, not ${content.readUInt32LE(at)}`,
      );
    }
    now.copy(content);
  }
  t.diagnostic(`${operations} acknowledged operations, ${inFlight} of ${KILLS} kills met one under way`);
  assert.ok(inFlight > 0, 'no kill met an operation under way');
});
