/**
 * `gridvfs bench instantiate` and `gridvfs demo`: the field's founding table on this host. How long from asking
 * for a VM until its guest answers: from local disk, over a LAN link and over a WAN link, each cold and then warm.
 *
 * The chain is the real one: FUSE mount, disk cache, proxy, ssh tunnel, (link), ssh endpoint, store; every VM is a
 * non-persistent clone. `local` has no part of gridvfs: a qcow2 overlay on the raw file, same QEMU, same cache mode.
 * Cold: the host's cache folder is empty. Warm: it holds what earlier boots fetched. The page cache is dropped
 * before every run. Local and warm runs are interleaved, so that a drift of the machine's speed meets all alike, and
 * the first of each is a warm-up that does not count: a warm guest is quicker than a cold one, so read-ahead reaches
 * a chunk or two further.
 * Each run has a proxy of its own, mounted before and unmounted after it; the clock starts at the request for the
 * VM (so it includes making the clone or the overlay) and stops when the guest has said that it is ready.
 *
 * Everything started is stopped at the end, on failure and on Ctrl-C: VMs, proxies, mounts, server, links, files.
 */
import { statSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { execFile } from 'node:child_process';
import { promisify, parseArgs } from 'node:util';
import { makeSshKey } from '../proxy/ssh-key.ts';
import { ControlClient } from '../src/agent/client.ts';
import type { VmStatus } from '../src/agent/machines.ts';
import { bytesText, table } from '../src/cli/kit.ts';
import { MIB } from '../src/core/limits.ts';
import { createQemu } from '../src/vmm/index.ts';
import { buildGuest, guestCacheFolder } from './guest/build.ts';
import type { BuiltGuest } from './guest/build.ts';
import { gridvfs, startService } from './lib/child.ts';
import { cpuSecondsOf, dropPageCache, hostFacts, median } from './lib/facts.ts';
import type { PageCacheState } from './lib/facts.ts';

const READY_TIMEOUT_MS = 600_000;
const IMAGE = 'guest:1';

/** One start of a VM. */
interface Run {
  readonly seconds: number;
  readonly pageCache: PageCacheState;
  /** Of the proxy's own start: mount asked for until it is there. Not in `seconds`. */
  readonly mountSeconds?: number;
  readonly fetchedChunks?: number;
  readonly fetchedPlainBytes?: number;
  readonly fetchedStoredBytes?: number;
  readonly missedChunks?: number;
  readonly touchedChunks?: number;
  readonly proxyCpuSeconds?: number;
}

/** The rows, in the table's order. `…-profile`: cold, but the origin has the profile of another boot. */
const SUBJECTS = [
  ...(['local', 'lan-cold', 'lan-warm', 'wan-cold', 'wan-warm'] as const),
  ...(['lan-cold-profile', 'wan-cold-profile'] as const),
] as const;
type Subject = (typeof SUBJECTS)[number];
/** A start that is in no row: it records the profile that the last two replay. */
const RECORDING = 'lan-warm-recording';

const say = (text: string) => process.stderr.write(`${text}\n`);

function options() {
  const { values } = parseArgs({
    options: {
      guest: { type: 'string', default: 'small' },
      runs: { type: 'string', default: '5' },
      lan: { type: 'string', default: '0.2ms,1gbit' },
      wan: { type: 'string', default: '30ms,100mbit' },
      json: { type: 'string' },
    },
  });
  const runs = Number(values.runs);
  if (!Number.isSafeInteger(runs) || runs < 1)
    throw new RangeError(`--runs ${values.runs}: write a whole number of at least 1`);
  const guest = (['small', 'debian'] as const).find((name) => name === values.guest);
  if (guest === undefined) throw new RangeError(`--guest ${values.guest}: write small or debian`);
  const link = (name: 'lan' | 'wan') => {
    const [rtt, rate, ...rest] = values[name].split(',');
    if (!rtt || !rate || rest.length > 0)
      throw new RangeError(`--${name} ${values[name]}: write RTT,RATE such as 30ms,100mbit`);
    return { rtt, rate };
  };
  return {
    guest,
    runs,
    lan: link('lan'),
    wan: link('wan'),
    json: values.json,
  };
}

/** All that the runs share; made once, undone by the stack. */
interface Scene {
  readonly folder: string;
  readonly guest: BuiltGuest;
  /** Of the disk, the kernel and the initial RAM disk together: a cold start fetches from all three. */
  readonly nonzeroBytes: number;
  readonly identity: string;
  readonly fingerprint: string;
  readonly sourceOf: { readonly lan: string; readonly wan: string };
  readonly signal: AbortSignal;
}

async function prepare(
  stack: AsyncDisposableStack,
  settings: ReturnType<typeof options>,
  signal: AbortSignal,
): Promise<Scene> {
  const guest = await buildGuest({
    guest: settings.guest,
    folder: path.join(guestCacheFolder(), settings.guest),
    signal,
    progress: say,
  });
  const nonzeroBytes = guest.nonzeroBytes + statSync(guest.kernel).size + statSync(guest.initrd).size;
  say(
    `guest ${guest.name}: ${bytesText(guest.sizeBytes)} disk, ${bytesText(nonzeroBytes)} of data with its kernel, sha256 ${guest.sha256.disk.slice(0, 12)}`,
  );

  const folder = await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'gridvfs-demo-'));
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  process.env['GRIDVFS_RUNTIME_DIR'] = path.join(folder, 'run');

  const store = path.join(folder, 'store');
  await gridvfsText(['store', 'init', store]);
  const startedMs = performance.now();
  const imported = await gridvfs<{ chunks: number; newStoredBytes: number }>(
    [
      ...[
        'store',
        'import',
        store,
        guest.disk,
        IMAGE,
        '--kernel',
        guest.kernel,
        '--initrd',
        guest.initrd,
        '--json',
      ],
      ...['--label', `boot.cmdline=${guest.commandLine}`, '--label', `boot.ready=${guest.readyText}`],
      ...['--label', `machine.memory-mib=${Math.ceil(guest.memoryBytes / MIB)}`],
    ],
    signal,
  );
  say(
    `import: ${imported.chunks} chunks, ${bytesText(imported.newStoredBytes)} compressed, in ${((performance.now() - startedMs) / 1000).toFixed(1)} s`,
  );

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
  const port = new URL(String(server.ready['ssh'])).port;

  const sourceOf = { lan: '', wan: '' };
  for (const name of ['lan', 'wan'] as const) {
    const { rtt, rate } = settings[name];
    const relay = await startService('bench/link/main.ts', [
      ...['--listen', '127.0.0.1:0', '--to', `127.0.0.1:${port}`, '--rtt', rtt, '--rate', rate],
    ]);
    stack.defer(() => relay.stop());
    sourceOf[name] = `ssh://grid@${String(relay.ready['listening'])}${store}`;
  }
  return {
    folder,
    guest,
    nonzeroBytes,
    identity,
    fingerprint: String(server.ready['fingerprint']),
    sourceOf,
    signal,
  };
}

