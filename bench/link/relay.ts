/**
 * A link between two ends of TCP connections on this machine, for kernels without netem: a relay with a delay and a
 * rate for each direction, shared by all its connections, as a cable shares them.
 *
 * Each direction is one `Pipe`, a queue in order. A piece of bytes that comes in at time t leaves the near end when
 * what came before it has left and its own bytes have passed at the rate, and arrives `delayMs` after that. Those
 * times are computed, not slept, so the rate is exact however coarse timers are; only the moment of delivery is,
 * by about a millisecond.
 *
 * A new connection costs what TCP's handshake costs on such a link: the first byte of the near end goes out one
 * round trip after connect(2), and the far end sees the connection half a round trip later still.
 *
 * Backpressure: at most bandwidth × delay and QUEUE_BYTES are between the ends in each direction; then the relay
 * stops reading, TCP's own window fills and the sender waits. The kernel's socket buffers on both sides come on top
 * (a few hundred KiB to MiB per connection), as they do on a real link.
 *
 * Not emulated: loss, slow start and the congestion window (a lone connection gets the full rate at once, which
 * flatters whatever opens many connections less than a real link would), reordering, MTU.
 *
 * Faults: `cut` drops every connection and refuses new ones, `stall` moves nothing for a while and says nothing,
 * `restore` ends both.
 */
import net from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import { performance } from 'node:perf_hooks';

/** What waits at the near end, beside what is on its way: a router's buffer. */
export const QUEUE_BYTES = 1024 * 1024;

export interface LinkOptions {
  readonly listen: { readonly host: string; readonly port: number };
  readonly to: { readonly host: string; readonly port: number };
  /** Round trip; each direction takes half. */
  readonly rttMs: number;
  /** Of each direction. Infinity: no limit. */
  readonly bitsPerSecond: number;
}

interface Parcel {
  readonly arrivesMs: number;
  readonly bytes: number;
  readonly deliver: () => void;
}

/** One direction of the link. */
class Pipe {
  readonly #delayMs: number;
  readonly #bytesPerMs: number;
  readonly #limitBytes: number;
  readonly #parcels: Parcel[] = [];
  #head = 0;
  /** When the last byte so far has left the near end. */
  #freeMs = 0;
  #inside = 0;
  #timer: NodeJS.Timeout | NodeJS.Immediate | undefined;
  #stalledUntilMs = 0;
  /** Sources that wait for room, in order of their coming. */
  readonly #waiting = new Set<() => void>();
  delivered = 0;

  constructor(delayMs: number, bitsPerSecond: number) {
    this.#delayMs = delayMs;
    this.#bytesPerMs = bitsPerSecond / 8000;
    const onTheWay = Number.isFinite(bitsPerSecond) ? this.#bytesPerMs * delayMs : 64 * QUEUE_BYTES;
    this.#limitBytes = onTheWay + QUEUE_BYTES;
  }

  get full(): boolean {
    return this.#inside >= this.#limitBytes;
  }

  /** `bytes` may be 0 for a mark that keeps its place in the order: an end or a reset. */
  send(bytes: number, deliver: () => void): void {
    const now = performance.now();
    this.#freeMs = Math.max(now, this.#freeMs) + bytes / this.#bytesPerMs;
    this.#inside += bytes;
    this.#parcels.push({ arrivesMs: this.#freeMs + this.#delayMs, bytes, deliver });
    this.#arm();
  }

  whenRoom(resume: () => void): void {
    this.#waiting.add(resume);
  }

  forget(resume: () => void): void {
    this.#waiting.delete(resume);
  }

  stall(untilMs: number): void {
    this.#stalledUntilMs = untilMs;
    this.#disarm();
    this.#arm();
  }

  /** Everything on its way is lost. */
  clear(): void {
    this.#disarm();
    this.#parcels.length = 0;
    this.#head = 0;
    this.#inside = 0;
    this.#freeMs = 0;
    this.#waiting.clear();
  }

