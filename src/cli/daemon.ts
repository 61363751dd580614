/**
 * The host's proxy, put together: source → cache → tree → FUSE mount, with the agent (clones, VMs) and its control
 * socket beside it. Each part gets the next one as a constructor argument; nothing here has logic of its own.
 *
 * Start: every step that succeeded is undone when a later one fails, so a failed start leaves nothing.
 * Stop, in this order: VMs, mount (refused while files are open), control socket, clones and cache flushed and
 * closed, source. A second stop waits for the first.
 */
import { closeSync, openSync } from 'node:fs';
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { openCache } from '../../cache/index.ts';
import {
  FAILOVER_TIMEOUT_MS,
  FailoverSource,
  RemoteSource,
  connectSource,
  connectSources,
} from '../../proxy/index.ts';
import { Clones } from '../agent/clones.ts';
import { serveControl } from '../agent/control.ts';
import { removeCheckpoint } from '../agent/checkpoint-removal.ts';
import { Holds } from '../agent/holds.ts';
import { listenMetrics, ProxyMetrics } from '../agent/metrics.ts';
import type { SourceForMetrics } from '../agent/metrics.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { tryLock } from '../core/linux.ts';
import type { Manifest, Tag } from '../core/manifest.ts';
import { giveBackMemory } from '../core/memory.ts';
import { parseReference } from '../core/manifest.ts';
import { QuietPoints } from '../core/quiet.ts';
import type { ChunkSource } from '../core/source.ts';
import { cleanDeadMount, mountTree, prepareThreads } from '../frontend/fuse/index.ts';
import type { Driver, HeldDevices } from '../frontend/fuse/index.ts';
import { createTree } from '../image/index.ts';
import { openStore, Store } from '../store/index.ts';
import { linkToBroker } from './broker-agent.ts';
import type { BrokerOptions } from './broker-agent.ts';
import { cloneParts, cloneWork } from './clone-parts.ts';
import { runtimeRoot } from './paths.ts';
import { machineWork } from './vm-parts.ts';
import type { ProxyPaths } from './paths.ts';
import { PatientSource } from './patient-source.ts';
import { controlSocketOf, livingProcesses, refuseSecond } from './registry.ts';
import type { ProxyRecord } from './registry.ts';

export interface DaemonOptions {
  readonly source: string;
  /** Further sources for the same store, in order of preference. */
  readonly also?: readonly string[];
  readonly mountpoint: string;
  readonly paths: ProxyPaths;
  readonly logFile: string;
  readonly quotaBytes?: number;
  /** Where a scraper finds /metrics and /healthz, beside the control socket. */
  readonly metrics?: { host: string; port: number };
  readonly workers?: number;
  readonly minFreeBytes?: number;
  readonly prefetchBytesPerSecond?: number;
  /** Whether more than what is missed is fetched with it on long links; default true. */
  readonly readAround?: boolean;
  /** Whether starts of VMs are replayed and recorded; default true. */
  readonly profiles?: boolean;
  readonly driver?: Driver;
  readonly passthrough?: boolean;
  readonly readOnly?: boolean;
  readonly allowOther?: boolean;
  readonly uid?: number;
  readonly gid?: number;
  /** The broker that this host is under. */
  readonly broker?: BrokerOptions;
  readonly accelerator?: 'auto' | 'kvm' | 'tcg';
  /** Path of the control group that this process and its VMs are put below. */
  readonly cgroup?: string;
  /** Devices that outlive this process, and with them the mount. */
  readonly held?: HeldDevices;
  /** The mount is there already: the last daemon died, or makes room for this one. */
  readonly takeover?: boolean;
  /** Called when all is ready that does not need the place of the last daemon; resolves when that is free. */
  readonly standBy?: () => Promise<void>;
  /** Starts a successor, for `proxy upgrade`. */
  readonly prepareSuccessor?: () => Promise<{ readonly pid: number; handOver(): void }>;
  readonly ssh: SshOptions;
}

export interface SshOptions {
  readonly identityPaths?: string[];
  readonly knownHostsPaths?: string[];
  readonly hostKeyFingerprint?: string;
  readonly remoteCommand?: string;
  readonly caPaths?: string[];
  readonly connectTimeoutMs?: number;
  readonly reconnectTimeoutMs?: number;
}

