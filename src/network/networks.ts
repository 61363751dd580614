/**
 * The virtual networks of a host, by name: machines and trunks are plugged in and out, and what each has sent and had is
 * counted. A machine's socket that closes is connected again until the machine is plugged out: the machine outlives the
 * daemon, and the next daemon plugs it in again.
 */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { GridError } from '../core/errors.ts';
import { Dhcp } from './dhcp.ts';
import type { DhcpOptions } from './dhcp.ts';
import { FrameReader } from './frames.ts';
import { connectMachine, StreamOutlet } from './outlet.ts';
import { Switch } from './switch.ts';
import type { Counters, PortKind } from './switch.ts';
import { greet } from './trunk.ts';

/** Networks on one host. */
const NETWORKS_MAX = 1024;
const CONNECT_EVERY_MS = 100;

export interface NetworkStatus {
  readonly network: string;
  readonly addresses: number;
  readonly ports: readonly { readonly name: string; readonly kind: PortKind; readonly counters: Counters }[];
}

interface Network {
  readonly fabric: Switch;
  readonly dhcp: Dhcp | undefined;
  readonly machines: Map<string, AbortController>;
  readonly trunks: Map<string, Duplex>;
  /** What was counted for machines whose socket is closed now. */
  readonly past: Map<string, Counters>;
}

export class Networks {
  readonly #host: string;
  readonly #relay: boolean;
  readonly #log: (line: string) => void;
  readonly #networks = new Map<string, Network>();

  /** `host` is this one's name for the others; `relay` makes it the middle of a star (switch.ts). */
  constructor(host: string, log: (line: string) => void, options: { relay?: boolean } = {}) {
    this.#host = host;
    this.#log = log;
    this.#relay = options.relay ?? false;
  }

  /** The network, made when it is not there. The first call decides about its addresses. Throws no-space. */
  open(name: string, dhcp?: DhcpOptions): { readonly fabric: Switch; readonly dhcp: Dhcp | undefined } {
    let network = this.#networks.get(name);
    if (network === undefined) {
      if (this.#networks.size >= NETWORKS_MAX)
        throw new GridError('no-space', `this host has its ${NETWORKS_MAX} networks`);
      const server = dhcp === undefined ? undefined : new Dhcp(dhcp);
      const options = { relay: this.#relay, ...(server === undefined ? {} : { dhcp: server }) };
      network = {
        fabric: new Switch(name, options),
        dhcp: server,
        machines: new Map(),
        trunks: new Map(),
        past: new Map(),
      };
      this.#networks.set(name, network);
    }
    return network;
  }

  #existing(name: string): Network {
    this.open(name);
    return this.#networks.get(name)!;
  }

  /**
   * Plugs a machine in: its socket is connected as soon as it answers, and again whenever it closes. Throws exists.
   */
  plugIn(name: string, machine: string, socketPath: string): void {
    const network = this.#existing(name);
    if (network.machines.has(machine))
      throw new GridError('exists', `machine '${machine}' is on network '${name}' already`);
    const gone = new AbortController();
    network.machines.set(machine, gone);
    void this.#keepConnected(network, machine, socketPath, gone.signal).catch((error: unknown) =>
      this.#log(`network ${name}: machine ${machine}: ${String(error)}`),
    );
  }

  async #keepConnected(
    network: Network,
    machine: string,
    socketPath: string,
    gone: AbortSignal,
  ): Promise<void> {
    const { fabric } = network;
    while (!gone.aborted) {
      try {
        const socket = await connectMachine(socketPath, (bytes, start, end) =>
          fabric.receive(port, bytes, start, end),
        );
        const port = fabric.add(machine, 'machine', new StreamOutlet(socket));
        const before = network.past.get(machine);
        if (before !== undefined) Object.assign(port.counters, structuredClone(before));
        const end = () => void socket.destroy();
        gone.addEventListener('abort', end, { once: true });
        if (gone.aborted) end();
        await new Promise((resolve) => socket.once('close', resolve));
        gone.removeEventListener('abort', end);
        network.past.set(machine, port.counters);
        fabric.remove(port);
      } catch (error) {
        if (!(error instanceof GridError) || error.code !== 'unreachable') throw error;
      }
      await sleep(CONNECT_EVERY_MS, undefined, { signal: gone, ref: false }).catch(() => undefined);
    }
  }

  /** What the machine sent and had, all of it. Idempotent: undefined when it is on no such network. */
  plugOut(name: string, machine: string): Counters | undefined {
    const network = this.#networks.get(name);
    const gone = network?.machines.get(machine);
    if (network === undefined || gone === undefined) return undefined;
    const port = network.fabric.port(machine);
    gone.abort();
    if (port !== undefined) network.fabric.remove(port);
    const counters = port?.counters ?? network.past.get(machine) ?? emptyCounters();
    network.machines.delete(machine);
    network.past.delete(machine);
    this.#forgetEmpty(name);
    return counters;
  }

  /**
   * Joins the network to another host's over `stream`. Resolves with that host's name when both have greeted; a trunk
   * to it that was there before is ended, for it is the one that broke. Throws as `greet` does.
   */
  async join(name: string, stream: Duplex): Promise<string> {
    // A frame that waits for the far side's word on the one before is late by as long as that takes.
    if (stream instanceof net.Socket) stream.setNoDelay(true);
    const { other, rest } = await greet(stream, { network: name, host: this.#host });
    if (other.host === this.#host) {
      stream.destroy();
      throw new GridError('denied', `a trunk of network '${name}' leads back to this host`);
    }
    const network = this.#existing(name);
    const { fabric } = network;
    const portName = `trunk:${other.host}`;
    const before = fabric.port(portName);
    if (before !== undefined) fabric.remove(before);
    network.trunks.get(other.host)?.destroy();
    const port = fabric.add(portName, 'trunk', new StreamOutlet(stream));
    network.trunks.set(other.host, stream);
    const reader = new FrameReader((bytes, start, end) => fabric.receive(port, bytes, start, end));
    const take = (piece: Buffer) => {
      if (!reader.push(piece)) stream.destroy();
    };
    stream.on('data', take);
    stream.once('close', () => {
      fabric.remove(port);
      if (network.trunks.get(other.host) === stream) network.trunks.delete(other.host);
      this.#forgetEmpty(name);
    });
    if (rest.length > 0) take(rest);
    stream.resume();
    return other.host;
  }

  #forgetEmpty(name: string): void {
    const network = this.#networks.get(name);
    if (network?.machines.size === 0 && network.trunks.size === 0) this.#networks.delete(name);
  }

  /** Ends this host's part of a network. */
  close(name: string): void {
    const network = this.#networks.get(name);
    if (network === undefined) return;
    for (const machine of network.machines.keys()) this.plugOut(name, machine);
    for (const stream of network.trunks.values()) stream.destroy();
    this.#networks.delete(name);
  }

  closeAll(): void {
    for (const name of this.#networks.keys()) this.close(name);
  }

  status(): NetworkStatus[] {
    return [...this.#networks.values()].map(({ fabric }) => ({
      network: fabric.network,
      addresses: fabric.addresses,
      ports: fabric.ports.map(({ name, kind, counters }) => ({
        name,
        kind,
        counters: structuredClone(counters),
      })),
    }));
  }
}

function emptyCounters(): Counters {
  return {
    framesIn: 0,
    bytesIn: 0,
    framesOut: 0,
    bytesOut: 0,
    drops: { full: 0, malformed: 0, flood: 0, filtered: 0 },
  };
}
