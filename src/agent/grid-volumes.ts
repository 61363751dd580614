/**
 * Data volumes of a broker's users on this host. A volume's content is versions in the store (kind `data`); nothing but
 * what was written since the last of them is on one host, in a persistent clone that has the volume's name:
 *
 *   written to     that clone, over the version that the broker names; what it becomes is the next version (`save`):
 *                  when its VM has ended, with a checkpoint of the VM, or at a moment while it runs
 *   read only      a clone of a version that goes with the VM, as many as wanted on as many hosts
 *
 * After a save the clone stays: this host has the bytes and goes on with them, unless the broker says that another one
 * has (`drop`). Its record says which version it is, and by its generation whether anybody may have written since: 1 is
 * that version, 0 is more. Whether anybody may write, and to what, is the broker's matter.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { VOLUME_IMAGE } from '../core/grid.ts';
import type { CarriedVolume, SavedVolume, VolumeSave } from '../core/grid.ts';
import type { MachineDisk } from '../core/machine.ts';
import { Turns } from '../core/turns.ts';
import type { LinkVolumes } from './broker-orders.ts';
import type { Checkpoints } from './checkpoints.ts';
import type { DiskSnapshot } from './clone-parts.ts';
import type { CloneRecord } from './clone-record.ts';
import type { Clones } from './clones.ts';
import type { Forks } from './forks.ts';
import type { MachineCatalog } from './machine-parts.ts';
import type { Machines } from './machines.ts';
import type { VmStatus, VmVolume } from './vm-record.ts';
import type { Volumes } from './vm-volumes.ts';

/** Makes versions in the store behind the proxy; given by whoever wires the agent. */
export interface VolumeWork {
  /** `before`: the chunk table of the last version; where the disk's is the same, nothing is `made`. */
  save(
    snapshot: DiskSnapshot,
    record: CloneRecord,
    request: { reference: string; before?: Digest },
  ): Promise<{ made: boolean; digest: Digest; table: Digest; newStoredBytes: number }>;
  make(request: {
    reference: string;
    sizeBytes: number;
    from?: { digest: Digest };
  }): Promise<{ digest: Digest; newStoredBytes: number }>;
}

export interface GridVolumeParts {
  readonly machines: Machines;
  readonly checkpoints: Checkpoints;
  readonly forks: Forks;
  readonly volumes: Volumes;
  readonly clones: Clones;
  readonly catalog: MachineCatalog;
  readonly work: VolumeWork;
}

/** A VM that ends lets go of its clones a moment later. */
const FREE_MS = 20_000;
const FREE_POLL_MS = 50;
const CLEAN = 1;
const WRITTEN = 0;

export class GridVolumes implements LinkVolumes {
  readonly #parts: GridVolumeParts;
  readonly #turns = new Turns();

  constructor(parts: GridVolumeParts) {
    this.#parts = parts;
  }

  /** Plugs it into a VM that runs; an order that comes again finds it there. */
  async attach(vm: string, volume: CarriedVolume): Promise<void> {
    const { machines, volumes, clones } = this.#parts;
    const { name, readOnly } = volume;
    if (machines.status(vm).volumes.some((one) => one.name === name)) return;
    const clone = await this.#take(volume, vm);
    try {
      await volumes.attach(vm, { clone, name, readOnly });
    } catch (error) {
      if (readOnly) await clones.discard(clone);
      throw error;
    }
  }

  async detach(vm: string, name: string): Promise<void> {
    const { machines, volumes } = this.#parts;
    if (machines.status(vm).volumes.some((one) => one.name === name)) await volumes.detach(vm, name);
  }

  async make(request: { reference: string; sizeBytes: number; from?: string }) {
    const { work, catalog } = this.#parts;
    const { from, ...wanted } = request;
    return work.make({ ...wanted, ...(from === undefined ? {} : { from: await catalog.resolve(from) }) });
  }

