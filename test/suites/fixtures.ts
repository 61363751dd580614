/**
 * A small real store for tests: a random sparse image with known bytes, imported by the real import. The same
 * seed gives the same image. It has holes, written zeros, text-like, incompressible and repeated stretches.
 */
import { closeSync, ftruncateSync, mkdirSync, openSync, readSync, writeSync } from 'node:fs';
import path from 'node:path';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { parseManifest } from '../../src/core/manifest.ts';
import type { Manifest, ManifestKind } from '../../src/core/manifest.ts';
import { importImage, initStore, openStore } from '../../src/store/index.ts';
import type { ImportPart } from '../../src/store/index.ts';

export interface FixtureOptions {
  readonly sizeBytes: number;
  readonly seed: number;
  readonly chunkBytes?: number;
  /** Default `test:1`. */
  readonly reference?: string;
  /** Default disk; data where the size is no whole number of sectors. */
  readonly kind?: ManifestKind;
  readonly parts?: readonly ImportPart[];
  readonly labels?: Record<string, string>;
}

export interface FixtureStore {
  /** The store's folder: `openStore(storeFolder)`. */
  readonly storeFolder: string;
  /** The image as a raw file. */
  readonly rawPath: string;
  readonly reference: string;
  readonly digest: string;
  readonly manifest: Manifest;
  readonly table: ChunkTable;
}

/** Small, fast, seeded: xorshift32. */
export function randomNumbers(seed: number): () => number {
  let state = (seed * 2654435761) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state;
  };
}

/** `length` bytes that do not compress. */
export function randomBuffer(next: () => number, length: number): Buffer {
  const words = new Uint32Array(Math.ceil(length / 4));
  for (let i = 0; i < words.length; i++) words[i] = next();
  return Buffer.from(words.buffer, 0, length);
}

const WORDS = [
  'kernel ',
  'module ',
  'lib/x86_64 ',
  'GRID ',
  '\n',
  'image=',
  '0x00ff ',
  'the quick brown fox ',
];

function textBuffer(next: () => number, length: number): Buffer {
  const parts: string[] = [];
  for (let at = 0; at < length;) {
    const word = WORDS[next() % WORDS.length]!;
    parts.push(word);
    at += word.length;
  }
  return Buffer.from(parts.join('')).subarray(0, length);
}

/** Writes a sparse file of exactly `sizeBytes`. About a third of it is hole or zeros. */
export function writeRandomImage(
  file: string,
  sizeBytes: number,
  seed: number,
  chunkBytes = 256 * 1024,
): void {
  const next = randomNumbers(seed);
  const fd = openSync(file, 'wx+');
  try {
    ftruncateSync(fd, sizeBytes);
    for (let at = 0; at < sizeBytes;) {
      const length = Math.min(sizeBytes - at, Math.floor(chunkBytes * (0.3 + (next() % 1000) / 400)));
      const kind = next() % 8;
      if (kind === 0) writeSync(fd, Buffer.alloc(length), 0, length, at);
      else if (kind <= 2) writeSync(fd, randomBuffer(next, length), 0, length, at);
      else if (kind <= 4) writeSync(fd, textBuffer(next, length), 0, length, at);
      else if (kind === 5 && at >= chunkBytes) {
        // A whole earlier chunk again, where a chunk begins: the same digest twice in one table.
        const from = (next() % Math.floor(at / chunkBytes)) * chunkBytes;
        const to = Math.ceil(at / chunkBytes) * chunkBytes;
        const again = Buffer.alloc(Math.min(chunkBytes, Math.max(0, sizeBytes - to)));
        readSync(fd, again, 0, again.length, from);
        writeSync(fd, again, 0, again.length, to);
        at = to + again.length;
        continue;
      }
      at += length;
    }
  } finally {
    closeSync(fd);
  }
}

/** Makes `folder`/image.raw and `folder`/store (folder is made where there is none) and imports the one into the other. */
export async function makeFixtureStore(folder: string, options: FixtureOptions): Promise<FixtureStore> {
  const { sizeBytes, seed, chunkBytes = 256 * 1024, reference = 'test:1', parts, labels } = options;
  const kind = options.kind ?? (sizeBytes % 512 === 0 ? 'disk' : 'data');
  mkdirSync(folder, { recursive: true });
  const rawPath = path.join(folder, 'image.raw');
  const storeFolder = path.join(folder, 'store');
  writeRandomImage(rawPath, sizeBytes, seed, chunkBytes);
  await initStore(storeFolder);
  const store = await openStore(storeFolder);
  try {
    const { digest } = await importImage(store, {
      path: rawPath,
      reference,
      kind,
      format: 'raw',
      chunkBytes,
      ...(parts ? { parts } : {}),
      ...(labels ? { labels } : {}),
    });
    const manifest = parseManifest(await store.readManifest(digest), digest);
    const table = ChunkTable.parse(await store.readTable(manifest.table), manifest.table);
    return { storeFolder, rawPath, reference, digest, manifest, table };
  } finally {
    await store.close();
  }
}
