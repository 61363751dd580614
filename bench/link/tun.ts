/**
 * The link emulator at packet level, a process of its own, for kernels without netem: TUN devices at the ends, one
 * at the origin and one for each host, and between them one `PacketQueue` for each direction, which all hosts share as
 * they would share a cable. TCP's own windows, slow start, losses and retransmissions are those of the kernel.
 *
 *   node bench/link/tun.ts --rtt 80ms --rate 50mbit --device wan0 --hosts 2
 *
 * Descriptors 3, 4, … are the network namespaces: the origin's, then the hosts'. Host number n (from 0) has the address
 * whose last byte is n + 2; the packets of the origin find it by that. Prints {"ready":true}; a line `bytes` on
 * stdin is answered with what was carried; the end of stdin, SIGTERM or SIGINT end it, and the devices with it.
 *
 * The loop blocks in ppoll(2) until a packet is there or due, at most TURN_MS: then Node's own event loop has a turn.
 * Measured on a 2-core virtual machine: 7 to 15 µs of one core for a packet (15 % of it at 100 Mbit/s). 1 Gbit/s with
 * a round trip is more than it carries there (600 Mbit/s); a LAN is veth, which the kernel carries by itself.
 */
import { constants, openSync } from 'node:fs';
import os from 'node:os';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import koffi from 'koffi';
import { ioctl } from '../../src/core/linux.ts';
import { enterNamespace } from './namespace.ts';
import { PacketQueue } from './packet-queue.ts';
import { parseDuration, parseRate } from './units.ts';

/** linux/if_tun.h */
const TUNSETIFF = 0x400454ca;
const IFF_TUN = 0x0001;
const IFF_NO_PI = 0x1000;
/** struct ifreq: the name in 16 bytes, then the flags as u16. */
const IFREQ_BYTES = 40;
const IFNAME_BYTES = 16;

export const MTU_BYTES = 1500;
/** A queue holds one bandwidth × round trip, the rule of thumb for routers, and never fewer packets than this. */
const QUEUE_PACKETS_MIN = 32;
const TURN_MS = 20;
/** Of one device before the next has its turn. */
const BATCH_PACKETS = 32;
const POLLIN = 1;
const POLLFD_BYTES = 8;

const libc = koffi.load('libc.so.6');
const cRead = libc.func('int64_t read(int fd, void *buffer, size_t count)');
const cWrite = libc.func('int64_t write(int fd, const void *buffer, size_t count)');
const cPpoll = libc.func('int ppoll(void *fds, unsigned long count, void *timeout, void *mask)');

const print = (line: Record<string, unknown>) => process.stdout.write(JSON.stringify(line) + '\n');

/** A TUN device in the namespace of `fd`, not blocking; it goes with the descriptor. */
function openDevice(namespace: number, name: string): number {
  enterNamespace(namespace);
  const fd = openSync('/dev/net/tun', constants.O_RDWR | constants.O_NONBLOCK);
  const request = Buffer.alloc(IFREQ_BYTES);
  request.write(name, 0, IFNAME_BYTES - 1, 'latin1');
  request.writeUInt16LE(IFF_TUN | IFF_NO_PI, IFNAME_BYTES);
  ioctl(fd, TUNSETIFF, request);
  return fd;
}

/** What may wait in front of the link. */
export function queueBytesOf(rttMs: number, bitsPerSecond: number): number {
  return Math.max((bitsPerSecond / 8000) * rttMs, QUEUE_PACKETS_MIN * MTU_BYTES);
}

class TunLink {
  readonly #origin: number;
  readonly #hosts: readonly number[];
  readonly #toHosts: PacketQueue;
  readonly #toOrigin: PacketQueue;
  readonly #polled: Buffer;
  readonly #timeout = Buffer.alloc(16);
  #ended = false;

