/**
 * What all runs of `gridvfs bench io` share: the guest's disk in a store behind gridvfs's own ssh endpoint, the same
 * disk as a file behind a stock sshd, a link in front of each, the trace, and what its reads must give.
 * The links run in this process, which does nothing else while a run is on the clock.
 */
import { spawn } from 'node:child_process';
import { closeSync, openSync, readSync, statSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { makeSshKey } from '../proxy/ssh-key.ts';
import { ControlClient } from '../src/agent/client.ts';
import { bytesText } from '../src/cli/kit.ts';
import { sha256 } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import { ChunkTable } from '../src/core/chunk-table.ts';
import { GridError } from '../src/core/errors.ts';
import { MIB } from '../src/core/limits.ts';
import { parseManifest } from '../src/core/manifest.ts';
import { encodeProfile, parseProfile } from '../src/core/profile.ts';
import { openStore } from '../src/store/index.ts';
import type { Store } from '../src/store/index.ts';
import { buildGuest, guestCacheFolder } from './guest/build.ts';
import type { BuiltGuest, GuestName } from './guest/build.ts';
import { gridvfs, startService } from './lib/child.ts';
import { dropPageCache } from './lib/facts.ts';
import type { PageCacheState } from './lib/facts.ts';
import { LinkRelay } from './link/relay.ts';
import { knownHostsLine } from './peers/peers.ts';
import type { Ground } from './peers/peers.ts';
import { runProgram } from './peers/program.ts';
import { startSshd } from './peers/sshd.ts';
import type { Sshd } from './peers/sshd.ts';
import { chunksTouched, summaryOf } from './traces/format.ts';
import type { Trace } from './traces/format.ts';
import { TAIL_MS, traceOf } from './traces/record.ts';
import { piecesOf } from './traces/replay.ts';

/** The disk alone, which all replays read. */
export const IMAGE = 'guest:1';
export const PURPOSE = 'boot';
/** Of the trace's boots, the one that is replayed. */
export const JUDGED_BOOT = 1;
/** The same disk with its kernel, for the one VM whose boot the profile is of. */
const BOOTED_IMAGE = 'booted:1';
const READY_TIMEOUT_MS = 600_000;
/** How long a recording takes to reach the origin after its VM was stopped. */
const PROFILE_TIMEOUT_MS = 20_000;

export interface LinkSetting {
  /** As it was given: `30ms,100mbit`. */
  readonly name: string;
  readonly rttMs: number;
  readonly bitsPerSecond: number;
}

export interface Scene {
  readonly folder: string;
  readonly guest: BuiltGuest;
  readonly trace: Trace;
  readonly traceFile: string;
  /** SHA-256 of what the judged boot reads, piece after piece. */
  readonly expected: Digest;
  readonly store: string;
  /** Of the chunks that the judged boot touches. */
  readonly touched: { readonly chunks: number; readonly plainBytes: number; readonly storedBytes: number };
  /** Chunks in the profile, and those of them that the judged boot touches. */
  readonly profileChunks?: number;
  readonly profiledChunks?: number;
  readonly compressedDisk: string;
  readonly compressedBytes: number;
  readonly identity: string;
  readonly endpointPort: number;
  readonly fingerprint: string;
  readonly sshd: Sshd;
  readonly signal: AbortSignal;
}

const MAIN = path.resolve(import.meta.dirname, '../src/main.ts');
const say = (text: string) => process.stderr.write(`${text}\n`);

export async function prepareScene(
  stack: AsyncDisposableStack,
  guestName: GuestName,
  withProfile: boolean,
  signal: AbortSignal,
): Promise<Scene> {
  const guest = await buildGuest({
    guest: guestName,
    folder: path.join(guestCacheFolder(), guestName),
    signal,
    progress: say,
  });
  const { trace, file: traceFile, origin } = await traceOf(guest, { progress: say, signal });
  const judged = trace.boots[JUDGED_BOOT];
  if (!judged) throw new GridError('bad-format', `${traceFile} has no boot ${JUDGED_BOOT}`);
  const { reads, bytes, depthMax } = summaryOf(judged);
  say(
    `trace ${path.basename(traceFile)} (${origin}): ${reads} reads, ${bytesText(bytes)}, up to ${depthMax} at once`,
  );

  const folder = await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'gridvfs-io-'));
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  process.env['GRIDVFS_RUNTIME_DIR'] = path.join(folder, 'run');
  const store = path.join(folder, 'store');
  await runProgram([process.execPath, MAIN, 'store', 'init', store]);
  await gridvfs(['store', 'import', store, guest.disk, IMAGE, '--json'], signal);
  const opened = await openStore(store);
  stack.defer(() => opened.close());
  const digest = (await opened.listTags())[0]!.manifest;
  const manifest = parseManifest(await opened.readManifest(digest), digest);
  const table = ChunkTable.parse(await opened.readTable(manifest.table), manifest.table);
  const touched = chunksTouched(judged, table.chunkBytes).filter((index) => table.entryOf(index) >= 0);
  const storedBytes = touched.reduce((sum, index) => sum + table.storedBytesOfEntry(table.entryOf(index)), 0);

  const compressedDisk = path.join(folder, 'disk.raw.zst');
  await runProgram(['zstd', '-q', '-3', '-T0', guest.disk, '-o', compressedDisk], signal);

  const keys = makeSshKey();
  const identity = path.join(folder, 'id_ed25519');
  await writeFile(identity, keys.private, { mode: 0o600 });
  const authorizedKeys = path.join(folder, 'authorized_keys');
  await writeFile(authorizedKeys, keys.public + '\n');
  const server = await startService('src/main.ts', [
    ...['server', store, '--ssh', '127.0.0.1:0', '--authorized-keys', authorizedKeys],
    ...['--host-key', path.join(folder, 'host_key'), '--json'],
  ]);
  stack.defer(() => server.stop());
  const sshd = await startSshd(path.join(folder, 'sshd'));
  stack.defer(() => sshd.stop());
  const endpoint = {
    store,
    identity,
    endpointPort: Number(new URL(String(server.ready['ssh'])).port),
    fingerprint: String(server.ready['fingerprint']),
  };
  const profiled = withProfile
    ? await recordProfile({ folder, guest, signal, ...endpoint }, opened, digest, table.count)
    : undefined;
  return {
    folder,
    guest,
    trace,
    traceFile,
    expected: expectedOf(guest.disk, trace),
    touched: { chunks: touched.length, plainBytes: touched.length * table.chunkBytes, storedBytes },
    ...(profiled === undefined
      ? {}
      : {
          profiledChunks: touched.filter((index) => profiled.has(index)).length,
          profileChunks: profiled.size,
        }),
    compressedDisk,
    compressedBytes: statSync(compressedDisk).size,
    ...endpoint,
    sshd,
    signal,
  };
}

