/**
 * `gridvfs bench peers`: the same starts of a VM through gridvfs and through what hosts use today, on the same links in the
 * same run. A peer is up (connected, mounted) before the clock runs, as gridvfs's mount is; what it has to copy before
 * the guest can start is on the clock, also the kernel and the initial RAM disk where the peer shows no folder.
 *
 * Cold: nothing of the image is on the host. Warm: the second start with what the first left, the page cache dropped. The
 * ratio of every row is to gridvfs in the same state on the same link: above 1 the peer is slower. Rounds are
 * interleaved.
 */
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { table, bytesText } from '../src/cli/kit.ts';
import { GridError } from '../src/core/errors.ts';
import { isRoot } from '../src/core/linux.ts';
import { createQemu } from '../src/vmm/index.ts';
import { hostFacts } from './lib/facts.ts';
import { recordOf, writeRecord } from './lib/record.ts';
import type { Row } from './lib/record.ts';
import { abortOnSignals, failed, prepareScene, say } from './lib/scene.ts';
import type { Scene } from './lib/scene.ts';
import { startGrid, startLocal } from './lib/starts.ts';
import type { Start } from './lib/starts.ts';
import { ratioOf, summaryOf } from './lib/statistics.ts';
import { EMULATORS, parseLink } from './link/network.ts';
import { installPackages, knownHostsLine, missingPackages } from './peers/peers.ts';
import { runProgram } from './peers/program.ts';
import { BOOT_PEERS } from './peers/qemu-drivers.ts';
import type { BootPeer, OriginWay } from './peers/qemu-drivers.ts';
import { startSshd } from './peers/sshd.ts';
import type { Sshd } from './peers/sshd.ts';
import { writeFile } from 'node:fs/promises';

const OURS = 'gridvfs';
const OURS_PROFILED = 'gridvfs, profile';
const STATES = ['cold', 'warm'] as const;
type State = (typeof STATES)[number];

function options() {
  const { values } = parseArgs({
    options: {
      guest: { type: 'string', default: 'small' },
      runs: { type: 'string', default: '1' },
      lan: { type: 'string', default: '0.2ms,1gbit' },
      wan: { type: 'string', default: '30ms,100mbit' },
      links: { type: 'string', default: 'lan,wan' },
      peers: { type: 'string', default: 'all' },
      link: { type: 'string' },
      install: { type: 'boolean', default: false },
      json: { type: 'string' },
    },
  });
  const guest = (['small', 'debian'] as const).find((name) => name === values.guest);
  if (guest === undefined) throw new RangeError(`--guest ${values.guest}: write small or debian`);
  const runs = Number(values.runs);
  if (!Number.isSafeInteger(runs) || runs < 1)
    throw new RangeError(`--runs ${values.runs}: write a whole number of at least 1`);
  const emulator = EMULATORS.find((name) => name === (values.link ?? (isRoot() ? 'packets' : 'relay')));
  if (emulator === undefined) throw new RangeError(`--link ${values.link}: write ${EMULATORS.join(' or ')}`);
  const names = values.links.split(',').map((name) => {
    if (name !== 'lan' && name !== 'wan')
      throw new RangeError(`--links ${values.links}: write lan, wan or lan,wan`);
    return name;
  });
  const wanted = values.peers === 'none' ? [] : values.peers.split(',');
  const known = BOOT_PEERS.map(({ name }) => name);
  for (const name of wanted) {
    if (name !== 'all' && !known.includes(name))
      throw new RangeError(`--peers ${name}: there are all, none, ${known.join(', ')}`);
  }
  return {
    guest,
    runs,
    emulator,
    links: names.map((name) => parseLink(name, values[name])),
    asked: Object.fromEntries(names.map((name) => [name, values[name]])),
    peers: BOOT_PEERS.filter(({ name }) => wanted.includes('all') || wanted.includes(name)),
    install: values.install,
    json: values.json,
  };
}

interface PeerScene extends Scene {
  readonly sshd: Sshd;
  readonly compressedDisk: string;
}

/** Starts by link, subject and state. */
type Starts = Map<string, Start[]>;
const keyOf = (link: string, subject: string, state: State) => [link, subject, state].join('\n');

