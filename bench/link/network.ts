/**
 * Where the hosts of a bench are and what lies between them and the origin. Two ways, with one interface:
 *
 * - `packets`: the origin and each host are network namespaces. A link with a round trip under a millisecond is a bridge
 *   with veth pairs and a rate (tc tbf); its delay is what they have by themselves, about 0.05 ms. A longer one is TUN
 *   devices with a packet queue for each direction (tun.ts). The bench itself is in the first host's namespace while
 *   the network is up. Needs root. All hosts share each link.
 * - `relay`: everything is on loopback, and a link is a relay of bytes (relay.ts). Quick to set up, for any user, one
 *   host; without slow start, loss and the congestion window, which the record says.
 */
import { GridError } from '../../src/core/errors.ts';
import { startService } from '../lib/child.ts';
import type { Service } from '../lib/child.ts';
import { runProgram } from '../peers/program.ts';
import { Namespace } from './namespace.ts';
import { deviceBytes, measureLink } from './probe.ts';
import type { LinkMeasured } from './probe.ts';
import { parseDuration, parseRate } from './units.ts';

export const EMULATORS = ['packets', 'relay'] as const;
export type Emulator = (typeof EMULATORS)[number];

export interface LinkSetting {
  /** 1 to 8 letters, because devices are named after it: lan, wan. */
  readonly name: string;
  readonly rttMs: number;
  readonly bitsPerSecond: number;
}

/** Delivered so far. */
export interface LinkCarried {
  readonly toHostsBytes: number;
  readonly toOriginBytes: number;
}

export interface Network {
  readonly emulator: Emulator;
  /** For a record: how each link is made. */
  readonly description: string;
  readonly hosts: number;
  /** What servers of the origin listen on. */
  readonly listen: string;
  /** Runs `body` as the origin: what it listens on and starts is there. Nothing else may go on meanwhile. */
  atOrigin<T>(body: () => Promise<T>): Promise<T>;
  /** Runs the synchronous part of `body` on host `index`: the processes that it starts are there. */
  onHost<T>(index: number, body: () => T): T;
  /** The address by which hosts reach what listens on `port` at the origin over this link. */
  reach(link: string, port: number): Promise<{ readonly host: string; readonly port: number }>;
  carried(link: string): Promise<LinkCarried>;
  /** The link as a program of ours finds it: to compare with what was asked for. */
  measure(link: string): Promise<LinkMeasured>;
  close(): Promise<void>;
}

/** `30ms,100mbit`, for the link `name`. Throws a RangeError. */
export function parseLink(name: string, text: string): LinkSetting {
  const [rtt, rate, ...rest] = text.split(',');
  if (!rtt || !rate || rest.length > 0)
    throw new RangeError(`--${name} ${text}: write RTT,RATE such as 30ms,100mbit`);
  const setting = { name, rttMs: parseDuration(rtt), bitsPerSecond: parseRate(rate) };
  if (setting.rttMs > 10_000) throw new RangeError(`--${name} ${text}: a round trip is 10 s at most`);
  return setting;
}

/** Throws denied (packets, but not root), local-io with the last words of what failed; leaves nothing then. */
export async function startNetwork(
  emulator: Emulator,
  links: readonly LinkSetting[],
  hosts = 1,
): Promise<Network> {
  if (hosts > HOSTS_MAX) throw new RangeError(`${hosts} hosts are more than ${HOSTS_MAX}`);
  return emulator === 'relay' ? new RelayNetwork(links) : PacketNetwork.start(links, hosts);
}

const HOSTS_MAX = 64;
/** Below this a link is veth: TUN's own turn through the kernel costs as much. */
const TUN_RTT_MS_MIN = 1;
/** What tbf may let wait: a switch's buffer. */
const LAN_QUEUE = '10ms';
const LAN_BURST_BYTES = 128 * 1024;

