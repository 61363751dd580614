/** What the tests of the store share: folders that go away, reading an image back, what lies in a store. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after } from 'node:test';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import type { ChunkRef } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ErrorCode } from '../../src/core/errors.ts';
import { BATCH_CHUNKS_MAX } from '../../src/core/limits.ts';
import { chunkLengthOf, parseManifest } from '../../src/core/manifest.ts';
import { applyPatch, packRefOf } from '../../src/core/patch.ts';
import { initStore, openStore } from '../../src/store/index.ts';
import type { Store } from '../../src/store/index.ts';

/** A folder for this test file, removed after its last test. */
export function testFolder(name: string): string {
  const folder = mkdtempSync(path.join(os.tmpdir(), `gridvfs-store-${name}-`));
  after(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** An empty store in a new folder below `folder`. */
export async function newStore(folder: string): Promise<Store> {
  const place = mkdtempSync(path.join(folder, 'store-'));
  await initStore(place);
  return openStore(place);
}

/** The whole image that a manifest describes, through the store's public face. */
export async function readBack(store: Store, digest: string): Promise<Buffer> {
  const manifest = parseManifest(await store.readManifest(digest), digest);
  const table = ChunkTable.parse(await store.readTable(manifest.table), manifest.table);
  const image = Buffer.alloc(manifest.sizeBytes);
  const refs = new Map<string, ChunkRef>();
  for (const { index, digest, storedBytes, patch } of table.entries()) {
    const plainBytes = chunkLengthOf(manifest, index);
    if (!patch) refs.set(digest, { digest, plainBytes, storedBytes });
    else {
      refs.set(patch.base.digest, { ...patch.base, plainBytes });
      if (patch.pack) refs.set(patch.pack.digest, packRefOf(patch.pack));
    }
  }
  const objects = new Map<string, Buffer>();
  const wanted = [...refs.values()];
  for (let at = 0; at < wanted.length; at += BATCH_CHUNKS_MAX) {
    const batch = wanted.slice(at, at + BATCH_CHUNKS_MAX);
    await store.readChunks(batch, { priority: 'demand' }, (i, chunk) => {
      assert.equal(chunk.bytes.length, batch[i]!.storedBytes, 'the table has the stored length');
      objects.set(batch[i]!.digest, decodeChunk(chunk, batch[i]!));
    });
  }
  for (const { index, digest, patch } of table.entries()) {
    const plain = Buffer.from(objects.get(patch?.base.digest ?? digest)!);
    if (patch) applyPatch(plain, patch, patch.pack && objects.get(patch.pack.digest));
    plain.copy(image, index * manifest.chunkBytes);
  }
  return image;
}

/** Rejects unless `promise` fails with this code; gives the error for a look at its sentence. */
export async function failsWith(promise: Promise<unknown>, code: ErrorCode): Promise<GridError> {
  const outcome: unknown = await promise.then(
    () => 'it succeeded',
    (error: unknown) => error,
  );
  assert.ok(outcome instanceof GridError, `expected a GridError '${code}', got ${String(outcome)}`);
  assert.equal(outcome.code, code, outcome.message);
  assert.ok(!outcome.message.includes('\n'), `one line: ${outcome.message}`);
  return outcome;
}

/** Every file of a store, by path below its folder, with its content. */
export function filesOf(folder: string): Map<string, string> {
  return new Map(
    readdirSync(folder, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry): [string, string] => {
        const file = path.join(entry.parentPath, entry.name);
        return [path.relative(folder, file), readFileSync(file, 'latin1')];
      })
      .toSorted(([a], [b]) => (a < b ? -1 : 1)),
  );
}

/** Nothing half-made: no temporary file, and every object whole. */
export function assertNothingTemporary(store: Store): void {
  assert.deepEqual(readdirSync(store.layout.tmp), []);
}

export function run(command: string, ...args: string[]): void {
  execFileSync(command, args, { stdio: ['ignore', 'ignore', 'pipe'] });
}
