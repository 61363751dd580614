/**
 * What somebody who opens an image asks for first, in one answer instead of three one after the other: its
 * manifest, those of its parts, the chunk tables of small ones, and the content of those that are tiny (a
 * checkpoint's device state). On a long link a start waits for each of these; what is large (the table of a disk, of a
 * memory) would only stand in the way of it.
 *
 *   GET /v1/openings/<ab>/<manifest>  objects, one after the other, the manifest first (little-endian):
 *     0   1  kind: 0 manifest, 1 chunk table, 2 chunk
 *     1   1  encoding: 0 plain, 1 zstd
 *     2   2  0
 *     4   4  length
 *     8  32  digest, of a chunk's and a table's plain bytes
 *     40  …  bytes
 *
 * A hint, not a promise: what is not in it is asked for by itself, and whoever gets an object of it checks the digest as
 * if it had come alone. A server that has openings says so in its hello.
 */
import type { FastifyInstance } from 'fastify';
import { LRUCache } from 'lru-cache';
import type { Digest } from '../src/core/bytes.ts';
import { compress } from '../src/core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { ChunkTable } from '../src/core/chunk-table.ts';
import { GridError } from '../src/core/errors.ts';
import { KIB, MANIFEST_BYTES_MAX, MIB, TABLE_BYTES_MAX } from '../src/core/limits.ts';
import { chunkCountOf, chunkLengthOf, parseManifest } from '../src/core/manifest.ts';
import type { Manifest } from '../src/core/manifest.ts';
import type { ChunkSource } from '../src/core/source.ts';
import { checkedObject, objectPath } from './protocol.ts';
import type { Wanted } from './work.ts';

/** 36 bytes each: a few packets. A kernel and its initial RAM disk have some hundred. */
const TABLE_CHUNKS_MAX = 512;
/** Of the content of a part that goes along: a device state has a few KiB as it is stored. */
const CONTENT_BYTES_MAX = 1 * MIB;
const CONTENT_STORED_BYTES_MAX = 64 * KIB;
/** Of an answer. What does not fit is left out. */
const OPENING_BYTES_MAX = 512 * KIB;
/** How long what came along is kept for whoever asks next. */
const KEPT_MS = 30_000;
const KEPT_BYTES_MAX = 4 * MIB;

const KINDS = ['manifests', 'tables', 'chunks'] as const;
type Kind = (typeof KINDS)[number];

const HEADER_BYTES = 40;

interface OpeningObject {
  readonly kind: Kind;
  readonly digest: Digest;
  readonly encoding: StoredChunk['encoding'];
  readonly bytes: Uint8Array;
}

function openingPath(manifest: Digest): string {
  return `/v1/openings/${manifest.slice(0, 2)}/${manifest}`;
}

export function encodeOpening(objects: readonly OpeningObject[]): Buffer {
  return Buffer.concat(
    objects.flatMap(({ kind, digest, encoding, bytes }) => {
      const header = Buffer.alloc(HEADER_BYTES);
      header[0] = KINDS.indexOf(kind);
      header[1] = encoding === 'zstd' ? 1 : 0;
      header.writeUInt32LE(bytes.length, 4);
      header.write(digest, 8, 32, 'hex');
      return [header, bytes];
    }),
  );
}

/** Throws bad-format: nothing of it is used then. */
export function parseOpening(bytes: Buffer, what: string): OpeningObject[] {
  const objects: OpeningObject[] = [];
  for (let at = 0; at < bytes.length;) {
    const kind = KINDS[bytes[at]!];
    const start = at + HEADER_BYTES;
    const end = start <= bytes.length ? start + bytes.readUInt32LE(at + 4) : Infinity;
    if (kind === undefined || end > bytes.length)
      throw new GridError('bad-format', `${what} is no opening of an image`);
    objects.push({
      kind,
      encoding: bytes[at + 1] === 1 ? 'zstd' : 'plain',
      digest: bytes.toString('hex', at + 8, at + 40),
      bytes: bytes.subarray(start, end),
    });
    at = end;
  }
  return objects;
}

export function openingRoutes(app: FastifyInstance, source: ChunkSource): void {
  app.get<{ Params: { ab: string; digest: string } }>(
    '/v1/openings/:ab/:digest',
    async ({ params }, reply) => {
      const opening = encodeOpening(await openingOf(source, checkedObject(params)));
      return reply.type('application/octet-stream').send(opening);
    },
  );
}

/** Throws what reading the manifest throws; a part that cannot be read is left out. */
async function openingOf(source: ChunkSource, digest: Digest): Promise<OpeningObject[]> {
  const own = await manifestOf(source, digest);
  const withoutFailure = (objects: Promise<OpeningObject[]>) => objects.catch((): OpeningObject[] => []);
  const partOf = async (part: Digest): Promise<OpeningObject[]> => {
    const { object, manifest } = await manifestOf(source, part);
    return [object, ...(await withoutFailure(tableOf(source, manifest)))];
  };
  const parts = Object.values(own.manifest.parts).map(partOf);
  const groups = await Promise.all([tableOf(source, own.manifest), ...parts].map(withoutFailure));
  let left = OPENING_BYTES_MAX - HEADER_BYTES - own.object.bytes.length;
  const fitting = groups.flat().filter(({ bytes }) => {
    const size = HEADER_BYTES + bytes.length;
    const fits = size <= left;
    if (fits) left -= size;
    return fits;
  });
  return [own.object, ...fitting];
}

