/**
 * A socket for node:http made of any two streams: an ssh channel, or stdin and stdout. Reads and writes pass
 * through without a copy (small writes that come together are joined); backpressure passes through too. A write
 * is done when the stream below has taken it, and where `below` is given (the TCP socket that carries many
 * channels, which ssh2 fills without asking), not before that has room: so a reader that stands still holds a
 * few hundred KiB here, and no channel's data queues far behind another's.
 */
import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import type { Readable, Writable } from 'node:stream';

/** Writes of one cork are joined up to this; larger ones go down as they are. */
const JOIN_BYTES_MAX = 512 * 1024;

type Done = (error?: Error | null) => void;

export class StreamSocket extends Duplex {
  readonly #in: Readable;
  readonly #out: Writable;
  readonly #below: Socket | undefined;
  /** Bytes that came up so far. */
  bytesRead = 0;

  constructor(readable: Readable, writable: Writable, below?: Socket) {
    super({ highWaterMark: 256 * 1024 });
    this.#in = readable;
    this.#out = writable;
    this.#below = below;
    readable.on('data', (piece: Buffer) => {
      this.bytesRead += piece.length;
      if (!this.push(piece)) readable.pause();
    });
    readable.on('end', () => this.push(null));
    // A channel that closes without an end, e.g. because the connection broke, ends this socket too.
    const gone = () => {
      if (!this.readableEnded) this.push(null);
      setImmediate(() => this.destroy());
    };
    readable.once('close', gone);
    if ((writable as unknown) !== readable) writable.once('close', gone);
    const failed = (error: Error) => this.destroy(error);
    readable.on('error', failed);
    if ((writable as unknown) !== readable) writable.on('error', failed);
    readable.pause();
  }

  override _read(): void {
    if (this.#in.isPaused()) this.#in.resume();
  }

  override _write(piece: Buffer, _encoding: string, done: Done): void {
    this.#send(piece, done);
  }

  #send(piece: Buffer, done: Done): void {
    const below = this.#below;
    if (below?.writableNeedDrain) {
      const go = () => {
        below.off('drain', go);
        below.off('close', go);
        this.#send(piece, done);
      };
      below.once('drain', go);
      below.once('close', go);
      return;
    }
    if (this.#out.destroyed || !this.#out.writable) done(new Error('the stream below has ended'));
    else this.#out.write(piece, done);
  }

  override _writev(pieces: { chunk: Buffer; encoding: string }[], done: Done): void {
    let bytes = 0;
    for (const { chunk } of pieces) bytes += chunk.length;
    if (bytes <= JOIN_BYTES_MAX) {
      this.#send(
        Buffer.concat(
          pieces.map(({ chunk }) => chunk),
          bytes,
        ),
        done,
      );
      return;
    }
    let next = 0;
    const step: Done = (error) => {
      const piece = pieces[next++];
      if (error || !piece) done(error);
      else this.#send(piece.chunk, step);
    };
    step();
  }

  override _final(done: Done): void {
    this.#out.end();
    done();
  }

  override _destroy(error: Error | null, done: Done): void {
    this.#in.destroy();
    if ((this.#out as unknown) !== this.#in) this.#out.destroy();
    done(error);
  }

  // What node:http calls on a net.Socket and what has no meaning here.
  setTimeout(): this {
    return this;
  }
  setNoDelay(): this {
    return this;
  }
  setKeepAlive(): this {
    return this;
  }
  ref(): this {
    return this;
  }
  unref(): this {
    return this;
  }
}
