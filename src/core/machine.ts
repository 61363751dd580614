/**
 * The contract of what runs machines. QEMU is the default; nothing here is QEMU's own, because grids run several
 * containers of work. One suite (test/suites/vmm.ts) runs for each implementation.
 */

export interface MachineDisk {
  readonly path: string;
  readonly format: 'raw' | 'qcow2';
  readonly readOnly: boolean;
  /** Of one that was attached: its name, which the guest sees as the disk's serial number. */
  readonly id?: string;
  /** Of one that was attached: where; given by the Vmm. It must be there again when the machine is resumed. */
  readonly slot?: number;
}

/** Of all disks of a machine together. What is left out has no bound. */
export interface IoLimits {
  readonly bytesPerSecond?: number;
  readonly operationsPerSecond?: number;
}

/** What a guest reads about itself when it starts (cloud-init's NoCloud). */
export interface MachineSeed {
  readonly instanceId: string;
  readonly hostName: string;
  /** Public keys, one each as in authorized_keys, that let one in as the guest's first user. */
  readonly sshKeys: readonly string[];
  /** Replaces the empty #cloud-config. */
  readonly userData?: string;
}

/** One line of authorized_keys, as OpenSSH names its kinds of keys. (A private key's file has none.) */
export const PUBLIC_KEY_PATTERN =
  '^([^\\r\\n]*[ \\t])?(ssh-(rsa|ed25519)|ecdsa-sha2-nistp(256|384|521)|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\\.com)[ \\t]+[A-Za-z0-9+/]+={0,3}([ \\t][^\\r\\n]*)?$';

/** Everything that makes a machine, from manifest labels and the request. Recorded with a checkpoint. */
export interface MachineDescription {
  /** Shown in process lists and as the default host name. */
  readonly name: string;
  /** A virtual machine when left out. */
  readonly kind?: 'container';
  readonly vcpus: number;
  readonly memoryBytes: number;
  /** Raw disk images in order; the first is the system disk. */
  readonly disks: readonly MachineDisk[];
  /** Direct kernel boot; without it the firmware boots the first disk. */
  readonly boot?: { readonly kernel: string; readonly initrd?: string; readonly commandLine: string };
  readonly macAddress: string;
  /** 'user': outbound only, by the Vmm's own network stack. 'none': no device. */
  readonly network: 'user' | 'none' | MachineBridge;
  /** Virtual networks that it is on, each by a device of its own; its frames go through `segmentSocket`. */
  readonly segments?: readonly MachineSegment[];
  /** Its networks lead nowhere: it has their devices, as the machine had that it goes on from. */
  readonly isolated?: boolean;
  /** A line on the first serial console that contains this text means: the guest answers. */
  readonly readyText?: string;
  /** A UUID that the guest can see (vmgenid): another one tells it that it is a copy. Made up when left out. */
  readonly generationId?: string;
  readonly limits?: IoLimits;
  readonly seed?: MachineSeed;
  /** There is a QEMU guest agent in the guest: it is asked to hold its file systems still for a capture. */
  readonly guestAgent?: boolean;
  /** 'bios' unless it says otherwise. */
  readonly firmware?: 'bios' | 'uefi';
}

/** An interface of the host, made for the machine and gone with it, that is put into this bridge. */
export interface MachineBridge {
  readonly bridge: string;
}

export interface MachineSegment {
  readonly network: string;
  readonly macAddress: string;
  /** What its guest is told by DHCP: its address, the server's with the length of the prefix, and its name. */
  readonly address?: string;
  readonly server?: string;
  readonly hostName?: string;
}

/** Name, in the machine's folder, of the unix socket of a segment: whoever connects gets the machine's frames and gives
 * it others, each with its length in front (u32, big-endian). One at a time; when it closes, another may connect. */
export const segmentSocket = (index: number) => `segment${index}.sock`;

/** What a captured device state can be loaded into again: it is refused by anything else. */
export interface MachineCompatibility {
  /** Name of the Vmm. */
  readonly vmm: string;
  /** Versioned machine type, e.g. pc-i440fx-7.2. */
  readonly machine: string;
  /** Of the program that captured it. */
  readonly version: string;
  readonly accelerator: string;
  /** What the guest saw as its processor. */
  readonly processor: string;
}

/** Where a paused machine is written to, and resumed from. Files; `memory` has the size of the machine's memory. */
export interface MachineFiles {
  /** Plain bytes of the guest's memory in place. */
  readonly memory: string;
  readonly deviceState: string;
}

export interface MachineCapture {
  readonly compatibility: MachineCompatibility;
  /** What went into the memory file: all that is not zero of a machine that was booted, the pages that it changed
   * of one that was resumed. */
  readonly memoryWrittenBytes: number;
}

