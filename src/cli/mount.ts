/**
 * gridvfs mount and umount. `mount` starts `gridvfs proxy run` in the background and returns when the mount is
 * there: the child writes one JSON line to descriptor 3, either { ready } or { error }, so a failed start is this
 * command's failure, with its reason.
 */
import { spawn } from 'node:child_process';
import { mkdir, open } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import { ControlClient } from '../agent/client.ts';
import type { ErrorCode } from '../core/errors.ts';
import { GridError } from '../core/errors.ts';
import { isRunning } from '../core/linux.ts';
import { cleanDeadMount } from '../frontend/fuse/index.ts';
import { jsonOption, show, verb } from './kit.ts';
import { addProxyOptions, proxyArguments, resolveProxy } from './proxy-options.ts';
import type { ProxyOptions } from './proxy-options.ts';
import { controlSocketOf, runningProxies } from './registry.ts';
import type { ProxyRecord } from './registry.ts';

export function mountVerb(): Command {
  const command = verb(
    'mount',
    "Start this host's proxy in the background and mount a source's images.\n\nSOURCE is ssh://[user@]host[:port]/path, https://…, or the folder of a store on this host.",
    [
      'gridvfs mount ssh://images.example.org/srv/store /mnt/grid',
      'gridvfs mount /srv/store /mnt/grid --quota 50G',
      'gridvfs mount ssh://one.example.org/srv/store /mnt/grid --also ssh://two.example.org/srv/store',
      'ls /mnt/grid/images',
    ],
  )
    .argument('<source>')
    .argument('<mountpoint>')
    .addOption(jsonOption());
  return addProxyOptions(command).action(
    async (source: string, mountpoint: string, options: ProxyOptions & { json?: boolean }) => {
      const settings = resolveProxy(command, 'mount', source, mountpoint, options);
      const record = await startInBackground(
        settings.paths.state,
        proxyArguments(command, source, mountpoint),
      );
      show(
        options,
        record,
        () => `${record.source} is mounted at ${record.mountpoint} (proxy ${record.name}, pid ${record.pid})`,
      );
    },
  );
}

async function startInBackground(stateFolder: string, args: string[]): Promise<ProxyRecord> {
  await mkdir(stateFolder, { recursive: true, mode: 0o700 });
  const logFile = path.join(stateFolder, 'proxy.log');
  const log = await open(logFile, 'a', 0o600);
  const child = spawn(
    process.execPath,
    [process.argv[1]!, ...args, '--ready-fd', '3', '--log-file', logFile],
    {
      detached: true,
      stdio: ['ignore', log.fd, log.fd, 'pipe'],
    },
  );
  await log.close();
  const interrupted = () => child.kill('SIGTERM');
  process.once('SIGINT', interrupted);
  process.once('SIGTERM', interrupted);
  try {
    let text = '';
    for await (const part of child.stdio[3] as AsyncIterable<Buffer>) text += part.toString('utf8');
    if (text === '') throw new GridError('bug', `the proxy ended before it was ready; see ${logFile}`);
    const message = JSON.parse(text) as { ready?: ProxyRecord; error?: { code: ErrorCode; message: string } };
    if (message.error) throw new GridError(message.error.code, message.error.message);
    return message.ready!;
  } finally {
    process.off('SIGINT', interrupted);
    process.off('SIGTERM', interrupted);
    child.unref();
  }
}

/** How long a proxy may take to flush and end after its mount is gone. */
const END_TIMEOUT_MS = 60_000;

export function umountVerb(): Command {
  return verb('umount', 'Unmount and stop the proxy behind a mount point.', [
    'gridvfs umount /mnt/grid',
    'gridvfs umount /mnt/grid --force   # also when VMs run or files are open',
  ])
    .argument('<mountpoint>')
    .option('--force', 'stop VMs, and detach even while files are open')
    .addOption(jsonOption())
    .action(async (mountpoint: string, options: { force?: boolean; json?: boolean }) => {
      await stopProxyAt(path.resolve(mountpoint), options.force ?? false);
      show(options, { unmounted: path.resolve(mountpoint) }, () => `${mountpoint} is unmounted`);
    });
}

/** Ends the proxy that serves `mountpoint`, or cleans up after one that was killed. */
export async function stopProxyAt(mountpoint: string, force: boolean): Promise<void> {
  const record = (await runningProxies()).find((one) => one.mountpoint === mountpoint);
  if (!record) {
    if (await cleanDeadMount(mountpoint)) return;
    throw new GridError('not-found', `no gridvfs proxy has anything mounted at ${mountpoint}`);
  }
  await new ControlClient(controlSocketOf(record.runtime)).call('POST', '/v1/shutdown', { force });
  const endMs = performance.now() + END_TIMEOUT_MS;
  while (isRunning(record.pid)) {
    if (performance.now() > endMs) {
      throw new GridError(
        'timeout',
        `the proxy (pid ${record.pid}) unmounted but did not end in ${END_TIMEOUT_MS / 1000} s; see ${record.log}`,
      );
    }
    await sleep(10);
  }
}
