/**
 * What hosts use today to reach an image over ssh, each started as its documentation advises for this use, over
 * the link that the bench gives. A peer is up (connected, mounted) before the clock runs; what it has to do before
 * the first read (copy the whole image) runs on the clock. All reach the same stock sshd and the same raw file.
 *
 * Tuning, and where it comes from:
 * - sshfs: compression (sshfs(1): -C), pages kept while the file does not change (kernel_cache, fuse(8)), two
 *   connections so that large reads do not hold back small ones (max_conns, sshfs(1)).
 * - rclone: vfs-cache-mode full as its manual advises for random reads of large files, no hashes and no times asked
 *   of the far side (rclone's VFS chapter: fingerprinting), read only; chunks of 1 MiB and no buffer beyond them,
 *   because a boot jumps (tried at 30 ms, 100 Mbit/s: 45 s and 432 MiB; with its defaults 49 s and 574 MiB; with
 *   chunks of 128 KiB 87 s).
 * - nbdkit: readahead above cache (nbdkit-readahead-filter(1): for plugins without prefetch), cache-on-read so that
 *   nothing crosses the link twice, compression (nbdkit-ssh-plugin(1): on bandwidth-limited connections), blocks of
 *   256 KiB (tried: 26 s; 31 s with the default of 64 KiB, 46 s with 1 MiB).
 * - scp: -C (scp(1)); without it the zeros of the raw image cross the link too.
 * - zstd: the image lies compressed at the origin and is streamed and unpacked sparsely, the best that a copy of
 *   the whole can do. Both copies reuse a connection that is there (ControlMaster).
 */
import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { GridError } from '../../src/core/errors.ts';
import { commandLine, isMounted, runProgram, startProgram, unmountFuse } from './program.ts';

/** What a peer works on; `folder` is empty and its own. */
export interface Ground {
  readonly folder: string;
  /** The near end of the link, with the stock sshd at its far end. */
  readonly address: { readonly host: string; readonly port: number };
  readonly user: string;
  readonly identity: string;
  readonly knownHosts: string;
  /** At the origin. */
  readonly disk: string;
  /** At the origin: the same, through zstd. */
  readonly compressedDisk: string;
  readonly signal: AbortSignal;
}

export interface RunningPeer {
  /** What a guest's disk would be. */
  readonly target: { readonly file: string } | { readonly nbd: string };
  /** Every command that was run, as typed. */
  readonly commands: readonly string[];
  /** On the clock, before the first read. */
  readonly fetch?: () => Promise<void>;
  stop(): Promise<void>;
}

export interface Peer {
  readonly name: string;
  /** Programs that it needs, and the Debian packages that have them. */
  readonly programs: Readonly<Record<string, string>>;
  /** Prints its version. */
  readonly version: readonly string[];
  start(ground: Ground): Promise<RunningPeer>;
}

const sshOptions = (ground: Ground): string[] => [
  ...['-o', `IdentityFile=${ground.identity}`, '-o', 'IdentitiesOnly=yes', '-o', 'BatchMode=yes'],
  ...['-o', `UserKnownHostsFile=${ground.knownHosts}`, '-o', 'StrictHostKeyChecking=yes'],
];

const sshfs: Peer = {
  name: 'sshfs',
  programs: { sshfs: 'sshfs', fusermount3: 'fuse3' },
  version: ['sshfs', '--version'],
  async start(ground) {
    const mountpoint = path.join(ground.folder, 'mnt');
    await mkdir(mountpoint);
    const { host, port } = ground.address;
    const command = [
      ...['sshfs', '-f', '-C', '-p', String(port), '-o', 'ro,kernel_cache,max_conns=2,reconnect'],
      ...['-F', '/dev/null', ...sshOptions(ground)],
      ...[`${ground.user}@${host}:${path.dirname(ground.disk)}`, mountpoint],
    ];
    const program = await startProgram({
      command,
      isReady: () => isMounted(mountpoint),
      end: () => unmountFuse(mountpoint),
    });
    const file = path.join(mountpoint, path.basename(ground.disk));
    return { target: { file }, commands: [commandLine(command)], stop: () => program.stop() };
  },
};

const rclone: Peer = {
  name: 'rclone',
  programs: { rclone: 'rclone', fusermount3: 'fuse3' },
  version: ['rclone', 'version'],
  async start(ground) {
    const mountpoint = path.join(ground.folder, 'mnt');
    await mkdir(mountpoint);
    const { host, port } = ground.address;
    const command = [
      ...['rclone', 'mount', `:sftp:${path.dirname(ground.disk)}`, mountpoint, '--config', '/dev/null'],
      ...['--sftp-host', host, '--sftp-port', String(port), '--sftp-user', ground.user],
      ...['--sftp-key-file', ground.identity, '--sftp-known-hosts-file', ground.knownHosts],
      ...['--sftp-disable-hashcheck', '--sftp-set-modtime=false', '--no-modtime', '--read-only'],
      ...['--vfs-cache-mode', 'full', '--vfs-fast-fingerprint'],
      ...['--vfs-read-chunk-size', '1M', '--buffer-size', '0'],
      ...['--cache-dir', path.join(ground.folder, 'cache')],
    ];
    const program = await startProgram({
      command,
      isReady: () => isMounted(mountpoint),
      end: () => unmountFuse(mountpoint),
    });
    const file = path.join(mountpoint, path.basename(ground.disk));
    return { target: { file }, commands: [commandLine(command)], stop: () => program.stop() };
  },
};

