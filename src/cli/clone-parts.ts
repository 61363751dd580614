/** Wiring of clones: layers and archives of src/image over images of the cache, and commits into a store. */
import os from 'node:os';
import path from 'node:path';
import type { Cache } from '../../cache/index.ts';
import type { CloneDisk, CloneParts, DiskSnapshot } from '../agent/clone-parts.ts';
import type { CloneRecord } from '../agent/clone-record.ts';
import { nearParents, pushWork } from './clone-push.ts';
import type { CloneWork } from '../agent/clone-routes.ts';
import type { Clones } from '../agent/clones.ts';
import type { LongTask } from '../agent/long-call.ts';
import type { Digest } from '../core/bytes.ts';
import type { Image } from '../core/image.ts';
import { ChunkTable } from '../core/chunk-table.ts';
import { GridError } from '../core/errors.ts';
import { LAYER_BLOCK_BYTES } from '../core/limits.ts';
import type { Manifest } from '../core/manifest.ts';
import { QuietPoints } from '../core/quiet.ts';
import type { ChunkSource } from '../core/source.ts';
import {
  blockChangeIn,
  blockChangeOf,
  changedUnits,
  changedUnitsOf,
  createLayerOver,
  exportArchive,
  openChain,
  openClone,
  readArchive,
  readArchiveInfo,
  syncLayer,
  zeroImage,
} from '../image/index.ts';
import type { Chain, Clone, Snapshot } from '../image/index.ts';
import { commitImage, openStore, uploadImage } from '../store/index.ts';
import type { Store } from '../store/index.ts';

/** A `Clone` behind the agent's contract; the agent hands it back for commit and export. */
export type Disk = CloneDisk & { readonly clone: Clone };

/** `quiet`: the process's quiet points, which every thread that writes to clones passes. */
export function cloneParts(cache: Cache, quiet = new QuietPoints()): CloneParts {
  return {
    createLayer: createLayerOver,
    syncLayer,
    async openDisk(chain, image): Promise<Disk> {
      const base = image === undefined ? zeroImage() : await openBase(cache, image);
      try {
        return diskOf(openClone(base, await openChain(chain)), { cache, quiet, image });
      } catch (error) {
        await base.close();
        throw error;
      }
    },
  };
}

/** What a clone lies on. That some of it is not at the source any more is said so: "not found" would be the clone. */
async function openBase(cache: Cache, digest: Digest): Promise<Image> {
  const gone = (cause: unknown): never => {
    if (!(cause instanceof GridError) || cause.code !== 'not-found') throw cause;
    throw new GridError(
      'wrong-base',
      `the clone lies on image ${digest}, and the source has no longer all of it: a garbage collection took what neither a name, a pin nor a hold kept (${cause.message}); if it was imported, the same content imported there again makes the clone whole`,
      { cause },
    );
  };
  const image = await cache.openImage(digest).catch(gone);
  return {
    sizeBytes: image.sizeBytes,
    writable: false,
    ...(image.direct ? { direct: image.direct } : {}),
    read: (target, offsetBytes) => image.read(target, offsetBytes).catch(gone),
    write: () => image.write(),
    trim: () => image.trim(),
    flush: () => image.flush(),
    claimWhole: (options) => image.claimWhole(options),
    close: () => image.close(),
  };
}

function diskOf(
  clone: Clone,
  { cache, quiet, image }: { cache: Cache; quiet: QuietPoints; image: Digest | undefined },
): Disk {
  const { layer } = clone;
  return {
    clone,
    sizeBytes: clone.sizeBytes,
    writable: true,
    direct: clone.direct,
    ...(clone.usage ? { usage: clone.usage } : {}),
    baseDigest: layer.baseDigest,
    read: (target, offsetBytes) => clone.read(target, offsetBytes),
    write: (source, offsetBytes) => clone.write(source, offsetBytes),
    trim: (offsetBytes, lengthBytes) => clone.trim(offsetBytes, lengthBytes),
    flush: () => clone.flush(),
    close: () => clone.close(),
    isEmpty() {
      const { dataBlocks, zeroBlocks } = clone.statistics();
      return dataBlocks + zeroBlocks === 0;
    },
    setQuota: (quotaBytes) => layer.setQuota(quotaBytes),
    snapshot: () => clone.snapshot(() => quiet.quiet()),
    async fillUp(options) {
      await clone.fillUp({
        ...options,
        baseRanges: image === undefined ? [] : await dataRangesOf(cache, image),
      });
    },
  };
}

/** Where an image is not zeros. */
async function dataRangesOf(cache: Cache, image: Digest): Promise<[start: number, end: number][]> {
  const manifest = await cache.readManifest(image);
  const table = ChunkTable.parse(await cache.descriptions.readTable(manifest.table), manifest.table);
  return [...table.extents()].map(([first, chunks]) => [
    first * manifest.chunkBytes,
    Math.min((first + chunks) * manifest.chunkBytes, manifest.sizeBytes),
  ]);
}

export interface CloneWorkParts {
  readonly cache: Cache;
  readonly clones: Clones;
  readonly source: ChunkSource;
  /** Where that is a folder on this host. */
  readonly storeFolder: string | undefined;
  readonly resolve: (reference: string) => Promise<{ digest: Digest; manifest: Manifest }>;
}

