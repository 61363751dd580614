/**
 * What the kernel was told: node ids with their lookup counts, and images that open files share.
 *
 * A node is one content at one path: when a tag moves, the same path gets a new node, so pages and attributes
 * that the kernel keeps for a node stay true for ever. Ids are never used twice. Inode numbers for people
 * (stat, ls -i) come from path and content alone, so they are the same at every mount.
 */
import { createHash } from 'node:crypto';
import type { Image, TreeEntry, TreePath } from '../../core/image.ts';
import type { Backing } from './backing.ts';
import type { Fact, Ledger, NodeFact } from './ledger.ts';
import { Refusal, ROOT_NODE } from './protocol.ts';

export interface Node {
  readonly id: number;
  readonly path: TreePath;
  readonly key: string;
  readonly ino: number;
  /** As of the last look; type, size and content never change. */
  entry: TreeEntry;
  /** How often the kernel was given this id, less what it forgot. */
  lookups: number;
}

/** Path and content: what makes two nodes, and two open images, the same. */
export function keyOf(path: TreePath, entry: TreeEntry): string {
  return `${path.join('/')}\0${entry.type === 'file' ? entry.contentId : ''}`;
}

/** 52 bits of SHA-256: exact as a number, and a collision only confuses tools that compare inode numbers. */
export function inoOf(key: string): number {
  return createHash('sha256').update(key).digest().readUIntLE(0, 6) * 16 + 2;
}

export class NodeTable {
  readonly #byId = new Map<number, Node>();
  readonly #byKey = new Map<string, Node>();
  readonly #ledger: Ledger | undefined;
  #nextId = ROOT_NODE + 1;

  /** Where there is a ledger, it hears of every node before its `flush`. */
  constructor(root: TreeEntry, ledger?: Ledger) {
    this.#ledger = ledger;
    const node = { id: ROOT_NODE, path: [], key: keyOf([], root), ino: 1, entry: root, lookups: 1 };
    this.#byId.set(node.id, node);
    this.#byKey.set(node.key, node);
  }

  get size(): number {
    return this.#byId.size;
  }

  get nextId(): number {
    return this.#nextId;
  }

  /** Takes over what another process told the kernel. */
  restore(nodes: readonly NodeFact[], nextId: number): void {
    for (const { id, path, entry, lookups } of nodes) {
      const key = keyOf(path, entry);
      const node = { id, path, key, ino: inoOf(key), entry, lookups };
      this.#byId.set(id, node);
      this.#byKey.set(key, node);
    }
    this.#nextId = Math.max(this.#nextId, nextId);
  }

  /** All nodes but the root, for a ledger that begins anew. */
  *facts(): Generator<Fact> {
    for (const { id, lookups, path, entry } of this.#byId.values()) {
      if (id !== ROOT_NODE) yield ['node', id, lookups, path, entry];
    }
  }

  /** Throws ESTALE for an id that was never given out or is forgotten. */
  get(id: number): Node {
    const node = this.#byId.get(id);
    if (!node) throw new Refusal('ESTALE');
    return node;
  }

