/**
 * Makes a mount and ends it. Nothing of a mount that fails to start stays behind: workers load first, then the
 * mount is made, and whatever fails after that takes it down again.
 *
 * A mount ends in one of three ways, and `ended` tells which: unmounted by us or by anybody else; its connection
 * aborted or a worker failed (then the dead mount is detached); or this process dies, which leaves a mount that
 * answers ENOTCONN, for `cleanDeadMount`. A process that exits in the ordinary way takes its mounts along.
 *
 * A held mount (`MountOptions.held`) outlives this process however it ends, unless it was unmounted: another process
 * keeps the devices open, and the ledger says what the kernel knows. The next process finds the mount in the ledger
 * and takes it over: it opens what was open, gives the devices to its workers, and has the kernel send again what
 * the dead process took and did not answer. Never may it look at its own mount before that: it would wait for itself.
 *
 * Why a WRITE that is sent again does no harm: the kernel sends only what nobody answered, so whoever wrote it
 * still waits, and the same bytes go to the same place. A later write to that place that was acknowledged meanwhile
 * was under way at the same time, and which of two such writes is the last is open on any disk. The same holds for
 * trims; a flush that is done twice is a flush.
 */
import { closeSync, openSync, readSync } from 'node:fs';
import { checkedNumber } from '../../core/bytes.ts';
import { asGridError, GridError } from '../../core/errors.ts';
import type { ImageTree } from '../../core/image.ts';
import { FUSE_REQUEST_BYTES_MAX, KIB, MIB } from '../../core/limits.ts';
import {
  exitNow,
  isRoot,
  MNT_DETACH,
  MNT_FORCE,
  mount,
  MS_NODEV,
  MS_NOSUID,
  MS_RDONLY,
} from '../../core/linux.ts';
import { QuietPoints } from '../../core/quiet.ts';
import type { OperationFigures } from '../../core/usage.ts';
import { BackingFiles } from './backing.ts';
import { cloneDevice, DeviceWorkers } from './device.ts';
import { mountByHelper, takeDown, takeDownNow } from './fusermount.ts';
import { checkMountpoint, findMount, findMountSync, MOUNT_TYPE } from './mountinfo.ts';
import { Ledger } from './ledger.ts';
import { operationFigures } from './operation-times.ts';
import { encodeInitReply, encodeResend, REQUEST_BUFFER_BYTES } from './protocol.ts';
import { Readahead } from './readahead.ts';
import { Session } from './session.ts';
import { detachMount, released } from './unmount.ts';
import {
  COUNT_FORWARDED,
  COUNT_READ_BYTES,
  COUNT_READS,
  COUNT_WRITE_BYTES,
  COUNT_WRITES,
  send,
  TIMES_READ,
  TIMES_WRITE,
} from './worker.ts';

/** More than two on two cores: a worker that waits for the disk is not there for the others. */
export const WORKERS_DEFAULT = 4;
/** Each holds 2 MiB of buffers and a JavaScript engine. */
const WORKERS_MAX = 64;

/** The kernel's own default. More speeds up cold sequential reads and fetches chunks that nobody asked for. */
export const READAHEAD_BYTES_DEFAULT = 128 * KIB;
const READAHEAD_BYTES_MAX = 64 * MIB;

export interface MountOptions {
  /** What `findmnt` and `df` show as the source. */
  readonly fsName: string;
  /** Threads that answer reads and writes. */
  readonly workers?: number;
  /** Whether other users than the one who mounts may use the mount, within the files' modes (images 0444, clones 0600).
   * Default: true for root, because machines should not run as root; users may only where /etc/fuse.conf says
   * `user_allow_other`. */
  readonly allowOther?: boolean;
  /** No writes, not even to clones. */
  readonly readOnly?: boolean;
  /** Owner of everything in the mount; default this process's own. */
  readonly uid?: number;
  readonly gid?: number;
  /** Bound for the kernel's read-ahead. */
  readonly readaheadBytes?: number;
  /** Whether the kernel may read wholly local images by itself where it can. Default true. */
  readonly passthrough?: boolean;
  /** The process's quiet points, which the images below use too; default: some of its own. */
  readonly quiet?: QuietPoints;
  /** Devices and ledger that somebody keeps open beyond this process's end; with it the mount outlives us. */
  readonly held?: HeldDevices;
  /** As many threads as there are devices, of `prepareThreads` with the same quiet points: a successor has them before
   * it is its turn. They are the mount's from here on. */
  readonly threads?: MountThreads;
  /** Gets a line for each failed request and each trouble. */
  readonly log?: (message: string) => void;
}

