/**
 * Commit: a disk that was made from an image of the store becomes its next version. What did not change is taken
 * from the parent's chunk table as it is; only chunks with changes are read, hashed, compressed and written, so the
 * work goes with what changed. Chunks that have become all zero leave the table. Of the disk only the changed
 * blocks are read; the lanes take the others of a chunk from the parent's, which is in this store.
 *
 *   changed blocks → runs of a lane's unit, read while the lanes pack the ones before → flush → table → manifest → tag
 */
import { ChunkTable, encodeChunkTable } from '../core/chunk-table.ts';
import { compress } from '../core/chunk.ts';
import type { ChunkRef } from '../core/chunk.ts';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { LABEL_LENGTH_MAX, LABELS_MAX, LAYER_BLOCK_BYTES, MIB, NAME_LENGTH_MAX } from '../core/limits.ts';
import {
  chunkCountOf,
  chunkLengthOf,
  encodeManifest,
  parseManifest,
  parseReference,
} from '../core/manifest.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import type { PackedChunk, PackJob } from './jobs.ts';
import { Lanes } from './lanes.ts';
import type { Store } from './store.ts';
import { Writer } from './writer.ts';

const BLOCK = LAYER_BLOCK_BYTES;
/** A unit of work of a lane. */
const UNIT_BYTES = 1 * MIB;
/** Read ahead of the lanes and flushed together. */
const ROUND_BYTES = 32 * MIB;
/** Below this much the start of threads takes longer than the work. */
const INLINE_BYTES_MAX = 8 * MIB;

export interface CommitOptions {
  /** Manifest of the image that the disk was made from; must be in the store. */
  readonly parent: Digest;
  /** `name:version` to point at the result. */
  readonly reference: string;
  /** Of the disk: at least the parent's. */
  readonly sizeBytes: number;
  /** Numbers, rising, of chunks that may differ from the parent; `chunkBytes` are the parent's. */
  readonly changed: (chunkBytes: number) => Iterable<number>;
  /** Of a chunk that `changed` names, whether block `block` (4 KiB, counted from the disk's start) may differ. */
  readonly isChanged: (block: number) => boolean;
  /** True: every block that is not changed is zeros, whatever the parent has there. */
  readonly standalone?: boolean;
  /** Fills `target` with the disk's content from `offsetBytes`, changed blocks only; nobody writes to it meanwhile. */
  readonly read: (target: Uint8Array, offsetBytes: number) => Promise<void>;
  /** Beside the parent's, which they replace where they have the same key. */
  readonly labels?: Readonly<Record<string, string>>;
  readonly onProgress?: (doneBytes: number, totalBytes: number) => void;
  readonly signal?: AbortSignal;
}

export interface CommitResult {
  readonly manifest: Manifest;
  readonly digest: Digest;
  readonly tag: Tag;
  /** Chunks that were read and hashed. */
  readonly changedChunks: number;
  /** Of those, what the store did not have: all that is uploaded. */
  readonly newChunks: number;
  readonly newStoredBytes: number;
}

/**
 * Makes the new version, durable when it resolves; a failure or a cancel leaves no tag and no temp file.
 * Throws bad-request (reference, labels, a disk that is smaller than its parent), not-found (parent), no-space,
 * local-io, closed (cancelled), and what `read` throws.
 */
export async function commitImage(store: Store, options: CommitOptions): Promise<CommitResult> {
  const { name, version } = parseReference(options.reference);
  const parent = parseManifest(await store.readManifest(options.parent), options.parent);
  if (options.sizeBytes < parent.sizeBytes) {
    throw new GridError('bad-request', `the disk has ${options.sizeBytes} bytes, fewer than its parent's`);
  }
  const labels = checkedLabels({ ...parent.labels, ...options.labels });
  const table = ChunkTable.parse(await store.readTable(parent.table), parent.table);
  const { sizeBytes, signal } = options;
  const size = { sizeBytes, chunkBytes: parent.chunkBytes };
  const count = chunkCountOf(size);

  const changed = new Set(options.changed(parent.chunkBytes));
  // A last chunk that was short is a longer one now, with another digest.
  const tail = Math.floor(parent.sizeBytes / parent.chunkBytes);
  if (sizeBytes > parent.sizeBytes && parent.sizeBytes % parent.chunkBytes !== 0 && !options.standalone) {
    changed.add(tail);
  }
  const indexes = [...changed].toSorted((a, b) => a - b);
  const totalBytes = indexes.reduce((sum, index) => sum + chunkLengthOf(size, index), 0);

  const writer = await Writer.begin(store.layout);
  const lanes = new Lanes(totalBytes > INLINE_BYTES_MAX);
  const packed: PackedChunk[] = [];
  let reading: Promise<PackJob[]> | undefined;
  let flushing: Promise<void> | undefined;
  try {
    const rounds = roundsOf(indexes, size);
    const refOf = (index: number) => {
      const below = options.standalone || index >= table.count ? undefined : table.digestOf(index);
      return below === undefined ? undefined : { digest: below, plainBytes: chunkLengthOf(parent, index) };
    };
    const source = { options, size, refOf, storeFolder: store.layout.folder, writerFolder: writer.folder };
    reading = readRound(rounds.next().value, source);
    // What is read for the next round may fail while this one is packed; it is awaited below.
    reading.catch(() => {});
    let doneBytes = 0;
    for (;;) {
      checkCancelled(signal, options.reference);
      const jobs = await reading;
      if (jobs.length === 0) break;
      reading = readRound(rounds.next().value, source);
      reading.catch(() => {});
      const fresh: Digest[] = [];
      await lanes.runAll(jobs, signal, (chunks, job) => {
        packed.push(...chunks);
        for (const { digest, isNew } of chunks) if (isNew) fresh.push(digest);
        doneBytes += job.lengthBytes;
        options.onProgress?.(doneBytes, totalBytes);
      });
      // One at a time, while the next round is packed: a flush waits for the disk, packing for the processor.
      await flushing;
      flushing = writer.flush(fresh.map((digest) => ({ kind: 'chunks' as const, digest })));
      flushing.catch(() => {});
    }
    await flushing;

    const chunks = packed.map(({ index, digest, storedBytes }) => ({ index, digest, storedBytes }));
    if (!options.standalone)
      for (const entry of table.entries()) if (!changed.has(entry.index)) chunks.push(entry);
    chunks.sort((a, b) => a.index - b.index);
    const encoded = encodeChunkTable(parent.chunkBytes, count, chunks);
    const { bytes, digest } = encodeManifest({
      schema: 1,
      kind: parent.kind,
      ...size,
      table: encoded.digest,
      nonzeroBytes: chunks.reduce((sum, { index }) => sum + chunkLengthOf(size, index), 0),
      parent: options.parent,
      labels,
      parts: parent.parts,
      created: new Date().toISOString(),
    });
    writer.put('tables', encoded.digest, compress(encoded.bytes));
    writer.put('manifests', digest, bytes);
    await writer.flush([
      { kind: 'tables', digest: encoded.digest },
      { kind: 'manifests', digest },
    ]);
    await writer.sync();
    checkCancelled(signal, options.reference);
    const tag = await store.setTag(name, version, digest);
    const fresh = packed.filter(({ isNew }) => isNew);
    return {
      manifest: parseManifest(bytes, digest),
      digest,
      tag,
      changedChunks: indexes.length,
      newChunks: fresh.length,
      newStoredBytes: fresh.reduce((sum, { storedBytes }) => sum + storedBytes, 0),
    };
  } finally {
    // The caller may close the disk when we are done.
    await reading?.catch(() => {});
    await flushing?.catch(() => {});
    await lanes.close();
    writer.end();
  }
}

