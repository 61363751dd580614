/**
 * A port's far side over a stream: a machine's unix socket, or a trunk. Whoever sends more than the stream takes is held
 * while it takes some, and then what comes is dropped until it has taken all; see switch.ts.
 */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { GridError } from '../core/errors.ts';
import { FrameReader } from './frames.ts';
import type { FramesHandler } from './frames.ts';
import type { Outlet } from './switch.ts';

/** Frames that wait for one port: 8 ms at a gigabit, more than a window of a guest's TCP without a long way. */
export const QUEUE_BYTES_MAX = 1024 * 1024;
/** Nobody waits longer than this for a port that takes nothing … */
const PAUSE_MS = 10;
/** … and than this for one that takes it slowly: longer would be felt by whoever else is sent to. */
const PAUSES_MAX = 20;

export class StreamOutlet implements Outlet {
  readonly #stream: Duplex;
  readonly #waiting = new Set<Outlet>();
  #timer: NodeJS.Timeout | undefined;
  #stalled = false;
  #ended = false;
  #holds = 0;
  /** What made the queue overflow is still in it. */
  #isAwaited = false;

  constructor(stream: Duplex) {
    this.#stream = stream;
    stream.once('close', () => {
      this.#ended = true;
      this.#release();
    });
    // A `close` follows, and that is what is acted upon.
    stream.on('error', () => {});
  }

  send(bytes: Uint8Array): boolean {
    const room = this.#stream.writableLength + bytes.length <= QUEUE_BYTES_MAX;
    if (room || this.#isAwaited) {
      this.#stream.write(bytes);
      return room;
    }
    // Not 'drain', which comes by the stream's own idea of a full queue: that of an ssh channel is larger than ours.
    this.#isAwaited = true;
    this.#stream.write(bytes, this.#caughtUp);
    return false;
  }

  readonly #caughtUp = () => {
    this.#isAwaited = false;
    this.#stalled = false;
    this.#release();
  };

  get patience(): boolean {
    return !this.#stalled && !this.#ended;
  }

  hold(source: Outlet): void {
    if (this.#stalled || this.#ended || this.#waiting.has(source)) return;
    this.#waiting.add(source);
    source.pause();
    if (this.#timer === undefined) this.#watch(PAUSES_MAX);
  }

  #watch(pauses: number): void {
    const queuedBytes = this.#stream.writableLength;
    this.#timer = setTimeout(() => {
      // Writes have their turn first: it may have been this process that was late.
      setImmediate(() => {
        if (this.#timer === undefined || this.#ended) return;
        if (pauses > 0 && this.#stream.writableLength < queuedBytes) return this.#watch(pauses - 1);
        this.#stalled = true;
        this.#release();
      });
    }, PAUSE_MS);
  }

  #release(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    for (const source of this.#waiting) source.proceed();
    this.#waiting.clear();
  }

  pause(): void {
    if (++this.#holds === 1) this.#stream.pause();
  }

  proceed(): void {
    if (--this.#holds === 0) this.#stream.resume();
  }
}

/**
 * Connects to the unix socket of a machine's network device (QEMU: `-netdev stream,server=on`). Bytes are read straight
 * into the reader's buffers. Rejects with unreachable.
 */
export async function connectMachine(socketPath: string, handler: FramesHandler): Promise<net.Socket> {
  const reader = new FrameReader(handler);
  const socket: net.Socket = new net.Socket({
    onread: {
      buffer: () => reader.space(),
      callback: (count) => {
        const isFrames = reader.filled(count);
        if (!isFrames) socket.destroy();
        return isFrames;
      },
    },
  });
  await new Promise<void>((resolve, reject) => {
    socket.once('error', (cause) =>
      reject(
        new GridError('unreachable', `the machine's network socket ${socketPath} does not answer`, { cause }),
      ),
    );
    socket.connect(socketPath, resolve);
  });
  return socket;
}
