/**
 * What is known of each chunk of one image while it is in use, one entry per chunk and array: `states`, `touched` and
 * the expected hashes are shared with worker threads (src/core/image.ts), the rest is the main thread's. Workers set
 * `touched`, and change a state in one way: UNVERIFIED → PRESENT, by compareExchange, when they have hashed the chunk.
 * So what this thread found UNVERIFIED may be PRESENT a moment later; nothing else changes under its hands.
 *
 * Recency: `touched` is the only sign of use that every reader leaves (workers, kept pages and passthrough are
 * invisible to a list in the main thread). It is harvested now and then into `#usedAt`, a generation number per
 * chunk: a clock with many hands. An LRU list of 400,000 entries per 100 GiB would know no more than this does.
 */
import type { ChunkTable } from '../src/core/chunk-table.ts';
import { UNIT_ABSENT, UNIT_PRESENT, UNIT_UNVERIFIED } from '../src/core/image.ts';
import { nextData } from '../src/core/linux.ts';
import { chunkCountOf, chunkLengthOf } from '../src/core/manifest.ts';
import type { Manifest } from '../src/core/manifest.ts';
import { NOTE_READ, noteRange } from '../src/core/unit-notes.ts';
import { scanRecords } from './map-file.ts';
import type { ImageFiles } from './map-file.ts';

/** As PRESENT, but its first reader comes to the main thread, which reads on ahead of it (the page cache of Linux
 * has the same mark). */
export const UNIT_AHEAD = 3;
/** Being taken away: not readable any more, not to be stored yet. */
export const UNIT_EVICTING = 4;

/** See src/core/unit-notes.ts: workers write there too, so bits are set one by one. */
const NOTE_PREFETCHED = 2;

/** Who wants to know what is read. */
export interface UseListener {
  /** A chunk of data was touched since the last harvest. */
  used(index: number): void;
  /** A second reader opens the image; nothing of it was read for him yet. */
  shared(): void;
}

export class ChunkStates {
  readonly manifest: Manifest;
  readonly table: ChunkTable;
  readonly stateBytes: SharedArrayBuffer;
  readonly touchedBytes: SharedArrayBuffer;
  readonly hashBytes: SharedArrayBuffer;
  /** Survives the image's close (see ImageFigures). */
  readonly noteBytes: SharedArrayBuffer;
  readonly touched: Uint8Array;
  /** Chunks of data that are on this disk, verified or not. */
  presentChunks = 0;
  presentBytes = 0;
  readonly #states: Uint8Array;
  /** xxhash64 of each chunk of data that is or was on the disk; 0 where the main thread has to look. */
  readonly #hashes: BigUint64Array;
  readonly #notes: Uint8Array;
  readonly #usedAt: Uint32Array;

  constructor(manifest: Manifest, table: ChunkTable, notes: SharedArrayBuffer) {
    const count = chunkCountOf(manifest);
    this.manifest = manifest;
    this.table = table;
    // All are pages of zeros until touched: `touched` of an image nobody reads costs nothing.
    this.stateBytes = new SharedArrayBuffer(count);
    this.touchedBytes = new SharedArrayBuffer(count);
    this.hashBytes = new SharedArrayBuffer(count * BigUint64Array.BYTES_PER_ELEMENT);
    this.#states = new Uint8Array(this.stateBytes);
    this.touched = new Uint8Array(this.touchedBytes);
    this.#hashes = new BigUint64Array(this.hashBytes);
    this.noteBytes = notes;
    this.#notes = new Uint8Array(notes);
    this.#usedAt = new Uint32Array(count);
    this.#states.fill(UNIT_PRESENT);
    for (const [first, chunks] of table.extents()) this.#states.fill(UNIT_ABSENT, first, first + chunks);
  }

  get(index: number): number {
    return this.#states[index]!;
  }

  /** On this disk, verified or not; also true for a chunk of zeros. */
  isHere(index: number): boolean {
    const state = this.#states[index]!;
    return state === UNIT_PRESENT || state === UNIT_UNVERIFIED || state === UNIT_AHEAD;
  }

