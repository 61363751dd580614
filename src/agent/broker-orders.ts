/**
 * What a broker's orders do on this host. An order may come again, after a restart of the broker or of this host's
 * proxy: each looks first at what is there already. Orders of one VM are carried out one after the other.
 *
 *   run         boots a clone of an image, or goes on from a checkpoint in the store; waits for the guest
 *   suspend     to this host's disk, then as a checkpoint into the store; what is on the disk stays until the broker
 *               no longer names the VM as this host's
 *   checkpoint  the same, and the VM goes on
 *   command     in its guest; again where the order comes again, because this host's proxy was replaced meanwhile
 *   connect     a stream of a user's to a port of its guest
 *   attach, detach          a data volume (grid-volumes.ts) and a VM that runs
 *   make-, save-, drop-volume
 *   commit      the disk as it is becomes a version of an image
 *   stop, warm, refresh
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, GridError } from '../core/errors.ts';
import type {
  CarriedVolume,
  GuestCommandResult,
  Order,
  OrderResult,
  SavedVolume,
  VolumeSave,
} from '../core/grid.ts';
import type { MachineSegment } from '../core/machine.ts';
import { Turns } from '../core/turns.ts';
import type { LeasedVm, LeasedVms } from './broker-lease.ts';

export interface LinkVm extends LeasedVm {
  readonly reason?: string;
  readonly readyText?: string;
  readonly consoleSocket: string;
  readonly timeline: { readonly clonedMs?: number; readonly startedMs?: number; readonly readyMs?: number };
}

/** What the link needs of the agent's machines, those that are suspended among them. */
export interface LinkMachines {
  list(): readonly LinkVm[];
  run(request: {
    image: string;
    name: string;
    memoryBytes: number;
    vcpus: number;
    network: 'user' | 'none';
    segments?: readonly MachineSegment[];
    sshKeys?: readonly string[];
    userData?: string;
    hostName?: string;
  }): Promise<LinkVm>;
  /** A shell command in its guest. */
  execute(id: string, command: string, timeoutMs: number): Promise<GuestCommandResult>;
  /** Goes on from a checkpoint in the store. */
  runFrom(checkpoint: string, name: string): Promise<LinkVm>;
  status(id: string): LinkVm;
  ready(id: string, timeoutMs: number): Promise<LinkVm>;
  /** A suspended one is thrown away. */
  stop(id: string, graceMs: number): Promise<void>;
  suspend(id: string): Promise<unknown>;
  resume(id: string): Promise<unknown>;
  /** A checkpoint in the store, of one that is suspended. `over`: it does not go on here. */
  publish(
    id: string,
    reference: string,
    saves: readonly VolumeSave[],
    over: boolean,
  ): Promise<{ digest: string; newStoredBytes: number; saved?: readonly SavedVolume[] }>;
  commit(
    id: string,
    reference: string,
    labels: Readonly<Record<string, string>>,
  ): Promise<{ digest: string; newStoredBytes: number }>;
}

/** What the link needs of the agent's data volumes. Each is done again without harm. */
export interface LinkVolumes {
  attach(vm: string, volume: CarriedVolume): Promise<void>;
  detach(vm: string, name: string): Promise<void>;
  make(request: { reference: string; sizeBytes: number; from?: string }): Promise<Made>;
  save(volume: string, reference: string, last: boolean): Promise<SavedVolume>;
  drop(volume: string): Promise<void>;
}

interface Made {
  readonly digest: string;
  readonly newStoredBytes: number;
}

export interface OrderParts {
  readonly machines: LinkMachines;
  readonly volumes: LinkVolumes;
  cache(): Promise<{ warmBytes: Record<string, number>; fetchedBytes: number }>;
  /** Fetches an image ahead. */
  warm(image: string): Promise<void>;
  /** Joins a port of a VM's guest with a stream that the broker waits for; resolves when both are there. */
  connect(vm: string, port: number, stream: string): Promise<void>;
  readonly log: (line: string) => void;
}

/** A checkpoint that another host made may be in this one's list of tags only after a while. */
const TAG_SEEN_MS = 20_000;
const GO_ON_EVERY_MS = 100;

type Result = Omit<OrderResult, 'order'>;

export class OrderWork {
  readonly #parts: OrderParts;
  readonly #leased: LeasedVms;
  readonly #refresh: () => void;
  #closed = false;
  /** Orders, by VM. */
  readonly #turns = new Turns();

  constructor(parts: OrderParts, leased: LeasedVms, refresh: () => void) {
    this.#parts = parts;
    this.#leased = leased;
    this.#refresh = refresh;
  }

  /** What waits for a lease waits no longer. */
  close(): void {
    this.#closed = true;
  }

  /** VMs that something is done to: they are this host's also where no list has them at the moment. */
  busy(): string[] {
    return this.#turns.names();
  }

