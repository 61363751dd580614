/**
 * Decoding chunks in a thread of its own, for whole images and profiles on their way in: to decompress and hash
 * 256 KiB takes half a millisecond, in which the main thread can read the tunnel and serve others (a whole image over ssh
 * without a link limit, server and client on two processors: 155 MB/s of image instead of 92). A chunk that somebody
 * waits for is decoded where it is: two messages would only delay it.
 *
 * Small chunks that come in one turn of the event loop go there as one message, and come back as one: a message costs as
 * much as a chunk of 16 KiB, and memory images have thousands of those.
 *
 * The thread is started by the first chunk, or by who expects one, and ends with `close`; it keeps no process alive. Should it die, what was
 * given to it is decoded by the caller's thread, and so is all that follows.
 */
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { bufferOf } from './bytes.ts';
import { decodeChunk } from './chunk.ts';
import type { ChunkEncoding, ChunkRef, StoredChunk } from './chunk.ts';
import { GridError } from './errors.ts';
import { KIB, MIB } from './limits.ts';

const WORKER_FILE = new URL(`./decoder-worker${path.extname(import.meta.filename)}`, import.meta.url);

/** What is larger goes alone, and comes back without a copy. Buffer.poolSize of any Node is no more. */
export const GATHERED_BYTES_MAX = 64 * KIB;
/** Plain bytes of one message, about: as one comes back, the next is under way. */
const MESSAGE_BYTES = 1 * MIB;

/** One chunk of a message: where its stored bytes are in it, and what they have to be. */
export interface DecodeItem {
  readonly encoding: ChunkEncoding;
  readonly start: number;
  readonly end: number;
  readonly ref: ChunkRef;
}

/** To the thread; answers come in the same order. */
export interface DecodeRequest {
  readonly stored: Uint8Array;
  readonly items: readonly DecodeItem[];
}

/** From it: of each chunk where its plain bytes are, or why there are none. */
export interface DecodeAnswer {
  readonly plain: Uint8Array;
  readonly items: readonly ({ readonly start: number; readonly end: number } | string)[];
}

interface Waiting {
  readonly chunk: StoredChunk;
  readonly ref: ChunkRef;
  readonly resolve: (plain: Buffer) => void;
  readonly reject: (error: GridError) => void;
}

export class ChunkDecoder {
  #worker: Worker | 'gone' | undefined;
  /** Of this turn of the event loop. */
  #gathered: Waiting[] = [];
  #gatheredBytes = 0;
  /** What each message that was not answered yet holds. */
  readonly #sent: (readonly Waiting[])[] = [];

  /** Starts the thread, so that the first chunk need not wait for it. */
  prepare(): void {
    this.#worker ??= this.#start();
  }

  /** As `decodeChunk`: plain bytes, checked. Rejects with corrupt; with closed when the decoder is closed meanwhile. */
  decode(chunk: StoredChunk, ref: ChunkRef): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.prepare();
      const waiting: Waiting = { chunk, ref, resolve, reject };
      if (this.#worker === 'gone') {
        decodeHere(waiting);
        return;
      }
      if (ref.plainBytes > GATHERED_BYTES_MAX) {
        this.#send([waiting]);
        return;
      }
      if (this.#gathered.length === 0) setImmediate(() => this.#sendGathered());
      this.#gathered.push(waiting);
      this.#gatheredBytes += ref.plainBytes;
      if (this.#gatheredBytes >= MESSAGE_BYTES) this.#sendGathered();
    });
  }

  /** Ends the thread. What was not decoded rejects with closed. */
  async close(): Promise<void> {
    const worker = this.#worker;
    this.#worker = 'gone';
    const closed = new GridError('closed', 'the chunk is not wanted any more');
    for (const { reject } of this.#takeAll()) reject(closed);
    if (worker !== 'gone') await worker?.terminate();
  }

  #sendGathered(): void {
    if (this.#gathered.length === 0 || this.#worker === 'gone') return;
    this.#send(this.#gathered);
    this.#gathered = [];
    this.#gatheredBytes = 0;
  }

  #send(all: readonly Waiting[]): void {
    // A copy to hand over: the bytes are part of what the socket read, and the next source may need them.
    const stored = new Uint8Array(all.reduce((sum, { chunk }) => sum + chunk.bytes.length, 0));
    let start = 0;
    const items = all.map(({ chunk: { encoding, bytes }, ref }): DecodeItem => {
      stored.set(bytes, start);
      return { encoding, start, end: (start += bytes.length), ref };
    });
    this.#sent.push(all);
    const request: DecodeRequest = { stored, items };
    (this.#worker as Worker).postMessage(request, [stored.buffer]);
  }

  #takeAll(): Waiting[] {
    return [...this.#sent.splice(0).flat(), ...this.#gathered.splice(0)];
  }

  #start(): Worker {
    // Flags of the main program (--cpu-prof, say) are not the worker's.
    const worker = new Worker(WORKER_FILE, { name: 'decoder', execArgv: [] });
    worker.unref();
    worker.on('message', ({ plain, items }: DecodeAnswer) => {
      for (const [index, { resolve, reject }] of (this.#sent.shift() ?? []).entries()) {
        const item = items[index]!;
        if (typeof item === 'string') reject(new GridError('corrupt', item));
        else resolve(bufferOf(plain.subarray(item.start, item.end)));
      }
    });
    worker.on('error', () => undefined);
    worker.on('exit', () => {
      this.#worker = 'gone';
      for (const waiting of this.#takeAll()) decodeHere(waiting);
    });
    return worker;
  }
}

function decodeHere({ chunk, ref, resolve, reject }: Waiting): void {
  try {
    resolve(decodeChunk(chunk, ref));
  } catch (error) {
    reject(error as GridError);
  }
}
