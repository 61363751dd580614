/**
 * One start of a VM, on the clock: from the request (so it includes making the clone or the overlay) until the guest has
 * said that it is ready. `startLocal` has no part of gridvfs: a qcow2 overlay on a file, same QEMU, same cache mode.
 * `startGrid` has all of it: FUSE mount, disk cache, proxy, ssh tunnel, link, ssh endpoint, store; a proxy of its own,
 * mounted before and unmounted after, and the cache folder that the caller names decides whether it is cold or warm. The page
 * cache is dropped before each.
 */
import { execFile } from 'node:child_process';
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { ControlClient } from '../../src/agent/client.ts';
import type { CloneStatus } from '../../src/agent/clone-status.ts';
import type { VmStatus } from '../../src/agent/vm-record.ts';
import { createQemu } from '../../src/vmm/index.ts';
import { APPLICATION, GuestShell } from '../guest/shell.ts';
import { gridvfs } from './child.ts';
import { cpuSecondsOf, dropPageCache } from './facts.ts';
import type { PageCacheState } from './facts.ts';
import { IMAGE, orInterrupted } from './scene.ts';
import type { Scene } from './scene.ts';

export const READY_TIMEOUT_MS = 600_000;
const SAMPLE_MS = 100;

export interface Start {
  readonly seconds: number;
  readonly pageCache: PageCacheState;
  /** When the phases were over, in seconds since the request. */
  readonly phases: Readonly<Record<string, number>>;
  /** Of the application run in the guest after that. */
  readonly applicationSeconds?: number;
  /** What it said: the same in each run, or bytes were wrong. */
  readonly applicationSum?: string;
  readonly grid?: GridFigures;
  /** Over the link until the guest was ready. */
  readonly linkBytes?: number;
  /** [seconds, bytes over the link towards the host] since the request. */
  readonly series?: readonly (readonly [number, number])[];
}

export interface GridFigures {
  /** Of the proxy's own start: mount asked for until it is there. Not in `seconds`. */
  readonly mountSeconds: number;
  readonly fetchedChunks: number;
  readonly fetchedPlainBytes: number;
  readonly fetchedStoredBytes: number;
  readonly missedChunks: number;
  readonly touchedChunks: number;
  /** Requests that cost a round trip, of the mount too. */
  readonly roundTrips: number;
  readonly proxyCpuSeconds: number;
  readonly serverCpuSeconds: number;
  /** Of a full clone: from the request until it needs nothing of its base. */
  readonly filledSeconds?: number;
}

export interface LocalOptions {
  /** Names its folder. */
  readonly name: string;
  /** What the overlay lies on, in qemu-img's words; the guest's raw disk when left out. */
  readonly backing?: { readonly file: string; readonly format: 'raw' };
  readonly kernel?: string;
  readonly initrd?: string;
  /** On the clock, before the overlay is made. */
  readonly before?: () => Promise<void>;
  readonly application?: boolean;
  /** Whose bytes are sampled. */
  readonly link?: string;
}

/** A start without gridvfs. */
export async function startLocal(scene: Scene, options: LocalOptions): Promise<Start> {
  const { guest, signal } = scene;
  await using stack = new AsyncDisposableStack();
  const folder = path.join(scene.folder, options.name);
  await mkdir(folder);
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const pageCache = dropPageCache(scene.folder);
  const watch = await watchLink(scene, options.link);
  stack.defer(async () => void (await watch?.end()));
  const startedMs = performance.now();
  const sinceStart = () => (performance.now() - startedMs) / 1000;
  const phases: Record<string, number> = {};
  if (options.before) {
    await orInterrupted(signal, options.before());
    phases['copied'] = sinceStart();
  }
  const overlay = path.join(folder, 'overlay.qcow2');
  const { file, format } = options.backing ?? { file: guest.disk, format: 'raw' };
  await promisify(execFile)('qemu-img', [
    ...['create', '-q', '-u', '-f', 'qcow2', '-b', file, '-F', format, overlay, String(guest.sizeBytes)],
  ]);
  phases['disk made'] = sinceStart();
  const machine = await createQemu({ accelerator: 'auto' }).start(
    {
      name: options.name,
      vcpus: 1,
      memoryBytes: guest.memoryBytes,
      disks: [{ path: overlay, format: 'qcow2', readOnly: false }],
      boot: {
        kernel: options.kernel ?? guest.kernel,
        initrd: options.initrd ?? guest.initrd,
        commandLine: guest.commandLine,
      },
      macAddress: '52:54:00:00:00:01',
      network: 'user',
      readyText: guest.readyText,
    },
    folder,
  );
  stack.defer(() => machine.stop(0));
  phases['machine started'] = sinceStart();
  await orInterrupted(signal, machine.ready(READY_TIMEOUT_MS));
  const seconds = sinceStart();
  phases['guest ready'] = seconds;
  const carried = await watch?.end();
  const application = options.application ? await runApplication(scene, machine.consoleSocket) : undefined;
  return { seconds, pageCache, phases, ...carried, ...application };
}

