/** The options that `mount` and `proxy run` share, from the command line and the configuration file. */
import path from 'node:path';
import { Option } from 'commander';
import type { Command } from 'commander';
import { GridError } from '../core/errors.ts';
import { DRIVERS } from '../frontend/fuse/index.ts';
import type { Driver } from '../frontend/fuse/index.ts';
import { applyConfig, applyMountOptions } from './config.ts';
import type { BrokerOptions } from './broker-agent.ts';
import type { SshOptions } from './daemon.ts';
import { collect, parseBytes, parseCount, parseDuration, parseId, parseListen } from './kit.ts';
import { nameOfMountpoint, proxyPaths } from './paths.ts';
import type { ProxyPaths } from './paths.ts';

export interface ProxyOptions {
  name?: string;
  config?: string;
  also?: string[];
  cacheDir?: string;
  stateDir?: string;
  quota?: number;
  workers?: number;
  minFree?: number;
  prefetchRate?: number;
  readAround?: boolean;
  profile?: boolean;
  driver?: Driver;
  passthrough?: boolean;
  readOnly?: boolean;
  allowOther?: boolean;
  uid?: number;
  gid?: number;
  options?: string[];
  accel?: 'auto' | 'kvm' | 'tcg';
  cgroup?: string;
  identity?: string[];
  knownHosts?: string[];
  hostKey?: string;
  remoteCommand?: string;
  caFile?: string[];
  metrics?: string;
  broker?: string;
  tokenFile?: string;
  brokerCa?: string;
  brokerHost?: string;
  network?: string[];
  guestMemory?: number;
  connectTimeout?: number;
  reconnectTimeout?: number;
}

export function addProxyOptions(command: Command): Command {
  return command
    .option('--name <name>', 'name of the proxy; from the mount point when left out')
    .option('--config <file>', 'configuration file (TOML)')
    .option(
      '--also <source>',
      'a further source for the same store, asked when those before it fail (may be given again)',
      collect,
    )
    .option('--cache-dir <folder>', 'where chunks are kept')
    .option('--state-dir <folder>', 'where clones are kept')
    .option('--quota <size>', 'most that the cache may take', parseBytes)
    .option('--workers <count>', 'threads that answer reads of what is here', parseCount)
    .option(
      '--min-free <size>',
      'what the cache leaves free on its disk (default: 1G, or 5 % of it where that is less)',
      parseBytes,
    )
    .option('--prefetch-rate <size>', 'most bytes a second that prefetch takes of the link', parseBytes)
    .option('--no-read-around', 'fetch nothing beside what is read, also on long links')
    .option('--no-profile', 'neither replay nor record what starts of VMs touch')
    .addOption(new Option('--driver <which>', 'how the mount is made').choices(DRIVERS))
    .option('--no-passthrough', 'answer every read here, also of images that are wholly on this host')
    .option('--read-only', 'no writes through the mount, not even to clones')
    .option('--allow-other', 'let other users in (users: where /etc/fuse.conf says user_allow_other)')
    .option('--no-allow-other', 'let nobody in but the user who mounts (default for users other than root)')
    .option('--uid <number>', 'owner of all that the mount shows (default: who mounts)', parseId)
    .option('--gid <number>', 'its group', parseId)
    .option(
      '-o, --options <list>',
      'options as mount(8) and fstab write them: ro, allow_other, uid=…, and these by their names',
      collect,
    )
    .addOption(new Option('--accel <which>', 'how VMs run').choices(['auto', 'kvm', 'tcg']))
    .option('--cgroup <path>', 'put the proxy and each VM into control groups below this one')
    .option('--identity <file>', 'ssh: private key (may be given again)', collect)
    .option('--known-hosts <file>', 'ssh: known hosts (may be given again)', collect)
    .option('--host-key <fingerprint>', 'ssh: the one host key to accept, as SHA256:…')
    .option(
      '--remote-command <command>',
      'ssh: what to run on the far side (default: gridvfs server --stdio)',
    )
    .option('--ca-file <file>', 'https: certificate of a further authority (may be given again)', collect)
    .option(
      '--metrics <host:port>',
      'serve /metrics (Prometheus) and /healthz there, by plain http',
      (text) => {
        parseListen(text);
        return text;
      },
    )
    .option('--broker <url>', 'put this host under a broker: https://host:port or unix:/path')
    .option('--token-file <file>', 'broker: file with an agent’s token')
    .option('--broker-ca <file>', 'broker: certificate of the authority that its certificate is from')
    .option('--broker-host <name>', 'broker: what this host is called (default: its host name)')
    .option('--network <name>', 'broker: a LAN that this host is on (may be given again)', collect)
    .option('--guest-memory <size>', 'broker: most that its VMs may have together', parseBytes)
    .option('--connect-timeout <duration>', 'how long the first connection may take', parseDuration)
    .option('--reconnect-timeout <duration>', 'how long reads wait for a broken tunnel', parseDuration);
}