/** 'paused': captured, or about to be resumed. */
export type MachineState = 'starting' | 'running' | 'paused' | 'stopped' | 'failed';

export interface MachineStatus {
  readonly state: MachineState;
  readonly pid?: number;
  /** 'kvm' or 'tcg' for QEMU. */
  readonly accelerator?: string;
  /** Why it failed, with the console's last words; of one that runs, what its guest waits for. */
  readonly reason?: string;
  /** It has stopped because its guest asked for a reboot, which takes a machine that is started anew. */
  readonly reboots?: true;
  /** Monotonic milliseconds from `start` to: process up and answering, guest ready. */
  readonly startedMs?: number;
  readonly readyMs?: number;
}

export interface MachineForward {
  readonly port: number;
  /** Nobody comes by it any more; who came stays. */
  close(): Promise<void>;
}

export interface Machine {
  /** As it is now: with what was attached, under the limits that were set last. */
  readonly description: MachineDescription;
  status(): MachineStatus;
  /** Resolves when the guest said `readyText`; rejects with vm-failed when it dies, timeout when it takes longer. */
  ready(timeoutMs: number): Promise<void>;
  /** Resolves when the machine is gone, for whatever reason. */
  readonly ended: Promise<MachineStatus>;
  /** Asks the guest to power down, and ends it after `graceMs` (0: at once). Resolves when it is gone. */
  stop(graceMs: number): Promise<void>;
  /**
   * Pauses the guest, flushes its disks, and writes its device state and its memory; it stays paused until `proceed`
   * or `stop`. The memory file holds zeros, or for a resumed machine what it was resumed from; only pages that differ
   * are written. On a failure the guest runs on. Throws vm-failed, local-io, no-space, unsupported.
   */
  capture(files: MachineFiles): Promise<MachineCapture>;
  /** Lets a paused guest run (on). */
  proceed(): Promise<void>;
  /** Plugs a disk into the machine, which may run; its guest finds it by `id`. Throws exists, bad-request, vm-failed,
   * unsupported. */
  attach(disk: MachineDisk & { readonly id: string }): Promise<void>;
  /** Asks the guest to let go of an attached disk, and unplugs it. Throws not-found, and timeout when the guest does
   * not: it stays attached then. */
  detach(id: string, timeoutMs: number): Promise<void>;
  /** From now on; replaces the ones before. Throws bad-request, unsupported. */
  setLimits(limits: IoLimits): Promise<void>;
  /** A port of this host's loopback that leads to a TCP port of the guest, where its network is 'user'. Throws vm-failed. */
  forward?(guestPort: number): Promise<MachineForward>;
  /** A call of the guest agent's in the guest, where the description says that there is one. Throws timeout, vm-failed. */
  askAgent?(call: string, args: object, timeoutMs: number): Promise<unknown>;
  /** Path of the unix socket that is the guest's first serial console. */
  readonly consoleSocket: string;
  /** Path of the unix socket that is the guest's second serial port, by which it is told who it is. */
  readonly identitySocket: string;
  /** File with what the console said: the last mebibyte at least, what went before may be a hole. */
  readonly consoleLog: string;
}

/** What not every Vmm can. */
export type MachineAbility = 'capture' | 'boot' | 'network' | 'limits' | 'qcow2';

export interface Vmm {
  readonly name: string;
  /** What it throws 'unsupported' for: 'capture' (and resume), 'boot' (a kernel of one's own), 'network', 'limits',
   * 'qcow2' (disks in that format). */
  readonly lacks: ReadonlySet<MachineAbility>;
  /** Whether this host can run it, and how; the reason where not. */
  probe(): Promise<{ readonly usable: boolean; readonly accelerator?: string; readonly reason?: string }>;
  /** Starts a machine; its sockets and logs go to `folder`, which exists and is the machine's own. Resolves when
   * the machine's process answers (not yet the guest). Throws vm-failed, unsupported. */
  start(description: MachineDescription, folder: string): Promise<Machine>;

  /** A machine as it was captured, paused: it runs after `proceed`. Its memory is mapped privately from the file, which
   * is opened for writing and not written. It may have no kernel to boot: when its guest reboots, it ends, and its last
   * status says `reboots`. Throws unsupported (made for another machine), bad-format, vm-failed. */
  resume(
    description: MachineDescription,
    folder: string,
    files: MachineFiles,
    compatibility: MachineCompatibility,
  ): Promise<Machine>;

  /** Resumes are to come: what takes time to be ready is begun. Left out where nothing does. */
  prepare?(): void;

  /** The machine that an earlier process of ours started in `folder`, if it still runs: it is ours again. */
  adopt(folder: string): Promise<Machine | undefined>;

  /** Ends a machine that an earlier process of ours started in `folder` and lost; false when none runs there. */
  endLost(folder: string): Promise<boolean>;
}
