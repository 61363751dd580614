/**
 * A version of any kind, made of what is in hand, in a store that is reached through a source: chunks that may differ
 * from the parent's (all that there are, without a parent) are read, and sent where the store lacks them; then the
 * manifest with the parts that it names; its tag moves last.
 */
import type { Digest } from '../core/bytes.ts';
import { ChunkTable, encodeChunkTable } from '../core/chunk-table.ts';
import { compress } from '../core/chunk.ts';
import { GridError } from '../core/errors.ts';
import {
  chunkCountOf,
  chunkLengthOf,
  encodeManifest,
  parseManifest,
  parseReference,
} from '../core/manifest.ts';
import type { Manifest, ManifestKind } from '../core/manifest.ts';
import type { ChunkSource } from '../core/source.ts';
import { checkedLabels } from './commit.ts';
import { Upload } from './upload-image.ts';
import type { UploadWork } from './upload-image.ts';

export interface VersionOptions extends UploadWork {
  readonly kind: ManifestKind;
  readonly sizeBytes: number;
  /** Without a parent; with one, the parent's counts. */
  readonly chunkBytes: number;
  /** A version whose chunks it has wherever `changed` says nothing. */
  readonly parent?: Digest;
  /** Numbers, rising, of chunks to read. */
  readonly changed: (chunkBytes: number) => Iterable<number>;
  readonly labels?: Readonly<Record<string, string>>;
  /** Versions that are in the store already, by the names of files. */
  readonly parts?: Readonly<Record<string, Digest>>;
}

/** Durable when it resolves. Throws denied, bad-request, not-found (parent, a part), and what `read` throws. */
export async function uploadVersion(
  source: Pick<ChunkSource, 'name' | 'readManifest' | 'readTable' | 'uploads'>,
  options: VersionOptions,
): Promise<{ digest: Digest; newChunks: number; newStoredBytes: number }> {
  const { name, version } = parseReference(options.reference);
  const { uploads } = source;
  if (!uploads) throw new GridError('denied', `${source.name} takes no uploads`);
  const parent = options.parent === undefined ? undefined : await readParent(source, options.parent);
  if (parent && parent.manifest.sizeBytes !== options.sizeBytes) {
    throw new GridError('bad-request', `${options.reference} has not the size of its parent`);
  }
  const size: Pick<Manifest, 'sizeBytes' | 'chunkBytes'> = {
    sizeBytes: options.sizeBytes,
    chunkBytes: parent?.manifest.chunkBytes ?? options.chunkBytes,
  };
  const changed = new Set(options.changed(size.chunkBytes));
  const upload = new Upload(uploads, size, options);
  await upload.run([...changed]);
  const chunks = upload.chunks();
  if (parent) for (const entry of parent.table.entries()) if (!changed.has(entry.index)) chunks.push(entry);
  chunks.sort((a, b) => a.index - b.index);
  const table = encodeChunkTable(size.chunkBytes, chunkCountOf(size), chunks);
  const { bytes, digest } = encodeManifest({
    schema: 1,
    kind: options.kind,
    ...size,
    table: table.digest,
    nonzeroBytes: chunks.reduce((sum, { index }) => sum + chunkLengthOf(size, index), 0),
    ...(options.parent === undefined ? {} : { parent: options.parent }),
    labels: checkedLabels({ ...options.labels }),
    parts: { ...options.parts },
    created: new Date().toISOString(),
  });
  upload.checkCancelled();
  await uploads.putImage({ manifest: bytes, table: compress(table.bytes), name, version });
  return { digest, newChunks: upload.sentChunks, newStoredBytes: upload.sentBytes };
}

async function readParent(source: Pick<ChunkSource, 'readManifest' | 'readTable'>, digest: Digest) {
  const manifest = parseManifest(await source.readManifest(digest), digest);
  return { manifest, table: ChunkTable.parse(await source.readTable(manifest.table), manifest.table) };
}
