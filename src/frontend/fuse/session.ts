/**
 * Answers every request that a worker does not answer itself: all names and opens, and reads and writes of what
 * is not on this host. Runs in the main thread and never blocks it. Knows the tree and the protocol, not the
 * device: requests come as bytes with a function that sends the reply.
 *
 * What it decides:
 *  - names never change through the mount: every call that would is EROFS, for root too;
 *  - a file keeps its size: truncation is EPERM on a clone (so `cat x > disk.raw` destroys nothing), a write
 *    beyond the end EFBIG (one across the end is short), plain preallocation EOPNOTSUPP because a layer promises
 *    no space;
 *  - mode, owner and times of a clone cannot be stored, so setting them is EPERM and not a silent success;
 *  - an image that is wholly on this host is read by the kernel itself (backing.ts), decided at its first open and
 *    kept until its last release;
 *  - pages are kept across opens: an image's content never changes, and a clone changes only through this mount;
 *  - names are believed for a second (a moved tag is seen after that), an image's attributes for an hour;
 *  - a signal does not interrupt a read, as on a disk, unless it kills the reader.
 */
import type { DirectMap, Image, ImageTree, TreeEntry } from '../../core/image.ts';
import { FUSE_REQUEST_BYTES_MAX } from '../../core/limits.ts';
import type { Backing } from './backing.ts';
import { Call, CallTable } from './calls.ts';
import { HandleTable } from './handles.ts';
import type { Reopening } from './handles.ts';
import type { Fact, Facts, Ledger, MountFact } from './ledger.ts';
import { ImageTable, NodeTable } from './nodes.ts';
import type { Node, SharedImage } from './nodes.ts';
import * as fuse from './protocol.ts';
import { Refusal } from './protocol.ts';
import type { Owner } from './protocol.ts';

export interface SessionOptions {
  readonly tree: ImageTree;
  readonly root: TreeEntry;
  readonly owner: Owner;
  readonly readOnly: boolean;
  readonly log: (message: string) => void;
  /** Called before the kernel learns the handle, and after it gave it back. */
  readonly opened: (handle: number, map: DirectMap | undefined) => void;
  readonly released: (handle: number) => void;
  /** Called before the answer to an open of what will be mapped and read page by page: readahead.ts. */
  readonly mapped?: () => void;
  /** For passthrough, where the kernel and we agreed on it. */
  readonly claim?: (image: Image) => Promise<Backing | undefined>;
  /** Hears of all that the kernel is told, where the mount is to outlive this process. */
  readonly ledger?: Ledger | undefined;
}

const NAME_TTL_SECONDS = 1;
const IMMUTABLE_TTL_SECONDS = 3600;

const O_ACCMODE = 3;
const O_TRUNC = 0o1000;

const EMPTY = Buffer.alloc(0);

export class Session {
  readonly #options: SessionOptions;
  readonly #nodes: NodeTable;
  readonly #images: ImageTable;
  readonly #calls: CallTable;
  readonly #ledger: Ledger | undefined;
  readonly #handles: HandleTable;
  #mount: MountFact | undefined;
  #failures = 0;
  #reads = 0;
  #readBytes = 0;
  #writes = 0;
  #passthroughOpens = 0;

  constructor(options: SessionOptions) {
    this.#options = options;
    this.#ledger = options.ledger;
    this.#handles = new HandleTable(options.ledger);
    this.#nodes = new NodeTable(options.root, options.ledger);
    this.#images = new ImageTable(options.log, options.claim ?? (async () => undefined));
    this.#calls = new CallTable();
  }

