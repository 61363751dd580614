/**
 * A worker thread: takes requests from its own device descriptor, answers READ and WRITE of files that lie on
 * this host straight from their files, and hands everything else to the main thread, which answers on the same
 * descriptor. Per request: one read(2), one pread or pwrite, one write(2); no allocation, no other thread. Large reads
 * are not copied here: the kernel takes them from the cache file's own pages (FileSender in linux.ts). A read that the
 * page cache cannot answer, and a write where the last one was slow, are waits: see turns.ts.
 *
 * The thread sits in blocking system calls and never returns to its event loop, so messages to it are fetched
 * when it meets a handle that it does not know: the main thread posts a handle before the kernel learns it.
 * It ends when the device says ENODEV: the mount is gone.
 *
 * Tried and left, with the smallest loop in C on two processors: splice(2) for large reads (as fast as their mapping, but
 * needs a pipe that users may not have); splice for writes (the kernel copies a direct writer's bytes all the same). FUSE
 * over io_uring is a host-wide parameter of the kernel's module that is off unless its operator turns it on.
 */
import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import { DirectFile } from '../../core/direct-io.ts';
import { errnoOf, invariant } from '../../core/errors.ts';
import type { DirectMap } from '../../core/image.ts';
import { FUSE_REQUEST_BYTES_MAX, KIB } from '../../core/limits.ts';
import { FileSender, pageAligned, preadNow, readInto, vectorOf, writeFrom } from '../../core/linux.ts';
import { QuietThread } from '../../core/quiet.ts';
import { countLatency, HISTOGRAM_DOUBLES } from '../../core/usage.ts';
import { stampMicroseconds } from './operation-times.ts';
import {
  errnoNumberOf,
  IN_HEADER_BYTES,
  OUT_HEADER_BYTES,
  READ,
  REQUEST_BUFFER_BYTES,
  STAMP_AT,
  WRITE,
  WRITE_BODY_BYTES,
} from './protocol.ts';
import { Eager } from './eager.ts';
import { Turns } from './turns.ts';

export interface WorkerData {
  /** COUNTERS doubles. */
  readonly fuseCounters: SharedArrayBuffer;
  /** One i32 for all workers of a mount: how many are in the device. */
  readonly fuseRunning: SharedArrayBuffer;
  /** Of turns.ts, and how many may be awake. */
  readonly fuseTurns: SharedArrayBuffer;
  readonly awakeMax: number;
  /** Of eager.ts. */
  readonly fuseEager: SharedArrayBuffer;
  /** Of the process's QuietPoints, with this worker's slot. */
  readonly quietCounters: SharedArrayBuffer;
  readonly quietSlot: number;
}

/** To a worker. `start` comes first; after it the worker reads its messages only by receiveMessageOnPort. */
export type ToWorker =
  | { readonly kind: 'start'; readonly fd: number }
  | {
      readonly kind: 'opened';
      readonly handle: number;
      readonly map: DirectMap | undefined;
      /** For all workers together: see src/core/disk-ahead.ts. */
      readonly met: SharedArrayBuffer | undefined;
    }
  | { readonly kind: 'released'; readonly handle: number };

/** From a worker: bytes are a request; 'ready' before start, 'ended' last. */
export type FromWorker =
  | Uint8Array
  | { readonly kind: 'ready' }
  | { readonly kind: 'log'; readonly message: string }
  | { readonly kind: 'ended' };

/** Indexes into a worker's counters (doubles in shared memory, written by that worker alone). */
export const COUNT_READS = 0;
export const COUNT_READ_BYTES = 1;
export const COUNT_WRITES = 2;
export const COUNT_WRITE_BYTES = 3;
export const COUNT_FORWARDED = 4;
/** Histograms of the times of direct reads and writes. */
export const TIMES_READ = 5;
export const TIMES_WRITE = TIMES_READ + HISTOGRAM_DOUBLES;
export const COUNTERS = TIMES_WRITE + HISTOGRAM_DOUBLES;

const PAGE = 4096;

/** A request that took longer has waited for something: the next of its kind is expected to. */
const SLOW_MS = 2;
/** From here on a reply is taken from the file itself: below, four system calls cost more than a copy. */
const MAPPED_BYTES_MIN = 64 * KIB;

