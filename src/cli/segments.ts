/**
 * Puts the VMs of a host on virtual networks: the agent says which VM is on which, a `Networks` carries their frames,
 * and for each network with a VM here a trunk is kept to where the other hosts' trunks are (the broker).
 */
import { randomBytes } from 'node:crypto';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import type { MachineSegments } from '../agent/machine-parts.ts';
import { segmentSocket } from '../core/machine.ts';
import type { MachineSegment } from '../core/machine.ts';
import { Networks } from '../network/index.ts';
import type { NetworkStatus } from '../network/index.ts';

const RETRY_MS = 1_000;

/** Opens a stream to the network's middle. */
export type OpenTrunk = (network: string) => Promise<Duplex>;

export class HostSegments implements MachineSegments {
  readonly #networks: Networks;
  readonly #log: (line: string) => void;
  /** By VM: its segments. */
  readonly #vms = new Map<string, readonly MachineSegment[]>();
  /** Networks with a trunk, or one that is on its way. */
  readonly #trunks = new Map<string, AbortController>();
  #openTrunk: OpenTrunk | undefined;

  constructor(log: (line: string) => void) {
    // A name of this daemon's alone: two hosts may call their proxies alike.
    this.#networks = new Networks(randomBytes(8).toString('hex'), log);
    this.#log = log;
  }

  /** From now on networks have trunks. */
  connect(openTrunk: OpenTrunk): void {
    this.#openTrunk = openTrunk;
    for (const segments of this.#vms.values()) for (const { network } of segments) this.#keepTrunk(network);
  }

  plugIn(vm: string, segments: readonly MachineSegment[], folder: string): void {
    if (segments.length === 0) return;
    this.#vms.set(vm, segments);
    for (const [index, { network, macAddress, address, server, hostName }] of segments.entries()) {
      const { dhcp } = this.#networks.open(network, server === undefined ? undefined : { server });
      try {
        if (address !== undefined) {
          dhcp?.assign({ mac: macAddress, address, ...(hostName === undefined ? {} : { hostName }) });
        }
      } catch (error) {
        this.#log(`network ${network}: VM ${vm} gets no address: ${String(error)}`);
      }
      this.#networks.plugIn(network, vm, path.join(folder, segmentSocket(index)));
      this.#keepTrunk(network);
    }
  }

  plugOut(vm: string): void {
    const segments = this.#vms.get(vm);
    if (segments === undefined) return;
    this.#vms.delete(vm);
    for (const { network, macAddress } of segments) {
      this.#networks.open(network).dhcp?.release(macAddress);
      const counters = this.#networks.plugOut(network, vm);
      if (counters) {
        this.#log(
          `VM ${vm} on network ${network}: sent ${counters.framesIn} frames (${counters.bytesIn} bytes), ` +
            `had ${counters.framesOut} (${counters.bytesOut})`,
        );
      }
      const used = [...this.#vms.values()].some((others) => others.some((one) => one.network === network));
      if (used) continue;
      this.#trunks.get(network)?.abort();
      this.#trunks.delete(network);
      this.#networks.close(network);
    }
  }

  #keepTrunk(network: string): void {
    const open = this.#openTrunk;
    if (open === undefined || this.#trunks.has(network)) return;
    const end = new AbortController();
    this.#trunks.set(network, end);
    void this.#trunkLoop(network, open, end.signal);
  }

  async #trunkLoop(network: string, open: OpenTrunk, end: AbortSignal): Promise<void> {
    let told = '';
    while (!end.aborted) {
      try {
        const stream = await open(network);
        const closed = new Promise((resolve) => stream.once('close', resolve));
        const destroy = () => void stream.destroy();
        end.addEventListener('abort', destroy);
        try {
          if (end.aborted) destroy();
          const other = await this.#networks.join(network, stream);
          this.#log(`network ${network} is joined to ${other}`);
          told = '';
          await closed;
        } finally {
          end.removeEventListener('abort', destroy);
        }
      } catch (error) {
        const text = error instanceof Error ? error.message : String(error);
        if (text !== told && !end.aborted) this.#log(`network ${network}: ${text}`);
        told = text;
      }
      await sleep(RETRY_MS, undefined, { signal: end, ref: false }).catch(() => undefined);
    }
  }

  status(): NetworkStatus[] {
    return this.#networks.status();
  }

  close(): void {
    for (const end of this.#trunks.values()) end.abort();
    this.#trunks.clear();
    this.#networks.closeAll();
  }
}