  /** Before the first request. `before`: what another process told the kernel through this mount; the files that it
   * had open are opened again, those that the kernel reads by itself with what `adopt` gives. */
  async begin(
    mount: MountFact,
    before?: Facts,
    adopt: Reopening['adopt'] = async () => undefined,
  ): Promise<void> {
    const { tree, readOnly, log, opened } = this.#options;
    this.#mount = mount;
    if (before) {
      const [nodes, images] = [this.#nodes, this.#images];
      nodes.restore(before.nodes, before.nextNode);
      await this.#handles.restore(before, {
        ...{ tree, readOnly, nodes, images, adopt, log },
        opened: (handle, { image }) => opened(handle, image.direct),
      });
    }
    this.#ledger?.rewrite(this.#facts(mount));
  }

  /** All that is true now, for a ledger that begins anew. */
  *#facts(mount: MountFact): Generator<Fact> {
    yield ['mount', mount];
    yield* this.#nodes.facts();
    yield* this.#handles.facts(this.#nodes.nextId);
  }

  /** Takes one request; `bytes` stays with the session. `reply` is called once, or never for FORGET and the like. */
  handle(bytes: Buffer, reply: (bytes: Buffer) => void): void {
    if (bytes.length < fuse.IN_HEADER_BYTES) return; // nobody to answer
    const recorded = (answer: Buffer) => {
      this.#record();
      reply(answer);
    };
    const call = new Call(new fuse.Request(bytes), this.#ledger ? recorded : reply);
    if (this.#handleUnanswered(call.request)) {
      this.#record();
      return;
    }
    void this.#run(call);
  }

  #record(): void {
    this.#ledger?.flush();
    if (this.#mount && this.#ledger?.wantsRewrite) this.#ledger.rewrite(this.#facts(this.#mount));
  }

  async #run(call: Call): Promise<void> {
    this.#calls.add(call, INTERRUPTIBLE.has(call.request.opcode));
    try {
      await this.#dispatch(call);
    } catch (error) {
      if (!(error instanceof Refusal) && !call.answered) {
        this.#failures++;
        const what = error instanceof Error ? error.message : String(error);
        this.#options.log(`request ${call.request.opcode} failed: ${what}`);
      }
      call.refuse(error);
    } finally {
      this.#calls.remove(call);
    }
  }

  #dispatch(call: Call): void | Promise<void> {
    switch (call.request.opcode) {
      case fuse.LOOKUP:
        return this.#lookup(call);
      case fuse.GETATTR:
        return this.#getattr(call);
      case fuse.SETATTR:
        return this.#setattr(call);
      case fuse.OPEN:
        return this.#open(call);
      case fuse.READ:
        return this.#read(call);
      case fuse.WRITE:
        return this.#write(call);
      case fuse.FALLOCATE:
        return this.#fallocate(call);
      case fuse.FSYNC:
        return this.#fsync(call);
      case fuse.RELEASE:
        return this.#release(call);
      case fuse.OPENDIR:
        return this.#opendir(call);
      case fuse.READDIR:
        return this.#readdir(call, false);
      case fuse.READDIRPLUS:
        return this.#readdir(call, true);
      case fuse.RELEASEDIR:
        return this.#releasedir(call);
      case fuse.STATFS:
        return this.#statfs(call);
      case fuse.DESTROY:
        return call.answer(EMPTY);
      case fuse.SYMLINK:
      case fuse.MKNOD:
      case fuse.MKDIR:
      case fuse.UNLINK:
      case fuse.RMDIR:
      case fuse.RENAME:
      case fuse.RENAME2:
      case fuse.LINK:
      case fuse.CREATE:
      case fuse.TMPFILE:
      case fuse.SETXATTR:
      case fuse.REMOVEXATTR:
        throw new Refusal('EROFS');
      default:
        // The kernel then does without it and does not ask again: FLUSH, GETXATTR, LSEEK, COPY_FILE_RANGE, …
        throw new Refusal('ENOSYS');
    }
  }

  /** Requests that have no reply. */
  #handleUnanswered(request: fuse.Request): boolean {
    try {
      switch (request.opcode) {
        case fuse.FORGET:
          this.#nodes.forget(request.nodeId, request.u64(0));
          return true;
        case fuse.BATCH_FORGET:
          for (let i = 0, count = request.u32(0); i < count; i++) {
            this.#nodes.forget(request.u64(8 + i * 16), request.u64(16 + i * 16));
          }
          return true;
        case fuse.INTERRUPT:
          this.#calls.interrupt(request.bytes.readBigUInt64LE(fuse.IN_HEADER_BYTES));
          return true;
        default:
          return false;
      }
    } catch {
      return true; // shorter than its fields
    }
  }

  async #lookup(call: Call): Promise<void> {
    const parent = this.#nodes.get(call.request.nodeId);
    if (parent.entry.type !== 'directory') throw new Refusal('ENOTDIR');
    const path = [...parent.path, call.request.name(0)];
    const entry = await this.#options.tree.lookup(path);
    if (!entry) throw new Refusal('ENOENT');
    if (call.answered) return;
    const out = Buffer.alloc(fuse.ENTRY_BYTES);
    this.#writeEntry(out, 0, this.#nodes.remember(path, entry));
    call.answer(out);
  }

  /** u64 nodeid, generation, name TTL s, attr TTL s; u32 both in ns; attr. */
  #writeEntry(target: Buffer, at: number, node: Node): void {
    fuse.writeU64(target, at, node.id);
    fuse.writeU64(target, at + 16, NAME_TTL_SECONDS);
    fuse.writeU64(target, at + 24, attrTtlSeconds(node.entry));
    fuse.writeAttr(target, at + 40, node.entry, node.ino, this.#options.owner);
  }

  /** u64 TTL s, u32 ns, u32 0, attr. */
  #answerAttr(call: Call, node: Node): void {
    const out = Buffer.alloc(16 + fuse.ATTR_BYTES);
    fuse.writeU64(out, 0, attrTtlSeconds(node.entry));
    fuse.writeAttr(out, 16, node.entry, node.ino, this.#options.owner);
    call.answer(out);
  }

  async #getattr(call: Call): Promise<void> {
    const node = this.#nodes.get(call.request.nodeId);
    const { entry } = node;
    if (entry.type === 'directory' || entry.writable) {
      const now = await this.#options.tree.lookup(node.path);
      if (now?.type === entry.type && (now.type !== 'file' || sameFile(now, entry))) node.entry = now;
      // A removed clone that is still open keeps the attributes it had.
      else if (entry.type === 'directory') throw new Refusal('ENOENT');
    }
    this.#answerAttr(call, node);
  }

  /** u32 valid, u32 0, u64 fh, u64 size, … */
  #setattr(call: Call): void {
    const node = this.#nodes.get(call.request.nodeId);
    const { entry } = node;
    if (entry.type !== 'file' || !entry.writable || this.#options.readOnly) throw new Refusal('EROFS');
    const valid = call.request.u32(0) & ~fuse.FATTR_NEUTRAL;
    const sameSize = call.request.u64(16) === entry.sizeBytes;
    if (valid !== 0 && !(valid === fuse.FATTR_SIZE && sameSize)) throw new Refusal('EPERM');
    this.#answerAttr(call, node);
  }

  /** u32 flags, u32 0 → u64 fh, u32 open flags, i32 backing id. */
  async #open(call: Call): Promise<void> {
    const node = this.#nodes.get(call.request.nodeId);
    const { entry } = node;
    if (entry.type !== 'file') throw new Refusal('EISDIR');
    const flags = call.request.u32(0);
    const writes = (flags & O_ACCMODE) !== 0 || (flags & O_TRUNC) !== 0;
    const mayWrite = entry.mapsPrivately ?? (entry.writable && !this.#options.readOnly);
    if (writes && !mayWrite) throw new Refusal('EROFS');
    if ((flags & O_TRUNC) !== 0) throw new Refusal('EPERM');
    const made = this.#handles.madeFor(call.request.unique);
    const file = made === undefined ? undefined : this.#handles.file(made);
    if (file) return this.#answerOpen(call, made!, file);
    // By passthrough, an open for writing would reach the cache's own file.
    const mayBack = entry.mapsPrivately === undefined;
    const shared = await this.#images.acquire(node.key, () => this.#openImage(node), mayBack);
    if (call.answered) {
      this.#images.release(shared);
      return;
    }
    const handle = this.#handles.addFile(node, shared, call.request.unique);
    this.#options.opened(handle, shared.image.direct);
    if (writes && entry.mapsPrivately) this.#options.mapped?.();
    this.#answerOpen(call, handle, shared);
  }

  #answerOpen(call: Call, handle: number, shared: SharedImage): void {
    if (shared.backing) {
      this.#passthroughOpens++;
      call.answer(openReply(handle, fuse.FOPEN_PASSTHROUGH, shared.backing.id));
    } else {
      call.answer(openReply(handle, fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_PARALLEL_DIRECT_WRITES));
    }
  }

  /** Opens by path what was looked up by content: ESTALE when the path means something else by now, at which the
   * kernel looks the name up again. All opens of a clone share one writable image. */
  async #openImage(node: Node): Promise<Image> {
    const { tree, readOnly } = this.#options;
    const check = async () => {
      const now = await tree.lookup(node.path);
      if (now?.type !== 'file' || !sameFile(now, node.entry)) throw new Refusal('ESTALE');
      return now;
    };
    const { writable, sizeBytes } = await check();
    const image = await tree.open(node.path, { write: writable && !readOnly });
    try {
      await check();
      if (image.sizeBytes !== sizeBytes) throw new Refusal('ESTALE');
      return image;
    } catch (error) {
      await image.close();
      throw error;
    }
  }

  #file(call: Call): SharedImage {
    const shared = this.#handles.file(call.request.u64(0));
    if (!shared) throw new Refusal('EBADF');
    return shared;
  }

  /** u64 fh, u64 offset, u32 size, … → data, fewer bytes at the end of the file. */
  async #read(call: Call): Promise<void> {
    const shared = this.#file(call);
    const [offsetBytes, wantedBytes] = [call.request.u64(8), call.request.u32(16)];
    if (wantedBytes > FUSE_REQUEST_BYTES_MAX) throw new Refusal('EINVAL');
    const lengthBytes = Math.max(0, Math.min(wantedBytes, shared.image.sizeBytes - offsetBytes));
    const reply = Buffer.allocUnsafe(fuse.OUT_HEADER_BYTES + lengthBytes);
    const target = reply.subarray(fuse.OUT_HEADER_BYTES);
    if (lengthBytes > 0) await this.#images.use(shared, (image) => image.read(target, offsetBytes));
    this.#reads++;
    this.#readBytes += lengthBytes;
    shared.image.usage?.countRead(lengthBytes);
    call.answerWhole(reply);
  }

  /** u64 fh, u64 offset, u32 size, u32 flags, u64 owner, u32 flags, u32 0, data → u32 size (less
   * at the end of the file), u32 0. */
  async #write(call: Call): Promise<void> {
    const shared = this.#file(call);
    const [offsetBytes, lengthBytes] = [call.request.u64(8), call.request.u32(16)];
    const start = fuse.IN_HEADER_BYTES + fuse.WRITE_BODY_BYTES;
    const data = call.request.bytes.subarray(start, start + lengthBytes);
    if (data.length !== lengthBytes) throw new Refusal('EINVAL');
    const inside = Math.min(lengthBytes, shared.image.sizeBytes - offsetBytes);
    if (inside <= 0 && lengthBytes > 0) throw new Refusal('EFBIG');
    if (inside > 0) {
      await this.#images.use(shared, (image) => image.write(data.subarray(0, inside), offsetBytes));
    }
    this.#writes++;
    shared.image.usage?.countWrite(inside);
    const out = Buffer.alloc(8);
    out.writeUInt32LE(inside, 0);
    call.answer(out);
  }

  /** u64 fh, u64 offset, u64 length, u32 mode, u32 0. */
  async #fallocate(call: Call): Promise<void> {
    const shared = this.#file(call);
    const [offsetBytes, lengthBytes] = [call.request.u64(8), call.request.u64(16)];
    const mode = call.request.u32(24);
    const { sizeBytes } = shared.image;
    if (mode === fuse.FALLOC_ZERO_RANGE) {
      if (offsetBytes + lengthBytes > sizeBytes) throw new Refusal('EFBIG');
    } else if (mode !== fuse.FALLOC_PUNCH_HOLE_KEEP_SIZE && mode !== fuse.FALLOC_ZERO_RANGE_KEEP_SIZE) {
      throw new Refusal('EOPNOTSUPP');
    }
    const inside = Math.min(lengthBytes, sizeBytes - offsetBytes);
    if (inside > 0) await this.#images.use(shared, (image) => image.trim(offsetBytes, inside));
    call.answer(EMPTY);
  }

  async #fsync(call: Call): Promise<void> {
    const shared = this.#file(call);
    if (shared.image.writable) await this.#images.use(shared, (image) => image.flush());
    call.answer(EMPTY);
  }

  #release(call: Call): void {
    const shared = this.#file(call);
    const handle = call.request.u64(0);
    // First of all: a successor must not believe in a backing id that was given back to the kernel.
    this.#handles.removeFile(handle);
    this.#options.released(handle);
    this.#images.release(shared);
    call.answer(EMPTY);
  }

  /** The listing of this open, as of now: what is read from it later is neither torn nor doubled. */
  async #opendir(call: Call): Promise<void> {
    const node = this.#nodes.get(call.request.nodeId);
    if (node.entry.type !== 'directory') throw new Refusal('ENOTDIR');
    const made = this.#handles.madeFor(call.request.unique);
    if (made !== undefined && this.#handles.listing(made)) {
      call.answer(openReply(made, 0));
      return;
    }
    const entries = await this.#options.tree.list(node.path);
    if (call.answered) return;
    call.answer(openReply(this.#handles.addListing(node, entries, call.request.unique), 0));
  }

  /** u64 fh, u64 index of the first entry, u32 size, … → entries, as many as fit; `plus`: each after its node. */
  #readdir(call: Call, plus: boolean): void {
    const listing = this.#handles.listing(call.request.u64(0));
    if (!listing) throw new Refusal('EBADF');
    const out = Buffer.alloc(Math.min(call.request.u32(16), FUSE_REQUEST_BYTES_MAX));
    let at = 0;
    for (let index = call.request.u64(8); index < listing.entries.length; index++) {
      const { name, entry } = listing.entries[index]!;
      const next = at + fuse.direntBytes(name) + (plus ? fuse.ENTRY_BYTES : 0);
      if (next > out.length) break;
      const itself = index < 2;
      const path = itself ? listing.node.path : [...listing.node.path, entry.name];
      const ino = itself ? listing.node.ino : this.#nodes.inoOf(path, entry);
      if (plus) {
        if (!itself) this.#writeEntry(out, at, this.#nodes.remember(path, entry));
        at += fuse.ENTRY_BYTES;
      }
      const type = entry.type === 'directory' ? fuse.DT_DIRECTORY : fuse.DT_REGULAR;
      fuse.writeDirent(out, at, { ino, next: index + 1, type, name });
      at = next;
    }
    call.answer(out.subarray(0, at));
  }

  #releasedir(call: Call): void {
    if (!this.#handles.removeListing(call.request.u64(0))) throw new Refusal('EBADF');
    call.answer(EMPTY);
  }

  /** u64 blocks, bfree, bavail, files, ffree; u32 bsize, namelen, frsize, padding; 24 spare. */
  async #statfs(call: Call): Promise<void> {
    const { totalBytes, freeBytes } = await this.#options.tree.space();
    const out = Buffer.alloc(80);
    fuse.writeU64(out, 0, Math.floor(totalBytes / 4096));
    fuse.writeU64(out, 8, Math.floor(freeBytes / 4096));
    fuse.writeU64(out, 16, Math.floor(freeBytes / 4096));
    out.writeUInt32LE(4096, 40);
    out.writeUInt32LE(255, 44);
    out.writeUInt32LE(4096, 48);
    call.answer(out);
  }

  statistics() {
    return {
      indirectReads: this.#reads,
      indirectReadBytes: this.#readBytes,
      indirectWrites: this.#writes,
      failures: this.#failures,
      ...this.#calls.statistics(),
      passthroughOpens: this.#passthroughOpens,
      openFiles: this.#handles.size,
      nodes: this.#nodes.size,
    };
  }

  /** After the last request: no reply is sent any more, images close as soon as nothing of theirs is in flight. */
  async close(): Promise<void> {
    this.#calls.abandon();
    this.#handles.clear();
    await this.#images.releaseAll();
  }
}

function attrTtlSeconds(entry: TreeEntry): number {
  return entry.type === 'file' && !entry.writable ? IMMUTABLE_TTL_SECONDS : NAME_TTL_SECONDS;
}

function sameFile(a: TreeEntry, b: TreeEntry): boolean {
  return a.type === 'file' && b.type === 'file' && a.contentId === b.contentId;
}

function openReply(handle: number, flags: number, backingId = 0): Buffer {
  const out = Buffer.alloc(16);
  fuse.writeU64(out, 0, handle);
  out.writeUInt32LE(flags, 8);
  out.writeInt32LE(backingId, 12);
  return out;
}

/** Not WRITE and FALLOCATE: one that was given up could still happen, after a later one was acknowledged. */
const INTERRUPTIBLE = new Set([
  fuse.LOOKUP,
  fuse.GETATTR,
  fuse.OPEN,
  fuse.READ,
  fuse.STATFS,
  fuse.FSYNC,
  fuse.OPENDIR,
]);