export interface HeldDevices {
  /** Open /dev/fuse, once for each worker: the first is the session's, the others become clones of it. */
  readonly devices: readonly number[];
  /** The file of ledger.ts; empty at first. */
  readonly ledger: number;
}

/** Threads of a mount to come. */
export interface MountThreads {
  /** Ends them, where no mount came of it; nothing afterwards. */
  terminate(): Promise<void>;
}

/** Starts a mount's threads and resolves when they are loaded. */
export function prepareThreads(
  count: number,
  quiet: QuietPoints,
  log: (message: string) => void,
): Promise<MountThreads> {
  return DeviceWorkers.start(count, quiet, log);
}

export interface MountStatistics {
  /** Reads and writes answered by the workers alone. */
  readonly directReads: number;
  readonly directReadBytes: number;
  readonly directWrites: number;
  readonly directWriteBytes: number;
  /** Requests handed to the main thread: names, opens, reads of what is not here. */
  readonly forwarded: number;
  /** Reads among them, their bytes, and writes. */
  readonly indirectReads: number;
  readonly indirectReadBytes: number;
  readonly indirectWrites: number;
  /** Forwarded requests that failed for another reason than the caller's own. */
  readonly failures: number;
  /** Requests given up because whoever waited was killed. */
  readonly interrupted: number;
  /** Forwarded requests not answered yet. */
  readonly inFlight: number;
  /** How long requests took. */
  readonly operations: readonly OperationFigures[];
  /** Opens of images that the kernel reads by itself: their reads are in no count. */
  readonly passthroughOpens: number;
  readonly openFiles: number;
  /** Names that the kernel remembers. */
  readonly nodes: number;
}

export interface UnmountOptions {
  /** Detach the mount now though it is in use; `ended` resolves when the last user is gone. */
  readonly lazy?: boolean;
  /** Cut off everybody who uses it (their calls fail with ENOTCONN) and detach: for the end of a daemon. */
  readonly force?: boolean;
}

export interface MountEnd {
  readonly reason: 'unmounted' | 'failed';
  readonly error?: GridError;
}

export interface FuseMount {
  /** Resolved path. */
  readonly mountpoint: string;
  /** Resolves when the mount, its threads, descriptors and images are gone (`lazy`: when it is detached). Throws
   * in-use, with who uses it, and leaves the mount as it was. */
  unmount(options?: UnmountOptions): Promise<void>;
  /** Whether the mount goes on when this process dies, because somebody holds it and the kernel can resend. */
  readonly outlivesProcess: boolean;
  /** Resolves when everything is released, whoever ended the mount. Never rejects. */
  readonly ended: Promise<MountEnd>;
  statistics(): MountStatistics;
}

/**
 * The kernel driver: mounts `tree` at `mountpoint`, an empty folder. Throws unsupported (no /dev/fuse, old kernel, a user without
 * fusermount3), no-permission,
 * not-found, bad-request, in-use; then nothing is mounted and nothing runs.
 */
