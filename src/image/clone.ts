/**
 * A clone: a writable disk, base image + layer. Frontends serve most of it through `direct` without coming here
 * (src/core/direct-io.ts); what comes here needs bytes of the base that are not on this host, covers a block only
 * partly that has no data yet, or met a block that another thread was filling.
 *
 * A partly covered block takes the rest of its content from the base first, which may take as long as a tunnel
 * takes, and only then, within one turn, is claimed, written and published by `DirectFile.fillBlock`: if anybody
 * filled it meanwhile, that fails and we look again. So no claim is ever held over an await.
 */
import { DirectFile, isBusy, outOfRange, visibleState } from '../core/direct-io.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { BLOCK_ABSENT, BLOCK_DATA, BLOCK_ZERO, UNIT_ABSENT } from '../core/image.ts';
import type { DirectBase, DirectMap, Image } from '../core/image.ts';
import { FUSE_REQUEST_BYTES_MAX, LAYER_BLOCK_BYTES } from '../core/limits.ts';
import { Usage } from '../core/usage.ts';
import { fillLayer } from './fill.ts';
import type { FillOptions } from './fill.ts';
import type { Layer, LayerStatistics } from './layer.ts';
import type { Snapshot } from './snapshot.ts';

const BLOCK = LAYER_BLOCK_BYTES;
const ZERO_BLOCK = Buffer.alloc(BLOCK);

/** A clone as its owner sees it. */
export interface Clone extends Image {
  readonly writable: true;
  readonly direct: DirectMap;
  /** Folder, quota, flushes: the clone's own layer. */
  readonly layer: Layer;
  statistics(): LayerStatistics;
  /** Reads what is on this host, at once. False: some of it is not, and `target` is incomplete. */
  readHere(target: Uint8Array, offsetBytes: number): boolean;
  /** The disk as of now, to be read while others write: snapshot.ts. `quiet` resolves when no thread is within a
   * request that it began before the call. */
  snapshot(quiet: () => Promise<void>): Promise<Snapshot>;
  /** Copies everything that lies below into the layer, durable when it resolves: see fill.ts. */
  fillUp(options: FillOptions): Promise<void>;
}

/**
 * The disk that `layer` makes of `base`; both belong to the clone from here on and are closed with it. The layer
 * may be larger than the base: what lies beyond reads as zeros. Throws bad-request when it is smaller.
 */
export function openClone(base: Image, layer: Layer): Clone {
  if (layer.sizeBytes < base.sizeBytes) {
    throw new GridError(
      'bad-request',
      `layer ${layer.folder} is ${layer.sizeBytes} bytes large, its base ${base.sizeBytes}; a clone cannot be smaller`,
    );
  }
  return new LayeredImage(base, layer);
}

class LayeredImage implements Clone {
  readonly sizeBytes: number;
  readonly writable = true;
  readonly direct: DirectMap;
  readonly usage = new Usage();
  readonly #base: Image;
  readonly layer: Layer;
  readonly #file: DirectFile;
  readonly #states: Uint8Array;
  #closing: Promise<void> | undefined;

  constructor(base: Image, layer: Layer) {
    this.sizeBytes = layer.sizeBytes;
    this.#base = base;
    this.layer = layer;
    this.direct = {
      sizeBytes: layer.sizeBytes,
      usage: this.usage.counters,
      base: base.direct?.base ?? nothingLocal(base.sizeBytes),
      layer: layer.direct,
    };
    this.#file = new DirectFile(this.direct, { obeysHold: false });
    this.#states = new Uint8Array(layer.direct.states);
  }

