/** What the benches of clones share: a store with a cache and clones over it in this process, rows, seeded numbers. */
import { closeSync, fsyncSync, ftruncateSync, openSync } from 'node:fs';
import path from 'node:path';
import { openCache } from '../../cache/index.ts';
import { Clones } from '../../src/agent/clones.ts';
import { cloneParts } from '../../src/cli/clone-parts.ts';
import { table } from '../../src/cli/kit.ts';
import { importImage, initStore, openStore } from '../../src/store/index.ts';
import { hostFacts } from './facts.ts';
import { headOf, printPromises, writeRecord } from './record.ts';
import type { Promised } from './record.ts';

export interface Row {
  readonly case: 'mounted' | 'chain' | 'create' | 'many' | 'commit';
  readonly subject: string;
  readonly value: number;
  readonly unit: string;
  /** To the case's first row, or to what the subject names. */
  readonly ratio?: number;
  readonly runs?: readonly number[];
}

export const say = (text: string) => process.stderr.write(`${text}\n`);

/** Seeded: xorshift32, in [0, 1). */
export function randomOf(seed: number): () => number {
  let state = (seed * 2654435761) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state / 2 ** 32;
  };
}

/** A store with one image of `sizeBytes`, a cache over it and clones over that, as a proxy has them. */
export async function cloneWorld(
  folder: string,
  fill: (fd: number) => void,
  sizeBytes: number,
  finish: (raw: string) => Promise<void> = () => Promise.resolve(),
) {
  const raw = path.join(folder, 'image.raw');
  const fd = openSync(raw, 'w');
  ftruncateSync(fd, sizeBytes);
  fill(fd);
  closeSync(fd);
  await finish(raw);
  const whole = openSync(raw, 'r');
  fsyncSync(whole); // otherwise the import waits for these writes, too
  closeSync(whole);
  const storeFolder = path.join(folder, 'store');
  await initStore(storeFolder);
  const store = await openStore(storeFolder);
  const startMs = performance.now();
  const { digest } = await importImage(store, { path: raw, reference: 'base:1', format: 'raw' });
  const importMs = performance.now() - startMs;
  const cache = await openCache({ folder: path.join(folder, 'cache'), source: store });
  const clones = await Clones.load(path.join(folder, 'state'), cloneParts(cache), say);
  return {
    storeFolder,
    sizeBytes,
    store,
    cache,
    clones,
    digest,
    importMs,
    close: async () => {
      await clones.close();
      await cache.close();
      await store.close();
    },
  };
}

/** As a table with what was promised, and as a record where `file` is given. */
export async function printRows(
  bench: 'clone' | 'clone-commit',
  rows: readonly Row[],
  file: string | undefined,
  promises: readonly Promised[] = [],
): Promise<void> {
  process.stdout.write(
    table(
      ['CASE', 'SUBJECT', 'VALUE', 'UNIT', 'RATIO'],
      rows.map((row) => [
        row.case,
        row.subject,
        row.value.toFixed(row.value < 100 ? 2 : 0),
        row.unit,
        row.ratio === undefined ? '-' : row.ratio.toFixed(3),
      ]),
    ) + '\n',
  );
  printPromises(promises);
  if (file === undefined) return;
  await writeRecord(file, { ...headOf(bench), host: hostFacts('none'), rows, promises });
}
