/**
 * Power loss for real: the layer lies on a file system of its own (a loop device), which the shutdown ioctl stops
 * dead, journal unflushed; it is mounted again and the layer opened under another boot id. Every block must hold a
 * version that it had since the last completed flush began. Blocks are written while flushes run, too.
 *
 * Guarded lines, each tried by taking it out (the test then fails on ext4 and XFS): layer.ts #flushOnce, fdatasync
 * of the data (flushed blocks are gone); fdatasync of the durable map (the same); takeDirtyRuns moved behind the
 * first of them (blocks written meanwhile show what the disk held).
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { createLayer, openClone, openLayer } from '../../src/image/index.ts';
import type { Clone } from '../../src/image/index.ts';
import { MIB } from '../../src/core/limits.ts';
import { CrashingDisk, noCrashingDisk } from '../suites/crashing-disk.ts';
import { hasCode } from '../suites/image.ts';
import { FileImage, seededRandom } from './file-image.ts';

const BASE = 'e'.repeat(64);
const BLOCK = 4096;
const BLOCKS = 6000;
const ROUNDS = process.env['GRIDVFS_LONG'] === '1' ? 60 : 4;
for (const type of ['ext4', 'xfs'] as const) {
  test(
    `on ${type}, power loss leaves each block old or new and keeps what was flushed`,
    { skip: noCrashingDisk() },
    async (t) => {
      const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-power-'));
      const disk = new CrashingDisk(folder, type, 400 * MIB);
      let clone: Clone | undefined;
      t.after(async () => {
        await clone?.close();
        await disk.dispose();
        rmSync(folder, { recursive: true });
      });
      const seed = Number(process.env['GRIDVFS_SEED'] ?? Math.floor(Math.random() * 2 ** 31));
      t.diagnostic(`seed ${seed} (GRIDVFS_SEED)`);
      const random = seededRandom(seed);

      disk.mount();
      const layerFolder = path.join(disk.mountpoint, 'layer');
      await createLayer(layerFolder, { baseDigest: BASE, sizeBytes: BLOCKS * BLOCK });
      disk.losePower();
      await disk.unmount();

      // A version is the first word of a block: 0xbbbbbbbb in the base, 0 when trimmed, else a stamp.
      const baseContent = Buffer.alloc(BLOCKS * BLOCK, 0xbb);
      let versions: number[][] = Array.from({ length: BLOCKS }, () => [0xbbbbbbbb]);
      let stamp = 0;
      for (let round = 0; round < ROUNDS; round++) {
        disk.mount();
        const bootId = String(round).padStart(36, 'r');
        clone = openClone(
          new FileImage(path.join(folder, 'base'), baseContent, undefined, 0),
          await openLayer(layerFolder, { baseDigest: BASE, bootId }),
        );
        const open = clone;
        const all = Buffer.alloc(BLOCKS * BLOCK);
        await open.read(all, 0);
        versions = versions.map((possible, block) => {
          const now = all.readUInt32LE(block * BLOCK);
          assert.ok(
            possible.includes(now),
            `round ${round}: block ${block} is ${now}, not of ${possible.join(', ')}`,
          );
          const bytes = all.subarray(block * BLOCK, (block + 1) * BLOCK);
          const words = new Set(Array.from({ length: BLOCK / 4 }, (_, i) => bytes.readUInt32LE(i * 4)));
          assert.equal(
            words.size,
            1,
            `round ${round}: block ${block} is torn: ${[...words].join(', ')} of ${possible.join(', ')}`,
          );
          return [now];
        });

        const change = async () => {
          const block = Math.floor(random() * BLOCKS);
          const count = Math.min(BLOCKS - block, 1 + Math.floor(random() * 8));
          const word = Buffer.alloc(4);
          const value = random() < 0.15 ? 0 : ++stamp;
          word.writeUInt32LE(value);
          if (value === 0) await open.trim(block * BLOCK, count * BLOCK);
          else await open.write(Buffer.alloc(count * BLOCK, word), block * BLOCK);
          for (let i = block; i < block + count; i++) versions[i]!.push(value);
        };
        const flushWhileWriting = async () => {
          versions = versions.map((possible) => [possible.at(-1)!]);
          const flush = { running: true };
          const flushed = open.flush().finally(() => (flush.running = false));
          while (flush.running) {
            for (let i = 0; i < 5; i++) await change();
            await new Promise(setImmediate);
          }
          await flushed;
        };
        for (let i = 0; i < 50; i++) await change();
        await flushWhileWriting();
        for (let i = 0; i < 50; i++) await change();
        await flushWhileWriting();
        disk.losePower();
        // Once a sync has failed, none of this open claims success again.
        for (let i = 0; i < 2; i++) await assert.rejects(() => open.flush(), hasCode('local-io'));
        await open.close();
        clone = undefined;
        await disk.unmount();
      }
      t.diagnostic(`${ROUNDS} losses, ${stamp} writes`);
    },
  );
}
