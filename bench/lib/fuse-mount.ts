/**
 * What bench/fuse.ts measures: a mount over one raw file, as the cache keeps an image (plain bytes in place), with a
 * clone over it made by the real layer, and further clones `fresh-<n>` with layers of their own. Run as a program:
 * arguments are mount point, raw file, a folder for the layer, the number of fresh clones and JSON options of the mount. Prints one JSON line when it is mounted; SIGTERM unmounts.
 */
import { fstatSync, openSync, readSync, statSync } from 'node:fs';
import { GridError } from '../../src/core/errors.ts';
import type { Digest } from '../../src/core/bytes.ts';
import { UNIT_PRESENT } from '../../src/core/image.ts';
import type { Image, ImageTree, TreeEntry, TreePath } from '../../src/core/image.ts';
import { CHUNK_BYTES_DEFAULT } from '../../src/core/limits.ts';
import { mountTree } from '../../src/frontend/fuse/index.ts';
import type { MountOptions } from '../../src/frontend/fuse/index.ts';
import { createLayer, openClone, openLayer } from '../../src/image/index.ts';

const BASE: Digest = 'b'.repeat(64);

function rawImage(file: string): Image {
  const fd = openSync(file, 'r');
  const sizeBytes = fstatSync(fd).size;
  const units = Math.ceil(sizeBytes / CHUNK_BYTES_DEFAULT);
  const base = {
    fd,
    unitBytes: CHUNK_BYTES_DEFAULT,
    states: new SharedArrayBuffer(units),
    touched: new SharedArrayBuffer(units),
  };
  new Uint8Array(base.states).fill(UNIT_PRESENT);
  const readOnly = async () => {
    throw new GridError('read-only', 'an image');
  };
  return {
    sizeBytes,
    writable: false,
    direct: { sizeBytes, base },
    read: async (target, offsetBytes) => void readSync(fd, target, 0, target.length, offsetBytes),
    write: readOnly,
    trim: readOnly,
    flush: async () => undefined,
    close: async () => undefined,
    claimWhole: async () => ({ fd, release: () => undefined }),
  };
}

class BenchTree implements ImageTree {
  readonly #file: string;
  /** Of each clone. */
  readonly #layers: ReadonlyMap<string, string>;

  constructor(file: string, layers: ReadonlyMap<string, string>) {
    this.#file = file;
    this.#layers = layers;
  }

  async lookup(path: TreePath): Promise<TreeEntry | undefined> {
    return path.length === 0
      ? { name: '', type: 'directory', modifiedMs: 0 }
      : (await this.list([])).find(({ name }) => path.length === 1 && name === path[0]);
  }

  async list(_path: TreePath): Promise<TreeEntry[]> {
    const { size } = statSync(this.#file);
    return [...this.#layers.keys(), 'image'].toSorted().map((name) => {
      return {
        name,
        type: 'file',
        sizeBytes: size,
        writable: name !== 'image',
        modifiedMs: 0,
        contentId: name,
      };
    });
  }

  async open([name]: TreePath): Promise<Image> {
    const image = rawImage(this.#file);
    const layer = this.#layers.get(name!);
    return layer === undefined ? image : openClone(image, await openLayer(layer, { baseDigest: BASE }));
  }

  async space() {
    return { totalBytes: 0, freeBytes: 0 };
  }
}

const [mountpoint, file, layer, fresh, json] = process.argv.slice(2) as [
  string,
  string,
  string,
  string,
  string,
];
const layers = new Map([['clone', layer]]);
for (let n = 1; n <= Number(fresh); n++) layers.set(`fresh-${n}`, `${layer}-fresh-${n}`);
for (const folder of layers.values())
  await createLayer(folder, { baseDigest: BASE, sizeBytes: statSync(file).size });
const mount = await mountTree(new BenchTree(file, layers), mountpoint, {
  fsName: 'gridvfs-bench',
  log: (line) => console.error(line),
  ...(JSON.parse(json) as Partial<MountOptions>),
});
process.on('SIGTERM', () => {
  mount.unmount({ force: true }).then(
    () => process.exit(0),
    (error: unknown) => {
      console.error(error);
      process.exit(1);
    },
  );
});
console.log(JSON.stringify({ mounted: mount.mountpoint }));
