/** gridvfs proxy run|status|upgrade|stop: the daemon in the foreground (for systemd), and a look at running ones. */
import { spawn } from 'node:child_process';
import { accessSync, constants, closeSync, writeSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Option } from 'commander';
import type { Command } from 'commander';
import { asGridError, GridError } from '../core/errors.ts';
import { abandonMount, WORKERS_DEFAULT } from '../frontend/fuse/index.ts';
import { startDaemon } from './daemon.ts';
import { heldDevices, onHolderGone, prepareSuccessor, standBy, tellHolder } from './held.ts';
import { hold } from './holder.ts';
import { bytesText, jsonOption, parseCount, parseDuration, parseListen, show, table, verb } from './kit.ts';
import { stopProxyAt, usableMountpoint } from './mount.ts';
import { runtimeRoot } from './paths.ts';
import { absoluteSource, addProxyOptions, brokerOf, proxyArguments, resolveProxy } from './proxy-options.ts';
import { watch } from './watch.ts';
import type { ProxyOptions } from './proxy-options.ts';
import { findProxy, runningProxies, withProxyOption } from './registry.ts';

function log(line: string): void {
  process.stderr.write(`${new Date().toISOString()} ${line}\n`);
}

/** Where it is closed to this user, mounting fails with a better sentence than opening. */
function canOpenDevice(): boolean {
  try {
    accessSync('/dev/fuse', constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
}

function runVerb(): Command {
  const command = verb(
    'run',
    'Run a proxy in the foreground: the same as mount, for systemd and containers.\n\nThe process is the holder of the mount; it starts the proxy, and another one when that dies.',
    ['gridvfs proxy run ssh://images.example.org/srv/store /mnt/grid'],
  )
    .argument('<source>')
    .argument('<mountpoint>')
    .addOption(new Option('--ready-fd <fd>').hideHelp())
    .addOption(new Option('--log-file <file>').hideHelp());
  return addProxyOptions(command).action(
    async (
      source: string,
      mountpoint: string,
      given: ProxyOptions & { readyFd?: string; logFile?: string },
    ) => {
      const readyFd = given.readyFd === undefined ? undefined : Number(given.readyFd);
      const tell = (message: unknown) => {
        if (readyFd === undefined) return;
        writeSync(readyFd, JSON.stringify(message));
        // The reader waits for the end of the pipe, not for a line: only a closed descriptor is an answer.
        closeSync(readyFd);
      };
      let served = false;
      try {
        const { paths, options } = resolveProxy(command, 'mount', source, mountpoint, given);
        const place = await usableMountpoint(mountpoint, paths.name);
        const [, , ...args] = proxyArguments(command, source, place, paths.name);
        const canBeHeld = options.driver !== 'fuse-native' && canOpenDevice();
        const how = await hold({
          args,
          mountpoint: place,
          devices: canBeHeld ? (options.workers ?? WORKERS_DEFAULT) : 0,
          folder: runtimeRoot(),
          log,
          ready: (record) => {
            served = true;
            tell({ ready: record });
            notifyServiceManager();
          },
        });
        if (how === 'failed') await abandonMount(place);
        process.exit(how === 'failed' ? 1 : 0);
      } catch (error) {
        const known = asGridError(error, 'the proxy cannot start');
        if (!served) tell({ error: { code: known.code, message: known.message } });
        if (readyFd === undefined) throw known;
        log(`${known.message} [${known.code}]`);
        process.exit(1);
      }
    },
  );
}

/** systemd's Type=notify: says READY=1 where it asked for it. */
function notifyServiceManager(): void {
  if (process.env['NOTIFY_SOCKET'] === undefined) return;
  const child = spawn('systemd-notify', ['--ready', `--pid=${process.pid}`], { stdio: 'ignore' });
  child.on('error', (error) => log(`cannot tell systemd: ${error.message}`));
}

/** The proxy itself, started by its holder. */
function serveVerb(): Command {
  const command = verb('serve', 'The proxy behind `proxy run`; started by it alone.')
    .argument('<source>')
    .argument('<mountpoint>')
    .option('--held <count>', 'devices that the holder gave', Number)
    .option('--takeover', 'the mount is there already')
    .option('--standby', 'wait for the word of the holder')
    .addOption(new Option('--log-file <file>').hideHelp());
  return addProxyOptions(command).action(
    async (
      source: string,
      mountpoint: string,
      given: ProxyOptions & { held?: number; takeover?: boolean; standby?: boolean; logFile?: string },
    ) => {
      const held = given.held === undefined ? undefined : heldDevices(given.held);
      const signals = signalsUntilStarted();
      try {
        const { paths, ssh, options } = resolveProxy(command, 'mount', source, mountpoint, given);
        const daemon = await startDaemon(
          {
            source: absoluteSource(source),
            mountpoint: path.resolve(mountpoint),
            paths,
            ssh,
            logFile: given.logFile ?? '(standard error)',
            takeover: given.takeover ?? false,
            prepareSuccessor,
            ...(held === undefined ? {} : { held }),
            ...(given.standby ? { standBy } : {}),
            ...(options.also === undefined ? {} : { also: options.also.map(absoluteSource) }),
            ...(options.metrics === undefined ? {} : { metrics: parseListen(options.metrics) }),
            ...(options.quota === undefined ? {} : { quotaBytes: options.quota }),
            ...(options.workers === undefined ? {} : { workers: options.workers }),
            ...(options.minFree === undefined ? {} : { minFreeBytes: options.minFree }),
            ...(options.prefetchRate === undefined ? {} : { prefetchBytesPerSecond: options.prefetchRate }),
            ...(options.readAround === undefined ? {} : { readAround: options.readAround }),
            ...(options.profile === undefined ? {} : { profiles: options.profile }),
            ...(options.driver === undefined ? {} : { driver: options.driver }),
            ...(options.passthrough === undefined ? {} : { passthrough: options.passthrough }),
            ...(options.readOnly === undefined ? {} : { readOnly: options.readOnly }),
            ...(options.allowOther === undefined ? {} : { allowOther: options.allowOther }),
            ...(options.uid === undefined ? {} : { uid: options.uid }),
            ...(options.gid === undefined ? {} : { gid: options.gid }),
            ...brokerOf(options),
            ...(options.accel === undefined ? {} : { accelerator: options.accel }),
            ...(options.cgroup === undefined ? {} : { cgroup: options.cgroup }),
          },
          log,
        );
        if (signals.started((force) => daemon.shutdown(force))) {
          await daemon.shutdown(true);
          throw new GridError('closed', 'interrupted before it was mounted; nothing is left');
        }
        await tellHolder({ kind: 'ready', record: daemon.record, outlives: daemon.outlivesProcess });
        onHolderGone(() => log('the holder is gone: the mount ends with this proxy now'));
        const how = await daemon.ended;
        log(how);
        await tellHolder({ kind: 'over', how });
        // Whatever handle a library still holds must not keep a proxy alive that has nothing left to serve.
        process.exit(how === 'failed' ? 1 : 0);
      } catch (error) {
        const { code, message } = asGridError(error, 'the proxy cannot start');
        if (process.connected) await tellHolder({ kind: 'failed', code, message });
        else log(`${message} [${code}]`);
        process.exit(1);
      }
    },
  );
}

/** SIGTERM and SIGINT stop in order, VMs included. `started` is true when one came during the start. */
function signalsUntilStarted(): { started(shutdown: (force: boolean) => Promise<void>): boolean } {
  let pending: NodeJS.Signals | undefined;
  let stop: ((signal: NodeJS.Signals) => void) | undefined;
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, () => {
      pending = signal;
      stop?.(signal);
    });
  }
  process.on('SIGHUP', () => {});
  return {
    started(shutdown) {
      stop = (signal) => {
        log(`${signal}: stopping`);
        shutdown(true).catch((error: unknown) => log(`cannot stop: ${String(error)}`));
      };
      return pending !== undefined;
    },
  };
}