  /** What was written to it here becomes `reference`. `last`: nobody writes to it any more. */
  save(volume: string, reference: string, last: boolean): Promise<SavedVolume> {
    return this.#turns.run(volume, async () => {
      if (!this.#has(volume)) return { id: volume, storedBytes: 0 };
      if (last) await this.#untilFree(volume);
      const saved = await this.#saveNow(volume, reference);
      if (last) await this.#mark(volume, CLEAN);
      return saved;
    });
  }

  async #saveNow(volume: string, reference: string): Promise<SavedVolume> {
    const { clones, work, catalog } = this.#parts;
    const { pushed } = clones.get(volume);
    if (pushed?.reference === reference && pushed.manifest !== undefined)
      return { id: volume, reference, manifest: pushed.manifest, storedBytes: 0 };
    return clones.atMoment(volume, async (snapshot, record) => {
      const base = (await catalog.manifestOf(record.base)).manifest;
      const known = base.sizeBytes === record.sizeBytes ? base.table : undefined;
      const before = record.pushed?.table ?? known;
      const saved = await work.save(snapshot, record, {
        reference,
        ...(before === undefined ? {} : { before }),
      });
      if (!saved.made)
        return { id: volume, manifest: record.pushed?.manifest ?? record.base, storedBytes: 0 };
      const { digest, table, newStoredBytes } = saved;
      await clones.setPushed(volume, {
        reference,
        lineage: digest.slice(0, 32),
        generation: WRITTEN,
        manifest: digest,
        table,
      });
      return { id: volume, reference, manifest: digest, storedBytes: newStoredBytes };
    });
  }

  /** On record when it resolves. */
  async #mark(volume: string, generation: number): Promise<void> {
    const { clones } = this.#parts;
    const { pushed } = clones.get(volume);
    if (pushed !== undefined && pushed.generation !== generation)
      await clones.setPushed(volume, { ...pushed, generation });
  }

  drop(volume: string): Promise<void> {
    return this.#turns.run(volume, async () => {
      if (!this.#has(volume)) return;
      await this.#untilFree(volume);
      await this.#parts.clones.remove(volume);
    });
  }

  /** A checkpoint of a suspended VM, with what it wrote to its volumes. `over`: it does not go on here. */
  async publish(id: string, reference: string, saves: readonly VolumeSave[], over: boolean) {
    const saved: SavedVolume[] = [];
    const keep = async (volumes: readonly VmVolume[], disks: readonly MachineDisk[]) => {
      const carried: CarriedVolume[] = [];
      for (const volume of volumes) carried.push(await this.#keep(volume, disks, saves, saved));
      return carried;
    };
    const { digest, newStoredBytes } = await this.#parts.checkpoints.publish(id, reference, false, keep);
    if (over) for (const one of saved) await this.#mark(one.id, CLEAN);
    return { digest, newStoredBytes, ...(saved.length === 0 ? {} : { saved }) };
  }

  async #keep(
    { name, clone }: VmVolume,
    disks: readonly MachineDisk[],
    saves: readonly VolumeSave[],
    saved: SavedVolume[],
  ): Promise<CarriedVolume> {
    const { base, sizeBytes, image } = this.#parts.clones.get(clone);
    const wanted = saves.find((one) => one.id === clone);
    if (wanted !== undefined) {
      const one = await this.save(clone, wanted.reference, false);
      saved.push(one);
      return { id: clone, name, manifest: one.manifest!, sizeBytes, readOnly: false };
    }
    if (disks.find(({ id }) => id === name)?.readOnly !== true) {
      throw new GridError(
        'bad-request',
        `volume '${name}' is none of the broker's, and no checkpoint holds it; detach it`,
      );
    }
    return { id: image, name, manifest: base, sizeBytes, readOnly: true };
  }

  /** A VM that goes on from a checkpoint, with the volumes that it had. */
  runFrom(checkpoint: string, name: string): Promise<VmStatus> {
    return this.#parts.forks.run(checkpoint, name, true, (volume) => this.#take(volume, name));
  }

  /** The clone that a VM is to have for it. */
  async #take(volume: CarriedVolume, vm: string): Promise<string> {
    const { clones, catalog } = this.#parts;
    const { id, manifest: base, sizeBytes, readOnly } = volume;
    if (!VOLUME_IMAGE.test(id) || !isDigest(base))
      throw new GridError('bad-request', `'${id}' cannot be a volume`);
    await catalog.manifestOf(base);
    const content = { image: id, base, sizeBytes };
    if (readOnly) return (await clones.create({ ...content, vm })).id;
    return this.#turns.run(id, async () => {
      if (this.#has(id)) {
        await this.#untilFree(id);
        const there = clones.get(id);
        const isThat = there.pushed?.manifest === base && there.pushed.generation === CLEAN;
        if (isThat && there.sizeBytes === sizeBytes) {
          await this.#mark(id, WRITTEN);
          return id;
        }
        await clones.remove(id); // of an earlier time: the broker knows of a later version
      }
      return (await clones.create({ ...content, name: id, kind: 'persistent' })).id;
    });
  }

  #has(volume: string): boolean {
    return this.#parts.clones.records().some(({ id }) => id === volume);
  }

  async #untilFree(volume: string): Promise<void> {
    const { clones } = this.#parts;
    for (const endMs = performance.now() + FREE_MS; ; await sleep(FREE_POLL_MS)) {
      try {
        return await clones.exclusive(volume, 'looked at', async () => undefined);
      } catch (error) {
        const busy = error instanceof GridError && error.code === 'in-use';
        if (!busy || performance.now() > endMs) throw error;
      }
    }
  }
}
