/**
 * The contract of what runs machines. QEMU is the default; nothing here is QEMU's own, because grids run several
 * containers of work. One suite (test/suites/vmm.ts) runs for each implementation.
 */

/** Everything that makes a machine, from manifest labels and the request. Recorded with a checkpoint later. */
export interface MachineDescription {
  /** Shown in process lists and as the default host name. */
  readonly name: string;
  readonly vcpus: number;
  readonly memoryBytes: number;
  /** Raw disk images in order; the first is the system disk. */
  readonly disks: readonly {
    readonly path: string;
    readonly format: 'raw' | 'qcow2';
    readonly readOnly: boolean;
  }[];
  /** Direct kernel boot; without it the firmware boots the first disk. */
  readonly boot?: { readonly kernel: string; readonly initrd?: string; readonly commandLine: string };
  readonly macAddress: string;
  /** 'user': outbound only, by the Vmm's own network stack. 'none': no device. */
  readonly network: 'user' | 'none';
  /** A line on the first serial console that contains this text means: the guest answers. */
  readonly readyText?: string;
}

export type MachineState = 'starting' | 'running' | 'stopped' | 'failed';

export interface MachineStatus {
  readonly state: MachineState;
  readonly pid?: number;
  /** 'kvm' or 'tcg' for QEMU. */
  readonly accelerator?: string;
  /** Why it failed, with the console's last words. */
  readonly reason?: string;
  /** Monotonic milliseconds from `start` to: process up and answering, guest ready. */
  readonly startedMs?: number;
  readonly readyMs?: number;
}

export interface Machine {
  status(): MachineStatus;
  /** Resolves when the guest said `readyText`; rejects with vm-failed when it dies, timeout when it takes longer. */
  ready(timeoutMs: number): Promise<void>;
  /** Resolves when the machine is gone, for whatever reason. */
  readonly ended: Promise<MachineStatus>;
  /** Asks the guest to power down, and ends it after `graceMs` (0: at once). Resolves when it is gone. */
  stop(graceMs: number): Promise<void>;
  /** Path of the unix socket that is the guest's first serial console. */
  readonly consoleSocket: string;
  /** File that keeps everything the console said. */
  readonly consoleLog: string;
}

export interface Vmm {
  readonly name: string;
  /** Whether this host can run it, and how; the reason where not. */
  probe(): Promise<{ readonly usable: boolean; readonly accelerator?: string; readonly reason?: string }>;
  /** Starts a machine; its sockets and logs go to `folder`, which exists and is the machine's own. Resolves when
   * the machine's process answers (not yet the guest). Throws vm-failed, unsupported. */
  start(description: MachineDescription, folder: string): Promise<Machine>;

  /** Ends a machine that an earlier process of ours started in `folder` and lost; false when none runs there. */
  endLost(folder: string): Promise<boolean>;
}
