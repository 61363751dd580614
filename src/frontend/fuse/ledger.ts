/**
 * What the kernel was told through a mount, in a file that outlives the daemon: a successor that takes the mount
 * over believes what its ledger says. Node ids with their lookup counts, open files with what they are open on and
 * by which backing id, open listings, and what INIT agreed on.
 *
 * Invariants:
 *  - A fact is in the file before the reply that tells it to the kernel (`flush` before every reply). So the ledger
 *    may hold facts that the kernel never heard of (a lookup too many: the node stays until the end of the mount),
 *    never the other way round. Reads and writes of files make no facts and cost nothing here.
 *  - The file is unlinked and shared with the holder; power loss ends mount and ledger together, so nothing is
 *    ever synced. A process that is killed in the middle of an append leaves a short last record, whose reply was
 *    not sent: it is ignored.
 *  - A ledger that cannot be written to any more (no space) says so in its header and is void: no takeover then.
 *
 *   header        0  "GVFSLEDG"
 *                 8  u32 version 1
 *                12  u32 1 while the ledger is good, 0 when it is void
 *                16  u64 where the first record begins
 *   from there on    records to the end of the file: u32 length, then that many bytes of JSON, a `Fact`
 *
 * When far more was appended than is true now, the facts that are true are written once more at the end, and the
 * header's one word moves the beginning there; the space before it is given back.
 */
import { fstatSync, readSync, writeSync } from 'node:fs';
import { GridError } from '../../core/errors.ts';
import type { TreeEntry, TreePath } from '../../core/image.ts';
import { MIB } from '../../core/limits.ts';
import { punchHole } from '../../core/linux.ts';

const MAGIC = 'GVFSLEDG';
const VERSION = 1;
const HEADER_BYTES = 4096;
const GOOD_AT = 12;
const START_AT = 16;
/** Below this the appended facts are not worth a rewriting. */
const REWRITE_BYTES_MIN = 1 * MIB;

/** One record. Uniques are those of the requests, without the bit that marks a request sent again. */
export type Fact =
  /** The mount is made: what `MountFact` says. First of all records. */
  | readonly ['mount', MountFact]
  /** Ids below these may have been given out, also those of no other fact. */
  | readonly ['next', node: number, handle: number]
  | readonly ['node', id: number, lookups: number, path: TreePath, entry: TreeEntry]
  | readonly ['looked', id: number]
  | readonly ['forgot', id: number, lookups: number]
  /** `backing`: passthrough id, or 0. */
  | readonly ['file', handle: number, node: number, backing: number, unique: number]
  | readonly ['listing', handle: number, node: number, entries: readonly TreeEntry[], unique: number]
  | readonly ['released', handle: number];

export interface MountFact {
  /** Resolved path, and its id in /proc/self/mountinfo. */
  readonly mountpoint: string;
  readonly mountId: number;
  /** What INIT agreed on. */
  readonly passthrough: boolean;
  readonly resend: boolean;
}

export interface NodeFact {
  readonly id: number;
  lookups: number;
  readonly path: TreePath;
  readonly entry: TreeEntry;
}

export interface FileFact {
  readonly handle: number;
  readonly node: number;
  readonly backing: number;
  readonly unique: number;
}

export interface ListingFact {
  readonly handle: number;
  readonly node: number;
  readonly entries: readonly TreeEntry[];
  readonly unique: number;
}

/** All that is true at the end of a ledger. */
export interface Facts {
  readonly mount: MountFact;
  readonly nextNode: number;
  readonly nextHandle: number;
  readonly nodes: readonly NodeFact[];
  readonly files: readonly FileFact[];
  readonly listings: readonly ListingFact[];
}

export class Ledger {
  readonly #fd: number;
  readonly #log: (message: string) => void;
  #pending: Fact[] = [];
  #endBytes: number;
  #startBytes = HEADER_BYTES;
  /** Of the facts that were true when they were last written together. */
  #rewrittenBytes = 0;
  #void = false;

  /** `fd`: an empty file, or one that an earlier process left a ledger in. */
  constructor(fd: number, log: (message: string) => void) {
    this.#fd = fd;
    this.#log = log;
    this.#endBytes = Math.max(HEADER_BYTES, fstatSync(fd).size);
  }