/** A proxy in front of the scene's store, reached at `address`, mounted while `body` runs. */
export async function withProxy<T>(
  scene: Pick<Scene, 'folder' | 'store' | 'identity' | 'fingerprint' | 'signal'>,
  address: { readonly host: string; readonly port: number },
  cacheFolder: string,
  body: (proxy: { readonly mountpoint: string; readonly client: ControlClient }) => Promise<T>,
): Promise<T> {
  await using stack = new AsyncDisposableStack();
  const mountpoint = path.join(scene.folder, 'mnt');
  await mkdir(mountpoint, { recursive: true });
  const record = await gridvfs<{ runtime: string }>(
    [
      ...['mount', `ssh://grid@${address.host}:${address.port}${scene.store}`, mountpoint, '--name', 'io'],
      ...['--identity', scene.identity, '--host-key', scene.fingerprint, '--json'],
      ...['--cache-dir', cacheFolder, '--state-dir', path.join(scene.folder, 'state')],
    ],
    scene.signal,
  );
  stack.defer(async () => void (await gridvfs(['umount', mountpoint, '--force', '--json'])));
  // Awaited here: otherwise the stack would unmount under it.
  return await body({ mountpoint, client: new ControlClient(path.join(record.runtime, 'control.sock')) });
}

/**
 * Boots a VM through gridvfs without a link, which records its profile at the origin, and keeps that for the disk
 * that is replayed too (they have one chunk table; another manifest only because of the kernel beside it). Resolves
 * with its chunks. The VM has a MAC, ids and a seed of its own: it is not the machine of the trace.
 */
