/**
 * VMs that go on from a checkpoint in the store, each as a machine of its own: a disk clone each over the checkpoint's
 * disk, and its one memory image, which all of them have mapped privately and so share as long as they do not write.
 */
import { open, rm } from 'node:fs/promises';
import path from 'node:path';
import { isDigest, type Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import type { CarriedVolume } from '../core/grid.ts';
import type { Machine, MachineDescription, Vmm } from '../core/machine.ts';
import { findBase } from './base-checkpoints.ts';
import type { BaseRequest } from './base-checkpoints.ts';
import { CHECKPOINT_FILE_BYTES_MAX, parseCheckpoint } from './checkpoint-file.ts';
import type { Checkpoint } from './checkpoint-file.ts';
import type { Clones } from './clones.ts';
import { isolated, relocated, renamed, sameUnder } from './machine-description.ts';
import type { MachineCatalog } from './machine-parts.ts';
import type { Machines } from './machines.ts';
import type { Rehearsal } from './rehearsal.ts';
import type { VmStatus, VmVolume } from './vm-record.ts';

/** Parts of a checkpoint's manifest, beside the memory that it is of. */
export const PART_DISK = 'disk';
export const PART_STATE = 'state';

/** Gives the clone that a VM is to have for a volume. */
export type TakeVolume = (volume: CarriedVolume) => Promise<string>;

type Resolved = Awaited<ReturnType<MachineCatalog['resolve']>>;

interface ForkRequest {
  readonly reference: string;
  readonly name: string | undefined;
  readonly same: boolean;
  readonly take: TakeVolume | undefined;
  readonly rehearsal?: Rehearsal;
  readonly requestedAtMs: number;
}

export class Forks {
  readonly #vmm: Vmm;
  readonly #machines: Machines;
  readonly #clones: Clones;
  readonly #catalog: MachineCatalog;

  constructor(parts: { vmm: Vmm; machines: Machines; clones: Clones; catalog: MachineCatalog }) {
    this.#vmm = parts.vmm;
    this.#machines = parts.machines;
    this.#clones = parts.clones;
    this.#catalog = parts.catalog;
  }

  /** The checkpoint from which such a VM need not boot. Throws not-found, saying why there is none. */
  findBase(request: BaseRequest): Promise<string> {
    return findBase(this.#catalog, request);
  }

  /** A VM that goes on from a checkpoint in the store: as another machine than any other that does, or as the `same`
   * one, for a VM that has ended elsewhere. `take` gives the clones of its volumes; without it each is one that goes
   * with the VM. Throws bad-request (no checkpoint), bad-format, corrupt, unsupported (made for
   * another machine), vm-failed. */
  async run(reference: string, name: string | undefined, same = false, take?: TakeVolume): Promise<VmStatus> {
    const requestedAtMs = performance.now();
    const run = (resolved: Resolved) => this.#run(resolved, { reference, name, same, take, requestedAtMs });
    if (take) return run(await this.#catalog.resolve(reference));
    // What the name means is asked beside all else: before the guest goes on it is looked up again.
    const recent = await this.#catalog.resolve(reference, true);
    try {
      return await run(recent);
    } catch (error) {
      const now = await this.#catalog.resolve(reference).catch(() => recent);
      if (now.digest === recent.digest) throw error;
      return run(now);
    }
  }

  /** As `run`, of a machine that is isolated (rehearsal.ts). Throws unsupported for one that is on a bridge. */
  async rehearse(reference: string, rehearsal: Rehearsal): Promise<VmStatus> {
    const resolved = await this.#catalog.resolve(reference);
    const [requestedAtMs, { name }] = [performance.now(), rehearsal];
    return this.#run(resolved, { reference, name, same: false, take: undefined, rehearsal, requestedAtMs });
  }

  async #run(resolved: Resolved, request: ForkRequest): Promise<VmStatus> {
    const { reference, name, same, take, rehearsal, requestedAtMs } = request;
    const { digest, manifest, folder: imageFolder } = resolved;
    const { [PART_DISK]: diskDigest, [PART_STATE]: stateDigest } = manifest.parts;
    if (manifest.kind !== 'memory' || diskDigest === undefined || stateDigest === undefined) {
      throw new GridError('bad-request', `${reference} is no checkpoint but of kind '${manifest.kind}'`);
    }
    const id = this.#machines.reserve(name);
    const file = path.join(imageFolder, 'memory.raw');
    // QEMU looks at the disk before its guest goes on; little of it is needed.
    const opens = [diskDigest, digest];
    // Each of what follows waits for the link once or more: none waits for another that it does not need.
    const expected = this.#machines.expect(opens, { file, image: digest });
    const start = expected && rehearsal ? rehearsal.watch(expected) : expected;
    const reading = this.#checkpoint(reference, stateDigest);
    reading.catch(() => undefined);
    let clone: string | undefined;
    const volumes: VmVolume[] = [];
    try {
      const disk = await this.#catalog.manifest(diskDigest);
      ({ id: clone } = await this.#clones.create({
        image: reference,
        base: diskDigest,
        sizeBytes: disk.sizeBytes,
        name: `${id}-disk`,
        vm: id,
      }));
      const checkpoint = await reading;
      const { facts } = checkpoint;
      if (manifest.sizeBytes !== facts.description.memoryBytes) {
        throw new GridError('bad-format', `the memory of ${reference} has not the size that its state says`);
      }
      for (const volume of facts.volumes ?? []) volumes.push(await this.#attached(volume, id, take));
      const here = this.#withVolumes(relocated(facts.description, this.#catalog.diskOf(clone)), volumes);
      const description = same ? sameUnder(here, id) : renamed(rehearsal ? isolated(here) : here, id);
      return await this.#machines.launch({
        id,
        image: reference,
        clone,
        discards: true,
        ...(description.readyText === undefined ? {} : { readyText: description.readyText }),
        memory: { file, image: digest },
        ...(same ? { same } : {}),
        ...(rehearsal ? { rehearsal: true } : {}),
        ...(volumes.length === 0 ? {} : { volumes }),
        ...(facts.nonce === undefined ? {} : { nonce: facts.nonce }),
        requestedAtMs,
        clonedMs: performance.now() - requestedAtMs,
        opens,
        start,
        begin: (folder) => resumeMachine(this.#vmm, checkpoint, description, folder, file),
        proceed: async (machine) => {
          // The file was opened by its name: it must still be what the state belongs to.
          if ((await this.#catalog.resolve(reference)).digest !== digest) {
            throw new GridError(
              'wrong-base',
              `${reference} was moved to another checkpoint meanwhile; try again`,
            );
          }
          await machine.proceed();
        },
      });
    } catch (error) {
      start?.gone();
      this.#machines.unreserve(id);
      if (clone !== undefined) await this.#clones.discard(clone);
      for (const volume of volumes) {
        if (volume.discards) await this.#clones.discard(volume.clone);
        else this.#machines.unclaim(volume.clone);
      }
      throw error;
    }
  }

  /** What belongs to the memory image. Throws bad-format and what reading it throws. */
  async #checkpoint(reference: string, stateDigest: Digest): Promise<Checkpoint> {
    const { sizeBytes } = await this.#catalog.manifest(stateDigest);
    if (sizeBytes > CHECKPOINT_FILE_BYTES_MAX) {
      throw new GridError('bad-format', `the state of ${reference} has ${sizeBytes} bytes`);
    }
    return parseCheckpoint(await this.#catalog.read(stateDigest, sizeBytes), `the state of ${reference}`);
  }

  async #attached(volume: CarriedVolume, vm: string, take: TakeVolume | undefined): Promise<VmVolume> {
    const { id: image, name, manifest: base, sizeBytes } = volume;
    if (!isDigest(base)) throw new GridError('bad-format', `volume '${name}' of ${vm} has no digest`);
    const clone = (await take?.(volume)) ?? (await this.#clones.create({ image, base, sizeBytes, vm })).id;
    const discards = this.#clones.get(clone).kind === 'non-persistent';
    if (!discards) this.#machines.claim(clone);
    return { name, image, clone, discards };
  }

  #withVolumes(description: MachineDescription, volumes: readonly VmVolume[]): MachineDescription {
    const disks = description.disks.map((disk) => {
      const volume = volumes.find(({ name }) => name === disk.id);
      return volume === undefined ? disk : { ...disk, path: this.#catalog.diskOf(volume.clone) };
    });
    return { ...description, disks };
  }
}

/** A machine as the checkpoint has it, paused; `description` may say that it is another one now. */
export async function resumeMachine(
  vmm: Vmm,
  { facts, deviceState: state }: Checkpoint,
  description: MachineDescription,
  folder: string,
  memory: string,
): Promise<Machine> {
  const deviceState = path.join(folder, 'checkpoint.state');
  try {
    await using file = await open(deviceState, 'w', 0o600);
    await file.writeFile(state);
    return await vmm.resume(description, folder, { memory, deviceState }, facts.compatibility);
  } finally {
    await rm(deviceState, { force: true });
  }
}
