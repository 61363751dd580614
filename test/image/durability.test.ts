/**
 * Random steps on a clone against the model of a disk (disk-model.ts), kills and power losses among them.
 * A few thousand steps here; over 100,000 with GRIDVFS_LONG=1 (`npm run test:long`). A failure prints its seed.
 *
 * Guarded lines, each tried by taking it out (the test then fails, in the bounded run too):
 *  - direct-io.ts #commit: the call of #writeMap (kill loses acknowledged first writes);
 *  - direct-io.ts write: `partial ||` (the rest of a block shows what a power loss or trim left below it);
 *  - direct-io.ts #commit: markDirty (power loss loses flushed first writes);
 *  - layer.ts #flushOnce: takeDirtyRuns moved behind the fdatasync of the data (foreign bytes after power loss);
 *  - layer.ts #flushOnce: the writes to the durable map; #trimStep: pwriteExact to the map, and markDirty;
 *  - layer-files.ts openLayer: the boot id's comparison (the noise in the working map is believed), dirtyPages.fill
 *    after a kill (the next flush forgets what was written before it); restoreMap;
 *  - direct-io.ts mapByteOf: `>= BLOCK_FROZEN` (the durable map names data that only a frozen layer has);
 *  - chain.ts mergeBelow: the order of the layers, `states[first + i] !== BLOCK_ABSENT`.
 */
import { test } from 'node:test';
import fc from 'fast-check';
import { DISK_BYTES, ModelledDisk } from './disk-model.ts';
import type { Step } from './disk-model.ts';

const range = fc
  .tuple(
    fc.nat(DISK_BYTES - 1),
    fc.oneof(fc.integer({ min: 1, max: 5000 }), fc.integer({ min: 1, max: DISK_BYTES }), fc.constant(4096)),
    fc.boolean(),
    fc.boolean(),
  )
  .map(([at, wanted, aligned, toEnd]) => {
    const offset = aligned ? at - (at % 4096) : at;
    const length = Math.min(wanted, DISK_BYTES - offset);
    return { offset, length: toEnd && wanted % 7 === 0 ? DISK_BYTES - offset : length };
  });

const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 10, arbitrary: range.map((r): Step => ({ kind: 'write', ...r })) },
  { weight: 4, arbitrary: range.map((r): Step => ({ kind: 'trim', ...r })) },
  { weight: 4, arbitrary: range.map((r): Step => ({ kind: 'read', ...r })) },
  { weight: 3, arbitrary: fc.constant<Step>({ kind: 'flush' }) },
  {
    weight: 2,
    arbitrary: fc
      .tuple(range, fc.boolean())
      .map(([r, lose]): Step => ({ kind: 'flush-while-writing', ...r, lose })),
  },
  { weight: 2, arbitrary: fc.constant<Step>({ kind: 'kill' }) },
  { weight: 1, arbitrary: fc.constant<Step>({ kind: 'freeze' }) },
  { weight: 2, arbitrary: fc.nat().map((seed): Step => ({ kind: 'power-loss', seed })) },
);

const long = process.env['GRIDVFS_LONG'] === '1';
const STEPS = 60;
const RUNS = long ? 2000 : 100;

test(`kill keeps every acknowledged write and power loss every flushed one, over ${RUNS} runs of up to ${STEPS} steps`, async (t) => {
  const seed = Number(process.env['GRIDVFS_SEED'] ?? Math.floor(Math.random() * 2 ** 31));
  t.diagnostic(`seed ${seed} (GRIDVFS_SEED)`);
  let taken = 0;
  await fc.assert(
    fc.asyncProperty(
      fc.array(step, { minLength: STEPS - 5, maxLength: STEPS, size: 'max' }),
      async (steps) => {
        const disk = await ModelledDisk.create();
        try {
          for (const one of steps) {
            await disk.run(one);
            taken++;
          }
        } finally {
          await disk.dispose();
        }
      },
    ),
    { numRuns: RUNS, seed, endOnFailure: !long },
  );
  t.diagnostic(`${taken} steps`);
});
