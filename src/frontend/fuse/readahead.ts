/**
 * How far the kernel reads ahead of a reader of this mount. The figure is the mount's, but every open of a file takes
 * what it is at that moment (file_ra_state_init, mm/readahead.c, called when FUSE_OPEN has been answered) and keeps it.
 * So it is low for a moment while a machine opens memory that it will map: a guest that goes on touches single pages all
 * over, and around each that is not there the kernel would read 128 KiB, in the mount of a cold host: over the link. (A
 * Debian guest of 512 MiB touched about 6 MiB of pages until it answered, in 22 MiB of 16 KiB chunks; of these, 36 MiB were
 * read with 16 KiB around each page.) Who opens another file in that moment reads less ahead: slower, not wrong.
 */
import { writeFileSync } from 'node:fs';
import { KIB } from '../../core/limits.ts';

const PAGE_BYTES = 4 * KIB;
/** From our answer to an open until the kernel has looked: microseconds, on a busy host a few turns of the scheduler. */
const LOW_MS = 50;

export class Readahead {
  readonly #file: string;
  readonly #bytes: number;
  readonly #log: (message: string) => void;
  #timer: NodeJS.Timeout | undefined;

  /** `device`: of the mount, as in mountinfo. `bytes`: what it is but for those moments. */
  constructor(device: string, bytes: number, log: (message: string) => void) {
    this.#file = `/sys/class/bdi/${device}/read_ahead_kb`;
    this.#bytes = bytes;
    this.#log = log;
  }

  /** Tells the kernel: INIT can only lower its own figure, and a daemon that died may have left it low. */
  apply(): void {
    try {
      this.#write(this.#bytes);
    } catch (error) {
      this.#log(`the mount's read-ahead stays as it is: ${String(error)}`);
    }
  }

  /** Call it just before the answer to an open that is to read single pages. Without privilege nothing happens. */
  lowForAMoment(): void {
    try {
      this.#write(Math.min(PAGE_BYTES, this.#bytes));
    } catch {
      return;
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.apply(), LOW_MS);
  }

  /** The mount is gone. */
  close(): void {
    clearTimeout(this.#timer);
  }

  #write(bytes: number): void {
    writeFileSync(this.#file, String(Math.floor(bytes / KIB)));
  }
}