  /** Never rejects. */
  async carryOut(order: Order): Promise<OrderResult> {
    try {
      return { order: order.id, ...(await this.#execute(order)) };
    } catch (error) {
      const { code, message } = asGridError(error, `cannot carry out ${order.id}`, 'bug');
      return { order: order.id, error: { code, message } };
    }
  }

  #execute(order: Order): Promise<Result> {
    const { machines, volumes } = this.#parts;
    switch (order.kind) {
      case 'run':
        return this.#run(order);
      case 'stop':
        return this.#turns.run(order.vm, () => this.#stop(order.vm, order.graceMs));
      case 'suspend':
        return this.#turns.run(order.vm, () => this.#suspend(order.vm, order.checkpoint, order.saves ?? []));
      case 'checkpoint':
        return this.#turns.run(order.vm, () =>
          this.#checkpoint(order.vm, order.checkpoint, order.saves ?? []),
        );
      case 'commit':
        return this.#turns.run(order.vm, () =>
          this.#made(machines.commit(order.vm, order.reference, order.labels ?? {})),
        );
      case 'command':
        // Not in its turn: it takes as long as it takes, and the VM can be stopped meanwhile.
        return machines.execute(order.vm, order.command, order.timeoutMs).then((command) => ({ command }));
      case 'connect':
        return this.#parts.connect(order.vm, order.port, order.stream).then(() => ({}));
      case 'attach':
        return this.#turns.run(order.vm, () => volumes.attach(order.vm, order.volume)).then(() => ({}));
      case 'detach':
        return this.#turns.run(order.vm, () => volumes.detach(order.vm, order.name)).then(() => ({}));
      case 'make-volume':
        return this.#made(volumes.make(order));
      case 'save-volume':
        return volumes.save(order.volume, order.reference, order.last).then((one) => ({ saved: [one] }));
      case 'drop-volume':
        return volumes.drop(order.volume).then(() => ({}));
      case 'warm':
        return this.#parts.warm(order.image).then(() => ({}));
      case 'refresh':
        this.#refresh();
        return Promise.resolve({});
      default:
        throw new GridError('unsupported', `this gridvfs knows no order '${(order as Order).kind}'`);
    }
  }

  async #made(work: Promise<Made & { readonly saved?: readonly SavedVolume[] }>): Promise<Result> {
    const { digest, newStoredBytes, saved } = await work;
    return {
      made: { manifest: digest, storedBytes: newStoredBytes },
      ...(saved === undefined ? {} : { saved }),
    };
  }

  async #stop(id: string, graceMs: number): Promise<Result> {
    const { machines } = this.#parts;
    try {
      const vm = machines.status(id);
      if (this.#leased.leased) this.#leased.proceed(vm);
      else this.#leased.endPaused(vm);
      await machines.stop(id, graceMs);
    } catch (error) {
      if (!(error instanceof GridError) || error.code !== 'not-found') throw error;
    }
    await this.#leased.drop(id);
    return {};
  }

  async #suspend(id: string, checkpoint: string, saves: readonly VolumeSave[]): Promise<Result> {
    const { machines } = this.#parts;
    if (machines.status(id).state !== 'suspended') await machines.suspend(id);
    try {
      return await this.#made(machines.publish(id, checkpoint, saves, true));
    } catch (error) {
      // Without a checkpoint in the store nobody else could resume it: it runs on here.
      await this.#goOn(id).catch((failure: unknown) =>
        this.#parts.log(`VM ${id} stays suspended: ${String(failure)}`),
      );
      throw error;
    }
  }

  /** Not the agent's own `publish` of one that runs: that would let it go on whether there is a lease or not. */
  async #checkpoint(id: string, checkpoint: string, saves: readonly VolumeSave[]): Promise<Result> {
    const { machines } = this.#parts;
    if (machines.status(id).state !== 'suspended') await machines.suspend(id);
    try {
      return await this.#made(machines.publish(id, checkpoint, saves, false));
    } finally {
      await this.#goOn(id);
    }
  }

  /** Goes on with a suspended VM once that is allowed. One that was started elsewhere meanwhile is thrown away. */
  async #goOn(id: string): Promise<void> {
    const { machines } = this.#parts;
    for (;;) {
      const when = this.#leased.mayGoOn(id);
      if (when === 'now') break;
      if (when === 'never') {
        await machines.stop(id, 0);
        await this.#leased.drop(id);
        throw new GridError('closed', `VM ${id} is not this host's any more`);
      }
      if (this.#closed) throw new GridError('closed', 'the proxy ends; the VM stays suspended');
      await sleep(GO_ON_EVERY_MS);
    }
    await machines.resume(id);
    this.#leased.enforce();
  }

  async #run(order: Extract<Order, { kind: 'run' }>): Promise<Result> {
    const { machines } = this.#parts;
    const before = (await this.#parts.cache()).fetchedBytes;
    let vm = await this.#turns.run(order.vm, async () => {
      if (order.restart) {
        await this.#leased.add(order.vm);
        if (!this.#leased.leased) throw new GridError('closed', 'this host has no lease to start it under');
      }
      const started = await this.#start(order);
      // While it boots: its guest has them by the time that it is ready.
      for (const volume of order.volumes ?? []) await this.#parts.volumes.attach(order.vm, volume);
      this.#leased.enforce();
      return started;
    });
    // Not in its turn: a guest that never answers can be stopped.
    if (vm.readyText !== undefined) vm = await machines.ready(order.vm, order.readyTimeoutMs);
    return {
      timeline: vm.timeline,
      fetchedBytes: Math.max(0, (await this.#parts.cache()).fetchedBytes - before),
    };
  }

  /** An order that comes again finds its VM. */
  async #start(order: Extract<Order, { kind: 'run' }>): Promise<LinkVm> {
    const { machines } = this.#parts;
    const { vm: name, image, memoryBytes, vcpus, network, checkpoint } = order;
    const { segments, sshKeys, userData, hostName } = order;
    const there = machines.list().find(({ id, state }) => id === name && state !== 'failed');
    if (there) return there;
    if (checkpoint === undefined) {
      return machines.run({
        ...{ name, image, memoryBytes, vcpus, network },
        ...(segments === undefined ? {} : { segments }),
        ...(sshKeys === undefined ? {} : { sshKeys }),
        ...(userData === undefined ? {} : { userData }),
        ...(hostName === undefined ? {} : { hostName }),
      });
    }
    for (const endMs = performance.now() + TAG_SEEN_MS; ;) {
      try {
        return await machines.runFrom(checkpoint, name);
      } catch (error) {
        const early = error instanceof GridError && error.code === 'not-found' && performance.now() < endMs;
        if (!early) throw error;
        await sleep(500);
      }
    }
  }
}