  /** The node of an entry that is about to be told to the kernel: counts one lookup. */
  remember(path: TreePath, entry: TreeEntry): Node {
    const key = keyOf(path, entry);
    let node = this.#byKey.get(key);
    if (!node) {
      node = { id: this.#nextId++, path, key, ino: inoOf(key), entry, lookups: 0 };
      this.#byId.set(node.id, node);
      this.#byKey.set(key, node);
      this.#ledger?.note(['node', node.id, 1, path, entry]);
    } else {
      this.#ledger?.note(['looked', node.id]);
    }
    node.entry = entry;
    node.lookups++;
    return node;
  }

  /** Inode number of an entry, also of one that the kernel has no node for. */
  inoOf(path: TreePath, entry: TreeEntry): number {
    const key = keyOf(path, entry);
    return this.#byKey.get(key)?.ino ?? inoOf(key);
  }

  forget(id: number, lookups: number): void {
    const node = this.#byId.get(id);
    if (!node || id === ROOT_NODE) return;
    this.#ledger?.note(['forgot', id, lookups]);
    node.lookups -= lookups;
    if (node.lookups > 0) return;
    this.#byId.delete(id);
    this.#byKey.delete(node.key);
  }
}

/** An image behind any number of open files; closed when the last one is gone and nothing is in flight. */
export interface SharedImage {
  readonly key: string;
  readonly image: Image;
  /** Where the kernel reads it by itself: for all of its opens alike. */
  readonly backing: Backing | undefined;
  users: number;
  inFlight: number;
}

export class ImageTable {
  /** Opening, open, or closing; a key that is closing is opened again only after that. */
  readonly #shares = new Map<string, { opened: Promise<SharedImage>; closed?: Promise<void> }>();
  readonly #log: (message: string) => void;

  readonly #claim: (image: Image) => Promise<Backing | undefined>;

  constructor(log: (message: string) => void, claim: (image: Image) => Promise<Backing | undefined>) {
    this.#log = log;
    this.#claim = claim;
  }

  get size(): number {
    return this.#shares.size;
  }

  /** The open image of `key`, by `open` when nobody has it open; equal concurrent calls share one `open`.
   * `mayBack`: whether the kernel may read it by itself. */
  async acquire(key: string, open: () => Promise<Image>, mayBack = true): Promise<SharedImage> {
    for (;;) {
      let share = this.#shares.get(key);
      if (share?.closed) {
        await share.closed;
        continue;
      }
      if (!share) {
        const opened = open().then(async (image): Promise<SharedImage> => {
          const backing = mayBack ? await this.#claim(image) : undefined;
          return { key, image, backing, users: 0, inFlight: 0 };
        });
        share = { opened };
        this.#shares.set(key, share);
        const mine = share;
        opened.catch(() => {
          if (this.#shares.get(key) === mine) this.#shares.delete(key);
        });
      }
      const image = await share.opened;
      // Whoever waited with us may have opened and closed it meanwhile.
      if (share.closed) continue;
      image.users++;
      return image;
    }
  }

  /** The open image of `key` as another process left it: read by the kernel through `backing`, or by nobody else. */
  adopt(
    key: string,
    open: () => Promise<Image>,
    claim: (image: Image) => Promise<Backing | undefined>,
  ): Promise<SharedImage> {
    const opened = open().then(async (image): Promise<SharedImage> => {
      return { key, image, backing: await claim(image), users: 0, inFlight: 0 };
    });
    this.#shares.set(key, { opened });
    return opened;
  }

  release(shared: SharedImage): void {
    shared.users--;
    this.#closeWhenIdle(shared);
  }

  /** Runs an operation on the image and keeps it open for as long. */
  async use<T>(shared: SharedImage, operation: (image: Image) => Promise<T>): Promise<T> {
    shared.inFlight++;
    try {
      return await operation(shared.image);
    } finally {
      shared.inFlight--;
      this.#closeWhenIdle(shared);
    }
  }

  #closeWhenIdle(shared: SharedImage): void {
    const share = this.#shares.get(shared.key);
    if (shared.users > 0 || shared.inFlight > 0 || !share || share.closed) return;
    shared.backing?.close();
    share.closed = shared.image
      .close()
      .catch((error: unknown) => this.#log(`closing an image failed: ${String(error)}`))
      .finally(() => this.#shares.delete(shared.key));
  }

  /** When no request can come any more. What is still in flight closes its image when it is done. */
  async releaseAll(): Promise<void> {
    const closing = [...this.#shares.values()].map(async (share) => {
      const shared = await share.opened.catch(() => undefined);
      if (!shared) return;
      shared.users = 0;
      this.#closeWhenIdle(shared);
      await share.closed;
    });
    await Promise.all(closing);
  }
}
