/**
 * A grid on one machine: an image server and a broker in one network namespace, hosts in one each, with an address, a
 * proxy, a cache and a mount of their own, and packets between them. Proxies reach the server through the ssh tunnel
 * and the broker by TLS; users ask through the broker's socket. Needs root.
 */
import { spawn, spawnSync } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import type { BuiltGuest } from '../../bench/guest/build.ts';
import { startNetwork } from '../../bench/link/network.ts';
import type { Network } from '../../bench/link/network.ts';
import { createQemu } from '../../src/vmm/index.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
const LINK = 'lan';

export class Grid {
  readonly world = new World();
  readonly hosts: readonly string[];
  readonly socket = path.join(this.world.folder, 'broker.sock');
  #network: Network | undefined;
  #server: ServerHandle | undefined;
  #broker: ChildProcess | undefined;
  #brokerPort = 0;
  #guest: BuiltGuest | undefined;

  readonly #labels: readonly string[];

  /** `labels` are of the image, beside those that it always has. */
  constructor(hosts: readonly string[], labels: readonly string[] = []) {
    this.hosts = hosts;
    this.#labels = labels;
  }

  /** Everything, to where every host offers the image. */
  async start(): Promise<void> {
    const { world } = this;
    const labels = ['os=small', 'kernel=6.1.0', ...this.#labels];
    this.#guest = await world.storeWithGuest(...labels.flatMap((label) => ['--label', label]));
    const network = await startNetwork(
      'packets',
      [{ name: LINK, rttMs: 0, bitsPerSecond: Infinity }],
      this.hosts.length,
    );
    this.#network = network;
    const { host: address } = await network.reach(LINK, 0);
    world.listen = address;
    this.#server = await network.atOrigin(() => world.server('--accept-uploads'));
    await world.succeeds(
      ...(['openssl', 'req', '-x509', '-nodes', '-days', '2', '-newkey', 'ec'] as const),
      ...['-pkeyopt', 'ec_paramgen_curve:prime256v1', '-subj', '/CN=broker'],
      ...['-addext', `subjectAltName=IP:${address}`],
      ...['-keyout', this.#file('broker.key'), '-out', this.#file('broker.crt')],
    );
    await this.startBroker();
    const operator = ['--broker', `unix:${this.socket}`, '--token-file', this.#file('broker/operator.token')];
    for (const [who, role] of Object.entries({ ada: 'user', bob: 'user', hosts: 'agent' })) {
      const { token } = await world.json<{ token: string }>(
        ...['broker', 'token', 'create', who, '--role', role, ...operator],
      );
      writeFileSync(this.#file(`${who}.token`), token + '\n', { mode: 0o600 });
    }
    await Promise.all(this.hosts.map((host) => this.mount(host)));
    await eventually(async () => {
      const images = await this.ask<{ hosts: number }[]>('ada', 'images');
      return images.some(({ hosts }) => hosts === this.hosts.length);
    });
  }

  #file(name: string): string {
    return path.join(this.world.folder, name);
  }

  mountpoint(host: string): string {
    return this.#file(`mnt-${host}`);
  }

  /** Starts a host's proxy, in the host's namespace. */
  async mount(host: string): Promise<void> {
    const server = this.#server!;
    mkdirSync(this.mountpoint(host), { recursive: true });
    const of = (what: string) => this.#file(`${what}-${host}`);
    await this.#network!.onHost(this.hosts.indexOf(host), () =>
      this.world.json(
        ...['mount', server.url, this.mountpoint(host), '--name', host],
        ...['--cache-dir', of('cache'), '--state-dir', of('state'), '--identity', this.world.identity],
        ...['--host-key', server.fingerprint, '--guest-memory', '1G', '--network', 'lan'],
        ...['--broker', `https://${this.world.listen}:${this.#brokerPort}`],
        ...['--broker-ca', this.#file('broker.crt')],
        ...['--token-file', this.#file('hosts.token'), '--broker-host', host],
      ),
    );
  }

  /** Starts the broker, again on the port that it had. */
  async startBroker(): Promise<void> {
    const { listen, environment } = this.world;
    const broker = await this.#network!.atOrigin(async () =>
      spawn(
        process.execPath,
        [
          ...[MAIN, 'broker', 'run', '--state-dir', this.#file('broker'), '--socket', this.socket, '--json'],
          ...['--listen', `${listen}:${this.#brokerPort}`],
          ...['--tls-key', this.#file('broker.key'), '--tls-cert', this.#file('broker.crt')],
        ],
        { stdio: ['ignore', 'pipe', 'ignore'], env: environment },
      ),
    );
    this.#broker = broker;
    const line = await new Promise<string>((resolve, reject) => {
      createInterface({ input: broker.stdout }).once('line', resolve);
      broker.once('exit', () => reject(new Error('the broker ended before it was ready')));
    });
    const { url } = JSON.parse(line) as { url: string };
    this.#brokerPort = Number(new URL(url).port);
  }

  async stopBroker(signal: NodeJS.Signals): Promise<void> {
    const broker = this.#broker;
    if (!broker || broker.exitCode !== null || broker.signalCode !== null) return;
    const ended = new Promise((resolve) => broker.once('exit', resolve));
    broker.kill(signal);
    await ended;
  }

  /** What tells the command whose token to use. */
  as(who: string): string[] {
    return ['--broker', `unix:${this.socket}`, '--token-file', this.#file(`${who}.token`)];
  }

  ask<T>(who: string, ...args: string[]): Promise<T> {
    return this.world.json<T>('broker', ...args, ...this.as(who));
  }

  /** Cuts a host off from everything, or lets it back. Its own programs run on. */
  setLink(host: string, state: 'up' | 'down'): void {
    this.#network!.onHost(this.hosts.indexOf(host), () => {
      spawnSync('ip', ['link', 'set', LINK, state]);
    });
  }

  /** Seconds until the guest is ready on this machine without any of gridvfs: an overlay on its file, the same QEMU. */
  async startLocally(): Promise<number> {
    const guest = this.#guest!;
    const folder = this.#file('local');
    mkdirSync(folder, { recursive: true });
    const disk = path.join(folder, 'disk.qcow2');
    this.world.dropPageCache();
    const startMs = performance.now();
    await this.world.succeeds('qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', guest.disk, disk);
    const machine = await createQemu({ accelerator: 'auto' }).start(
      {
        name: 'local',
        vcpus: 1,
        memoryBytes: guest.memoryBytes,
        disks: [{ path: disk, format: 'qcow2', readOnly: false }],
        boot: { kernel: guest.kernel, initrd: guest.initrd, commandLine: guest.commandLine },
        macAddress: '52:54:00:00:00:01',
        network: 'user',
        readyText: guest.readyText,
      },
      folder,
    );
    try {
      await machine.ready(200_000);
      return (performance.now() - startMs) / 1000;
    } finally {
      await machine.stop(0);
      rmSync(folder, { recursive: true, force: true });
    }
  }

  async stop(): Promise<void> {
    for (const host of this.hosts) await this.world.run('umount', this.mountpoint(host), '--force');
    await this.stopBroker('SIGTERM');
    await this.#server?.stop();
    await this.#network?.close();
    await this.world.dispose();
  }
}

/** Machines of a VM, on whatever host, whose guests may execute at this moment: those that no signal has stopped. */
export function runningCopies(vm: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .flatMap((pid) => {
      try {
        if (!readFileSync(`/proc/${pid}/cmdline`, 'latin1').includes(`guest=${vm}.`)) return [];
        const state = readFileSync(`/proc/${pid}/stat`, 'latin1').replace(/^.*\) /s, '')[0]!;
        return 'TtZX'.includes(state) ? [] : [Number(pid)];
      } catch {
        return []; // it ended
      }
    });
}

/** Generous, because a loaded machine may take long. */
export async function eventually(what: () => Promise<boolean> | boolean, timeoutMs = 200_000): Promise<void> {
  const endMs = performance.now() + timeoutMs;
  while (!(await what())) {
    if (performance.now() > endMs) throw new Error('it did not happen in time');
    await sleep(100);
  }
}