interface CacheStatus {
  images: {
    manifest: string;
    presentBytes: number;
    fetchedChunks: number;
    fetchedPlainBytes: number;
    hitRate?: number;
  }[];
}

interface StatusOptions {
  json?: boolean;
  proxy?: string;
  watch?: boolean;
  interval?: number;
  count?: number;
}

/** A status looks at every image and source: more often than this it would be the load that it shows. */
const WATCH_INTERVAL_MS_MIN = 100;

function statusVerb(): Command {
  return withProxyOption(
    verb('status', 'Show one proxy in detail (--proxy, or the only one), else a list of all that run.', [
      'gridvfs proxy status --json',
      'gridvfs proxy status --watch                  # requests a second, per image and clone',
      'gridvfs proxy status --watch --interval 10s --json',
    ]),
  )
    .addOption(jsonOption())
    .option('--watch', 'show what the mount does now, again and again; with --json a line each time')
    .option('--interval <DURATION>', 'how often --watch shows it (default: 1s)', parseDuration)
    .option('--count <N>', 'how many times --watch shows it (default: until Ctrl-C)', parseCount)
    .action(async (options: StatusOptions) => {
      if (!options.watch && (options.interval !== undefined || options.count !== undefined))
        throw new GridError('bad-request', '--interval and --count go with --watch');
      if (options.watch) {
        const { client } = await findProxy(options.proxy);
        const { json = false, interval: intervalMs = 1000, count } = options;
        if (intervalMs < WATCH_INTERVAL_MS_MIN)
          throw new GridError('bad-request', `--interval must be at least ${WATCH_INTERVAL_MS_MIN}ms`);
        return watch(client, { json, intervalMs, ...(count === undefined ? {} : { count }) });
      }
      const records = await runningProxies();
      if (options.proxy === undefined && records.length !== 1) {
        if (records.length === 0) throw new GridError('not-found', 'no proxy runs here');
        show(options, records, () =>
          table(
            ['PROXY', 'PID', 'MOUNTED AT', 'SOURCE'],
            records.map((one) => [one.name, one.pid, one.mountpoint, one.source]),
          ),
        );
        return;
      }
      const { client } = await findProxy(options.proxy);
      const status = await client.call<Record<string, unknown> & { cache: CacheStatus }>('GET', '/v1/status');
      const named = await client.call<{ images: { manifest: string; names: readonly string[] }[] }>(
        ...(['GET', '/v1/cache'] as const),
      );
      const names = new Map(named.images.map((one) => [one.manifest, one.names[0]]));
      show(options, status, () => {
        const lines = ['name', 'pid', 'mountpoint', 'source', 'started', 'vms', 'clones', 'log'].map(
          (key) => `${key}: ${String(status[key])}`,
        );
        const images = table(
          ['IMAGE', 'PRESENT', 'FETCHED', 'CHUNKS'],
          status.cache.images.map((one) => [
            names.get(one.manifest) ?? one.manifest.slice(0, 12),
            bytesText(one.presentBytes),
            bytesText(one.fetchedPlainBytes),
            one.fetchedChunks,
          ]),
        );
        return [...lines, '', images].join('\n');
      });
    });
}

