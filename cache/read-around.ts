/**
 * What to fetch beside a chunk that a reader misses, while nothing says what will be read (no profile, no run): on a
 * long link a round trip costs more than chunks that turn out not to be needed.
 *
 *   holes        the chunk between the missed one and another that was asked for, on any link longer than LEAN_MIN_MS
 *   edges        the chunk behind one that is read near its end, and before one that is read at its beginning, likewise
 *                (Both together, a Debian boot's trace at 30 ms and 100 Mbit/s: 11 % less time for 14 chunks of 318.
 *                Twice the edges would save 3 % more for 5 chunks more, and so on: see what is promised of the bytes.)
 *   neighbours   nearest first, as many stored bytes as the way carries in the part of a round trip above SHORT_MS,
 *                of memory above LEAN_MIN_MS: a guest that goes on reads single pages all over.
 *                (The same at 150 ms and 50 Mbit/s: 16 s instead of 41, for half of the image instead of a fifth.
 *                Reading chunk by chunk would take twice as long there as a copy of the whole image.)
 *
 * The figures are computed from the trace of one boot, not measured: they chose between rules, and promise nothing.
 * So a start on a local network fetches what it touches. All of it goes as prefetch: behind demand, within its
 * ceiling, and not where the disk has no room.
 */
import type { ChunkTable } from '../src/core/chunk-table.ts';
import { UNIT_ABSENT } from '../src/core/image.ts';
import { KIB } from '../src/core/limits.ts';
import type { Manifest } from '../src/core/manifest.ts';
import type { WayFigures } from '../src/core/source.ts';
import type { ChunkStates } from './chunk-states.ts';

const LEAN_MIN_MS = 10;
const END_BYTES = 32 * KIB;
const BEGINNING_BYTES = 8 * KIB;
/** A round trip that a miss may cost without more ado: a few seeks of the disks that guests were made for. */
const SHORT_MS = 40;
/** Chunks on either side at most: 8 MiB of the default size. */
const REACH = 32;
/** Misses whose neighbours may be under way together: on a slow link more would queue before the next miss. */
const MISSES = 2;

/** Stored bytes of neighbours that are worth fetching with one miss over such a way. */
export function neighbourBytes(way: WayFigures | undefined, shortMs = SHORT_MS): number {
  if (!way || way.roundTripMs <= shortMs) return 0;
  const { roundTripMs, bytesPerSecond, prefetchBytes } = way;
  const aRoundTrip = bytesPerSecond === undefined ? prefetchBytes / 2 : (bytesPerSecond * roundTripMs) / 1000;
  return aRoundTrip * (1 - shortMs / roundTripMs);
}

/** The image that is read. */
export interface AroundFile {
  readonly manifest: Pick<Manifest, 'kind'>;
  readonly table: ChunkTable;
  readonly states: ChunkStates;
  prefetch(index: number): Promise<boolean>;
}

/** The way that its chunks come. */
export interface AroundWay {
  /** Undefined for a source on this host, and where the operator wants nothing of this. */
  readonly way: WayFigures | undefined;
  /** Stored bytes of prefetch that are queued or under way. */
  readonly prefetchBytes: number;
}

export class ReadAround {
  readonly #file: AroundFile;
  readonly #way: AroundWay;
  readonly #isUnderWay: (index: number) => boolean;
  readonly #hasRoom: () => boolean;
  #known = 0;

  constructor(
    file: AroundFile,
    way: AroundWay,
    is: { readonly underWay: (index: number) => boolean; readonly room: () => boolean },
  ) {
    this.#file = file;
    this.#way = way;
    this.#isUnderWay = is.underWay;
    this.#hasRoom = is.room;
  }

  /** What will be read is known and being fetched, until the function that it gives is called. */
  pause(): () => void {
    this.#known++;
    return () => void this.#known--;
  }

  /** A reader waits for `lengthBytes` at `offsetBytes` of chunk `index`, which nobody had asked for. */
  onMiss(index: number, offsetBytes: number, lengthBytes: number): void {
    const { table, states } = this.#file;
    if (this.#known > 0 || table.entryOf(index) < 0 || states.get(index) !== UNIT_ABSENT) return;
    const { way } = this.#way;
    if (!way || way.roundTripMs < LEAN_MIN_MS || !this.#hasRoom()) return;
    const isAtEdge = {
      [1]: offsetBytes + lengthBytes >= table.chunkBytes - END_BYTES,
      [-1]: offsetBytes < BEGINNING_BYTES,
    };
    for (const step of [1, -1] as const) {
      const isLikely = isAtEdge[step] || this.#isAsked(index + 2 * step);
      if (isLikely && this.#isWanted(index + step)) this.#fetch(index + step);
    }
    const bytes = neighbourBytes(way, this.#file.manifest.kind === 'memory' ? LEAN_MIN_MS : SHORT_MS);
    let left = Math.min(bytes, MISSES * bytes - this.#way.prefetchBytes);
    for (let distance = 1; distance <= REACH && left > 0; distance++) {
      for (const near of [index + distance, index - distance]) {
        if (!this.#isWanted(near)) continue;
        left -= table.storedBytesOfEntry(table.entryOf(near));
        if (left < 0) return;
        this.#fetch(near);
      }
    }
  }

  #hasData(index: number): boolean {
    const { table } = this.#file;
    return index >= 0 && index < table.count && table.entryOf(index) >= 0;
  }

  #isAsked(index: number): boolean {
    if (!this.#hasData(index)) return false;
    return this.#file.states.get(index) !== UNIT_ABSENT || this.#isUnderWay(index);
  }

  #isWanted(index: number): boolean {
    return this.#hasData(index) && !this.#isAsked(index);
  }

  #fetch(index: number): void {
    // Whoever reads it asks again and hears why.
    this.#file.prefetch(index).catch(() => undefined);
  }
}
