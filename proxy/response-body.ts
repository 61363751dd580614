/** Bodies of answers: read to the end within a size and without standing still, or an error. */
import type { IncomingMessage } from 'node:http';
import { GridError } from '../src/core/errors.ts';

/**
 * Calls `onPiece` for every piece and resolves when the body is complete. Rejects with `timeout` when nothing comes
 * for `idleMs`, tunnel-lost when the connection ends first, and with whatever `onPiece` throws; the body is
 * destroyed then, and the connection with it.
 */
export function readBody(
  response: IncomingMessage,
  idleMs: number,
  what: string,
  onPiece: (piece: Buffer) => void,
): Promise<void> {
  return new Promise((resolve, reject) => {
    let over = false;
    const fail = (error: unknown) => {
      over = true;
      clearTimeout(timer);
      reject(error);
      response.destroy();
    };
    const cut = () => fail(new GridError('tunnel-lost', `${what}: the answer was cut`));
    const timer = setTimeout(
      () => fail(new GridError('timeout', `${what}: nothing came for ${idleMs / 1000} s`)),
      idleMs,
    );
    response.on('data', (piece: Buffer) => {
      timer.refresh();
      try {
        onPiece(piece);
      } catch (error) {
        fail(error);
      }
    });
    response.once('end', () => {
      clearTimeout(timer);
      if (!response.complete) return cut();
      over = true;
      resolve();
    });
    response.once('error', fail);
    response.once('close', () => {
      if (!over) cut();
    });
  });
}

/** A whole body of at most `bytesMax`; origin-failed when it is larger. */
export async function collect(
  response: IncomingMessage,
  bytesMax: number,
  idleMs: number,
  what: string,
): Promise<Buffer> {
  const tooLarge = () => new GridError('origin-failed', `${what} is larger than ${bytesMax} bytes`);
  if (Number(response.headers['content-length'] ?? 0) > bytesMax) {
    response.destroy();
    throw tooLarge();
  }
  const pieces: Buffer[] = [];
  let bytes = 0;
  await readBody(response, idleMs, what, (piece) => {
    bytes += piece.length;
    if (bytes > bytesMax) throw tooLarge();
    pieces.push(piece);
  });
  return pieces.length === 1 ? pieces[0]! : Buffer.concat(pieces, bytes);
}
