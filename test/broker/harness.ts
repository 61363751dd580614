/**
 * A broker with its databases and hosts for tests. The PostgreSQL server is a real one of the test's own, on a unix
 * socket in a temp folder, run as Debian's user `postgres` because it refuses root. Hosts are the agent's real link
 * over machines that are entries in a table: what they do of QEMU's is nothing that these tests look at.
 */
import { spawn, spawnSync } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import {
  chmodSync,
  chownSync,
  existsSync,
  globSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
} from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { BrokerClient } from '../../src/agent/broker-client.ts';
import { BrokerLink } from '../../src/agent/broker-link.ts';
import type { MachineSignal } from '../../src/agent/broker-lease.ts';
import type { LinkMachines, LinkVm } from '../../src/agent/broker-orders.ts';
import { openDatabase } from '../../src/broker/database.ts';
import { Broker, serveBroker } from '../../src/broker/index.ts';
import type { BrokerServer } from '../../src/broker/index.ts';
import type { Relay } from '../../src/broker/segments.ts';
import { LEASE_TIMES } from '../../src/broker/loads.ts';
import type { LeaseTimes } from '../../src/broker/loads.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { GridError } from '../../src/core/errors.ts';
import type { HostFacts, OfferedVersion, SavedVolume, VolumeSave } from '../../src/core/grid.ts';
import { GIB } from '../../src/core/limits.ts';
import { TableVolumes } from './table-volumes.ts';

export const DIALECTS = ['sqlite', 'postgres'] as const;

/** Databases of one kind for one test file; each call of `fresh` gives an empty one. */
export class Databases {
  readonly dialect: (typeof DIALECTS)[number];
  readonly folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-broker-'));
  #server: ChildProcess | undefined;
  #count = 0;

  constructor(dialect: (typeof DIALECTS)[number]) {
    this.dialect = dialect;
  }