export async function mountKernel(
  tree: ImageTree,
  mountpoint: string,
  options: MountOptions,
): Promise<FuseMount> {
  const { held } = options;
  const workerCount = checkedNumber(
    held?.devices.length ?? options.workers ?? WORKERS_DEFAULT,
    'workers',
    WORKERS_MAX,
  );
  if (workerCount === 0) throw new GridError('bad-request', 'a mount needs at least one worker');
  const readaheadBytes = checkedNumber(
    options.readaheadBytes ?? READAHEAD_BYTES_DEFAULT,
    'readaheadBytes',
    READAHEAD_BYTES_MAX,
  );
  const log = options.log ?? (() => undefined);
  const ledger = held ? new Ledger(held.ledger, log) : undefined;
  const before = ledger?.read();
  const place = before ? before.mount.mountpoint : await checkMountpoint(mountpoint);
  const root = await tree.lookup([]);
  if (root?.type !== 'directory') throw new GridError('bug', 'the root of a tree is not a directory');
  const { threads } = options;
  const workers =
    threads instanceof DeviceWorkers
      ? threads
      : await DeviceWorkers.start(workerCount, options.quiet ?? new QuietPoints(), log);
  let backings: BackingFiles | undefined;
  let readahead: Readahead | undefined;
  const session = new Session({
    tree,
    root,
    owner: { uid: options.uid ?? process.getuid!(), gid: options.gid ?? process.getgid!() },
    readOnly: options.readOnly ?? false,
    log,
    opened: (handle, map) => {
      const met = map && new SharedArrayBuffer(map.base.states.byteLength);
      workers.broadcast({ kind: 'opened', handle, map, met });
    },
    released: (handle) => workers.broadcast({ kind: 'released', handle }),
    mapped: () => readahead?.lowForAMoment(),
    claim: async (image) => ((options.passthrough ?? true) ? backings?.claim(image) : undefined),
    ledger,
  });
  let sessionFd;
  try {
    sessionFd = before ? held!.devices[0]! : await attach(place, options);
  } catch (error) {
    await workers.terminate();
    throw error;
  }
  let owned = false;
  try {
    let fact = before?.mount;
    if (!fact) {
      const agreed = answerInit(sessionFd, readaheadBytes);
      const entry = await findMount(place);
      if (!entry) throw new GridError('local-io', `the mount at ${place} vanished while it was made`);
      readahead = new Readahead(entry.device, readaheadBytes, log);
      if (readaheadBytes > READAHEAD_BYTES_DEFAULT) readahead.apply();
      fact = { mountpoint: place, mountId: entry.id, ...agreed };
    } else {
      const entry = await findMount(place);
      readahead = entry && new Readahead(entry.device, readaheadBytes, log);
      readahead?.apply();
    }
    if (fact.passthrough) backings = new BackingFiles(sessionFd, log);
    await session.begin(fact, before, async (image, id) => backings?.adopt(image, id));
    const result = new Mount(place, fact.mountId, workers, session, log, held !== undefined && fact.resend);
    owned = true;
    result.serve(sessionFd, held?.devices.slice(1));
    if (before) askAgain(sessionFd, log);
    void result.ended.then(() => readahead?.close());
    return result;
  } catch (error) {
    if (!before) await takeDown(place, MNT_FORCE | MNT_DETACH);
    await workers.terminate();
    if (owned) workers.closeDescriptors();
    else if (!held) closeSync(sessionFd);
    throw error;
  }
}

/** What the dead process took and did not answer comes once more, marked as such. */
function askAgain(sessionFd: number, log: (message: string) => void): void {
  const notice = encodeResend();
  const failure = send(sessionFd, notice, notice.length);
  if (failure !== undefined) log(`what was under way is not asked again: ${failure}`);
}

/** Makes the mount: root by mount(2), users through fusermount3. Returns the session's descriptor. */
async function attach(place: string, options: MountOptions): Promise<number> {
  const data = [
    `max_read=${FUSE_REQUEST_BYTES_MAX}`,
    'default_permissions',
    ...((options.allowOther ?? isRoot()) ? ['allow_other'] : []),
  ];
  if (!isRoot()) {
    const fsName = options.fsName.replaceAll(/[\\,]/g, String.raw`\$&`);
    const names = [`fsname=${fsName}`, `subtype=${MOUNT_TYPE.replace('fuse.', '')}`];
    const fd = await mountByHelper(place, [...names, ...data, ...(options.readOnly ? ['ro'] : [])]);
    const kept = options.held?.devices[0];
    if (kept === undefined) return fd;
    // The holder has its own devices: the first becomes one more way to the session, and then the only one.
    try {
      cloneDevice(kept, fd);
      return kept;
    } catch (error) {
      await takeDown(place, MNT_FORCE | MNT_DETACH);
      throw asGridError(error, `cannot mount at ${place}`);
    } finally {
      closeSync(fd);
    }
  }
  const sessionFd = options.held?.devices[0] ?? openDevice();
  const owner = [`user_id=${process.getuid!()}`, `group_id=${process.getgid!()}`];
  const flags = MS_NOSUID | MS_NODEV | (options.readOnly ? MS_RDONLY : 0);
  try {
    const all = [`fd=${sessionFd}`, 'rootmode=40000', ...owner, ...data];
    mount(options.fsName, place, MOUNT_TYPE, flags, all.join(','));
    return sessionFd;
  } catch (error) {
    if (!options.held) closeSync(sessionFd);
    throw asGridError(error, `cannot mount at ${place}`);
  }
}

function openDevice(): number {
  try {
    return openSync('/dev/fuse', 'r+');
  } catch (cause) {
    throw new GridError('unsupported', `cannot open /dev/fuse: ${String(cause)}; try \`modprobe fuse\``, {
      cause,
    });
  }
}

/** The kernel queued INIT before mount(2) returned, so this read does not wait. What both sides can do. */
function answerInit(sessionFd: number, readaheadBytes: number): { passthrough: boolean; resend: boolean } {
  const request = Buffer.alloc(REQUEST_BUFFER_BYTES);
  const length = readSync(sessionFd, request, 0, request.length, null);
  const { reply, passthrough, resend } = encodeInitReply(request.subarray(0, length), readaheadBytes);
  const failure = send(sessionFd, reply, reply.length);
  if (failure !== undefined) throw new GridError('unsupported', failure);
  return { passthrough, resend };
}

