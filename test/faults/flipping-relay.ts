/** A TCP relay that flips bits of what comes back: the wire's fault, wherever it falls (status line, frame, chunk). */
import net from 'node:net';
import type { AddressInfo, Socket } from 'node:net';

export class FlippingRelay {
  readonly #server: net.Server;
  readonly #sockets = new Set<Socket>();
  /** Byte after which, and bit that is flipped; undefined when nothing is to be flipped. */
  #armed: { bytes: number; bit: number } | undefined;
  flips = 0;

  private constructor(to: { host: string; port: number }) {
    this.#server = net.createServer({ noDelay: true }, (near) => {
      const far = net.connect({ ...to, noDelay: true });
      for (const socket of [near, far]) {
        this.#sockets.add(socket);
        socket.on('error', () => {});
        socket.once('close', () => this.#sockets.delete(socket));
      }
      near.pipe(far);
      far.on('data', (piece: Buffer) => {
        this.#flip(piece);
        near.write(piece);
      });
      far.once('end', () => near.end());
      far.once('close', () => near.destroy());
      near.once('close', () => far.destroy());
    });
  }

  static async start(to: { host: string; port: number }): Promise<FlippingRelay> {
    const relay = new FlippingRelay(to);
    await new Promise<void>((resolve) => relay.#server.listen(0, '127.0.0.1', resolve));
    return relay;
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  /** One bit, `bytes` after now. */
  arm(bytes: number, bit: number): void {
    this.#armed = { bytes, bit };
  }

  disarm(): void {
    this.#armed = undefined;
  }

  #flip(piece: Buffer): void {
    if (!this.#armed) return;
    if (this.#armed.bytes >= piece.length) {
      this.#armed.bytes -= piece.length;
      return;
    }
    piece[this.#armed.bytes]! ^= 1 << this.#armed.bit;
    this.#armed = undefined;
    this.flips++;
  }

  async close(): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }
}
