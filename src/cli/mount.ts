/**
 * gridvfs mount and umount. `mount` starts `gridvfs proxy run` in the background and returns when the mount is
 * there: the child writes one JSON line to descriptor 3, either { ready } or { error }, so a failed start is this
 * command's failure, with its reason. `umount` ends it, or cleans up after one that was killed with its holder.
 */
import { spawn } from 'node:child_process';
import { mkdir, open, readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import { ControlClient } from '../agent/client.ts';
import type { ErrorCode } from '../core/errors.ts';
import { GridError } from '../core/errors.ts';
import { checkMountpoint, cleanDeadMount, describeMount, resolveMountpoint } from '../frontend/fuse/index.ts';
import { createMachines } from '../vmm/index.ts';
import { jsonOption, show, verb } from './kit.ts';
import { addProxyOptions, proxyArguments, resolveProxy } from './proxy-options.ts';
import type { ProxyOptions } from './proxy-options.ts';
import { controlSocketOf, isAlive, proxyRecords, refuseSecond } from './registry.ts';
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
      const { name, state } = settings.paths;
      const place = await usableMountpoint(mountpoint, name);
      const record = await startInBackground(state, proxyArguments(command, source, place, name));
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
      const place = await stopProxyAt(mountpoint, options.force ?? false);
      show(options, { unmounted: place }, () => `${mountpoint} is unmounted`);
    });
}

/** Refuses what cannot become a mount point, before anything is made for it; returns it without symbolic links. */
export async function usableMountpoint(mountpoint: string, proxyName: string): Promise<string> {
  const place = await resolveMountpoint(mountpoint);
  await refuseSecond(proxyName, place);
  // One that a killed proxy left is cleaned up when the mount is made.
  if ((await describeMount(place))?.state === 'dead') return place;
  return checkMountpoint(place);
}

/** A proxy that has just died has a successor within this, or its holder has given up. */
const SUCCESSOR_TIMEOUT_MS = 20_000;

/** Ends the proxy that serves `mountpoint`, or cleans up after one that was killed. Returns the resolved path. */
export async function stopProxyAt(mountpoint: string, force: boolean): Promise<string> {
  if (mountpoint === '') throw new GridError('bad-request', 'the mount point is empty');
  const place = await resolveMountpoint(mountpoint);
  const record = (await proxyRecords()).find((one) => one.mountpoint === place);
  if (record && (await isShutDown(record, force))) return place;
  const wasMounted = await cleanDeadMount(place);
  if (record) await cleanUpAfter(record);
  if (record || wasMounted) return place;
  throw new GridError('not-found', `no gridvfs proxy has anything mounted at ${mountpoint}`);
}

/** Has a proxy end in order; false when it, its holder and all successors are gone without that. Throws what the
 * proxy refuses with, timeout. */
async function isShutDown(record: ProxyRecord, force: boolean): Promise<boolean> {
  const client = new ControlClient(controlSocketOf(record.runtime));
  const successorMs = performance.now() + SUCCESSOR_TIMEOUT_MS;
  for (;;) {
    if (!isAlive(record)) return false;
    try {
      await client.call('POST', '/v1/shutdown', { force });
      break;
    } catch (error) {
      const isBetweenTwo =
        error instanceof GridError && ['not-found', 'local-io', 'closed'].includes(error.code);
      if (!isBetweenTwo || performance.now() > successorMs) throw error;
      await sleep(50);
    }
  }
  const endMs = performance.now() + END_TIMEOUT_MS;
  while (isAlive(record)) {
    if (performance.now() > endMs) {
      throw new GridError(
        'timeout',
        `the proxy (pid ${record.pid}) unmounted but did not end in ${END_TIMEOUT_MS / 1000} s; see ${record.log}`,
      );
    }
    await sleep(10);
  }
  return true;
}

/** What a proxy leaves that was killed together with its holder: VMs that have lost their disks, and the folder. */
async function cleanUpAfter({ runtime }: ProxyRecord): Promise<void> {
  const vmm = createMachines({ accelerator: 'auto', log: () => undefined });
  const folder = path.join(runtime, 'vms');
  for (const id of await readdir(folder).catch(() => [])) await vmm.endLost(path.join(folder, id));
  await rm(runtime, { recursive: true, force: true });
}
