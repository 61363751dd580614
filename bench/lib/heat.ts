/** Where in the image a start reads: for each chunk of the disk whether it is zeros, data, or touched early or late. */
import { openStore } from '../../src/store/index.ts';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { parseManifest } from '../../src/core/manifest.ts';
import { parseProfile } from '../../src/core/profile.ts';
import type { Scene } from './scene.ts';

export interface Heat {
  readonly chunkBytes: number;
  /** A letter for each chunk: `.` zeros, `d` data that the start does not touch, `l` touched late, `e` early. */
  readonly chunks: string;
  /** Recordings behind it. */
  readonly runs: number;
}

/** Undefined when no start was recorded. */
export async function heatOf(scene: Scene): Promise<Heat | undefined> {
  const store = await openStore(scene.store);
  try {
    const digest = (await store.listTags())[0]!.manifest;
    const manifest = parseManifest(await store.readManifest(digest), digest);
    const table = ChunkTable.parse(await store.readTable(manifest.table), manifest.table);
    const bytes = await store.readProfile(digest, 'boot');
    if (bytes === undefined) return undefined;
    const profile = parseProfile(bytes, { manifest: digest, purpose: 'boot', chunkCount: table.count });
    const letters: string[] = Array.from({ length: table.count }, (_, index) =>
      table.entryOf(index) < 0 ? '.' : 'd',
    );
    for (const index of profile.late) letters[index] = 'l';
    for (const index of profile.early) letters[index] = 'e';
    return { chunkBytes: table.chunkBytes, chunks: letters.join(''), runs: profile.runs };
  } finally {
    await store.close();
  }
}
