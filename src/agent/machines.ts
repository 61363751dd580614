/**
 * The VMs of a host: started over clones on the mount, watched, stopped. Each has a folder below the runtime
 * folder with its sockets, console log and record (vm-record.ts), by which the next daemon finds a VM that runs when
 * this one was killed. Where the mount has outlived the daemon, the VM is taken up again (`adopt`); where it has not,
 * the VM has lost its disk: it is ended and its clone discarded (`cleanUp`). Suspension and checkpoints are in
 * checkpoints.ts, which launches VMs here.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { NAME_LENGTH_MAX } from '../core/limits.ts';
import type { IoLimits, Machine, MachineStatus, Vmm } from '../core/machine.ts';
import type { Clones } from './clones.ts';
import { describeMachine, LABEL_ANSWERS } from './machine-description.ts';
import type { Launch, MachineCatalog, MachineGroups, MachineSegments } from './machine-parts.ts';
import { START_MS_MAX, watchStart } from './starts.ts';
import type { Start, Starts } from './starts.ts';
import { askGuest, forkQuestion, tellGuest } from './vm-answer.ts';
import { clonesOf, disksOf, readVmRecord, statusOf, writeVmRecord } from './vm-record.ts';
import type { RunRequest, Vm, VmMemory, VmRecord, VmStatus } from './vm-record.ts';

const STOP_GRACE_MS = 15_000;
const FAILED_KEPT_MAX = 20;
/** What a stop of all VMs takes beyond their grace: one may still be starting. */
const STOP_ALL_MS = 60_000;
/** A VM's own clones are named after it, with `-disk` and `-memory`. */
const VM_NAME_LENGTH_MAX = NAME_LENGTH_MAX - 7;

