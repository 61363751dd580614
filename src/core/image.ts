/**
 * What frontends see: a tree of names, and images behind the files in it. A frontend never learns what a chunk
 * or a layer is; for speed an image may hand it a `DirectMap`, with which any thread can answer reads and writes
 * of what is on this host without asking the main thread.
 */

import type { Usage } from './usage.ts';

/** A disk (or other file) of fixed size. Offsets and lengths are bytes, checked against `sizeBytes` here. */
export interface Image {
  readonly sizeBytes: number;
  readonly writable: boolean;

  /** Fills `target` from `offsetBytes`; the range must lie within the image (bad-request otherwise). */
  read(target: Uint8Array, offsetBytes: number): Promise<void>;
  /** Acknowledged (resolved) means it survives kill -9 of this process. Throws read-only, no-space. */
  write(source: Uint8Array, offsetBytes: number): Promise<void>;
  /** The range reads as zeros afterwards and gives its space back where it covers whole blocks. */
  trim(offsetBytes: number, lengthBytes: number): Promise<void>;
  /** Resolved means everything acknowledged before the call survives power loss. */
  flush(): Promise<void>;
  /** Releases descriptors; the caller guarantees that nothing is in flight. Idempotent. */
  close(): Promise<void>;

  /** Where a frontend counts the requests that it answers from this image. */
  readonly usage?: Usage;

  /** Present when ranges can be served straight from files of this host. Valid until `close`. */
  readonly direct?: DirectMap;

  /**
   * For kernel passthrough: a descriptor whose file is, byte for byte, this whole image, checked; nothing of it is
   * taken away until `release`. Undefined when not all of it is here (now). Only read-only images have it.
   * `held`: the kernel reads the file already, by a claim of a process that has died since: not checked again.
   */
  claimWhole?(options?: {
    readonly held: boolean;
  }): Promise<{ readonly fd: number; release(): void } | undefined>;
}

/** States of a unit of a base image in `DirectBase.states`. Any value but PRESENT goes to the main thread. */
export const UNIT_ABSENT = 0;
/** On disk and trusted: any thread may read it from the file. Zero units are PRESENT holes. */
export const UNIT_PRESENT = 1;
/** On disk as of an earlier run, not yet checked since the start: a thread that hashes it makes it PRESENT. */
export const UNIT_UNVERIFIED = 2;

/** States of a block of a layer in `DirectLayer.states`. */
export const BLOCK_ABSENT = 0;
export const BLOCK_DATA = 1;
export const BLOCK_ZERO = 2;
/** Some thread is filling the block for the first time; it was absent / zero before, and still is to a reader. */
export const BLOCK_BUSY_ABSENT = 3;
export const BLOCK_BUSY_ZERO = 4;
/** From here on: the content is in frozen layer (state − BLOCK_FROZEN) of `DirectLayer.frozen`, read-only. */
export const BLOCK_FROZEN = 16;
/** Added to a FROZEN state while a thread fills the block for the first time. */
export const BLOCK_BUSY_FROZEN = 128;
/** Layers that can lie frozen below a clone's own: as many as a state byte can name. */
export const FROZEN_LAYERS_MAX = BLOCK_BUSY_FROZEN - BLOCK_FROZEN;

/**
 * The local file behind a base image and what of it can be read. Plain bytes lie at their own offsets.
 * A thread that serves a read: every unit of the range is PRESENT in `states` (Atomics.load) → pread from `fd`.
 * `touched[unit] = 1` (plain store) tells the cache that the unit was used.
 * A thread that may take its time reads an UNVERIFIED unit whole, compares its hash with `hashes[unit]`, and makes it
 * PRESENT by compareExchange: it may be on its way out. One that does not match goes to the main thread.
 */
export interface DirectBase {
  /** As long as the base image, not longer. -1 when no unit will ever be PRESENT. */
  readonly fd: number;
  readonly unitBytes: number;
  /** One byte per unit. */
  readonly states: SharedArrayBuffer;
  /** One byte per unit: recency, cleared by the cache. */
  readonly touched: SharedArrayBuffer;
  /** One byte per unit: see unit-notes.ts. What was `touched` comes here when that is cleared. */
  readonly notes?: SharedArrayBuffer;
  /** One u64 per unit, its `chunkHash`; 0: only the main thread can say whether the unit is right. */
  readonly hashes?: SharedArrayBuffer;
}

