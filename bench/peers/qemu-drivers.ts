/**
 * QEMU's own network block drivers as peers, and the others as what QEMU's overlay can lie on. `nbd`: QEMU speaks NBD
 * to nbdkit at the origin, without a tunnel (so nothing is encrypted or compressed). `ssh`: QEMU reads the file over SFTP
 * through libssh; the key comes from an ssh-agent, as the driver asks for none by name. It runs in qemu-nbd, where
 * it authenticates; in a QEMU with its seccomp sandbox on (as ours is) it did not, perhaps because of the sandbox.
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { freePort } from '../../src/core/ports.ts';
import { knownHostsLine, PEERS, versionOf } from './peers.ts';
import type { Ground, Peer } from './peers.ts';
import { commandLine, runProgram, startProgram } from './program.ts';
import { writeFile } from 'node:fs/promises';

/** A peer's way to the origin, where the first host is. */
export interface OriginWay extends Ground {
  /** `ssh-ed25519 AAAA…` */
  readonly hostKey: string;
  /** Runs `body` as the origin. */
  atOrigin<T>(body: () => Promise<T>): Promise<T>;
  /** The address of a port of the origin over the link. */
  reach(port: number): Promise<{ readonly host: string; readonly port: number }>;
  /** What servers of the origin listen on. */
  readonly listen: string;
}

export interface BootPeer {
  readonly name: string;
  readonly programs: Readonly<Record<string, string>>;
  version(): Promise<string>;
  start(way: OriginWay): Promise<BootDisk>;
}

/** What a guest can start from. */
export interface BootDisk {
  /** In qemu-img's words. */
  readonly backing: string;
  /** Where kernel and initial RAM disk are; without it they are copied on the clock. */
  readonly folder?: string;
  readonly commands: readonly string[];
  readonly fetch?: () => Promise<void>;
  stop(): Promise<void>;
}

function asBootPeer(peer: Peer): BootPeer {
  return {
    name: peer.name,
    programs: peer.programs,
    version: () => versionOf(peer),
    async start(way) {
      await writeFile(way.knownHosts, knownHostsLine(way.address, way.hostKey));
      const { target, ...running } = await peer.start(way);
      if ('nbd' in target) return { ...running, backing: `nbd+unix:///?socket=${target.nbd}` };
      const mounted = running.fetch === undefined;
      return {
        ...running,
        backing: target.file,
        ...(mounted ? { folder: path.dirname(target.file) } : {}),
      };
    },
  };
}

const qemuVersion = async () =>
  (await runProgram(['qemu-system-x86_64', '--version'])).split('\n')[0]!.slice(0, 200);

const qemuNbd: BootPeer = {
  name: 'qemu nbd',
  programs: { nbdkit: 'nbdkit' },
  version: qemuVersion,
  async start(way) {
    const port = await way.atOrigin(freePort);
    const command = [
      ...['nbdkit', '--foreground', '--readonly', '--ipaddr', way.listen, '--port', String(port)],
      ...['file', way.disk],
    ];
    const program = await way.atOrigin(() =>
      startProgram({ command, isReady: () => connects({ host: '127.0.0.1', port }) }),
    );
    const { host, port: at } = await way.reach(port);
    return {
      backing: `nbd://${host}:${at}`,
      commands: [commandLine(command)],
      stop: () => program.stop(),
    };
  },
};

/** Where Debian puts QEMU's modules, from /usr/bin. */
const MODULES = `../lib/${process.arch === 'arm64' ? 'aarch64' : 'x86_64'}-linux-gnu/qemu`;

const qemuSsh: BootPeer = {
  name: 'qemu ssh',
  programs: {
    'ssh-agent': 'openssh-client',
    'qemu-nbd': 'qemu-utils',
    [`${MODULES}/block-ssh.so`]: 'qemu-block-extra',
  },
  version: qemuVersion,
  async start(way) {
    const agentSocket = path.join(way.folder, 'agent.sock');
    const socket = path.join(way.folder, 'nbd.sock');
    const environment = { SSH_AUTH_SOCK: agentSocket };
    await using started = new AsyncDisposableStack();
    const agentCommand = ['ssh-agent', '-D', '-a', agentSocket];
    const agent = await startProgram({ command: agentCommand, isReady: () => existsSync(agentSocket) });
    started.defer(() => agent.stop());
    await runProgram(['env', `SSH_AUTH_SOCK=${agentSocket}`, 'ssh-add', '-q', way.identity]);
    const hash = createHash('sha256')
      .update(Buffer.from(way.hostKey.split(' ')[1]!, 'base64'))
      .digest('hex');
    const { host, port } = way.address;
    const file = {
      driver: 'ssh',
      server: { host, port: String(port) },
      user: way.user,
      path: way.disk,
      'host-key-check': { mode: 'hash', type: 'sha256', hash },
    };
    const command = [
      ...['qemu-nbd', '--read-only', '--persistent', '--shared=8', '--socket', socket],
      `json:${JSON.stringify({ driver: 'raw', file })}`,
    ];
    // Its socket is there before it listens.
    const isReady = () => connects({ path: socket });
    const program = await startProgram({ command, environment, isReady });
    started.defer(() => program.stop());
    const running = started.move();
    return {
      backing: `nbd+unix:///?socket=${socket}`,
      commands: [commandLine(agentCommand), commandLine(command)],
      stop: () => running.disposeAsync(),
    };
  },
};

export const BOOT_PEERS: readonly BootPeer[] = [...PEERS.map(asBootPeer), qemuNbd, qemuSsh];

function connects(where: net.NetConnectOpts): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect(where);
    socket.once('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
  });
}
