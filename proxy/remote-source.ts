/**
 * The client side: a ChunkSource over a transport.
 *
 * Work waits in three queues: objects (tags, manifests, tables), demand chunks, bulk chunks, served in that order
 * by lanes, each with one exchange under way. The first lane is reserved for objects and demand, so prefetch never
 * stands before them; the others are opened when work waits, up to the transport's bound. Demand reads of one turn
 * of the event loop, and those that came while every lane was busy, share a batch. Bulk goes out in small batches
 * and never more of it at once than BulkWindow allows.
 *
 *   queued -> in a batch on a lane -> delivered, once
 *      ^            | lane or connection broke: what was not delivered goes back to the head of its queue
 *      +------------+ and `recover` makes the way again, with backoff; a caller that saw no progress for
 *                     reconnectTimeoutMs gets `unreachable`
 *
 * An error that the far side says (not-found, corrupt, …) fails its call alone: a batch of several callers is
 * asked again in one batch per call. A host key or login that is refused while reconnecting fails everybody, for
 * waiting does not help. A static server has no batch: then each lane gets single chunks. A call that fails or is
 * aborted delivers nothing more; its batch is cut when nobody else is in it, unless it is nearly over.
 */
import { performance } from 'node:perf_hooks';
import type { Digest } from '../src/core/bytes.ts';
import { decompress } from '../src/core/chunk.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { GridError } from '../src/core/errors.ts';
import {
  BATCH_CHUNKS_MAX,
  PROFILE_BYTES_MAX,
  STORED_OVERHEAD_BYTES_MAX,
  TABLE_BYTES_MAX,
  TAGS_BYTES_MAX,
} from '../src/core/limits.ts';
import { parseTags } from '../src/core/manifest.ts';
import type { Tag } from '../src/core/manifest.ts';
import type { Purpose } from '../src/core/profile.ts';
import type { ChunkSource, ReadChunksOptions, WayFigures } from '../src/core/source.ts';
import { BulkWindow } from './bulk-window.ts';
import { greet } from './greeting.ts';
import { holdClient } from './holds.ts';
import { LanePool } from './lane-pool.ts';
import { Openings } from './openings.ts';
import {
  BATCH_PATH,
  BATCH_TYPE,
  FrameReader,
  TAGS_PATH,
  checkRefs,
  encodeBatchRequest,
  isErrorBody,
  objectPath,
  profilePath,
  remoteError,
} from './protocol.ts';
import { collect, readBody } from './response-body.ts';
import { Recovery } from './recovery.ts';
import { newCounters } from './statistics.ts';
import type { SourceEvent, SourceStatistics } from './statistics.ts';
import type { Lane, Transport } from './transport.ts';
import { UploadClient } from './upload-client.ts';
import { Batch, Call, Fetch, takeItems } from './work.ts';
import type { Item, Waiter, Wanted } from './work.ts';

/** Chunks of bulk in one exchange: several exchanges share the window. */
const BULK_CHUNKS_MAX = 32;
/** Of the window that one exchange of bulk takes. */
const BATCH_SHARE = 1 / 4;
/** An unwanted batch with this many chunks to come is read to its end: cheaper than a new channel. */
const DRAIN_CHUNKS = 4;
/** A page that says why not. */
const ANSWER_BYTES_MAX = 64 * 1024;
/** Lanes opened at once, each in two round trips: one for demand, three for bulk. */
const LANES_AT_OPEN = 4;
const OCTETS = 'application/octet-stream';

