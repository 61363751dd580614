/**
 * The VMs of a host: started over clones on the mount, watched, stopped. Each has a folder below the runtime
 * folder with its sockets and console log, by which the next daemon finds a VM that a killed one left; it ends it
 * (its disk went with the mount) and discards its clone.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { MIB, NAME_LENGTH_MAX } from '../core/limits.ts';
import type { Machine, MachineDescription, MachineStatus, Vmm } from '../core/machine.ts';
import type { Manifest } from '../core/manifest.ts';
import type { Clones } from './clones.ts';
import type { Start, Starts } from './starts.ts';

/** Labels of a disk image's manifest that say how its machine is made. */
export const LABEL_COMMAND_LINE = 'boot.cmdline';
export const LABEL_READY_TEXT = 'boot.ready';
export const LABEL_MEMORY_MIB = 'machine.memory-mib';
const MEMORY_BYTES_DEFAULT = 512 * MIB;
const STOP_GRACE_MS = 15_000;
const FAILED_KEPT_MAX = 20;
/** What a stop of all VMs takes beyond their grace: one may still be starting. */
const STOP_ALL_MS = 60_000;
/** A VM's own clone is named after it, with `-disk`. */
const VM_NAME_LENGTH_MAX = NAME_LENGTH_MAX - 5;
/** A start is over this long after it began at the latest … */
const START_MS_MAX = 120_000;
/** … or this long after the guest was ready: what its last services read belongs to it. */
const START_TAIL_MS = 3_000;

export interface RunRequest {
  /** name:version to make a non-persistent clone of; or … */
  readonly image?: string;
  /** … a clone that is there already; it stays when the VM goes if it is persistent or full. */
  readonly clone?: string;
  readonly name?: string;
  readonly memoryBytes?: number;
  readonly vcpus?: number;
  readonly network?: 'user' | 'none';
  /** Replaces the label's. */
  readonly commandLine?: string;
  readonly readyText?: string;
}

export interface VmStatus extends MachineStatus {
  readonly id: string;
  readonly image: string;
  readonly clone: string;
  readonly created: string;
  /** The guest's word for being ready; without it nobody can wait for the guest. */
  readonly readyText?: string;
  readonly consoleSocket: string;
  readonly consoleLog: string;
  /** Milliseconds from the request to: clone there, machine started, guest ready. */
  readonly timeline: { readonly clonedMs: number; readonly startedMs?: number; readonly readyMs?: number };
}

/** What the machines need to know of images; given by whoever wires the agent. */
export interface MachineCatalog {
  resolve(reference: string): Promise<{ digest: Digest; manifest: Manifest; folder: string }>;
  manifestOf(digest: Digest): Promise<{ manifest: Manifest; folder: string | undefined }>;
  /** Where a clone's disk is on the mount. */
  diskOf(cloneId: string): string;
}

interface Vm {
  readonly id: string;
  readonly image: string;
  readonly clone: string;
  /** Its clone is non-persistent: it goes with this VM. */
  readonly discards: boolean;
  readonly created: string;
  readonly folder: string;
  readonly requestedAtMs: number;
  readonly clonedMs: number;
  readonly readyText?: string;
  machine: Machine;
  startedMs: number;
  readyMs?: number;
}

export class Machines {
  readonly #vmm: Vmm;
  readonly #folder: string;
  readonly #clones: Clones;
  readonly #catalog: MachineCatalog;
  readonly #starts: Starts | undefined;
  readonly #log: (line: string) => void;
  readonly #vms = new Map<string, Vm>();
  /** Of VMs that are starting, running or ending. */
  readonly #names = new Set<string>();
  /** Clones that somebody named as the disk of such a VM. */
  readonly #disks = new Set<string>();
  #closing = false;
  /** The last VMs that ended by themselves, so that `vm ls` can say why. */
  readonly #failed: VmStatus[] = [];

  constructor(parts: {
    vmm: Vmm;
    folder: string;
    clones: Clones;
    catalog: MachineCatalog;
    /** Hears of starts; none when left out. */
    starts?: Starts;
    /** The mount outlived the last daemon, so its VMs still have their disks. */
    takeover?: boolean;
    log: (line: string) => void;
  }) {
    this.#vmm = parts.vmm;
    this.#folder = parts.folder;
    this.#clones = parts.clones;
    this.#catalog = parts.catalog;
    this.#starts = parts.starts;
    this.#log = parts.log;
  }