/** What the broker's link asks for beside what the control socket does. */
export interface MomentWork {
  /** A new version in the proxy's source of a disk as it was at a moment, also while a VM runs on it. */
  commitMoment(
    snapshot: DiskSnapshot,
    record: CloneRecord,
    request: { reference: string; labels: Readonly<Record<string, string>> },
  ): Promise<{ digest: string; newStoredBytes: number }>;
}

export function cloneWork(parts: CloneWorkParts): CloneWork & MomentWork {
  const { cache, clones, source, storeFolder, resolve } = parts;
  return {
    ...pushWork(parts),

    async commit(disk, record, request, control) {
      const { clone } = disk as Disk;
      const standalone = record.detached !== undefined;
      const options = {
        ...control,
        isChanged: blockChangeOf(clone, standalone),
        parent: record.base,
        reference: request.reference,
        sizeBytes: disk.sizeBytes,
        changed: (chunkBytes: number) => changedUnits(clone, chunkBytes, standalone),
        standalone,
        read: (target: Uint8Array, offsetBytes: number) => disk.read(target, offsetBytes),
        labels: { ...provenanceOf(record), ...request.labels },
      };
      const folder = request.store ?? storeFolder;
      // A store on this host takes the unchanged blocks of a chunk from its own.
      const { manifest, ...result } =
        folder === undefined
          ? await uploadImage(nearParents(source, cache), options)
          : await withStore(folder, (store) =>
              commitImage(store, {
                ...options,
                readHere: (target, offsetBytes) => clone.readHere(target, offsetBytes),
              }),
            );
      return {
        ...result,
        store: folder ?? source.name,
        sizeBytes: manifest.sizeBytes,
        nonzeroBytes: manifest.nonzeroBytes,
      };
    },

    async commitMoment(snapshot, record, { reference, labels }) {
      const disk = snapshot as Snapshot;
      const standalone = record.detached !== undefined;
      const { digest, newStoredBytes } = await uploadImage(nearParents(source, cache), {
        parent: record.base,
        reference,
        sizeBytes: disk.sizeBytes,
        changed: (chunkBytes) => changedUnitsOf(disk.states, chunkBytes, standalone),
        isChanged: blockChangeIn(disk.states, standalone),
        standalone,
        read: (target, offsetBytes) => disk.readOnce(target, offsetBytes),
        labels: { ...provenanceOf(record), ...labels },
      });
      return { digest, newStoredBytes };
    },

    async export(disk, record, file, control) {
      const { labels } = await cache.readManifest(record.base);
      const about = {
        id: record.id,
        image: record.image,
        base: record.base,
        standalone: record.detached !== undefined,
        machine: Object.fromEntries(
          Object.entries(labels).filter(([key]) => key.startsWith('boot.') || key.startsWith('machine.')),
        ),
      };
      return exportArchive(file, (disk as Disk).clone, about, control);
    },

    async import({ file, name, image }, control) {
      const info = await readArchiveInfo(file);
      const wanted = image === undefined ? undefined : (await resolve(image)).digest;
      if (wanted !== undefined && wanted !== info.base) {
        throw new GridError(
          'wrong-base',
          `${file} belongs over ${info.base} (${info.image}), not over ${image} (${wanted})`,
        );
      }
      if (!info.standalone) await checkBase(info.base, info.sizeBytes, `${file} belongs over ${info.image}`);
      const { freeBytes } = await clones.space();
      if (info.dataBlocks * LAYER_BLOCK_BYTES > freeBytes) {
        throw new GridError(
          'no-space',
          `${file} holds ${info.dataBlocks * LAYER_BLOCK_BYTES} bytes of data, and ${freeBytes} are free`,
        );
      }
      return clones.create({
        image: info.image,
        base: info.base,
        sizeBytes: info.sizeBytes,
        name: name ?? info.id,
        kind: info.standalone ? 'full' : 'persistent',
        ...(info.standalone ? { detached: info.base } : {}),
        content: (chain) => fillFromArchive(file, chain, control),
      });
    },
  };

  async function checkBase(base: Digest, sizeBytes: number, what: string): Promise<void> {
    let manifest: Manifest;
    try {
      manifest = await cache.readManifest(base);
    } catch (cause) {
      if (!(cause instanceof GridError) || cause.code !== 'not-found') throw cause;
      throw new GridError('wrong-base', `${what}, ${base}, which the source of this proxy does not have`, {
        cause,
      });
    }
    if (sizeBytes < manifest.sizeBytes) throw new GridError('bad-format', `${what} and is smaller than that`);
  }
}

async function withStore<T>(folder: string, task: (store: Store) => Promise<T>): Promise<T> {
  const store = await openStore(folder);
  try {
    return await task(store);
  } finally {
    await store.close();
  }
}

async function fillFromArchive(file: string, chain: Chain, control: LongTask): Promise<void> {
  const layer = await openChain(chain);
  const clone = openClone(zeroImage(), layer);
  try {
    const target = {
      write: (bytes: Uint8Array, offsetBytes: number) => clone.write(bytes, offsetBytes),
      // Over the base, not over the nothing that the clone lies on now.
      zero: (first: number, count: number) => layer.trimBlocks(first, first + count - 1, Infinity),
    };
    await readArchive(path.resolve(file), target, control);
    await clone.flush();
  } finally {
    await clone.close();
  }
}

/** Labels that say where a committed version came from. */
function provenanceOf(record: CloneRecord): Record<string, string> {
  return {
    'commit.clone': record.id,
    'commit.image': record.image,
    'commit.host': os.hostname(),
    'commit.cloned': record.created,
  };
}