  /** What the last daemon left: undefined when it left nothing that a successor could go on from. Throws
   * bad-format, newer-format. */
  read(): Facts | undefined {
    const sizeBytes = fstatSync(this.#fd).size;
    if (sizeBytes < HEADER_BYTES) return undefined;
    const header = this.#readAt(0, HEADER_BYTES);
    if (header.toString('latin1', 0, 8) !== MAGIC) {
      throw new GridError('bad-format', 'what the holder keeps for this mount is not a ledger');
    }
    const version = header.readUInt32LE(8);
    if (version !== VERSION) {
      throw new GridError(
        'newer-format',
        `the ledger of this mount has version ${version}, this gridvfs reads ${VERSION}; unmount and mount again`,
      );
    }
    if (header.readUInt32LE(GOOD_AT) !== 1) return undefined;
    this.#startBytes = Number(header.readBigUInt64LE(START_AT));
    return replay(this.#records(this.#startBytes, sizeBytes));
  }

  *#records(startBytes: number, endBytes: number): Generator<Fact> {
    const bytes = this.#readAt(startBytes, endBytes - startBytes);
    for (let at = 0; at + 4 <= bytes.length;) {
      const next = at + 4 + bytes.readUInt32LE(at);
      if (next > bytes.length) return; // cut short by the end of its writer: nobody was told
      yield JSON.parse(bytes.toString('utf8', at + 4, next)) as Fact;
      at = next;
    }
  }

  #readAt(offsetBytes: number, lengthBytes: number): Buffer {
    const bytes = Buffer.alloc(lengthBytes);
    let done = 0;
    while (done < lengthBytes) {
      const count = readSync(this.#fd, bytes, done, lengthBytes - done, offsetBytes + done);
      if (count === 0) break;
      done += count;
    }
    return bytes.subarray(0, done);
  }

  /** Takes a fact; it is in the file after the next `flush`. */
  note(fact: Fact): void {
    if (!this.#void) this.#pending.push(fact);
  }

  /** Everything noted is in the file when it returns: called before every reply. */
  flush(): void {
    if (this.#pending.length === 0) return;
    const bytes = encode(this.#pending);
    this.#pending = [];
    this.#guarded(() => {
      this.#writeAt(bytes, this.#endBytes);
      this.#endBytes += bytes.length;
    });
  }

  /** Whether so much was appended that `rewrite` is worth its while. */
  get wantsRewrite(): boolean {
    const bytes = this.#endBytes - this.#startBytes;
    return !this.#void && bytes > REWRITE_BYTES_MIN && bytes > 4 * this.#rewrittenBytes;
  }

  /** Begins anew with the facts that are true now; 'mount' is the first of them. */
  rewrite(facts: Iterable<Fact>): void {
    this.#pending = [];
    const bytes = encode(facts);
    this.#guarded(() => {
      const startBytes = this.#endBytes;
      this.#writeAt(bytes, startBytes);
      this.#endBytes = startBytes + bytes.length;
      // One write within a page: whoever reads the header sees the old beginning or the new one.
      this.#writeAt(headerOf(startBytes), 0);
      punchHole(this.#fd, HEADER_BYTES, startBytes - HEADER_BYTES);
      this.#startBytes = startBytes;
      this.#rewrittenBytes = bytes.length;
    });
  }

  #guarded(write: () => void): void {
    if (this.#void) return;
    try {
      write();
    } catch (error) {
      this.#void = true;
      this.#log(`the mount will not outlive this proxy: its ledger cannot be written (${String(error)})`);
      // The page is there already, so this cannot meet a full disk.
      if (fstatSync(this.#fd).size > 0) writeSync(this.#fd, Buffer.alloc(4), 0, 4, GOOD_AT);
    }
  }

  #writeAt(bytes: Buffer, offsetBytes: number): void {
    let done = 0;
    while (done < bytes.length) {
      done += writeSync(this.#fd, bytes, done, bytes.length - done, offsetBytes + done);
    }
  }
}

function headerOf(startBytes: number): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  header.write(MAGIC, 0, 'latin1');
  header.writeUInt32LE(VERSION, 8);
  header.writeUInt32LE(1, GOOD_AT);
  header.writeBigUInt64LE(BigInt(startBytes), START_AT);
  return header;
}

function encode(facts: Iterable<Fact>): Buffer {
  const parts: Buffer[] = [];
  for (const fact of facts) {
    const body = Buffer.from(JSON.stringify(fact));
    const length = Buffer.alloc(4);
    length.writeUInt32LE(body.length);
    parts.push(length, body);
  }
  return Buffer.concat(parts);
}

function replay(records: Iterable<Fact>): Facts | undefined {
  const nodes = new Map<number, NodeFact>();
  const files = new Map<number, FileFact>();
  const listings = new Map<number, ListingFact>();
  let mount: MountFact | undefined;
  let [nextNode, nextHandle] = [0, 0];
  for (const fact of records) {
    switch (fact[0]) {
      case 'mount':
        mount = fact[1];
        break;
      case 'next':
        [, nextNode, nextHandle] = fact;
        break;
      case 'node': {
        const [, id, lookups, path, entry] = fact;
        nodes.set(id, { id, lookups, path, entry });
        nextNode = Math.max(nextNode, id + 1);
        break;
      }
      case 'looked':
        nodes.get(fact[1])!.lookups++;
        break;
      case 'forgot': {
        const node = nodes.get(fact[1]);
        if (node && (node.lookups -= fact[2]) <= 0) nodes.delete(node.id);
        break;
      }
      case 'file': {
        const [, handle, node, backing, unique] = fact;
        files.set(handle, { handle, node, backing, unique });
        nextHandle = Math.max(nextHandle, handle + 1);
        break;
      }
      case 'listing': {
        const [, handle, node, entries, unique] = fact;
        listings.set(handle, { handle, node, entries, unique });
        nextHandle = Math.max(nextHandle, handle + 1);
        break;
      }
      case 'released':
        files.delete(fact[1]);
        listings.delete(fact[1]);
        break;
    }
  }
  if (!mount) return undefined;
  return {
    mount,
    nextNode,
    nextHandle,
    nodes: [...nodes.values()],
    files: [...files.values()],
    listings: [...listings.values()],
  };
}
