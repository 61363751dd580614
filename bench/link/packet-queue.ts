/**
 * One direction of a link, packet by packet: a rate, a delay, and a drop-tail queue in front of them, as a router
 * has. Times are computed and given by the caller, never slept, so the rate is exact however coarse timers are.
 *
 * A packet that comes at `nowMs` waits until what came before it has been sent, takes its own bytes ÷ rate to be
 * sent, and arrives `delayMs` after that. When more than `queueBytes` wait to be sent it is dropped: that is how TCP
 * learns what the link can carry. Bytes are those of IP packets; the frames around them on a real cable (38 bytes
 * each on Ethernet) are not counted.
 *
 * Packets lie one behind the other in a ring of bytes; the reader writes straight into it (`space`, then `push`).
 */

export interface QueueOptions {
  readonly delayMs: number;
  readonly bitsPerSecond: number;
  /** What may wait to be sent, beside what is on its way. */
  readonly queueBytes: number;
  /** The longest packet. */
  readonly packetBytesMax: number;
}

/** An IPv4 header alone: no packet is shorter, so the ring of records is never full before that of bytes. */
const PACKET_BYTES_MIN = 20;

export class PacketQueue {
  readonly #delayMs: number;
  readonly #bytesPerMs: number;
  readonly #queueBytes: number;
  readonly #packetBytesMax: number;
  readonly #ring: Buffer;
  readonly #slots: number;
  readonly #arrivesMs: Float64Array;
  readonly #offsets: Uint32Array;
  readonly #lengths: Uint16Array;
  /** Which receiver a packet is for; the queue does not look at packets. */
  readonly #receivers: Uint16Array;
  #first = 0;
  #count = 0;
  /** Where the next packet goes. */
  #writeAt = 0;
  /** When the last byte so far has been sent. */
  #freeMs = 0;
  deliveredBytes = 0;
  deliveredPackets = 0;
  droppedPackets = 0;

  constructor(options: QueueOptions) {
    this.#delayMs = options.delayMs;
    this.#bytesPerMs = options.bitsPerSecond / 8000;
    this.#queueBytes = options.queueBytes;
    this.#packetBytesMax = options.packetBytesMax;
    const inside = options.queueBytes + this.#bytesPerMs * options.delayMs;
    // Twice what can be inside: a reader that is late by a turn of the loop must not find it full.
    const ringBytes = Math.ceil(2 * inside) + 64 * options.packetBytesMax;
    this.#slots = Math.ceil(ringBytes / PACKET_BYTES_MIN);
    this.#ring = Buffer.alloc(ringBytes);
    this.#arrivesMs = new Float64Array(this.#slots);
    this.#offsets = new Uint32Array(this.#slots);
    this.#lengths = new Uint16Array(this.#slots);
    this.#receivers = new Uint16Array(this.#slots);
  }

  /** Room for one packet; what is written there counts once `push` is called. */
  space(): Buffer {
    if (this.#writeAt + this.#packetBytesMax > this.#ring.length) this.#writeAt = 0;
    return this.#ring.subarray(this.#writeAt, this.#writeAt + this.#packetBytesMax);
  }

  /** Takes the packet of `bytes` that lies in `space()`; false when it was dropped. */
  push(bytes: number, receiver: number, nowMs: number): boolean {
    const waitingBytes = (this.#freeMs - nowMs) * this.#bytesPerMs;
    if (waitingBytes + bytes > this.#queueBytes || !this.#fits()) {
      this.droppedPackets++;
      return false;
    }
    this.#freeMs = Math.max(nowMs, this.#freeMs) + bytes / this.#bytesPerMs;
    const slot = (this.#first + this.#count++) % this.#slots;
    this.#arrivesMs[slot] = this.#freeMs + this.#delayMs;
    this.#offsets[slot] = this.#writeAt;
    this.#lengths[slot] = bytes;
    this.#receivers[slot] = receiver;
    this.#writeAt += bytes;
    return true;
  }

  /** Whether a packet of any length at `#writeAt` would leave the oldest one alone. */
  #fits(): boolean {
    if (this.#count === 0) return true;
    if (this.#count === this.#slots) return false;
    const oldest = this.#offsets[this.#first]!;
    return this.#writeAt > oldest || this.#writeAt + this.#packetBytesMax <= oldest;
  }

  /** When the next packet arrives; Infinity when none is inside. */
  get nextMs(): number {
    return this.#count === 0 ? Infinity : this.#arrivesMs[this.#first]!;
  }

  /** Hands over every packet that has arrived by `nowMs`. */
  deliver(nowMs: number, to: (packet: Buffer, receiver: number) => void): void {
    while (this.#count > 0 && this.#arrivesMs[this.#first]! <= nowMs) {
      const at = this.#offsets[this.#first]!;
      const bytes = this.#lengths[this.#first]!;
      to(this.#ring.subarray(at, at + bytes), this.#receivers[this.#first]!);
      this.deliveredBytes += bytes;
      this.deliveredPackets++;
      this.#first = (this.#first + 1) % this.#slots;
      this.#count--;
    }
  }
}