class PacketNetwork implements Network {
  readonly emulator = 'packets';
  readonly description: string;
  readonly listen = '0.0.0.0';
  readonly #links: readonly LinkSetting[];
  readonly #origin: Namespace;
  readonly #hosts: readonly Namespace[];
  readonly #home: Namespace;
  readonly #tuns = new Map<string, Service>();
  #closed = false;

  private constructor(
    links: readonly LinkSetting[],
    home: Namespace,
    origin: Namespace,
    hosts: readonly Namespace[],
  ) {
    this.#links = links;
    this.#home = home;
    this.#origin = origin;
    this.#hosts = hosts;
    this.description = links
      .map(({ name, rttMs }) => `${name}: ${rttMs < TUN_RTT_MS_MIN ? 'veth with tbf' : 'TUN, drop-tail'}`)
      .join('; ');
  }

  static async start(links: readonly LinkSetting[], hosts: number): Promise<PacketNetwork> {
    await using stack = new AsyncDisposableStack();
    const made = async (name: string) => {
      const namespace = await Namespace.create(name);
      stack.defer(() => namespace.close());
      return namespace;
    };
    const home = Namespace.current('home');
    stack.defer(() => home.close());
    const origin = await made('origin');
    const ends: Namespace[] = [];
    for (let index = 0; index < hosts; index++) ends.push(await made(`host ${index}`));
    const network = new PacketNetwork(links, home, origin, ends);
    stack.defer(() => network.#stopTuns());
    for (const [index, link] of links.entries()) {
      if (link.rttMs < TUN_RTT_MS_MIN) await network.#makeLan(link, index);
      else await network.#makeTun(link, index);
    }
    ends[0]!.enter();
    stack.move();
    return network;
  }

  get hosts(): number {
    return this.#hosts.length;
  }

  /** Of end 0, the origin, and 1, 2, …, the hosts. */
  #address(link: number, end: number): string {
    return `10.77.${link}.${end + 1}`;
  }