export interface GridOptions {
  readonly link: string;
  /** Names the cache folder below the scene's. */
  readonly cache: string;
  /** Replay and record profiles. */
  readonly profile?: boolean;
  readonly application?: boolean;
  /** Over a full clone, which is waited for. */
  readonly full?: boolean;
}

interface ProxyStatus {
  readonly cache: {
    readonly fetchedChunks: number;
    readonly fetchedPlainBytes: number;
    readonly fetchedStoredBytes: number;
    readonly missedChunks: number;
    readonly images: readonly { readonly touchedChunks: number }[];
  };
  readonly sources: readonly { readonly roundTrips?: number }[];
}

export interface MountedProxy {
  readonly client: ControlClient;
  readonly pid: number;
  readonly mountSeconds: number;
}

/** A proxy on host `host`, mounted until the stack is disposed. */
export async function mountProxy(
  stack: AsyncDisposableStack,
  scene: Scene,
  options: { link: string; cache: string; profile?: boolean; host?: number },
): Promise<MountedProxy> {
  const { link, cache, host = 0 } = options;
  const mountpoint = path.join(scene.folder, 'mnt', `${link}-${host}`);
  await mkdir(mountpoint, { recursive: true });
  // Before the mount: an interrupted one may be there all the same, or not.
  stack.defer(async () => {
    await gridvfs(['umount', mountpoint, '--force', '--json']).catch((error: unknown) => {
      if (!String(error).includes('[not-found]')) throw error;
    });
  });
  const source = await scene.sourceOver(link);
  const beforeMount = performance.now();
  const mounting = scene.network.onHost(host, () =>
    gridvfs<{ pid: number; runtime: string }>(
      [
        ...['mount', source, mountpoint, '--name', `demo-${link}-${host}`, '--json'],
        ...['--identity', scene.identity, '--host-key', scene.fingerprint],
        ...['--cache-dir', path.join(scene.folder, cache)],
        ...['--state-dir', path.join(scene.folder, `state-${link}-${host}`)],
        ...(options.profile ? [] : ['--no-profile']),
      ],
      scene.signal,
    ),
  );
  const proxy = await mounting;
  return {
    client: new ControlClient(path.join(proxy.runtime, 'control.sock')),
    pid: proxy.pid,
    mountSeconds: (performance.now() - beforeMount) / 1000,
  };
}

/** What a proxy did since it was mounted. */
export async function gridFigures(
  client: ControlClient,
  scene: Scene,
  since: { pid: number; mountSeconds: number; cpu: { proxy: number; server: number } },
): Promise<GridFigures> {
  const { cache, sources } = await client.call<ProxyStatus>('GET', '/v1/status');
  return {
    mountSeconds: since.mountSeconds,
    fetchedChunks: cache.fetchedChunks,
    fetchedPlainBytes: cache.fetchedPlainBytes,
    fetchedStoredBytes: cache.fetchedStoredBytes,
    missedChunks: cache.missedChunks,
    touchedChunks: cache.images.reduce((sum, image) => sum + image.touchedChunks, 0),
    roundTrips: sources.reduce((sum, source) => sum + (source.roundTrips ?? 0), 0),
    proxyCpuSeconds: cpuSecondsOf(since.pid) - since.cpu.proxy,
    serverCpuSeconds: cpuSecondsOf(scene.serverPid) - since.cpu.server,
  };
}

