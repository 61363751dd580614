/**
 * A clone's disk as it was at one moment, read while others go on writing to the disk.
 *
 *   hold      direct writes (direct-io.ts) are turned away in every thread and come to the main thread, from here to
 *             the snapshot's end
 *   quiet     until no thread is within a write that it began before: from here on only the main thread writes
 *   cut       within one turn: the states of all blocks are copied. This is the moment: every write that was
 *             acknowledged before it is in, none that came after it
 *   reads     of blocks that the layer had data of come from its data file, each once. Before the main thread writes
 *             to such a block, or trims it, and the block was not read yet, `keep` copies it to a side file
 *
 * All else that a read needs does not change: the base, frozen layers, zeros. Reads of the data file and writes to
 * it are synchronous in one thread, so none sees half of the other. The side file has no name: nothing is left of it
 * after kill -9. Where it cannot be written the snapshot fails, not the write that needed it.
 */
import { closeSync, openSync, unlinkSync } from 'node:fs';
import { randomBytes } from 'node:crypto';
import path from 'node:path';
import { preadExact, pwriteExact, visibleState } from '../core/direct-io.ts';
import { asGridError, GridError, invariant } from '../core/errors.ts';
import { BLOCK_DATA, BLOCK_FROZEN, BLOCK_ZERO } from '../core/image.ts';
import { LAYER_BLOCK_BYTES } from '../core/limits.ts';
import type { Layer } from './layer.ts';

const BLOCK = LAYER_BLOCK_BYTES;

/** Reads of what lies below all layers. */
type ReadBase = (target: Uint8Array, offsetBytes: number) => Promise<void>;

export class Snapshot {
  readonly sizeBytes: number;
  /** Of each block as of the moment: 1 byte per 4 KiB of disk. */
  readonly states: Uint8Array;
  readonly #layer: Layer;
  readonly #readBase: ReadBase;
  readonly #ended: () => void;
  /** One bit per block: the data file still has it as it was, and it was not read yet. */
  readonly #waiting: Uint8Array;
  /** Where kept blocks lie in the side file. */
  readonly #kept = new Map<number, number>();
  #sideFd: number | undefined;
  #slots = 0;
  #failure: GridError | undefined;
  #closed = false;

  /** The cut. Made by `Layer.snapshot` when nobody but the main thread writes; `ended` is called by `close`. */
  constructor(layer: Layer, readBase: ReadBase, ended: () => void) {
    this.sizeBytes = layer.sizeBytes;
    this.#layer = layer;
    this.#readBase = readBase;
    this.#ended = ended;
    this.states = new Uint8Array(layer.direct.states).slice();
    this.#waiting = new Uint8Array(Math.ceil(this.states.length / 8));
    for (let block = 0; block < this.states.length; block++) {
      const state = visibleState(this.states[block]!);
      this.states[block] = state;
      if (state === BLOCK_DATA) this.#waiting[block >>> 3]! |= 1 << (block & 7);
    }
  }

  #isWaiting(block: number): boolean {
    return (this.#waiting[block >>> 3]! & (1 << (block & 7))) !== 0;
  }

  #settle(block: number): void {
    this.#waiting[block >>> 3]! &= ~(1 << (block & 7));
  }

  #blockBytes(block: number): number {
    return Math.min(BLOCK, this.sizeBytes - block * BLOCK);
  }

  /** Blocks `first` to `last` are about to change. Never throws. */
  keep(first: number, last: number): void {
    for (let block = first; block <= last; block++) {
      if (!this.#isWaiting(block)) continue;
      this.#settle(block);
      if (this.#failure || this.#closed) continue;
      try {
        const bytes = Buffer.allocUnsafe(this.#blockBytes(block));
        preadExact(this.#layer.direct.dataFd, bytes, 0, bytes.length, block * BLOCK);
        this.#sideFd ??= this.#openSide();
        pwriteExact(this.#sideFd, bytes, bytes.length, this.#slots * BLOCK);
        this.#kept.set(block, this.#slots++);
      } catch (error) {
        this.#failure = asGridError(
          error,
          `cannot keep a block of layer ${this.#layer.folder} for a snapshot`,
        );
      }
    }
  }

  #openSide(): number {
    const file = path.join(this.#layer.folder, `snapshot-${randomBytes(6).toString('hex')}`);
    const fd = openSync(file, 'wx+', 0o600);
    unlinkSync(file);
    return fd;
  }

  /**
   * Fills `target` with what the disk was from `offsetBytes`, a multiple of the block, on. Each block can be read once:
   * then nothing is kept of it any more. Throws what the base throws, and no-space or local-io of the side file.
   */
  async readOnce(target: Uint8Array, offsetBytes: number): Promise<void> {
    invariant(offsetBytes % BLOCK === 0, 'a snapshot is read by whole blocks');
    const end = offsetBytes + target.length;
    invariant(end % BLOCK === 0 || end === this.sizeBytes, 'a snapshot is read by whole blocks');
    const waits: Promise<void>[] = [];
    const last = Math.ceil(end / BLOCK);
    for (let block = offsetBytes / BLOCK; block < last;) {
      const first = block;
      const state = this.states[first]!;
      while (block < last && this.states[block] === state) block++;
      const at = first * BLOCK;
      const part = target.subarray(at - offsetBytes, Math.min(block * BLOCK, end) - offsetBytes);
      waits.push(this.#readRun(part, state, first, block));
    }
    // All of them, also after a failure: a later one still writes into the caller's buffer.
    const results = await Promise.allSettled(waits);
    for (const result of results) if (result.status === 'rejected') throw result.reason;
  }

  /** Up to its first await within the caller's turn, and own blocks wholly. */
  async #readRun(target: Uint8Array, state: number, first: number, end: number): Promise<void> {
    if (state === BLOCK_ZERO) target.fill(0);
    else if (state === BLOCK_DATA) this.#readOwn(target, first, end);
    else if (state >= BLOCK_FROZEN) this.#readFrozen(state - BLOCK_FROZEN, target, first * BLOCK);
    else await this.#readBase(target, first * BLOCK);
  }

  #readFrozen(layer: number, target: Uint8Array, offsetBytes: number): void {
    const { fd, sizeBytes } = this.#layer.direct.frozen![layer]!;
    const inFile = Math.max(0, Math.min(target.length, sizeBytes - offsetBytes));
    if (inFile > 0) preadExact(fd, target, 0, inFile, offsetBytes);
    target.fill(0, inFile);
  }

  #readOwn(target: Uint8Array, first: number, end: number): void {
    if (this.#closed) throw new GridError('closed', `the snapshot of layer ${this.#layer.folder} is closed`);
    if (this.#failure) throw this.#failure;
    for (let block = first; block < end;) {
      const at = (block - first) * BLOCK;
      const slot = this.#kept.get(block);
      if (slot !== undefined) {
        preadExact(this.#sideFd!, target, at, this.#blockBytes(block), slot * BLOCK);
        this.#kept.delete(block);
        block++;
        continue;
      }
      invariant(this.#isWaiting(block), 'a block of a snapshot is read once');
      const start = block;
      while (block < end && this.#isWaiting(block)) this.#settle(block++);
      const lengthBytes = Math.min(block * BLOCK, this.sizeBytes) - start * BLOCK;
      preadExact(this.#layer.direct.dataFd, target, at, lengthBytes, start * BLOCK);
    }
  }

  /** Blocks that were written to before they were read. */
  get keptBlocks(): number {
    return this.#slots;
  }

  /** Direct writes go their own way again. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#sideFd !== undefined) closeSync(this.#sideFd);
    this.#ended();
  }
}
