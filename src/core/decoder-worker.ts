/** The body of a decoder's thread (see decoder.ts): some chunks in, one answer for all of them out. */
import { parentPort } from 'node:worker_threads';
import { decodeChunk, decodeTogether } from './chunk.ts';
import { GATHERED_BYTES_MAX } from './decoder.ts';
import type { DecodeAnswer, DecodeItem, DecodeRequest } from './decoder.ts';

function answerTo({ stored, items }: DecodeRequest): DecodeAnswer & { plain: Uint8Array<ArrayBuffer> } {
  const decode = ({ encoding, start, end, ref }: DecodeItem) =>
    decodeChunk({ encoding, bytes: stored.subarray(start, end) }, ref);
  const reasonOf = (error: unknown) => (error instanceof Error ? error.message : String(error));
  const [first] = items;
  if (first && first.ref.plainBytes > GATHERED_BYTES_MAX) {
    try {
      const plain = decode(first) as Uint8Array<ArrayBuffer>;
      return { plain, items: [{ start: 0, end: plain.length }] };
    } catch (error) {
      return { plain: new Uint8Array(), items: [reasonOf(error)] };
    }
  }
  const together = items.every(({ encoding }) => encoding === 'zstd')
    ? decodeTogether(
        stored,
        items.map(({ ref }) => ref),
      )
    : undefined;
  if (together) {
    let at = 0;
    const places = items.map(({ ref }) => ({ start: at, end: (at += ref.plainBytes) }));
    return { plain: ownOf(together), items: places };
  }
  const plain = new Uint8Array(items.reduce((sum, { ref }) => sum + ref.plainBytes, 0));
  let at = 0;
  const places = items.map((item) => {
    try {
      plain.set(decode(item), at);
      return { start: at, end: (at += item.ref.plainBytes) };
    } catch (error) {
      return reasonOf(error);
    }
  });
  return { plain, items: places };
}

/** The bytes in a buffer that can be given away: small ones may share a pool. */
function ownOf(bytes: Buffer): Uint8Array<ArrayBuffer> {
  return bytes.length > GATHERED_BYTES_MAX ? (bytes as Uint8Array<ArrayBuffer>) : new Uint8Array(bytes);
}

parentPort?.on('message', (request: DecodeRequest) => {
  const answer = answerTo(request);
  // oxlint-disable-next-line unicorn/require-post-message-target-origin -- a thread, not a browser window
  parentPort?.postMessage(answer, [answer.plain.buffer]);
});
