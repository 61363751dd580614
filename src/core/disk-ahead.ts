/**
 * Reading ahead from the host's own disk, for one open of an image whose chunks are (in part) in its cache file. What
 * earlier starts fetched is what this one will read, and one large request costs a disk hardly more than a small one. So
 * a reader that comes to a unit first has the kernel read what else was read of it before, and of units behind it:
 * twice as many each time while readers come to them, none where they do not. (What was only fetched, ahead of readers
 * who never came, is not among them; as long as nothing at all was read since the cache's start, whatever is here is.)
 *
 * One unit with each read, and not all of them at once: a disk does what it was asked first, and what a reader waits for
 * comes last. (The replay of a Debian boot waited 26 times, for 3 ms each, when all were asked for at once, and took 1.08
 * to 1.15 of the local file's time; one at a time 1.02 and 1.03, of quarters that were read 0.93 and 0.97.)
 *
 * It waits for nothing: posix_fadvise(WILLNEED) begins reads into the page cache. A unit is asked for once per open, so
 * random reads of a large image cost one more reading of it at the most; units behind are wasted only `slack` at a time.
 *
 * All threads that serve an open share `met`, a byte for each unit; marks may be lost between two of them, which costs a
 * second wish for the same bytes. What was wished and used is each thread's own.
 */
import { UNIT_PRESENT } from './image.ts';
import type { DirectBase } from './image.ts';
import { willNeed } from './linux.ts';
import { QUARTERS, wasQuarterRead, wasRead } from './unit-notes.ts';

/** Of a unit since the open: nobody came; the kernel was asked to read it; a reader came. */
const NOT_MET = 0;
const AHEAD = 1;
const MET = 2;
/** Units behind the one that was met, at most, and how far behind; from the last unit on to the first. */
const SPAN_MAX = 64;
const REACH = 4096;
/** One of so many has to be used, after the first `slack`. */
const USED_SHARE = 3;
/** Where it is known what was read before, and where it is a guess. (A guess of more made a replay that had three times
 * as much here as it wanted 1.9 times as long.) */
const KNOWN = { span: 16, slack: 256 };
const GUESSED = { span: 1, slack: 16 };

export class DiskAhead {
  readonly #fd: number;
  readonly #unitBytes: number;
  readonly #states: Uint8Array;
  readonly #met: Uint8Array;
  readonly #touched: Uint8Array;
  readonly #hashes: BigUint64Array | undefined;
  /** Undefined where nothing is known of earlier reads. */
  readonly #notes: Uint8Array | undefined;
  /** The unit that a reader came to first and that nobody had asked for; -1 for none. */
  #first = -1;
  #span: number;
  /** Units still to be asked for, behind which, and how far behind it to look for the next. */
  #left = 0;
  #from = 0;
  #step = 0;
  readonly #slack: number;
  #asked = 0;
  #used = 0;

  constructor(
    base: Pick<DirectBase, 'fd' | 'unitBytes' | 'states' | 'touched' | 'notes' | 'hashes'>,
    met: SharedArrayBuffer,
  ) {
    this.#fd = base.fd;
    this.#unitBytes = base.unitBytes;
    this.#states = new Uint8Array(base.states);
    this.#met = new Uint8Array(met);
    this.#touched = new Uint8Array(base.touched);
    if (base.hashes) this.#hashes = new BigUint64Array(base.hashes);
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
    if (first >= 0) {
      this.#first = -1;
      const isWorthIt = USED_SHARE * this.#used >= this.#asked - this.#slack;
      this.#span = isWorthIt ? Math.min(2 * this.#span, SPAN_MAX) : 1;
      this.#left = isWorthIt ? this.#span : 0;
      this.#from = first;
      this.#step = 1;
      this.#wish(first);
    }
    if (this.#left > 0) this.#askNext();
  }

  #askNext(): void {
    const count = this.#states.length;
    for (; this.#step <= Math.min(REACH, count - 1); this.#step++) {
      const unit = (this.#from + this.#step) % count;
      if (this.#met[unit] !== NOT_MET || this.#states[unit] !== UNIT_PRESENT || !this.#isLikely(unit))
        continue;
      this.#met[unit] = AHEAD;
      this.#asked++;
      this.#left--;
      this.#step++;
      this.#wish(unit);
      return;
    }
    this.#left = 0;
  }

  #isLikely(unit: number): boolean {
    // Of zeros, which nobody has to read, or one that only the main thread knows.
    if (this.#hashes && this.#hashes[unit] === 0n) return false;
    return !this.#notes || this.#touched[unit] === 1 || wasRead(this.#notes[unit]!);
  }

  /** Of a unit, what was read before, as far as that is known. */
  #wish(unit: number): void {
    const note = this.#notes?.[unit] ?? 0;
    const quarterBytes = this.#unitBytes / QUARTERS;
    for (let quarter = 0; quarter < QUARTERS; quarter++) {
      const from = quarter;
      while (quarter < QUARTERS && wasQuarterRead(note, quarter)) quarter++;
      if (quarter === from) continue;
      willNeed(this.#fd, unit * this.#unitBytes + from * quarterBytes, (quarter - from) * quarterBytes);
    }
  }
}