/** How long a successor may take to load, connect and take over. */
const UPGRADE_TIMEOUT_MS = 60_000;

function upgradeVerb(): Command {
  return withProxyOption(
    verb(
      'upgrade',
      'Replace a running proxy by a new process of the program as it is installed now.\n\nMount, clones and VMs stay; programs that read at that moment wait for an instant.',
      ['gridvfs proxy upgrade', 'gridvfs proxy upgrade mnt-grid'],
    ),
  )
    .argument('[name]')
    .addOption(jsonOption())
    .action(async (name: string | undefined, options: { proxy?: string; json?: boolean }) => {
      const { record, client } = await findProxy(name ?? options.proxy);
      const { from, to } = await client.call<{ from: number; to: number }>('POST', '/v1/upgrade', {});
      const startMs = performance.now();
      for (;;) {
        const now = (await runningProxies()).find((one) => one.mountpoint === record.mountpoint);
        if (now && now.pid !== from) {
          show(options, { from, to: now.pid }, () => `proxy ${now.name} is pid ${now.pid} now, was ${from}`);
          return;
        }
        if (!now || performance.now() - startMs > UPGRADE_TIMEOUT_MS) {
          const what = now ? `did not take over in ${UPGRADE_TIMEOUT_MS / 1000} s` : 'did not take over';
          throw new GridError('timeout', `the new proxy (pid ${to}) ${what}; see ${record.log}`);
        }
        await sleep(10);
      }
    });
}

interface StopOptions {
  force?: boolean;
  proxy?: string;
  json?: boolean;
}

export function proxyVerbs(): Command {
  const group = verb('proxy', "Run this host's proxy in the foreground, show or stop running ones.");
  group.addCommand(runVerb());
  group.addCommand(serveVerb(), { hidden: true });
  group.addCommand(upgradeVerb());
  group.addCommand(statusVerb());
  group.addCommand(
    withProxyOption(verb('stop', 'Unmount and end a proxy.', ['gridvfs proxy stop mnt-grid']))
      .argument('[name]')
      .option('--force', 'stop VMs, and detach even while files are open')
      .addOption(jsonOption())
      .action(async (name: string | undefined, options: StopOptions) => {
        const { record } = await findProxy(name ?? options.proxy);
        await stopProxyAt(record.mountpoint, options.force ?? false);
        show(options, { unmounted: record.mountpoint }, () => `${record.mountpoint} is unmounted`);
      }),
  );
  return group;
}