/** A start through the whole chain. */
export async function startGrid(scene: Scene, options: GridOptions): Promise<Start> {
  const { signal } = scene;
  await using stack = new AsyncDisposableStack();
  const { client, pid, mountSeconds } = await mountProxy(stack, scene, options);
  const pageCache = dropPageCache(scene.folder);
  const watch = await watchLink(scene, options.link);
  stack.defer(async () => void (await watch?.end()));
  const cpuBefore = { proxy: cpuSecondsOf(pid), server: cpuSecondsOf(scene.serverPid) };
  const startedMs = performance.now();
  const clone = options.full
    ? await client.call<CloneStatus>('POST', '/v1/clones', { image: IMAGE, kind: 'full' })
    : undefined;
  const beforeVmSeconds = (performance.now() - startedMs) / 1000;
  const vm = await client.call<VmStatus>('POST', '/v1/vms', clone ? { clone: clone.id } : { image: IMAGE });
  const ready = await orInterrupted(
    signal,
    client.call<VmStatus>('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${READY_TIMEOUT_MS}`),
  );
  const seconds = (performance.now() - startedMs) / 1000;
  const carried = await watch?.end();
  const figures = await gridFigures(client, scene, { pid, mountSeconds, cpu: cpuBefore });
  const application = options.application ? await runApplication(scene, vm.consoleSocket) : undefined;
  const filled = clone && (await whenFilled(client, clone.id, signal));
  const filledSeconds = filled && (performance.now() - startedMs) / 1000;
  await client.call('POST', `/v1/vms/${vm.id}/stop`, { graceMs: 0 });
  if (clone) await client.call('DELETE', `/v1/clones/${clone.id}`);
  const { clonedMs, startedMs: machineMs } = ready.timeline;
  return {
    seconds,
    pageCache,
    phases: {
      'disk made': beforeVmSeconds + clonedMs / 1000,
      'machine started': beforeVmSeconds + (machineMs ?? 0) / 1000,
      'guest ready': seconds,
    },
    ...application,
    ...carried,
    grid: { ...figures, ...(filledSeconds === undefined ? {} : { filledSeconds }) },
  };
}

async function whenFilled(client: ControlClient, id: string, signal: AbortSignal): Promise<true> {
  for (;;) {
    const { filling } = await client.call<CloneStatus>('GET', `/v1/clones/${id}`);
    if (filling?.failure !== undefined) throw new Error(`filling the clone failed: ${filling.failure}`);
    if (filling === undefined) return true;
    await sleep(SAMPLE_MS, undefined, { signal });
  }
}

async function runApplication(scene: Scene, consoleSocket: string) {
  const shell = await orInterrupted(scene.signal, GuestShell.open(consoleSocket, READY_TIMEOUT_MS));
  try {
    const startedMs = performance.now();
    const running = shell.run(APPLICATION[scene.guest.name], READY_TIMEOUT_MS);
    const said = await orInterrupted(scene.signal, running);
    const applicationSum = /\b[0-9a-f]{64}\b/.exec(said)?.[0];
    if (applicationSum === undefined) throw new Error(`the application said no sum: ${said.slice(-200)}`);
    return { applicationSeconds: (performance.now() - startedMs) / 1000, applicationSum };
  } finally {
    shell.close();
  }
}

/** Samples what the link carries, from now on until its end. */
export async function watchLink(scene: Scene, link: string | undefined) {
  if (link === undefined) return undefined;
  const carried = async () => (await scene.network.carried(link)).toHostsBytes;
  const before = await carried();
  const startedMs = performance.now();
  const series: [number, number][] = [[0, 0]];
  let last = Promise.resolve();
  const sample = async () => {
    const bytes = (await carried()) - before;
    series.push([(performance.now() - startedMs) / 1000, bytes]);
  };
  const timer = setInterval(() => {
    last = last.then(sample);
  }, SAMPLE_MS);
  let ended: Promise<{ linkBytes: number; series: typeof series }> | undefined;
  return {
    end: () =>
      (ended ??= (async () => {
        clearInterval(timer);
        await last.then(sample);
        return { linkBytes: series.at(-1)![1], series };
      })()),
  };
}
