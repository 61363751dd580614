/**
 * Suspended VMs and checkpoints. Memory is a disk like any other: a suspended VM's is a clone, whose layer takes what
 * the guest changed over the memory image that it was resumed from (or over nothing, when it was booted), so that it
 * is written, forked and published as disks are. A resumed VM maps it privately through the mount.
 *
 *   suspend  pause → device state, changed pages → checkpoint file → end the machine → seal the clones
 *   resume   seals → machine, paused → the checkpoint file goes → run.  A VM is suspended or runs, never both.
 *   publish  disk, state and memory become versions NAME.disk, NAME.state and NAME of a store; the last one names the
 *            others by digest, so all of it is bound together; forks.ts makes VMs of it
 *
 * `STATE/vms/ID` is the checkpoint file of a suspended VM. Its clones are held: nobody else can open or remove them.
 */
import { mkdir, open, readdir, readFile, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { sha256 } from '../core/bytes.ts';
import { asGridError, GridError } from '../core/errors.ts';
import type { CarriedVolume } from '../core/grid.ts';
import type { MachineDescription, MachineDisk, Vmm } from '../core/machine.ts';
import { isName } from '../core/manifest.ts';
import { baseLabels } from './base-checkpoints.ts';
import { encodeCheckpoint, parseCheckpoint } from './checkpoint-file.ts';
import type { Checkpoint, CheckpointFacts } from './checkpoint-file.ts';
import { syncFolder } from './clone-record.ts';
import type { Clones } from './clones.ts';
import { resumeMachine } from './forks.ts';
import type { CheckpointWork, MachineCatalog, PublishedCheckpoint } from './machine-parts.ts';
import type { Machines } from './machines.ts';
import { contentSeal, quickSeal } from './seals.ts';
import { checkedVmRecord, disksOf } from './vm-record.ts';
import { askGuest, newNonce } from './vm-answer.ts';
import type { Vm, VmMemory, VmRecord, VmStatus, VmVolume } from './vm-record.ts';

/** A guest that does not say a word in this time is suspended without one. */
const ANSWER_MS = 5_000;

export interface Suspended {
  readonly id: string;
  /** Of memory: see MachineCapture. */
  readonly memoryWrittenBytes: number;
  /** How long the guest had stood still when all of it was on disk. */
  readonly pausedMs: number;
}

/** Makes versions of the volumes of a VM that stands still; these are its own from then on. */
export type KeepVolumes = (
  volumes: readonly VmVolume[],
  disks: readonly MachineDisk[],
) => Promise<readonly CarriedVolume[]>;

type Local = NonNullable<CheckpointFacts['local']>;
type LocalCheckpoint = Checkpoint & { readonly facts: CheckpointFacts & { readonly local: Local } };

export class Checkpoints {
  readonly #vmm: Vmm;
  readonly #folder: string;
  readonly #machines: Machines;
  readonly #clones: Clones;
  readonly #catalog: MachineCatalog;
  readonly #work: CheckpointWork;
  readonly #log: (line: string) => void;
  readonly #suspended = new Map<string, LocalCheckpoint>();
  /** Suspended VMs that something is done to. */
  readonly #busy = new Set<string>();

  constructor(parts: {
    vmm: Vmm;
    /** Must be kept, as clones are. */
    folder: string;
    machines: Machines;
    clones: Clones;
    catalog: MachineCatalog;
    work: CheckpointWork;
    log: (line: string) => void;
  }) {
    this.#vmm = parts.vmm;
    this.#folder = parts.folder;
    this.#machines = parts.machines;
    this.#clones = parts.clones;
    this.#catalog = parts.catalog;
    this.#work = parts.work;
    this.#log = parts.log;
  }

  /** Reads what is suspended and holds its clones. Resolves with these; call it before the machines clean up. */
  async load(): Promise<Set<string>> {
    await mkdir(this.#folder, { recursive: true, mode: 0o700 });
    const kept = new Set<string>();
    for (const id of await readdir(this.#folder)) {
      const file = this.#fileOf(id);
      if (!isName(id)) {
        await rm(file, { force: true });
        continue;
      }
      try {
        const checkpoint = parseLocal(await readFile(file), id);
        this.#machines.park(id);
        this.#keep(id, checkpoint);
        for (const clone of heldBy(checkpoint)) kept.add(clone);
      } catch (error) {
        this.#log(`suspended VM ${id} is left alone, it cannot be read: ${String(error)}`);
        // Its clones may be any of those that were made for it.
        for (const { id: clone, vm } of this.#clones.records()) if (vm === id) kept.add(clone);
      }
    }
    return kept;
  }

  /** The daemon was killed while it suspended a VM, which runs on: there is nothing suspended. */
  async forget(id: string): Promise<void> {
    const checkpoint = this.#suspended.get(id);
    if (!checkpoint) return;
    await rm(this.#fileOf(id), { force: true });
    this.#letGo(checkpoint);
    this.#suspended.delete(id);
    this.#machines.unreserve(id);
    const { memoryClone, vm } = checkpoint.facts.local;
    if (memoryClone !== vm.memory?.own) await this.#clones.discard(memoryClone);
  }

  list(): VmStatus[] {
    return [...this.#suspended].map(([id, checkpoint]) => this.#statusOf(id, checkpoint));
  }

  has(id: string): boolean {
    return this.#suspended.has(id);
  }

  status(id: string): VmStatus {
    return this.#statusOf(id, this.#find(id));
  }

  /** Writes a running VM to disk and ends its machine. On a failure it runs on. Throws in-use, no-space, vm-failed. */
  async suspend(id: string): Promise<Suspended> {
    const vm = this.#machines.find(id);
    if (vm.machine.status().state === 'starting' && vm.record.readyText !== undefined) {
      throw new GridError('in-use', `VM '${id}' is still booting; suspend it when its guest is ready`);
    }
    if (vm.machine.description.kind === 'container')
      throw new GridError(
        'unsupported',
        `VM '${id}' is a container, which cannot be suspended; stop it instead`,
      );
    vm.busy = 'suspended';
    const state = this.#fileOf(`.${id}.state`);
    const { record } = vm;
    let memoryClone: string | undefined;
    try {
      memoryClone = record.memory?.own ?? (await this.#makeMemoryClone(record, vm.machine.description));
      const nonce = await this.#leaveNonce(vm);
      const startMs = performance.now();
      const memory = this.#catalog.diskOf(memoryClone);
      const { compatibility, memoryWrittenBytes } = await vm.machine.capture({ memory, deviceState: state });
      const facts = {
        description: vm.machine.description,
        compatibility,
        base: this.#clones.get(record.clone).base,
        ...(nonce === undefined ? {} : { nonce }),
        local: { vm: record, memoryClone },
      };
      const checkpoint: LocalCheckpoint = { facts, deviceState: await readFile(state) };
      await this.#clones.synced(disksOf(record));
      await this.#write(id, checkpoint);
      const pausedMs = performance.now() - startMs;
      vm.suspended = true;
      await vm.machine.stop(0);
      await this.#machines.gone(id);
      const sealed = await this.#seal(id, checkpoint).catch((error: unknown) => {
        this.#log(`suspended VM ${id} is not sealed: ${String(error)}`);
        return checkpoint;
      });
      this.#keep(id, sealed);
      this.#log(`VM ${id} is suspended: ${memoryWrittenBytes} bytes of memory written`);
      return { id, memoryWrittenBytes, pausedMs };
    } catch (error) {
      if (!vm.suspended) {
        await rm(this.#fileOf(id), { force: true });
        if (vm.machine.status().state === 'paused') await vm.machine.proceed();
        if (memoryClone !== undefined && memoryClone !== record.memory?.own)
          await this.#clones.discard(memoryClone);
      }
      throw asGridError(error, `VM '${id}' cannot be suspended`);
    } finally {
      delete vm.busy;
      await rm(state, { force: true });
    }
  }

  /** Has the guest keep something by which it is known when it goes on; undefined for one that does not answer. */
  async #leaveNonce({ record, machine }: Vm): Promise<string | undefined> {
    if (record.answers !== true) return undefined;
    const nonce = newNonce();
    try {
      if ((await askGuest(machine, { event: 'suspend', nonce }, ANSWER_MS)) === nonce) return nonce;
      this.#log(`the guest of VM ${record.id} did not take its nonce`);
    } catch (error) {
      this.#log(`VM ${record.id}: ${String(error)}`);
    }
    return undefined;
  }

  /** Where the memory of a VM that has none on disk yet will be: over the image it was resumed from, or over zeros. */
  async #makeMemoryClone(record: VmRecord, description: MachineDescription): Promise<string> {
    const { base } = this.#clones.get(record.clone);
    const image = record.memory?.image;
    const made = await this.#clones.create({
      image: record.image,
      base: image ?? base,
      ...(image === undefined ? { kind: 'full' as const, detached: base } : { kind: 'persistent' as const }),
      sizeBytes: description.memoryBytes,
      name: `${record.id}-memory`,
      vm: record.id,
    });
    return made.id;
  }

  /** Goes on with a suspended VM. On a failure it stays suspended. Throws wrong-base, corrupt, unsupported, vm-failed. */
  async resume(id: string): Promise<VmStatus> {
    const requestedAtMs = performance.now();
    const checkpoint = this.#find(id);
    return this.#whileBusy(id, async () => {
      await this.#checkSeals(id, checkpoint);
      const { memoryClone } = checkpoint.facts.local;
      const file = this.#catalog.diskOf(memoryClone);
      return this.#goOn(id, checkpoint, { file, clone: memoryClone, own: memoryClone }, requestedAtMs);
    });
  }

  async #goOn(
    id: string,
    checkpoint: LocalCheckpoint,
    memory: VmMemory,
    requestedAtMs: number,
  ): Promise<VmStatus> {
    const { facts } = checkpoint;
    const { vm } = facts.local;
    this.#machines.wake(id);
    this.#letGo(checkpoint);
    const resuming = this.#fileOf(`.${id}.resuming`);
    let ran = false;
    try {
      const status = await this.#machines.launch({
        id,
        image: vm.image,
        clone: vm.clone,
        discards: vm.discards,
        ...(vm.readyText === undefined ? {} : { readyText: vm.readyText }),
        memory,
        ...(facts.nonce === undefined ? {} : { nonce: facts.nonce }),
        ...(vm.volumes === undefined ? {} : { volumes: vm.volumes }),
        requestedAtMs,
        clonedMs: performance.now() - requestedAtMs,
        opens: [this.#clones.get(memory.clone!).base, facts.base],
        begin: (folder) => resumeMachine(this.#vmm, checkpoint, facts.description, folder, memory.file),
        proceed: async (machine) => {
          // From the first instruction on, what was suspended is the past.
          await rename(this.#fileOf(id), resuming);
          await syncFolder(this.#folder);
          ran = true;
          await machine.proceed();
        },
      });
      this.#suspended.delete(id);
      return status;
    } catch (error) {
      if (ran) await rename(resuming, this.#fileOf(id));
      this.#machines.park(id);
      this.#keep(id, checkpoint);
      throw error;
    } finally {
      await rm(resuming, { force: true });
    }
  }

  /** Throws a suspended VM away, with its clones unless they are the user's own. */
  async discard(id: string): Promise<void> {
    const checkpoint = this.#find(id);
    await this.#whileBusy(id, async () => {
      await rm(this.#fileOf(id), { force: true });
      this.#letGo(checkpoint);
      this.#suspended.delete(id);
      this.#machines.unreserve(id);
      const { vm, memoryClone } = checkpoint.facts.local;
      await this.#clones.discard(memoryClone);
      if (vm.discards) await this.#clones.discard(vm.clone);
      for (const volume of vm.volumes ?? []) if (volume.discards) await this.#clones.discard(volume.clone);
    });
  }

  /**
   * Makes `reference` in the store from a VM: a running one is suspended for it, and resumed. Throws what suspend,
   * resume and the store throw; the VM is then as it was, or suspended. One with volumes needs somebody who keeps them.
   */
  async publish(
    id: string,
    reference: string,
    isBase = false,
    keepVolumes?: KeepVolumes,
  ): Promise<PublishedCheckpoint & { readonly id: string }> {
    const ran = this.#machines.has(id);
    if (!ran && !this.has(id))
      throw new GridError('not-found', `there is no VM '${id}'; \`gridvfs vm ls\` lists them`);
    // Before its guest is held for it.
    await this.#work.check(reference);
    const volumes = ran ? this.#machines.find(id).record.volumes : this.#find(id).facts.local.vm.volumes;
    if (volumes !== undefined && volumes.length > 0 && keepVolumes === undefined) {
      const names = volumes.map(({ name }) => name).join(', ');
      throw new GridError(
        'bad-request',
        `VM '${id}' has volumes (${names}), which no checkpoint holds; detach them`,
      );
    }
    if (ran) await this.suspend(id);
    const checkpoint = this.#find(id);
    try {
      return await this.#whileBusy(id, async () => {
        await this.#checkSeals(id, checkpoint);
        const { facts, deviceState } = checkpoint;
        const { local, ...shared } = facts;
        this.#letGo(checkpoint);
        try {
          const kept = await keepVolumes?.(local.vm.volumes ?? [], facts.description.disks);
          const all = kept === undefined || kept.length === 0 ? shared : { ...shared, volumes: kept };
          const published = await this.#clones.exclusive(local.vm.clone, 'published', (disk, diskRecord) =>
            this.#clones.exclusive(local.memoryClone, 'published', (memory, memoryRecord) =>
              this.#work.publish({
                reference,
                disk,
                diskRecord,
                memory,
                memoryRecord,
                state: encodeCheckpoint({ facts: all, deviceState }),
                labels: isBase ? baseLabels(facts) : {},
              }),
            ),
          );
          return { id, ...published };
        } finally {
          this.#keep(id, checkpoint);
        }
      });
    } finally {
      if (ran) await this.resume(id);
    }
  }

  /** Throws what would keep such a checkpoint from being made. */
  check(reference: string): Promise<void> {
    return this.#work.check(reference);
  }

  #statusOf(id: string, { facts }: LocalCheckpoint): VmStatus {
    const { vm } = facts.local;
    return {
      state: 'suspended',
      id,
      image: vm.image,
      clone: vm.clone,
      created: vm.created,
      accelerator: facts.compatibility.accelerator,
      resumed: true,
      answers: facts.nonce !== undefined,
      consoleSocket: '',
      consoleLog: '',
      volumes: vm.volumes ?? [],
      timeline: { clonedMs: vm.clonedMs },
    };
  }

  #find(id: string): LocalCheckpoint {
    const checkpoint = this.#suspended.get(id);
    if (!checkpoint)
      throw new GridError('not-found', `no VM '${id}' is suspended; \`gridvfs vm ls\` lists them`);
    if (this.#busy.has(id))
      throw new GridError('in-use', `suspended VM '${id}' is in use; wait until that is done`);
    return checkpoint;
  }

  async #whileBusy<T>(id: string, task: () => Promise<T>): Promise<T> {
    this.#busy.add(id);
    try {
      return await task();
    } finally {
      this.#busy.delete(id);
    }
  }

  #keep(id: string, checkpoint: LocalCheckpoint): void {
    this.#suspended.set(id, checkpoint);
    for (const clone of heldBy(checkpoint)) this.#clones.hold(clone, `kept for the suspended VM '${id}'`);
  }

  #letGo(checkpoint: LocalCheckpoint): void {
    for (const clone of heldBy(checkpoint)) this.#clones.hold(clone, undefined);
  }

  async #seal(id: string, checkpoint: LocalCheckpoint): Promise<LocalCheckpoint> {
    const { facts, deviceState } = checkpoint;
    const seals = await this.#sealsOf(checkpoint);
    const sealed = { facts: { ...facts, local: { ...facts.local, ...seals } }, deviceState };
    await this.#write(id, sealed);
    return sealed;
  }

  async #sealsOf({ facts: { local } }: LocalCheckpoint) {
    // Nobody has them open any more when this succeeds.
    const closed = (clone: string) => this.#clones.exclusive(clone, 'sealed', async () => undefined);
    await Promise.all([...disksOf(local.vm), local.memoryClone].map(closed));
    return {
      diskSeal: await this.#diskSeal(local.vm),
      memorySeal: await contentSeal(this.#clones.layersOf(local.memoryClone)),
    };
  }

  async #diskSeal(vm: VmRecord): Promise<string> {
    const seals = await Promise.all(disksOf(vm).map((clone) => quickSeal(this.#clones.layersOf(clone))));
    return seals.length === 1 ? seals[0]! : sha256(Buffer.from(seals.join('\n')));
  }

  async #checkSeals(id: string, checkpoint: LocalCheckpoint): Promise<void> {
    const { diskSeal, memorySeal, vm, memoryClone } = checkpoint.facts.local;
    const { memoryBytes } = checkpoint.facts.description;
    const { sizeBytes } = this.#clones.get(memoryClone);
    if (sizeBytes !== memoryBytes)
      throw new GridError(
        'bad-format',
        `the memory of VM '${id}' has ${sizeBytes} bytes, not ${memoryBytes}`,
      );
    const { base } = this.#clones.get(vm.clone);
    if (base !== checkpoint.facts.base) {
      throw new GridError(
        'wrong-base',
        `VM '${id}' cannot be resumed: its disk, clone '${vm.clone}', has the base ${base.slice(0, 12)}, not ${checkpoint.facts.base.slice(0, 12)}`,
      );
    }
    // The daemon was killed before the machine had ended; nothing has run since.
    if (diskSeal === undefined || memorySeal === undefined) return;
    const disk = await this.#diskSeal(vm);
    if (disk !== diskSeal) {
      throw new GridError(
        'wrong-base',
        `VM '${id}' cannot be resumed: its disk, clone '${disksOf(vm).join("' or '")}', is not as it was (${disk.slice(0, 12)}, not ${diskSeal.slice(0, 12)})`,
      );
    }
    const memory = await contentSeal(this.#clones.layersOf(memoryClone));
    if (memory !== memorySeal) {
      throw new GridError(
        'corrupt',
        `VM '${id}' cannot be resumed: its memory, clone '${memoryClone}', is damaged (${memory.slice(0, 12)}, not ${memorySeal.slice(0, 12)})`,
      );
    }
  }

  /** Durable when it resolves; whole or as it was before. */
  async #write(id: string, checkpoint: Checkpoint): Promise<void> {
    const making = this.#fileOf(`.${id}.making`);
    try {
      await using file = await open(making, 'w', 0o600);
      await file.writeFile(encodeCheckpoint(checkpoint));
      await file.sync();
      await rename(making, this.#fileOf(id));
      await syncFolder(this.#folder);
    } catch (error) {
      await rm(making, { force: true });
      throw asGridError(error, `cannot write the checkpoint of VM '${id}'`);
    }
  }

  #fileOf(name: string): string {
    return path.join(this.#folder, name);
  }
}

function parseLocal(bytes: Buffer, id: string): LocalCheckpoint {
  const checkpoint = parseCheckpoint(bytes, `the checkpoint of VM ${id}`);
  const { local } = checkpoint.facts;
  if (!local || !isName(local.memoryClone))
    throw new GridError('bad-format', `VM ${id} has no memory of its own`);
  checkedVmRecord(local.vm, id);
  return checkpoint as LocalCheckpoint;
}

function heldBy({ facts: { local } }: LocalCheckpoint): string[] {
  return [...disksOf(local.vm), local.memoryClone];
}
