/**
 * Power loss for real: the layer lies on a file system of its own (a loop device), which the shutdown ioctl stops
 * dead, journal unflushed; it is mounted again and the layer opened under another boot id. Blocks are written while
 * flushes run, too, half of the writes to a few blocks that are written again and again.
 *
 * Every block must hold a version that it had since the last completed flush began, all of it. Where the disk lets
 * pages change while they are written (suites/crashing-disk.ts), one that was written more than once since then may
 * hold parts of several of these versions instead: with the same code and pages that stay still it never does, so it
 * is the page cache that mixes them, not the layer. Nothing else may be there in either case.
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
import type { Pages } from '../suites/crashing-disk.ts';
import { hasCode } from '../suites/image.ts';
import { FileImage, seededRandom } from './file-image.ts';

const BASE = 'e'.repeat(64);
const BLOCK = 4096;
const BLOCKS = 6000;
/** The blocks that half of the writes go to, some of these to all of them at once: 1 MiB, during which the disk gets
 * one page after another as well. */
const HOT_BLOCKS = 256;
const LONG = process.env['GRIDVFS_LONG'] === '1';
const ROUNDS = Number(process.env['GRIDVFS_ROUNDS'] ?? (LONG ? 60 : 3));
const VARIANTS: [type: 'ext4' | 'xfs', pages: Pages][] = [
  ['ext4', 'still'],
  ['ext4', 'moving'],
  ['xfs', 'still'],
  ['xfs', 'moving'],
];

/** The first word of a block that holds what it may; `mixed` when it holds several of its versions. */
function judge(bytes: Buffer, possible: readonly number[], pages: Pages, what: string) {
  const runs: { word: number; at: number }[] = [];
  for (let at = 0; at < BLOCK; at += 4) {
    const word = bytes.readUInt32LE(at);
    if (runs.at(-1)?.word !== word) runs.push({ word, at });
  }
  const held = runs.map(({ word, at }) => `${word} from byte ${at}`).join(', ');
  assert.ok(
    runs.every(({ word }) => possible.includes(word)),
    `${what} is ${held}, not of ${possible.join(', ')}`,
  );
  const mixed = runs.length > 1;
  assert.ok(!mixed || pages === 'moving', `${what} is torn: ${held} of ${possible.join(', ')}`);
  return { word: runs[0]!.word, mixed };
}

for (const [type, pages] of VARIANTS) {
  test(
    `on ${type} over a disk whose pages are ${pages} while they are written, power loss leaves each block old or new and keeps what was flushed`,
    { skip: noCrashingDisk() },
    async (t) => {
      const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-power-'));
      const disk = new CrashingDisk(folder, type, 400 * MIB, pages);
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

      // A version is a word, all over the block: 0xbbbbbbbb in the base, 0 when trimmed, else a stamp.
      const baseContent = Buffer.alloc(BLOCKS * BLOCK, 0xbb);
      let versions: number[][] = Array.from({ length: BLOCKS }, () => [0xbbbbbbbb]);
      let stamp = 0;
      let mixedBlocks = 0;
      for (let round = 0; round < ROUNDS; round++) {
        disk.mount();
        const bootId = String(round).padStart(36, 'r');
        clone = openClone(
          new FileImage(path.join(folder, 'base'), baseContent, undefined, 0),
          await openLayer(layerFolder, { baseDigest: BASE, bootId }),
        );
        const open = clone;
        const put = async (block: number, count: number, value: number) => {
          const word = Buffer.alloc(4);
          word.writeUInt32LE(value);
          if (value === 0) await open.trim(block * BLOCK, count * BLOCK);
          else await open.write(Buffer.alloc(count * BLOCK, word), block * BLOCK);
          for (let i = block; i < block + count; i++) versions[i]!.push(value);
        };
        const all = Buffer.alloc(BLOCKS * BLOCK);
        await open.read(all, 0);
        const mixed: number[] = [];
        versions = versions.map((possible, block) => {
          const bytes = all.subarray(block * BLOCK, (block + 1) * BLOCK);
          const held = judge(bytes, possible, pages, `round ${round}: block ${block}`);
          if (held.mixed) mixed.push(block);
          return [held.word];
        });
        for (const block of mixed) await put(block, 1, ++stamp);
        if (mixed.length > 0) await open.flush();
        for (const block of mixed) versions[block] = [versions[block]!.at(-1)!];
        mixedBlocks += mixed.length;

        const change = async () => {
          const all = random() < 0.1;
          const block = all ? 0 : Math.floor(random() * (random() < 0.5 ? HOT_BLOCKS : BLOCKS));
          const count = all ? HOT_BLOCKS : Math.min(BLOCKS - block, 1 + Math.floor(random() * 8));
          await put(block, count, !all && random() < 0.15 ? 0 : ++stamp);
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
      t.diagnostic(`${ROUNDS} losses, ${stamp} writes, ${mixedBlocks} blocks of several versions`);
    },
  );
}