type Found =
  | 'sent'
  /** Into the output buffer. */
  | 'filled'
  | 'waits'
  | 'unknown';

/** A worker that rests hears at least this often of handles that were opened and released. */
const REST_MS = 60_000;
const WRITE_DATA_AT = IN_HEADER_BYTES + WRITE_BODY_BYTES;

class Server {
  readonly #fd: number;
  readonly #post: (message: FromWorker, transfer?: ArrayBuffer[]) => void;
  readonly #receive: () => ToWorker | undefined;
  readonly #counters: Float64Array;
  readonly #quiet: QuietThread;
  /** Of each handle that the main thread announced; undefined where it serves the file itself. */
  readonly #maps = new Map<number, { map: DirectMap; met: SharedArrayBuffer | undefined } | undefined>();
  readonly #files = new Map<number, DirectFile>();
  readonly #input = pageAligned(REQUEST_BUFFER_BYTES, WRITE_DATA_AT);
  readonly #inputWords = new Uint32Array(this.#input.buffer, this.#input.byteOffset, 20);
  readonly #output = pageAligned(OUT_HEADER_BYTES + FUSE_REQUEST_BYTES_MAX, OUT_HEADER_BYTES);
  readonly #outputWords = new Uint32Array(this.#output.buffer, this.#output.byteOffset, 6);
  readonly #sender = new FileSender(this.#output.subarray(0, OUT_HEADER_BYTES), FUSE_REQUEST_BYTES_MAX);
  /** Views by length in pages, made at first use: requests of whole pages allocate nothing. */
  readonly #targets: Buffer[] = [];
  readonly #sources: Buffer[] = [];
  /** Of #targets, for preadNow. */
  readonly #vectors: BigUint64Array[] = [];
  readonly #turns: Turns;
  readonly #eager: Eager;
  #readsWait = false;
  #writesWait = false;
  /** When the request under way was read, by `performance.now()`. */
  #startedMs = 0;

  constructor(
    fd: number,
    post: (message: FromWorker, transfer?: ArrayBuffer[]) => void,
    receive: () => ToWorker | undefined,
    counters: Float64Array,
    quiet: QuietThread,
    turns: Turns,
    eager: Eager,
  ) {
    this.#eager = eager;
    this.#turns = turns;
    this.#fd = fd;
    this.#post = post;
    this.#receive = receive;
    this.#counters = counters;
    this.#quiet = quiet;
  }

