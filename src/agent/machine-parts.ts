/** What the machines of a host are given, and what makes one of them run. */
import type { Digest } from '../core/bytes.ts';
import type { Machine, MachineSegment } from '../core/machine.ts';
import type { Manifest } from '../core/manifest.ts';
import type { CloneDisk } from './clone-parts.ts';
import type { CloneRecord } from './clone-record.ts';
import type { Start } from './starts.ts';
import type { VmMemory, VmVolume } from './vm-record.ts';

/** What the machines need to know of images; given by whoever wires the agent. */
export interface MachineCatalog {
  /** `recent`: by the names as they were heard a short while ago, for who asks again before it counts. */
  resolve(
    reference: string,
    recent?: boolean,
  ): Promise<{ digest: Digest; manifest: Manifest; folder: string }>;
  /** `folder`: where it is on the mount, if a name shows it. */
  manifestOf(digest: Digest): Promise<{ manifest: Manifest; folder: string | undefined }>;
  manifest(digest: Digest): Promise<Manifest>;
  /** The first `lengthBytes` of an image's content. */
  read(digest: Digest, lengthBytes: number): Promise<Buffer>;
  /** Where a clone's disk is on the mount. */
  diskOf(cloneId: string): string;
}

/** Where the processes of VMs are put, for the operator to weigh them. */
export interface MachineGroups {
  place(child: string, pid: number): Promise<void>;
  remove(child: string): Promise<void>;
}

/** What plugs VMs into virtual networks: each with its folder, which has the sockets of its segments. */
export interface MachineSegments {
  plugIn(vm: string, segments: readonly MachineSegment[], folder: string): void;
  plugOut(vm: string): void;
}

/** A VM that is about to run. */
export interface Launch {
  readonly id: string;
  readonly image: string;
  readonly clone: string;
  readonly discards: boolean;
  readonly readyText?: string;
  readonly memory?: VmMemory;
  readonly answers?: boolean;
  readonly nonce?: string;
  /** It goes on from a checkpoint in the store, and is no fork of it but the very machine. */
  readonly same?: boolean;
  readonly volumes?: readonly VmVolume[];
  /** See rehearsal.ts: no daemon goes on with it but the one that began it. */
  readonly rehearsal?: boolean;
  readonly requestedAtMs: number;
  readonly clonedMs: number;
  /** Images that it opens, those it needs first in front. */
  readonly opens: readonly Digest[];
  /** Where they were said to be needed before all that it takes was there (Machines.expect). */
  readonly start?: Start | undefined;
  /** Makes the machine: booting, or paused and then let go by `proceed`. */
  begin(folder: string): Promise<Machine>;
  /** Called when the VM is on record and paused: from here on its guest runs. */
  proceed?(machine: Machine): Promise<void>;
}

/** Makes versions in a store; given by whoever wires the agent. */
export interface CheckpointWork {
  /** Throws what would keep it from being made: denied (no uploads), exists (the name is another thing's). */
  check(reference: string): Promise<void>;
  /** Throws denied, exists, and whatever the way to the store does. */
  publish(checkpoint: {
    readonly reference: string;
    readonly disk: CloneDisk;
    readonly diskRecord: CloneRecord;
    readonly memory: CloneDisk;
    readonly memoryRecord: CloneRecord;
    readonly state: Buffer;
    readonly labels: Readonly<Record<string, string>>;
  }): Promise<PublishedCheckpoint>;
}

export interface PublishedCheckpoint {
  readonly digest: Digest;
  /** What the store did not have, compressed. */
  readonly newStoredBytes: number;
  readonly newChunks: number;
}
