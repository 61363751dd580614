/**
 * A source with seeded faults, as an ordinary member of the chain: it delays, fails, forgets, damages, and counts
 * what was asked for. Nothing happens until it is armed; `disarm` heals it. A test that fails prints the seed.
 */
import type { Digest } from '../../src/core/bytes.ts';
import type { ChunkRef, StoredChunk } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ErrorCode } from '../../src/core/errors.ts';
import type { Tag } from '../../src/core/manifest.ts';
import type { ChunkSource, ReadChunksOptions } from '../../src/core/source.ts';

export interface Faults {
  /** Every call waits this long first. */
  readonly delayMs?: number;
  /** Every call fails with this code … */
  readonly failWith?: ErrorCode;
  /** … or with this share of the calls (0 to 1, seeded); 1 when left out. */
  readonly failShare?: number;
  /** Share of chunks that arrive with one byte changed. */
  readonly corruptShare?: number;
  /** These chunks do not exist. */
  readonly missing?: ReadonlySet<Digest>;
  /** The call resolves without this many of its chunks. */
  readonly forget?: number;
  /** Calls never answer until they are aborted. */
  readonly hang?: boolean;
}

export class FaultySource implements ChunkSource {
  readonly seed: number;
  readonly #inner: ChunkSource;
  #faults: Faults = {};
  #state: number;
  /** Calls of readChunks. */
  calls = 0;
  /** Of them, for somebody who waited. */
  demandCalls = 0;
  /** How often each chunk was asked for. */
  readonly askedFor = new Map<Digest, number>();
  tagCalls = 0;
  objectCalls = 0;

  constructor(inner: ChunkSource, seed: number) {
    this.#inner = inner;
    this.seed = seed;
    this.#state = (seed * 2654435761) >>> 0 || 1;
  }

  get name(): string {
    return `${this.#inner.name} with faults (seed ${this.seed})`;
  }

  /** Chunks asked for in all. */
  get chunksAskedFor(): number {
    return [...this.askedFor.values()].reduce((total, times) => total + times, 0);
  }

  arm(faults: Faults): void {
    this.#faults = faults;
  }

  disarm(): void {
    this.#faults = {};
  }

  async listTags(): Promise<Tag[]> {
    this.tagCalls++;
    await this.#trouble();
    return this.#inner.listTags();
  }

  async readManifest(digest: Digest): Promise<Buffer> {
    this.objectCalls++;
    await this.#trouble();
    return this.#damaged(await this.#inner.readManifest(digest));
  }

  async readTable(digest: Digest): Promise<Buffer> {
    this.objectCalls++;
    await this.#trouble();
    return this.#damaged(await this.#inner.readTable(digest));
  }

  async readChunks(
    refs: readonly ChunkRef[],
    options: ReadChunksOptions,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    this.calls++;
    if (options.priority === 'demand') this.demandCalls++;
    for (const { digest } of refs) this.askedFor.set(digest, (this.askedFor.get(digest) ?? 0) + 1);
    await this.#trouble(options.signal);
    const { missing, forget = 0 } = this.#faults;
    const gone = refs.findIndex((ref) => missing?.has(ref.digest));
    const sent = refs.slice(0, (gone < 0 ? refs.length : gone) - forget);
    await this.#inner.readChunks(sent, options, (index, chunk) => {
      deliver(index, { encoding: chunk.encoding, bytes: this.#damaged(chunk.bytes) });
    });
    if (gone >= 0) {
      throw new GridError('not-found', `chunk ${refs[gone]!.digest.slice(0, 12)} is not in ${this.name}`);
    }
  }

  close(): Promise<void> {
    return this.#inner.close();
  }

  /** 0 to 1, the same sequence for the same seed. */
  #random(): number {
    this.#state ^= this.#state << 13;
    this.#state ^= this.#state >>> 17;
    this.#state ^= this.#state << 5;
    return (this.#state >>> 0) / 2 ** 32;
  }

  async #trouble(signal?: AbortSignal): Promise<void> {
    const { delayMs, failWith, failShare = 1, hang } = this.#faults;
    if (hang) {
      await new Promise<void>((_, reject) => {
        const end = () => reject(new GridError('closed', `${this.name}: aborted`));
        if (signal?.aborted) end();
        signal?.addEventListener('abort', end);
      });
    }
    if (delayMs !== undefined) await new Promise((resolve) => setTimeout(resolve, delayMs));
    if (failWith !== undefined && this.#random() < failShare) {
      throw new GridError(failWith, `${this.name} fails as it was told to`);
    }
  }

  #damaged<T extends Uint8Array>(bytes: T): T | Buffer {
    const { corruptShare = 0 } = this.#faults;
    if (corruptShare === 0 || this.#random() >= corruptShare) return bytes;
    const copy = Buffer.from(bytes);
    const at = Math.floor(this.#random() * copy.length);
    copy[at] = copy[at]! ^ (1 << Math.floor(this.#random() * 8));
    return copy;
  }
}
