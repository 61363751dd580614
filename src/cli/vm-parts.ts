/** Wiring of VMs and checkpoints: machines over the mount; clones of disk and memory become versions in the store behind
 * the proxy. */
import path from 'node:path';
import type { Cache } from '../../cache/index.ts';
import { Checkpoints } from '../agent/checkpoints.ts';
import type { CloneRecord } from '../agent/clone-record.ts';
import type { Clones } from '../agent/clones.ts';
import { GridVolumes } from '../agent/grid-volumes.ts';
import type { VolumeWork } from '../agent/grid-volumes.ts';
import { Forks, PART_DISK, PART_STATE } from '../agent/forks.ts';
import { Machines } from '../agent/machines.ts';
import type { CheckpointWork, MachineCatalog } from '../agent/machine-parts.ts';
import { prepareToReadPages } from '../agent/pages-ahead.ts';
import { createStarts } from '../agent/starts.ts';
import { Spending } from '../agent/vm-spending.ts';
import { Volumes } from '../agent/vm-volumes.ts';
import { sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { CHUNK_BYTES_DEFAULT, MEMORY_CHUNK_BYTES } from '../core/limits.ts';
import { parseReference } from '../core/manifest.ts';
import type { Tag } from '../core/manifest.ts';
import type { ChunkSource } from '../core/source.ts';
import { blockChangeIn, changedUnits, changedUnitsOf } from '../image/index.ts';
import type { Snapshot } from '../image/index.ts';
import { uploadImage, uploadVersion } from '../store/index.ts';
import { Cgroups, createMachines } from '../vmm/index.ts';
import type { Disk } from './clone-parts.ts';
import { nearParents } from './clone-push.ts';
import type { ProxyPaths } from './paths.ts';
import { HostSegments } from './segments.ts';

export interface MachineParts {
  readonly cache: Cache;
  readonly clones: Clones;
  readonly source: ChunkSource;
  readonly mountpoint: string;
  readonly paths: ProxyPaths;
  readonly accelerator: 'auto' | 'kvm' | 'tcg';
  readonly profiles: boolean;
  /** Path of the control group that the proxy and its VMs are put below. */
  readonly cgroup?: string;
  readonly resolve: MachineCatalog['resolve'];
  readonly imageFolderOf: (tag: Tag) => string;
  readonly log: (line: string) => void;
}

export interface MachineWork {
  readonly machines: Machines;
  readonly checkpoints: Checkpoints;
  readonly forks: Forks;
  readonly volumes: Volumes;
  readonly gridVolumes: GridVolumes;
  readonly spending: Spending;
  readonly segments: HostSegments;
  /** Before the mount. `takeover`: it is there already. */
  prepare(takeover: boolean): Promise<void>;
  /** When the mount answers. */
  goOn(takeover: boolean): Promise<void>;
}

export async function machineWork(parts: MachineParts): Promise<MachineWork> {
  const { cache, clones, source, mountpoint, paths, log } = parts;
  const groups = parts.cgroup === undefined ? undefined : await Cgroups.open(parts.cgroup);
  await groups?.place('proxy', process.pid);
  const vmm = createMachines({ accelerator: parts.accelerator, log });
  const catalog: MachineCatalog = {
    resolve: parts.resolve,
    async manifestOf(digest) {
      const tag = (await cache.listTags()).find((one) => one.manifest === digest);
      return { manifest: await cache.readManifest(digest), folder: tag && parts.imageFolderOf(tag) };
    },
    manifest: (digest) => cache.readManifest(digest),
    read: (digest, lengthBytes) => readContent(cache, digest, lengthBytes),
    diskOf: (id) => path.join(mountpoint, 'clones', id, 'disk.raw'),
  };
  const segments = new HostSegments(log);
  const machines = new Machines({
    vmm,
    segments,
    folder: path.join(paths.runtime, 'vms'),
    clones,
    catalog,
    log,
    ...(groups === undefined ? {} : { groups }),
    starts: createStarts(cache, parts.profiles, log),
  });
  const checkpoints = new Checkpoints({
    vmm,
    folder: path.join(paths.state, 'vms'),
    machines,
    clones,
    catalog,
    work: checkpointWork(source, catalog),
    log,
  });
  let kept = new Set<string>();
  const spending = new Spending({
    records: () => machines.records(),
    clones: () => clones.usages(),
    images: async () => (await cache.status()).images,
    cpuSeconds: () => {
      const { user, system } = process.cpuUsage();
      return (user + system) / 1e6;
    },
  });
  spending.start();
  const volumes = new Volumes({ machines, clones, catalog });
  const forks = new Forks({ vmm, machines, clones, catalog });
  return {
    machines,
    spending,
    checkpoints,
    volumes,
    gridVolumes: new GridVolumes({
      ...{ machines, checkpoints, forks, volumes, clones, catalog },
      work: volumeWork(cache, source),
    }),
    segments,
    forks,
    async prepare(takeover) {
      vmm.prepare?.();
      prepareToReadPages();
      kept = await checkpoints.load();
      if (!takeover) await machines.cleanUp(kept);
    },
    async goOn(takeover) {
      if (takeover) await machines.adopt(kept, (id) => checkpoints.forget(id));
    },
  };
}

async function readContent(cache: Cache, digest: Digest, lengthBytes: number): Promise<Buffer> {
  const image = await cache.openImage(digest);
  try {
    const bytes = Buffer.alloc(lengthBytes);
    await image.read(bytes, 0);
    return bytes;
  } finally {
    await image.close();
  }
}

/** Of the version of a disk: it says what the checkpoint's disk was made of. */
const LABEL_CHECKPOINT = 'checkpoint';

function checkpointWork(source: ChunkSource, catalog: MachineCatalog): CheckpointWork {
  const manifestAt = async (reference: string) => {
    try {
      return (await catalog.resolve(reference)).manifest;
    } catch (error) {
      if (error instanceof GridError && error.code === 'not-found') return undefined;
      throw error;
    }
  };
  return {
    async check(reference) {
      const { name, version } = parseReference(reference);
      const taken = (what: string, kind: string) =>
        new GridError(
          'exists',
          `${what} is the name of an image of kind '${kind}'; call the checkpoint something else`,
        );
      const there = await manifestAt(reference);
      if (there && there.kind !== 'memory') throw taken(reference, there.kind);
      for (const part of [PART_DISK, PART_STATE]) {
        const own = `${name}.${part}:${version}`;
        const other = await manifestAt(own);
        if (other && other.labels[LABEL_CHECKPOINT] !== `${name}:${version}`) throw taken(own, other.kind);
      }
      if (!source.uploads) throw new GridError('denied', `${source.name} takes no uploads`);
      await source.uploads.findChunks([sha256(Buffer.alloc(0))]);
    },
    async publish({ reference, disk, diskRecord, memory, memoryRecord, state, labels: more }) {
      const { name, version } = parseReference(reference);
      const labels = { [LABEL_CHECKPOINT]: `${name}:${version}` };
      const { clone: diskClone } = disk as Disk;
      const disks = await uploadImage(source, {
        parent: diskRecord.base,
        reference: `${name}.disk:${version}`,
        sizeBytes: disk.sizeBytes,
        standalone: isStandalone(diskRecord),
        changed: (chunkBytes) => changedUnits(diskClone, chunkBytes, isStandalone(diskRecord)),
        read: (target, offsetBytes) => disk.read(target, offsetBytes),
        labels,
      });
      const states = await uploadVersion(source, {
        reference: `${name}.state:${version}`,
        kind: 'state',
        sizeBytes: state.length,
        chunkBytes: CHUNK_BYTES_DEFAULT,
        changed: (chunkBytes) =>
          Array.from({ length: Math.ceil(state.length / chunkBytes) }, (_, index) => index),
        async read(target, offsetBytes) {
          target.set(state.subarray(offsetBytes, offsetBytes + target.length));
        },
        labels,
      });
      const { clone: memoryClone } = memory as Disk;
      const standalone = isStandalone(memoryRecord);
      const memories = await uploadVersion(source, {
        reference,
        kind: 'memory',
        sizeBytes: memory.sizeBytes,
        chunkBytes: MEMORY_CHUNK_BYTES,
        ...(standalone ? {} : { parent: memoryRecord.base }),
        changed: (chunkBytes) => changedUnits(memoryClone, chunkBytes, standalone),
        read: (target, offsetBytes) => memory.read(target, offsetBytes),
        labels: { ...labels, ...more },
        parts: { [PART_DISK]: disks.digest, [PART_STATE]: states.digest },
      });
      const all = [disks, states, memories];
      return {
        digest: memories.digest,
        newChunks: all.reduce((sum, { newChunks }) => sum + newChunks, 0),
        newStoredBytes: all.reduce((sum, { newStoredBytes }) => sum + newStoredBytes, 0),
      };
    },
  };
}

/** Volumes as versions in the source. */
export function volumeWork(cache: Cache, source: ChunkSource): VolumeWork {
  return {
    async save(snapshot, record, { reference, before }) {
      const disk = snapshot as Snapshot;
      const standalone = isStandalone(record);
      const { digest, manifest, tag, newStoredBytes } = await uploadImage(nearParents(source, cache), {
        parent: record.base,
        reference,
        sizeBytes: disk.sizeBytes,
        standalone,
        changed: (chunkBytes) => changedUnitsOf(disk.states, chunkBytes, standalone),
        isChanged: blockChangeIn(disk.states, standalone),
        read: (target, offsetBytes) => disk.readOnce(target, offsetBytes),
        ...(before === undefined ? {} : { before }),
      });
      return { made: tag !== undefined, digest, table: manifest.table, newStoredBytes };
    },
    async make({ reference, sizeBytes, from }) {
      const image = from && (await cache.openImage(from.digest));
      try {
        return await uploadVersion(nearParents(source, cache), {
          reference,
          kind: 'data',
          sizeBytes,
          chunkBytes: CHUNK_BYTES_DEFAULT,
          ...(from === undefined ? {} : { parent: from.digest }),
          changed: () => [],
          // Of a last chunk that is short in the parent and longer here.
          async read(target, offsetBytes) {
            const there = Math.max(0, Math.min(target.length, (image?.sizeBytes ?? 0) - offsetBytes));
            await image?.read(target.subarray(0, there), offsetBytes);
            target.fill(0, there);
          },
        });
      } finally {
        await image?.close();
      }
    },
  };
}

/** Whether it needs nothing of its base. */
function isStandalone(record: CloneRecord): boolean {
  return record.detached !== undefined;
}