function keep(starts: Starts, link: string, subject: string, state: State, start: Start): void {
  const key = keyOf(link, subject, state);
  starts.set(key, [...(starts.get(key) ?? []), start]);
  const wire = start.linkBytes === undefined ? '' : `, ${bytesText(start.linkBytes)} over the link`;
  say(`${link}  ${subject.padEnd(16)} ${state}  ${start.seconds.toFixed(2)} s${wire}`);
}

async function runOurs(scene: Scene, link: string, profile: boolean, starts: Starts): Promise<void> {
  const cache = 'cache';
  const subject = profile ? OURS_PROFILED : OURS;
  try {
    for (const state of STATES)
      keep(starts, link, subject, state, await startGrid(scene, { link, cache, profile }));
  } finally {
    await rm(path.join(scene.folder, cache), { recursive: true, force: true });
  }
}

let grounds = 0;

async function runPeer(
  scene: PeerScene,
  link: string,
  peer: BootPeer,
  starts: Starts,
  commands: Map<string, readonly string[]>,
): Promise<void> {
  const { network, sshd, signal, guest } = scene;
  await using stack = new AsyncDisposableStack();
  const folder = path.join(scene.folder, `peer-${++grounds}`);
  await mkdir(folder);
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const address = await network.reach(link, sshd.port);
  const knownHosts = path.join(folder, 'known_hosts');
  await writeFile(knownHosts, knownHostsLine(address, sshd.hostKey));
  const way: OriginWay = {
    folder,
    address,
    user: sshd.user,
    identity: sshd.identity,
    hostKey: sshd.hostKey,
    knownHosts,
    disk: guest.disk,
    compressedDisk: scene.compressedDisk,
    signal,
    atOrigin: (body) => network.atOrigin(body),
    reach: (port) => network.reach(link, port),
    listen: network.listen,
  };
  const disk = await peer.start(way);
  stack.defer(() => disk.stop());
  commands.set(peer.name, disk.commands);
  const kernelFolder = disk.folder ?? folder;
  const kernel = path.join(kernelFolder, 'kernel');
  const initrd = path.join(kernelFolder, 'initrd');
  const copyKernel = () =>
    runProgram(
      [
        ...['scp', '-q', '-F', '/dev/null', '-P', String(address.port), '-i', sshd.identity],
        ...['-o', 'IdentitiesOnly=yes', '-o', 'BatchMode=yes', '-o', `UserKnownHostsFile=${knownHosts}`],
        ...[`${sshd.user}@${address.host}:${guest.kernel}`, `${sshd.user}@${address.host}:${guest.initrd}`],
        folder,
      ],
      signal,
    );
  for (const state of STATES) {
    const before = async () => {
      await disk.fetch?.();
      if (disk.folder === undefined) await copyKernel();
    };
    const name = `boot-${grounds}-${state}`;
    const backing = { file: disk.backing, format: 'raw' } as const;
    const start = await startLocal(scene, {
      ...{ name, backing, kernel, initrd, link },
      ...(state === 'cold' ? { before } : {}),
    });
    keep(starts, link, peer.name, state, start);
  }
}

function rowsOf(
  starts: Starts,
  versions: ReadonlyMap<string, string>,
  commands: ReadonlyMap<string, readonly string[]>,
): Row[] {
  const secondsOf = (all: readonly Start[] | undefined) => (all ?? []).map((start) => start.seconds);
  return [...starts].map(([key, all]) => {
    const [link, subject, state] = key.split('\n') as [string, string, State];
    const { value, ...summary } = summaryOf(secondsOf(all));
    const ratio = ratioOf(secondsOf(all), secondsOf(starts.get(keyOf(link, OURS, state))));
    const linkBytes = all[0]!.linkBytes;
    return {
      case: 'start',
      ...{ link, subject, state, value, unit: 's' },
      ...summary,
      ratio: ratio.value,
      ratioInterval: ratio.interval,
      ...(linkBytes === undefined ? {} : { linkBytes }),
      phases: all[0]!.phases,
      ...(versions.has(subject) ? { version: versions.get(subject)! } : {}),
      ...(commands.has(subject) ? { commands: commands.get(subject)! } : {}),
    };
  });
}