  /** Returns when the device is gone. */
  run(): void {
    const drain = this.#drain.bind(this);
    for (;;) {
      this.#turns.rest(REST_MS, drain);
      this.#eager.ask();
      const length = this.#next();
      if (length === 0) return;
      this.#startedMs = performance.now();
      const opcode = this.#inputWords[1]!;
      if (opcode === READ) {
        if (this.#read()) continue;
      } else if (opcode === WRITE) {
        if (this.#write(length)) continue;
      } else {
        this.#drain();
      }
      this.#forward(length);
    }
  }

  /** One request into the input buffer; 0 when there will be none any more. */
  #next(): number {
    for (;;) {
      try {
        const length = readInto(this.#fd, this.#input, REQUEST_BUFFER_BYTES);
        if (length === 0 || length >= IN_HEADER_BYTES) return length;
      } catch (error) {
        const errno = errnoOf(error);
        // ENOENT: the request was given up between its announcement and this read.
        if (errno === 'EINTR' || errno === 'EAGAIN' || errno === 'ENOENT') continue;
        if (errno === 'ENODEV' || errno === 'ECONNABORTED') return 0;
        throw error;
      }
    }
  }

  #u64(word: number): number {
    return this.#inputWords[word]! + this.#inputWords[word + 1]! * 2 ** 32;
  }

  /** Body: u64 fh, u64 offset, u32 size, … False: the main thread has to. */
  #read(): boolean {
    const file = this.#file(this.#u64(10));
    if (!file) return false;
    const offsetBytes = this.#u64(12);
    const wantedBytes = this.#inputWords[14]!;
    const lengthBytes = Math.max(0, Math.min(wantedBytes, file.map.sizeBytes - offsetBytes));
    if (lengthBytes > FUSE_REQUEST_BYTES_MAX) return false;
    let sent = false;
    if (lengthBytes > 0) {
      let waits = this.#readsWait;
      if (waits) this.#turns.leave();
      // What the states promise holds until `leave`: see src/core/quiet.ts.
      this.#quiet.enter();
      try {
        const found = this.#readNow(file, offsetBytes, lengthBytes);
        sent = found === 'sent';
        if (found === 'waits' && !waits) {
          waits = true;
          this.#turns.leave();
        }
        const filled = sent || found === 'filled';
        if (!filled && !file.read(this.#target(lengthBytes), offsetBytes)) return false;
      } catch {
        return false; // a bad spot of the disk: the image may know another way to these bytes
      } finally {
        this.#quiet.leave();
        if (waits) this.#turns.return();
        this.#readsWait = performance.now() - this.#startedMs > SLOW_MS;
      }
    }
    this.#counters[COUNT_READS]!++;
    this.#counters[COUNT_READ_BYTES]! += lengthBytes;
    file.usage?.countRead(lengthBytes);
    if (!sent) this.#reply(0, OUT_HEADER_BYTES + lengthBytes);
    file.readAhead();
    countLatency(this.#counters, TIMES_READ, performance.now() - this.#startedMs);
    return true;
  }

  /** What the page cache of one file has; 'waits' where the disk has to be asked. */
  #readNow(file: DirectFile, offsetBytes: number, lengthBytes: number): Found {
    if (lengthBytes % PAGE !== 0) return 'unknown';
    const fd = file.sourceOf(offsetBytes, lengthBytes);
    if (fd < 0) return 'unknown';
    if (lengthBytes >= MAPPED_BYTES_MIN && offsetBytes % PAGE === 0) {
      return this.#sendMapped(fd, offsetBytes, lengthBytes) ? 'sent' : 'waits';
    }
    const vector = (this.#vectors[lengthBytes / PAGE] ??= vectorOf(this.#target(lengthBytes)));
    const got = preadNow(fd, vector, offsetBytes);
    if (got === lengthBytes) return 'filled';
    return got === 0 ? 'unknown' : 'waits';
  }

  #sendMapped(fd: number, offsetBytes: number, lengthBytes: number): boolean {
    this.#writeHeader(0, OUT_HEADER_BYTES + lengthBytes);
    try {
      return this.#sender.send(this.#fd, fd, offsetBytes, lengthBytes);
    } catch (error) {
      // Else the page went in between, and with it the reply: what follows tries again, and the kernel knows.
      return isGone(error);
    }
  }

  #target(lengthBytes: number): Buffer {
    return this.#view(this.#targets, this.#output, OUT_HEADER_BYTES, lengthBytes);
  }

  /** Body: u64 fh, u64 offset, u32 size, …, data at 80. False: the main thread has to. */
  #write(length: number): boolean {
    const file = this.#file(this.#u64(10));
    if (!file?.map.layer) return false;
    const offsetBytes = this.#u64(12);
    const lengthBytes = this.#inputWords[14]!;
    const fits = lengthBytes <= length - WRITE_DATA_AT && offsetBytes + lengthBytes <= file.map.sizeBytes;
    if (lengthBytes === 0 || !fits) return false;
    const waits = this.#writesWait;
    if (waits) this.#turns.leave();
    this.#quiet.enter();
    try {
      if (!file.write(this.#view(this.#sources, this.#input, WRITE_DATA_AT, lengthBytes), offsetBytes))
        return false;
    } catch (error) {
      this.#reply(errnoNumberOf(error), OUT_HEADER_BYTES);
      return true;
    } finally {
      this.#quiet.leave();
      if (waits) this.#turns.return();
      this.#writesWait = performance.now() - this.#startedMs > SLOW_MS;
    }
    this.#counters[COUNT_WRITES]!++;
    this.#counters[COUNT_WRITE_BYTES]! += lengthBytes;
    this.#outputWords[4] = lengthBytes;
    this.#outputWords[5] = 0;
    file.usage?.countWrite(lengthBytes);
    this.#reply(0, OUT_HEADER_BYTES + 8);
    countLatency(this.#counters, TIMES_WRITE, performance.now() - this.#startedMs);
    return true;
  }

  /** The file of a handle; undefined when it cannot be served from here. */
  #file(handle: number): DirectFile | undefined {
    const known = this.#files.get(handle);
    if (known) return known;
    if (!this.#maps.has(handle)) this.#drain();
    const opened = this.#maps.get(handle);
    if (!opened) return undefined;
    // Now, not when it was announced: it may be closed already when this thread hears of it.
    const file = new DirectFile(opened.map, { verifies: true, met: opened.met });
    this.#files.set(handle, file);
    return file;
  }

  #view(views: Buffer[], buffer: Buffer, start: number, lengthBytes: number): Buffer {
    if (lengthBytes % PAGE !== 0) return buffer.subarray(start, start + lengthBytes);
    return (views[lengthBytes / PAGE] ??= buffer.subarray(start, start + lengthBytes));
  }

  #reply(errno: number, length: number): void {
    this.#writeHeader(errno, length);
    const failure = send(this.#fd, this.#output, length);
    if (failure !== undefined) this.#post({ kind: 'log', message: failure });
  }

  #writeHeader(errno: number, length: number): void {
    const words = this.#outputWords;
    words[0] = length;
    words[1] = -errno;
    words[2] = this.#inputWords[2]!;
    words[3] = this.#inputWords[3]!;
  }

  #forward(length: number): void {
    this.#counters[COUNT_FORWARDED]!++;
    const copy = new Uint8Array(length);
    copy.set(this.#input.subarray(0, length));
    new DataView(copy.buffer).setUint32(STAMP_AT, stampMicroseconds(), true);
    this.#post(copy, [copy.buffer]);
  }

  #drain(): void {
    for (let message = this.#receive(); message !== undefined; message = this.#receive()) {
      if (message.kind === 'opened') {
        const { handle, map, met } = message;
        this.#maps.set(handle, map && { map, met });
      } else if (message.kind === 'released') {
        this.#maps.delete(message.handle);
        this.#files.delete(message.handle);
      }
    }
  }
}

