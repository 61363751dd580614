/**
 * `gridvfs bench io`: a guest's boot as its disk sees it, without the guest. A recorded trace (bench/traces) is
 * replayed as fast as each subject answers, over the same emulated link, in one run, and every byte is checked.
 *
 *   grid-cold      empty cache, no profile          grid-warm      the same proxy again, page cache dropped
 *   grid-profile   empty cache, profile replayed    grid-restart   the next proxy over that cache
 *   local          the file itself                  limit          compressed bytes of touched chunks ÷ bandwidth
 *   sshfs rclone nbdkit scp zstd|ssh                               + two round trips (computed)
 *
 * Everybody is up (mounted, connected) before the clock; it runs from the open to the last byte, and for the two
 * copies from the start of the copy. The profile is the one that gridvfs recorded at the origin while it booted a VM
 * for this bench; the trace is of another boot, with other host name, MAC, machine id and seed. Subjects are interleaved; medians are shown.
 * Peers are the Debian packages, tuned as bench/peers/peers.ts says; one that is missing fails the bench.
 * Everything started is stopped at the end, on failure and on Ctrl-C.
 */
import { spawn } from 'node:child_process';
import { rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { bytesText, table } from '../src/cli/kit.ts';
import { GridError } from '../src/core/errors.ts';
import {
  IMAGE,
  JUDGED_BOOT,
  PURPOSE,
  groundFor,
  prepareScene,
  replayOnce,
  startLink,
  withProxy,
} from './io-scene.ts';
import type { Link, LinkSetting, Replayed, Scene } from './io-scene.ts';
import { hostFacts, median } from './lib/facts.ts';
import { headOf } from './lib/record.ts';
import { parseDuration, parseRate } from './link/units.ts';
import { installPackages, missingPackages, PEERS, versionOf } from './peers/peers.ts';
import type { Peer } from './peers/peers.ts';
import { summaryOf } from './traces/format.ts';

const LINKS = ['30ms,100mbit', '150ms,50mbit'];
const say = (text: string) => process.stderr.write(`${text}\n`);

interface Settings {
  readonly guest: 'small' | 'debian';
  readonly links: readonly LinkSetting[];
  readonly runs: number;
  readonly peerRuns: number;
  readonly peers: readonly Peer[];
  readonly profile: boolean;
  readonly install: boolean;
  readonly json: string | undefined;
}

function parseLink(name: string): LinkSetting {
  const [rtt, rate, ...rest] = name.split(',');
  if (!rtt || !rate || rest.length > 0)
    throw new RangeError(`--link ${name}: write RTT,RATE such as 30ms,100mbit`);
  return { name, rttMs: parseDuration(rtt), bitsPerSecond: parseRate(rate) };
}

function options(): Settings | 'fuse' {
  const { values } = parseArgs({
    options: {
      case: { type: 'string', default: 'boot' },
      guest: { type: 'string', default: 'debian' },
      link: { type: 'string', multiple: true, default: LINKS },
      runs: { type: 'string', default: '3' },
      'peer-runs': { type: 'string', default: '1' },
      peers: { type: 'string', default: 'all' },
      'no-profile': { type: 'boolean', default: false },
      install: { type: 'boolean', default: false },
      json: { type: 'string' },
    },
    strict: !process.argv.includes('fuse'),
  });
  if (values.case === 'fuse') return 'fuse';
  if (values.case !== 'boot') throw new RangeError(`--case ${String(values.case)}: write boot or fuse`);
  const count = (name: 'runs' | 'peer-runs') => {
    const value = Number(values[name]);
    if (!Number.isSafeInteger(value) || value < 1)
      throw new RangeError(`--${name} ${String(values[name])}: write a whole number of at least 1`);
    return value;
  };
  const guest = (['small', 'debian'] as const).find((name) => name === values.guest);
  if (guest === undefined) throw new RangeError(`--guest ${String(values.guest)}: write small or debian`);
  const names = String(values.peers);
  const wanted = names === 'none' ? [] : names.split(',');
  for (const name of wanted) {
    if (name !== 'all' && !PEERS.some((peer) => peer.name === name))
      throw new RangeError(
        `--peers ${name}: there are all, none, ${PEERS.map((peer) => peer.name).join(', ')}`,
      );
  }
  return {
    guest,
    links: (values.link as string[]).map(parseLink),
    runs: count('runs'),
    peerRuns: count('peer-runs'),
    peers: PEERS.filter((peer) => wanted.includes('all') || wanted.includes(peer.name)),
    profile: values['no-profile'] !== true,
    install: values.install === true,
    json: values.json as string | undefined,
  };
}

/** One replay and what crossed the link for it. */
interface Run extends Replayed {
  readonly linkBytes?: number;
  readonly fetchedChunks?: number;
}

/** Runs by subject, for one link. */
type Runs = Map<string, Run[]>;

function keep(runs: Runs, link: Link, subject: string, run: Run): void {
  const all = runs.get(subject) ?? [];
  runs.set(subject, [...all, run]);
  const wire = run.linkBytes === undefined ? '' : `, ${bytesText(run.linkBytes)} over the link`;
  say(`${link.name}  ${subject.padEnd(12)} ${run.seconds.toFixed(3)} s${wire}`);
}

interface ProxyStatus {
  readonly cache: { readonly fetchedChunks: number };
}

const diskBelow = (mountpoint: string) => path.join(mountpoint, 'images', ...IMAGE.split(':'), 'disk.raw');

/** Cold without a profile, then warm (beside the file itself), then warm for the next proxy. */
async function runGrid(scene: Scene, link: Link, runs: Runs): Promise<void> {
  const cache = path.join(scene.folder, 'cache');
  try {
    await withProxy(scene, link.grid.address, cache, async ({ mountpoint, client }) => {
      const file = diskBelow(mountpoint);
      const before = link.grid.bytes().backward;
      const cold = await replayOnce(scene, { file });
      const status = await client.call<ProxyStatus>('GET', '/v1/status');
      const linkBytes = link.grid.bytes().backward - before;
      keep(runs, link, 'grid-cold', { ...cold, linkBytes, fetchedChunks: status.cache.fetchedChunks });
      for (let pair = 0; pair < 3; pair++) {
        keep(runs, link, 'local', await replayOnce(scene, { file: scene.guest.disk }));
        keep(runs, link, 'grid-warm', await replayOnce(scene, { file }));
      }
    });
    await withProxy(scene, link.grid.address, cache, async ({ mountpoint }) => {
      keep(runs, link, 'grid-restart', await replayOnce(scene, { file: diskBelow(mountpoint) }));
    });
  } finally {
    await rm(cache, { recursive: true, force: true });
  }
}

/** Cold, with the profile's replay begun as the guest's is. */
async function runProfiled(scene: Scene, link: Link, runs: Runs): Promise<void> {
  const cache = path.join(scene.folder, 'cache');
  try {
    await withProxy(scene, link.grid.address, cache, async ({ mountpoint, client }) => {
      const file = diskBelow(mountpoint);
      const before = link.grid.bytes().backward;
      const beside = () =>
        client.call('POST', '/v1/cache/jobs', { work: 'warm', image: IMAGE, purpose: PURPOSE });
      const run = await replayOnce(scene, { file }, { beside });
      const status = await client.call<ProxyStatus>('GET', '/v1/status');
      const linkBytes = link.grid.bytes().backward - before;
      keep(runs, link, 'grid-profile', { ...run, linkBytes, fetchedChunks: status.cache.fetchedChunks });
    });
  } finally {
    await rm(cache, { recursive: true, force: true });
  }
}

async function runPeer(
  scene: Scene,
  link: Link,
  peer: Peer,
  runs: Runs,
  commands: Map<string, readonly string[]>,
): Promise<void> {
  await using stack = new AsyncDisposableStack();
  const ground = await groundFor(stack, scene, link);
  const running = await peer.start(ground);
  stack.defer(() => running.stop());
  if (!commands.has(peer.name)) for (const line of running.commands) say(`  $ ${line}`);
  commands.set(peer.name, running.commands);
  const before = link.stock.bytes().backward;
  const { fetch } = running;
  const run = await replayOnce(scene, running.target, fetch === undefined ? {} : { fetch });
  keep(runs, link, peer.name, { ...run, linkBytes: link.stock.bytes().backward - before });
}

interface Row {
  readonly case: 'boot-replay';
  readonly link: string;
  readonly subject: string;
  /** Median. */
  readonly value: number;
  readonly unit: 's';
  /** To the limit of this link. */
  readonly ratio: number;
  readonly toLocal: number;
  readonly runs: readonly number[];
  readonly spread: { readonly minimum: number; readonly maximum: number };
  readonly linkBytes?: number;
  readonly fetchedChunks?: number;
  readonly pageCache?: string;
  readonly commands?: readonly string[];
  readonly version?: string;
}

/** Seconds that the link itself asks for the chunks that the judged boot touches. */
function limitSeconds(scene: Scene, link: LinkSetting): number {
  return (scene.touched.storedBytes * 8) / link.bitsPerSecond + (2 * link.rttMs) / 1000;
}

function rowsOf(
  scene: Scene,
  link: LinkSetting,
  runs: Runs,
  commands: ReadonlyMap<string, readonly string[]>,
  versions: ReadonlyMap<string, string>,
): Row[] {
  const limit = limitSeconds(scene, link);
  const local = median(runs.get('local')!.map((run) => run.seconds));
  const row = (subject: string, seconds: readonly number[], more: Partial<Row> = {}): Row => ({
    case: 'boot-replay',
    link: link.name,
    subject,
    value: median(seconds),
    unit: 's',
    ratio: median(seconds) / limit,
    toLocal: median(seconds) / local,
    runs: seconds,
    spread: { minimum: Math.min(...seconds), maximum: Math.max(...seconds) },
    ...more,
  });
  const measured = [...runs].map(([subject, all]) => {
    const of = (name: 'linkBytes' | 'fetchedChunks') => {
      const values = all.map((run) => run[name]).filter((value) => value !== undefined);
      return values.length === 0 ? {} : { [name]: median(values) };
    };
    return row(
      subject,
      all.map((run) => run.seconds),
      {
        ...of('linkBytes'),
        ...of('fetchedChunks'),
        pageCache: all.every((run) => run.pageCache === 'dropped') ? 'dropped' : 'kept',
        ...(commands.has(subject) ? { commands: commands.get(subject)! } : {}),
        ...(versions.has(subject) ? { version: versions.get(subject)! } : {}),
      },
    );
  });
  return [row('limit', [limit]), ...measured].toSorted((a, b) => a.value - b.value);
}

/** What is promised of a link, with what was measured: [what, measured, bound]. */
function promisesOf(
  link: LinkSetting,
  rows: readonly Row[],
): { what: string; value: number; bound: number }[] {
  const valueOf = (subject: string) => rows.find((row) => row.subject === subject)?.value;
  const [cold, profiled, whole] = ['grid-cold', 'grid-profile', 'zstd|ssh'].map(valueOf);
  const mounts = ['sshfs', 'rclone', 'nbdkit'].map(valueOf).filter((value) => value !== undefined);
  const limit = valueOf('limit')!;
  const promises: { what: string; value: number; bound: number }[] = [];
  const add = (what: string, value: number | undefined, of: number | undefined, bound: number) => {
    if (value !== undefined && of !== undefined && Number.isFinite(of))
      promises.push({ what: `${link.name}: ${what}`, value: value / of, bound });
  };
  add('cold with profile, to the limit', profiled, limit, link.rttMs > 100 ? 1.5 : 1.3);
  if (link.rttMs <= 100) add('cold without profile, to the best peer', cold, Math.min(...mounts), 0.5);
  add('cold with profile, to zstd|ssh of the whole', profiled, whole, 1);
  add('cold without profile, to zstd|ssh of the whole', cold, whole, 1);
  add('warm, to the local file', valueOf('grid-warm'), valueOf('local'), 1.05);
  return promises;
}

function print(scene: Scene, rows: readonly Row[]): void {
  const text = table(
    ['LINK', 'SUBJECT', 'SECONDS', 'MIN', 'MAX', 'RUNS', 'TO LIMIT', 'TO LOCAL', 'OVER THE LINK', 'CHUNKS'],
    rows.map((row) => [
      row.link,
      row.subject,
      row.value.toFixed(3),
      row.spread.minimum.toFixed(3),
      row.spread.maximum.toFixed(3),
      row.runs.length,
      row.ratio.toFixed(2),
      row.toLocal.toFixed(2),
      row.linkBytes === undefined ? '-' : bytesText(row.linkBytes),
      row.fetchedChunks ?? '-',
    ]),
  );
  const { reads, bytes } = summaryOf(scene.trace.boots[JUDGED_BOOT]!);
  process.stdout.write(
    `\n${text}\n\n${scene.guest.name} boot: ${reads} reads, ${bytesText(bytes)}, in ${scene.touched.chunks} chunks ` +
      `(${bytesText(scene.touched.storedBytes)} compressed)` +
      (scene.profileChunks === undefined
        ? '; '
        : `, ${scene.profiledChunks} of them in the profile of ${scene.profileChunks} from another boot; `) +
      `whole image ${bytesText(scene.compressedBytes)} through zstd\n`,
  );
}

async function main(settings: Settings): Promise<void> {
  const interrupted = new AbortController();
  const stop = (signal: string) => {
    if (!interrupted.signal.aborted) say(`${signal}: stopping what runs and cleaning up`);
    interrupted.abort(new Error(`interrupted by ${signal}`));
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, stop);
  const missing = await missingPackages(settings.peers);
  if (missing.length > 0) {
    if (!settings.install) {
      const text = `not installed: ${missing.join(', ')}; run again with --install, or name others with --peers`;
      throw new GridError('unsupported', text);
    }
    say(`installing ${missing.join(' ')}`);
    await installPackages(missing, interrupted.signal);
  }
  const versions = new Map<string, string>();
  for (const peer of settings.peers) versions.set(peer.name, await versionOf(peer));

  await using stack = new AsyncDisposableStack();
  const scene = await prepareScene(stack, settings.guest, settings.profile, interrupted.signal);
  const rows: Row[] = [];
  const promises: ReturnType<typeof promisesOf> = [];
  for (const setting of settings.links) {
    await using links = new AsyncDisposableStack();
    const link = await startLink(links, scene, setting);
    const runs: Runs = new Map();
    const commands = new Map<string, readonly string[]>();
    for (let round = 0; round < Math.max(settings.runs, settings.peerRuns); round++) {
      if (round < settings.runs) {
        await runGrid(scene, link, runs);
        if (settings.profile) await runProfiled(scene, link, runs);
      }
      if (round < settings.peerRuns)
        for (const peer of settings.peers) await runPeer(scene, link, peer, runs, commands);
    }
    const ofLink = rowsOf(scene, link, runs, commands, versions);
    rows.push(...ofLink);
    promises.push(...promisesOf(link, ofLink));
  }
  print(scene, rows);
  for (const { what, value, bound } of promises) {
    const kept = value <= bound ? 'kept' : 'MISSED';
    process.stdout.write(`${kept.padEnd(6)}  ${what}: ${value.toFixed(2)} (promised ${bound})\n`);
  }
  if (settings.json === undefined) return;
  const { guest, trace } = scene;
  const record = {
    ...headOf('io'),
    host: hostFacts(trace.boots[JUDGED_BOOT]!.identity.accelerator),
    guest: {
      name: guest.name,
      sha256: guest.sha256,
      sizeBytes: guest.sizeBytes,
      nonzeroBytes: guest.nonzeroBytes,
    },
    trace: { ...summaryOf(trace.boots[JUDGED_BOOT]!), latencyMs: trace.latencyMs, qemu: trace.qemu },
    touched: scene.touched,
    ...(scene.profileChunks === undefined
      ? {}
      : { profile: { chunks: scene.profileChunks, touched: scene.profiledChunks } }),
    image: { zstdBytes: scene.compressedBytes },
    links: settings.links.map(({ name, rttMs, bitsPerSecond }) => ({
      emulator: 'byte relay',
      name,
      rttMs,
      bitsPerSecond,
    })),
    rows,
    promises: promises.map((promise) => ({ ...promise, kept: promise.value <= promise.bound })),
  };
  await writeFile(settings.json, JSON.stringify(record, null, 2) + os.EOL);
  say(`rows written to ${settings.json}`);
}

/** The other case has a program of its own, with options of its own. */
async function runFuse(): Promise<void> {
  const given = process.argv.slice(2);
  const at = given.findIndex((word) => word.startsWith('--case'));
  given.splice(at, given[at] === '--case' ? 2 : 1);
  const child = spawn(process.execPath, [path.join(import.meta.dirname, 'fuse.ts'), ...given], {
    stdio: 'inherit',
  });
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => child.kill(signal));
  process.exitCode = await new Promise<number>((resolve) => child.once('exit', (code) => resolve(code ?? 1)));
}

try {
  const settings = options();
  await (settings === 'fuse' ? runFuse() : main(settings));
} catch (error) {
  say(`gridvfs bench io: ${error instanceof Error ? error.message : String(error)}`);
  if (process.env['GRIDVFS_DEBUG']) console.error(error);
  const usage =
    error instanceof RangeError || (error as { code?: string }).code?.startsWith('ERR_PARSE_ARGS');
  process.exitCode = usage ? 2 : 1;
}