/** Where a peer is ahead of gridvfs, with what explains it: the bytes of both, and what was copied beforehand. */
function aheadOf(rows: readonly Row[]): string[] {
  const bytes = (row: Row | undefined) =>
    typeof row?.['linkBytes'] === 'number'
      ? `${bytesText(row['linkBytes'])} over the link`
      : 'nothing over the link';
  return rows
    .filter((row) => !row.subject.startsWith(OURS) && row.subject !== 'local' && row.ratio! < 1)
    .map((row) => {
      const ours = rows.find(
        (each) => each.subject === OURS && each['link'] === row['link'] && each['state'] === row['state'],
      );
      const copied = (row['phases'] as Record<string, number>)['copied'];
      const first = copied === undefined ? '' : `, after ${copied.toFixed(2)} s of copying`;
      return (
        `${String(row['link'])} ${String(row['state'])}: ${row.subject} is ahead with ${row.value.toFixed(2)} s${first} (${bytes(row)}), ` +
        `gridvfs ${ours!.value.toFixed(2)} s (${bytes(ours)})`
      );
    });
}

function print(rows: readonly Row[]): void {
  const text = table(
    ['LINK', 'STATE', 'THROUGH', 'SECONDS', 'MIN', 'MAX', 'RUNS', 'TO OURS', 'OVER THE LINK'],
    rows
      .toSorted((a, b) => {
        const group = (row: Row) => `${String(row['link'])} ${String(row['state'])}`;
        return group(a) === group(b) ? a.value - b.value : group(a) < group(b) ? -1 : 1;
      })
      .map((row) => [
        String(row['link']),
        String(row['state']),
        row.subject,
        row.value.toFixed(2),
        row.spread!.minimum.toFixed(2),
        row.spread!.maximum.toFixed(2),
        row.runs.length,
        row.ratio!.toFixed(2),
        typeof row['linkBytes'] === 'number' ? bytesText(row['linkBytes']) : '-',
      ]),
  );
  process.stdout.write(`\n${text}\n\n${aheadOf(rows).join('\n') || 'no peer is ahead of gridvfs'}\n`);
}

async function main(): Promise<void> {
  const settings = options();
  const signal = abortOnSignals();
  const { accelerator, usable, reason } = await createQemu({ accelerator: 'auto' }).probe();
  if (!usable) throw new Error(`no VM can run here: ${reason ?? 'no reason given'}`);
  const missing = await missingPackages(settings.peers);
  if (missing.length > 0) {
    if (!settings.install) {
      const text = `not installed: ${missing.join(', ')}; run again with --install, or name others with --peers`;
      throw new GridError('unsupported', text);
    }
    await installPackages(missing, signal);
  }
  const versions = new Map<string, string>();
  for (const peer of settings.peers) versions.set(peer.name, await peer.version());

  await using stack = new AsyncDisposableStack();
  const { guest, emulator, links } = settings;
  const host = hostFacts(accelerator ?? 'tcg');
  const bare = await prepareScene(stack, { guest, emulator, links, signal });
  const compressedDisk = path.join(bare.folder, 'disk.raw.zst');
  await runProgram(['zstd', '-q', '-3', '-T0', bare.guest.disk, '-o', compressedDisk], signal);
  const { network } = bare;
  const sshd = await network.atOrigin(() => startSshd(path.join(bare.folder, 'sshd'), network.listen));
  stack.defer(() => sshd.stop());
  const scene: PeerScene = { ...bare, sshd, compressedDisk };

  // Not counted: it leaves the profile of another start at the origin.
  await runOurs(scene, links[0]!.name, true, new Map());
  const starts: Starts = new Map();
  const commands = new Map<string, readonly string[]>();
  for (let round = 0; round < settings.runs; round++) {
    for (const { name } of links) {
      signal.throwIfAborted();
      keep(starts, name, 'local', 'cold', await startLocal(scene, { name: `local-${name}-${round}` }));
      await runOurs(scene, name, false, starts);
      await runOurs(scene, name, true, starts);
      for (const peer of settings.peers) await runPeer(scene, name, peer, starts, commands);
    }
  }
  const rows = rowsOf(starts, versions, commands);
  print(rows);
  if (settings.json !== undefined) {
    await writeRecord(settings.json, {
      ...recordOf('peers', scene, settings.asked, host),
      rows,
      promises: [],
      ahead: aheadOf(rows),
    });
  }
}

try {
  await main();
} catch (error) {
  failed('bench peers', error);
}
