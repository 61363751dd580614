/**
 * A virtual network on one host: an Ethernet switch whose ports are machines and trunks to the same network elsewhere.
 * One object is one network; no two of them share anything, so there is nothing by which a frame could change over.
 *
 *   machine's socket → FrameReader → receive: learn the source, find the destination → runs of frames → sockets
 *
 * Frames travel in the format of frames.ts on both sides. So a run of frames for one destination goes out as the bytes
 * that came in: no copy, nothing allocated per frame, one write for as many frames as one read brought.
 *
 * Learning: the source address of each frame, for five minutes, bounded per port (mac-table.ts). A frame for an address
 * that nobody is known to have, or for several (broadcast, multicast), goes to every port but the one it came from; of
 * these a machine may send FLOOD_PER_SECOND_MAX. Frames for 01:80:c2:00:00:0x end at a bridge, as the standard wants.
 *
 * No loops: hosts form a full mesh or a star of trunks, and what came by a trunk goes out by none. The middle of a star
 * (`relay`) is the exception: what it has are trunks only, and it passes frames from one to the others.
 *
 * A port that does not take its frames: its queue fills; then the ports that send to it are not read for a moment, as
 * with Ethernet's own pause frames, so bursts lose nothing. If it has not caught up by then, its frames are dropped until
 * it has, and nobody waits for it (outlet.ts).
 *
 * Not done: VLANs (tags pass), multicast snooping, spanning tree.
 */
import { GridError } from '../core/errors.ts';
import type { Dhcp } from './dhcp.ts';
import { FRAME_BYTES_MIN, lengthAt, PREFIX_BYTES } from './frames.ts';
import { MacTable } from './mac-table.ts';

/** Ports of a network on a host. */
export const PORTS_MAX = 1024;
/** Addresses of one machine: its own, and some of what it may run itself. */
const MACHINE_MACS_MAX = 64;
/** Behind a trunk is the rest of the network. */
const TRUNK_MACS_MAX = 3072;
/** A guest's ARP, DHCP and discovery are a few a second; a loop in a guest is all that it has. */
export const FLOOD_PER_SECOND_MAX = 20_000;

/** Why a frame went nowhere. */
export interface Drops {
  /** Its port did not take what it had already. */
  full: number;
  /** Too short for a header, from an address that is none. */
  malformed: number;
  /** Beyond what may be sent to all. */
  flood: number;
  /** For bridges, or for somebody at the port it came from. */
  filtered: number;
}

export interface Counters {
  framesIn: number;
  bytesIn: number;
  framesOut: number;
  bytesOut: number;
  readonly drops: Drops;
}

export type PortKind = 'machine' | 'trunk';

/** The far side of a port. */
export interface Outlet {
  /** Takes whole frames; false when it has more than enough. The bytes are not written to later. */
  send(bytes: Uint8Array): boolean;
  /** False when it was waited for in vain: what it would be sent is dropped. */
  readonly patience: boolean;
  /** What it is sent is not read on for a moment, until it has caught up. */
  hold(source: Outlet): void;
  /** Reads no more until `proceed`. */
  pause(): void;
  proceed(): void;
}

export class Port {
  readonly name: string;
  readonly kind: PortKind;
  readonly outlet: Outlet;
  /** In the table of addresses. */
  readonly index: number;
  readonly counters: Counters = {
    framesIn: 0,
    bytesIn: 0,
    framesOut: 0,
    bytesOut: 0,
    drops: { full: 0, malformed: 0, flood: 0, filtered: 0 },
  };
  floodSecond = 0;
  floods = 0;
  closed = false;

  constructor(name: string, kind: PortKind, outlet: Outlet, index: number) {
    this.name = name;
    this.kind = kind;
    this.outlet = outlet;
    this.index = index;
  }
}

export interface SwitchOptions {
  /** Answers machines that ask for an address. */
  readonly dhcp?: Dhcp;
  /** The middle of a star. */
  readonly relay?: boolean;
  /** Monotonic milliseconds. */
  readonly now?: () => number;
}

const TO_ALL = -1;
const TO_NOBODY = -2;

export class Switch {
  readonly network: string;
  readonly #ports: (Port | undefined)[] = [];
  /** The same without holes. */
  #live: Port[] = [];
  readonly #macs = new MacTable();
  readonly #dhcp: Dhcp | undefined;
  readonly #relay: boolean;
  readonly #now: () => number;

  constructor(network: string, options: SwitchOptions = {}) {
    this.network = network;
    this.#dhcp = options.dhcp;
    this.#relay = options.relay ?? false;
    this.#now = options.now ?? (() => performance.now());
  }

  /** Throws exists (the name is a port's), no-space (there are PORTS_MAX). */
  add(name: string, kind: PortKind, outlet: Outlet): Port {
    if (this.#live.some((port) => port.name === name)) {
      throw new GridError('exists', `network '${this.network}' has a port '${name}' already`);
    }
    if (this.#live.length >= PORTS_MAX) {
      throw new GridError('no-space', `network '${this.network}' has its ${PORTS_MAX} ports on this host`);
    }
    let index = this.#ports.indexOf(undefined);
    if (index < 0) index = this.#ports.length;
    const port = new Port(name, kind, outlet, index);
    this.#ports[index] = port;
    this.#live = [...this.#live, port];
    return port;
  }