export interface ProxySettings {
  readonly paths: ProxyPaths;
  readonly ssh: SshOptions;
  readonly options: ProxyOptions;
}

/** Applies the configuration file and derives names and folders; refuses what cannot be right. */
export function resolveProxy(
  command: Command,
  section: string,
  source: string,
  mountpoint: string,
  given: ProxyOptions,
): ProxySettings {
  applyMountOptions(command, given.options ?? []);
  applyConfig(command, section, command.opts<ProxyOptions>().config);
  const options = command.opts<ProxyOptions>();
  if (source === '') throw new GridError('bad-request', 'the source is empty');
  if (mountpoint === '') throw new GridError('bad-request', 'the mount point is empty');
  const paths = proxyPaths(options.name ?? nameOfMountpoint(mountpoint), {
    ...(options.cacheDir === undefined ? {} : { cacheDir: options.cacheDir }),
    ...(options.stateDir === undefined ? {} : { stateDir: options.stateDir }),
  });
  const ssh: SshOptions = {
    ...(options.identity === undefined ? {} : { identityPaths: options.identity }),
    ...(options.knownHosts === undefined ? {} : { knownHostsPaths: options.knownHosts }),
    ...(options.hostKey === undefined ? {} : { hostKeyFingerprint: options.hostKey }),
    ...(options.remoteCommand === undefined ? {} : { remoteCommand: options.remoteCommand }),
    ...(options.caFile === undefined ? {} : { caPaths: options.caFile }),
    ...(options.connectTimeout === undefined ? {} : { connectTimeoutMs: options.connectTimeout }),
    ...(options.reconnectTimeout === undefined ? {} : { reconnectTimeoutMs: options.reconnectTimeout }),
  };
  return { paths, ssh, options };
}

/** The settings of `command` as arguments of `gridvfs proxy run`, for the process in the background. */
export function proxyArguments(
  command: Command,
  source: string,
  mountpoint: string,
  proxyName: string,
): string[] {
  const args = ['proxy', 'run', absoluteSource(source), path.resolve(mountpoint), '--name', proxyName];
  const values = command.opts<Record<string, unknown>>();
  const text: Record<string, (value: number) => string> = {
    connectTimeout: (value) => `${value}ms`,
    reconnectTimeout: (value) => `${value}ms`,
  };
  for (const option of command.options) {
    const name = option.attributeName();
    const value = values[name];
    if (value === undefined || ['json', 'options', 'readyFd', 'name'].includes(name)) continue;
    if (typeof value === 'boolean') {
      if (value !== option.negate) args.push(option.long!);
      continue;
    }
    for (const each of Array.isArray(value) ? value : [value]) {
      const one: unknown =
        name === 'config'
          ? path.resolve(String(each))
          : name === 'also'
            ? absoluteSource(String(each))
            : each;
      args.push(option.long!, typeof one === 'number' && text[name] ? text[name](one) : String(one));
    }
  }
  return args;
}

/** A folder's path as seen from anywhere; URLs unchanged. */
export function absoluteSource(source: string): string {
  return /^[a-z]+:\/\//.test(source) ? source : path.resolve(source);
}

/** The broker that the options name, checked: no token is sent to nobody. */
export function brokerOf(options: ProxyOptions): { broker?: BrokerOptions } {
  const { broker: url, tokenFile } = options;
  if (url === undefined) return {};
  if (tokenFile === undefined) {
    throw new GridError('bad-request', '--broker needs --token-file, the file with an agent’s token');
  }
  return {
    broker: {
      url,
      tokenFile,
      networks: options.network ?? [],
      ...(options.brokerCa === undefined ? {} : { caFile: options.brokerCa }),
      ...(options.brokerHost === undefined ? {} : { hostName: options.brokerHost }),
      ...(options.guestMemory === undefined ? {} : { guestMemoryBytes: options.guestMemory }),
    },
  };
}
