/**
 * Reading ahead from the host's own disk, for one open of an image whose chunks are (in part) in its cache file. What
 * earlier starts fetched is what this one will read, and one large request costs a disk hardly more than a small one. So
 * a reader that comes to a unit first has the kernel read the rest of it, and units behind it that are here: twice as
 * many each time while readers come to them, none where they do not.
 *
 * It waits for nothing: posix_fadvise(WILLNEED) begins reads into the page cache. A unit is asked for once per open, so
 * random reads of a large image cost one more reading of it at the most; units behind are wasted only SLACK at a time.
 *
 * All threads that serve an open share `met`, a byte for each unit; marks may be lost between two of them, which costs a
 * second wish for the same bytes. What was wished and used is each thread's own.
 */
import { UNIT_PRESENT } from './image.ts';
import { willNeed } from './linux.ts';

/** Of a unit since the open: nobody came; the kernel was asked to read it; a reader came. */
const NOT_MET = 0;
const AHEAD = 1;
const MET = 2;
/** Units behind the one that was met, at most, and how far behind. */
const SPAN_MAX = 32;
const REACH = 512;
/** One of so many has to be used, after the first SLACK. */
const USED_SHARE = 3;
const SLACK = 16;

export class DiskAhead {
  readonly #fd: number;
  readonly #unitBytes: number;
  readonly #states: Uint8Array;
  readonly #met: Uint8Array;
  /** The unit that a reader came to first and that nobody had asked for; -1 for none. */
  #first = -1;
  #span = 1;
  #asked = 0;
  #used = 0;

  constructor(base: { fd: number; unitBytes: number; states: SharedArrayBuffer }, met: SharedArrayBuffer) {
    this.#fd = base.fd;
    this.#unitBytes = base.unitBytes;
    this.#states = new Uint8Array(base.states);
    this.#met = new Uint8Array(met);
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
    const isWorthIt = USED_SHARE * this.#used >= this.#asked - SLACK;
    this.#span = isWorthIt ? Math.min(2 * this.#span, SPAN_MAX) : 1;
    let left = isWorthIt ? this.#span : 0;
    let start = first;
    let end = first + 1;
    const last = Math.min(first + REACH, this.#states.length - 1);
    for (let unit = end; left > 0 && unit <= last; unit++) {
      if (this.#states[unit] !== UNIT_PRESENT || this.#met[unit] !== NOT_MET) continue;
      this.#met[unit] = AHEAD;
      this.#asked++;
      left--;
      if (unit > end) {
        this.#wish(start, end);
        start = unit;
      }
      end = unit + 1;
    }
    this.#wish(start, end);
  }

  #wish(start: number, end: number): void {
    willNeed(this.#fd, start * this.#unitBytes, (end - start) * this.#unitBytes);
  }
}