/**
 * Sends one reply. ENOENT and ENODEV mean that nobody waits for it any more. A reply that the kernel refuses is a
 * bug of ours; the asker gets EIO instead of waiting for ever, and the caller gets a sentence for the log.
 */
export function send(fd: number, reply: Buffer, length: number): string | undefined {
  try {
    writeFrom(fd, reply, length);
    return undefined;
  } catch (error) {
    if (isGone(error)) return undefined;
    const isError = length === OUT_HEADER_BYTES && reply.readInt32LE(4) !== 0;
    if (!isError) {
      const refusal = Buffer.from(reply.subarray(0, OUT_HEADER_BYTES));
      refusal.writeUInt32LE(OUT_HEADER_BYTES, 0);
      refusal.writeInt32LE(-errnoNumberOf(undefined), 4);
      send(fd, refusal, OUT_HEADER_BYTES);
    }
    return `the kernel refused a reply of ${length} bytes: ${String(error)}`;
  }
}

/** Whether a reply failed because nobody waits for it any more. */
function isGone(error: unknown): boolean {
  const errno = errnoOf(error);
  return errno === 'ENOENT' || errno === 'ENODEV' || errno === 'ECONNABORTED';
}

if (parentPort && isWorkerData(workerData)) {
  const port = parentPort;
  const counters = new Float64Array(workerData.fuseCounters);
  const running = new Int32Array(workerData.fuseRunning);
  const quiet = new QuietThread(workerData.quietCounters, workerData.quietSlot);
  const post = (message: FromWorker, transfer: ArrayBuffer[] = []) => port.postMessage(message, transfer);
  port.once('message', (first: ToWorker) => {
    invariant(first.kind === 'start', 'a worker is started before it is told anything else');
    const receive = () => receiveMessageOnPort(port)?.message as ToWorker | undefined;
    const turns = new Turns(workerData.fuseTurns, workerData.awakeMax);
    try {
      const eager = new Eager(workerData.fuseEager, first.fd);
      new Server(first.fd, post, receive, counters, quiet, turns, eager).run();
    } finally {
      // Also when it throws: those that rest have to serve until the mount is down, and then to end.
      turns.end();
    }
    post({ kind: 'ended' });
    Atomics.sub(running, 0, 1);
    Atomics.notify(running, 0);
    port.close();
  });
  post({ kind: 'ready' });
}

function isWorkerData(data: unknown): data is WorkerData {
  return typeof data === 'object' && data !== null && 'fuseCounters' in data;
}
