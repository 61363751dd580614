/**
 * Layers over layers. A layer that others lie over is frozen: nobody writes to it any more, `data` and
 * `map.durable` as of its last flush are what it is, and any number of clones share it.
 *
 * What a layer lies over has one digest, which its header names as its base: the manifest's for the first layer,
 * and for one over a frozen layer SHA-256("gridvfs chain 1\n" + digest below that + "\n" + that layer's id + "\n").
 * So the check of one digest at open covers every layer down to the image, in their order.
 *
 * At open all maps are merged into the one array of states, top first: a read costs the same whatever the depth.
 * Memory: one byte per 4 KiB block, 256 KiB per GiB of disk that some layer has touched, the same for any depth.
 */
import { closeSync, constants, openSync } from 'node:fs';
import path from 'node:path';
import { sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { preadExact } from '../core/direct-io.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { BLOCK_ABSENT, BLOCK_FROZEN, BLOCK_ZERO, FROZEN_LAYERS_MAX } from '../core/image.ts';
import type { FrozenFile } from '../core/image.ts';
import { checkLength, createLayer, extentsOf, openLayer, readHeader } from './layer-files.ts';
import { blockCountOf, DATA_FILE, DURABLE_MAP_FILE, HEADER_BYTES, mapFileBytes } from './layer-format.ts';
import type { Layer } from './layer.ts';

/** What a disk is made of: an image and the layers over it. */
export interface Chain {
  /** Manifest digest of the image. */
  readonly base: Digest;
  /** Folders of layers, bottom first; the last one is the clone's own, the others are frozen. */
  readonly layers: readonly string[];
}

/** A frozen layer with its map, before it is merged. */
export interface OpenFrozen extends FrozenFile {
  /** Runs of the map file that are not holes: [first block, states]. */
  readonly runs: readonly (readonly [first: number, states: Uint8Array])[];
}

/** What a layer over the frozen layer `id`, itself over `below`, names as its base. */
export function chainDigest(below: Digest, id: string): Digest {
  return sha256(Buffer.from(`gridvfs chain 1\n${below}\n${id}\n`));
}

/**
 * Makes an empty layer at `folder` over the image and the layers of `below`, all of which are frozen from here on.
 * Throws as `createLayer`, and bad-request for a chain that is too long.
 */
export async function createLayerOver(
  folder: string,
  below: Chain,
  sizeBytes: number,
  durable = true,
): Promise<void> {
  checkDepth(below.layers.length);
  const { frozen, digest } = openFrozen(below.base, below.layers);
  for (const { fd } of frozen) closeSync(fd);
  await createLayer(folder, { baseDigest: digest, sizeBytes, durable });
}

/** Opens the last layer of the chain over the others. Throws as `openLayer`, for each of them. */
export async function openChain(chain: Chain, options: { bootId?: string } = {}): Promise<Layer> {
  const own = chain.layers.at(-1);
  if (own === undefined) throw new GridError('bug', 'a chain without layers');
  checkDepth(chain.layers.length - 1);
  const { frozen, digest } = openFrozen(chain.base, chain.layers.slice(0, -1));
  return openLayer(own, { ...options, baseDigest: digest, below: frozen });
}

function checkDepth(frozenLayers: number): void {
  if (frozenLayers <= FROZEN_LAYERS_MAX) return;
  throw new GridError(
    'bad-request',
    `${frozenLayers} layers below a clone, more than ${FROZEN_LAYERS_MAX}; make a full clone (--full), or commit it`,
  );
}

function openFrozen(base: Digest, folders: readonly string[]): { frozen: OpenFrozen[]; digest: Digest } {
  const frozen: OpenFrozen[] = [];
  let digest = base;
  try {
    for (const folder of folders) {
      const dataFile = path.join(folder, DATA_FILE);
      const fd = openSync(dataFile, constants.O_RDONLY | constants.O_NOFOLLOW);
      const opened = { fd, sizeBytes: 0, runs: [] as (readonly [number, Uint8Array])[] };
      frozen.push(opened);
      const { header, runs } = readDurableMap(folder);
      opened.sizeBytes = header.sizeBytes;
      opened.runs = runs;
      checkLength(fd, header.sizeBytes, dataFile);
      if (header.baseDigest !== digest) {
        throw new GridError(
          'wrong-base',
          `layer ${folder} belongs over ${header.baseDigest}, not over ${digest}`,
        );
      }
      digest = chainDigest(digest, header.id);
    }
    return { frozen, digest };
  } catch (error) {
    for (const { fd } of frozen) closeSync(fd);
    throw asGridError(error, `cannot open the layers below a clone`);
  }
}

function readDurableMap(folder: string) {
  const file = path.join(folder, DURABLE_MAP_FILE);
  const fd = openSync(file, constants.O_RDONLY | constants.O_NOFOLLOW);
  try {
    const header = readHeader(fd, file);
    checkLength(fd, mapFileBytes(header.sizeBytes), file);
    const blockCount = blockCountOf(header.sizeBytes);
    const runs: (readonly [number, Uint8Array])[] = [];
    for (const [first, extentBlocks] of extentsOf(fd)) {
      const states = Buffer.alloc(Math.min(extentBlocks, blockCount - first));
      preadExact(fd, states, 0, states.length, HEADER_BYTES + first);
      if (states.some((state) => state > BLOCK_ZERO)) {
        throw new GridError('bad-format', `${file} is damaged: a block has a state that there is not`);
      }
      runs.push([first, states]);
    }
    return { header, runs };
  } finally {
    closeSync(fd);
  }
}

/** Gives blocks that `states` (the own layer's) calls ABSENT the state that the topmost frozen layer has for them. */
export function mergeBelow(states: Uint8Array, frozen: readonly OpenFrozen[]): void {
  for (let layer = frozen.length - 1; layer >= 0; layer--) {
    for (const [first, runStates] of frozen[layer]!.runs) {
      const count = Math.min(runStates.length, states.length - first);
      for (let i = 0; i < count; i++) {
        const state = runStates[i]!;
        if (state === BLOCK_ABSENT || states[first + i] !== BLOCK_ABSENT) continue;
        states[first + i] = state === BLOCK_ZERO ? BLOCK_ZERO : BLOCK_FROZEN + layer;
      }
    }
  }
}
