/**
 * What a guest's first serial console said. QEMU writes all of it to a log file, whether or not somebody is
 * attached to the console's socket; this reads that file, so the socket stays free for people and programs.
 */
import { closeSync, fstatSync, openSync, watch, type FSWatcher } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { StringDecoder } from 'node:string_decoder';
import { errnoOf } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import { punchHole } from '../core/linux.ts';

/** Looked at again even without a word from inotify, whose watches can run out. */
const LOOK_INTERVAL_MS = 250;
const READ_BYTES = 64 * 1024;
/** A longer line is not kept: no ready text stands that far right. */
const LINE_LENGTH_MAX = 64 * 1024;
const LAST_WORDS_BYTES = 4096;

/** Linux's first words when it gives up; it then stands still, so waiting longer is no use. */
const PANIC_TEXT = 'Kernel panic - not syncing';

/** What is kept of a console's log at least, and how much more may gather before the rest is given back. */
export const LOG_KEPT_BYTES = 1 * MIB;
const LOG_EXCESS_BYTES = 1 * MIB;
const LOG_LOOK_MS = 2000;

/** Bounds the space of a log that somebody else appends to: what is old becomes a hole, so that no byte is lost and
 * no reader has to look for its place again. */
export class ConsoleLog {
  readonly #file: string;
  readonly #timer: NodeJS.Timeout;
  #givenBackBytes = 0;

  constructor(file: string) {
    this.#file = file;
    this.#timer = setInterval(() => this.look(), LOG_LOOK_MS);
    this.#timer.unref();
  }

  look(): void {
    try {
      const fd = openSync(this.#file, 'r+');
      try {
        const end = fstatSync(fd).size - LOG_KEPT_BYTES;
        if (end - this.#givenBackBytes < LOG_EXCESS_BYTES) return;
        punchHole(fd, 0, end);
        this.#givenBackBytes = end;
      } finally {
        closeSync(fd);
      }
    } catch {
      // The machine is gone, or its disk has no holes; the log then grows.
    }
  }

  close(): void {
    clearInterval(this.#timer);
  }
}

/** The text came, or the kernel gave up first, with this line. */
export type ConsoleOutcome = 'ready' | { readonly panic: string };

export class ConsoleWatch {
  /** Never settles after `close`. */
  readonly outcome: Promise<ConsoleOutcome>;
  readonly #resolve: (outcome: ConsoleOutcome) => void;
  readonly #log: string;
  readonly #readyText: string;
  readonly #decoder = new StringDecoder('utf8');
  #watcher: FSWatcher | undefined;
  readonly #timer: NodeJS.Timeout;
  #file: FileHandle | undefined;
  #offsetBytes = 0;
  #line = '';
  #looking: Promise<void> | undefined;
  #again = false;
  #closed = false;

  constructor(log: string, readyText: string) {
    this.#log = log;
    this.#readyText = readyText;
    ({ promise: this.outcome, resolve: this.#resolve } = Promise.withResolvers<ConsoleOutcome>());
    try {
      this.#watcher = watch(log, () => this.#look());
      this.#watcher.on('error', () => this.#watcher?.close());
    } catch {
      // Without inotify the timer alone does it, a little later.
    }
    this.#timer = setInterval(() => this.#look(), LOOK_INTERVAL_MS);
    this.#look();
  }

  /** Reads what is left and ends the watch. Idempotent. */
  async close(): Promise<void> {
    clearInterval(this.#timer);
    this.#watcher?.close();
    this.#look();
    while (this.#looking !== undefined) await this.#looking;
    this.#closed = true;
    const file = this.#file;
    this.#file = undefined;
    await file?.close();
  }

  #look(): void {
    if (this.#closed) return;
    if (this.#looking !== undefined) {
      this.#again = true;
      return;
    }
    this.#looking = this.#read()
      .catch(() => undefined)
      .finally(() => {
        this.#looking = undefined;
        if (this.#again) {
          this.#again = false;
          this.#look();
        }
      });
  }

  async #read(): Promise<void> {
    try {
      this.#file ??= await open(this.#log, 'r');
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return;
      throw error;
    }
    const buffer = Buffer.allocUnsafe(READ_BYTES);
    for (;;) {
      const { bytesRead } = await this.#file.read(buffer, 0, buffer.length, this.#offsetBytes);
      if (bytesRead === 0) return;
      this.#offsetBytes += bytesRead;
      this.#take(this.#decoder.write(buffer.subarray(0, bytesRead)));
    }
  }

  #take(text: string): void {
    this.#line += text;
    if (this.#line.includes(this.#readyText)) this.#resolve('ready');
    const end = this.#line.lastIndexOf('\n');
    const panicAt = this.#line.lastIndexOf(PANIC_TEXT, end);
    if (panicAt !== -1) this.#resolve({ panic: this.#line.slice(panicAt, end).split('\n', 1)[0]!.trim() });
    this.#line = this.#line.slice(end + 1).slice(-LINE_LENGTH_MAX);
  }
}

/** The end of a text file, control characters left out, as one line; '' when there is nothing. */
export async function lastWords(file: string, lines: number): Promise<string> {
  let text: string;
  try {
    await using handle = await open(file, 'r');
    const { size } = await handle.stat();
    const buffer = Buffer.alloc(Math.min(size, LAST_WORDS_BYTES));
    await handle.read(buffer, 0, buffer.length, size - buffer.length);
    text = buffer.toString();
  } catch {
    return '';
  }
  return (
    text
      // Escape sequences of terminals, then every other control character but line ends.
      // eslint-disable-next-line no-control-regex
      .replaceAll(/\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|[\0-\x09\x0b-\x1f\x7f]/g, '')
      .split('\n')
      .map((line) => line.trim())
      .filter((line) => line !== '')
      .slice(-lines)
      .join(' / ')
  );
}
