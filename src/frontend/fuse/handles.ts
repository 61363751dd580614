/**
 * The file handles that the kernel holds: open files and listings. Every one is noted in the ledger, where there is
 * one, before its reply, with the request that asked for it: a successor answers that request, when the kernel sends
 * it again, with the handle that its predecessor made.
 */
import { asGridError, GridError } from '../../core/errors.ts';
import type { Image, ImageTree, TreeEntry } from '../../core/image.ts';
import type { Backing } from './backing.ts';
import type { Fact, Facts, Ledger } from './ledger.ts';
import type { ImageTable, Node, NodeTable, SharedImage } from './nodes.ts';
import { UNIQUE_RESEND } from './protocol.ts';

interface OpenFile {
  readonly node: Node;
  readonly shared: SharedImage;
  /** Of the request that made it. */
  readonly unique: number;
}

export interface Listing {
  readonly node: Node;
  readonly unique: number;
  /** With the folder itself and the one above in front. */
  readonly entries: readonly { readonly name: Buffer; readonly entry: TreeEntry }[];
}

/** What a successor opens files with. */
export interface Reopening {
  readonly tree: ImageTree;
  readonly readOnly: boolean;
  readonly nodes: NodeTable;
  readonly images: ImageTable;
  /** Takes over what the kernel reads an image from. */
  readonly adopt: (image: Image, backingId: number) => Promise<Backing | undefined>;
  readonly opened: (handle: number, shared: SharedImage) => void;
  readonly log: (message: string) => void;
}

export class HandleTable {
  readonly #ledger: Ledger | undefined;
  readonly #files = new Map<number, OpenFile>();
  readonly #listings = new Map<number, Listing>();
  /** Handles that another process made for requests that it may not have answered, by the requests' uniques. */
  readonly #made = new Map<number, number>();
  #next = 1;

  constructor(ledger: Ledger | undefined) {
    this.#ledger = ledger;
  }

  /** Open files. */
  get size(): number {
    return this.#files.size;
  }

  file(handle: number): SharedImage | undefined {
    return this.#files.get(handle)?.shared;
  }

  listing(handle: number): Listing | undefined {
    return this.#listings.get(handle);
  }

  /** The handle that the dead process made for this very request, when the kernel sends it again. */
  madeFor(unique: bigint): number | undefined {
    return (unique & UNIQUE_RESEND) === 0n ? undefined : this.#made.get(plain(unique));
  }

  addFile(node: Node, shared: SharedImage, unique: bigint): number {
    const handle = this.#next++;
    const file = { node, shared, unique: plain(unique) };
    this.#files.set(handle, file);
    this.#ledger?.note(fileFact(handle, file));
    return handle;
  }

  addListing(node: Node, entries: readonly TreeEntry[], unique: bigint): number {
    const handle = this.#next++;
    const listing = listingOf(node, entries, plain(unique));
    this.#listings.set(handle, listing);
    this.#ledger?.note(listingFact(handle, listing));
    return handle;
  }

  /** In the ledger when it returns: what the file was open on may be given back now. */
  removeFile(handle: number): void {
    this.#files.delete(handle);
    this.#ledger?.note(['released', handle]);
    this.#ledger?.flush();
  }

  /** False when there is no such listing. */
  removeListing(handle: number): boolean {
    if (!this.#listings.delete(handle)) return false;
    this.#ledger?.note(['released', handle]);
    return true;
  }

  clear(): void {
    this.#files.clear();
    this.#listings.clear();
  }

  /** All handles, for a ledger that begins anew. */
  *facts(nextNode: number): Generator<Fact> {
    yield ['next', nextNode, this.#next];
    for (const [handle, file] of this.#files) yield fileFact(handle, file);
    for (const [handle, listing] of this.#listings) yield listingFact(handle, listing);
  }

  /** Takes over what another process had open: by content, whatever the names mean by now. A file that cannot be
   * opened keeps its handle, and every use of it says why. */
  async restore(before: Facts, reopening: Reopening): Promise<void> {
    this.#next = Math.max(this.#next, before.nextHandle);
    for (const { handle, node, entries, unique } of before.listings) {
      this.#listings.set(handle, listingOf(reopening.nodes.get(node), entries, unique));
      this.#made.set(unique, handle);
    }
    const shares = new Map<string, Promise<SharedImage>>();
    const opening = before.files.map(async ({ handle, node: id, backing, unique }) => {
      const node = reopening.nodes.get(id);
      let share = shares.get(node.key);
      if (!share) {
        const claim = async (image: Image) =>
          backing === 0 ? undefined : await reopening.adopt(image, backing);
        share = reopening.images.adopt(node.key, () => openAgain(node, reopening), claim);
        shares.set(node.key, share);
      }
      const shared = await share;
      shared.users++;
      this.#files.set(handle, { node, shared, unique });
      this.#made.set(unique, handle);
      reopening.opened(handle, shared);
    });
    await Promise.all(opening);
  }
}

async function openAgain({ entry, path }: Node, { tree, readOnly, log }: Reopening): Promise<Image> {
  if (entry.type !== 'file') throw new GridError('bug', 'a folder is recorded as an open file');
  try {
    if (!tree.openContent) throw new GridError('unsupported', 'this tree cannot open a file by its content');
    return await tree.openContent(entry.contentId, { write: entry.writable && !readOnly });
  } catch (error) {
    const known = asGridError(error, `cannot open ${path.join('/')} again`);
    log(`${known.message}: whoever has it open gets errors`);
    const fail = () => Promise.reject(known);
    const { sizeBytes, writable } = entry;
    return {
      sizeBytes,
      writable,
      read: fail,
      write: fail,
      trim: fail,
      flush: fail,
      close: async () => undefined,
    };
  }
}

/** Without the bit that marks a request sent again; small enough to be exact. */
function plain(unique: bigint): number {
  return Number(unique & ~UNIQUE_RESEND);
}

function fileFact(handle: number, { node, shared, unique }: OpenFile): Fact {
  return ['file', handle, node.id, shared.backing?.id ?? 0, unique];
}

function listingFact(handle: number, { node, entries, unique }: Listing): Fact {
  return ['listing', handle, node.id, entries.slice(2).map(({ entry }) => entry), unique];
}

function listingOf(node: Node, listed: readonly TreeEntry[], unique: number): Listing {
  const itself = ['.', '..'].map((name) => ({ name: Buffer.from(name), entry: node.entry }));
  const entries = itself.concat(listed.map((entry) => ({ name: Buffer.from(entry.name), entry })));
  return { node, entries, unique };
}