  #disarm(): void {
    clearTimeout(this.#timer as NodeJS.Timeout);
    clearImmediate(this.#timer as NodeJS.Immediate);
    this.#timer = undefined;
  }

  #arm(): void {
    const next = this.#parcels[this.#head];
    if (this.#timer || !next) return;
    const waitMs = Math.max(next.arrivesMs, this.#stalledUntilMs) - performance.now();
    // setTimeout is late by up to a millisecond or so: the last of the wait goes turn by turn of the event loop.
    if (waitMs > 1.5) this.#timer = setTimeout(() => this.#tick(), Math.floor(waitMs - 1));
    else this.#timer = setImmediate(() => this.#tick());
  }

  #tick(): void {
    this.#timer = undefined;
    const now = performance.now();
    if (now >= this.#stalledUntilMs) {
      for (
        let next = this.#parcels[this.#head];
        next && next.arrivesMs <= now;
        next = this.#parcels[this.#head]
      ) {
        this.#head++;
        this.#inside -= next.bytes;
        this.delivered += next.bytes;
        next.deliver();
      }
      if (this.#head === this.#parcels.length || this.#head > 4096) {
        this.#parcels.splice(0, this.#head);
        this.#head = 0;
      }
      if (!this.full) {
        const resumes = [...this.#waiting];
        this.#waiting.clear();
        for (const resume of resumes) resume();
      }
    }
    this.#arm();
  }
}

export interface LinkBytes {
  /** Delivered from the side that connects to the side that is connected to. */
  readonly forward: number;
  readonly backward: number;
}

export class LinkRelay {
  readonly #options: LinkOptions;
  readonly #forward: Pipe;
  readonly #backward: Pipe;
  readonly #sockets = new Set<Socket>();
  readonly #timers = new Set<NodeJS.Timeout>();
  #server: net.Server | undefined;
  #port: number;

  private constructor(options: LinkOptions) {
    this.#options = options;
    this.#forward = new Pipe(options.rttMs / 2, options.bitsPerSecond);
    this.#backward = new Pipe(options.rttMs / 2, options.bitsPerSecond);
    this.#port = options.listen.port;
  }

  static async start(options: LinkOptions): Promise<LinkRelay> {
    const relay = new LinkRelay(options);
    await relay.#listen();
    return relay;
  }

  get address(): { host: string; port: number } {
    return { host: this.#options.listen.host, port: this.#port };
  }

  /** Connections that are open, both ends counted. */
  get sockets(): number {
    return this.#sockets.size;
  }

  bytes(): LinkBytes {
    return { forward: this.#forward.delivered, backward: this.#backward.delivered };
  }

  /** Drops every connection and refuses new ones until `restore`. */
  async cut(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    const closed = server && new Promise<void>((resolve) => server.close(() => resolve()));
    for (const timer of this.#timers) clearTimeout(timer);
    this.#timers.clear();
    this.#forward.clear();
    this.#backward.clear();
    const gone = [...this.#sockets].map(
      (socket) => new Promise<void>((resolve) => socket.once('close', () => resolve())),
    );
    for (const socket of this.#sockets) socket.destroy();
    await Promise.all([closed, ...gone]);
  }

  /** Nothing arrives for `ms`, in either direction; connections stay. */
  stall(ms: number): void {
    const untilMs = performance.now() + ms;
    this.#forward.stall(untilMs);
    this.#backward.stall(untilMs);
  }

  /** Ends a cut and a stall. */
  async restore(): Promise<void> {
    this.stall(0);
    if (!this.#server) await this.#listen();
  }

  close(): Promise<void> {
    return this.cut();
  }

  async #listen(): Promise<void> {
    const server = net.createServer({ noDelay: true, allowHalfOpen: true, pauseOnConnect: true }, (near) =>
      this.#accept(near),
    );
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen({ host: this.#options.listen.host, port: this.#port }, resolve);
    });
    this.#server = server;
    this.#port = (server.address() as AddressInfo).port;
  }

  #accept(near: Socket): void {
    const { rttMs, to } = this.#options;
    this.#track(near);
    let far: Socket | undefined;
    const early: (() => void)[] = [];
    /** Runs when the far end exists. */
    const withFar = (act: (far: Socket) => void) => {
      if (far) act(far);
      else early.push(() => act(far!));
    };
    this.#after(rttMs * 1.5, () => {
      if (near.destroyed) return;
      far = net.connect({ ...to, noDelay: true, allowHalfOpen: true });
      this.#track(far);
      for (const act of early) act();
      this.#carry(far, this.#backward, (act) => act(near));
    });
    this.#after(rttMs, () => {
      this.#carry(near, this.#forward, withFar);
    });
  }

  /** Everything that comes from `from`, its end and its reset, through `pipe` to the other side. */
  #carry(from: Socket, pipe: Pipe, withTo: (act: (to: Socket) => void) => void): void {
    let behind = false;
    const resume = () => {
      if (!behind && !from.destroyed) from.resume();
    };
    from.on('data', (piece: Buffer) => {
      pipe.send(piece.length, () =>
        withTo((to) => {
          if (to.destroyed) return;
          if (!to.write(piece) && !behind) {
            // A reader that stands still stops its own connection only.
            behind = true;
            from.pause();
            const go = () => {
              to.off('drain', go);
              to.off('close', go);
              behind = false;
              if (!pipe.full) resume();
              else pipe.whenRoom(resume);
            };
            to.once('drain', go);
            to.once('close', go);
          }
        }),
      );
      if (pipe.full) {
        from.pause();
        pipe.whenRoom(resume);
      }
    });
    from.once('end', () => pipe.send(0, () => withTo((to) => to.end())));
    from.once('close', (hadError) => {
      pipe.forget(resume);
      pipe.send(0, () =>
        withTo((to) => {
          if (hadError) to.destroy();
          else if (!to.writableEnded) to.end();
        }),
      );
    });
    from.resume();
  }

  #track(socket: Socket): void {
    this.#sockets.add(socket);
    socket.on('error', () => {}); // 'close' carries it across
    socket.once('close', () => this.#sockets.delete(socket));
  }

  #after(ms: number, act: () => void): void {
    if (ms === 0) {
      act();
      return;
    }
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      act();
    }, ms);
    this.#timers.add(timer);
  }
}
