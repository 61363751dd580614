/**
 * The contract between a host's agent and the broker. The agent calls, always: it registers, reports, and asks for
 * orders over connections of its own, so hosts behind NAT and firewalls work and only the broker needs an address.
 *
 *   POST /v1/agent/register   HostFacts → Lease
 *   POST /v1/agent/report     HostReport → Lease         the heartbeat; results of orders travel in it, so what the
 *                                                        host says of its VMs and of its orders has one sequence
 *   GET  /v1/agent/orders     ?wait= ms → Order[]        long poll; an order is handed out until its result is in
 *
 * A VM has one name on hosts for each placement, `<vm>.<generation>`: an order that comes twice finds its VM there
 * already, and a placement that was given up is told from the one that replaced it.
 */
import type { ErrorCode } from './errors.ts';
import type { MachineSegment } from './machine.ts';

/** What a host is; changes only when its proxy starts again. */
export interface HostFacts {
  readonly host: string;
  /** Made at each start of the proxy: reports of an earlier one that come late are refused. */
  readonly incarnation: string;
  readonly vcpus: number;
  /** Total, and what guests may have of it: the rest is the host's own and the file service's. */
  readonly memoryBytes: number;
  readonly guestMemoryBytes: number;
  readonly guestVcpus: number;
  /** 'kvm' or 'tcg'; left out where no machine can run, and then why. */
  readonly accelerator?: string;
  readonly unusable?: string;
  /** The host is itself a VM. */
  readonly virtual: boolean;
  /** LANs that it says it is on. */
  readonly networks: readonly string[];
  /** What its proxy mounts. */
  readonly source: string;
}

/** A version that the host's source offers. */
export interface OfferedVersion {
  readonly name: string;
  readonly version: string;
  readonly manifest: string;
  readonly kind: string;
  readonly sizeBytes: number;
  readonly labels: Readonly<Record<string, string>>;
  readonly parent?: string;
  readonly created: string;
}

/** A VM of the broker's as the host sees it. */
export interface ReportedVm {
  /** `<vm>.<generation>`. */
  readonly name: string;
  readonly state: string;
  readonly reason?: string;
  readonly consoleSocket?: string;
  /** CPU time that the file service spent on it since it, or the host's proxy, started. */
  readonly cpuSeconds?: number;
}

/** A data volume as the host of a VM is told of it. */
export interface CarriedVolume {
  /** Name of the clone that is written to, on whatever host. */
  readonly id: string;
  /** What the guest finds it by: the disk's serial number. */
  readonly name: string;
  /** The version that it goes on from, or that is shown. */
  readonly manifest: string;
  /** As much as the version has at least. */
  readonly sizeBytes: number;
  readonly readOnly: boolean;
}

/** Where a volume's next version goes. */
export interface VolumeSave {
  readonly id: string;
  readonly reference: string;
}

/** What came of it; `reference` is left out where nothing was new, and `manifest` where the host has nothing of it. */
export interface SavedVolume {
  readonly id: string;
  readonly reference?: string;
  readonly manifest?: string;
  readonly storedBytes: number;
}

/** What became of a command in a guest. */
export interface GuestCommandResult {
  readonly exitCode: number;
  /** The end of what it said on standard output and error. */
  readonly output: string;
}

export interface OrderResult {
  readonly order: string;
  readonly error?: { readonly code: ErrorCode; readonly message: string };
  /** Milliseconds from the order's arrival at the host: clone there, machine started, guest ready. */
  readonly timeline?: { readonly clonedMs?: number; readonly startedMs?: number; readonly readyMs?: number };
  /** Bytes that the host's cache fetched meanwhile. */
  readonly fetchedBytes?: number;
  /** The version that came into the source, and what of it the source did not have, compressed. */
  readonly made?: { readonly manifest: string; readonly storedBytes: number };
  readonly saved?: readonly SavedVolume[];
  readonly command?: GuestCommandResult;
}

export interface HostReport {
  readonly host: string;
  readonly incarnation: string;
  /** Rises with every report of an incarnation. */
  readonly sequence: number;
  /** One-minute load average. */
  readonly load: number;
  /** Plain bytes in the host's cache, by disk manifest; those of its kernel and other parts are in the sum. */
  readonly warmBytes: Readonly<Record<string, number>>;
  readonly vms: readonly ReportedVm[];
  readonly results: readonly OrderResult[];
  /** Left out when they have not changed since the last report that arrived. */
  readonly versions?: readonly OfferedVersion[];
}