async function recordProfile(
  scene: Pick<Scene, 'folder' | 'guest' | 'store' | 'identity' | 'fingerprint' | 'endpointPort' | 'signal'>,
  store: Store,
  target: Digest,
  chunkCount: number,
): Promise<Set<number>> {
  const { guest, signal } = scene;
  await gridvfs(
    [
      ...['store', 'import', scene.store, guest.disk, BOOTED_IMAGE, '--json'],
      ...['--kernel', guest.kernel, '--initrd', guest.initrd],
      ...['--label', `boot.cmdline=${guest.commandLine}`, '--label', `boot.ready=${guest.readyText}`],
      ...['--label', `machine.memory-mib=${Math.ceil(guest.memoryBytes / MIB)}`],
    ],
    signal,
  );
  const booted = (await store.listTags()).find(
    (tag) => `${tag.name}:${tag.version}` === BOOTED_IMAGE,
  )!.manifest;
  const cache = path.join(scene.folder, 'cache');
  say(`profile: booting ${guest.name} through gridvfs`);
  const bytes = await withProxy(
    scene,
    { host: '127.0.0.1', port: scene.endpointPort },
    cache,
    async ({ client }) => {
      const vm = await client.call<{ id: string }>('POST', '/v1/vms', { image: BOOTED_IMAGE });
      await client.call('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${READY_TIMEOUT_MS}`);
      await sleep(TAIL_MS, undefined, { signal });
      await client.call('POST', `/v1/vms/${vm.id}/stop`, { graceMs: 0 });
      for (const deadlineMs = performance.now() + PROFILE_TIMEOUT_MS; performance.now() < deadlineMs;) {
        const profile = await store.readProfile(booted, PURPOSE);
        if (profile) return profile;
        await sleep(100, undefined, { signal });
      }
      throw new GridError('timeout', `no profile of ${BOOTED_IMAGE} reached the store`);
    },
  );
  await rm(cache, { recursive: true, force: true });
  const profile = parseProfile(bytes, { manifest: booted, purpose: PURPOSE, chunkCount });
  await store.recordProfile(target, PURPOSE, encodeProfile({ ...profile, manifest: target }));
  return new Set([...profile.early, ...profile.late]);
}

/** What the judged boot's reads must give, straight from the disk. */
function expectedOf(disk: string, trace: Trace): Digest {
  const boot = trace.boots[JUDGED_BOOT]!;
  const memory = Buffer.alloc(summaryOf(boot).bytes);
  const fd = openSync(disk, 'r');
  try {
    for (const [index, piece] of piecesOf(boot, memory).entries())
      readSync(fd, piece, 0, piece.length, boot.reads[index]!.offsetBytes);
  } finally {
    closeSync(fd);
  }
  return sha256(memory);
}

/** One link, twice: in front of gridvfs's endpoint and of the stock sshd. Only one is used at a time. */
export interface Link extends LinkSetting {
  readonly grid: LinkRelay;
  readonly stock: LinkRelay;
}

export async function startLink(
  stack: AsyncDisposableStack,
  scene: Scene,
  setting: LinkSetting,
): Promise<Link> {
  const start = async (port: number) => {
    const { rttMs, bitsPerSecond } = setting;
    const relay = await LinkRelay.start({
      listen: { host: '127.0.0.1', port: 0 },
      to: { host: '127.0.0.1', port },
      rttMs,
      bitsPerSecond,
    });
    stack.defer(() => relay.close());
    return relay;
  };
  return { ...setting, grid: await start(scene.endpointPort), stock: await start(scene.sshd.port) };
}

let grounds = 0;

/** An empty folder and the way to the origin, for one start of a peer; removed with the stack. */
export async function groundFor(stack: AsyncDisposableStack, scene: Scene, link: Link): Promise<Ground> {
  const folder = path.join(scene.folder, `peer-${++grounds}`);
  await mkdir(folder);
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const { address } = link.stock;
  const knownHosts = path.join(folder, 'known_hosts');
  await writeFile(knownHosts, knownHostsLine(address, scene.sshd.hostKey));
  const { identity, user } = scene.sshd;
  const { compressedDisk, signal } = scene;
  return { folder, address, user, identity, knownHosts, disk: scene.guest.disk, compressedDisk, signal };
}

export interface Replayed {
  /** On the clock: what had to be fetched first, and the replay. */
  readonly seconds: number;
  readonly fetchSeconds: number;
  readonly pageCache: PageCacheState;
}

/**
 * One replay of the judged boot, page cache dropped before. `fetch` runs on the clock before it, `beside` is begun
 * with it. Throws when it fails and when one byte of what was read is wrong.
 */
export async function replayOnce(
  scene: Scene,
  target: { readonly file: string } | { readonly nbd: string },
  extra: { readonly fetch?: () => Promise<void>; readonly beside?: () => Promise<unknown> } = {},
): Promise<Replayed> {
  scene.signal.throwIfAborted();
  const child = spawn(
    process.execPath,
    [
      ...[path.resolve(import.meta.dirname, 'traces/replay.ts'), '--trace', scene.traceFile],
      ...['--boot', String(JUDGED_BOOT)],
      ...('file' in target ? ['--file', target.file] : ['--nbd', target.nbd]),
    ],
    {
      stdio: ['pipe', 'pipe', 'pipe'],
      detached: true,
      // A thread for each read under way.
      env: { ...process.env, UV_THREADPOOL_SIZE: '64' },
    },
  );
  let words = '';
  child.stderr.on('data', (part: Buffer) => (words = (words + part.toString('utf8')).slice(-2000)));
  const stop = () => void child.kill('SIGKILL');
  scene.signal.addEventListener('abort', stop, { once: true });
  const ended = new Promise<void>((resolve) => child.once('close', () => resolve()));
  try {
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const next = async (): Promise<Record<string, unknown>> => {
      const { value, done } = await lines.next();
      if (!done) return JSON.parse(value) as Record<string, unknown>;
      scene.signal.throwIfAborted();
      throw new GridError('local-io', words.trim().split('\n').at(-1) || 'the replay ended early');
    };
    await next();
    const pageCache = dropPageCache(scene.folder);
    const startedMs = performance.now();
    await extra.fetch?.();
    const fetchSeconds = extra.fetch ? (performance.now() - startedMs) / 1000 : 0;
    let failure: unknown;
    const beside = extra.beside?.().catch((error: unknown) => (failure = error));
    child.stdin.write('go\n');
    const { seconds } = await next();
    const { sha256: got } = await next();
    if (got !== scene.expected) throw new GridError('corrupt', `${JSON.stringify(target)} gave wrong bytes`);
    await beside;
    if (failure !== undefined) throw failure;
    return { seconds: fetchSeconds + Number(seconds), fetchSeconds, pageCache };
  } finally {
    scene.signal.removeEventListener('abort', stop);
    child.kill('SIGKILL');
    await ended;
  }
}
