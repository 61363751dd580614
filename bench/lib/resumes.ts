/**
 * Resumes on the clock: from the request until the guest's shell has said a nonce that only its memory holds. The
 * checkpoint is of the scene's guest, ready and at rest: once as local files (memory, device state, a qcow2 overlay with
 * what the guest wrote), resumed by QEMU without any part of gridvfs, and once as a version in the store, resumed
 * through the whole chain. Either way every resume has a disk of its own over that of the checkpoint.
 *
 * The version is rehearsed when it is published, as `vm checkpoint` does, so that the origin knows a working set of it from
 * then on, and it learns from every resume; KnownSets has it know what it knew at another time, for runs that are alike.
 */
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { globSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { mkdir, open, rm } from 'node:fs/promises';
import path from 'node:path';
import { promisify } from 'node:util';
import type { Rehearsed } from '../../src/agent/rehearsal.ts';
import type { VmStatus } from '../../src/agent/vm-record.ts';
import { parseManifest } from '../../src/core/manifest.ts';
import type { MachineCompatibility, MachineDescription } from '../../src/core/machine.ts';
import { openStore } from '../../src/store/index.ts';
import { createQemu } from '../../src/vmm/index.ts';
import { GuestShell } from '../guest/shell.ts';
import { cpuSecondsOf, dropPageCache } from './facts.ts';
import { IMAGE, orInterrupted, say } from './scene.ts';
import type { Scene } from './scene.ts';
import { gridFigures, mountProxy, READY_TIMEOUT_MS, watchLink } from './starts.ts';
import type { Start } from './starts.ts';

const CHECKPOINT = 'resume:1';
/** What the guest still does when it has said that it is ready. */
const REST_MS = 5_000;

export interface Checkpoints {
  readonly nonce: string;
  readonly local: {
    readonly folder: string;
    readonly description: MachineDescription;
    readonly compatibility: MachineCompatibility;
  };
  /** Of the memory image in the store. */
  readonly memoryNonzeroBytes: number;
}

/** Working sets of resumes that the origin has. */
export class KnownSets {
  readonly #folder: string;
  readonly #files = new Map<string, Buffer>();

  private constructor(folder: string) {
    this.#folder = folder;
  }

  /** As they are now. */
  static now(scene: Scene): KnownSets {
    const sets = new KnownSets(path.join(scene.store, 'v1', 'profiles'));
    for (const file of sets.#there()) sets.#files.set(file, readFileSync(file));
    return sets;
  }

  /** The origin knows none. */
  static forget(scene: Scene): void {
    for (const file of new KnownSets(path.join(scene.store, 'v1', 'profiles')).#there()) rmSync(file);
  }

  /** The origin knows these and no others. */
  restore(): void {
    for (const file of this.#there()) rmSync(file);
    for (const [file, bytes] of this.#files) writeFileSync(file, bytes);
  }

  #there(): string[] {
    return globSync(path.join(this.#folder, '*', '*', 'resume.json'));
  }
}

async function leaveNonce(consoleSocket: string, nonce: string): Promise<void> {
  const shell = await GuestShell.open(consoleSocket, READY_TIMEOUT_MS);
  try {
    await shell.run(`N=${nonce}; sync; sleep ${REST_MS / 1000}`, READY_TIMEOUT_MS);
  } finally {
    shell.close();
  }
}

async function hearNonce(consoleSocket: string, nonce: string): Promise<void> {
  const shell = await GuestShell.open(consoleSocket, READY_TIMEOUT_MS);
  try {
    const said = await shell.run('echo "$N"', READY_TIMEOUT_MS);
    if (!said.includes(nonce)) throw new Error(`the guest did not go on: it said ${said.slice(-200)}`);
  } finally {
    shell.close();
  }
}

async function overlayOf(backing: string, format: string, overlay: string, sizeBytes: number): Promise<void> {
  await promisify(execFile)('qemu-img', [
    ...['create', '-q', '-u', '-f', 'qcow2', '-b', backing, '-F', format, overlay, String(sizeBytes)],
  ]);
}

/** Makes both. The proxy that makes the one in the store has a cache of its own, which is thrown away. */
export async function prepareCheckpoints(scene: Scene, link: string): Promise<Checkpoints> {
  const nonce = randomBytes(8).toString('hex');
  say('making the checkpoints to resume from: local files, and a version in the store');
  const { guest, signal } = scene;
  const folder = path.join(scene.folder, 'checkpoint');
  await mkdir(folder);
  const overlay = path.join(folder, 'overlay.qcow2');
  await overlayOf(guest.disk, 'raw', overlay, guest.sizeBytes);
  const machine = await createQemu({ accelerator: 'auto' }).start(
    {
      name: 'checkpoint',
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
  const files = { memory: path.join(folder, 'memory.raw'), deviceState: path.join(folder, 'device.state') };
  let compatibility: MachineCompatibility;
  try {
    await orInterrupted(signal, machine.ready(READY_TIMEOUT_MS));
    await orInterrupted(signal, leaveNonce(machine.consoleSocket, nonce));
    await using memory = await open(files.memory, 'wx');
    await memory.truncate(guest.memoryBytes);
    ({ compatibility } = await machine.capture(files));
  } finally {
    await machine.stop(0);
  }
  {
    await using stack = new AsyncDisposableStack();
    stack.defer(() => rm(path.join(scene.folder, 'cache-checkpoint'), { recursive: true, force: true }));
    const { client } = await mountProxy(stack, scene, { link, cache: 'cache-checkpoint' });
    const vm = await client.call<VmStatus>('POST', '/v1/vms', { image: IMAGE, name: 'checkpoint' });
    const ready = client.call<VmStatus>('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${READY_TIMEOUT_MS}`);
    await orInterrupted(signal, ready);
    await orInterrupted(signal, leaveNonce(vm.consoleSocket, nonce));
    await client.call('POST', `/v1/vms/${vm.id}/suspend`, {});
    await client.call('POST', `/v1/vms/${vm.id}/checkpoint`, { reference: CHECKPOINT });
    await client.call('POST', `/v1/vms/${vm.id}/stop`, {});
  }
  {
    // Another proxy: this one records, and the boot above is not to be known at the origin.
    await using stack = new AsyncDisposableStack();
    stack.defer(() => rm(path.join(scene.folder, 'cache-rehearsal'), { recursive: true, force: true }));
    const { client } = await mountProxy(stack, scene, { link, cache: 'cache-rehearsal', profile: true });
    const rehearsed = await client.call<Rehearsed>('POST', '/v1/rehearse', { checkpoint: CHECKPOINT });
    say(`rehearsed in ${rehearsed.seconds.toFixed(2)} s: ${rehearsed.chunks} chunks`);
  }
  const store = await openStore(scene.store);
  const tag = (await store.listTags()).find(({ name, version }) => `${name}:${version}` === CHECKPOINT)!;
  const { nonzeroBytes } = parseManifest(await store.readManifest(tag.manifest), tag.manifest);
  await store.close();
  return {
    nonce,
    local: { folder, description: machine.description, compatibility },
    memoryNonzeroBytes: nonzeroBytes,
  };
}

export async function resumeLocal(scene: Scene, { nonce, local }: Checkpoints, name: string): Promise<Start> {
  await using stack = new AsyncDisposableStack();
  const folder = path.join(scene.folder, name);
  await mkdir(folder);
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const pageCache = dropPageCache(scene.folder);
  const startedMs = performance.now();
  const sinceStart = () => (performance.now() - startedMs) / 1000;
  const disk = path.join(folder, 'overlay.qcow2');
  await overlayOf(path.join(local.folder, 'overlay.qcow2'), 'qcow2', disk, scene.guest.sizeBytes);
  const phases: Record<string, number> = { 'disk made': sinceStart() };
  const files = {
    memory: path.join(local.folder, 'memory.raw'),
    deviceState: path.join(local.folder, 'device.state'),
  };
  const description = {
    ...local.description,
    disks: [{ path: disk, format: 'qcow2' as const, readOnly: false }],
  };
  const vmm = createQemu({ accelerator: 'auto' });
  const machine = await vmm.resume(description, folder, files, local.compatibility);
  stack.defer(() => machine.stop(0));
  await machine.proceed();
  phases['machine started'] = sinceStart();
  await orInterrupted(scene.signal, hearNonce(machine.consoleSocket, nonce));
  const seconds = sinceStart();
  return { seconds, pageCache, phases: { ...phases, 'guest ready': seconds } };
}

export async function resumeGrid(
  scene: Scene,
  { nonce }: Checkpoints,
  options: { link: string; cache: string; profile?: boolean; records?: boolean },
): Promise<Start> {
  await using stack = new AsyncDisposableStack();
  const { client, pid, mountSeconds } = await mountProxy(stack, scene, options);
  const pageCache = dropPageCache(scene.folder);
  const watch = await watchLink(scene, options.link);
  stack.defer(async () => void (await watch?.end()));
  const cpu = { proxy: cpuSecondsOf(pid), server: cpuSecondsOf(scene.serverPid) };
  const startedMs = performance.now();
  const vm = await client.call<VmStatus>('POST', '/v1/vms/resume', { checkpoint: CHECKPOINT });
  await orInterrupted(scene.signal, hearNonce(vm.consoleSocket, nonce));
  const seconds = (performance.now() - startedMs) / 1000;
  const carried = await watch?.end();
  const grid = await gridFigures(client, scene, { pid, mountSeconds, cpu });
  // What its first seconds touch belongs to its working set.
  if (options.records) await client.call('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${READY_TIMEOUT_MS}`);
  await client.call('POST', `/v1/vms/${vm.id}/stop`, { graceMs: 0 });
  const { clonedMs, startedMs: machineMs } = vm.timeline;
  return {
    seconds,
    pageCache,
    phases: {
      'disk made': clonedMs / 1000,
      'machine started': (machineMs ?? 0) / 1000,
      'guest ready': seconds,
    },
    ...carried,
    grid,
  };
}
