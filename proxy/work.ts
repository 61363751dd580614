/**
 * What waits in the client's queues: fetches of one object, calls for chunks, and the batches that carry items of
 * one or several calls over a lane. See remote-source.ts for their life.
 */
import type { Digest } from '../src/core/bytes.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { GridError } from '../src/core/errors.ts';
import type { Train } from './bulk-window.ts';

/** Somebody who waits: fails at the latest `timeoutMs` after progress ended. */
export class Waiter {
  done = false;
  #timer: NodeJS.Timeout | undefined;
  readonly #reject: (error: unknown) => void;

  constructor(reject: (error: unknown) => void) {
    this.#reject = reject;
  }

  /** The way to `name` broke for `reason`: it fails with unreachable unless there is progress in time. */
  stalled(timeoutMs: number, name: string, reason: GridError): void {
    const fail = () => {
      const text = `${name} did not come back within ${timeoutMs / 1000} s: ${reason.message}`;
      this.fail(new GridError('unreachable', text, { cause: reason }));
    };
    this.#timer ??= setTimeout(fail, timeoutMs);
  }

  progress(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  fail(error: unknown): void {
    if (this.done) return;
    this.finish();
    this.#reject(error);
  }

  finish(): void {
    this.done = true;
    this.progress();
  }
}

/** One object to get, or with a body to send. */
export interface Wanted {
  readonly path: string;
  /** Of the answer. */
  readonly bytesMax: number;
  readonly body?: Buffer;
}

export class Fetch extends Waiter {
  readonly wanted: Wanted;
  readonly #resolve: (body: Buffer) => void;

  constructor(wanted: Wanted, resolve: (body: Buffer) => void, reject: (error: unknown) => void) {
    super(reject);
    this.wanted = wanted;
    this.#resolve = resolve;
  }

  succeed(body: Buffer): void {
    if (this.done) return;
    this.finish();
    this.#resolve(body);
  }
}

/** One call of readChunks. */
export class Call extends Waiter {
  readonly #deliver: (index: number, chunk: StoredChunk) => void;
  readonly #resolve: () => void;
  #remaining: number;
  /** Never shares a batch with another call again: one of its batches met an error. */
  solo = false;
  readonly batches = new Set<Batch>();

  constructor(
    count: number,
    deliver: (index: number, chunk: StoredChunk) => void,
    resolve: () => void,
    reject: (error: unknown) => void,
  ) {
    super(reject);
    this.#remaining = count;
    this.#deliver = deliver;
    this.#resolve = resolve;
  }

  give(index: number, chunk: StoredChunk): void {
    if (this.done) return;
    this.progress();
    try {
      this.#deliver(index, chunk);
    } catch (error) {
      this.fail(error);
      return;
    }
    if (--this.#remaining === 0) {
      this.finish();
      this.#resolve();
    }
  }
}

export interface Item {
  readonly call: Call;
  readonly index: number;
  readonly ref: ChunkRef;
}

/** Chunks in one exchange; equal ones are asked for once. */
export class Batch {
  readonly bulk: boolean;
  readonly refs: ChunkRef[] = [];
  /** Who wants refs[i]; undefined once it was delivered. */
  readonly #items: (Item[] | undefined)[] = [];
  readonly #calls = new Set<Call>();
  /** Aborted: the exchange is cut. */
  readonly cancel = new AbortController();
  remaining = 0;
  /** What it still holds of the bulk window. */
  bulkBytes = 0;
  /** For the bulk window, which measures the link with it. */
  readonly train: Train = { startBytes: 0 };

  constructor(items: readonly Item[], bulk: boolean) {
    this.bulk = bulk;
    const places = new Map<Digest, Item[]>();
    for (const item of items) {
      item.call.batches.add(this);
      this.#calls.add(item.call);
      const place = places.get(item.ref.digest);
      if (place) place.push(item);
      else {
        places.set(item.ref.digest, [item]);
        this.refs.push(item.ref);
      }
    }
    this.#items.push(...places.values());
    this.remaining = this.refs.length;
  }

  /** What nobody has got yet and somebody still wants. */
  open(): Item[] {
    return this.#items.flatMap((place) => place?.filter(({ call }) => !call.done) ?? []);
  }

  /** Who wants chunk `index`, which has come: each item is handed out once. */
  take(index: number): readonly Item[] {
    const place = this.#items[index] ?? [];
    this.#items[index] = undefined;
    this.remaining--;
    return place;
  }

  leave(): void {
    for (const call of this.#calls) call.batches.delete(this);
  }
}

/**
 * The next items of a queue for one batch: at most `countMax`, and about `weightMax` (one at least); the items of a
 * call that stands alone never with another's. Items that nobody wants any more are dropped.
 */
export function takeItems(
  queue: Item[],
  countMax: number,
  weightMax: number,
  weigh: (item: Item) => number,
): Item[] {
  const taken: Item[] = [];
  let weight = 0;
  let at = 0;
  for (; at < queue.length && taken.length < countMax; at++) {
    const item = queue[at]!;
    if (item.call.done) continue;
    const first = taken[0];
    if (first && first.call !== item.call && (first.call.solo || item.call.solo)) break;
    const itemWeight = weigh(item);
    if (first && weight + itemWeight > weightMax) break;
    weight += itemWeight;
    taken.push(item);
  }
  queue.splice(0, at);
  return taken;
}
