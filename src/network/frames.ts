/**
 * Ethernet frames as they travel on a stream: QEMU's own format (its netdevs `stream` and `socket`), so a run of frames
 * goes from one machine's socket to another's as the bytes that came.
 *
 *   u32 (big-endian)  length of the frame, without these four bytes
 *   frame             destination 6 · source 6 · EtherType 2 · payload; no checksum, no padding to 60
 *
 * A trunk (trunk.ts) carries the same behind a greeting.
 */

export const PREFIX_BYTES = 4;
/** Destination, source, type. */
export const FRAME_BYTES_MIN = 14;
/** What QEMU's own buffer holds (NET_BUFSIZE): room for the largest IP packet. */
export const FRAME_BYTES_MAX = 68 * 1024;

/** A read goes here in one piece; the smaller rest of a buffer is not worth a read of its own. */
const BUFFER_BYTES = 512 * 1024;
const READ_BYTES_MIN = 128 * 1024;

/** Whole frames in a buffer, prefixes included: `bytes` from `start` to `end`. */
export type FramesHandler = (bytes: Uint8Array, start: number, end: number) => void;

/**
 * Cuts a stream into runs of whole frames, without a copy but of what straddles two buffers. Bytes that were handed
 * out stay as they are for as long as somebody has them: a full buffer is left to the garbage collector.
 *
 * Either bytes are read straight into `space` and then announced by `filled`, or pieces that others read are `push`ed.
 */
export class FrameReader {
  readonly #handler: FramesHandler;
  #buffer: Uint8Array | undefined;
  /** From `#start` to `#end`: the beginning of a frame whose rest is still to come. */
  #start = 0;
  #end = 0;

  constructor(handler: FramesHandler) {
    this.#handler = handler;
  }

  /** Where the next bytes go. */
  space(): Uint8Array {
    let buffer = this.#buffer;
    if (buffer === undefined || buffer.length - this.#end < READ_BYTES_MIN) {
      const next = Buffer.allocUnsafeSlow(BUFFER_BYTES);
      if (buffer !== undefined) next.set(buffer.subarray(this.#start, this.#end));
      this.#end -= this.#start;
      this.#start = 0;
      this.#buffer = buffer = next;
    }
    return buffer.subarray(this.#end);
  }

  /** So many bytes are in what `space` gave last. False when the stream is none of frames and has to be ended. */
  filled(count: number): boolean {
    this.#end += count;
    const whole = endOfWhole(this.#buffer!, this.#start, this.#end);
    if (whole < 0) return false;
    if (whole > this.#start) {
      const start = this.#start;
      this.#start = whole;
      this.#handler(this.#buffer!, start, whole);
    }
    return true;
  }

  /** The same for bytes that lie elsewhere. */
  push(piece: Uint8Array): boolean {
    let from = 0;
    // The rest of what was begun, through our buffer; and then the whole frames of the piece where they are.
    while (this.#start < this.#end && from < piece.length) {
      const space = this.space();
      const missing = missingBytes(this.#buffer!, this.#start, this.#end);
      const taken = Math.min(missing, piece.length - from, space.length);
      space.set(piece.subarray(from, from + taken));
      from += taken;
      if (!this.filled(taken)) return false;
    }
    const whole = endOfWhole(piece, from, piece.length);
    if (whole < 0) return false;
    if (whole > from) this.#handler(piece, from, whole);
    if (whole < piece.length) {
      this.space().set(piece.subarray(whole));
      this.#end += piece.length - whole;
    }
    return true;
  }
}

/** Where the last whole frame ends; -1 when a length is out of bounds. */
function endOfWhole(bytes: Uint8Array, start: number, end: number): number {
  let at = start;
  while (end - at >= PREFIX_BYTES) {
    const length = lengthAt(bytes, at);
    if (length > FRAME_BYTES_MAX) return -1;
    const next = at + PREFIX_BYTES + length;
    if (next > end) break;
    at = next;
  }
  return at;
}

/** Bytes until what begins at `start` is a whole prefix, or a whole frame. */
function missingBytes(bytes: Uint8Array, start: number, end: number): number {
  const there = end - start;
  return there < PREFIX_BYTES ? PREFIX_BYTES - there : PREFIX_BYTES + lengthAt(bytes, start) - there;
}

/** The number in a frame's prefix. */
export function lengthAt(bytes: Uint8Array, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}

/** A frame with its prefix. */
export function withPrefix(frame: Uint8Array): Uint8Array {
  const bytes = Buffer.allocUnsafe(PREFIX_BYTES + frame.length);
  bytes.writeUInt32BE(frame.length);
  bytes.set(frame, PREFIX_BYTES);
  return bytes;
}
