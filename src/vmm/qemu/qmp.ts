/**
 * A client of QEMU's machine protocol (QMP): one JSON object per line over a unix socket. The greeting is answered
 * with qmp_capabilities, then commands are matched to their answers by id, and everything else is an event.
 * When the connection ends, every open command rejects with what `describeLoss` finds out, usually QEMU's last
 * words; nothing waits for a timeout then.
 */
import type { Socket } from 'node:net';
import { asGridError, GridError } from '../../core/errors.ts';
import { connectSocket } from '../socket.ts';

export interface QmpEvent {
  readonly event: string;
  readonly data: Readonly<Record<string, unknown>>;
}

export interface QmpOptions {
  /** For messages: whose QEMU this is. */
  readonly name: string;
  /** Bound on connecting, the greeting and qmp_capabilities together. */
  readonly timeoutMs: number;
  readonly onEvent?: (event: QmpEvent) => void;
  /** Why the connection ended, asked once after it did. */
  readonly describeLoss?: () => Promise<string>;
}

interface Pending {
  readonly command: string;
  readonly timer: NodeJS.Timeout;
  resolve(value: unknown): void;
  reject(error: GridError): void;
}

type Message = Readonly<Record<string, unknown>>;

/** query-qmp-schema, the longest answer there is, has 200 KB. */
const LINE_BYTES_MAX = 8 * 1024 * 1024;
const COMMAND_TIMEOUT_MS = 30_000;

const isObject = (value: unknown): value is Message =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

export class QmpClient {
  readonly #socket: Socket;
  readonly #options: QmpOptions;
  readonly #pending = new Map<number, Pending>();
  /** The beginning of a line whose end has not come. */
  readonly #partial: Buffer[] = [];
  #partialBytes = 0;
  #nextId = 1;
  #loss: GridError | undefined;
  readonly #greeting = Promise.withResolvers<void>();
  /** Resolves with the reason when the connection has ended. */
  readonly closed: Promise<GridError>;

  private constructor(socket: Socket, options: QmpOptions) {
    this.#socket = socket;
    this.#options = options;
    this.#greeting.promise.catch(() => undefined);
    let cause: Error | undefined;
    this.closed = new Promise((resolve) => {
      socket.on('error', (error) => (cause = error));
      socket.on('close', () => void this.#lost(cause).then(resolve));
    });
    socket.on('data', (bytes: Buffer) => this.#receive(bytes));
  }

  /**
   * Connects to QEMU's socket and enters command mode. Rejects with vm-failed when the connection breaks or the
   * other end is no QMP server, timeout, or the system's error of the connection itself.
   */
  static async connect(socketPath: string, options: QmpOptions): Promise<QmpClient> {
    const startMs = performance.now();
    const client = new QmpClient(await connectSocket(socketPath), options);
    const late = setTimeout(
      () => client.#greeting.reject(client.#timeout('a greeting', options.timeoutMs)),
      options.timeoutMs,
    );
    try {
      await client.#greeting.promise;
      const leftMs = Math.max(1, options.timeoutMs - (performance.now() - startMs));
      await client.execute('qmp_capabilities', undefined, leftMs);
      return client;
    } catch (error) {
      client.close();
      throw error;
    } finally {
      clearTimeout(late);
    }
  }

  /**
   * Runs one command and resolves with its `return`. Rejects with vm-failed when QEMU refuses it (with QEMU's
   * words) or dies, timeout when no answer comes, closed after `close()`.
   */
  execute(
    command: string,
    commandArguments?: Readonly<Record<string, unknown>>,
    timeoutMs: number = COMMAND_TIMEOUT_MS,
  ): Promise<unknown> {
    return new Promise((resolve, reject) => {
      if (this.#loss !== undefined) return reject(this.#loss);
      const id = this.#nextId++;
      const timer = setTimeout(() => {
        this.#pending.delete(id);
        reject(this.#timeout(command, timeoutMs));
      }, timeoutMs);
      this.#pending.set(id, { command, timer, resolve, reject });
      const message = { execute: command, ...(commandArguments && { arguments: commandArguments }), id };
      this.#socket.write(JSON.stringify(message) + '\n');
    });
  }

  /** Ends the connection; QEMU goes on. Open commands reject with closed. Idempotent. */
  close(): void {
    this.#loss ??= new GridError('closed', `the connection to ${this.#options.name}'s QEMU was closed`);
    this.#rejectAll(this.#loss);
    this.#socket.destroy();
  }

  #timeout(what: string, timeoutMs: number): GridError {
    return new GridError(
      'timeout',
      `QEMU of ${this.#options.name} did not answer ${what} within ${Math.round(timeoutMs)} ms`,
    );
  }

  async #lost(cause: Error | undefined): Promise<GridError> {
    if (this.#loss === undefined) {
      let reason: string | undefined;
      try {
        reason = await this.#options.describeLoss?.();
      } catch {
        // The reason is a kindness; the loss itself is what counts.
      }
      const text = `QEMU of ${this.#options.name} ended: ${reason ?? cause?.message ?? 'connection closed'}`;
      // close() may have been called while the reason was looked for.
      this.#loss ??= new GridError('vm-failed', text, cause === undefined ? {} : { cause });
    }
    this.#rejectAll(this.#loss);
    return this.#loss;
  }

  #rejectAll(error: GridError): void {
    this.#greeting.reject(error);
    for (const pending of this.#pending.values()) {
      clearTimeout(pending.timer);
      pending.reject(error);
    }
    this.#pending.clear();
  }

  #receive(bytes: Buffer): void {
    let start = 0;
    for (let end; (end = bytes.indexOf(0x0a, start)) !== -1; start = end + 1) {
      const line = Buffer.concat([...this.#partial, bytes.subarray(start, end)]).toString();
      this.#partial.length = 0;
      this.#partialBytes = 0;
      if (line.trim() !== '' && !this.#handle(line)) return;
    }
    if (start === bytes.length) return;
    this.#partial.push(bytes.subarray(start));
    this.#partialBytes += bytes.length - start;
    if (this.#partialBytes > LINE_BYTES_MAX) this.#refuse('a line without end');
  }

  /** False when the line was no QMP; the connection is ended then. */
  #handle(line: string): boolean {
    let message: unknown;
    try {
      message = JSON.parse(line);
    } catch (error) {
      return this.#refuse(asGridError(error, 'no JSON').message);
    }
    if (!isObject(message)) return this.#refuse('no object');
    if ('QMP' in message) {
      this.#greeting.resolve();
    } else if (typeof message['event'] === 'string') {
      const data = isObject(message['data']) ? message['data'] : {};
      this.#options.onEvent?.({ event: message['event'], data });
    } else {
      this.#answer(message);
    }
    return true;
  }

  #answer(message: Message): void {
    const id = message['id'];
    // An answer whose command has timed out, or an error without id: nobody waits for it.
    const pending = typeof id === 'number' ? this.#pending.get(id) : undefined;
    if (typeof id !== 'number' || pending === undefined) return;
    this.#pending.delete(id);
    clearTimeout(pending.timer);
    const error = message['error'];
    if (error === undefined) return pending.resolve(message['return']);
    const words = isObject(error) && typeof error['desc'] === 'string' ? error['desc'] : 'no reason given';
    pending.reject(
      new GridError('vm-failed', `QEMU of ${this.#options.name} refused ${pending.command}: ${words}`),
    );
  }

  #refuse(what: string): false {
    this.#loss ??= new GridError(
      'vm-failed',
      `${this.#options.name} does not speak QMP on its socket: ${what}`,
    );
    this.#rejectAll(this.#loss);
    this.#socket.destroy();
    return false;
  }
}
