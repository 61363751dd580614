/**
 * Clones that go to the source and come back on another host. A pushed clone is a version of its image like any
 * other, so it is served, verified, kept and mounted as they are; labels say whose it is:
 *
 *   parent           the image that the clone lies on
 *   push.lineage     the same for all versions of one clone, on whatever host
 *   push.generation  1, 2, … by one each time
 *   push.clone, push.image, push.host, push.standalone   its name, its image's reference, who pushed it, whether it
 *                    needs its parent
 *
 * One at a time goes on with it: the tag moves only from the version that the pusher pushed or pulled last. What is to
 * become the next version is noted before the tag moves, so a proxy that dies in between knows its own work again.
 * A pull makes a layer of the chunks that differ from the parent's; after it the clone needs its parent alone, as it
 * did where it came from.
 */
import { randomBytes } from 'node:crypto';
import os from 'node:os';
import type { Cache } from '../../cache/index.ts';
import type { CloneRecord, PushedState } from '../agent/clone-record.ts';
import type { CloneWork } from '../agent/clone-routes.ts';
import type { Clones } from '../agent/clones.ts';
import type { LongTask } from '../agent/long-call.ts';
import { isAllZero } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { ChunkTable } from '../core/chunk-table.ts';
import type { ChunkEntry } from '../core/chunk-table.ts';
import { GridError } from '../core/errors.ts';
import type { Image } from '../core/image.ts';
import { LAYER_BLOCK_BYTES } from '../core/limits.ts';
import { chunkLengthOf, isName, LABEL_PUSH_LINEAGE, parseReference } from '../core/manifest.ts';
import type { Manifest } from '../core/manifest.ts';
import { bitsOf, countOf } from '../core/patch.ts';
import type { Patch } from '../core/patch.ts';
import type { ChunkSource } from '../core/source.ts';
import { blockChangeIn, changedUnitsOf, openChain, openClone, zeroImage } from '../image/index.ts';
import type { Chain, Clone, Snapshot } from '../image/index.ts';
import { uploadImage } from '../store/index.ts';

const GENERATION = 'push.generation';
const CLONE = 'push.clone';
const IMAGE = 'push.image';
const HOST = 'push.host';
const STANDALONE = 'push.standalone';
const LINEAGE_PATTERN = /^[0-9a-f]{32}$/;
/** Chunks read at once: on a long link the next ones are on their way while one is written. */
const READS_MAX = 16;

export interface PushParts {
  readonly cache: Cache;
  readonly clones: Clones;
  readonly source: ChunkSource;
}

/** The source with what clones were made of from the cache: only what is new goes to the source itself. */
export function nearParents(source: ChunkSource, cache: Cache) {
  return {
    ...cache.descriptions,
    name: source.name,
    uploads: source.uploads,
    listTags: () => source.listTags(),
    readChunks: source.readChunks.bind(source),
  };
}