/** Mounts of this process, for its end. */
const living = new Set<Mount>();

/**
 * Node waits for its threads when it exits, and a thread in the device waits for the kernel. Where the mount lives
 * on (held for a successor; detached but in use, in another mount namespace) only the end of the process ends it.
 */
process.on('exit', (code) => {
  const left = [...living].map((mount) => mount.abandon());
  if (left.includes(false)) exitNow(code);
});

/** How long the end of the process waits for its threads to leave the device: milliseconds, unless something is wrong. */
const LEAVE_TIMEOUT_MS = 200;

class Mount implements FuseMount {
  readonly mountpoint: string;
  readonly ended: Promise<MountEnd>;
  readonly #mountId: number;
  readonly #workers: DeviceWorkers;
  readonly #session: Session;
  readonly #log: (message: string) => void;
  readonly outlivesProcess: boolean;
  #failure: GridError | undefined;
  #over = false;

  constructor(
    mountpoint: string,
    mountId: number,
    workers: DeviceWorkers,
    session: Session,
    log: (message: string) => void,
    outlivesProcess: boolean,
  ) {
    this.outlivesProcess = outlivesProcess;
    this.mountpoint = mountpoint;
    this.#mountId = mountId;
    this.#workers = workers;
    this.#session = session;
    this.#log = log;
    this.ended = workers.gone.then(() => this.#finish());
  }

  serve(sessionFd: number, clones: readonly number[] | undefined): void {
    this.#workers.serve(
      sessionFd,
      clones,
      (bytes, reply) => this.#session.handle(bytes, reply),
      (failure) => void this.#fail(failure),
    );
    living.add(this);
  }

  /** One thread less means requests that nobody answers: the mount ends, and `ended` says why; a held one is left to
   * the next process, which has all its threads. */
  async #fail(failure: GridError): Promise<void> {
    this.#failure = failure;
    this.#log(failure.message);
    if (this.outlivesProcess) exitNow(1);
    await takeDown(this.mountpoint, MNT_FORCE | MNT_DETACH).catch(() => undefined);
  }

  async #isMounted(): Promise<boolean> {
    return (await findMount(this.mountpoint))?.id === this.#mountId;
  }

  /** After the last thread: nothing comes from the device any more. */
  async #finish(): Promise<MountEnd> {
    this.#over = true;
    living.delete(this);
    await this.#session.close();
    this.#workers.closeDescriptors();
    // Still mounted although the device is gone: somebody aborted the connection.
    if (await this.#isMounted()) {
      await takeDown(this.mountpoint, MNT_DETACH).catch(() => undefined);
      this.#failure ??= new GridError('closed', `the connection of the mount ${this.mountpoint} was aborted`);
    }
    return this.#failure ? { reason: 'failed', error: this.#failure } : { reason: 'unmounted' };
  }

  async unmount(options: UnmountOptions = {}): Promise<void> {
    await detachMount(this.mountpoint, this.#mountId, options, () => this.#over);
    if (!options.lazy || options.force) await released(this.mountpoint, this.ended);
  }

  /** At the end of the process: cuts everybody off, unless a successor serves them. Whether the threads are out of
   * the device then. */
  abandon(): boolean {
    if (this.outlivesProcess) return false;
    try {
      if (findMountSync(this.mountpoint)?.id === this.#mountId) {
        takeDownNow(this.mountpoint, MNT_FORCE | MNT_DETACH);
      }
    } catch {
      // Detached before, or somebody else was faster.
    }
    return this.#workers.haveLeft(LEAVE_TIMEOUT_MS);
  }

  statistics(): MountStatistics {
    const session = this.#session.statistics();
    return {
      directReads: this.#workers.sum(COUNT_READS),
      directReadBytes: this.#workers.sum(COUNT_READ_BYTES),
      directWrites: this.#workers.sum(COUNT_WRITES),
      directWriteBytes: this.#workers.sum(COUNT_WRITE_BYTES),
      forwarded: this.#workers.sum(COUNT_FORWARDED),
      ...session,
      operations: [
        operationFigures('read', 'worker', (index) => this.#workers.sum(TIMES_READ + index)),
        operationFigures('write', 'worker', (index) => this.#workers.sum(TIMES_WRITE + index)),
        ...session.operations,
      ],
    };
  }
}
