/**
 * The clones of a host: which there are, which are open, when they go (clone-record.ts: what one is on disk).
 * `ROOT/clones/ID/clone.json` are the records, `ROOT/layers/…` the layers that they name, frozen ones shared.
 *
 * Every change is one rename: a clone appears and changes with its record, a clone that others are made from keeps
 * its disk and gets an empty layer over it in the same moment in which its own layer becomes a frozen one. What a
 * kill leaves (a layer without a record) is swept at the start, unless some record cannot be read.
 * What a layer is stays behind `CloneParts`.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, openSync } from 'node:fs';
import { mkdir, rename, rm, statfs } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { checkedNumber } from '../core/bytes.ts';
import { asGridError, GridError } from '../core/errors.ts';
import type { Image } from '../core/image.ts';
import { IMAGE_BYTES_MAX } from '../core/limits.ts';
import { tryLock } from '../core/linux.ts';
import { isName } from '../core/manifest.ts';
import { Turns } from '../core/turns.ts';
import { isVolatile, readRecords, syncFolder, writeRecord } from './clone-record.ts';
import { heldError } from './clone-parts.ts';
import type { CloneChain, CloneDisk, CloneParts, CreateOptions, DiskSnapshot } from './clone-parts.ts';
import type { CloneRecord, PushedState } from './clone-record.ts';
import { entryOf, fillingOf } from './clone-status.ts';
import type { CloneEntry, CloneStatus, Filling } from './clone-status.ts';
import { allocatedIn, LayerFolders } from './layer-folders.ts';
import { PutOff } from './put-off.ts';
import { SharedImage, usagesOf } from './shared-image.ts';

const STAT_TURN = 64;
/** The kernel tells of a file's last close some time after close(2) or the end of the VM that had it. */
const CLOSE_GRACE_MS = 1000;
const CLOSE_POLL_MS = 10;

