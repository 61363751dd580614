/**
 * A tree of images over plain files, so that the driver is tested against something small: images whose units
 * are all here, cold ones whose units come through `read` after a delay (or never, until told), and clones with
 * a layer in the layout that workers write to.
 */
import {
  closeSync,
  fdatasyncSync,
  ftruncateSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  unlinkSync,
} from 'node:fs';
import path from 'node:path';
import { setImmediate, setTimeout } from 'node:timers/promises';
import { DirectFile, preadFull, pwriteFull, visibleState } from '../../../src/core/direct-io.ts';
import { GridError } from '../../../src/core/errors.ts';
import { BLOCK_ABSENT, BLOCK_DATA, BLOCK_ZERO, UNIT_ABSENT, UNIT_PRESENT } from '../../../src/core/image.ts';
import type {
  DirectBase,
  DirectMap,
  Image,
  ImageTree,
  TreeEntry,
  TreePath,
} from '../../../src/core/image.ts';
import { punchHole } from '../../../src/core/linux.ts';

const UNIT = 64 * 1024;
const BLOCK = 4096;

/** What a file of the tree is made of; the folder it lies in is part of its path. */
export interface FileSpec {
  /** e.g. images/debian/12/disk.raw */
  readonly path: string;
  /** The plain bytes. */
  readonly source: string;
  readonly kind: 'image' | 'cold' | 'clone';
  readonly contentId: string;
  /** cold: before each answer. */
  readonly delayMs?: number;
  /** cold: bytes from here on never come until `release`. */
  readonly stuckFrom?: number;
  /** cold: bytes from here on are at no source any more. */
  readonly goneFrom?: number;
  /** Without a DirectMap every read goes through the main thread. */
  readonly indirect?: boolean;
  /** image: may be opened for writing, as memory of machines is. */
  readonly mapsPrivately?: true;
  /** image: gives itself for passthrough. 'folder': gives a descriptor that the kernel refuses. */
  readonly whole?: boolean | 'folder';
}

class FileImage implements Image {
  readonly sizeBytes: number;
  readonly writable: boolean;
  readonly direct?: DirectMap;
  reads = 0;
  readonly #spec: FileSpec;
  readonly #sourceFd: number;
  readonly #fds: number[] = [];
  readonly #file: DirectFile;
  readonly #units: Uint8Array;
  readonly #unstuck: Promise<void>;
  #closed = false;

  constructor(spec: FileSpec, scratch: string, unstuck: Promise<void>) {
    this.#spec = spec;
    this.#unstuck = unstuck;
    this.sizeBytes = statSync(spec.source).size;
    this.writable = spec.kind === 'clone';
    this.#sourceFd = this.#open(spec.source, 'r');
    const units = Math.ceil(this.sizeBytes / UNIT);
    const states = new SharedArrayBuffer(units);
    this.#units = new Uint8Array(states);
    this.#units.fill(spec.kind === 'cold' ? UNIT_ABSENT : UNIT_PRESENT);
    const scratchFile = (name: string) => path.join(scratch, `${spec.path.replaceAll('/', '_')}.${name}`);
    const base: DirectBase = {
      fd:
        spec.kind === 'cold' ? this.#open(scratchFile(`cache${Math.random()}`), 'wx+', true) : this.#sourceFd,
      unitBytes: UNIT,
      states,
      touched: new SharedArrayBuffer(units),
    };
    if (spec.kind === 'cold') ftruncateSync(base.fd, this.sizeBytes);
    let map: DirectMap = { sizeBytes: this.sizeBytes, base };
    if (this.writable) map = { ...map, layer: this.#openLayer(scratchFile) };
    this.#file = new DirectFile(map);
    if (!spec.indirect) this.direct = map;
  }

  #open(file: string, flags: string, remove = false): number {
    const fd = openSync(file, flags);
    if (remove) unlinkSync(file);
    this.#fds.push(fd);
    return fd;
  }