/**
 * The files behind a layer. A block in state DATA is read from `dataFd` at its own offset, ZERO reads as zeros,
 * ABSENT falls through to the base. Layers frozen below it were merged into `states` when it was opened: what they
 * call zero is ZERO here, what they have data of is FROZEN + their number, so a chain costs a read nothing.
 *
 * Writing a range, in this order (`direct-io.ts` beside this file is the one implementation, which
 * every thread calls; src/image/layer.ts fills partly covered blocks and flushes):
 *  1. blocks that are not DATA are claimed by compareExchange to their BUSY value; a claim that fails, or a block
 *     only partly covered that is not DATA, sends the whole request to the main thread (claims undone first); the
 *     claimed blocks are taken from `budget`, and the write fails with no-space when it does not have them;
 *  2. pwrite the data; 3. pwrite the map bytes of the claimed blocks; 4. store DATA in their `states`;
 *  5. mark the map page in `dirtyPages`; only then is the write acknowledged.
 * A failed step undoes the claims and the write fails with its errno. A trim (main thread) holds BUSY_ZERO while it
 * records the zeros and gives the space back.
 */
export interface DirectLayer {
  readonly dataFd: number;
  readonly mapFd: number;
  /** Where block 0's byte lies in the map file. */
  readonly mapOffsetBytes: number;
  readonly blockBytes: number;
  /** One byte per block. */
  readonly states: SharedArrayBuffer;
  /** One byte per 4096 bytes of map: changed since the last flush. */
  readonly dirtyPages: SharedArrayBuffer;
  /** The layers below, bottom first. */
  readonly frozen?: readonly FrozenFile[];
  /** Three Int32: [0] blocks that may still become DATA, [1] whether that is enforced (1) or only counted (0), [2] 1
   * while writes are held: all of them go to the main thread (src/image/snapshot.ts). */
  readonly budget?: SharedArrayBuffer;
}

/** The data file of a frozen layer. It may be shorter than the clone: beyond its end nothing is FROZEN. */
export interface FrozenFile {
  readonly fd: number;
  readonly sizeBytes: number;
}

export interface DirectMap {
  readonly sizeBytes: number;
  /** Of the image's `Usage`. */
  readonly usage?: SharedArrayBuffer;
  readonly base: DirectBase;
  readonly layer?: DirectLayer;
}

/** One name in a folder of the tree. */
export type TreeEntry =
  | { readonly name: string; readonly type: 'directory'; readonly modifiedMs: number }
  | {
      readonly name: string;
      readonly type: 'file';
      readonly sizeBytes: number;
      readonly writable: boolean;
      readonly modifiedMs: number;
      /** Same id = same content for ever (read-only) or the same writable disk. A frontend may keep pages by it. */
      readonly contentId: string;
      /** It may be opened for writing, though no write is accepted: QEMU opens so what it maps privately. */
      readonly mapsPrivately?: true;
    };

/** A path is a list of names from the root; [] is the root itself. */
export type TreePath = readonly string[];

export interface ImageTree {
  /** The entry at `path`, or undefined. The root is a directory with an empty name. */
  lookup(path: TreePath): Promise<TreeEntry | undefined>;
  /** Entries of a directory, sorted by name. Throws not-found. */
  list(path: TreePath): Promise<TreeEntry[]>;
  /** Opens a file; every open is closed by the caller. Throws not-found, read-only (when `write` on an image). */
  open(path: TreePath, options: { write: boolean }): Promise<Image>;
  /** Opens what a file was, whatever its name means by now. Throws not-found. A tree without it cannot be taken over
   * from a daemon that died. */
  openContent?(contentId: string, options: { write: boolean }): Promise<Image>;
  /** Space behind the tree, for statfs: what clones can still take. */
  space(): Promise<{ totalBytes: number; freeBytes: number }>;
}
