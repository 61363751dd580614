/**
 * Data volumes: disks beside the system's, attached to a VM that runs and detached from it. A volume is a clone: one that
 * somebody made, which stays when the VM goes, or a new one of an image, which goes when it is detached or with the VM.
 * The VM's record names it before the machine has it, so that a clone which a killed daemon leaves is known.
 */
import { isName } from '../core/manifest.ts';
import { GridError } from '../core/errors.ts';
import { NAME_LENGTH_MAX } from '../core/limits.ts';
import type { Clones } from './clones.ts';
import type { MachineCatalog } from './machine-parts.ts';
import type { Machines } from './machines.ts';
import { writeVmRecord } from './vm-record.ts';
import type { Vm, VmVolume } from './vm-record.ts';

export interface AttachRequest {
  /** name:version to make a non-persistent clone of; or … */
  readonly image?: string;
  /** … a clone that is there already. */
  readonly clone?: string;
  /** What the guest finds it by; the name of the image or clone when left out. */
  readonly name?: string;
  readonly readOnly?: boolean;
}

export const DETACH_TIMEOUT_MS = 30_000;

export class Volumes {
  readonly #machines: Machines;
  readonly #clones: Clones;
  readonly #catalog: MachineCatalog;

  constructor(parts: { machines: Machines; clones: Clones; catalog: MachineCatalog }) {
    this.#machines = parts.machines;
    this.#clones = parts.clones;
    this.#catalog = parts.catalog;
  }

  /** Throws bad-request, exists, not-found, in-use, vm-failed; nothing is left then. */
  async attach(id: string, request: AttachRequest): Promise<VmVolume> {
    const { image, clone: given, readOnly = false } = request;
    if ((image === undefined) === (given === undefined))
      throw new GridError('bad-request', 'name either an image to clone or a clone to attach');
    const name = request.name ?? given ?? image!.split(':')[0]!;
    if (!isName(name)) throw new GridError('bad-request', `'${String(name)}' cannot be a volume's name`);
    return this.#changing(id, async (vm) => {
      if (vm.record.volumes?.some((one) => one.name === name))
        throw new GridError('exists', `VM '${id}' has a volume '${name}' already`);
      if (given !== undefined) this.#machines.claim(given);
      let made: string | undefined;
      try {
        if (image !== undefined) made = await this.#cloneOf(image, id, name);
        const clone = given ?? made!;
        const discards = this.#clones.get(clone).kind === 'non-persistent';
        const volume: VmVolume = { name, image: image ?? this.#clones.get(clone).image, clone, discards };
        const before = vm.record;
        await this.#write(vm, [...(before.volumes ?? []), volume]);
        try {
          const path = this.#catalog.diskOf(clone);
          await vm.machine.attach({ id: name, path, format: 'raw', readOnly });
        } catch (error) {
          await this.#write(vm, before.volumes);
          throw error;
        }
        return volume;
      } catch (error) {
        if (given !== undefined) this.#machines.unclaim(given);
        if (made !== undefined) await this.#clones.discard(made);
        throw error;
      }
    });
  }

  /** Throws not-found, in-use, and timeout when the guest does not let go of it. */
  detach(id: string, name: string, timeoutMs = DETACH_TIMEOUT_MS): Promise<VmVolume> {
    return this.#changing(id, async (vm) => {
      const volume = vm.record.volumes?.find((one) => one.name === name);
      if (volume === undefined) throw new GridError('not-found', `VM '${id}' has no volume '${name}'`);
      await vm.machine.detach(name, timeoutMs);
      await this.#write(
        vm,
        vm.record.volumes!.filter((one) => one !== volume),
      );
      this.#machines.unclaim(volume.clone);
      if (volume.discards) await this.#clones.discard(volume.clone);
      return volume;
    });
  }

  async #changing<T>(id: string, task: (vm: Vm) => Promise<T>): Promise<T> {
    const vm = this.#machines.find(id);
    vm.busy = 'changed';
    try {
      return await task(vm);
    } finally {
      delete vm.busy;
    }
  }

  async #cloneOf(image: string, vm: string, volume: string): Promise<string> {
    const { digest, manifest } = await this.#catalog.resolve(image);
    if (manifest.kind !== 'data' && manifest.kind !== 'disk')
      throw new GridError(
        'bad-request',
        `${image} is of kind '${manifest.kind}'; a volume is data or a disk`,
      );
    const name = `${vm}-${volume}`;
    const made = await this.#clones.create({
      image,
      base: digest,
      sizeBytes: manifest.sizeBytes,
      ...(name.length > NAME_LENGTH_MAX ? {} : { name }),
      vm,
    });
    return made.id;
  }

  async #write(vm: Vm, volumes: readonly VmVolume[] | undefined): Promise<void> {
    const { volumes: _before, ...record } = vm.record;
    const next = volumes === undefined || volumes.length === 0 ? record : { ...record, volumes };
    await writeVmRecord(vm.folder, next);
    vm.record = next;
  }
}
