/**
 * Adaptive read-ahead of one image: finds runs among the chunks that readers miss, several at a time, and says what
 * to fetch before it is asked for. 1, 2, 4 … 32 chunks; nothing for a reader that jumps.
 *
 * A run is believed after RUN_MIN chunks. A Debian boot's misses are all but random at 256 KiB: two chunks as
 * evidence fetched 99 chunks for nothing of 331 that were used, three 47, four 23.
 * Kernels, initial RAM disks and device states are read whole by whoever opens them: there one chunk is enough.
 *
 * What was read ahead is read by worker threads that tell nobody. So the first chunk of each piece carries a mark
 * (UNIT_AHEAD) that brings its first reader here, and the next piece is asked for while this one is being read.
 */
import type { ManifestKind } from '../src/core/manifest.ts';

const RUN_MIN = 8;
const STREAMS_MAX = 8;
export const AHEAD_CHUNKS_MAX = 32;
const READ_WHOLE: ReadonlySet<ManifestKind> = new Set(['kernel', 'initrd', 'firmware', 'state']);

interface Stream {
  start: number;
  /** Chunks of the run that were read; zeros between them do not count. */
  chunks: number;
  /** The chunk that continues the run. */
  next: number;
  /** Size of the last piece. */
  pieceChunks: number;
  /** End of what was asked for. */
  until: number;
}

export class ReadAhead {
  readonly #count: number;
  readonly #isZero: (index: number) => boolean;
  readonly #eager: boolean;
  /** The one used last at the end. */
  readonly #streams: Stream[] = [];

  /** `isZero` says of a chunk that it needs no fetching: a run goes on behind it. */
  constructor(kind: ManifestKind, count: number, isZero: (index: number) => boolean) {
    this.#count = count;
    this.#isZero = isZero;
    this.#eager = READ_WHOLE.has(kind);
  }

  /** A reader missed chunk `index`, or met a mark on it. The piece to fetch now: its first chunk gets the mark. */
  onRead(index: number): { first: number; count: number } | undefined {
    const stream = this.#follow(index);
    if (!this.#eager && stream.chunks < RUN_MIN) return undefined;
    // Still well inside what was asked for: the mark of that piece comes later.
    if (stream.pieceChunks > 0 && index < stream.until - stream.pieceChunks) return undefined;
    const first = Math.max(stream.until, stream.next);
    stream.pieceChunks = Math.min(
      AHEAD_CHUNKS_MAX,
      stream.pieceChunks > 0 ? 2 * stream.pieceChunks : this.#eager ? AHEAD_CHUNKS_MAX : 1,
    );
    const count = Math.min(stream.pieceChunks, this.#count - first);
    if (count <= 0) return undefined;
    stream.until = first + count;
    return { first, count };
  }

  /** The stream that `index` belongs to, with `index` in it; a new one when it follows nothing. */
  #follow(index: number): Stream {
    let stream: Stream | undefined;
    const at = this.#streams.findLastIndex(
      ({ start, next, until }) => index >= Math.max(start, next - 2) && index <= Math.max(next, until),
    );
    if (at >= 0) [stream] = this.#streams.splice(at, 1);
    stream ??= { start: index, chunks: 0, next: index, pieceChunks: 0, until: index };
    if (index >= stream.next) {
      stream.chunks++;
      stream.next = this.#afterZeros(index + 1);
    }
    // Requests of one reader overtake each other: what began one chunk too far on is this run. (Two chunks at least,
    // or one who reads backwards would seem to go on forwards.)
    const early = stream.chunks < 2 ? -1 : this.#streams.findIndex(({ start }) => start === stream.next);
    if (early >= 0) {
      const [other] = this.#streams.splice(early, 1);
      stream.chunks += other!.chunks;
      stream.next = other!.next;
      stream.until = Math.max(stream.until, other!.until);
    }
    this.#streams.push(stream);
    if (this.#streams.length > STREAMS_MAX) this.#streams.shift();
    return stream;
  }

  #afterZeros(index: number): number {
    let next = index;
    while (next < this.#count && this.#isZero(next)) next++;
    return next;
  }
}
