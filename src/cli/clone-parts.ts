/** Wiring of clones: layers and archives of src/image over images of the cache, and commits into a store. */
import os from 'node:os';
import path from 'node:path';
import type { Cache } from '../../cache/index.ts';
import type { CloneDisk, CloneParts } from '../agent/clone-parts.ts';
import type { CloneRecord } from '../agent/clone-record.ts';
import type { CloneWork } from '../agent/clone-routes.ts';
import type { Clones } from '../agent/clones.ts';
import type { Digest } from '../core/bytes.ts';
import { ChunkTable } from '../core/chunk-table.ts';
import { GridError } from '../core/errors.ts';
import { LAYER_BLOCK_BYTES } from '../core/limits.ts';
import type { Manifest } from '../core/manifest.ts';
import {
  blockChangeOf,
  changedUnits,
  createLayerOver,
  exportArchive,
  openChain,
  openClone,
  readArchive,
  readArchiveInfo,
  zeroImage,
} from '../image/index.ts';
import type { Chain, Clone } from '../image/index.ts';
import { commitImage, openStore } from '../store/index.ts';

/** A `Clone` behind the agent's contract; the agent hands it back for commit and export. */
type Disk = CloneDisk & { readonly clone: Clone };

export function cloneParts(cache: Cache): CloneParts {
  return {
    createLayer: createLayerOver,
    async openDisk(chain, image): Promise<Disk> {
      const base = image === undefined ? zeroImage() : await cache.openImage(image);
      try {
        return diskOf(openClone(base, await openChain(chain)), cache, image);
      } catch (error) {
        await base.close();
        throw error;
      }
    },
  };
}

function diskOf(clone: Clone, cache: Cache, image: Digest | undefined): Disk {
  const { layer } = clone;
  return {
    clone,
    sizeBytes: clone.sizeBytes,
    writable: true,
    direct: clone.direct,
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
  const table = ChunkTable.parse(await cache.asSource().readTable(manifest.table), manifest.table);
  return [...table.extents()].map(([first, chunks]) => [
    first * manifest.chunkBytes,
    Math.min((first + chunks) * manifest.chunkBytes, manifest.sizeBytes),
  ]);
}

export interface CloneWorkParts {
  readonly cache: Cache;
  readonly clones: Clones;
  /** The proxy's source when it is a folder on this host. */
  readonly storeFolder: string | undefined;
  readonly resolve: (reference: string) => Promise<{ digest: Digest; manifest: Manifest }>;
}

export function cloneWork({ cache, clones, storeFolder, resolve }: CloneWorkParts): CloneWork {
  return {
    async commit(disk, record, request) {
      const folder = request.store ?? storeFolder;
      if (folder === undefined) {
        throw new GridError(
          'bad-request',
          'the images come over the network; name a store on this host that has the base, with --store FOLDER',
        );
      }
      const { clone } = disk as Disk;
      const store = await openStore(folder);
      const standalone = record.detached !== undefined;
      try {
        const { manifest, ...result } = await commitImage(store, {
          parent: record.base,
          reference: request.reference,
          sizeBytes: disk.sizeBytes,
          changed: (chunkBytes) => changedUnits(clone, chunkBytes, standalone),
          isChanged: blockChangeOf(clone, standalone),
          standalone,
          read: (target, offsetBytes) => disk.read(target, offsetBytes),
          labels: { ...provenanceOf(record), ...request.labels },
        });
        return {
          ...result,
          store: store.name,
          sizeBytes: manifest.sizeBytes,
          nonzeroBytes: manifest.nonzeroBytes,
        };
      } finally {
        await store.close();
      }
    },

    async export(disk, record, file) {
      const { labels } = await cache.readManifest(record.base);
      return exportArchive(file, (disk as Disk).clone, {
        id: record.id,
        image: record.image,
        base: record.base,
        standalone: record.detached !== undefined,
        machine: Object.fromEntries(
          Object.entries(labels).filter(([key]) => key.startsWith('boot.') || key.startsWith('machine.')),
        ),
      });
    },

    async import({ file, name, image }) {
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
        content: (chain) => fillFromArchive(file, chain),
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

async function fillFromArchive(file: string, chain: Chain): Promise<void> {
  const layer = await openChain(chain);
  const clone = openClone(zeroImage(), layer);
  try {
    await readArchive(path.resolve(file), {
      write: (bytes, offsetBytes) => clone.write(bytes, offsetBytes),
      // Over the base, not over the nothing that the clone lies on now.
      zero: (first, count) => layer.trimBlocks(first, first + count - 1, Infinity),
    });
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
