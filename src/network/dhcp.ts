/**
 * Addresses on a virtual network: a DHCP server for the machines of this host, and the ARP of its own address. It has
 * the addresses that it was told by MAC address, and gives the others of its range to whoever asks, the same again to
 * the same. Questions are answered here and go no further: each host answers its own machines, from the same table or
 * from a range of its own. There is no router in its answers; the way out is another device of the machine.
 *
 * DHCP (RFC 2131), within UDP within IPv4 within Ethernet; offsets from the start of the frame:
 *   0 destination 6 · 6 source 6 · 12 type 0x0800
 *   14 IPv4 header (IHL × 4) · UDP: source port, destination port, length, checksum (0: none)
 *   then: op, htype, hlen, hops · xid 4 · secs 2, flags 2 · ciaddr, yiaddr, siaddr, giaddr 4 each · chaddr 16 · sname 64 ·
 *   file 128 · magic 63825363 · options
 */
import net from 'node:net';
import { GridError } from '../core/errors.ts';
import { withPrefix } from './frames.ts';

export interface DhcpOptions {
  /** Its own address and the length of the network's prefix, like 10.77.0.1/24. */
  readonly server: string;
  /** First and last address for machines that no lease names. None when left out. */
  readonly range?: readonly [first: string, last: string];
  readonly leases?: readonly Lease[];
}

export interface Lease {
  readonly mac: string;
  readonly address: string;
  readonly hostName?: string;
}

/** Machines that have an address at a time. */
const LEASES_MAX = 4096;
export const LEASE_SECONDS = 3600;
/** The same on each host: its frames never leave one. */
const SERVER_MAC = Buffer.from('02677664000a', 'hex');
const MAGIC = 0x63825363;
const DISCOVER = 1;
const OFFER = 2;
const REQUEST = 3;
const ACK = 5;
const NAK = 6;
const RELEASE = 7;
const INFORM = 8;
const BOOTP_BYTES = 240;

export class Dhcp {
  readonly #server: number;
  readonly #mask: number;
  readonly #range: readonly [number, number] | undefined;
  readonly #fixed = new Map<string, { address: number; hostName?: string }>();
  readonly #given = new Map<string, { address: number; untilSeconds: number }>();
  readonly #taken = new Set<number>();

  /** Throws bad-request. */
  constructor(options: DhcpOptions) {
    const match = /^([\d.]+)\/(\d{1,2})$/.exec(options.server);
    const bits = Number(match?.[2]);
    if (!match || bits < 8 || bits > 30)
      throw new GridError(
        'bad-request',
        `'${options.server}' is no address with a prefix, like 10.77.0.1/24`,
      );
    this.#mask = (0xffffffff << (32 - bits)) >>> 0;
    this.#server = numberOf(match[1]!);
    this.#taken.add(this.#server);
    if (options.range !== undefined) {
      this.#range = [this.#checked(options.range[0]), this.#checked(options.range[1])];
    }
    for (const lease of options.leases ?? []) this.assign(lease);
  }