export class Machines {
  readonly #vmm: Vmm;
  readonly #folder: string;
  readonly #clones: Clones;
  readonly #catalog: MachineCatalog;
  readonly #starts: Starts | undefined;
  readonly #groups: MachineGroups | undefined;
  readonly #segments: MachineSegments | undefined;
  readonly #log: (line: string) => void;
  readonly #vms = new Map<string, Vm>();
  /** Of VMs that are starting, running or ending. */
  readonly #names = new Set<string>();
  /** Names of suspended VMs. */
  readonly #parked = new Set<string>();
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
    groups?: MachineGroups;
    /** Without it no VM is on a virtual network. */
    segments?: MachineSegments;
    /** The mount outlived the last daemon, so its VMs still have their disks. */
    takeover?: boolean;
    log: (line: string) => void;
  }) {
    this.#vmm = parts.vmm;
    this.#folder = parts.folder;
    this.#clones = parts.clones;
    this.#catalog = parts.catalog;
    this.#starts = parts.starts;
    this.#groups = parts.groups;
    this.#segments = parts.segments;
    this.#log = parts.log;
  }

  /** Ends VMs of a daemon that was killed and discards clones that were made for VMs, but for those in `kept`. Called
   * before the mount. */
  async cleanUp(kept: ReadonlySet<string> = new Set()): Promise<void> {
    await mkdir(this.#folder, { recursive: true });
    for (const id of await readdir(this.#folder)) {
      const folder = path.join(this.#folder, id);
      if (await this.#vmm.endLost(folder)) {
        this.#log(`VM ${id} lost its disk when the last proxy was killed: it was ended`);
      }
      await rm(folder, { recursive: true, force: true });
    }
    await this.#discardExcept(kept);
  }

  /** Goes on with VMs of a daemon that was killed while its mount stayed. Called when the mount answers. Clones of
   * VMs that are gone are discarded, but for those in `kept`. `runsOn` is told of each before its guest goes on. */
  async adopt(
    kept: ReadonlySet<string> = new Set(),
    runsOn: (id: string) => Promise<void> = () => Promise.resolve(),
  ): Promise<void> {
    await mkdir(this.#folder, { recursive: true });
    const used = new Set(kept);
    for (const id of await readdir(this.#folder)) {
      const folder = path.join(this.#folder, id);
      try {
        const record = await readVmRecord(folder);
        const machine = record.rehearsal ? undefined : await this.#vmm.adopt(folder);
        if (machine !== undefined) {
          await runsOn(id);
          if (machine.status().state === 'paused') await machine.proceed();
          const kept = withoutLostVolumes(record, machine);
          for (const clone of clonesOf(kept)) used.add(clone);
          this.#register(kept, folder, machine, performance.now());
          continue;
        }
        const isEnded = await this.#vmm.endLost(folder); // a rehearsal that nobody waits for any more
        this.#log(`VM ${id} ${isEnded ? 'was ended: it was a rehearsal' : 'ended while no proxy ran'}`);
      } catch (error) {
        this.#log(`VM ${id} cannot be taken up again and is ended: ${String(error)}`);
        await this.#vmm.endLost(folder);
      }
      await rm(folder, { recursive: true, force: true });
    }
    await this.#discardExcept(used);
  }

  async #discardExcept(kept: ReadonlySet<string>): Promise<void> {
    for (const clone of this.#clones.records()) {
      if (clone.vm !== undefined && !kept.has(clone.id)) await this.#clones.discard(clone.id);
    }
  }

  /** Boots a VM; resolves when its process answers, not yet its guest (see `ready`). */
  async run(request: RunRequest): Promise<VmStatus> {
    const requestedAtMs = performance.now();
    if ((request.image === undefined) === (request.clone === undefined)) {
      throw new GridError('bad-request', 'name either an image to clone or a clone to start from');
    }
    if (request.clone !== undefined) this.#checkUnclaimed(request.clone);
    const id = this.reserve(request.name);
    if (request.clone !== undefined) this.claim(request.clone);
    let ownClone: string | undefined;
    try {
      const { cloneId, image, manifest, imageFolder } = await this.#diskFor(request, id);
      if (request.clone === undefined) ownClone = cloneId;
      const clonedMs = performance.now() - requestedAtMs;
      const disk = this.#catalog.diskOf(cloneId);
      // No tag shows it any more: the clone's own folder still has its parts.
      const description = describeMachine(request, id, manifest, imageFolder ?? path.dirname(disk), disk);
      const { kernel, initrd } = manifest.parts;
      return await this.launch({
        id,
        image,
        clone: cloneId,
        discards: this.#clones.get(cloneId).kind === 'non-persistent',
        ...(description.readyText === undefined ? {} : { readyText: description.readyText }),
        answers: manifest.labels[LABEL_ANSWERS] === 'ttyS1',
        requestedAtMs,
        clonedMs,
        opens: [kernel, initrd, this.#clones.get(cloneId).base].filter((one) => one !== undefined),
        begin: (folder) => this.#vmm.start(description, folder),
      });
    } catch (error) {
      this.unreserve(id);
      if (request.clone !== undefined) this.unclaim(request.clone);
      if (ownClone !== undefined) await this.#clones.discard(ownClone);
      throw error;
    }
  }

  /** Takes a clone for a VM's disk. Throws in-use. */
  claim(clone: string): void {
    this.#checkUnclaimed(clone);
    this.#disks.add(clone);
  }

  unclaim(clone: string): void {
    this.#disks.delete(clone);
  }

  #checkUnclaimed(clone: string): void {
    if (!this.#disks.has(clone)) return;
    throw new GridError('in-use', `clone '${clone}' is the disk of a VM; \`gridvfs vm ls\` says which`);
  }

  /** Takes a name for a VM, made up when left out. Throws exists, bad-request, closed. */
  reserve(name: string = `vm-${randomBytes(5).toString('hex')}`): string {
    if (this.#names.has(name) || this.#parked.has(name))
      throw new GridError('exists', `there is a VM '${name}' already`);
    if (name.length > VM_NAME_LENGTH_MAX) {
      throw new GridError('bad-request', `a VM's name has at most ${VM_NAME_LENGTH_MAX} characters`);
    }
    if (this.#closing) throw new GridError('closed', 'the proxy is being stopped');
    this.#names.add(name);
    return name;
  }

  unreserve(name: string): void {
    this.#names.delete(name);
    this.#parked.delete(name);
  }

  /** The name belongs to a suspended VM. */
  park(name: string): void {
    this.#names.delete(name);
    this.#parked.add(name);
  }

  /** The suspended VM of that name is about to run. Throws closed. */
  wake(name: string): void {
    this.#parked.delete(name);
    try {
      this.reserve(name);
    } catch (error) {
      this.park(name);
      throw error;
    }
  }

  /** A machine will go on from these images: what it needs of them is fetched from now on, while what it takes is made.
   * Goes to `launch`, or is told that it is `gone`. */
  expect(opens: readonly Digest[], memory: { file: string; image: Digest }): Start | undefined {
    return this.#starts?.begin(opens, 'resume', memory);
  }

  get recordsStarts(): boolean {
    return this.#starts?.records ?? false;
  }

  /** Starts the machine of a reserved name. A failure leaves nothing but the name and the clones. */
  async launch(launch: Launch): Promise<VmStatus> {
    const { id, image, clone, discards, readyText, memory, requestedAtMs, clonedMs } = launch;
    const folder = path.join(this.#folder, id);
    const purpose = memory === undefined ? 'boot' : 'resume';
    const goesOnIn = memory && { file: memory.file, image: memory.image ?? launch.opens[0]! };
    const start = launch.start ?? this.#starts?.begin([...new Set(launch.opens)], purpose, goesOnIn);
    let machine: Machine | undefined;
    try {
      await rm(folder, { recursive: true, force: true });
      await mkdir(folder, { mode: 0o700, recursive: true });
      machine = await launch.begin(folder);
      await this.#groups?.place(`vm-${id}`, machine.status().pid!);
      const record: VmRecord = {
        schema: 1,
        id,
        image,
        clone,
        discards,
        created: new Date().toISOString(),
        clonedMs,
        startedMs: performance.now() - requestedAtMs,
        ...(readyText === undefined ? {} : { readyText }),
        ...(memory === undefined ? {} : { memory }),
        ...(launch.volumes === undefined ? {} : { volumes: launch.volumes }),
        ...(launch.answers || launch.nonce !== undefined ? { answers: true } : {}),
        ...(launch.nonce === undefined ? {} : { nonce: launch.nonce }),
        ...(launch.same ? { same: true } : {}),
        ...(launch.rehearsal ? { rehearsal: true } : {}),
      };
      await writeVmRecord(folder, record);
      start?.goesOn();
      await launch.proceed?.(machine);
      const vm = this.#register(record, folder, machine, requestedAtMs);
      if (memory !== undefined) this.#greet(vm);
      if (start) void watchStart(start, vm);
      this.#log(
        `VM ${id} ${memory ? 'resumed' : 'started'} (pid ${machine.status().pid}) over clone ${clone} of ${image}`,
      );
      return statusOf(vm);
    } catch (error) {
      start?.gone();
      await machine?.stop(0).catch((failure: unknown) => this.#log(`VM ${id}: ${String(failure)}`));
      await rm(folder, { recursive: true, force: true });
      throw error;
    }
  }

  #register(record: VmRecord, folder: string, machine: Machine, requestedAtMs: number): Vm {
    const vm: Vm = { record, folder, machine, requestedAtMs };
    this.#names.add(record.id);
    for (const clone of disksOf(record)) this.#disks.add(clone);
    this.#vms.set(record.id, vm);
    const { segments = [], isolated } = machine.description;
    if (!isolated) this.#segments?.plugIn(record.id, segments, folder);
    void machine.ended
      .then((status) => this.#ended(vm, status))
      .catch((error: unknown) => this.#log(`VM ${record.id}: ${String(error)}`));
    return vm;
  }

  async #diskFor(request: RunRequest, vm: string) {
    if (request.clone !== undefined) {
      const record = this.#clones.get(request.clone);
      const { manifest, folder } = await this.#catalog.manifestOf(record.base);
      return { cloneId: record.id, image: record.image, manifest, imageFolder: folder };
    }
    const image = request.image!;
    const { digest, manifest, folder } = await this.#catalog.resolve(image);
    if (manifest.kind !== 'disk') {
      const wayOn = manifest.kind === 'memory' ? `; \`--from-checkpoint ${image}\` resumes it` : '';
      throw new GridError(
        'bad-request',
        `${image} is of kind '${manifest.kind}'; a VM boots from a disk${wayOn}`,
      );
    }
    const record = await this.#clones.create({
      image,
      base: digest,
      sizeBytes: manifest.sizeBytes,
      name: `${vm}-disk`,
      vm,
    });
    return { cloneId: record.id, image, manifest, imageFolder: folder as string | undefined };
  }

  /** One that runs. Throws not-found, and in-use while something is done to it. */
  find(id: string): Vm {
    const vm = this.#vms.get(id);
    if (!vm)
      throw new GridError('not-found', `there is no VM '${id}' that runs; \`gridvfs vm ls\` lists them`);
    if (vm.busy !== undefined)
      throw new GridError('in-use', `VM '${id}' is being ${vm.busy}; wait until that is done`);
    return vm;
  }

  has(id: string): boolean {
    return this.#vms.has(id);
  }

  /** Whether another VM than `except` has the clone's disk mapped as its memory. */
  isMapped(clone: string, except: string): boolean {
    return [...this.#vms.values()].some(
      ({ record }) => record.id !== except && record.memory?.clone === clone,
    );
  }

  /** Bounds what its disks do from now on. Throws bad-request, unsupported. */
  async setLimits(id: string, limits: IoLimits): Promise<VmStatus> {
    const vm = this.find(id);
    await vm.machine.setLimits(limits);
    return statusOf(vm);
  }

  /** Of those that run. */
  records(): VmRecord[] {
    return [...this.#vms.values()].map(({ record }) => record);
  }

  list(): VmStatus[] {
    return [...this.#vms.values()].map(statusOf).concat(this.#failed);
  }

  status(id: string): VmStatus {
    const vm = this.#vms.get(id);
    const known = vm ? statusOf(vm) : this.#failed.findLast((status) => status.id === id);
    if (!known) throw new GridError('not-found', `there is no VM '${id}'; \`gridvfs vm ls\` lists them`);
    return known;
  }

  /** Resolves when the guest answered; the time is from the request that started it. */
  async ready(id: string, timeoutMs: number): Promise<VmStatus> {
    const ended = this.#vms.has(id) ? undefined : this.#failed.findLast((status) => status.id === id);
    if (ended !== undefined) throw new GridError('vm-failed', ended.reason ?? `VM '${id}' has failed`);
    const vm = this.find(id);
    if (vm.record.memory) {
      const { nonce } = vm.record;
      if (nonce === undefined) return statusOf(vm); // it has long booted, and does not answer
      await (vm.answer ??= this.#answer(vm, nonce, timeoutMs));
    } else {
      await vm.machine.ready(timeoutMs);
    }
    vm.readyMs ??= performance.now() - vm.requestedAtMs;
    return statusOf(vm);
  }

  /** Tells a resumed guest who it is, and has it show by its answer that it is the one that was captured. */
  #greet(vm: Vm): void {
    const { memory, nonce, same } = vm.record;
    if (nonce !== undefined) {
      vm.answer = this.#answer(vm, nonce, START_MS_MAX);
      vm.answer.catch((error: unknown) => this.#log(`VM ${vm.record.id}: ${String(error)}`));
    } else if (memory?.image !== undefined && !same) {
      tellGuest(vm.machine, forkQuestion(vm.machine.description));
    }
  }

  async #answer(vm: Vm, nonce: string, timeoutMs: number): Promise<void> {
    const { record, machine, requestedAtMs } = vm;
    const isFork = record.memory?.image !== undefined && !record.same;
    const question = isFork ? forkQuestion(machine.description) : { event: 'resume' as const };
    let answer: string;
    try {
      answer = await askGuest(machine, question, timeoutMs);
    } catch (error) {
      delete vm.answer; // it may still come
      throw error;
    }
    if (answer === nonce) {
      vm.readyMs ??= performance.now() - requestedAtMs;
      return;
    }
    vm.denied = `the guest of VM '${record.id}' is not the one that was captured: its memory does not hold the nonce; it was ended`;
    await machine.stop(0);
    throw new GridError('vm-failed', vm.denied);
  }

  /** Asks the guest to power down, ends it after `graceMs` (0: at once), and waits until all of it is gone. */
  async stop(id: string, graceMs: number = STOP_GRACE_MS): Promise<void> {
    await this.find(id).machine.stop(graceMs);
    await this.gone(id);
  }

  /** Resolves when nothing of a VM that ends is left. */
  async gone(id: string): Promise<void> {
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

  /** The guest of a resumed machine boots: a machine that is started anew over the same disks, without the memory. */
  async #restart({ record, machine: { description } }: Vm): Promise<void> {
    const { base } = this.#clones.get(record.clone);
    const { kernel, initrd } = (await this.#catalog.manifestOf(base)).manifest.parts;
    const { memory, nonce: _, same: __, answers, ...rest } = record;
    await this.launch({
      ...rest,
      ...(answers ? { answers } : {}),
      requestedAtMs: performance.now(),
      opens: [kernel, initrd, base].filter((one) => one !== undefined),
      begin: (folder) => this.#vmm.start(description, folder),
    });
    // It runs: what is left of the memory must not end it.
    await this.#discardMemory(record.id, memory).catch((error: unknown) =>
      this.#log(`VM ${record.id}: its old memory is still there: ${String(error)}`),
    );
  }

  /** What a VM went on in; `kept`: all but the clone that is its own. */
  async #discardMemory(id: string, memory: VmMemory | undefined, kept = false): Promise<void> {
    const { own, clone: mapped } = memory ?? {};
    if (own !== undefined && !kept) await this.#clones.discard(own);
    if (mapped !== undefined && mapped !== own && !this.isMapped(mapped, id))
      await this.#clones.discard(mapped);
  }

  async #ended(vm: Vm, status: MachineStatus): Promise<void> {
    const { id, clone, discards, memory, volumes = [] } = vm.record;
    this.#segments?.plugOut(id);
    if (status.reboots && !this.#closing && vm.denied === undefined) {
      vm.busy = 'started again';
      try {
        return await this.#restart(vm);
      } catch (error) {
        vm.denied = `the guest of VM '${id}' asked for a reboot, and it cannot be started: ${String(error)}`;
      }
    }
    this.#log(`VM ${id} is gone (${status.state}${status.reason === undefined ? '' : `: ${status.reason}`})`);
    if (status.state === 'failed' || vm.denied !== undefined) {
      const reason = vm.denied === undefined ? {} : { state: 'failed' as const, reason: vm.denied };
      this.#failed.push({ ...statusOf(vm), ...status, ...reason });
      if (this.#failed.length > FAILED_KEPT_MAX) this.#failed.shift();
    }
    try {
      if (!vm.suspended) {
        if (discards) await this.#clones.discard(clone);
        for (const volume of volumes) if (volume.discards) await this.#clones.discard(volume.clone);
      }
      await this.#discardMemory(id, memory, vm.suspended);
      await rm(vm.folder, { recursive: true, force: true });
      await this.#groups?.remove(`vm-${id}`);
    } finally {
      this.#vms.delete(id);
      this.#names.delete(id);
      for (const disk of disksOf(vm.record)) this.#disks.delete(disk);
      if (vm.suspended) this.park(id);
    }
  }
}

/** A daemon that was killed while it attached one had it on record already. */
function withoutLostVolumes(record: VmRecord, { description }: Machine): VmRecord {
  if (record.volumes === undefined) return record;
  const there = new Set(description.disks.map(({ id }) => id));
  return { ...record, volumes: record.volumes.filter(({ name }) => there.has(name)) };
}