async function manifestOf(
  source: ChunkSource,
  digest: Digest,
): Promise<{ object: OpeningObject; manifest: Manifest }> {
  const bytes = await source.readManifest(digest);
  return {
    object: { kind: 'manifests', digest, encoding: 'plain', bytes },
    manifest: parseManifest(bytes, digest),
  };
}

/** With the content, where that is tiny. */
async function tableOf(source: ChunkSource, manifest: Manifest): Promise<OpeningObject[]> {
  if (chunkCountOf(manifest) > TABLE_CHUNKS_MAX) return [];
  const plain = await source.readTable(manifest.table);
  const table: OpeningObject = {
    kind: 'tables',
    digest: manifest.table,
    encoding: 'zstd',
    bytes: compress(plain),
  };
  if (manifest.sizeBytes > CONTENT_BYTES_MAX) return [table];
  const parsed = ChunkTable.parse(plain, manifest.table);
  if (parsed.patchCount > 0) return [table];
  const entries = [...parsed.entries()];
  const storedBytes = entries.reduce((sum, entry) => sum + entry.storedBytes, 0);
  if (entries.length === 0 || storedBytes > CONTENT_STORED_BYTES_MAX) return [table];
  const refs = entries.map((entry): ChunkRef => {
    const { digest, storedBytes: stored } = entry;
    return { digest, plainBytes: chunkLengthOf(manifest, entry.index), storedBytes: stored };
  });
  const chunks: OpeningObject[] = [];
  await source.readChunks(refs, { priority: 'demand' }, (index, { encoding, bytes }) => {
    chunks.push({ kind: 'chunks', digest: refs[index]!.digest, encoding, bytes });
  });
  return [table, ...chunks];
}

type FetchObject = (wanted: Wanted) => Promise<Buffer>;

/** The asker's side: what came along with manifests, until it is asked for. */
export class Openings {
  /** The far side has them. */
  known = false;
  readonly #kept = new LRUCache<string, OpeningObject>({
    maxSize: KEPT_BYTES_MAX,
    sizeCalculation: ({ bytes }) => HEADER_BYTES + bytes.length,
    ttl: KEPT_MS,
  });

  /** A manifest's bytes, by `fetch` with what comes along where it does. Throws what `fetch` throws, bad-format. */
  async manifest(digest: Digest, fetch: FetchObject): Promise<Buffer> {
    const alone = { path: objectPath('manifests', digest), bytesMax: MANIFEST_BYTES_MAX };
    const kept = this.#bytesOf('manifests', digest);
    if (kept) return kept;
    if (!this.known) return fetch(alone);
    const path = openingPath(digest);
    let answer: Buffer;
    try {
      answer = await fetch({ path, bytesMax: OPENING_BYTES_MAX + MANIFEST_BYTES_MAX });
    } catch (error) {
      if (!(error instanceof GridError) || error.code !== 'not-found') throw error;
      // No such manifest; or the far side is an older one by now.
      const bytes = await fetch(alone);
      this.known = false;
      return bytes;
    }
    for (const object of parseOpening(answer, `the answer to ${path}`)) {
      this.#kept.set(`${object.kind} ${object.digest}`, object);
    }
    const own = this.#bytesOf('manifests', digest);
    if (own) return own;
    throw new GridError('bad-format', `the answer to ${path} is without the manifest`);
  }

  /** A chunk table as it is stored. Throws what `fetch` throws. */
  async table(digest: Digest, fetch: FetchObject): Promise<Buffer> {
    const path = objectPath('tables', digest);
    return this.#bytesOf('tables', digest) ?? fetch({ path, bytesMax: TABLE_BYTES_MAX });
  }

  #bytesOf(kind: Kind, digest: Digest): Buffer | undefined {
    const bytes = this.#take(kind, digest)?.bytes;
    return bytes && Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  /** Once: who finds it wrong asks the far side. */
  #take(kind: Kind, digest: Digest): OpeningObject | undefined {
    const key = `${kind} ${digest}`;
    const object = this.#kept.get(key);
    this.#kept.delete(key);
    return object;
  }

  /** True when all of them had come along; none is delivered otherwise. */
  deliver(refs: readonly ChunkRef[], deliver: (index: number, chunk: StoredChunk) => void): boolean {
    if (!refs.every(({ digest }) => this.#kept.has(`chunks ${digest}`))) return false;
    const chunks = refs.map(({ digest }) => this.#kept.get(`chunks ${digest}`)!);
    for (const { digest } of refs) this.#kept.delete(`chunks ${digest}`);
    for (const [index, { encoding, bytes }] of chunks.entries()) deliver(index, { encoding, bytes });
    return true;
  }
}