  #openLayer(scratchFile: (name: string) => string) {
    for (const name of ['data', 'map']) closeSync(openSync(scratchFile(name), 'a'));
    const fds = {
      dataFd: this.#open(scratchFile('data'), 'r+'),
      mapFd: this.#open(scratchFile('map'), 'r+'),
    };
    ftruncateSync(fds.dataFd, this.sizeBytes);
    const blocks = Math.ceil(this.sizeBytes / BLOCK);
    const states = new SharedArrayBuffer(blocks);
    preadFull(fds.mapFd, new Uint8Array(states), 0);
    const dirtyPages = new SharedArrayBuffer(Math.ceil(blocks / 4096));
    return { ...fds, mapOffsetBytes: 0, blockBytes: BLOCK, states, dirtyPages };
  }

  #check(): void {
    if (this.#closed) throw new GridError('bug', 'image used after close');
  }

  async read(target: Uint8Array, offsetBytes: number): Promise<void> {
    this.#check();
    this.reads++;
    if (this.#spec.kind === 'cold') {
      if (offsetBytes + target.length > (this.#spec.goneFrom ?? Infinity))
        throw new GridError('not-found', 'the store has no such chunk');
      if (offsetBytes + target.length > (this.#spec.stuckFrom ?? Infinity)) await this.#unstuck;
      await setTimeout(this.#spec.delayMs ?? 0);
      this.#check();
      const first = Math.floor(offsetBytes / UNIT);
      const last = Math.floor((offsetBytes + target.length - 1) / UNIT);
      for (let unit = first; unit <= last; unit++) {
        const bytes = Buffer.alloc(Math.min(UNIT, this.sizeBytes - unit * UNIT));
        preadFull(this.#sourceFd, bytes, unit * UNIT);
        pwriteFull(this.#file.map.base.fd, bytes, unit * UNIT);
        Atomics.store(this.#units, unit, UNIT_PRESENT);
      }
    }
    if (!this.#file.read(target, offsetBytes))
      throw new GridError('bug', 'a unit is absent after it was read');
  }

  async write(source: Uint8Array, offsetBytes: number): Promise<void> {
    this.#check();
    while (!this.#file.write(source, offsetBytes)) {
      const end = offsetBytes + source.length;
      if (offsetBytes % BLOCK !== 0) this.#fill(Math.floor(offsetBytes / BLOCK));
      if (end % BLOCK !== 0) this.#fill(Math.floor(end / BLOCK));
      await setImmediate();
    }
  }

  /** Makes a block DATA with the content that it has. */
  #fill(block: number): void {
    const state = visibleState(Atomics.load(new Uint8Array(this.#file.map.layer!.states), block));
    if (state === BLOCK_DATA) return;
    const old = Buffer.alloc(Math.min(BLOCK, this.sizeBytes - block * BLOCK));
    this.#file.read(old, block * BLOCK);
    this.#file.fillBlock(block, state, old);
  }

  async trim(offsetBytes: number, lengthBytes: number): Promise<void> {
    this.#check();
    const layer = this.#file.map.layer;
    if (!layer) throw new GridError('read-only', 'trim of an image');
    const states = new Uint8Array(layer.states);
    const end = offsetBytes + lengthBytes;
    const first = Math.ceil(offsetBytes / BLOCK);
    const last = Math.floor(end / BLOCK);
    if (first >= last) return this.write(Buffer.alloc(lengthBytes), offsetBytes);
    if (offsetBytes < first * BLOCK) await this.write(Buffer.alloc(first * BLOCK - offsetBytes), offsetBytes);
    if (last * BLOCK < end) await this.write(Buffer.alloc(end - last * BLOCK), last * BLOCK);
    for (let block = first; block < last; block++) {
      Atomics.compareExchange(states, block, BLOCK_DATA, BLOCK_ZERO);
      Atomics.compareExchange(states, block, BLOCK_ABSENT, BLOCK_ZERO);
    }
    pwriteFull(layer.mapFd, Buffer.alloc(last - first, BLOCK_ZERO), first);
    punchHole(layer.dataFd, first * BLOCK, (last - first) * BLOCK);
  }

  /** Claims that were not released. */
  claims = 0;

  async claimWhole(): Promise<{ fd: number; release(): void } | undefined> {
    this.#check();
    if (!this.#spec.whole) return undefined;
    this.claims++;
    const fd = this.#spec.whole === 'folder' ? this.#open('/', 'r') : this.#sourceFd;
    return { fd, release: () => void this.claims-- };
  }

  async flush(): Promise<void> {
    this.#check();
    if (this.#file.map.layer) fdatasyncSync(this.#file.map.layer.dataFd);
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    if (this.claims !== 0) throw new GridError('bug', 'image closed before its claim was released');
    for (const fd of this.#fds) closeSync(fd);
  }
}

/** Built from specs; `specs` may be replaced at any time, as tags move. */
export class FileTree implements ImageTree {
  specs: readonly FileSpec[];
  opens = 0;
  /** Images that are open now. */
  readonly openImages = new Set<FileImage>();
  readonly #scratch: string;
  readonly #unstuck = Promise.withResolvers<void>();

  constructor(specs: readonly FileSpec[], scratch: string) {
    this.specs = specs;
    this.#scratch = scratch;
  }

  /** Lets the stuck reads go on. */
  release(): void {
    this.#unstuck.resolve();
  }

  #find(names: TreePath): FileSpec | undefined {
    return this.specs.find((spec) => spec.path === names.join('/'));
  }

  async lookup(names: TreePath): Promise<TreeEntry | undefined> {
    const name = names.at(-1) ?? '';
    const spec = this.#find(names);
    if (spec) {
      return {
        name,
        type: 'file',
        sizeBytes: statSync(spec.source).size,
        writable: spec.kind === 'clone',
        modifiedMs: 1_000_000_000_123,
        contentId: spec.contentId,
        ...(spec.mapsPrivately ? { mapsPrivately: spec.mapsPrivately } : {}),
      };
    }
    const prefix = names.length === 0 ? '' : `${names.join('/')}/`;
    const isFolder = this.specs.some((other) => other.path.startsWith(prefix));
    return isFolder ? { name, type: 'directory', modifiedMs: 1_000_000_000_000 } : undefined;
  }

  async list(names: TreePath): Promise<TreeEntry[]> {
    const prefix = names.length === 0 ? '' : `${names.join('/')}/`;
    const children = new Set(
      this.specs
        .filter((spec) => spec.path.startsWith(prefix))
        .map((spec) => spec.path.slice(prefix.length).split('/')[0]!),
    );
    if (children.size === 0) throw new GridError('not-found', `no folder ${names.join('/')}`);
    const entries = await Promise.all([...children].toSorted().map((name) => this.lookup([...names, name])));
    return entries.filter((entry) => entry !== undefined);
  }

  async open(names: TreePath, { write }: { write: boolean }): Promise<Image> {
    const spec = this.#find(names);
    if (!spec) throw new GridError('not-found', `no file ${names.join('/')}`);
    if (write && spec.kind !== 'clone') throw new GridError('read-only', `${spec.path} is an image`);
    this.opens++;
    await setTimeout(spec.delayMs ?? 0);
    const image = new FileImage(spec, this.#scratch, this.#unstuck.promise);
    this.openImages.add(image);
    const { openImages } = this;
    const close = image.close.bind(image);
    image.close = async () => {
      await close();
      openImages.delete(image);
    };
    return image;
  }

  async space(): Promise<{ totalBytes: number; freeBytes: number }> {
    return { totalBytes: 100 * 2 ** 30, freeBytes: 40 * 2 ** 30 };
  }
}

/** Descriptors of this process by what they point to; for leak checks. */
export function openDescriptors(): number {
  return readdirSync('/proc/self/fd').length;
}

export function threadCount(): number {
  return Number(/^Threads:\s*(\d+)/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1]);
}
