/**
 * The life of a layer's folder: create, open (with recovery after a crash), remove. The format and its invariants
 * stand in layer-format.ts. Nothing half-made is ever under the layer's own name; what a kill leaves under a
 * hidden name is removed by `sweepLayers`.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, constants, fstatSync, ftruncateSync, lstatSync, openSync, readSync } from 'node:fs';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import { checkedNumber, isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { preadExact, pwriteExact } from '../core/direct-io.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { BLOCK_DATA, BLOCK_ZERO } from '../core/image.ts';
import { IMAGE_BYTES_MAX, LAYER_BLOCK_BYTES } from '../core/limits.ts';
import { nextData, punchHole, tryLock } from '../core/linux.ts';
import {
  blockCountOf,
  BOOT_ID_AT,
  currentBootId,
  DATA_FILE,
  DURABLE_MAP_FILE,
  encodeHeader,
  HEADER_BYTES,
  LAYER_FILES,
  MAP_FILE,
  mapFileBytes,
  PAGE_BLOCKS,
  parseHeader,
} from './layer-format.ts';
import type { LayerHeader } from './layer-format.ts';
import { mergeBelow } from './chain.ts';
import type { OpenFrozen } from './chain.ts';
import { Layer } from './layer.ts';

/** Names of folders that are being made or removed: `.<name>.making-<random>`. */
const HIDDEN_PATTERN = /^\..+\.(?:making|removing)-[0-9a-f]{16}$/;
/** A hidden folder is left alone for so long: its maker may not have locked it yet. */
const SWEEP_AGE_MS = 60_000;

