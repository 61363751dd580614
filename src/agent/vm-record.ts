/** A VM as the agent knows it: what it was asked for, what it is made of, what is said of it. */
import { readFile, rename, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import type {
  IoLimits,
  Machine,
  MachineDescription,
  MachineSegment,
  MachineStatus,
} from '../core/machine.ts';
import { isName } from '../core/manifest.ts';

export interface RunRequest {
  /** name:version to make a non-persistent clone of; or … */
  readonly image?: string;
  /** … a clone that is there already; it stays when the VM goes if it is persistent or full. */
  readonly clone?: string;
  readonly name?: string;
  /** 'qemu' when left out. A container has the host's kernel and no network, and is never suspended. */
  readonly vmm?: 'qemu' | 'container';
  readonly memoryBytes?: number;
  readonly vcpus?: number;
  readonly network?: MachineDescription['network'];
  readonly segments?: readonly MachineSegment[];
  /** Replaces the label's. */
  readonly commandLine?: string;
  readonly readyText?: string;
  readonly limits?: IoLimits;
  /** What the guest reads about itself when it starts; any of them makes a seed. */
  readonly sshKeys?: readonly string[];
  readonly hostName?: string;
  readonly userData?: string;
}

/** A disk beside the system's that was attached to a VM. */
export interface VmVolume {
  /** The guest sees it as the disk's serial number. */
  readonly name: string;
  readonly image: string;
  readonly clone: string;
  /** The clone was made for it: it goes with the volume. */
  readonly discards: boolean;
}

/** Where the memory of a VM that was resumed comes from. It is mapped privately: what the VM writes is its own. */
export interface VmMemory {
  /** The file that is mapped. */
  readonly file: string;
  /** The clone whose disk that file is, if it is one's; other VMs may have it mapped as well. */
  readonly clone?: string;
  /** The memory image that it is, if it is one. */
  readonly image?: Digest;
  /** The clone that has the same content and is this VM's own: what it changed is written there. Where `image` is
   * mapped, one is made when it is needed. */
  readonly own?: string;
}

/** What another daemon needs to know to go on with a VM. */
export interface VmRecord {
  readonly schema: 1;
  readonly id: string;
  readonly image: string;
  /** Its disk. */
  readonly clone: string;
  /** Its disk is a non-persistent clone: it goes with this VM. */
  readonly discards: boolean;
  /** ISO 8601, UTC. */
  readonly created: string;
  readonly clonedMs: number;
  readonly startedMs: number;
  readonly readyText?: string;
  readonly memory?: VmMemory;
  readonly volumes?: readonly VmVolume[];
  /** Its guest answers on its second serial port (vm-answer.ts). */
  readonly answers?: true;
  /** It came from another host as the machine that it is, so it is not told that it is a fork. */
  readonly same?: true;
  /** It is ended with the daemon that began it (rehearsal.ts). */
  readonly rehearsal?: true;
  /** What its guest answers then, unless it is not the one that was captured. */
  readonly nonce?: string;
}

/** Clones that a VM has as disks. */
export function disksOf({ clone, volumes = [] }: VmRecord): string[] {
  return [clone, ...volumes.map((volume) => volume.clone)];
}

/** All clones that a VM needs. */
export function clonesOf(record: VmRecord): string[] {
  const { memory } = record;
  return [...disksOf(record), memory?.clone, memory?.own].filter((one) => one !== undefined);
}

/** One that runs. */
export interface Vm {
  record: VmRecord;
  /** Its sockets and logs. */
  readonly folder: string;
  readonly requestedAtMs: number;
  readonly machine: Machine;
  readyMs?: number;
  /** Resolves when a resumed guest has answered. */
  answer?: Promise<void>;
  /** Why it is ended: it is not what it should be. */
  denied?: string;
  /** What is done to it; nothing else may be then. */
  busy?: string;
  /** It is ended because it has been suspended: its clones stay. */
  suspended?: true;
}

export interface VmStatus extends Omit<MachineStatus, 'state'> {
  readonly state: MachineStatus['state'] | 'suspended';
  readonly id: string;
  readonly image: string;
  readonly clone: string;
  readonly created: string;
  /** The guest's word for being ready; without it nobody can wait for the guest. */
  readonly readyText?: string;
  /** Whether it goes on from a checkpoint or a suspension, and so has no boot to wait for. */
  readonly resumed: boolean;
  /** Whether one can wait for its guest's answer. */
  readonly answers: boolean;
  readonly consoleSocket: string;
  readonly consoleLog: string;
  readonly volumes: readonly VmVolume[];
  readonly limits?: IoLimits;
  /** Milliseconds from the request to: clone there, machine started (a resumed guest runs then), guest ready. */
  readonly timeline: { readonly clonedMs: number; readonly startedMs?: number; readonly readyMs?: number };
}

export function statusOf({ record, machine, readyMs }: Vm): VmStatus {
  return {
    ...machine.status(),
    id: record.id,
    image: record.image,
    clone: record.clone,
    created: record.created,
    ...(record.readyText === undefined ? {} : { readyText: record.readyText }),
    resumed: record.memory !== undefined,
    answers: record.memory === undefined ? record.readyText !== undefined : record.nonce !== undefined,
    consoleSocket: machine.consoleSocket,
    consoleLog: machine.consoleLog,
    volumes: record.volumes ?? [],
    ...(machine.description.limits === undefined ? {} : { limits: machine.description.limits }),
    timeline: {
      clonedMs: record.clonedMs,
      startedMs: record.startedMs,
      ...(readyMs === undefined ? {} : { readyMs }),
    },
  };
}

const RECORD_FILE = 'vm.json';

/** Puts the record into the VM's folder. It need not survive the host: the VM does not either. */
export async function writeVmRecord(folder: string, record: VmRecord): Promise<void> {
  const file = path.join(folder, RECORD_FILE);
  await writeFile(`${file}.new`, JSON.stringify(record) + '\n', { mode: 0o600 });
  await rename(`${file}.new`, file);
}

/** Throws bad-format, newer-format and what the disk says. */
export async function readVmRecord(folder: string): Promise<VmRecord> {
  return checkedVmRecord(
    JSON.parse(await readFile(path.join(folder, RECORD_FILE), 'utf8')),
    path.basename(folder),
  );
}

/** Throws bad-format, newer-format unless it is the record of VM `id`. */
export function checkedVmRecord(raw: unknown, id: string): VmRecord {
  const record = (raw ?? {}) as Partial<VmRecord>;
  if (typeof record.schema === 'number' && record.schema > 1)
    throw new GridError(
      'newer-format',
      `the record of VM ${id} has schema ${String(record.schema)}, this is 1`,
    );
  const { clone, image, memory } = record;
  const good =
    record.schema === 1 &&
    record.id === id &&
    isName(id) &&
    isName(clone) &&
    typeof image === 'string' &&
    typeof record.discards === 'boolean' &&
    [memory?.clone, memory?.own].every((name) => name === undefined || isName(name)) &&
    (record.volumes ?? []).every((volume) => isName(volume.name) && isName(volume.clone));
  if (!good) throw new GridError('bad-format', `the record of VM ${id} is malformed`);
  return record as VmRecord;
}