export interface Daemon {
  readonly record: ProxyRecord;
  /** Whether a successor can take the mount over when this process dies. */
  readonly outlivesProcess: boolean;
  /** Resolves when everything is down, for whatever reason. */
  readonly ended: Promise<'stopped' | 'failed'>;
  /** Throws in-use, unless forced, while VMs run or files are open. */
  shutdown(force: boolean): Promise<void>;
}

/** A URL is reached through the proxy protocol; anything else is a folder on this host. */
export function openSource(
  source: string,
  ssh: SshOptions,
  log: (line: string) => void,
): Promise<ChunkSource> {
  if (/^[a-z]+:\/\//.test(source))
    return connectSource(source, { ...ssh, onEvent: ({ message }) => log(message) });
  return openStore(path.resolve(source));
}

/** One source, or several for one store behind failover. */
function openSources(options: DaemonOptions, log: (line: string) => void): Promise<ChunkSource> {
  const { also = [], ssh } = options;
  if (also.length === 0) return openSource(options.source, ssh, log);
  const { reconnectTimeoutMs = Infinity } = ssh;
  // Waiting beyond this is failover's part.
  const each = { ...ssh, reconnectTimeoutMs: Math.min(FAILOVER_TIMEOUT_MS, reconnectTimeoutMs) };
  return connectSources(
    [options.source, ...also].map((name) => ({ name, open: () => openSource(name, each, log) })),
    { ...ssh, onEvent: ({ message }) => log(message) },
  );
}

/** A takeover does not wait for a source that does not answer: what is in the cache is served without it. */
async function openSourcesAgain(options: DaemonOptions, log: (line: string) => void): Promise<ChunkSource> {
  const opening = openSources(options, log);
  const soon = await Promise.race([
    opening.catch(() => undefined),
    sleep(TAKEOVER_SOURCE_MS, undefined, { ref: false }),
  ]);
  if (soon) return soon;
  let first: Promise<ChunkSource> | undefined = opening;
  return new PatientSource(
    options.source,
    () => {
      const attempt = first ?? openSources(options, log);
      first = undefined;
      return attempt;
    },
    log,
  );
}

/** One entry for each source: what it did, and why it is not asked now. */
function sourceStatistics(source: ChunkSource): SourceForMetrics[] {
  if (source instanceof FailoverSource) {
    return source
      .statistics()
      .sources.map(({ reason, ...each }) => (reason === undefined ? each : { ...each, down: reason }));
  }
  return [{ name: source.name, ...(source instanceof RemoteSource ? source.statistics() : {}) }];
}

export async function startDaemon(options: DaemonOptions, log: (line: string) => void): Promise<Daemon> {
  const { paths, takeover = false } = options;
  const mountpoint = path.resolve(options.mountpoint);
  const stack = new AsyncDisposableStack();
  // A takeover that fails leaves everything to the next one.
  let leavesAll = takeover;
  const deferUnlessLeft = (action: () => Promise<void>) =>
    stack.defer(() => (leavesAll ? Promise.resolve() : action()));
  try {
    const quiet = new QuietPoints();
    const connect = async () => {
      const opened = await (takeover ? openSourcesAgain(options, log) : openSources(options, log));
      stack.defer(() => opened.close());
      return opened;
    };
    const early = takeover ? await connect() : undefined;
    // Loading them takes longer than all that has to wait for the last daemon's end.
    const { held } = options;
    const threads = takeover && held ? await prepareThreads(held.devices.length, quiet, log) : undefined;
    let mounted = false;
    if (threads) stack.defer(() => (mounted ? Promise.resolve() : threads.terminate()));
    await options.standBy?.();
    // The mount is ours, and would wait for this very process.
    if (!takeover) await refuseSecond(paths.name, mountpoint);
    for (const what of [paths.name, mountpoint]) stack.defer(await lockFor(what));
    await mkdir(paths.runtime, { recursive: true, mode: 0o700 });
    deferUnlessLeft(() => rm(paths.runtime, { recursive: true, force: true }));
    if (!takeover) await cleanDeadMount(mountpoint);
    const source = early ?? (await connect());
    const metrics = new ProxyMetrics();
    const cache = await openCache({
      folder: paths.cache,
      source: metrics.timed(source),
      log,
      quiet,
      ...(options.minFreeBytes === undefined ? {} : { minFreeBytes: options.minFreeBytes }),
      ...(options.prefetchBytesPerSecond === undefined
        ? {}
        : { prefetchBytesPerSecond: options.prefetchBytesPerSecond }),
      ...(options.readAround === undefined ? {} : { readAround: options.readAround }),
      ...(options.quotaBytes === undefined ? {} : { quotaBytes: options.quotaBytes }),
    });
    stack.defer(() => cache.close());
    cache.prepare();
    stack.defer(giveBackMemory());
    // The first who asks for an image by its name need not wait for them.
    void cache.listTags().catch(() => undefined);

    const clones = await Clones.load(paths.state, cloneParts(cache, quiet), log);
    stack.defer(() => clones.close());

    const imageFolderOf = (tag: { name: string; version: string }) =>
      path.join(mountpoint, 'images', tag.name, tag.version);
    const resolve = async (
      text: string,
      recent = false,
    ): Promise<{ digest: Digest; manifest: Manifest; folder: string }> => {
      const { name, version } = parseReference(text);
      const isMeant = (one: Tag) => one.name === name && one.version === version;
      const known = recent ? cache.recentTags()?.find(isMeant) : undefined;
      const tag = known ?? (await cache.listTags()).find(isMeant);
      if (!tag) {
        throw new GridError(
          'not-found',
          `no image ${name}:${version} at ${source.name}; \`ls ${mountpoint}/images\` lists them`,
        );
      }
      return {
        digest: tag.manifest,
        manifest: await cache.readManifest(tag.manifest),
        folder: imageFolderOf(tag),
      };
    };
    const vmWork = await machineWork({
      cache,
      clones,
      source,
      mountpoint,
      paths,
      accelerator: options.accelerator ?? 'auto',
      profiles: options.profiles ?? true,
      ...(options.cgroup === undefined ? {} : { cgroup: options.cgroup }),
      resolve,
      imageFolderOf,
      log,
    });
    const { machines, checkpoints, forks, segments, volumes, gridVolumes, spending } = vmWork;
    stack.defer(() => spending.stop());
    stack.defer(() => segments.close());
    await vmWork.prepare(takeover);

    const tree = createTree({ catalog: cache, clones });
    const mount = await mountTree(tree, mountpoint, {
      fsName: options.source,
      log,
      quiet,
      ...(options.driver === undefined ? {} : { driver: options.driver }),
      ...(options.passthrough === undefined ? {} : { passthrough: options.passthrough }),
      ...(options.readOnly === undefined ? {} : { readOnly: options.readOnly }),
      ...(options.allowOther === undefined ? {} : { allowOther: options.allowOther }),
      ...(options.uid === undefined ? {} : { uid: options.uid }),
      ...(options.gid === undefined ? {} : { gid: options.gid }),
      ...(held === undefined ? {} : { held }),
      ...(threads === undefined ? {} : { threads }),
      ...(options.workers === undefined ? {} : { workers: options.workers }),
    });
    mounted = true;
    deferUnlessLeft(() => mount.unmount({ force: true }));
    await vmWork.goOn(takeover);
    // Not before: it may have to make room in the cache, and what the kernel reads by itself is claimed by now.
    clones.resumeFilling();

    const record: ProxyRecord = {
      name: paths.name,
      pid: process.pid,
      // Every driver's proxy has a holder, which ends last.
      processes: livingProcesses(process.connected ? [process.ppid] : []),
      mountpoint,
      source: source.name,
      cache: paths.cache,
      state: paths.state,
      runtime: paths.runtime,
      log: options.logFile,
      started: new Date().toISOString(),
    };

    const ended = Promise.withResolvers<'stopped' | 'failed'>();
    let failed = false;
    let stopping: Promise<void> | undefined;
    const unmountOnce = (force: boolean): Promise<void> => {
      stopping ??= (async () => {
        if (machines.count > 0) {
          if (!force) {
            throw new GridError(
              'in-use',
              `${machines.count} VM(s) run over ${mountpoint}; stop them, or use --force`,
            );
          }
          await machines.stopAll(FORCED_GRACE_MS);
        }
        await mount.unmount({ force });
      })().catch((error: unknown) => {
        stopping = undefined;
        throw error;
      });
      return stopping;
    };
    let finished: Promise<void> | undefined;
    const finish = () => {
      finished ??= stack.disposeAsync().then(
        () => ended.resolve(failed ? 'failed' : 'stopped'),
        (error: unknown) => ended.reject(error as Error),
      );
      return finished;
    };

    const status = async () => ({
      ...record,
      vms: machines.count,
      networks: segments.status(),
      clones: clones.records().length,
      openClones: clones.usages(),
      cache: await cache.status(),
      mount: mount.statistics(),
      sources: sourceStatistics(source),
    });
    await rm(controlSocketOf(paths.runtime), { force: true }); // of a daemon that was killed
    const work = cloneWork({
      cache,
      clones,
      source,
      storeFolder: source instanceof Store ? source.name : undefined,
      resolve,
    });
    // Of a machine that goes on from a checkpoint, what it has not touched of its memory is nowhere but there.
    const bases = () => [
      ...clones.records().flatMap((clone) => (clone.detached === undefined ? [clone.base] : [])),
      ...machines.records().flatMap(({ memory }) => memory?.image ?? []),
    ];
    const holds = new Holds({ source, stateFolder: paths.state, bases, log });
    stack.defer(() => holds.close());
    const control = await serveControl(controlSocketOf(paths.runtime), {
      clones,
      machines,
      checkpoints,
      forks,
      volumes,
      spending,
      removeCheckpoint: (reference) =>
        removeCheckpoint(
          { catalog: { resolve }, machines, clones, settle: () => holds.settle(), source },
          reference,
        ),
      resolve,
      cloneWork: work,
      cache,
      namesMoved: () => cache.expireTags(),
      shutdown: unmountOnce,
      ...(options.prepareSuccessor === undefined ? {} : { prepareSuccessor: options.prepareSuccessor }),
      ended: () => void finish(),
      status,
      metrics,
    });
    stack.defer(() => control.close());
    if (options.metrics) {
      const listener = await listenMetrics(options.metrics, metrics, status);
      stack.defer(() => listener.close());
      log(`metrics at http://${options.metrics.host}:${listener.port}/metrics`);
    }
    if (options.broker) {
      const link = await linkToBroker(
        options.broker,
        {
          machines,
          checkpoints,
          gridVolumes,
          spending,
          clones,
          commit: (clone, request) =>
            clones.atMoment(clone, (snapshot, of) => work.commitMoment(snapshot, of, request)),
          segments,
          cache,
          resolve,
          stateFolder: paths.state,
          source: source.name,
          accelerator: options.accelerator ?? 'auto',
        },
        log,
      );
      stack.defer(() => link.close());
    }
    await writeRecord(record);
    void mount.ended.then(async ({ reason }) => {
      if (stopping) return; // by us: whoever asked for it goes on when it has its answer
      failed = reason === 'failed';
      if (failed) log('the mount failed; the proxy ends');
      await machines.stopAll(0);
      await finish();
    });
    leavesAll = false;
    log(takeover ? `took over ${mountpoint}` : `mounted ${source.name} at ${mountpoint}`);
    return {
      record,
      outlivesProcess: mount.outlivesProcess,
      ended: ended.promise,
      async shutdown(force) {
        await unmountOnce(force);
        await finish();
      },
    };
  } catch (error) {
    await stack.disposeAsync();
    throw asGridError(error, `cannot mount ${options.source} at ${mountpoint}`);
  }
}

/** How long a takeover waits for a source that may only be slow: a connection over a long link. */
const TAKEOVER_SOURCE_MS = 1_500;
/** What VMs get to power down when the proxy is told to stop regardless of them. */
const FORCED_GRACE_MS = 5_000;

/** One start at a time of a proxy's name and of a mount point: two that begin together would take each other's
 * files for leftovers. Held until the proxy ends; the kernel lets go of it when the process is killed. */
async function lockFor(what: string): Promise<() => void> {
  const folder = path.join(runtimeRoot(), 'locks');
  await mkdir(folder, { recursive: true, mode: 0o700 });
  const fd = openSync(path.join(folder, sha256(Buffer.from(what)).slice(0, 16)), 'w', 0o600);
  if (tryLock(fd)) return () => closeSync(fd);
  closeSync(fd);
  throw new GridError(
    'in-use',
    `another proxy holds ${what}, or is just starting there; \`gridvfs proxy status\` shows it`,
  );
}

async function writeRecord(record: ProxyRecord): Promise<void> {
  const file = path.join(record.runtime, 'proxy.json');
  await writeFile(`${file}.new`, JSON.stringify(record, null, 2) + '\n');
  await rename(`${file}.new`, file);
}
