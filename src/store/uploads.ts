/**
 * New images that come in pieces from outside, over a tunnel or from a clone of this host: every chunk is decoded and
 * hashed before it gets its name, and an image gets its own only when all that it reaches is there. Nothing is kept
 * between two calls, so any number of processes may take the pieces of one upload.
 *
 * What came and belongs to no image yet is garbage that is young: a collection leaves it alone for its grace time
 * (gc.ts). Should it not, the image is refused with not-found, and whoever sends it sends what is missing again.
 */
import { removeCheckpoint } from './checkpoints.ts';
import { stat } from 'node:fs/promises';
import { isDigest, sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { ChunkTable } from '../core/chunk-table.ts';
import { decodeChunk, decompress } from '../core/chunk.ts';
import { errnoOf, GridError } from '../core/errors.ts';
import { STORED_OVERHEAD_BYTES_MAX } from '../core/limits.ts';
import { chunkCountOf, isName, parseManifest, parseReference } from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import { UPLOAD_QUESTION_MAX, UPLOAD_TABLE_BYTES_MAX } from '../core/uploads.ts';
import type { NewChunk, NewImage, UploadTarget } from '../core/uploads.ts';
import { isOneFrame } from './jobs.ts';
import type { Store } from './store.ts';
import { Writer } from './writer.ts';

/** Files looked for at once: what libuv's pool has threads for, and some. */
const STATS_MAX = 16;
/** An image whose chunks a collection takes away again and again while it is published. */
const PUBLISH_ATTEMPTS_MAX = 3;

export function storeUploads(store: Store): UploadTarget {
  return {
    findChunks: (digests) => findChunks(store, digests),
    putChunks: (chunks) => putChunks(store, chunks),
    putImage: (image) => putImage(store, image),
    removeCheckpoint: (name, version) => removeCheckpoint(store, name, version),
  };
}

async function findChunks(store: Store, digests: readonly Digest[]): Promise<number[]> {
  if (digests.length > UPLOAD_QUESTION_MAX) {
    throw new GridError(
      'bad-request',
      `${digests.length} chunks in one question, over ${UPLOAD_QUESTION_MAX}`,
    );
  }
  const odd = digests.find((digest) => !isDigest(digest));
  if (odd !== undefined) throw new GridError('bad-request', `'${String(odd).slice(0, 80)}' is not a digest`);
  return storedBytesOf(store, digests);
}

/** Stored bytes of each, 0 where there is none. */
async function storedBytesOf(store: Store, digests: readonly Digest[]): Promise<number[]> {
  const sizes: number[] = Array.from({ length: digests.length }, () => 0);
  let next = 0;
  const look = async () => {
    while (next < digests.length) {
      const at = next++;
      try {
        sizes[at] = (await stat(store.layout.object('chunks', digests[at]!))).size;
      } catch (error) {
        if (errnoOf(error) !== 'ENOENT') throw error;
      }
    }
  };
  await Promise.all(Array.from({ length: STATS_MAX }, look));
  return sizes;
}

async function putChunks(store: Store, chunks: readonly NewChunk[]): Promise<void> {
  for (const chunk of chunks) {
    await new Promise(setImmediate); // half a millisecond each; requests of others in between
    checkChunk(chunk);
  }
  const sizes = await storedBytesOf(
    store,
    chunks.map(({ digest }) => digest),
  );
  const writer = await Writer.begin(store.layout);
  try {
    const fresh = new Set<Digest>();
    for (const [i, { digest, stored, plainBytes }] of chunks.entries()) {
      // A length that no chunk of its size has is damage, which writing it again heals.
      const isThere = sizes[i]! > 0 && sizes[i]! <= plainBytes + STORED_OVERHEAD_BYTES_MAX;
      if (isThere || fresh.has(digest)) continue;
      writer.put('chunks', digest, stored);
      fresh.add(digest);
    }
    await writer.flush([...fresh].map((digest) => ({ kind: 'chunks' as const, digest })));
  } finally {
    writer.end();
  }
}

function checkChunk({ digest, plainBytes, stored }: NewChunk): void {
  decodeChunk({ encoding: 'zstd', bytes: stored }, { digest, plainBytes });
  if (!isOneFrame(Buffer.from(stored.buffer, stored.byteOffset, stored.byteLength))) {
    throw new GridError('corrupt', `chunk ${digest.slice(0, 12)} goes on after its end`);
  }
}

async function putImage(store: Store, image: NewImage): Promise<Tag> {
  const { name, version, expected } = image;
  if (!isName(name) || !isName(version)) parseReference(`${name}:${version}`);
  if (expected !== undefined && expected !== null && !isDigest(expected)) {
    throw new GridError('bad-request', `'${String(expected).slice(0, 80)}' is not a digest`);
  }
  const digest = sha256(image.manifest);
  const manifest = parseManifest(image.manifest, digest);
  if (image.table.length > UPLOAD_TABLE_BYTES_MAX) {
    throw new GridError('bad-request', `a chunk table of ${image.table.length} bytes is too large to upload`);
  }
  const plain = decompress(image.table, UPLOAD_TABLE_BYTES_MAX, `the chunk table of ${name}:${version}`);
  const table = ChunkTable.parse(plain, manifest.table);
  if (table.chunkBytes !== manifest.chunkBytes || table.count !== chunkCountOf(manifest)) {
    throw new GridError('bad-format', `the manifest of ${name}:${version} and its chunk table disagree`);
  }
  for (const part of Object.values(manifest.parts)) parseManifest(await store.readManifest(part), part);
  const used = new Map<Digest, number>();
  for (const object of table.objects()) used.set(object.digest, object.storedBytes);

  const writer = await Writer.begin(store.layout);
  try {
    writer.put('tables', manifest.table, image.table);
    writer.put('manifests', digest, image.manifest);
    await publish(store, writer, used, { digest, manifest, what: `${name}:${version}` });
    await writer.sync();
    return await store.setTag(name, version, digest, expected);
  } finally {
    writer.end();
  }
}

/** Gives table and manifest their names when every chunk in `used` is there with its length. */
async function publish(
  store: Store,
  writer: Writer,
  used: ReadonlyMap<Digest, number>,
  { digest, manifest, what }: { digest: Digest; manifest: Manifest; what: string },
): Promise<void> {
  const described = [
    { kind: 'tables' as const, digest: manifest.table },
    { kind: 'manifests' as const, digest },
  ];
  const digests = [...used.keys()];
  for (let attempt = 0; attempt < PUBLISH_ATTEMPTS_MAX; attempt++) {
    const sizes = await storedBytesOf(store, digests);
    for (const [i, one] of digests.entries()) {
      if (sizes[i] === 0) {
        throw new GridError('not-found', `the store ${store.name} has no chunk ${one}, which ${what} needs`);
      }
      if (sizes[i] !== used.get(one)) {
        throw new GridError('bad-request', `the chunk table of ${what} has a wrong length for chunk ${one}`);
      }
    }
    if (await writer.publish([], described, digests)) return;
  }
  throw new GridError('not-found', `chunks of ${what} were collected as garbage; upload them again`);
}