function checkCancelled(signal: AbortSignal | undefined, reference: string): void {
  if (signal?.aborted) throw new GridError('closed', `the commit of ${reference} was cancelled`);
}

/** Throws bad-request for labels that no manifest may have. */
export function checkedLabels(labels: Record<string, string>): Record<string, string> {
  const entries = Object.entries(labels);
  if (entries.length > LABELS_MAX) throw new GridError('bad-request', `more than ${LABELS_MAX} labels`);
  for (const [key, value] of entries) {
    if (key.length > NAME_LENGTH_MAX || value.length > LABEL_LENGTH_MAX) {
      throw new GridError(
        'bad-request',
        `the label '${key.slice(0, NAME_LENGTH_MAX)}' or its value is too long`,
      );
    }
  }
  return labels;
}

interface Run {
  readonly firstChunk: number;
  readonly lengthBytes: number;
}

/** Neighbouring chunks as units, and units as rounds. Ends with an empty round. */
function* roundsOf(
  indexes: readonly number[],
  size: Pick<Manifest, 'sizeBytes' | 'chunkBytes'>,
): Generator<Run[], Run[], void> {
  let round: Run[] = [];
  let roundBytes = 0;
  for (let i = 0; i < indexes.length;) {
    const firstChunk = indexes[i]!;
    let lengthBytes = 0;
    for (let next = firstChunk; indexes[i] === next; next++, i++) {
      const chunk = chunkLengthOf(size, next);
      if (lengthBytes > 0 && lengthBytes + chunk > UNIT_BYTES) break;
      lengthBytes += chunk;
    }
    round.push({ firstChunk, lengthBytes });
    roundBytes += lengthBytes;
    if (roundBytes < ROUND_BYTES) continue;
    yield round;
    round = [];
    roundBytes = 0;
  }
  if (round.length > 0) yield round;
  return [];
}

interface RoundSource {
  readonly options: CommitOptions;
  readonly size: Pick<Manifest, 'sizeBytes' | 'chunkBytes'>;
  /** The parent's chunk. */
  readonly refOf: (index: number) => ChunkRef | undefined;
  readonly storeFolder: string;
  readonly writerFolder: string;
}

async function readRound(runs: readonly Run[], source: RoundSource): Promise<PackJob[]> {
  const jobs = await Promise.allSettled(runs.map((run) => readRun(run, source)));
  return jobs.map((job) => {
    if (job.status === 'rejected') throw job.reason;
    return job.value;
  });
}

async function readRun({ firstChunk, lengthBytes }: Run, source: RoundSource): Promise<PackJob> {
  const { options, size, refOf } = source;
  const { chunkBytes } = size;
  const plain = Buffer.alloc(lengthBytes);
  const has = new Uint8Array(Math.ceil(lengthBytes / BLOCK));
  const startBytes = firstChunk * chunkBytes;
  for (let i = 0; i < has.length; i++) has[i] = options.isChanged(startBytes / BLOCK + i) ? 1 : 0;
  const reads: Promise<void>[] = [];
  for (let i = 0; i < has.length; i++) {
    const first = i;
    while (has[i] === 1) i++;
    if (i === first) continue;
    reads.push(options.read(plain.subarray(first * BLOCK, i * BLOCK), startBytes + first * BLOCK));
  }
  for (const result of await Promise.allSettled(reads)) if (result.status === 'rejected') throw result.reason;
  const chunks = Array.from({ length: Math.ceil(lengthBytes / chunkBytes) }, (_, i) => refOf(firstChunk + i));
  return {
    type: 'pack',
    fd: -1,
    plain,
    below: { blockBytes: BLOCK, has, chunks },
    path: options.reference,
    storeFolder: source.storeFolder,
    writerFolder: source.writerFolder,
    chunkBytes,
    firstChunk,
    lengthBytes,
  };
}