function hiddenName(folder: string, doing: 'making' | 'removing'): string {
  const name = `.${path.basename(folder)}.${doing}-${randomBytes(8).toString('hex')}`;
  return path.join(path.dirname(folder), name);
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/**
 * Makes an empty layer for a disk of `sizeBytes` over the image `baseDigest`, at `folder`, whose parent exists.
 * Takes three pages on disk. When it resolves, the layer survives power loss, unless `durable` is false: then when
 * `syncLayer` has resolved. Throws exists, no-space, not-found
 * (the parent), bad-request; nothing is left then.
 */
export async function createLayer(
  folder: string,
  options: { readonly baseDigest: Digest; readonly sizeBytes: number; readonly durable?: boolean },
): Promise<void> {
  if (!isDigest(options.baseDigest)) {
    throw new GridError('bad-request', `'${String(options.baseDigest)}' is not the digest of a base image`);
  }
  const { durable = true } = options;
  const sizeBytes = checkedNumber(options.sizeBytes, 'size of the clone in bytes', IMAGE_BYTES_MAX);
  const header: LayerHeader = {
    baseDigest: options.baseDigest,
    sizeBytes,
    createdMs: Date.now(),
    id: randomBytes(16).toString('hex'),
    bootId: '',
  };
  const made = hiddenName(folder, 'making');
  const make = async (name: string, fileBytes: number, head?: Buffer) => {
    const handle = await open(path.join(made, name), 'wx', 0o600);
    try {
      // Against a sweep in another process, for as long as the folder is being made.
      if (name === DATA_FILE) tryLock(handle.fd);
      if (head) await handle.write(head, 0, head.length, 0);
      await handle.truncate(fileBytes);
      if (durable) await handle.sync();
    } catch (error) {
      await handle.close();
      throw error;
    }
    return handle;
  };
  const handles: Awaited<ReturnType<typeof open>>[] = [];
  try {
    if (lstatSync(folder, { throwIfNoEntry: false })) {
      throw new GridError('exists', `${folder} is there already; choose another name or remove it`);
    }
    await mkdir(made, { mode: 0o700 });
    handles.push(await make(DATA_FILE, sizeBytes));
    const mapBytes = mapFileBytes(sizeBytes);
    handles.push(await make(DURABLE_MAP_FILE, mapBytes, encodeHeader(header)));
    handles.push(await make(MAP_FILE, mapBytes, encodeHeader({ ...header, bootId: currentBootId() })));
    if (durable) await syncFolder(made);
    await rename(made, folder);
    if (durable) await syncFolder(path.dirname(folder));
  } catch (error) {
    await rm(made, { recursive: true, force: true });
    // rename(2) onto a folder that came into being meanwhile.
    if (errnoOf(error) === 'ENOTEMPTY')
      throw new GridError('exists', `${folder} is there already`, { cause: error });
    throw asGridError(error, `cannot create layer ${folder}`);
  } finally {
    for (const handle of handles) await handle.close();
  }
}

/** A layer as it was made, which may be open, survives power loss when this resolves. */
export async function syncLayer(folder: string): Promise<void> {
  for (const name of [DATA_FILE, DURABLE_MAP_FILE, MAP_FILE, '.', '..'])
    await syncFolder(path.join(folder, name));
}

function openFile(folder: string, name: string): number {
  return openSync(path.join(folder, name), constants.O_RDWR | constants.O_NOFOLLOW);
}

export function readHeader(fd: number, file: string): LayerHeader {
  const bytes = Buffer.alloc(HEADER_BYTES);
  return parseHeader(bytes.subarray(0, readSync(fd, bytes, 0, HEADER_BYTES, 0)), file);
}

/**
 * Opens the layer at `folder` over the image `baseDigest`, and recovers it when the host's kernel is another than
 * the one that it was last written under. Costs what the layer holds, not what the disk's size is. Throws
 * not-found, in-use (open in this or another process), wrong-base, bad-format, newer-format, no-space.
 * `below` are the frozen layers under it (chain.ts): the layer's descriptors from here on, also when it throws.
 * `bootId` is for tests.
 */
export async function openLayer(
  folder: string,
  options: { readonly baseDigest: Digest; readonly below?: readonly OpenFrozen[]; readonly bootId?: string },
): Promise<Layer> {
  const below = options.below ?? [];
  const fds: number[] = below.map(({ fd }) => fd);
  const openTracked = (name: string) => {
    const fd = openFile(folder, name);
    fds.push(fd);
    return fd;
  };
  try {
    const dataFd = openTracked(DATA_FILE);
    if (!tryLock(dataFd)) {
      throw new GridError('in-use', `layer ${folder} is open already; stop the VM or daemon that has it`);
    }
    const durableFd = openTracked(DURABLE_MAP_FILE);
    const mapFd = openTracked(MAP_FILE);
    const durableFile = path.join(folder, DURABLE_MAP_FILE);
    const mapFile = path.join(folder, MAP_FILE);
    const header = readHeader(durableFd, durableFile);
    if (header.baseDigest !== options.baseDigest) {
      throw new GridError(
        'wrong-base',
        `layer ${folder} belongs to base ${header.baseDigest}, not to ${options.baseDigest}`,
      );
    }
    const mapHeader = readHeader(mapFd, mapFile);
    if (mapHeader.id !== header.id) {
      throw new GridError('bad-format', `${mapFile} and ${durableFile} belong to different layers`);
    }
    checkLength(dataFd, header.sizeBytes, path.join(folder, DATA_FILE));
    checkLength(durableFd, mapFileBytes(header.sizeBytes), durableFile);

    const bootId = options.bootId ?? currentBootId();
    const blockCount = blockCountOf(header.sizeBytes);
    const states = new SharedArrayBuffer(blockCount);
    const dirtyPages = new SharedArrayBuffer(Math.ceil(blockCount / PAGE_BLOCKS));
    const view = new Uint8Array(states);
    let dataBlocks: number;
    if (mapHeader.bootId === bootId) {
      checkLength(mapFd, mapFileBytes(header.sizeBytes), mapFile);
      dataBlocks = loadStates(mapFd, view, mapFile);
      // What was written since the last flush is not known any more: the next one writes every page in use.
      for (const [first, count] of extentsOf(mapFd)) {
        new Uint8Array(dirtyPages).fill(1, first >>> 12, ((first + count - 1) >>> 12) + 1);
      }
    } else {
      dataBlocks = loadStates(durableFd, view, durableFile);
      restoreMap(durableFd, mapFd, view);
      dropUnnamedData(dataFd, view);
      pwriteExact(mapFd, Buffer.from(bootId.padEnd(36, '\0'), 'latin1'), 36, BOOT_ID_AT);
    }
    mergeBelow(view, below);
    const frozen = below.map(({ fd, sizeBytes }) => ({ fd, sizeBytes }));
    return new Layer(
      folder,
      header,
      { dataFd, mapFd, durableFd },
      { states, dirtyPages, dataBlocks, frozen },
    );
  } catch (error) {
    for (const fd of fds) closeSync(fd);
    throw asGridError(error, `cannot open layer ${folder}`);
  }
}

export function checkLength(fd: number, expectedBytes: number, file: string): void {
  const { size } = fstatSync(fd);
  if (size !== expectedBytes) {
    throw new GridError('bad-format', `${file} is ${size} bytes long where the layer needs ${expectedBytes}`);
  }
}

/** [first block, blocks] where a map file is not a hole; elsewhere every block is absent. */
export function* extentsOf(fd: number): Generator<[first: number, count: number]> {
  for (let at = HEADER_BYTES; ;) {
    const extent = nextData(fd, at);
    if (!extent) return;
    yield [extent.start - HEADER_BYTES, extent.end - extent.start];
    at = extent.end;
  }
}

/** Returns how many blocks have data. */
function loadStates(fd: number, states: Uint8Array, file: string): number {
  let dataBlocks = 0;
  for (const [first, count] of extentsOf(fd)) {
    preadExact(fd, states, first, count, HEADER_BYTES + first);
    for (let block = first; block < first + count; block++) {
      const state = states[block]!;
      if (state > BLOCK_ZERO) {
        throw new GridError('bad-format', `${file} is damaged: block ${block} is marked ${state}`);
      }
      if (state === BLOCK_DATA) dataBlocks++;
    }
  }
  return dataBlocks;
}

/** The working map as the durable one; blocks that the durable map does not have are absent again. */
function restoreMap(durableFd: number, mapFd: number, states: Uint8Array): void {
  ftruncateSync(mapFd, HEADER_BYTES);
  ftruncateSync(mapFd, HEADER_BYTES + states.length);
  for (const [first, count] of extentsOf(durableFd)) {
    pwriteExact(mapFd, states.subarray(first, first + count), count, HEADER_BYTES + first);
  }
}

/** Gives back the space of blocks that were written after the last flush and that no map names any more. */
function dropUnnamedData(dataFd: number, states: Uint8Array): void {
  for (let at = 0; ;) {
    const extent = nextData(dataFd, at);
    if (!extent) return;
    at = extent.end;
    const last = Math.ceil(extent.end / LAYER_BLOCK_BYTES);
    for (let block = Math.floor(extent.start / LAYER_BLOCK_BYTES); block < last; block++) {
      const first = block;
      while (block < last && states[block] !== BLOCK_DATA) block++;
      try {
        punchHole(dataFd, first * LAYER_BLOCK_BYTES, (block - first) * LAYER_BLOCK_BYTES);
      } catch {
        // Nobody sees these blocks; a file system that cannot punch only keeps the space.
        return;
      }
    }
  }
}

/** Removes a layer that nobody has open. Throws not-found, in-use, bad-request when the folder holds other files. */
export async function removeLayer(folder: string): Promise<void> {
  let fd: number | undefined;
  try {
    const foreign = (await readdir(folder)).filter((name) => !LAYER_FILES.includes(name));
    if (foreign.length > 0) {
      throw new GridError(
        'bad-request',
        `${folder} is not only a layer: it holds ${foreign[0]}; nothing was removed`,
      );
    }
    fd = openFile(folder, DATA_FILE);
    if (!tryLock(fd)) {
      throw new GridError('in-use', `layer ${folder} is open; stop the VM or daemon that has it`);
    }
    const hidden = hiddenName(folder, 'removing');
    await rename(folder, hidden);
    await rm(hidden, { recursive: true });
  } catch (error) {
    throw asGridError(error, `cannot remove layer ${folder}`);
  } finally {
    if (fd !== undefined) closeSync(fd);
  }
}

/** Removes what a killed create or remove left in `parent`; returns how many. Call it once at the start. */
export async function sweepLayers(parent: string): Promise<number> {
  let removed = 0;
  for (const name of await readdir(parent)) {
    const folder = path.join(parent, name);
    if (!HIDDEN_PATTERN.test(name)) continue;
    if (Date.now() - (await stat(folder)).mtimeMs < SWEEP_AGE_MS) continue;
    let fd: number | undefined;
    try {
      fd = openFile(folder, DATA_FILE);
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw asGridError(error, `cannot look into ${folder}`);
    }
    try {
      if (fd !== undefined && !tryLock(fd)) continue;
      await rm(folder, { recursive: true, force: true });
      removed++;
    } finally {
      if (fd !== undefined) closeSync(fd);
    }
  }
  return removed;
}
