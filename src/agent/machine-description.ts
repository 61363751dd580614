/** How a machine is made of an image's labels and parts and of what was asked for. */
import { randomBytes, randomUUID } from 'node:crypto';
import path from 'node:path';
import { GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import type { MachineDescription, MachineSeed } from '../core/machine.ts';
import type { Manifest } from '../core/manifest.ts';
import type { RunRequest } from './vm-record.ts';

/** Labels of a disk image's manifest that say how its machine is made. */
export const LABEL_COMMAND_LINE = 'boot.cmdline';
export const LABEL_READY_TEXT = 'boot.ready';
export const LABEL_MEMORY_MIB = 'machine.memory-mib';
/** 'nocloud': the guest looks for a seed. */
export const LABEL_SEED = 'boot.seed';
/** 'qemu': the QEMU guest agent runs in it. */
export const LABEL_AGENT = 'boot.agent';
/** 'ttyS1': a program of the guest answers there (vm-answer.ts). */
export const LABEL_ANSWERS = 'boot.answers';
/** 'uefi', else a BIOS. */
export const LABEL_FIRMWARE = 'boot.firmware';
const MEMORY_BYTES_DEFAULT = 512 * MIB;

/** What makes one machine another than the machine it is a copy of. */
export function newIdentity(): { macAddress: string; generationId: string } {
  const mac = randomBytes(3);
  return {
    macAddress: `52:54:00:${mac.toString('hex').replaceAll(/(..)(?=.)/g, '$1:')}`,
    generationId: randomUUID(),
  };
}

function wantsSeed({ sshKeys, hostName, userData }: RunRequest, labels: Manifest['labels']): boolean {
  return labels[LABEL_SEED] === 'nocloud' || [sshKeys, hostName, userData].some((one) => one !== undefined);
}

function seedOf(
  { sshKeys = [], hostName, userData }: RunRequest,
  { name, generationId }: { name: string; generationId: string },
): MachineSeed {
  return {
    instanceId: instanceIdOf(name, generationId),
    hostName: hostName ?? name,
    sshKeys,
    ...(userData === undefined ? {} : { userData }),
  };
}

/** What cloud-init tells by that it is on another machine than before. */
export function instanceIdOf(name: string, generationId: string | undefined): string {
  return `${name}-${generationId}`;
}

/** The same machine as another one of its own. */
export function renamed(description: MachineDescription, name: string): MachineDescription {
  const identity = newIdentity();
  const { seed } = description;
  const instanceId = instanceIdOf(name, identity.generationId);
  return {
    ...description,
    name,
    ...identity,
    ...(seed === undefined ? {} : { seed: { ...seed, instanceId, hostName: name } }),
  };
}

/** The same machine with networks that lead nowhere. Throws unsupported. */
export function isolated(description: MachineDescription): MachineDescription {
  const { network } = description;
  if (typeof network === 'object')
    throw new GridError('unsupported', `a machine on the bridge ${network.bridge} cannot be kept apart`);
  return { ...description, isolated: true };
}

/** The very machine, under another name where it has one now: it may go on from an earlier moment than it knows, so its
 * guest is told to make its random numbers anew (vmgenid). */
export function sameUnder(description: MachineDescription, name: string): MachineDescription {
  if (description.name === name) return description;
  return { ...description, name, generationId: newIdentity().generationId };
}

/** `partsFolder` is where the mount shows the image's kernel and initrd, `disk` the clone's disk there. */
export function describeMachine(
  request: RunRequest,
  id: string,
  { labels, parts }: Pick<Manifest, 'labels' | 'parts'>,
  partsFolder: string,
  disk: string,
): MachineDescription {
  const memoryLabel = Number(labels[LABEL_MEMORY_MIB]);
  const readyText = request.readyText ?? labels[LABEL_READY_TEXT];
  const description = {
    name: id,
    vcpus: request.vcpus ?? 1,
    memoryBytes: request.memoryBytes ?? (memoryLabel > 0 ? memoryLabel * MIB : MEMORY_BYTES_DEFAULT),
    disks: [{ path: disk, format: 'raw' as const, readOnly: false }],
    ...newIdentity(),
    ...(request.vmm === 'container' ? { kind: 'container' as const } : {}),
    network: request.network ?? (request.vmm === 'container' ? ('none' as const) : ('user' as const)),
    ...(request.segments === undefined ? {} : { segments: request.segments }),
    ...(readyText === undefined ? {} : { readyText }),
    ...(request.limits === undefined ? {} : { limits: request.limits }),
    ...(labels[LABEL_AGENT] === 'qemu' ? { guestAgent: true } : {}),
    ...(labels[LABEL_FIRMWARE] === 'uefi' ? { firmware: 'uefi' as const } : {}),
  };
  const made = wantsSeed(request, labels)
    ? { ...description, seed: seedOf(request, description) }
    : description;
  return withBoot(made, request, labels, parts, partsFolder);
}

function withBoot(
  description: MachineDescription,
  request: RunRequest,
  labels: Manifest['labels'],
  parts: Manifest['parts'],
  partsFolder: string,
): MachineDescription {
  if (!('kernel' in parts) || description.kind === 'container') return description;
  return { ...description, boot: bootOf(parts, partsFolder, commandLineOf(request, labels)) };
}

function commandLineOf(request: RunRequest, labels: Manifest['labels']): string {
  return request.commandLine ?? labels[LABEL_COMMAND_LINE] ?? 'root=/dev/vda rw console=ttyS0';
}

function bootOf(parts: Manifest['parts'], folder: string, commandLine: string) {
  return {
    kernel: path.join(folder, 'kernel'),
    ...('initrd' in parts ? { initrd: path.join(folder, 'initrd') } : {}),
    commandLine,
  };
}

/** The same machine over another disk: as the mount of this host shows it, with the parts of its image beside it. */
export function relocated(description: MachineDescription, disk: string): MachineDescription {
  const { boot, disks } = description;
  const folder = path.dirname(disk);
  return {
    ...description,
    disks: disks.map((one, index) => (index === 0 ? { ...one, path: disk } : one)),
    ...(boot === undefined
      ? {}
      : {
          boot: {
            ...boot,
            kernel: path.join(folder, 'kernel'),
            ...(boot.initrd === undefined ? {} : { initrd: path.join(folder, 'initrd') }),
          },
        }),
  };
}