  async read(target: Uint8Array, offsetBytes: number): Promise<void> {
    this.#check(target.length, offsetBytes);
    try {
      if (!this.#file.read(target, offsetBytes)) await this.#readSlowly(target, offsetBytes);
    } catch (error) {
      throw this.#failure(error, 'read');
    }
  }

  readHere(target: Uint8Array, offsetBytes: number): boolean {
    this.#check(target.length, offsetBytes);
    try {
      return this.#file.read(target, offsetBytes);
    } catch (error) {
      throw this.#failure(error, 'read');
    }
  }

  /** Run by run; all that is missing of the base is asked for at once. */
  async #readSlowly(target: Uint8Array, offsetBytes: number): Promise<void> {
    const end = offsetBytes + target.length;
    const waits: Promise<void>[] = [];
    for (let at = offsetBytes; at < end;) {
      let block = Math.floor(at / BLOCK);
      const absent = this.#stateOf(block) === BLOCK_ABSENT;
      while (++block * BLOCK < end && (this.#stateOf(block) === BLOCK_ABSENT) === absent);
      const runEnd = Math.min(block * BLOCK, end);
      const part = target.subarray(at - offsetBytes, runEnd - offsetBytes);
      if (!this.#file.read(part, at)) waits.push(this.#readBase(part, at));
      at = runEnd;
    }
    // All of them, also after a failure: a later one still writes into the caller's buffer.
    const results = await Promise.allSettled(waits);
    for (const result of results) if (result.status === 'rejected') throw result.reason;
  }

  /** The base's bytes, zeros beyond its end. */
  async #readBase(target: Uint8Array, offsetBytes: number): Promise<void> {
    const inBase = Math.max(0, Math.min(target.length, this.#base.sizeBytes - offsetBytes));
    if (inBase > 0) await this.#base.read(target.subarray(0, inBase), offsetBytes);
    target.fill(0, inBase);
  }

  async write(source: Uint8Array, offsetBytes: number): Promise<void> {
    this.#check(source.length, offsetBytes);
    try {
      if (!this.#put(source, offsetBytes)) await this.#writeSlowly(source, offsetBytes);
    } catch (error) {
      throw this.#failure(error, 'write');
    }
  }

  #put(source: Uint8Array, offsetBytes: number): boolean {
    const last = Math.floor((offsetBytes + source.length - 1) / BLOCK);
    this.layer.beforeChange(Math.floor(offsetBytes / BLOCK), last);
    return this.#file.write(source, offsetBytes);
  }

  /** In pieces: a block that is covered partly, or at most a request of whole ones. */
  async #writeSlowly(source: Uint8Array, offsetBytes: number): Promise<void> {
    const end = offsetBytes + source.length;
    for (let at = offsetBytes; at < end;) {
      const block = Math.floor(at / BLOCK);
      const blockEnd = Math.min((block + 1) * BLOCK, this.sizeBytes);
      const whole = at === block * BLOCK && end >= blockEnd;
      let pieceEnd = Math.min(blockEnd, end);
      if (whole && end > blockEnd) {
        pieceEnd = end === this.sizeBytes ? end : end - (end % BLOCK);
        pieceEnd = Math.min(pieceEnd, at + FUSE_REQUEST_BYTES_MAX);
      }
      const piece = source.subarray(at - offsetBytes, pieceEnd - offsetBytes);
      if (whole) await this.#writeWhole(piece, at);
      else await this.#writePart(piece, block, at);
      at = pieceEnd;
    }
  }

  async #writeWhole(piece: Uint8Array, offsetBytes: number): Promise<void> {
    const last = Math.floor((offsetBytes + piece.length - 1) / BLOCK);
    while (!this.#put(piece, offsetBytes)) {
      for (let block = Math.floor(offsetBytes / BLOCK); block <= last; block++) {
        await this.layer.waitWhileBusy(block);
      }
      this.#checkOpen();
    }
  }

  async #writePart(piece: Uint8Array, block: number, offsetBytes: number): Promise<void> {
    const start = block * BLOCK;
    const lengthBytes = Math.min(BLOCK, this.sizeBytes - start);
    let fromBase: Buffer | undefined;
    for (;;) {
      this.#checkOpen();
      const state = Atomics.load(this.#states, block);
      if (state === BLOCK_DATA) {
        if (this.#put(piece, offsetBytes)) return;
      } else if (isBusy(state)) {
        await this.layer.waitWhileBusy(block);
      } else if (state === BLOCK_ABSENT && !fromBase) {
        fromBase = Buffer.alloc(lengthBytes);
        await this.#readBase(fromBase, start);
      } else {
        const content = Buffer.alloc(lengthBytes);
        if (state === BLOCK_ABSENT) content.set(fromBase!);
        // Frozen: a local file. Should somebody fill the block now, fillBlock finds out.
        else if (state !== BLOCK_ZERO && !this.#file.read(content, start)) continue;
        content.set(piece, offsetBytes - start);
        if (this.#file.fillBlock(block, state, content)) return;
      }
    }
  }

  async trim(offsetBytes: number, lengthBytes: number): Promise<void> {
    this.#check(lengthBytes, offsetBytes);
    if (lengthBytes === 0) return;
    try {
      const end = offsetBytes + lengthBytes;
      const first = Math.ceil(offsetBytes / BLOCK);
      // The first block that is not trimmed whole; a short block at the image's end counts as whole.
      const stop = end === this.sizeBytes ? Math.ceil(end / BLOCK) : Math.floor(end / BLOCK);
      if (first > stop) return await this.#zeroPart(offsetBytes, end);
      await this.#zeroPart(offsetBytes, Math.min(first * BLOCK, end));
      const zeroBaseFrom = Math.ceil(this.#base.sizeBytes / BLOCK);
      await this.layer.trimBlocks(first, stop - 1, zeroBaseFrom);
      await this.#zeroPart(Math.min(stop * BLOCK, end), end);
    } catch (error) {
      throw this.#failure(error, 'trim');
    }
  }

  /** Writes zeros over a part of one block, unless the block is zeros already. */
  async #zeroPart(offsetBytes: number, end: number): Promise<void> {
    if (offsetBytes >= end) return;
    const block = Math.floor(offsetBytes / BLOCK);
    const state = Atomics.load(this.#states, block);
    if (state === BLOCK_ZERO) return;
    if (state === BLOCK_ABSENT && block * BLOCK >= this.#base.sizeBytes) return;
    await this.#writePart(ZERO_BLOCK.subarray(0, end - offsetBytes), block, offsetBytes);
  }

  flush(): Promise<void> {
    return this.layer.flush();
  }

  snapshot(quiet: () => Promise<void>): Promise<Snapshot> {
    return this.layer.snapshot(quiet, (target, offsetBytes) => this.#readBase(target, offsetBytes));
  }

  fillUp(options: FillOptions): Promise<void> {
    return fillLayer(this, this.#file, this.#base, options);
  }

  statistics(): LayerStatistics {
    return this.layer.statistics();
  }

  close(): Promise<void> {
    this.#closing ??= (async () => {
      const results = await Promise.allSettled([this.layer.close(), this.#base.close()]);
      for (const result of results) if (result.status === 'rejected') throw result.reason;
    })();
    return this.#closing;
  }

  #stateOf(block: number): number {
    return visibleState(Atomics.load(this.#states, block));
  }

  #check(lengthBytes: number, offsetBytes: number): void {
    this.#checkOpen();
    const whole = Number.isSafeInteger(offsetBytes) && Number.isSafeInteger(lengthBytes);
    if (!whole || offsetBytes < 0 || lengthBytes < 0 || lengthBytes > this.sizeBytes - offsetBytes) {
      throw outOfRange(offsetBytes, lengthBytes, this.sizeBytes);
    }
  }

  #checkOpen(): void {
    if (this.#closing) throw new GridError('closed', `the clone over layer ${this.layer.folder} is closed`);
  }

  #failure(error: unknown, doing: 'read' | 'write' | 'trim'): GridError {
    return asGridError(error, `cannot ${doing} the clone over layer ${this.layer.folder}`);
  }
}

/** For a base without files on this host: one unit that is never present, so that the layer's blocks still go the
 * direct way and only the base's come here. */
function nothingLocal(sizeBytes: number): DirectBase {
  const units = sizeBytes === 0 ? 0 : 1;
  const states = new SharedArrayBuffer(units);
  new Uint8Array(states).fill(UNIT_ABSENT);
  return {
    fd: -1,
    unitBytes: Math.max(1, Math.ceil(sizeBytes / BLOCK)) * BLOCK,
    states,
    touched: new SharedArrayBuffer(units),
  };
}

/** The base of a disk that needs none: nothing, and zeros beyond it. */
export function zeroImage(): Image {
  const refuse = () =>
    Promise.reject(new GridError('read-only', 'write to an image; write to a clone of it instead'));
  return {
    sizeBytes: 0,
    writable: false,
    read: () => Promise.resolve(),
    write: refuse,
    trim: refuse,
    flush: () => Promise.resolve(),
    close: () => Promise.resolve(),
  };
}