async function gridvfsText(args: readonly string[]): Promise<void> {
  await promisify(execFile)(process.execPath, [path.resolve(import.meta.dirname, '../src/main.ts'), ...args]);
}

/** What comes first: the result, or Ctrl-C; what was begun is then ended by the stack that holds it. */
async function orInterrupted<T>(signal: AbortSignal, work: Promise<T>): Promise<T> {
  const { promise, reject } = Promise.withResolvers<never>();
  const stop = () => reject(signal.reason as Error);
  signal.addEventListener('abort', stop, { once: true });
  try {
    return await Promise.race([work, promise]);
  } finally {
    signal.removeEventListener('abort', stop);
  }
}

/** A start without any part of gridvfs. */
async function runLocal(scene: Scene, number: number): Promise<Run> {
  const { guest } = scene;
  await using stack = new AsyncDisposableStack();
  const folder = path.join(scene.folder, `local-${number}`);
  await mkdir(folder);
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const pageCache = dropPageCache(scene.folder);
  const startedMs = performance.now();
  const overlay = path.join(folder, 'overlay.qcow2');
  await promisify(execFile)('qemu-img', [
    'create',
    '-q',
    '-f',
    'qcow2',
    '-b',
    guest.disk,
    '-F',
    'raw',
    overlay,
  ]);
  const machine = await createQemu({ accelerator: 'auto' }).start(
    {
      name: `local-${number}`,
      vcpus: 1,
      memoryBytes: guest.memoryBytes,
      disks: [{ path: overlay, format: 'qcow2', readOnly: false }],
      boot: { kernel: guest.kernel, initrd: guest.initrd, commandLine: guest.commandLine },
      macAddress: '52:54:00:00:00:01',
      network: 'user',
      readyText: guest.readyText,
    },
    folder,
  );
  stack.defer(() => machine.stop(0));
  await orInterrupted(scene.signal, machine.ready(READY_TIMEOUT_MS));
  return { seconds: (performance.now() - startedMs) / 1000, pageCache };
}

