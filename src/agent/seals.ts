/**
 * Seals of clones that nobody has open: whether one is still as it was when its VM was suspended. `quickSeal` is what
 * the file system says of its own layer's files, so that a disk of any size is sealed at once: every write through
 * the mount changes it. `contentSeal` is a digest of the layer's bytes, for memory, which must not be damaged either.
 */
import { createHash } from 'node:crypto';
import type { Hash } from 'node:crypto';
import { open, stat } from 'node:fs/promises';
import path from 'node:path';
import { isAllZero } from '../core/bytes.ts';
import { KIB, MIB } from '../core/limits.ts';
import { nextData } from '../core/linux.ts';

const READ_BYTES = 1 * MIB;
/** Zeros are left out by this unit, wherever the file system has its holes. */
const UNIT_BYTES = 64 * KIB;
/** A layer's map begins with a page that says in which boot of the host it was used last. */
const MAP_HEADER_BYTES = 4 * KIB;

/** `layers` are the folders of a clone's layers, its own last. */
export async function quickSeal(layers: readonly string[]): Promise<string> {
  const own = layers.at(-1)!;
  const { ino, size, mtimeNs } = await stat(path.join(own, 'data'), { bigint: true });
  const hash = hashOfNames(layers).update(`${ino} ${size} ${mtimeNs}\n`);
  await addFile(hash, path.join(own, 'map'), MAP_HEADER_BYTES);
  return hash.digest('hex');
}

/** SHA-256 over the layers' names and all that its own layer holds. */
export async function contentSeal(layers: readonly string[]): Promise<string> {
  const own = layers.at(-1)!;
  const hash = hashOfNames(layers);
  await addFile(hash, path.join(own, 'data'), 0);
  await addFile(hash, path.join(own, 'map'), MAP_HEADER_BYTES);
  return hash.digest('hex');
}

function hashOfNames(layers: readonly string[]): Hash {
  return createHash('sha256').update(layers.map((layer) => `${path.basename(layer)}\n`).join(''));
}

/** The file's size and, with their offsets, its units that are not zeros. Holes are not read. */
async function addFile(hash: Hash, file: string, fromBytes: number): Promise<void> {
  await using handle = await open(file, 'r');
  const { size } = await handle.stat();
  hash.update(`${path.basename(file)} ${size}\n`);
  const buffer = Buffer.allocUnsafe(READ_BYTES);
  let at = fromBytes;
  for (let data = nextData(handle.fd, at); data; data = nextData(handle.fd, at)) {
    at = Math.max(at, data.start - ((data.start - fromBytes) % UNIT_BYTES));
    const { bytesRead } = await handle.read(buffer, 0, READ_BYTES, at);
    for (let start = 0; start < bytesRead; start += UNIT_BYTES) {
      const unit = buffer.subarray(start, Math.min(start + UNIT_BYTES, bytesRead));
      if (!isAllZero(unit)) hash.update(`${at + start}\n`).update(unit);
    }
    at += bytesRead;
    if (bytesRead === 0 || at >= size) break;
  }
}
