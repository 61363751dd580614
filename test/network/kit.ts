/** Frames and ports for tests of the switch. */
import { FrameReader, PREFIX_BYTES, withPrefix } from '../../src/network/frames.ts';
import type { Outlet, Port, PortKind, Switch } from '../../src/network/switch.ts';

export const BROADCAST = 'ff:ff:ff:ff:ff:ff';
export const macOf = (index: number) => `52:54:00:00:${hex(index >> 8)}:${hex(index & 255)}`;
const hex = (byte: number) => byte.toString(16).padStart(2, '0');
export const bytesOf = (mac: string) => Buffer.from(mac.replaceAll(':', ''), 'hex');

export function frame(to: string, from: string, payload: string | Buffer = '', type = 0x88b5): Buffer {
  const head = Buffer.alloc(14);
  bytesOf(to).copy(head);
  bytesOf(from).copy(head, 6);
  head.writeUInt16BE(type, 12);
  return Buffer.concat([head, Buffer.from(payload)]);
}

/** A port that keeps what it is sent. */
export class Probe implements Outlet {
  readonly frames: Buffer[] = [];
  readonly port: Port;
  readonly #fabric: Switch;
  readonly #out = new FrameReader((bytes, start, end) => {
    for (let at = start; at < end;) {
      const length = Buffer.from(bytes.buffer, bytes.byteOffset + at, PREFIX_BYTES).readUInt32BE();
      this.frames.push(Buffer.from(bytes.subarray(at + PREFIX_BYTES, at + PREFIX_BYTES + length)));
      at += PREFIX_BYTES + length;
    }
  });
  readonly #in: FrameReader;
  patience = true;

  constructor(fabric: Switch, name: string, kind: PortKind = 'machine') {
    this.#fabric = fabric;
    this.port = fabric.add(name, kind, this);
    this.#in = new FrameReader((bytes, start, end) => this.#fabric.receive(this.port, bytes, start, end));
  }

  send(bytes: Uint8Array): boolean {
    if (!this.#out.push(bytes)) throw new Error('the switch sent what is no frame');
    return true;
  }

  hold(): void {}
  pause(): void {}
  proceed(): void {}

  /** The frames come in, in one piece. False when the stream has to end. */
  give(...frames: Uint8Array[]): boolean {
    return this.#in.push(Buffer.concat(frames.map(withPrefix)));
  }

  /** What came since the last call, as text. */
  taken(): string[] {
    return this.frames.splice(0).map((bytes) => bytes.toString('latin1', 14));
  }
}