export class Clones {
  readonly #root: string;
  readonly #parts: CloneParts;
  readonly #log: (line: string) => void;
  readonly #lockFd: number;
  readonly #records = new Map<string, CloneRecord>();
  readonly #layers: LayerFolders;
  readonly #open = new Map<string, SharedImage<CloneDisk>>();
  readonly #doomed = new Set<string>();
  /** Clones that `exclusive` holds, with what is done to them. */
  readonly #held = new Map<string, string>();
  readonly #fillings = new Map<string, Filling>();
  /** The last operation on each clone: open, close and removal of one clone never overlap. */
  readonly #turns = new Turns();
  readonly #unsynced = new PutOff((id, error) =>
    this.#log(`clone ${id} is not on the disk yet: ${String(error)}`),
  );

  private constructor(root: string, parts: CloneParts, log: (line: string) => void, lockFd: number) {
    this.#root = root;
    this.#parts = parts;
    this.#log = log;
    this.#lockFd = lockFd;
    this.#layers = new LayerFolders(path.join(root, 'layers'));
  }

  /** Reads the clones below `root` (made when missing); removes what a killed daemon left half-made. Throws in-use
   * when another process has them. */
  static async load(root: string, parts: CloneParts, log: (line: string) => void): Promise<Clones> {
    await mkdir(path.join(root, 'clones'), { recursive: true });
    const lockFd = openSync(path.join(root, 'lock'), 'a', 0o600);
    if (!tryLock(lockFd)) {
      closeSync(lockFd);
      throw new GridError(
        'in-use',
        `another proxy has the clones in ${root}; give this one another --state-dir`,
      );
    }
    const clones = new Clones(root, parts, log, lockFd);
    try {
      await clones.#read();
    } catch (error) {
      closeSync(lockFd);
      throw asGridError(error, `cannot read the clones in ${root}`);
    }
    return clones;
  }

  async #read(): Promise<void> {
    await this.#layers.make();
    const { records, unreadable } = await readRecords(path.join(this.#root, 'clones'), this.#log);
    for (const record of records) {
      this.#records.set(record.id, record);
      this.#layers.use(record.layers);
      // A killed daemon may have put it off.
      if (isVolatile(record)) this.#unsynced.add(record.id, () => this.#sync(record));
    }
    // The layers of one that cannot be read may be any of those that nobody else names.
    if (unreadable === 0) await this.#layers.sweep();
  }

  /** Goes on filling full clones where an earlier process stopped. Call it when images can be opened. */
  resumeFilling(): void {
    for (const record of this.#records.values()) {
      if (record.kind === 'full' && record.detached === undefined) this.#startFilling(record.id);
    }
  }

  /** Makes a clone; nothing is copied now. Throws exists, no-space, bad-request, and in-use for an open `from`. */
  async create(options: CreateOptions): Promise<CloneRecord> {
    const id = options.name ?? `c-${randomBytes(5).toString('hex')}`;
    if (!isName(id)) {
      throw new GridError(
        'bad-request',
        `'${String(id)}' cannot be a clone's name: use lower-case letters, digits, '.', '-' and '_'`,
      );
    }
    if (options.from !== undefined) await this.#lastClose(options.from);
    checkedNumber(options.sizeBytes, 'size of the clone in bytes', IMAGE_BYTES_MAX);
    const record = await this.#turns.run(id, async () => {
      if (this.#records.has(id)) throw new GridError('exists', `there is a clone '${id}' already`);
      const { from, kind = 'non-persistent' } = options;
      if (from !== undefined) this.get(from); // it cannot be the one that is being made
      const below =
        from === undefined ? undefined : await this.#turns.run(from, () => this.#freeze(from, id));
      const detached = options.detached ?? below?.detached;
      const putOff = isVolatile(options) && below === undefined && options.content === undefined;
      const layer = this.#layers.newName();
      const made: CloneRecord = {
        schema: 2,
        id,
        kind,
        image: options.image,
        base: options.base,
        layers: [...(below?.layers ?? []), layer],
        ...(detached === undefined ? {} : { detached }),
        sizeBytes: options.sizeBytes,
        ...(options.quotaBytes === undefined ? {} : { quotaBytes: options.quotaBytes }),
        ...(from === undefined ? {} : { parent: from }),
        created: new Date().toISOString(),
        ...(options.vm === undefined ? {} : { vm: options.vm }),
        ...(options.pushed === undefined ? {} : { pushed: options.pushed }),
      };
      const temporary = path.join(this.#root, 'clones', `.${id}.making`);
      // What lies below must not go before the record names it.
      this.#layers.use(made.layers);
      try {
        if (below && below.sizeBytes > made.sizeBytes) {
          throw new GridError(
            'bad-request',
            `clone '${from}' has ${below.sizeBytes} bytes; a clone of it cannot be smaller`,
          );
        }
        const folder = this.#layers.pathOf(layer);
        await this.#parts.createLayer(folder, this.#chainOf(made, -1), made.sizeBytes, !putOff);
        await options.content?.(this.#chainOf(made));
        await mkdir(temporary);
        await writeRecord(temporary, made, !putOff);
        await rename(temporary, this.#folderOf(id));
        if (putOff) this.#unsynced.add(id, () => this.#sync(made));
        else await syncFolder(path.join(this.#root, 'clones'));
        this.#records.set(id, made);
      } catch (error) {
        await rm(temporary, { recursive: true, force: true });
        await this.#layers.drop(made.layers);
        throw asGridError(error, `cannot make clone '${id}'`);
      }
      return made;
    });
    if (record.kind === 'full' && record.detached === undefined) this.#startFilling(id);
    return record;
  }

  /** Clones of a VM are as durable as any others when this resolves. Throws what the disk says. */
  async synced(ids: readonly string[]): Promise<void> {
    await Promise.all(ids.map((id) => this.#unsynced.done(id)));
  }

  async #sync(record: CloneRecord): Promise<void> {
    await this.#parts.syncLayer(this.#layers.pathOf(record.layers.at(-1)!));
    await writeRecord(this.#folderOf(record.id), record);
    await syncFolder(path.join(this.#root, 'clones'));
  }

  /** The disk of a stopped clone as layers that stay as they are; the clone goes on in a new, empty one. */
  async #freeze(id: string, child: string): Promise<CloneRecord> {
    const record = this.get(id);
    this.#checkFree(id, `made the base of '${child}'`);
    const disk = await this.#openDisk(record);
    let empty: boolean;
    try {
      // From here on these layers are read as of their last flush.
      await disk.flush();
      empty = disk.isEmpty();
    } finally {
      await disk.close();
    }
    if (empty) return { ...record, layers: record.layers.slice(0, -1) };
    const layer = this.#layers.newName();
    const next: CloneRecord = { ...record, layers: [...record.layers, layer] };
    try {
      await this.#parts.createLayer(this.#layers.pathOf(layer), this.#chainOf(next, -1), record.sizeBytes);
      await this.#replace(next);
    } catch (error) {
      await rm(this.#layers.pathOf(layer), { recursive: true, force: true });
      throw asGridError(error, `cannot freeze clone '${id}'`);
    }
    return record;
  }

  /** Changes a clone's quota (undefined: none), also while it is open. */
  setQuota(id: string, quotaBytes: number | undefined): Promise<void> {
    return this.#turns.run(id, async () => {
      const { quotaBytes: _before, ...record } = this.get(id);
      await this.#replace(quotaBytes === undefined ? record : { ...record, quotaBytes });
      this.#open.get(id)?.image.setQuota(quotaBytes);
      const filling = this.#fillings.get(id);
      if (filling?.failure !== undefined) this.#startFilling(id);
    });
  }

  get(id: string): CloneRecord {
    const record = this.#records.get(id);
    if (!record)
      throw new GridError('not-found', `there is no clone '${id}'; \`gridvfs clone ls\` lists them`);
    return record;
  }

  status(id: string): CloneStatus {
    const record = this.get(id);
    const filling = this.#fillings.get(id);
    const own = this.#layers.pathOf(record.layers.at(-1)!);
    return {
      ...record,
      allocatedBytes: allocatedIn(own) + allocatedIn(this.#folderOf(id)),
      sharedBytes: record.layers
        .slice(0, -1)
        .reduce((sum, name) => sum + allocatedIn(this.#layers.pathOf(name)), 0),
      open: this.#open.has(id),
      ...(filling === undefined ? {} : { filling: fillingOf(filling) }),
    };
  }

  /** All of them, in order of their making; other work goes on meanwhile. */
  async statuses(): Promise<CloneStatus[]> {
    const all: CloneStatus[] = [];
    for (const { id } of this.records()) {
      if (this.#records.has(id)) all.push(this.status(id));
      if (all.length % STAT_TURN === 0) await new Promise(setImmediate);
    }
    return all;
  }

  /** What was read and written of each clone since it was opened, for those that are open. */
  usages = () => usagesOf(this.#open);

  records(): CloneRecord[] {
    return [...this.#records.values()].toSorted((a, b) => (a.created < b.created ? -1 : 1));
  }

  /** For the mounted tree. */
  async list(): Promise<CloneEntry[]> {
    return [...this.#records.values()].map(entryOf);
  }

  /** For the mounted tree: one clone, or undefined. */
  async find(id: string): Promise<CloneEntry | undefined> {
    const record = this.#records.get(id);
    return record && entryOf(record);
  }

  /** Of the file system that the clones are on. */
  async space(): Promise<{ totalBytes: number; freeBytes: number }> {
    const { blocks, bavail, bsize } = await statfs(this.#root);
    return { totalBytes: blocks * bsize, freeBytes: bavail * bsize };
  }

  /** Opens a clone's disk; opens of one clone share it and each is closed by its opener. Throws in-use. */
  open(id: string): Promise<Image> {
    return this.#turns.run(id, () => this.#openShared(id));
  }

  async #openShared(id: string): Promise<Image> {
    const record = this.get(id);
    const held = this.#held.get(id);
    if (held !== undefined) throw heldError(id, held);
    let shared = this.#open.get(id);
    if (!shared) {
      shared = new SharedImage(await this.#openDisk(record), () =>
        this.#turns.run(id, () => this.#closed(id)),
      );
      this.#open.set(id, shared);
    }
    return shared.handle();
  }

  async #openDisk(record: CloneRecord): Promise<CloneDisk> {
    const disk = await this.#parts.openDisk(
      this.#chainOf(record),
      record.detached === undefined ? record.base : undefined,
    );
    disk.setQuota(record.quotaBytes);
    return disk;
  }

  /** Runs `task` over a clone's disk while nobody else can have it. `doing`: "clone X is being <doing>". Throws
   * in-use when somebody has it. */
  async exclusive<T>(
    id: string,
    doing: string,
    task: (disk: CloneDisk, record: CloneRecord) => Promise<T>,
  ): Promise<T> {
    await this.#lastClose(id);
    const disk = await this.#turns.run(id, async () => {
      const record = this.get(id);
      this.#checkFree(id, doing);
      this.#held.set(id, doing);
      return this.#openDisk(record).catch((error: unknown) => {
        this.#held.delete(id);
        throw error;
      });
    });
    try {
      return await task(disk, this.get(id));
    } finally {
      await disk.close();
      this.#held.delete(id);
    }
  }

  /** Runs `task` over a clone's disk as it is at one moment; others go on using the disk. Throws in-use while another
   * such task runs. */
  async atMoment<T>(
    id: string,
    task: (snapshot: DiskSnapshot, record: CloneRecord) => Promise<T>,
  ): Promise<T> {
    const handle = await this.open(id);
    try {
      const snapshot = await this.#open.get(id)!.image.snapshot();
      try {
        return await task(snapshot, this.get(id));
      } finally {
        snapshot.close();
      }
    } finally {
      await handle.close();
    }
  }

  /** Notes what of a clone is in the store. Durable when it resolves. */
  setPushed(id: string, pushed: PushedState): Promise<void> {
    return this.#turns.run(id, () => this.#replace({ ...this.get(id), pushed }));
  }

  /** Keeps a clone that nobody has open from everybody (`doing` as for `exclusive`); undefined: no longer. */
  hold(id: string, doing: string | undefined): void {
    if (doing === undefined) this.#held.delete(id);
    else this.#held.set(id, doing);
  }

  /** Folders of its layers, its own last. */
  layersOf(id: string): string[] {
    return this.get(id).layers.map((name) => this.#layers.pathOf(name));
  }

  /** Removes a clone and gives its space back. Throws in-use while somebody has it open. */
  async remove(id: string): Promise<void> {
    const wasFilling = await this.#stopFilling(id);
    await this.#lastClose(id);
    await this.#turns.run(id, async () => {
      this.get(id);
      try {
        this.#checkFree(id, 'removed');
      } catch (error) {
        if (wasFilling) this.#startFilling(id);
        throw error;
      }
      await this.#delete(id);
    });
  }

  /** Removes a clone now, or when its last user closes it. */
  async discard(id: string): Promise<void> {
    await this.#stopFilling(id);
    await this.#turns.run(id, async () => {
      if (!this.#records.has(id)) return;
      if (this.#open.has(id)) this.#doomed.add(id);
      else await this.#delete(id);
    });
  }

  /** Stops what goes on in the background and gives the folder free; the disks are closed by their openers. */
  async close(): Promise<void> {
    await Promise.all([...this.#fillings.keys()].map((id) => this.#stopFilling(id)));
    await this.#turns.over();
    await this.#unsynced.close();
    closeSync(this.#lockFd);
  }

  #startFilling(id: string): void {
    const stop = new AbortController();
    const { promise, resolve } = Promise.withResolvers<void>();
    const filling: Filling = { stop, ended: promise, doneBytes: 0, totalBytes: this.get(id).sizeBytes };
    this.#fillings.set(id, filling);
    void this.#fill(id, filling)
      .catch((error: unknown) => {
        if (stop.signal.aborted) return;
        filling.failure = error instanceof Error ? error.message : String(error);
        this.#log(`clone ${id} is not filled: ${filling.failure}`);
      })
      .finally(() => resolve());
  }

  async #fill(id: string, filling: Filling): Promise<void> {
    const handle = await this.open(id);
    try {
      const disk = this.#open.get(id)!.image;
      await disk.fillUp({
        signal: filling.stop.signal,
        onProgress(done, total) {
          filling.doneBytes = done;
          filling.totalBytes = total;
        },
      });
      await this.#turns.run(id, async () => {
        const record = this.get(id);
        await this.#replace({ ...record, layers: record.layers.slice(-1), detached: disk.baseDigest });
        await this.#layers.drop(record.layers.slice(0, -1));
      });
      this.#fillings.delete(id);
    } finally {
      await handle.close();
    }
  }

  async #stopFilling(id: string): Promise<boolean> {
    const filling = this.#fillings.get(id);
    if (!filling) return false;
    filling.stop.abort();
    await filling.ended;
    return this.#fillings.get(id) === filling && this.#fillings.delete(id);
  }

  async #closed(id: string): Promise<void> {
    const shared = this.#open.get(id);
    if (!shared || shared.users > 0) return; // opened again meanwhile
    this.#open.delete(id);
    await shared.image.close();
    if (this.#doomed.delete(id)) await this.#delete(id);
  }

  async #delete(id: string): Promise<void> {
    const record = this.get(id);
    await this.#unsynced.drop(id);
    const doomed = path.join(this.#root, 'clones', `.${id}.gone`);
    await rename(this.#folderOf(id), doomed);
    this.#records.delete(id);
    await rm(doomed, { recursive: true, force: true });
    await this.#layers.drop(record.layers);
  }

  /** Waits a moment for a close that may be on its way; not within a turn, which the close needs. */
  async #lastClose(id: string): Promise<void> {
    const deadline = performance.now() + CLOSE_GRACE_MS;
    while (this.#open.has(id) && !this.#fillings.has(id) && performance.now() < deadline)
      await sleep(CLOSE_POLL_MS);
  }

  #checkFree(id: string, doing: string): void {
    const held = this.#held.get(id);
    if (held !== undefined) throw heldError(id, held);
    if (!this.#open.has(id)) return;
    throw new GridError(
      'in-use',
      this.#fillings.has(id)
        ? `clone '${id}' is open: it is being filled; it can be ${doing} when that is done`
        : `clone '${id}' is open; stop its VM or close its file, then it can be ${doing}`,
    );
  }

  async #replace(next: CloneRecord): Promise<void> {
    await this.#unsynced.done(next.id);
    await writeRecord(this.#folderOf(next.id), next);
    const before = this.#records.get(next.id)!;
    this.#layers.use(next.layers.filter((name) => !before.layers.includes(name)));
    this.#records.set(next.id, next);
  }

  #chainOf(record: CloneRecord, end?: number): CloneChain {
    return {
      base: record.detached ?? record.base,
      layers: record.layers.slice(0, end).map((name) => this.#layers.pathOf(name)),
    };
  }

  #folderOf(id: string): string {
    return path.join(this.#root, 'clones', id);
  }
}