export class RemoteSource implements ChunkSource {
  readonly name: string;
  readonly uploads = new UploadClient(this, (wanted) => this.#fetch(wanted));
  readonly hold = holdClient(this, (wanted) => this.#fetch(wanted));
  readonly #transport: Transport;
  readonly #reconnectTimeoutMs: number;
  readonly #onEvent: (event: SourceEvent) => void;
  readonly #window = new BulkWindow();
  readonly #waiters = new Set<Waiter>();
  readonly #fetches: Fetch[] = [];
  #demand: Item[] = [];
  #bulk: Item[] = [];
  readonly #openings = new Openings();
  readonly #lanes: LanePool;
  readonly #recovery: Recovery;
  #bulkBytes = 0;
  #pumpSoon = false;
  /** Why, while the way is being made again. */
  #broken: GridError | undefined;
  #static = false;
  readonly #closing = new AbortController();
  readonly #counts = newCounters();

  private constructor(
    transport: Transport,
    reconnectTimeoutMs: number,
    onEvent: (event: SourceEvent) => void,
  ) {
    this.name = transport.name;
    this.#transport = transport;
    this.#reconnectTimeoutMs = reconnectTimeoutMs;
    this.#onEvent = onEvent;
    this.#recovery = new Recovery(transport, reconnectTimeoutMs, onEvent);
    this.#lanes = new LanePool(
      transport,
      () => this.#pump(),
      (error) => this.#onLanesFailed(error),
    );
  }

  /** Connects once and says hello; whatever is wrong with address, keys or far side is thrown here. */
  static async connect(
    transport: Transport,
    options: { connectTimeoutMs: number; reconnectTimeoutMs: number; onEvent?: (event: SourceEvent) => void },
  ): Promise<RemoteSource> {
    const source = new RemoteSource(transport, options.reconnectTimeoutMs, options.onEvent ?? (() => {}));
    try {
      await source.#hello(options.connectTimeoutMs);
    } catch (error) {
      await source.close();
      throw error;
    }
    source.#onEvent({
      type: 'connected',
      message: `connected to ${source.name}${source.#static ? ', a static server' : ''}`,
    });
    return source;
  }

  statistics(): SourceStatistics {
    return { ...this.#counts, ...(this.#broken ? { down: this.#broken.message } : {}) };
  }

  async listTags(): Promise<Tag[]> {
    return parseTags(
      await this.#fetch({ path: TAGS_PATH, bytesMax: TAGS_BYTES_MAX }),
      `the tag list of ${this.name}`,
    );
  }

  async readManifest(digest: Digest): Promise<Buffer> {
    return this.#openings.manifest(digest, (wanted) => this.#fetch(wanted));
  }

  async readTable(digest: Digest): Promise<Buffer> {
    if (!this.#broken) this.#lanes.expect(LANES_AT_OPEN); // its chunks come next
    const stored = await this.#openings.table(digest, (wanted) => this.#fetch(wanted));
    return decompress(stored, TABLE_BYTES_MAX, `chunk table ${digest.slice(0, 12)} of ${this.name}`);
  }

  async readProfile(manifest: Digest, purpose: Purpose): Promise<Buffer | undefined> {
    try {
      return await this.#fetch({ path: profilePath(manifest, purpose), bytesMax: PROFILE_BYTES_MAX });
    } catch (error) {
      if (error instanceof GridError && error.code === 'not-found') return undefined;
      throw error;
    }
  }

  /** Should the way break before the answer comes, it is sent again, and may count as two runs. */
  async recordProfile(manifest: Digest, purpose: Purpose, recording: Buffer): Promise<void> {
    if (this.#static) throw new GridError('denied', `${this.name} is static: it takes no recordings`);
    await this.#fetch({ path: profilePath(manifest, purpose), bytesMax: ANSWER_BYTES_MAX, body: recording });
  }

  way(): WayFigures | undefined {
    const { roundTripMs, bytesPerSecond, bytes } = this.#window;
    if (roundTripMs === undefined) return undefined;
    // And the next batch, so that none is waited for.
    return { roundTripMs, bytesPerSecond, prefetchBytes: bytes * (1 + BATCH_SHARE) };
  }

  reportCorrupt(): void {
    this.#counts.corruptChunks++;
  }

  async readChunks(
    refs: readonly ChunkRef[],
    { priority, signal }: ReadChunksOptions,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    checkRefs(refs);
    this.#refuseWhenClosed();
    const cancelled = () => new GridError('closed', `a read from ${this.name} was cancelled`);
    if (signal?.aborted) throw cancelled();
    if (refs.length === 0 || this.#openings.deliver(refs, deliver)) return;
    this.#counts.requests++;
    let onAbort: (() => void) | undefined;
    let call: Call;
    try {
      await new Promise<void>((resolve, reject) => {
        call = new Call(refs.length, deliver, resolve, reject);
        this.#join(call);
        const queue = priority === 'demand' ? this.#demand : this.#bulk;
        refs.forEach((ref, index) => queue.push({ call, index, ref }));
        onAbort = () => call.fail(cancelled());
        signal?.addEventListener('abort', onAbort);
        this.#schedule();
      });
    } finally {
      if (onAbort) signal?.removeEventListener('abort', onAbort);
      this.#waiters.delete(call!);
      this.#dropUnwanted(call!);
    }
  }

  async close(): Promise<void> {
    if (!this.#closing.signal.aborted) {
      this.#closing.abort();
      for (const waiter of this.#waiters) waiter.fail(new GridError('closed', `${this.name} was closed`));
      this.#lanes.close();
    }
    await this.#transport.close();
  }

  #refuseWhenClosed(): void {
    if (this.#closing.signal.aborted) throw new GridError('closed', `${this.name} was closed`);
  }

  async #fetch(wanted: Wanted): Promise<Buffer> {
    this.#refuseWhenClosed();
    this.#counts.requests++;
    let fetch: Fetch;
    try {
      return await new Promise<Buffer>((resolve, reject) => {
        fetch = new Fetch(wanted, resolve, reject);
        this.#join(fetch);
        this.#fetches.push(fetch);
        this.#schedule();
      });
    } finally {
      this.#waiters.delete(fetch!);
    }
  }

  async #hello(timeoutMs: number): Promise<void> {
    const lane = await this.#transport.openLane();
    try {
      const bound = AbortSignal.timeout(timeoutMs);
      try {
        const exchange = (path: string, bytesMax: number) => this.#exchange(lane, { path, bytesMax }, bound);
        const { kind, idleLanes, openings } = await greet(exchange, this.name);
        this.#static = kind === 'static';
        this.#openings.known = openings;
        this.#lanes.standing = Math.min(LANES_AT_OPEN, idleLanes);
      } catch (error) {
        if (bound.aborted) {
          throw new GridError('unreachable', `${this.name} did not answer within ${timeoutMs} ms`, {
            cause: error,
          });
        }
        throw await lane.explain(error);
      }
    } catch (error) {
      lane.close();
      throw error;
    }
    this.#lanes.add(lane);
  }

  async #exchange(
    lane: Lane,
    { path, bytesMax, body }: Wanted,
    signal: AbortSignal,
  ): Promise<{ status: number; body: Buffer }> {
    this.#counts.roundTrips++;
    const what = body ? { method: 'POST' as const, type: OCTETS, body } : { method: 'GET' as const };
    const response = await lane.exchange({ ...what, path, signal });
    const { idleTimeoutMs } = this.#transport;
    const answer = await collect(response, bytesMax, idleTimeoutMs, `${path} of ${this.name}`);
    this.#counts.bytesReceived += answer.length;
    return { status: response.statusCode!, body: answer };
  }

  // ---- queues ----

  /** Everything asked for in this turn of the event loop is there when the pump runs. */
  #schedule(): void {
    if (this.#pumpSoon) return;
    this.#pumpSoon = true;
    setImmediate(() => {
      this.#pumpSoon = false;
      this.#pump();
    });
  }

  #pump(): void {
    if (this.#broken || this.#closing.signal.aborted) return;
    // What nobody waits for must not open lanes: where they cannot be opened, that would go round without a pause.
    if (this.#waiters.size === 0) this.#fetches.length = this.#demand.length = this.#bulk.length = 0;
    while (this.#fetches.length > 0) {
      const lane = this.#lanes.take(false);
      if (!lane) return;
      void this.#runFetch(lane, this.#fetches.shift()!);
    }
    while (this.#demand.length > 0) {
      const lane = this.#lanes.take(false);
      if (!lane) return;
      const items = takeItems(this.#demand, this.#static ? 1 : BATCH_CHUNKS_MAX, Infinity, () => 0);
      this.#run(lane, items, false);
    }
    if (this.#bulk.length > 0) this.#lanes.expect(Math.min(LANES_AT_OPEN - 1, this.#bulk.length));
    while (this.#bulk.length > 0) {
      if (this.#window.isFull(this.#bulkBytes)) return this.#window.onHeldBack();
      const lane = this.#lanes.take(true);
      if (!lane) return;
      const items = takeItems(
        this.#bulk,
        this.#static ? 1 : BULK_CHUNKS_MAX,
        Math.min(this.#window.bytes * BATCH_SHARE, this.#window.bytes - this.#bulkBytes),
        ({ ref }) => this.#window.estimate(ref),
      );
      this.#run(lane, items, true);
    }
  }

  #run(lane: Lane, items: Item[], bulk: boolean): void {
    if (items.length === 0) this.#lanes.release(lane);
    else void this.#runBatch(lane, new Batch(items, bulk));
  }

  async #runFetch(lane: Lane, fetch: Fetch): Promise<void> {
    if (fetch.done) return this.#lanes.release(lane);
    try {
      const { status, body } = await this.#exchange(lane, fetch.wanted, this.#closing.signal);
      this.#lanes.release(lane);
      this.#recovery.worked();
      if (status === 200) fetch.succeed(body);
      else fetch.fail(remoteError(body, status, `${fetch.wanted.path} of ${this.name}`));
    } catch (error) {
      const reason = await lane.explain(error);
      this.#lanes.discard(lane);
      if (reason.blame === 'tunnel') {
        if (!fetch.done) this.#fetches.unshift(fetch);
        this.#onBroken(reason);
      } else fetch.fail(reason);
    }
    this.#pump();
  }

  async #runBatch(lane: Lane, batch: Batch): Promise<void> {
    if (batch.bulk) {
      for (const ref of batch.refs) batch.bulkBytes += this.#window.estimate(ref);
      this.#bulkBytes += batch.bulkBytes;
    }
    let failure: GridError | undefined;
    try {
      failure = this.#static ? await this.#getChunk(lane, batch) : await this.#postBatch(lane, batch);
      this.#lanes.release(lane);
    } catch (error) {
      failure = await lane.explain(error);
      this.#lanes.discard(lane);
    }
    this.#bulkBytes -= batch.bulkBytes;
    batch.leave();
    if (failure) this.#afterFailure(batch, failure);
    this.#pump();
  }

  /** Streams one batch. Returns the error that the answer is, when it is one and the lane is as good as before. */
  async #postBatch(lane: Lane, batch: Batch): Promise<GridError | undefined> {
    const { idleTimeoutMs } = this.#transport;
    const body = encodeBatchRequest(batch.refs, batch.bulk ? 'prefetch' : 'demand');
    const sentMs = performance.now();
    this.#counts.roundTrips++;
    const response = await lane.exchange({
      method: 'POST',
      path: BATCH_PATH,
      type: BATCH_TYPE,
      body,
      signal: batch.cancel.signal,
    });
    const what = `a batch of ${this.name}`;
    if (response.statusCode !== 200) {
      const answer = await collect(response, ANSWER_BYTES_MAX, idleTimeoutMs, what);
      if ([404, 405, 501].includes(response.statusCode!) && !isErrorBody(answer)) {
        this.#static = true;
        this.#requeue(batch);
        return undefined;
      }
      return remoteError(answer, response.statusCode!, what);
    }
    const reader = new FrameReader(batch.refs, this.name, (index, chunk) =>
      this.#onChunk(batch, index, chunk),
    );
    let first = true;
    await readBody(response, idleTimeoutMs, what, (piece) => {
      if (first) this.#onRoundTrip(sentMs);
      first = false;
      this.#counts.bytesReceived += piece.length;
      reader.push(piece);
    });
    if (!reader.ended) throw new GridError('tunnel-lost', `${what} was cut`);
    return undefined;
  }

  /** The one chunk of a batch, as a file of a static server. */
  async #getChunk(lane: Lane, batch: Batch): Promise<GridError | undefined> {
    const ref = batch.refs[0]!;
    const path = objectPath('chunks', ref.digest);
    const sentMs = performance.now();
    const bytesMax = ref.plainBytes + STORED_OVERHEAD_BYTES_MAX;
    const { status, body } = await this.#exchange(lane, { path, bytesMax }, batch.cancel.signal);
    if (status !== 200) return remoteError(body, status, `${path} of ${this.name}`);
    this.#onRoundTrip(sentMs);
    this.#onChunk(batch, 0, { encoding: 'zstd', bytes: body });
    return undefined;
  }

  #onRoundTrip(sentMs: number): void {
    const nowMs = performance.now();
    this.#window.onRoundTrip(nowMs - sentMs, nowMs);
  }

  #onChunk(batch: Batch, index: number, chunk: StoredChunk): void {
    const ref = batch.refs[index]!;
    this.#counts.chunksReceived++;
    this.#recovery.worked();
    const train = batch.bulk ? batch.train : undefined;
    this.#window.onChunk(chunk.bytes.length, ref.plainBytes, performance.now(), train);
    if (batch.bulk) {
      const estimate = Math.min(batch.bulkBytes, this.#window.estimate(ref));
      batch.bulkBytes -= estimate;
      this.#bulkBytes -= estimate;
    }
    for (const { call, index: place } of batch.take(index)) call.give(place, chunk);
    if (batch.bulk && this.#bulk.length > 0) this.#schedule();
  }

  /** A call that ended: its items leave the queues when their turn comes, its batches now if nobody else is in. */
  #dropUnwanted(call: Call): void {
    for (const batch of call.batches) {
      if (batch.remaining > DRAIN_CHUNKS && batch.open().length === 0) batch.cancel.abort();
    }
  }

  // ---- failure ----

  #afterFailure(batch: Batch, reason: GridError): void {
    const calls = new Set(batch.open().map(({ call }) => call));
    if (calls.size === 0) return;
    if (reason.blame === 'tunnel') {
      this.#requeue(batch);
      this.#onBroken(reason);
    } else if (calls.size > 1) {
      for (const call of calls) call.solo = true;
      this.#requeue(batch);
    } else for (const call of calls) call.fail(reason);
  }

  #requeue(batch: Batch): void {
    const queue = batch.bulk ? this.#bulk : this.#demand;
    queue.unshift(...batch.open());
  }

  #join(waiter: Waiter): void {
    this.#waiters.add(waiter);
    this.#bound([waiter]);
  }

  /** While the way is broken, whoever waits has a bound. */
  #bound(waiters: Iterable<Waiter>): void {
    if (!this.#broken) return;
    for (const waiter of waiters) waiter.stalled(this.#reconnectTimeoutMs, this.name, this.#broken);
  }

  #onLanesFailed(reason: GridError): void {
    if (reason.blame === 'tunnel') this.#onBroken(reason);
    else for (const waiter of this.#waiters) waiter.fail(reason);
  }

  /** The way broke: everybody who waits gets a bound, and the way is made again. */
  #onBroken(reason: GridError): void {
    if (this.#closing.signal.aborted) return;
    if (this.#broken) return this.#bound(this.#waiters);
    this.#broken = reason;
    this.#onEvent({ type: 'lost', message: reason.message });
    void this.#recover();
  }

  async #recover(): Promise<void> {
    const { signal } = this.#closing;
    const isWaitedFor = () => {
      this.#bound(this.#waiters); // progress over a lane that still lived has ended a bound
      return this.#waiters.size > 0;
    };
    const outcome = await this.#recovery.run(isWaitedFor, signal);
    if (signal.aborted) return;
    if (outcome === 'again') {
      this.#counts.reconnects++;
      this.#onEvent({ type: 'reconnected', message: `connected to ${this.name} again` });
    } else if (outcome instanceof GridError) this.#onLanesFailed(outcome);
    this.#broken = undefined;
    this.#pump();
  }
}