export function pushWork({ cache, clones, source }: PushParts): Pick<CloneWork, 'push' | 'pull'> {
  const tagNow = async (reference: string): Promise<Digest | null> => {
    const { name, version } = parseReference(reference);
    const tags = await source.listTags();
    return tags.find((tag) => tag.name === name && tag.version === version)?.manifest ?? null;
  };

  return {
    async push(snapshot, record, request, control) {
      if (record.kind === 'non-persistent') {
        throw new GridError(
          'bad-request',
          `clone '${record.id}' goes with its VM; push a persistent one, or commit this one when its VM has stopped`,
        );
      }
      const state = nextState(record, request.reference);
      const { reference, lineage } = state;
      const now = await tagNow(reference);
      // The tag moved and the answer, or this proxy, was lost.
      const known =
        now !== null && now === state.pending ? { ...state, ...(await asPushed(now, state)) } : state;
      const expected = known.manifest ?? null;
      if (now !== expected) throw new GridError('exists', await whyNot(now, known));
      const generation = known.generation + 1;
      const disk = snapshot as Snapshot;
      const standalone = record.detached !== undefined;
      const { manifest, tag, ...result } = await uploadImage(nearParents(source, cache), {
        ...control,
        parent: record.base,
        reference,
        expected,
        sizeBytes: disk.sizeBytes,
        changed: (chunkBytes) => changedUnitsOf(disk.states, chunkBytes, standalone),
        isChanged: blockChangeIn(disk.states, standalone),
        standalone,
        read: (target, offsetBytes) => disk.readOnce(target, offsetBytes),
        labels: {
          [LABEL_PUSH_LINEAGE]: lineage,
          [GENERATION]: String(generation),
          [CLONE]: record.id,
          [IMAGE]: record.image,
          [HOST]: os.hostname(),
          [STANDALONE]: String(standalone),
        },
        ...(known.table === undefined ? {} : { before: known.table }),
        beforeTag: (pending) => clones.setPushed(record.id, { ...known, pending }),
      });
      const { pending: _moved, ...settled } = known;
      const next: PushedState = tag
        ? { ...settled, generation, manifest: result.digest, table: manifest.table }
        : settled;
      await clones.setPushed(record.id, next);
      return { ...result, reference, generation: next.generation, unchanged: !tag };
    },

    async pull({ reference, name }, control) {
      const digest = await tagNow(reference);
      if (digest === null) throw new GridError('not-found', `${source.name} has no ${reference}`);
      const manifest = await cache.readManifest(digest);
      const lineage = manifest.labels[LABEL_PUSH_LINEAGE];
      const generation = Number(manifest.labels[GENERATION]);
      const { [CLONE]: oldName, [IMAGE]: image = reference } = manifest.labels;
      if (lineage === undefined || !LINEAGE_PATTERN.test(lineage) || !(generation >= 1) || !isName(oldName)) {
        throw new GridError(
          'bad-request',
          `${reference} is an image and not a clone that was pushed; make a clone of it with \`gridvfs clone create\``,
        );
      }
      const mine = clones.records().find(({ pushed }) => pushed?.lineage === lineage);
      if (mine) {
        throw new GridError(
          'exists',
          mine.pushed!.manifest === digest
            ? `clone '${mine.id}' is generation ${generation} of it already`
            : `clone '${mine.id}' is generation ${mine.pushed!.generation} of it; remove it, then pull generation ${generation}`,
        );
      }
      const base = await baseOf(digest, manifest);
      const pieces = await differing(manifest, base.manifest);
      const bytes = pieces.reduce((sum, piece) => sum + bytesOf(piece, manifest), 0);
      const { freeBytes } = await clones.space();
      if (bytes > freeBytes) {
        throw new GridError(
          'no-space',
          `${reference} holds ${bytes} bytes of changes, and ${freeBytes} are free`,
        );
      }
      const isFull = base.manifest === undefined;
      return clones.create({
        image,
        base: base.digest,
        sizeBytes: manifest.sizeBytes,
        name: name ?? oldName,
        kind: isFull ? 'full' : 'persistent',
        ...(isFull ? { detached: base.digest } : {}),
        pushed: { reference, lineage, generation, manifest: digest, table: manifest.table },
        content: async (chain) => {
          const image = await cache.openImage(digest);
          try {
            await fillFrom(image, chain, { manifest, pieces, base: base.manifest }, control);
          } finally {
            await image.close();
          }
        },
      });
    },
  };

  /** What the version that this clone was about to push says, now that its tag is seen to have moved. */
  async function asPushed(digest: Digest, state: PushedState): Promise<Partial<PushedState>> {
    const { table } = await cache.readManifest(digest);
    return { manifest: digest, table, generation: state.generation + 1 };
  }

  async function whyNot(now: Digest | null, state: PushedState): Promise<string> {
    const { reference, generation, lineage } = state;
    if (now === null) {
      return `${reference} was removed from ${source.name} since generation ${generation} was pushed; push under another name (--as)`;
    }
    const { labels } = await cache.readManifest(now);
    if (labels[LABEL_PUSH_LINEAGE] !== lineage) {
      return `${reference} of ${source.name} is something else already; push under another name (--as)`;
    }
    return (
      `generation ${labels[GENERATION]} of it was pushed from ${labels[HOST]}, and this clone has ${generation}: ` +
      `pull ${reference} and go on with that, or push this one under another name (--as)`
    );
  }

  /** What a pulled clone lies on: what it lay on where it came from, or nothing for a full one and where that is gone. */
  async function baseOf(
    digest: Digest,
    { parent, labels }: Manifest,
  ): Promise<{ digest: Digest; manifest: Manifest | undefined }> {
    if (parent === undefined) return { digest, manifest: undefined };
    try {
      const manifest = await cache.readManifest(parent);
      return { digest: parent, manifest: labels[STANDALONE] === 'true' ? undefined : manifest };
    } catch (error) {
      if (!(error instanceof GridError) || error.code !== 'not-found') throw error;
      return { digest, manifest: undefined };
    }
  }

  /** The chunks that are another than the base's; without a base, those that are not zeros. */
  async function differing(manifest: Manifest, base: Manifest | undefined): Promise<Piece[]> {
    const tableOf = async ({ table }: Manifest) =>
      ChunkTable.parse(await cache.descriptions.readTable(table), table);
    const table = await tableOf(manifest);
    if (!base) return [...table.entries()].map(({ index }) => ({ index }));
    const below = await tableOf(base);
    const pieces: Piece[] = [];
    for (const { index, digest, patch } of table.entries()) {
      const there = below.at(index);
      if (there?.digest === digest) continue;
      // Only what is patched becomes the layer's: the next push is to find the same patches.
      const isOver = patch && there && isPatchOver(patch, there);
      pieces.push(isOver ? { index, blocks: patch.data | patch.zero } : { index });
    }
    for (const { index } of below.entries()) if (table.at(index) === undefined) pieces.push({ index });
    return pieces.toSorted((one, other) => one.index - other.index);
  }
}