  async start(): Promise<void> {
    if (this.dialect === 'sqlite') return;
    const id = (flag: string) => Number(spawnSync('id', [flag, 'postgres'], { encoding: 'utf8' }).stdout);
    const user = process.getuid?.() === 0 ? { uid: id('-u'), gid: id('-g') } : undefined;
    const data = path.join(this.folder, 'data');
    mkdirSync(data);
    chmodSync(this.folder, 0o755);
    if (user) {
      chownSync(data, user.uid, user.gid);
      chownSync(this.folder, user.uid, user.gid);
    }
    const bin = path.dirname(
      globSync('/usr/lib/postgresql/*/bin/postgres').toSorted().at(-1) ?? '/missing/x',
    );
    const made = spawnSync(
      path.join(bin, 'initdb'),
      ['-D', data, '-U', 'grid', '-A', 'trust', '-N', '-E', 'UTF8', '--locale=C'],
      {
        ...user,
        cwd: this.folder,
        encoding: 'utf8',
      },
    );
    if (made.status !== 0) throw new Error(`initdb: ${made.stderr}${made.error?.message ?? ''}`);
    this.#server = spawn(
      path.join(bin, 'postgres'),
      [
        '-D',
        data,
        '-k',
        this.folder,
        '-c',
        'listen_addresses=',
        '-c',
        'fsync=off',
        '-c',
        'shared_buffers=16MB',
      ],
      { ...user, cwd: this.folder, stdio: 'ignore' },
    );
    for (let attempt = 0; ; attempt++) {
      try {
        await (await openDatabase(this.#url('postgres'))).close();
        break;
      } catch (error) {
        if (attempt > 600 || this.#server.exitCode !== null) throw error;
        await sleep(50);
      }
    }
  }

  #url(name: string): string {
    return `postgres://grid@/${name}?host=${encodeURIComponent(this.folder)}`;
  }

  /** Where an empty database is: what `--database` takes. */
  async fresh(): Promise<string> {
    const name = `t${++this.#count}`;
    if (this.dialect === 'sqlite') return path.join(this.folder, `${name}.db`);
    const db = await openDatabase(this.#url('postgres'));
    await db.run(`CREATE DATABASE ${name}`);
    await db.close();
    return this.#url(name);
  }

  async stop(): Promise<void> {
    const server = this.#server;
    if (server && server.exitCode === null) {
      const ended = new Promise((resolve) => server.once('exit', resolve));
      server.kill('SIGINT'); // fast shutdown
      await ended;
    }
    rmSync(this.folder, { recursive: true, force: true });
  }
}

export interface Running {
  readonly broker: Broker;
  readonly server: BrokerServer;
  readonly socket: string;
  client(token: string): BrokerClient;
  /** A client with a new token. */
  as(user: string, role?: 'user' | 'operator' | 'agent'): Promise<BrokerClient>;
  close(): Promise<void>;
}

export interface BrokerOptions {
  readonly leaseTimes?: LeaseTimes;
  readonly callsPerMinute?: number;
  readonly relay?: Relay;
}

export async function startBroker(
  database: string,
  folder: string,
  options: BrokerOptions = {},
): Promise<Running> {
  const socket = path.join(folder, `b${randomBytes(4).toString('hex')}.sock`);
  const log = () => {};
  const broker = await Broker.open({
    ...{ database, log, leaseTimes: options.leaseTimes ?? LEASE_TIMES },
    ...(options.relay === undefined ? {} : { relay: options.relay }),
  });
  const server = await serveBroker(broker, {
    socketPath: socket,
    ...(options.callsPerMinute === undefined ? {} : { callsPerMinute: options.callsPerMinute }),
  });
  const clients: BrokerClient[] = [];
  const client = (token: string) => {
    const made = new BrokerClient({ url: `unix:${socket}`, token });
    clients.push(made);
    return made;
  };
  return {
    broker,
    server,
    socket,
    client,
    as: async (user, role = 'user') => client((await broker.access.create(user, role)).token),
    async close() {
      for (const one of clients) one.close();
      await server.close();
      await broker.close();
    },
  };
}

/** Machines that are entries of a table; `moments` says how long each was let run. */
export class TableMachines implements LinkMachines {
  readonly vms = new Map<string, LinkVm>();
  readonly paused = new Set<string>();
  /** Every VM that was ever started here. */
  readonly started: string[] = [];
  /** What a VM has in its memory, by name; a checkpoint carries it. */
  readonly contents = new Map<string, string>();
  /** Checkpoints in the store, which the hosts of a test share. */
  store = new Map<string, string>();
  /** Told of each VM that begins to run. */
  onStart: ((id: string) => void) | undefined;
  publishFailure: GridError | undefined;
  /** Until when a checkpoint is on its way into the store. */
  publishing: Promise<unknown> | undefined;
  readonly requests: Parameters<LinkMachines['run']>[0][] = [];
  readonly volumes = new TableVolumes();
  /** Starts fail with this while it is set. */
  failure: GridError | undefined;
  #pids = 1_000_000;

  list(): LinkVm[] {
    return [...this.vms.values()];
  }

  async run(request: Parameters<LinkMachines['run']>[0]): Promise<LinkVm> {
    this.requests.push(request);
    await sleep(1);
    if (this.failure) throw this.failure;
    if (this.vms.has(request.name)) throw new GridError('exists', `there is a VM '${request.name}' already`);
    const vm = {
      id: request.name,
      state: 'running',
      pid: this.#pids++,
      readyText: 'ready',
      consoleSocket: `/run/${request.name}`,
      timeline: { clonedMs: 1, startedMs: 2 },
    };
    this.vms.set(vm.id, vm);
    this.started.push(vm.id);
    this.onStart?.(vm.id);
    return vm;
  }

  async runFrom(checkpoint: string, name: string): Promise<LinkVm> {
    const content = this.store.get(checkpoint);
    if (content === undefined) throw new GridError('not-found', `no image ${checkpoint}`);
    const vm = await this.run({ image: '', name, memoryBytes: 0, vcpus: 1, network: 'user' });
    this.contents.set(name, content);
    for (const volume of this.volumes.store.checkpoints.get(checkpoint) ?? [])
      await this.volumes.attach(name, volume);
    return vm;
  }

  async execute(id: string, command: string) {
    this.status(id);
    await sleep(1);
    if (command === 'hangs') await new Promise(() => {});
    if (command === 'cannot') throw new GridError('unsupported', 'nothing there takes commands');
    return { exitCode: command === 'fails' ? 3 : 0, output: `did ${command}\n` };
  }

  async suspend(id: string): Promise<void> {
    const { pid: _, ...vm } = this.status(id);
    await sleep(1);
    this.vms.set(id, { ...vm, state: 'suspended' });
  }

  async resume(id: string): Promise<void> {
    this.vms.set(id, { ...this.status(id), state: 'running', pid: this.#pids++ });
    this.onStart?.(id);
  }

  async publish(id: string, reference: string, saves: readonly VolumeSave[] = []) {
    this.status(id);
    await sleep(1);
    await this.publishing;
    if (this.publishFailure) throw this.publishFailure;
    const saved: SavedVolume[] = [];
    for (const one of saves) saved.push(await this.volumes.save(one.id, one.reference));
    const kept = (this.volumes.attached.get(id) ?? []).map((volume) => {
      const one = saved.find((each) => each.id === volume.id);
      return one?.manifest === undefined ? volume : { ...volume, manifest: one.manifest };
    });
    this.volumes.store.checkpoints.set(reference, kept);
    this.store.set(reference, this.contents.get(id) ?? '');
    return { digest: sha256(Buffer.from(reference)), newStoredBytes: 1000, saved };
  }

  async commit(id: string, reference: string) {
    this.status(id);
    await sleep(1);
    return { digest: sha256(Buffer.from(reference)), newStoredBytes: 10 };
  }

  status(id: string): LinkVm {
    const vm = this.vms.get(id);
    if (!vm) throw new GridError('not-found', `there is no VM '${id}'`);
    return vm;
  }

  async ready(id: string): Promise<LinkVm> {
    await sleep(1);
    const vm = this.status(id);
    return { ...vm, timeline: { ...vm.timeline, readyMs: 3 } };
  }

  async stop(id: string): Promise<void> {
    this.status(id);
    await sleep(1);
    this.vms.delete(id);
    this.paused.delete(id);
    this.volumes.attached.delete(id);
  }

  /** VMs that run at this moment. */
  running(): string[] {
    return [...this.vms.values()]
      .filter(({ id, state }) => state === 'running' && !this.paused.has(id))
      .map(({ id }) => id);
  }

  signal(pid: number, signal: MachineSignal): void {
    const vm = [...this.vms.values()].find((one) => one.pid === pid);
    if (!vm) throw new Error('ESRCH');
    if (signal === 'SIGSTOP') this.paused.add(vm.id);
    else this.paused.delete(vm.id);
    if (signal === 'SIGKILL') this.vms.delete(vm.id);
  }
}

export const version = (
  name: string,
  number: string,
  labels: Record<string, string> = {},
): OfferedVersion => ({
  name,
  version: number,
  manifest: Buffer.from(`${name}:${number}`).toString('hex').padEnd(64, '0').slice(0, 64),
  kind: 'disk',
  sizeBytes: GIB,
  labels,
  created: '2026-01-01T00:00:00.000Z',
});

/** A way to the broker that can be cut and mended. */
export class Cable {
  readonly socket: string;
  readonly #server: net.Server;
  readonly #ends = new Set<net.Socket>();
  #isCut = false;

  private constructor(socket: string, target: string) {
    this.socket = socket;
    this.#server = net.createServer((near) => {
      if (this.#isCut) {
        near.destroy();
        return;
      }
      const far = net.connect(target);
      for (const [end, other] of [
        [near, far],
        [far, near],
      ] as const) {
        this.#ends.add(end);
        end.on('error', () => {});
        end.once('close', () => {
          this.#ends.delete(end);
          other.destroy();
        });
        end.pipe(other);
      }
    });
  }

  static async to(target: string, folder: string): Promise<Cable> {
    const cable = new Cable(path.join(folder, `c${randomBytes(4).toString('hex')}.sock`), target);
    await new Promise<void>((resolve) => cable.#server.listen(cable.socket, resolve));
    return cable;
  }

  cut(): void {
    this.#isCut = true;
    for (const end of this.#ends) end.destroy();
  }

  mend(): void {
    this.#isCut = false;
  }

  async close(): Promise<void> {
    this.cut();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

export class TestHost {
  readonly machines = new TableMachines();
  readonly warmBytes: Record<string, number> = {};
  /** What it spent on VMs, by their names here. */
  readonly cpuSeconds = new Map<string, number>();
  /** What it was told to fetch ahead. */
  readonly warmed: string[] = [];
  versions: OfferedVersion[];
  readonly facts: HostFacts;
  readonly log: string[] = [];
  cable: Cable | undefined;
  readonly #file: string;
  #link: BrokerLink | undefined;
  #client: BrokerClient | undefined;

  constructor(name: string, folder: string, versions: OfferedVersion[], facts: Partial<HostFacts> = {}) {
    this.versions = versions;
    this.#file = path.join(folder, `${name}.json`);
    this.facts = {
      host: name,
      incarnation: randomBytes(6).toString('hex'),
      vcpus: 8,
      memoryBytes: 16 * GIB,
      guestMemoryBytes: 16 * GIB,
      guestVcpus: 64,
      accelerator: 'tcg',
      virtual: false,
      networks: ['lan'],
      source: '/srv/store',
      ...facts,
    };
  }

  get link(): BrokerLink {
    return this.#link!;
  }

  connect(client: BrokerClient): this {
    this.#client = client;
    this.#link = new BrokerLink({
      client,
      facts: this.facts,
      machines: this.machines,
      volumes: this.machines.volumes,
      cache: async () => ({ warmBytes: { ...this.warmBytes }, fetchedBytes: 0 }),
      versions: async () => this.versions,
      spent: async () => new Map([...this.cpuSeconds].map(([id, cpuSeconds]) => [id, { cpuSeconds }])),
      warm: async (image) => void this.warmed.push(image),
      connect: (vm, port, stream) => this.connectStream(vm, port, stream),
      file: this.#file,
      log: (line) => this.log.push(line),
      signal: (pid, signal) => this.machines.signal(pid, signal),
    });
    return this;
  }

  /** Its guests say who and what they are, and then what one says to them. */
  async connectStream(vm: string, port: number, stream: string): Promise<void> {
    this.machines.status(vm);
    if (port === 23) throw new GridError('unsupported', 'no such network');
    const route = `/v1/agent/streams/${stream}?host=${this.facts.host}`;
    const far = await this.#client!.upgrade(route, 'gridvfs-stream');
    far.on('error', () => {}); // who listened may go at any moment
    far.write(`${vm} ${port}\n`);
    far.pipe(far);
  }

  /** What it offers has changed: its next report says so at once. */
  refresh(): void {
    this.#link!.lookAgain();
  }

  /** Names of VMs that the next start of this host pauses without a lease. */
  remembered(): string[] {
    return existsSync(this.#file) ? (JSON.parse(readFileSync(this.#file, 'utf8')) as string[]) : [];
  }

  /** The same through a cable that can be cut. */
  connectBy(cable: Cable, token: string): this {
    this.cable = cable;
    return this.connect(new BrokerClient({ url: `unix:${cable.socket}`, token }));
  }

  async close(): Promise<void> {
    await this.#link?.close();
    await this.cable?.close();
  }
}

/** Asks until `what` gives a value; generous unless a bound is given, because a loaded machine may take long. */
export async function eventually<T>(
  what: () => Promise<T | undefined | false> | T | undefined | false,
  timeoutMs = 200_000,
): Promise<T> {
  const endMs = performance.now() + timeoutMs;
  for (;;) {
    const value = await what();
    if (value !== undefined && value !== false) return value;
    if (performance.now() > endMs) throw new Error('it did not happen in time');
    await sleep(10);
  }
}