  /** Ends VMs of a daemon that was killed and discards clones that were made for VMs. Called before the mount. */
  async cleanUp(): Promise<void> {
    await mkdir(this.#folder, { recursive: true });
    for (const id of await readdir(this.#folder)) {
      const folder = path.join(this.#folder, id);
      if (await this.#vmm.endLost(folder)) {
        this.#log(`VM ${id} lost its disk when the last proxy was killed: it was ended`);
      }
      await rm(folder, { recursive: true, force: true });
    }
    for (const clone of this.#clones.records()) {
      if (clone.vm !== undefined) await this.#clones.discard(clone.id);
    }
  }

  /** Starts a VM; resolves when its process answers, not yet its guest (see `ready`). */
  async run(request: RunRequest): Promise<VmStatus> {
    const requestedAtMs = performance.now();
    if ((request.image === undefined) === (request.clone === undefined)) {
      throw new GridError('bad-request', 'name either an image to clone or a clone to start from');
    }
    const id = request.name ?? `vm-${randomBytes(5).toString('hex')}`;
    if (this.#names.has(id)) throw new GridError('exists', `there is a VM '${id}' already`);
    if (id.length > VM_NAME_LENGTH_MAX) {
      throw new GridError('bad-request', `a VM's name has at most ${VM_NAME_LENGTH_MAX} characters`);
    }
    if (request.clone !== undefined && this.#disks.has(request.clone)) {
      throw new GridError(
        'in-use',
        `clone '${request.clone}' is the disk of a VM; \`gridvfs vm ls\` says which`,
      );
    }
    if (this.#closing) throw new GridError('closed', 'the proxy is being stopped');
    this.#names.add(id);
    if (request.clone !== undefined) this.#disks.add(request.clone);
    const folder = path.join(this.#folder, id);
    let ownClone: string | undefined;
    let start: Start | undefined;
    try {
      const { cloneId, image, manifest, imageFolder } = await this.#diskFor(request, id);
      if (request.clone === undefined) ownClone = cloneId;
      const clonedMs = performance.now() - requestedAtMs;
      // No tag shows it any more: the clone's own folder still has its parts.
      const parts = imageFolder ?? path.dirname(this.#catalog.diskOf(cloneId));
      const description = this.#describe(request, id, manifest, parts, cloneId);
      const { kernel, initrd } = manifest.parts;
      const opened = [kernel, initrd, this.#clones.get(cloneId).base].filter((one) => one !== undefined);
      start = this.#starts?.begin(opened, 'boot');
      await mkdir(folder, { mode: 0o700 });
      const machine = await this.#vmm.start(description, folder);
      const vm: Vm = {
        id,
        image,
        clone: cloneId,
        discards: this.#clones.get(cloneId).kind === 'non-persistent',
        created: new Date().toISOString(),
        folder,
        requestedAtMs,
        clonedMs,
        ...(description.readyText === undefined ? {} : { readyText: description.readyText }),
        machine,
        startedMs: performance.now() - requestedAtMs,
      };
      this.#vms.set(id, vm);
      if (start) void this.#watchStart(start, machine, description.readyText !== undefined);
      void machine.ended
        .then((status) => this.#ended(vm, status))
        .catch((error: unknown) => this.#log(`VM ${id}: ${String(error)}`));
      this.#log(`VM ${id} started (pid ${machine.status().pid}) over clone ${cloneId} of ${image}`);
      return this.#statusOf(vm);
    } catch (error) {
      start?.ended();
      await rm(folder, { recursive: true, force: true });
      this.#names.delete(id);
      if (request.clone !== undefined) this.#disks.delete(request.clone);
      if (ownClone !== undefined) await this.#clones.discard(ownClone);
      throw error;
    }
  }

  /** Tells when the start is over: the guest is ready, gone, or has had its time. */
  async #watchStart(start: Start, machine: Machine, saysReady: boolean): Promise<void> {
    const sleepQuietly = (ms: number) => sleep(ms, undefined, { ref: false });
    const ready = saysReady
      ? machine.ready(START_MS_MAX).then(
          () => sleepQuietly(START_TAIL_MS),
          () => undefined,
        )
      : sleepQuietly(START_MS_MAX);
    await Promise.race([ready, machine.ended]);
    start.ended();
  }

  async #diskFor(request: RunRequest, vm: string) {
    if (request.clone !== undefined) {
      const record = this.#clones.get(request.clone);
      const { manifest, folder } = await this.#catalog.manifestOf(record.base);
      return { cloneId: record.id, image: record.image, manifest, imageFolder: folder };
    }
    const image = request.image!;
    const { digest, manifest, folder } = await this.#catalog.resolve(image);
    if (manifest.kind !== 'disk')
      throw new GridError('bad-request', `${image} is of kind '${manifest.kind}'; a VM boots from a disk`);
    const record = await this.#clones.create({
      image,
      base: digest,
      sizeBytes: manifest.sizeBytes,
      name: `${vm}-disk`,
      vm,
    });
    return { cloneId: record.id, image, manifest, imageFolder: folder as string | undefined };
  }

  #describe(
    request: RunRequest,
    id: string,
    manifest: Manifest,
    partsFolder: string,
    clone: string,
  ): MachineDescription {
    const { labels, parts } = manifest;
    const mac = randomBytes(3);
    const memoryLabel = Number(labels[LABEL_MEMORY_MIB]);
    const readyText = request.readyText ?? labels[LABEL_READY_TEXT];
    const description = {
      name: id,
      vcpus: request.vcpus ?? 1,
      memoryBytes: request.memoryBytes ?? (memoryLabel > 0 ? memoryLabel * MIB : MEMORY_BYTES_DEFAULT),
      disks: [{ path: this.#catalog.diskOf(clone), format: 'raw' as const, readOnly: false }],
      macAddress: `52:54:00:${mac.toString('hex').replaceAll(/(..)(?=.)/g, '$1:')}`,
      network: request.network ?? ('user' as const),
      ...(readyText === undefined ? {} : { readyText }),
    };
    if (!('kernel' in parts)) return description;
    return {
      ...description,
      boot: {
        kernel: path.join(partsFolder, 'kernel'),
        ...('initrd' in parts ? { initrd: path.join(partsFolder, 'initrd') } : {}),
        commandLine: request.commandLine ?? labels[LABEL_COMMAND_LINE] ?? 'root=/dev/vda rw console=ttyS0',
      },
    };
  }

  #find(id: string): Vm {
    const vm = this.#vms.get(id);
    if (!vm) throw new GridError('not-found', `there is no VM '${id}'; \`gridvfs vm ls\` lists them`);
    return vm;
  }

  #statusOf(vm: Vm): VmStatus {
    return {
      ...vm.machine.status(),
      id: vm.id,
      image: vm.image,
      clone: vm.clone,
      created: vm.created,
      ...(vm.readyText === undefined ? {} : { readyText: vm.readyText }),
      consoleSocket: vm.machine.consoleSocket,
      consoleLog: vm.machine.consoleLog,
      timeline: {
        clonedMs: vm.clonedMs,
        startedMs: vm.startedMs,
        ...(vm.readyMs === undefined ? {} : { readyMs: vm.readyMs }),
      },
    };
  }

  list(): VmStatus[] {
    return [...this.#vms.values()].map((vm) => this.#statusOf(vm)).concat(this.#failed);
  }

  status(id: string): VmStatus {
    return this.#failed.find((status) => status.id === id) ?? this.#statusOf(this.#find(id));
  }

  /** Resolves when the guest answered; the time is from the request that started it. */
  async ready(id: string, timeoutMs: number): Promise<VmStatus> {
    const vm = this.#find(id);
    await vm.machine.ready(timeoutMs);
    vm.readyMs ??= performance.now() - vm.requestedAtMs;
    return this.#statusOf(vm);
  }

  /** Asks the guest to power down, ends it after `graceMs` (0: at once), and waits until all of it is gone. */
  async stop(id: string, graceMs: number = STOP_GRACE_MS): Promise<void> {
    const vm = this.#find(id);
    await vm.machine.stop(graceMs);
    while (this.#vms.has(id)) await sleep(5);
  }

  /** VMs that run, are starting or ending. */
  get count(): number {
    return this.#names.size;
  }

  async stopAll(graceMs: number): Promise<void> {
    this.#closing = true;
    try {
      // One that is starting is stopped once it has started.
      for (const endMs = performance.now() + graceMs + STOP_ALL_MS; this.#names.size > 0; await sleep(20)) {
        await Promise.allSettled([...this.#vms.keys()].map((id) => this.stop(id, graceMs)));
        if (performance.now() > endMs)
          throw new GridError('timeout', `VMs do not end: ${[...this.#names].join(', ')}`);
      }
    } finally {
      this.#closing = false;
    }
  }

  async #ended(vm: Vm, status: MachineStatus): Promise<void> {
    this.#log(
      `VM ${vm.id} is gone (${status.state}${status.reason === undefined ? '' : `: ${status.reason}`})`,
    );
    if (status.state === 'failed') {
      this.#failed.push({ ...this.#statusOf(vm), ...status });
      if (this.#failed.length > FAILED_KEPT_MAX) this.#failed.shift();
    }
    try {
      if (vm.discards) await this.#clones.discard(vm.clone);
      await rm(vm.folder, { recursive: true, force: true });
    } finally {
      this.#vms.delete(vm.id);
      this.#names.delete(vm.id);
      this.#disks.delete(vm.clone);
    }
  }
}
