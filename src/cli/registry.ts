/**
 * Which proxies run on this host: each writes `proxy.json` beside its control socket in the runtime folder.
 * A verb that talks to a proxy finds it by mount point or name, or takes the only one there is.
 */
import { existsSync } from 'node:fs';
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import { ControlClient } from '../agent/client.ts';
import { GridError } from '../core/errors.ts';
import { isRunning, startOf } from '../core/linux.ts';
import { runtimeRoot } from './paths.ts';

/** What `proxy.json` holds. */
export interface ProxyRecord {
  readonly name: string;
  readonly pid: number;
  /** The proxy and, where there is one, its holder: it runs as long as any of them does. */
  readonly processes: readonly ProcessId[];
  readonly mountpoint: string;
  readonly source: string;
  readonly cache: string;
  readonly state: string;
  readonly runtime: string;
  readonly log: string;
  readonly started: string;
}

/** A pid alone names another process as soon as it is used again. */
export interface ProcessId {
  readonly pid: number;
  /** Of `startOf`. */
  readonly start: string;
}

/** This process and `others`, as far as they run. */
export function livingProcesses(others: readonly number[]): ProcessId[] {
  return [process.pid, ...others].flatMap((pid) => {
    const start = startOf(pid);
    return start === undefined ? [] : [{ pid, start }];
  });
}

/** Whether any process of a proxy runs. */
export function isAlive({ processes }: ProxyRecord): boolean {
  return processes.some(isSame);
}

function isSame({ pid, start }: ProcessId): boolean {
  return isRunning(pid) && startOf(pid) === start;
}

export function controlSocketOf(runtime: string): string {
  return path.join(runtime, 'control.sock');
}

/** Records of proxies that run. */
export async function runningProxies(): Promise<ProxyRecord[]> {
  return (await proxyRecords()).filter(isAlive);
}

/** Records of all proxies, also of those that were killed with everything that could have cleaned up. */
export async function proxyRecords(): Promise<ProxyRecord[]> {
  const root = runtimeRoot();
  if (!existsSync(root)) return [];
  const records: ProxyRecord[] = [];
  for (const name of await readdir(root)) {
    try {
      const record = JSON.parse(await readFile(path.join(root, name, 'proxy.json'), 'utf8')) as ProxyRecord;
      if (Array.isArray(record.processes)) records.push(record);
    } catch {
      // none there, or one that is just starting or ending
    }
  }
  return records.toSorted((a, b) => (a.mountpoint < b.mountpoint ? -1 : 1));
}

/** How long a command waits for a proxy that has just died to have its successor. */
const SUCCESSOR_TIMEOUT_MS = 20_000;

/** Running proxies, none of them between one process and the next where that ends soon: a record names a process
 * only after its control socket answers. */
async function servingProxies(): Promise<ProxyRecord[]> {
  const endMs = performance.now() + SUCCESSOR_TIMEOUT_MS;
  for (;;) {
    const records = await runningProxies();
    const isServing = ({ pid, processes }: ProxyRecord) =>
      processes.some((one) => one.pid === pid && isSame(one));
    if (records.every(isServing) || performance.now() > endMs) return records;
    await sleep(20);
  }
}

export function withProxyOption(command: Command): Command {
  return command.option('-p, --proxy <NAME|MOUNTPOINT>', 'which proxy, when more than one runs');
}

/** The proxy that is meant: by name or mount point, or the only one that runs. */
export async function findProxy(
  which: string | undefined,
): Promise<{ record: ProxyRecord; client: ControlClient }> {
  const records = await servingProxies();
  const matching =
    which === undefined
      ? records
      : records.filter((record) => record.name === which || record.mountpoint === path.resolve(which));
  if (matching.length === 1) {
    const record = matching[0]!;
    return { record, client: new ControlClient(controlSocketOf(record.runtime)) };
  }
  const list = records.map((record) => `${record.name} (${record.mountpoint})`).join(', ');
  if (records.length === 0) {
    throw new GridError('not-found', 'no proxy runs here; start one with `gridvfs mount SOURCE MOUNTPOINT`');
  }
  if (which === undefined)
    throw new GridError('bad-request', `several proxies run: ${list}; say which with --proxy`);
  throw new GridError('not-found', `no proxy '${which}' runs here; there is ${list}`);
}

/** Throws in-use when a proxy that runs has the mount point or the name. */
export async function refuseSecond(name: string, mountpoint: string): Promise<void> {
  for (const other of await runningProxies()) {
    if (other.mountpoint === mountpoint || other.name === name) {
      throw new GridError(
        'in-use',
        `proxy '${other.name}' (pid ${other.pid}) has ${other.source} mounted at ${other.mountpoint}; \`gridvfs umount ${other.mountpoint}\` ends it`,
      );
    }
  }
}
