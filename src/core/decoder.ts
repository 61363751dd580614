/**
 * Decoding chunks in a thread of its own, for whole images and profiles on their way in: to decompress and hash
 * 256 KiB takes half a millisecond, in which the main thread can read the tunnel and serve others (a whole image over ssh without a link limit, server and
 * client on two processors: 155 MB/s of image instead of 92). A chunk that somebody waits for is decoded where it is:
 * two messages would only delay it.
 *
 * The thread is started by the first chunk and ends with `close`; it keeps no process alive. Should it die, what was
 * given to it is decoded by the caller's thread, and so is all that follows.
 */
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { bufferOf } from './bytes.ts';
import { decodeChunk } from './chunk.ts';
import type { ChunkRef, StoredChunk } from './chunk.ts';
import { GridError } from './errors.ts';

const WORKER_FILE = new URL(`./decoder-worker${path.extname(import.meta.filename)}`, import.meta.url);

/** To the thread; answers come in the same order. */
export interface DecodeRequest {
  readonly chunk: StoredChunk;
  readonly ref: ChunkRef;
}

/** From it: the plain bytes, or why there are none. */
export type DecodeAnswer = Uint8Array | string;

interface Waiting extends DecodeRequest {
  readonly resolve: (plain: Buffer) => void;
  readonly reject: (error: GridError) => void;
}

export class ChunkDecoder {
  #worker: Worker | 'gone' | undefined;
  readonly #waiting: Waiting[] = [];

  /** As `decodeChunk`: plain bytes, checked. Rejects with corrupt; with closed when the decoder is closed meanwhile. */
  decode(chunk: StoredChunk, ref: ChunkRef): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.#worker ??= this.#start();
      const waiting: Waiting = { chunk, ref, resolve, reject };
      if (this.#worker === 'gone') {
        decodeHere(waiting);
        return;
      }
      this.#waiting.push(waiting);
      // A copy to hand over: the bytes are part of what the socket read, and the next source may need them.
      const bytes = new Uint8Array(chunk.bytes);
      const request: DecodeRequest = { chunk: { encoding: chunk.encoding, bytes }, ref };
      this.#worker.postMessage(request, [bytes.buffer]);
    });
  }

  /** Ends the thread. What was not decoded rejects with closed. */
  async close(): Promise<void> {
    const worker = this.#worker;
    this.#worker = 'gone';
    const closed = new GridError('closed', 'the chunk is not wanted any more');
    for (const { reject } of this.#waiting.splice(0)) reject(closed);
    if (worker !== 'gone') await worker?.terminate();
  }

  #start(): Worker {
    // Flags of the main program (--cpu-prof, say) are not the worker's.
    const worker = new Worker(WORKER_FILE, { name: 'decoder', execArgv: [] });
    worker.unref();
    worker.on('message', (answer: DecodeAnswer) => {
      const waiting = this.#waiting.shift();
      if (typeof answer !== 'string') waiting?.resolve(bufferOf(answer));
      else waiting?.reject(new GridError('corrupt', answer));
    });
    worker.on('error', () => undefined);
    worker.on('exit', () => {
      this.#worker = 'gone';
      for (const waiting of this.#waiting.splice(0)) decodeHere(waiting);
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