  remove(port: Port): void {
    if (port.closed) return;
    port.closed = true;
    this.#ports[port.index] = undefined;
    this.#live = this.#live.filter((one) => one !== port);
    this.#macs.forget(port.index);
  }

  get ports(): readonly Port[] {
    return this.#live;
  }

  port(name: string): Port | undefined {
    return this.#live.find((port) => port.name === name);
  }

  /** Addresses that are known. */
  get addresses(): number {
    return this.#macs.size;
  }

  /** Whole frames, with their prefixes, that came in by `from`. They are not changed later. */
  receive(from: Port, bytes: Uint8Array, start: number, end: number): void {
    if (from.closed) return;
    const nowSeconds = this.#now() / 1000;
    const { counters } = from;
    const macsMax = from.kind === 'machine' ? MACHINE_MACS_MAX : TRUNK_MACS_MAX;
    let runStart = start;
    let runFrames = 0;
    let runTarget = TO_NOBODY;
    for (let at = start; at < end;) {
      const length = lengthAt(bytes, at);
      const next = at + PREFIX_BYTES + length;
      const head = at + PREFIX_BYTES;
      counters.framesIn++;
      counters.bytesIn += length;
      let target = TO_NOBODY;
      // An address of several, or none, is nobody's.
      if (length < FRAME_BYTES_MIN || (bytes[head + 6]! & 1) === 1) counters.drops.malformed++;
      else target = this.#targetOf(from, bytes, head, length, nowSeconds, macsMax);
      if (target !== runTarget) {
        if (runFrames > 0) this.#forward(from, runTarget, bytes, runStart, at, runFrames);
        runStart = at;
        runFrames = 0;
        runTarget = target;
      }
      runFrames++;
      at = next;
    }
    if (runFrames > 0) this.#forward(from, runTarget, bytes, runStart, end, runFrames);
  }

  #targetOf(
    from: Port,
    bytes: Uint8Array,
    head: number,
    length: number,
    nowSeconds: number,
    macsMax: number,
  ): number {
    this.#macs.learn(highAt(bytes, head + 6), lowAt(bytes, head + 8), from.index, nowSeconds, macsMax);
    if (this.#dhcp !== undefined && from.kind === 'machine' && this.#dhcp.isFor(bytes, head, length)) {
      const answer = this.#dhcp.answer(bytes.subarray(head, head + length), nowSeconds);
      if (answer !== undefined) this.#sendTo(from, from, answer, 1);
      return TO_NOBODY;
    }
    const high = highAt(bytes, head);
    if ((high & 0x0100) === 0) {
      const found = this.#macs.find(high, lowAt(bytes, head + 2), nowSeconds);
      if (found >= 0) {
        const to = this.#ports[found]!;
        if (found !== from.index && this.#mayPass(from, to)) return found;
        from.counters.drops.filtered++;
        return TO_NOBODY;
      }
    } else if (high === 0x0180 && lowAt(bytes, head + 2) >>> 4 === 0xc200000) {
      from.counters.drops.filtered++;
      return TO_NOBODY;
    }
    if (from.kind === 'machine') {
      const second = Math.floor(nowSeconds);
      if (second !== from.floodSecond) {
        from.floodSecond = second;
        from.floods = 0;
      }
      if (++from.floods > FLOOD_PER_SECOND_MAX) {
        from.counters.drops.flood++;
        return TO_NOBODY;
      }
    }
    return TO_ALL;
  }

  /** What came by a trunk goes out by none: the other hosts have had it from where it came from. */
  #mayPass(from: Port, to: Port): boolean {
    return this.#relay || from.kind === 'machine' || to.kind === 'machine';
  }

  #forward(from: Port, target: number, bytes: Uint8Array, start: number, end: number, frames: number): void {
    if (target === TO_NOBODY) return;
    const run = bytes.subarray(start, end);
    if (target !== TO_ALL) {
      const to = this.#ports[target];
      if (to !== undefined) this.#sendTo(from, to, run, frames);
      return;
    }
    for (const to of this.#live) {
      if (to !== from && this.#mayPass(from, to)) this.#sendTo(from, to, run, frames);
    }
  }

  #sendTo(from: Port, to: Port, run: Uint8Array, frames: number): void {
    if (!to.outlet.patience) {
      to.counters.drops.full += frames;
      return;
    }
    to.counters.framesOut += frames;
    to.counters.bytesOut += run.length - frames * PREFIX_BYTES;
    if (!to.outlet.send(run) && to !== from) to.outlet.hold(from.outlet);
  }
}

function highAt(bytes: Uint8Array, at: number): number {
  return (bytes[at]! << 8) | bytes[at + 1]!;
}

function lowAt(bytes: Uint8Array, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}