  #checked(text: string): number {
    const address = numberOf(text);
    const host = (address & ~this.#mask) >>> 0;
    if (
      (address & this.#mask) >>> 0 !== (this.#server & this.#mask) >>> 0 ||
      host === 0 ||
      host === ~this.#mask >>> 0
    )
      throw new GridError('bad-request', `${text} is no address of a machine on this network`);
    return address;
  }

  /** The machine with this MAC address has this address. Throws bad-request, exists, no-space. */
  assign({ mac, address: text, hostName }: Lease): void {
    const key = mac.toLowerCase();
    const address = this.#checked(text);
    const before = this.#fixed.get(key);
    if (before?.address === address) return;
    if (this.#taken.has(address)) throw new GridError('exists', `${text} is another's address already`);
    if (this.#fixed.size >= LEASES_MAX)
      throw new GridError('no-space', `a network has ${LEASES_MAX} addresses`);
    this.release(mac);
    this.#fixed.set(key, { address, ...(hostName === undefined ? {} : { hostName }) });
    this.#taken.add(address);
  }

  release(mac: string): void {
    const key = mac.toLowerCase();
    for (const table of [this.#fixed, this.#given]) {
      const found = table.get(key);
      if (found !== undefined) this.#taken.delete(found.address);
      table.delete(key);
    }
  }

  /** The address of a machine as far as it has one. */
  addressOf(mac: string): string | undefined {
    const key = mac.toLowerCase();
    const found = this.#fixed.get(key) ?? this.#given.get(key);
    return found && textOf(found.address);
  }

  /** A question for a DHCP server, or for who has the server's address. */
  isFor(bytes: Uint8Array, head: number, length: number): boolean {
    if (bytes[head + 12] !== 0x08) return false;
    if (bytes[head + 13] === 0x06) {
      return length >= 42 && bytes[head + 21] === 1 && u32(bytes, head + 38) === this.#server;
    }
    if (bytes[head + 13] !== 0x00 || length < 14 + 20 + 8 || bytes[head + 23] !== 17) return false;
    const udp = head + 14 + (bytes[head + 14]! & 15) * 4;
    return udp + 8 <= head + length && bytes[udp + 2] === 0 && bytes[udp + 3] === 67;
  }

  /** What it answers, as a frame with its prefix. */
  answer(frame: Uint8Array, nowSeconds: number): Uint8Array | undefined {
    const bytes = Buffer.from(frame.buffer, frame.byteOffset, frame.length);
    const answer = bytes[13] === 0x06 ? this.#arp(bytes) : this.#dhcp(bytes, nowSeconds);
    return answer && withPrefix(answer);
  }

  #arp(question: Buffer): Buffer {
    const answer = Buffer.alloc(42);
    question.copy(answer, 0, 6, 12);
    SERVER_MAC.copy(answer, 6);
    answer.writeUInt16BE(0x0806, 12);
    question.copy(answer, 14, 14, 20); // hardware and protocol types and lengths
    answer.writeUInt16BE(2, 20);
    SERVER_MAC.copy(answer, 22);
    answer.writeUInt32BE(this.#server, 28);
    question.copy(answer, 32, 22, 32); // who asked
    return answer;
  }

  #dhcp(frame: Buffer, nowSeconds: number): Buffer | undefined {
    const at = 14 + (frame[14]! & 15) * 4 + 8;
    const bootp = frame.subarray(at);
    if (bootp.length < BOOTP_BYTES || bootp[0] !== 1 || bootp[1] !== 1 || bootp[2] !== 6) return undefined;
    if (bootp.readUInt32BE(236) !== MAGIC) return undefined;
    const options = optionsOf(bootp.subarray(BOOTP_BYTES));
    const kind = options.get(53)?.[0];
    const mac = [...bootp.subarray(28, 34)].map((byte) => byte.toString(16).padStart(2, '0')).join(':');
    if (kind === RELEASE) {
      const given = this.#given.get(mac);
      if (given) this.#taken.delete(given.address);
      this.#given.delete(mac);
      return undefined;
    }
    if (kind === INFORM) return this.#reply(bootp, ACK, 0, undefined);
    if (kind !== DISCOVER && kind !== REQUEST) return undefined;
    const named = options.get(54);
    if (named?.length === 4 && named.readUInt32BE(0) !== this.#server) return undefined; // it chose another
    const found = this.#addressFor(mac, nowSeconds);
    if (found === undefined) return kind === REQUEST ? this.#reply(bootp, NAK, 0, undefined) : undefined;
    if (kind === REQUEST) {
      const option = options.get(50);
      const wanted = option?.length === 4 ? option.readUInt32BE(0) : bootp.readUInt32BE(12);
      if (wanted !== found.address) return this.#reply(bootp, NAK, 0, undefined);
    }
    return this.#reply(bootp, kind === DISCOVER ? OFFER : ACK, found.address, found.hostName);
  }

  #addressFor(mac: string, nowSeconds: number): { address: number; hostName?: string } | undefined {
    const fixed = this.#fixed.get(mac);
    if (fixed !== undefined) return fixed;
    const before = this.#given.get(mac);
    const untilSeconds = nowSeconds + LEASE_SECONDS;
    if (before !== undefined) {
      before.untilSeconds = untilSeconds;
      return before;
    }
    if (this.#range === undefined) return undefined;
    if (this.#given.size >= LEASES_MAX || this.#firstFree() === undefined) {
      // Those that were not renewed are there for others.
      for (const [other, given] of this.#given) {
        if (given.untilSeconds >= nowSeconds) continue;
        this.#given.delete(other);
        this.#taken.delete(given.address);
      }
    }
    const address = this.#given.size >= LEASES_MAX ? undefined : this.#firstFree();
    if (address === undefined) return undefined;
    this.#taken.add(address);
    this.#given.set(mac, { address, untilSeconds });
    return { address };
  }

  #firstFree(): number | undefined {
    const [first, last] = this.#range!;
    for (let address = first; address <= last; address++) if (!this.#taken.has(address)) return address;
    return undefined;
  }

  #reply(question: Buffer, kind: number, address: number, hostName: string | undefined): Buffer {
    const options: [number, Buffer][] = [
      [53, Buffer.of(kind)],
      [54, u32Bytes(this.#server)],
    ];
    if (kind !== NAK) {
      if (address !== 0) options.push([51, u32Bytes(LEASE_SECONDS)]);
      options.push([1, u32Bytes(this.#mask)], [28, u32Bytes((this.#server | ~this.#mask) >>> 0)]);
      if (hostName !== undefined) options.push([12, Buffer.from(hostName.slice(0, 63))]);
    }
    const text = Buffer.concat([
      ...options.flatMap(([code, value]) => [Buffer.of(code, value.length), value]),
      Buffer.of(255),
    ]);
    const bootp = Buffer.alloc(Math.max(300, BOOTP_BYTES + text.length));
    bootp.set([2, 1, 6, 0]);
    question.copy(bootp, 4, 4, 8); // xid
    question.copy(bootp, 10, 10, 16); // flags, ciaddr
    bootp.writeUInt32BE(address, 16);
    bootp.writeUInt32BE(this.#server, 20);
    question.copy(bootp, 28, 28, 44); // chaddr
    bootp.writeUInt32BE(MAGIC, 236);
    text.copy(bootp, BOOTP_BYTES);
    const frame = Buffer.alloc(14 + 20 + 8 + bootp.length);
    // Its address is not in use yet, so it goes to its MAC address alone; a NAK, or whoever asks for it: to all.
    const toAll = kind === NAK || (question.readUInt16BE(10) & 0x8000) !== 0;
    if (toAll) frame.fill(0xff, 0, 6);
    else question.copy(frame, 0, 28, 34);
    SERVER_MAC.copy(frame, 6);
    frame.writeUInt16BE(0x0800, 12);
    frame.set([0x45, 0], 14);
    frame.writeUInt16BE(20 + 8 + bootp.length, 16);
    frame.set([64, 17], 22);
    frame.writeUInt32BE(this.#server, 26);
    frame.writeUInt32BE(toAll || address === 0 ? 0xffffffff : address, 30);
    frame.writeUInt16BE(checksum(frame.subarray(14, 34)), 24);
    frame.writeUInt16BE(67, 34);
    frame.writeUInt16BE(68, 36);
    frame.writeUInt16BE(8 + bootp.length, 38);
    bootp.copy(frame, 42);
    return frame;
  }
}

function optionsOf(bytes: Buffer): Map<number, Buffer> {
  const options = new Map<number, Buffer>();
  for (let at = 0; at + 1 < bytes.length && bytes[at] !== 255;) {
    if (bytes[at] === 0) {
      at++;
      continue;
    }
    const end = at + 2 + bytes[at + 1]!;
    if (end > bytes.length) break;
    options.set(bytes[at]!, bytes.subarray(at + 2, end));
    at = end;
  }
  return options;
}

function checksum(bytes: Buffer): number {
  let sum = 0;
  for (let at = 0; at < bytes.length; at += 2) sum += bytes.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

function numberOf(text: string): number {
  if (!net.isIPv4(text)) throw new GridError('bad-request', `'${text}' is no IPv4 address`);
  return text.split('.').reduce((sum, part) => sum * 256 + Number(part), 0);
}

function textOf(address: number): string {
  return [24, 16, 8, 0].map((shift) => (address >>> shift) & 255).join('.');
}

function u32(bytes: Uint8Array, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}

function u32Bytes(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}