/** A chunk of a pulled version, or some of its blocks (a bit each). */
interface Piece {
  readonly index: number;
  readonly blocks?: bigint;
}

const bytesOf = ({ index, blocks }: Piece, manifest: Manifest) =>
  blocks === undefined ? chunkLengthOf(manifest, index) : countOf(blocks) * LAYER_BLOCK_BYTES;

/** Whether `there` differs from what `patch` makes in the patch's blocks alone. */
function isPatchOver(patch: Patch, there: ChunkEntry): boolean {
  const { base, data, zero } = there.patch ?? { base: there, data: 0n, zero: 0n };
  return patch.base.digest === base.digest && ((data | zero) & ~(patch.data | patch.zero)) === 0n;
}

/** Where the next push of a clone starts from. */
function nextState({ id, pushed }: CloneRecord, reference: string | undefined): PushedState {
  if (pushed && (reference === undefined || reference === pushed.reference)) return pushed;
  const wanted = reference ?? `${id}:pushed`;
  parseReference(wanted);
  return { reference: wanted, lineage: randomBytes(16).toString('hex'), generation: 0 };
}

/** Makes the layer of a new clone what `image` has in these chunks. */
async function fillFrom(
  image: Image,
  chain: Chain,
  what: { manifest: Manifest; pieces: readonly Piece[]; base: Manifest | undefined },
  control: LongTask,
): Promise<void> {
  const { manifest, pieces, base } = what;
  const clone = openClone(zeroImage(), await openChain(chain));
  const zeroBaseFrom = Math.ceil((base?.sizeBytes ?? 0) / LAYER_BLOCK_BYTES);
  try {
    let next = 0;
    let done = 0;
    const lane = async () => {
      while (next < pieces.length) {
        if (control.signal.aborted) throw new GridError('closed', 'the pull was cancelled');
        const { index, blocks } = pieces[next++]!;
        const bytes = Buffer.allocUnsafe(chunkLengthOf(manifest, index));
        await image.read(bytes, index * manifest.chunkBytes);
        const at = index * manifest.chunkBytes;
        if (blocks === undefined) await putBlocks(clone, bytes, at, zeroBaseFrom);
        for (const block of bitsOf(blocks ?? 0n)) {
          const from = block * LAYER_BLOCK_BYTES;
          await putBlocks(clone, bytes.subarray(from, from + LAYER_BLOCK_BYTES), at + from, zeroBaseFrom);
        }
        control.onProgress(++done, pieces.length);
      }
    };
    // All of them, also after a failure: the layer is closed when we are done.
    const lanes = await Promise.allSettled(Array.from({ length: READS_MAX }, lane));
    for (const result of lanes) if (result.status === 'rejected') throw result.reason;
    await clone.flush();
  } finally {
    await clone.close();
  }
}

/** Runs of blocks with data as data, those of zeros as zeros. */
async function putBlocks(
  clone: Clone,
  bytes: Buffer,
  offsetBytes: number,
  zeroBaseFrom: number,
): Promise<void> {
  const count = Math.ceil(bytes.length / LAYER_BLOCK_BYTES);
  const isZero = (block: number) =>
    isAllZero(bytes.subarray(block * LAYER_BLOCK_BYTES, (block + 1) * LAYER_BLOCK_BYTES));
  const firstBlock = offsetBytes / LAYER_BLOCK_BYTES;
  for (let block = 0; block < count;) {
    const start = block;
    const zero = isZero(start);
    while (block < count && isZero(block) === zero) block++;
    if (zero) await clone.layer.trimBlocks(firstBlock + start, firstBlock + block - 1, zeroBaseFrom);
    else {
      const piece = bytes.subarray(start * LAYER_BLOCK_BYTES, block * LAYER_BLOCK_BYTES);
      await clone.write(piece, offsetBytes + start * LAYER_BLOCK_BYTES);
    }
  }
}
