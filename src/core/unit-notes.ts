/**
 * The byte that is kept of each unit of an image's cache file since its owner's start (`notes` of DirectBase), written by
 * all who serve reads:
 *
 *   bit 0     a reader had the unit (known when its mark of use is harvested)
 *   bit 1     the cache's own: it was fetched ahead of readers
 *   bits 4–7  which quarters of it readers had
 *
 * A start touches little more than half of the bytes of the units that it comes to (a Debian boot 42 MB in 75 MB of 256 KiB
 * units, 53 MB of 64 KiB quarters): whoever reads ahead for the next one reads those.
 */

/** Of one unit. */
export const QUARTERS = 4;
export const NOTE_READ = 1;
const FIRST_QUARTER_BIT = 4;

/** Notes that a reader had the bytes from `from` to before `end` of a unit; both within it. Any thread. */
export function noteRange(
  notes: Uint8Array,
  unit: number,
  unitBytes: number,
  from: number,
  end: number,
): void {
  const quarterBytes = unitBytes / QUARTERS;
  const first = Math.floor(from / quarterBytes);
  const last = Math.floor((end - 1) / quarterBytes);
  const bits = ((2 << last) - (1 << first)) << FIRST_QUARTER_BIT;
  if ((notes[unit]! & bits) !== bits) Atomics.or(notes, unit, bits);
}

/** Whether a reader had the unit, as far as its note says. */
export function wasRead(note: number): boolean {
  return note >= 1 << FIRST_QUARTER_BIT || (note & NOTE_READ) !== 0;
}

/** Whether readers had this quarter, or had the unit and nobody knows which. */
export function wasQuarterRead(note: number, quarter: number): boolean {
  const quarters = note >> FIRST_QUARTER_BIT;
  return quarters === 0 || (quarters & (1 << quarter)) !== 0;
}
