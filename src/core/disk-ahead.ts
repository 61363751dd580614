/**
 * Reading ahead from the host's own disk, for one open of an image whose chunks are (in part) in its cache file. What
 * earlier starts fetched is what this one will read, and one large request costs a disk hardly more than a small one. So
 * a reader that comes to a unit first has the kernel read the rest of it, and units behind it that were read before:
 * twice as many each time while readers come to them, none where they do not. (What was only fetched, ahead of readers
 * who never came, is not among them; as long as nothing at all was read since the cache's start, whatever is here is.)
 *
 * It waits for nothing: posix_fadvise(WILLNEED) begins reads into the page cache. A unit is asked for once per open, so
 * random reads of a large image cost one more reading of it at the most; units behind are wasted only `slack` at a time.
 *
 * All threads that serve an open share `met`, a byte for each unit; marks may be lost between two of them, which costs a
 * second wish for the same bytes. What was wished and used is each thread's own.
 */
import { NOTE_READ, UNIT_PRESENT } from './image.ts';
import type { DirectBase } from './image.ts';
import { willNeed } from './linux.ts';

/** Of a unit since the open: nobody came; the kernel was asked to read it; a reader came. */
const NOT_MET = 0;
const AHEAD = 1;
const MET = 2;
/** Units behind the one that was met, at most, and how far behind; from the last unit on to the first. */
const SPAN_MAX = 64;
const REACH = 4096;
/** One of so many has to be used, after the first `slack`. */
const USED_SHARE = 3;
/** Where it is known what was read before, and where it is a guess. (The first on a Debian boot's replay, interleaved
 * with replays of the local file: 1.17 and 1.06 times its time with a span of 1 and a slack of 64, 0.96 and 1.06 with
 * these. A guess made a replay that had three times as much here as it wanted 1.9 times as long.) */
const KNOWN = { span: 16, slack: 256 };
const GUESSED = { span: 1, slack: 16 };

export class DiskAhead {
  readonly #fd: number;
  readonly #unitBytes: number;
  readonly #states: Uint8Array;
  readonly #met: Uint8Array;
  readonly #touched: Uint8Array;
  /** Undefined where nothing is known of earlier reads. */
  readonly #notes: Uint8Array | undefined;
  /** The unit that a reader came to first and that nobody had asked for; -1 for none. */
  #first = -1;
  #span: number;
  readonly #slack: number;
  #asked = 0;
  #used = 0;

  constructor(
    base: Pick<DirectBase, 'fd' | 'unitBytes' | 'states' | 'touched' | 'notes'>,
    met: SharedArrayBuffer,
  ) {
    this.#fd = base.fd;
    this.#unitBytes = base.unitBytes;
    this.#states = new Uint8Array(base.states);
    this.#met = new Uint8Array(met);
    this.#touched = new Uint8Array(base.touched);
    const notes = base.notes && new Uint8Array(base.notes);
    if (notes && (this.#touched.includes(1) || notes.some(wasRead))) this.#notes = notes;
    ({ span: this.#span, slack: this.#slack } = this.#notes ? KNOWN : GUESSED);
  }

  /** A reader has come to this unit, which is here. */
  note(unit: number): void {
    const before = this.#met[unit];
    if (before === MET) return;
    this.#met[unit] = MET;
    if (before === AHEAD) this.#used++;
    else this.#first = unit;
  }

  /** After the reader has its bytes: asks for what it led to. */
  go(): void {
    const first = this.#first;
    if (first < 0) return;
    this.#first = -1;
    const isWorthIt = USED_SHARE * this.#used >= this.#asked - this.#slack;
    this.#span = isWorthIt ? Math.min(2 * this.#span, SPAN_MAX) : 1;
    let left = isWorthIt ? this.#span : 0;
    let start = first;
    let end = first + 1;
    const count = this.#states.length;
    for (let step = 1; left > 0 && step <= Math.min(REACH, count - 1); step++) {
      const unit = (first + step) % count;
      if (this.#met[unit] !== NOT_MET || this.#states[unit] !== UNIT_PRESENT || !this.#isLikely(unit))
        continue;
      this.#met[unit] = AHEAD;
      this.#asked++;
      left--;
      if (unit !== end) {
        this.#wish(start, end);
        start = unit;
      }
      end = unit + 1;
    }
    this.#wish(start, end);
  }

  #isLikely(unit: number): boolean {
    return !this.#notes || this.#touched[unit] === 1 || wasRead(this.#notes[unit]!);
  }

  #wish(start: number, end: number): void {
    willNeed(this.#fd, start * this.#unitBytes, (end - start) * this.#unitBytes);
  }
}

function wasRead(note: number): boolean {
  return (note & NOTE_READ) !== 0;
}
