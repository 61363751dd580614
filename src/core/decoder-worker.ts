/** The body of a decoder's thread (see decoder.ts): one chunk in, one answer out. */
import { parentPort } from 'node:worker_threads';
import { decodeChunk } from './chunk.ts';
import { KIB } from './limits.ts';
import type { DecodeAnswer, DecodeRequest } from './decoder.ts';

/** Buffer.poolSize of any Node, and more. */
const POOLED_BYTES_MAX = 64 * KIB;

parentPort?.on('message', ({ chunk, ref }: DecodeRequest) => {
  let answer: DecodeAnswer;
  let moved: ArrayBuffer[] = [];
  try {
    const plain = decodeChunk(chunk, ref);
    // Small ones may share a pool, which cannot be given away.
    const own = plain.length < POOLED_BYTES_MAX ? new Uint8Array(plain) : plain;
    answer = own;
    moved = [own.buffer as ArrayBuffer];
  } catch (error) {
    answer = error instanceof Error ? error.message : String(error);
  }
  // oxlint-disable-next-line unicorn/require-post-message-target-origin -- a thread, not a browser window
  parentPort?.postMessage(answer, moved);
});