const nbdkit: Peer = {
  name: 'nbdkit',
  programs: { nbdkit: 'nbdkit', nbdcopy: 'libnbd-bin' },
  version: ['nbdkit', '--version'],
  async start(ground) {
    const socket = path.join(ground.folder, 'nbd.sock');
    const { host, port } = ground.address;
    const command = [
      ...['nbdkit', '--foreground', '--readonly', '--unix', socket, '--filter=readahead', '--filter=cache'],
      ...['ssh', `host=${host}`, `port=${port}`, `user=${ground.user}`, `path=${ground.disk}`],
      ...[`identity=${ground.identity}`, `known-hosts=${ground.knownHosts}`, 'config='],
      ...['compression=true', 'cache-on-read=true', 'cache-min-block-size=256K'],
    ];
    const program = await startProgram({
      command,
      environment: { TMPDIR: ground.folder },
      isReady: () => existsSync(socket),
    });
    return { target: { nbd: socket }, commands: [commandLine(command)], stop: () => program.stop() };
  },
};

/** An ssh connection that the commands after it share. */
async function startMaster(ground: Ground, options: readonly string[]) {
  const control = path.join(ground.folder, 'ssh.sock');
  const { host, port } = ground.address;
  const common = ['-F', '/dev/null', ...sshOptions(ground), '-o', `ControlPath=${control}`];
  const login = `${ground.user}@${host}`;
  const command = ['ssh', ...common, ...options, '-M', '-N', '-p', String(port), login];
  const program = await startProgram({ command, isReady: () => existsSync(control) });
  return { program, common, port: String(port), login, command: commandLine(command) };
}

const scp: Peer = {
  name: 'scp',
  programs: { scp: 'openssh-client' },
  version: ['ssh', '-V'],
  async start(ground) {
    const { program, common, port, login, command } = await startMaster(ground, ['-C']);
    const copy = path.join(ground.folder, 'disk.raw');
    const copying = ['scp', '-q', '-C', ...common, '-P', port, `${login}:${ground.disk}`, copy];
    return {
      target: { file: copy },
      commands: [command, commandLine(copying)],
      fetch: async () => void (await runProgram(copying, ground.signal)),
      stop: () => program.stop(),
    };
  },
};

const zstd: Peer = {
  name: 'zstd|ssh',
  programs: { zstd: 'zstd', ssh: 'openssh-client' },
  version: ['zstd', '--version'],
  async start(ground) {
    const { program, common, port, login, command } = await startMaster(ground, []);
    const copy = path.join(ground.folder, 'disk.raw');
    const streaming = ['ssh', ...common, '-p', port, login, 'cat', ground.compressedDisk];
    const line = `${commandLine(streaming)} | zstd -q -d --sparse -o ${commandLine([copy])}`;
    return {
      target: { file: copy },
      commands: [command, line],
      fetch: async () => void (await runProgram(['bash', '-c', `set -o pipefail; ${line}`], ground.signal)),
      stop: () => program.stop(),
    };
  },
};

export const PEERS: readonly Peer[] = [sshfs, rclone, nbdkit, scp, zstd];

/** Debian packages of programs that this host lacks. */
export async function missingPackages(peers: readonly Pick<Peer, 'programs'>[]): Promise<string[]> {
  const missing = new Set<string>();
  const needed = {
    ...Object.assign({}, ...peers.map((peer) => peer.programs)),
    sshd: 'openssh-server',
  } as Record<string, string>;
  for (const [program, debianPackage] of Object.entries(needed)) {
    const found = `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`
      .split(':')
      .some((folder) => existsSync(path.join(folder, program)));
    if (!found) missing.add(debianPackage);
  }
  return [...missing];
}

/** Installs them with apt-get. Throws local-io with its last words, denied for other users than root. */
export async function installPackages(names: readonly string[], signal: AbortSignal): Promise<void> {
  if (process.getuid?.() !== 0)
    throw new GridError(
      'denied',
      `only root can install packages: run \`apt-get install ${names.join(' ')}\``,
    );
  await runProgram(['apt-get', 'update', '-q'], signal);
  await runProgram(
    [
      'env',
      'DEBIAN_FRONTEND=noninteractive',
      'apt-get',
      'install',
      '-qy',
      '--no-install-recommends',
      ...names,
    ],
    signal,
  );
}

/** The first line that says what is installed; ssh says it on standard error. */
export async function versionOf(peer: Peer): Promise<string> {
  const text = await runProgram(['bash', '-c', `${commandLine(peer.version)} 2>&1`]);
  return text.trim().split('\n')[0]!.slice(0, 200);
}

/** One line for a known_hosts file. */
export function knownHostsLine(address: { host: string; port: number }, hostKey: string): string {
  return `[${address.host}]:${address.port} ${hostKey}\n`;
}
