/**
 * Commit: a disk that was made from an image of a store on this host becomes its next version there (new-version.ts).
 * Of the disk only the changed blocks are read; the lanes take the others of a chunk from the parent's, which is in
 * this store; and chunks of which few blocks changed become patches of the parent's (patching.ts).
 *
 *   changed blocks → units, read some ahead of the lanes → lanes: complete, hash, compress, temp file → batches
 *     → publish, under the store's lock, unless a collection took what was found there: then a second pass
 */
import { existsSync } from 'node:fs';
import { sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import type { NewEntry } from '../core/chunk-table.ts';
import type { ChunkRef } from '../core/chunk.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { LAYER_BLOCK_BYTES, MIB, STORED_OVERHEAD_BYTES_MAX } from '../core/limits.ts';
import { chunkLengthOf, parseManifest } from '../core/manifest.ts';
import type { Tag } from '../core/manifest.ts';
import type { NewImage } from '../core/uploads.ts';
import { Batches } from './batches.ts';
import type { PackedChunk, PackJob } from './jobs.ts';
import { Lanes } from './lanes.ts';
import { readBounded } from './layout.ts';
import { checkCancelled, makeVersion } from './new-version.ts';
import type { Changes, NewVersion, NewVersionOptions, Packed, VersionEnd } from './new-version.ts';
import { entriesOfGroup, PacksBelow, readGroup, splitChanges } from './patching.ts';
import type { GroupContent, PatchGroup } from './patching.ts';
import type { Store } from './store.ts';
import { Writer } from './writer.ts';

const BLOCK = LAYER_BLOCK_BYTES;
/** A unit of work of a lane. */
const UNIT_BYTES = 1 * MIB;
/** Units that are read before a lane is free for them, with what they need of the parent's chunks: those are scattered
 * files that may have to come from a disk, one after the other where a lane waited for each. */
const UNITS_AHEAD = 16;
/** Below this much the start of threads takes longer than the work. */
const INLINE_BYTES_MAX = 8 * MIB;

export interface CommitOptions extends Omit<NewVersionOptions, 'own' | 'chunkBytes'> {
  readonly parent: Digest;
  /** Of a chunk that `changed` names, whether block `block` (4 KiB, counted from the disk's start) may differ. */
  readonly isChanged: (block: number) => boolean;
  /** Fills `target` with the disk's content from `offsetBytes`, whole blocks, changed ones but where `readHere` or the
   * parent cannot help; nobody writes to it meanwhile. */
  readonly read: (target: Uint8Array, offsetBytes: number) => Promise<void>;
  /** The same of a whole chunk, where all of it is on this host in plain: a tenth of what unpacking the parent's
   * takes. False: some of it is not, and `target` is incomplete. */
  readonly readHere?: (target: Uint8Array, offsetBytes: number) => boolean;
}

export type CommitResult = NewVersion;

/**
 * Makes the new version, durable when it resolves; a failure or a cancel leaves no tag and no temp file.
 * Throws bad-request (reference, labels, a disk that is smaller than its parent), not-found (parent), no-space,
 * local-io, in-use, closed (cancelled), and what `read` throws.
 */
export async function commitImage(store: Store, options: CommitOptions): Promise<CommitResult> {
  const writer = await Writer.begin(store.layout);
  try {
    const { tag, ...made } = await makeVersion(store, new StoreEnd(store, writer, options), options);
    return { ...made, tag: tag! };
  } finally {
    writer.end();
  }
}

/** Chunks on their way into a store that is a folder here. */
class StoreEnd implements VersionEnd {
  readonly #store: Store;
  readonly #writer: Writer;
  readonly #disk: CommitOptions;
  readonly #batches: Batches;
  readonly #packed = new Set<Digest>();
  readonly #packsBelow: PacksBelow;
  /** What the packs of these jobs hold. */
  readonly #groups = new WeakMap<PackJob, GroupContent>();

  constructor(store: Store, writer: Writer, disk: CommitOptions) {
    this.#store = store;
    this.#writer = writer;
    this.#disk = disk;
    this.#batches = new Batches(writer);
    this.#packsBelow = new PacksBelow(store);
  }

  async pack(changes: Changes, again: boolean): Promise<Packed> {
    const { signal, onProgress } = changes;
    const { whole, groups } = await splitChanges(changes, this.#disk.isChanged);
    const blocks = groups.reduce((sum, { blockCount }) => sum + blockCount, 0);
    const workBytes =
      blocks * BLOCK + whole.reduce((sum, index) => sum + chunkLengthOf(changes.size, index), 0);
    const lanes = new Lanes(workBytes > INLINE_BYTES_MAX);
    const units = new ReadAhead([...groups, ...unitsOf(whole, changes.size)], (unit) =>
      'chunks' in unit ? this.#readGroup(unit, changes, again) : this.#readChunks(unit, changes, again),
    );
    const entries: NewEntry[] = [];
    const fresh: PackedChunk[] = [];
    let doneBytes = 0;
    try {
      checkCancelled(changes);
      await lanes.runAll(units.jobs(), signal, async (packed, job) => {
        const group = this.#groups.get(job);
        entries.push(...(group ? entriesOfGroup(group, packed[0]) : packed));
        fresh.push(...packed.filter(({ isNew }) => isNew));
        for (const { digest } of packed) this.#packed.add(digest);
        doneBytes += group ? group.blockCount * BLOCK : job.lengthBytes;
        onProgress?.(doneBytes, workBytes);
        await this.#batches.add(packed);
      });
      await this.#batches.settle();
    } catch (error) {
      // Whatever stopped first: what the caller did is the reason.
      checkCancelled(changes);
      throw error;
    } finally {
      // The caller may close the disk when we are done.
      await units.settle();
      await this.#batches.settle().catch(() => {});
      await lanes.close();
    }
    return {
      chunks: entries,
      newChunks: fresh.length,
      newStoredBytes: fresh.reduce((sum, { storedBytes }) => sum + storedBytes, 0),
    };
  }

  async publish(
    { manifest, table, name, version }: NewImage,
    used: Iterable<Digest>,
  ): Promise<Tag | undefined> {
    const digest = sha256(manifest);
    const described = [
      { kind: 'tables', digest: parseManifest(manifest, digest).table },
      { kind: 'manifests', digest },
    ] as const;
    this.#writer.put('tables', described[0].digest, table);
    this.#writer.put('manifests', digest, manifest);
    if (!(await this.#writer.publish(this.#batches.take(), described, used))) {
      this.#checkTakenOver(used);
      return undefined;
    }
    await this.#writer.sync();
    checkCancelled(this.#disk);
    return this.#store.setTag(name, version, digest);
  }

  /** What a collection took of the parent's own is not packed by another pass. */
  #checkTakenOver(used: Iterable<Digest>): void {
    for (const digest of used) {
      if (this.#packed.has(digest) || existsSync(this.#store.layout.object('chunks', digest))) continue;
      throw new GridError(
        'not-found',
        `a garbage collection took chunk ${digest} of the parent of ${this.#disk.reference}: no tag named it any more`,
      );
    }
  }

  async #readBelow({ digest, plainBytes }: ChunkRef): Promise<Buffer> {
    const { layout } = this.#store;
    try {
      return await readBounded(layout.object('chunks', digest), plainBytes + STORED_OVERHEAD_BYTES_MAX);
    } catch (error) {
      throw asGridError(error, `cannot read chunk ${digest} of the store ${layout.folder}`);
    }
  }

  /** The blocks of a group of patched chunks, as one object. */
  async #readGroup(group: PatchGroup, { size, reference }: Changes, renew: boolean): Promise<PackJob> {
    const read = (target: Uint8Array, offsetBytes: number) => this.#disk.read(target, offsetBytes);
    const { plain, content } = await readGroup(group, size.chunkBytes, read, this.#packsBelow);
    const job: PackJob = {
      ...this.#job(plain, reference, renew),
      chunkBytes: plain.length,
      firstChunk: 0,
    };
    this.#groups.set(job, content);
    return job;
  }

  #job(plain: Buffer, reference: string, renew: boolean) {
    return {
      type: 'pack' as const,
      fd: -1,
      plain,
      path: reference,
      storeFolder: this.#store.layout.folder,
      writerFolder: this.#writer.folder,
      lengthBytes: plain.length,
      renew,
    };
  }

  /** Changed blocks of whole chunks, and, where it costs less than unpacking, what lies around them. */
  async #readChunks(unit: Unit, { size, below, reference }: Changes, renew: boolean): Promise<PackJob> {
    const { firstChunk, lengthBytes } = unit;
    const { chunkBytes } = size;
    const plain = Buffer.alloc(lengthBytes);
    const has = new Uint8Array(Math.ceil(lengthBytes / BLOCK));
    const startBytes = firstChunk * chunkBytes;
    const chunks = Array.from({ length: Math.ceil(lengthBytes / chunkBytes) }, (_, i) =>
      below(firstChunk + i),
    );
    for (let i = 0; i < has.length; i++) has[i] = this.#disk.isChanged(startBytes / BLOCK + i) ? 1 : 0;
    // What the parent has patched is no object to unpack: all of the chunk is read from the disk.
    for (const [i, there] of chunks.entries())
      if (there?.patch) has.fill(1, (i * chunkBytes) / BLOCK, ((i + 1) * chunkBytes) / BLOCK);
    const wanted = has.slice();
    for (const [i, there] of chunks.entries()) {
      const part = has.subarray((i * chunkBytes) / BLOCK, ((i + 1) * chunkBytes) / BLOCK);
      if (!there || !this.#disk.readHere || part.every((own) => own === 1)) continue;
      const at = i * chunkBytes;
      if (!this.#disk.readHere(plain.subarray(at, at + chunkBytes), startBytes + at)) continue;
      part.fill(1);
      wanted.fill(0, at / BLOCK, at / BLOCK + part.length);
    }
    const reads: Promise<void>[] = [];
    for (let i = 0; i < wanted.length; i++) {
      const first = i;
      while (wanted[i] === 1) i++;
      if (i === first) continue;
      reads.push(this.#disk.read(plain.subarray(first * BLOCK, i * BLOCK), startBytes + first * BLOCK));
    }
    const stored: (Buffer | undefined)[] = [];
    for (const [i, there] of chunks.entries()) {
      const part = has.subarray((i * chunkBytes) / BLOCK, ((i + 1) * chunkBytes) / BLOCK);
      if (there && part.includes(0))
        reads.push(this.#readBelow(there).then((bytes) => void (stored[i] = bytes)));
    }
    for (const result of await Promise.allSettled(reads))
      if (result.status === 'rejected') throw result.reason;
    return {
      ...this.#job(plain, reference, renew),
      below: { blockBytes: BLOCK, has, chunks, stored },
      chunkBytes,
      firstChunk,
    };
  }
}

/** Neighbouring chunks that are packed as wholes. */
interface Unit {
  readonly firstChunk: number;
  readonly lengthBytes: number;
}

function* unitsOf(indexes: readonly number[], size: Changes['size']): Generator<Unit, void, void> {
  for (let i = 0; i < indexes.length;) {
    const firstChunk = indexes[i]!;
    let lengthBytes = 0;
    for (let next = firstChunk; indexes[i] === next; next++, i++) {
      const chunk = chunkLengthOf(size, next);
      if (lengthBytes > 0 && lengthBytes + chunk > UNIT_BYTES) break;
      lengthBytes += chunk;
    }
    yield { firstChunk, lengthBytes };
  }
}

/** Reads units while the lanes pack the ones before. */
class ReadAhead<U> {
  readonly #units: Iterator<U>;
  readonly #read: (unit: U) => Promise<PackJob>;
  readonly #ahead: Promise<PackJob>[] = [];

  constructor(units: Iterable<U>, read: (unit: U) => Promise<PackJob>) {
    this.#units = units[Symbol.iterator]();
    this.#read = read;
  }

  *jobs(): Generator<Promise<PackJob>, void, void> {
    for (;;) {
      while (this.#ahead.length <= UNITS_AHEAD) {
        const next = this.#units.next();
        if (next.done) break;
        const job = this.#read(next.value);
        // It may fail before anybody waits for it.
        job.catch(() => {});
        this.#ahead.push(job);
      }
      const first = this.#ahead.shift();
      if (!first) return;
      yield first;
    }
  }

  /** Ends when nothing is being read any more. */
  async settle(): Promise<void> {
    await Promise.allSettled(this.#ahead);
  }
}