  async #makeLan({ name, bitsPerSecond }: LinkSetting, link: number): Promise<void> {
    const shape = (device: string) =>
      Number.isFinite(bitsPerSecond)
        ? runProgram([
            ...['tc', 'qdisc', 'add', 'dev', device, 'root', 'tbf', 'rate', `${bitsPerSecond}bit`],
            ...['burst', String(LAN_BURST_BYTES), 'latency', LAN_QUEUE],
          ])
        : undefined;
    await this.#origin.stay(async () => {
      await runProgram(['ip', 'link', 'add', name, 'type', 'bridge']);
      await runProgram(['ip', 'address', 'add', `${this.#address(link, 0)}/24`, 'dev', name]);
      for (const [index, host] of this.#hosts.entries()) {
        const port = `${name}${index}`;
        await runProgram([
          ...['ip', 'link', 'add', port, 'type', 'veth', 'peer', 'name', name, 'netns', host.path],
        ]);
        await runProgram(['ip', 'link', 'set', port, 'master', name, 'up']);
      }
      await runProgram(['ip', 'link', 'set', name, 'up']);
      await shape(name);
    });
    await this.#eachHost(async (index) => {
      await runProgram(['ip', 'address', 'add', `${this.#address(link, index + 1)}/24`, 'dev', name]);
      await runProgram(['ip', 'link', 'set', name, 'up']);
      await shape(name);
    });
  }

  async #makeTun({ name, rttMs, bitsPerSecond }: LinkSetting, link: number): Promise<void> {
    if (!Number.isFinite(bitsPerSecond))
      throw new RangeError(`--${name}: a link with a round trip needs a rate, such as 1gbit`);
    const ends = [this.#origin, ...this.#hosts];
    const asked = ['--rtt', `${rttMs}ms`, '--rate', `${bitsPerSecond}bit`, '--device', name];
    const tun = await startService(
      'bench/link/tun.ts',
      [...asked, '--hosts', String(this.#hosts.length)],
      ends.map(({ fd }) => fd),
    );
    this.#tuns.set(name, tun);
    for (const [end, namespace] of ends.entries()) {
      await namespace.stay(async () => {
        await runProgram(['ip', 'address', 'add', `${this.#address(link, end)}/24`, 'dev', name]);
        await runProgram(['ip', 'link', 'set', name, 'up']);
      });
    }
  }

  async #eachHost(body: (index: number) => Promise<void>): Promise<void> {
    for (const [index, host] of this.#hosts.entries()) await host.stay(() => body(index));
  }

  atOrigin<T>(body: () => Promise<T>): Promise<T> {
    return this.#origin.stay(body);
  }

  onHost<T>(index: number, body: () => T): T {
    return this.#hosts[index]!.run(body);
  }

  #indexOf(name: string): number {
    const index = this.#links.findIndex((link) => link.name === name);
    if (index === -1) throw new GridError('bug', `there is no link '${name}'`);
    return index;
  }

  async reach(link: string, port: number) {
    return { host: this.#address(this.#indexOf(link), 0), port };
  }

  /** Of a LAN, the bridge's own counters: `transmitted` is what the origin sent. */
  async carried(link: string): Promise<LinkCarried> {
    const tun = this.#tuns.get(link);
    if (tun !== undefined) {
      const { toHosts, toOrigin } = (await tun.ask('bytes')) as Record<string, { bytes: number }>;
      return { toHostsBytes: toHosts!.bytes, toOriginBytes: toOrigin!.bytes };
    }
    const { received, transmitted } = this.#origin.run(() => deviceBytes(link));
    return { toHostsBytes: transmitted, toOriginBytes: received };
  }

  measure(link: string): Promise<LinkMeasured> {
    return measureLink(this, link);
  }

  async #stopTuns(): Promise<void> {
    for (const tun of this.#tuns.values()) await tun.stop();
  }

  /** The devices of veth go with their namespaces, which go with the last process in them. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#home.enter();
    await this.#stopTuns();
    for (const namespace of [this.#origin, ...this.#hosts, this.#home]) namespace.close();
  }
}

class RelayNetwork implements Network {
  readonly emulator = 'relay';
  readonly description: string;
  readonly hosts = 1;
  readonly listen = '127.0.0.1';
  readonly #links: readonly LinkSetting[];
  readonly #relays = new Map<string, Service>();

  constructor(links: readonly LinkSetting[]) {
    this.#links = links;
    this.description = `${links.map(({ name }) => name).join(', ')}: byte relay, without slow start and loss`;
  }

  atOrigin<T>(body: () => Promise<T>): Promise<T> {
    return body();
  }

  onHost<T>(_index: number, body: () => T): T {
    return body();
  }

  async reach(link: string, port: number) {
    const key = `${link} ${port}`;
    let relay = this.#relays.get(key);
    if (relay === undefined) {
      const { rttMs, bitsPerSecond } = this.#links.find(({ name }) => name === link)!;
      relay = await startService('bench/link/main.ts', [
        ...['--listen', '127.0.0.1:0', '--to', `127.0.0.1:${port}`, '--rtt', `${rttMs}ms`],
        ...['--rate', Number.isFinite(bitsPerSecond) ? `${bitsPerSecond}bit` : 'none'],
      ]);
      this.#relays.set(key, relay);
    }
    const [host, at] = String(relay.ready['listening']).split(':');
    return { host: host!, port: Number(at) };
  }

  async carried(link: string): Promise<LinkCarried> {
    let toHostsBytes = 0;
    let toOriginBytes = 0;
    for (const [key, relay] of this.#relays) {
      if (!key.startsWith(`${link} `)) continue;
      const { forward, backward } = (await relay.ask('bytes')) as Record<string, number>;
      toHostsBytes += backward!;
      toOriginBytes += forward!;
    }
    return { toHostsBytes, toOriginBytes };
  }

  measure(link: string): Promise<LinkMeasured> {
    return measureLink(this, link);
  }

  async close(): Promise<void> {
    const relays = [...this.#relays.values()];
    this.#relays.clear();
    await Promise.all(relays.map((relay) => relay.stop()));
  }
}
