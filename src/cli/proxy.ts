/** gridvfs proxy run|status|stop: the daemon in the foreground (for systemd), and a look at running ones. */
import { closeSync, writeSync } from 'node:fs';
import path from 'node:path';
import { Option } from 'commander';
import type { Command } from 'commander';
import { asGridError, GridError } from '../core/errors.ts';
import { startDaemon } from './daemon.ts';
import { bytesText, jsonOption, parseListen, show, table, verb } from './kit.ts';
import { stopProxyAt } from './mount.ts';
import { absoluteSource, addProxyOptions, resolveProxy } from './proxy-options.ts';
import type { ProxyOptions } from './proxy-options.ts';
import { findProxy, runningProxies, withProxyOption } from './registry.ts';

function log(line: string): void {
  process.stderr.write(`${new Date().toISOString()} ${line}\n`);
}

function runVerb(): Command {
  const command = verb(
    'run',
    'Run a proxy in the foreground: the same as mount, for systemd and containers.',
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
        if (readyFd !== undefined) writeSync(readyFd, JSON.stringify(message));
      };
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
            ...(options.also === undefined ? {} : { also: options.also.map(absoluteSource) }),
            ...(options.metrics === undefined ? {} : { metrics: parseListen(options.metrics) }),
            ...(options.quota === undefined ? {} : { quotaBytes: options.quota }),
            ...(options.workers === undefined ? {} : { workers: options.workers }),
            ...(options.minFree === undefined ? {} : { minFreeBytes: options.minFree }),
            ...(options.prefetchRate === undefined ? {} : { prefetchBytesPerSecond: options.prefetchRate }),
            ...(options.profile === undefined ? {} : { profiles: options.profile }),
            ...(options.driver === undefined ? {} : { driver: options.driver }),
            ...(options.passthrough === undefined ? {} : { passthrough: options.passthrough }),
            ...(options.readOnly === undefined ? {} : { readOnly: options.readOnly }),
            ...(options.allowOther === undefined ? {} : { allowOther: options.allowOther }),
            ...(options.uid === undefined ? {} : { uid: options.uid }),
            ...(options.gid === undefined ? {} : { gid: options.gid }),
            ...(options.accel === undefined ? {} : { accelerator: options.accel }),
          },
          log,
        );
        if (signals.started((force) => daemon.shutdown(force))) {
          await daemon.shutdown(true);
          throw new GridError('closed', 'interrupted before it was mounted; nothing is left');
        }
        tell({ ready: daemon.record });
        // The reader waits for the end of the pipe, not for a line: only a closed descriptor is an answer.
        if (readyFd !== undefined) closeSync(readyFd);
        const how = await daemon.ended;
        log(how);
        // Whatever handle a library still holds must not keep a proxy alive that has nothing left to serve.
        process.exit(how === 'failed' ? 1 : 0);
      } catch (error) {
        const known = asGridError(error, 'the proxy cannot start');
        tell({ error: { code: known.code, message: known.message } });
        if (readyFd === undefined) throw known;
        log(`${known.message} [${known.code}]`);
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

function statusVerb(): Command {
  return withProxyOption(
    verb('status', 'Show running proxies, or one in detail.', ['gridvfs proxy status --json']),
  )
    .addOption(jsonOption())
    .action(async (options: { json?: boolean; proxy?: string }) => {
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
      show(options, status, () => {
        const lines = ['name', 'pid', 'mountpoint', 'source', 'started', 'vms', 'clones', 'log'].map(
          (key) => `${key}: ${String(status[key])}`,
        );
        const images = table(
          ['IMAGE', 'PRESENT', 'FETCHED', 'CHUNKS'],
          status.cache.images.map((one) => [
            one.manifest.slice(0, 12),
            bytesText(one.presentBytes),
            bytesText(one.fetchedPlainBytes),
            one.fetchedChunks,
          ]),
        );
        return [...lines, '', images].join('\n');
      });
    });
}

export function proxyVerbs(): Command {
  const group = verb('proxy', "Run this host's proxy in the foreground, show or stop running ones.");
  group.addCommand(runVerb());
  group.addCommand(statusVerb());
  group.addCommand(
    withProxyOption(verb('stop', 'Unmount and end a proxy.', ['gridvfs proxy stop mnt-grid']))
      .argument('[name]')
      .option('--force', 'stop VMs, and detach even while files are open')
      .action(async (name: string | undefined, options: { force?: boolean; proxy?: string }) => {
        const { record } = await findProxy(name ?? options.proxy);
        await stopProxyAt(record.mountpoint, options.force ?? false);
        process.stdout.write(`${record.mountpoint} is unmounted\n`);
      }),
  );
  return group;
}