  constructor(origin: number, hosts: readonly number[], rttMs: number, bitsPerSecond: number) {
    this.#origin = origin;
    this.#hosts = hosts;
    const queue = {
      delayMs: rttMs / 2,
      bitsPerSecond,
      queueBytes: queueBytesOf(rttMs, bitsPerSecond),
      packetBytesMax: MTU_BYTES,
    };
    this.#toHosts = new PacketQueue(queue);
    this.#toOrigin = new PacketQueue(queue);
    this.#polled = Buffer.alloc(POLLFD_BYTES * (hosts.length + 1));
    for (const [index, fd] of [origin, ...hosts].entries()) {
      this.#polled.writeInt32LE(fd, index * POLLFD_BYTES);
      this.#polled.writeInt16LE(POLLIN, index * POLLFD_BYTES + 4);
    }
  }

  run(): void {
    for (const endMs = performance.now() + TURN_MS; ;) {
      this.#deliver();
      const now = performance.now();
      if (now >= endMs || this.#ended) break;
      const waitMs = Math.min(endMs, this.#toHosts.nextMs, this.#toOrigin.nextMs) - now;
      if (!this.#wait(Math.max(0, waitMs))) continue;
      if (this.#isReady(0)) this.#take(this.#origin, this.#toHosts, true);
      for (const [index, host] of this.#hosts.entries())
        if (this.#isReady(index + 1)) this.#take(host, this.#toOrigin, false);
    }
    if (!this.#ended) setImmediate(() => this.run());
  }

  end(): void {
    this.#ended = true;
  }

  counters() {
    const of = (queue: PacketQueue) => ({
      bytes: queue.deliveredBytes,
      packets: queue.deliveredPackets,
      dropped: queue.droppedPackets,
    });
    return { toHosts: of(this.#toHosts), toOrigin: of(this.#toOrigin) };
  }

  /** Until a device has a packet (true) or the time is over. */
  #wait(ms: number): boolean {
    this.#timeout.writeBigInt64LE(0n, 0);
    this.#timeout.writeBigInt64LE(BigInt(Math.ceil(ms * 1e6)), 8);
    return cPpoll(this.#polled, this.#hosts.length + 1, this.#timeout, null) > 0;
  }

  /** After `#wait`: whether the device at `index` of those polled has a packet. */
  #isReady(index: number): boolean {
    return (this.#polled.readInt16LE(index * POLLFD_BYTES + 6) & POLLIN) !== 0;
  }

  #take(device: number, queue: PacketQueue, fromOrigin: boolean): void {
    for (let taken = 0; taken < BATCH_PACKETS; taken++) {
      const packet = queue.space();
      const bytes = Number(cRead(device, packet, packet.length));
      if (bytes <= 0) return;
      // IPv4 alone; the destination's last byte says which host.
      if (packet[0]! >> 4 !== 4) continue;
      const receiver = fromOrigin ? packet[19]! - 2 : 0;
      if (receiver >= 0 && receiver < this.#hosts.length) queue.push(bytes, receiver, performance.now());
    }
  }

  #deliver(): void {
    const now = performance.now();
    this.#toHosts.deliver(now, (packet, host) => cWrite(this.#hosts[host]!, packet, packet.length));
    this.#toOrigin.deliver(now, (packet) => cWrite(this.#origin, packet, packet.length));
  }
}

function main(): void {
  const { values } = parseArgs({
    options: {
      rtt: { type: 'string' },
      rate: { type: 'string' },
      device: { type: 'string' },
      hosts: { type: 'string', default: '1' },
    },
  });
  // Late packets would be a slower link than the one asked for: this loop goes first.
  os.setPriority(-20);
  const [origin, ...hosts] = Array.from({ length: Number(values.hosts) + 1 }, (_, index) =>
    openDevice(3 + index, values.device!),
  );
  const link = new TunLink(origin!, hosts, parseDuration(values.rtt!), parseRate(values.rate!));
  const end = () => {
    link.end();
    process.exit(0);
  };
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, end);
  createInterface({ input: process.stdin })
    .on('line', () => print(link.counters()))
    .on('close', end);
  print({ ready: true });
  link.run();
}

if (import.meta.main) main();