/** The broker's answer: the host may go on with VMs that would be started elsewhere when it falls silent. */
export interface Lease {
  /** From the moment the host sent its report. The broker itself waits longer, from when it answered. */
  readonly leaseMs: number;
  readonly reportEveryMs: number;
  /** VMs, as `<vm>.<generation>`, that run on this host by the broker's leave; others are to be ended at once. */
  readonly vms: readonly string[];
}

/** What the broker wants done; `id` is the same whenever it is asked for. */
export type Order =
  | {
      readonly id: string;
      readonly kind: 'run';
      readonly vm: string;
      readonly image: string;
      readonly memoryBytes: number;
      readonly vcpus: number;
      readonly network: 'user' | 'none';
      /** Virtual networks that it is on. */
      readonly segments?: readonly MachineSegment[];
      /** Attached while its guest boots. A checkpoint names its own. */
      readonly volumes?: readonly CarriedVolume[];
      /** Its seed; a checkpoint has its own. */
      readonly sshKeys?: readonly string[];
      readonly userData?: string;
      readonly hostName?: string;
      /** Started elsewhere when this host falls silent: paused here before its lease ends. */
      readonly restart: boolean;
      readonly readyTimeoutMs: number;
      /** Goes on from this one in the store; `image` is what it once booted from. */
      readonly checkpoint?: string;
    }
  /** Ends when the checkpoint is in the store. */
  | {
      readonly id: string;
      readonly kind: 'suspend';
      readonly vm: string;
      readonly checkpoint: string;
      /** Of volumes that it writes to. */
      readonly saves?: readonly VolumeSave[];
    }
  /** The same of a VM that goes on. */
  | {
      readonly id: string;
      readonly kind: 'checkpoint';
      readonly vm: string;
      readonly checkpoint: string;
      readonly saves?: readonly VolumeSave[];
    }
  /** A shell command in its guest. */
  | {
      readonly id: string;
      readonly kind: 'command';
      readonly vm: string;
      readonly command: string;
      readonly timeoutMs: number;
    }
  /** A stream to a TCP port of its guest, or its console, for the one who waits for `stream` at the broker. */
  | {
      readonly id: string;
      readonly kind: 'connect';
      readonly vm: string;
      readonly stream: string;
      readonly port: number;
    }
  | { readonly id: string; readonly kind: 'attach'; readonly vm: string; readonly volume: CarriedVolume }
  | { readonly id: string; readonly kind: 'detach'; readonly vm: string; readonly name: string }
  /** The first version of a volume: a copy of an image's content, or zeros. */
  | {
      readonly id: string;
      readonly kind: 'make-volume';
      readonly volume: string;
      readonly reference: string;
      readonly sizeBytes: number;
      readonly from?: string;
    }
  /** `last`: nobody writes to it any more. */
  | {
      readonly id: string;
      readonly kind: 'save-volume';
      readonly volume: string;
      readonly reference: string;
      readonly last: boolean;
    }
  /** What this host has of it is of no use any more. */
  | { readonly id: string; readonly kind: 'drop-volume'; readonly volume: string }
  /** Its disk, as it is at a moment, becomes a version in the source. */
  | {
      readonly id: string;
      readonly kind: 'commit';
      readonly vm: string;
      readonly reference: string;
      readonly labels?: Readonly<Record<string, string>>;
    }
  | { readonly id: string; readonly kind: 'stop'; readonly vm: string; readonly graceMs: number }
  | { readonly id: string; readonly kind: 'warm'; readonly image: string }
  /** Looks at the source's tags now; the next report has them. */
  | { readonly id: string; readonly kind: 'refresh' };

/** Instead of a TCP port: the guest's first serial console, with the end of what it said before. */
export const CONSOLE_PORT = 0;

/** Names of VMs on hosts that are a broker's. */
export const PLACED_VM = /^g[0-9a-f]{12}\.\d{1,9}$/;
/** Names of data volumes, and of the images that are their versions. */
export const VOLUME_IMAGE = /^d[0-9a-f]{12}$/;
/** Names of images that are checkpoints of a broker's VMs, or their disks and states: nobody else's to start. */
export const CHECKPOINT_IMAGE = /^g[0-9a-f]{12}(\.disk|\.state)?$/;

/** How long a host may go on without an answer, and how long the broker waits until it takes its VMs for lost. The
 * difference covers clocks that run apart, a host that is slow to pause, and an answer that is long under way. */
export const LEASE_MS = 20_000;
export const LEASE_MARGIN_MS = 10_000;
export const REPORT_EVERY_MS = 4_000;
/** Shorter than what proxies and NAT tables cut. */
export const ORDERS_WAIT_MS = 20_000;