interface ProxyStatus {
  readonly cache: {
    readonly fetchedChunks: number;
    readonly fetchedPlainBytes: number;
    readonly fetchedStoredBytes: number;
    readonly missedChunks: number;
    readonly images: readonly { readonly touchedChunks: number }[];
  };
}

/** A start through the whole chain; the cache folder decides whether it is cold or warm. */
async function runGrid(scene: Scene, subject: Subject | typeof RECORDING): Promise<Run> {
  const link = subject.startsWith('lan') ? 'lan' : 'wan';
  const withProfile = subject.endsWith('-profile') || subject === RECORDING;
  const cacheName = subject.endsWith('-profile') ? `cache-${link}-profile` : `cache-${link}`;
  await using stack = new AsyncDisposableStack();
  const mountpoint = path.join(scene.folder, 'mnt', link);
  await mkdir(mountpoint, { recursive: true });
  // Before the mount: an interrupted one may be there all the same, or not.
  stack.defer(async () => {
    await gridvfs(['umount', mountpoint, '--force', '--json']).catch((error: unknown) => {
      if (!String(error).includes('[not-found]')) throw error;
    });
  });
  const beforeMount = performance.now();
  const proxy = await gridvfs<{ pid: number; runtime: string }>(
    [
      ...['mount', scene.sourceOf[link], mountpoint, '--name', `demo-${link}`, '--json'],
      ...['--identity', scene.identity, '--host-key', scene.fingerprint],
      ...['--cache-dir', path.join(scene.folder, cacheName)],
      ...['--state-dir', path.join(scene.folder, `state-${link}`)],
      ...(withProfile ? [] : ['--no-profile']),
    ],
    scene.signal,
  );
  const mountSeconds = (performance.now() - beforeMount) / 1000;
  const client = new ControlClient(path.join(proxy.runtime, 'control.sock'));
  const pageCache = dropPageCache(scene.folder);
  const cpuBefore = cpuSecondsOf(proxy.pid);
  const startedMs = performance.now();
  const vm = await client.call<VmStatus>('POST', '/v1/vms', { image: IMAGE });
  await orInterrupted(
    scene.signal,
    client.call('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${READY_TIMEOUT_MS}`),
  );
  const seconds = (performance.now() - startedMs) / 1000;
  const { cache } = await client.call<ProxyStatus>('GET', '/v1/status');
  const proxyCpuSeconds = cpuSecondsOf(proxy.pid) - cpuBefore;
  await client.call('POST', `/v1/vms/${vm.id}/stop`, { graceMs: 0 });
  return {
    seconds,
    pageCache,
    mountSeconds,
    fetchedChunks: cache.fetchedChunks,
    fetchedPlainBytes: cache.fetchedPlainBytes,
    fetchedStoredBytes: cache.fetchedStoredBytes,
    missedChunks: cache.missedChunks,
    touchedChunks: cache.images.reduce((sum, image) => sum + image.touchedChunks, 0),
    proxyCpuSeconds,
  };
}

/** Once in the table's order, of which only the cold ones count; then `rounds` of the others, interleaved. */
async function measure(scene: Scene, rounds: number): Promise<Map<Subject, Run[]>> {
  const runs = new Map<Subject, Run[]>(SUBJECTS.map((subject) => [subject, []]));
  const repeated: Subject[] = ['local', 'lan-warm', 'wan-warm'];
  const plan: { subject: Subject | typeof RECORDING; counted: boolean }[] = [
    ...SUBJECTS.slice(0, 5).map((subject) => ({ subject, counted: subject.endsWith('cold') })),
    ...Array.from({ length: rounds }, () => repeated.map((subject) => ({ subject, counted: true }))).flat(),
    { subject: RECORDING, counted: false },
    ...(['lan-cold-profile', 'wan-cold-profile'] as const).map((subject) => ({ subject, counted: true })),
  ];
  for (const [index, { subject, counted }] of plan.entries()) {
    scene.signal.throwIfAborted();
    const run = subject === 'local' ? await runLocal(scene, index) : await runGrid(scene, subject);
    if (counted && subject !== RECORDING) runs.get(subject)!.push(run);
    const fetched = run.fetchedChunks === undefined ? '' : `, ${run.fetchedChunks} chunks fetched`;
    say(
      `[${index + 1}/${plan.length}] ${subject.padEnd(18)} ${run.seconds.toFixed(2)} s${fetched}${counted ? '' : ' (not counted)'}`,
    );
  }
  return runs;
}

interface Row {
  readonly case: 'reboot';
  readonly subject: Subject;
  /** Median. */
  readonly seconds: number;
  readonly value: number;
  readonly unit: 's';
  readonly ratio: number;
  readonly runs: readonly number[];
  readonly spread: { readonly minimum: number; readonly maximum: number };
  readonly pageCache: PageCacheState;
  readonly plainBytesFetched: number;
  readonly storedBytesFetched: number;
  readonly chunksFetched: number;
  /** Of the chunks that the run touched, the share that was here already. Absent for local. */
  readonly hitRate?: number;
  readonly mountSeconds?: number;
  readonly proxyCpuSeconds?: number;
  readonly guest: { readonly name: string; readonly sha256: string; readonly nonzeroBytes: number };
}

function rowsOf(scene: Scene, runs: ReadonlyMap<Subject, readonly Run[]>): Row[] {
  const localSeconds = median(runs.get('local')!.map((run) => run.seconds));
  return SUBJECTS.map((subject) => {
    const all = runs.get(subject)!;
    const seconds = all.map((run) => run.seconds);
    const worst = (of: (run: Run) => number | undefined) => Math.max(...all.map((run) => of(run) ?? 0));
    const touched = worst((run) => run.touchedChunks);
    const last = all.at(-1)!;
    return {
      case: 'reboot',
      subject,
      seconds: median(seconds),
      value: median(seconds),
      unit: 's',
      ratio: median(seconds) / localSeconds,
      runs: seconds,
      spread: { minimum: Math.min(...seconds), maximum: Math.max(...seconds) },
      pageCache: all.every((run) => run.pageCache === 'dropped') ? 'dropped' : 'kept',
      plainBytesFetched: worst((run) => run.fetchedPlainBytes),
      storedBytesFetched: worst((run) => run.fetchedStoredBytes),
      chunksFetched: worst((run) => run.fetchedChunks),
      ...(subject === 'local' || touched === 0
        ? {}
        : { hitRate: 1 - worst((run) => run.missedChunks) / touched }),
      ...(last.mountSeconds === undefined
        ? {}
        : { mountSeconds: median(all.map((run) => run.mountSeconds!)) }),
      ...(last.proxyCpuSeconds === undefined
        ? {}
        : { proxyCpuSeconds: median(all.map((run) => run.proxyCpuSeconds!)) }),
      guest: {
        name: scene.guest.name,
        sha256: scene.guest.sha256.disk,
        nonzeroBytes: scene.nonzeroBytes,
      },
    };
  });
}

function print(rows: readonly Row[], settings: ReturnType<typeof options>): void {
  const text = table(
    [
      'REBOOT FROM',
      'SECONDS',
      'MIN',
      'MAX',
      'RUNS',
      'RATIO',
      'FETCHED',
      'ON THE WIRE',
      'CHUNKS',
      'HIT RATE',
      'PAGE CACHE',
    ],
    rows.map((row) => [
      row.subject,
      row.seconds.toFixed(2),
      row.spread.minimum.toFixed(2),
      row.spread.maximum.toFixed(2),
      row.runs.length,
      row.ratio.toFixed(3),
      row.subject === 'local' ? '-' : bytesText(row.plainBytesFetched),
      row.subject === 'local' ? '-' : bytesText(row.storedBytesFetched),
      row.subject === 'local' ? '-' : row.chunksFetched,
      row.hitRate === undefined ? '-' : `${(100 * row.hitRate).toFixed(1)} %`,
      row.pageCache,
    ]),
  );
  const { guest } = rows[0]!;
  const link = (name: 'lan' | 'wan') =>
    `${name.toUpperCase()} ${settings[name].rtt} round trip, ${settings[name].rate}`;
  process.stdout.write(
    `\n${text}\n\nguest ${guest.name}, sha256 ${guest.sha256.slice(0, 12)}, ${bytesText(guest.nonzeroBytes)} of data; ${link('lan')}; ${link('wan')} (byte relay)\n` +
      'seconds: median from the request for the VM until its guest answered; ratio: to local\n',
  );
}

async function main(): Promise<void> {
  const settings = options();
  const interrupted = new AbortController();
  const stop = (signal: string) => {
    if (!interrupted.signal.aborted) say(`${signal}: stopping what runs and cleaning up`);
    interrupted.abort(new Error(`interrupted by ${signal}`));
  };
  process.on('SIGINT', stop);
  process.on('SIGTERM', stop);
  process.on('SIGHUP', stop);
  const { accelerator, usable, reason } = await createQemu({ accelerator: 'auto' }).probe();
  if (!usable) throw new Error(`no VM can run here: ${reason ?? 'no reason given'}`);

  await using stack = new AsyncDisposableStack();
  const scene = await prepare(stack, settings, interrupted.signal);
  const runs = await measure(scene, settings.runs);
  const rows = rowsOf(scene, runs);
  print(rows, settings);
  if (settings.json !== undefined) {
    const record = {
      schema: 1,
      host: hostFacts(accelerator ?? 'tcg'),
      made: new Date().toISOString(),
      guest: {
        name: scene.guest.name,
        sha256: scene.guest.sha256,
        sizeBytes: scene.guest.sizeBytes,
        nonzeroBytes: scene.nonzeroBytes,
        packages: scene.guest.packages,
      },
      links: { emulator: 'byte relay', lan: settings.lan, wan: settings.wan },
      rows,
    };
    await writeFile(settings.json, JSON.stringify(record, null, 2) + os.EOL);
    say(`rows written to ${settings.json}`);
  }
}

try {
  await main();
} catch (error) {
  say(`gridvfs demo: ${error instanceof Error ? error.message : String(error)}`);
  if (process.env['GRIDVFS_DEBUG']) console.error(error);
  process.exitCode =
    error instanceof RangeError || (error as { code?: string }).code === 'ERR_PARSE_ARGS_UNKNOWN_OPTION'
      ? 2
      : 1;
}