  /** A chunk that is on the disk becomes PRESENT, UNVERIFIED or AHEAD. */
  set(index: number, state: typeof UNIT_PRESENT | typeof UNIT_UNVERIFIED | typeof UNIT_AHEAD): void {
    Atomics.store(this.#states, index, state);
  }

  /** The hash that a chunk of data is to have when it is looked at again. */
  expect(index: number, hash: bigint): void {
    Atomics.store(this.#hashes, index, hash);
  }

  /** ABSENT → PRESENT or AHEAD. */
  arrived(index: number, ahead: boolean, generation: number): void {
    this.presentChunks++;
    this.presentBytes += chunkLengthOf(this.manifest, index);
    this.#usedAt[index] = generation;
    Atomics.store(this.#states, index, ahead ? UNIT_AHEAD : UNIT_PRESENT);
  }

  /** On the disk → ABSENT or EVICTING; anything else stays. */
  lost(index: number, state: typeof UNIT_ABSENT | typeof UNIT_EVICTING = UNIT_ABSENT): void {
    if (!this.isHere(index)) return;
    Atomics.store(this.#states, index, state);
    this.presentChunks--;
    this.presentBytes -= chunkLengthOf(this.manifest, index);
  }

  /** EVICTING → ABSENT. */
  evicted(index: number): void {
    Atomics.store(this.#states, index, UNIT_ABSENT);
  }

  /** Files of an earlier run: what has a record, and zeros that are not holes, are UNVERIFIED. */
  adopt(files: ImageFiles): void {
    const { sizeBytes, chunkBytes } = this.manifest;
    const states = this.#states;
    scanRecords(files.mapFd, states.length, (index, record) => {
      // A record for a chunk of zeros is damage without consequence: such a chunk is judged by its bytes.
      if (index >= states.length || states[index] !== UNIT_ABSENT) return;
      states[index] = UNIT_UNVERIFIED;
      this.expect(index, record);
      this.presentChunks++;
      this.presentBytes += chunkLengthOf(this.manifest, index);
    });
    const distrust = (first: number, endIndex: number) => {
      let at = first * chunkBytes;
      const end = Math.min(endIndex * chunkBytes, sizeBytes);
      while (at < end) {
        const data = nextData(files.dataFd, at);
        if (!data || data.start >= end) return;
        states.fill(
          UNIT_UNVERIFIED,
          Math.floor(data.start / chunkBytes),
          Math.ceil(Math.min(data.end, end) / chunkBytes),
        );
        at = data.end;
      }
    };
    let zerosFrom = 0;
    for (const [first, chunks] of this.table.extents()) {
      distrust(zerosFrom, first);
      zerosFrom = first + chunks;
    }
    distrust(zerosFrom, states.length);
  }

  /** First chunk in this state, or -1. */
  firstIn(state: number): number {
    return this.#states.indexOf(state);
  }

  /** Every chunk of data on this disk: its index, and the generation it was last used in. */
  forEachPresent(visit: (index: number, usedAt: number) => void): void {
    for (const [first, chunks] of this.table.extents()) {
      for (let index = first; index < first + chunks; index++) {
        if (this.isHere(index)) visit(index, this.#usedAt[index]!);
      }
    }
  }

  /** A reader comes to the bytes from `from` to before `end` of a chunk. */
  touch(index: number, from: number, end: number): void {
    this.touched[index] = 1;
    noteRange(this.#notes, index, this.manifest.chunkBytes, from, end);
  }

  /** Reads and clears the marks of use; `used` hears of each chunk of data that was touched since the last time. */
  harvest(generation: number, used?: (index: number) => void): void {
    const { touched } = this;
    for (let index = touched.indexOf(1); index >= 0; index = touched.indexOf(1, index + 1)) {
      touched[index] = 0;
      if (this.table.entryOf(index) < 0) continue;
      Atomics.or(this.#notes, index, NOTE_READ);
      this.#usedAt[index] = generation;
      used?.(index);
    }
  }

  /** A reader that leaves no marks had all of it. */
  usedWhole(generation: number): void {
    this.#usedAt.fill(generation);
  }

  notePrefetched(index: number): void {
    Atomics.or(this.#notes, index, NOTE_PREFETCHED);
  }

  /** Distinct chunks of data read since the start, and of the prefetched ones those that were. */
  usage(): { touchedChunks: number; prefetchedUsedChunks: number } {
    for (const [first, chunks] of this.table.extents()) {
      for (let index = first; index < first + chunks; index++) {
        if (this.touched[index] !== 0) Atomics.or(this.#notes, index, NOTE_READ);
      }
    }
    return usageOf(this.noteBytes, this.table);
  }
}

/** The same of an image that is closed. */
export function usageOf(
  noteBytes: SharedArrayBuffer,
  table: ChunkTable,
): { touchedChunks: number; prefetchedUsedChunks: number } {
  const notes = new Uint8Array(noteBytes);
  let touchedChunks = 0;
  let prefetchedUsedChunks = 0;
  for (const [first, chunks] of table.extents()) {
    for (let index = first; index < first + chunks; index++) {
      const note = notes[index]!;
      if ((note & NOTE_READ) === 0) continue;
      touchedChunks++;
      if ((note & NOTE_PREFETCHED) !== 0) prefetchedUsedChunks++;
    }
  }
  return { touchedChunks, prefetchedUsedChunks };
}
