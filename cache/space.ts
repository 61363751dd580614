/**
 * What the cache may take on disk, and what to do when it cannot: quota, free-space floor, full disk, failing disk.
 * Where quota or floor are reached, others' chunks are evicted (eviction.ts). Nothing here fails a read: a chunk
 * that may not or cannot be stored is served from memory, `degraded` says why, and the next attempts (one a second
 * after a failure) find out when it is over.
 */
import { statfsSync } from 'node:fs';
import { statfs } from 'node:fs/promises';
import { LRUCache } from 'lru-cache';
import type { Digest } from '../src/core/bytes.ts';
import { errnoOf } from '../src/core/errors.ts';
import {
  CACHE_MEMORY_BYTES_MAX,
  CACHE_MIN_FREE_BYTES,
  CACHE_QUOTA_SLACK_BYTES,
  CACHE_RETRY_MS,
  MIB,
} from '../src/core/limits.ts';

/** Free space at which a disk that was full counts as healed even before the next chunk is stored. */
const HEALED_FREE_BYTES = 16 * MIB;

export class Space {
  readonly quotaBytes: number | undefined;
  /** The clock of recency: what is used now is marked with it. */
  generation = 1;
  /** Makes room for so many bytes; false when there is nothing to take away. Set by whoever can. */
  reclaimer: ((bytes: number) => Promise<boolean>) | undefined;
  readonly #folder: string;
  readonly #minFreeBytes: number;
  readonly #log: (message: string) => void;
  /** Plain chunks that could not be stored. */
  readonly memory = new LRUCache<Digest, Buffer>({
    maxSize: CACHE_MEMORY_BYTES_MAX,
    sizeCalculation: (plain) => Math.max(1, plain.length),
  });
  readonly #charges = new Map<string, number>();
  #usedBytes = 0;
  /** Why nothing more may be stored although room was looked for. */
  #refused: string | undefined;
  #failure: { readonly reason: string; readonly full: boolean; atMs: number } | undefined;

  /** `minFreeBytes`: what stays free for others; the smaller of 1 GiB and 5 % of the disk when left out. */
  constructor(
    folder: string,
    limits: { quotaBytes?: number | undefined; minFreeBytes?: number | undefined },
    log: (message: string) => void,
  ) {
    this.#folder = folder;
    this.quotaBytes = limits.quotaBytes;
    this.#minFreeBytes = limits.minFreeBytes ?? defaultFloor(folder);
    this.#log = log;
  }

  /** Bytes on disk, as measured at the last commit plus what was stored since. */
  get usedBytes(): number {
    return this.#usedBytes;
  }

  /** Why chunks are not being stored at the moment; undefined when they are. */
  get degraded(): string | undefined {
    if (this.#failure) return this.#failure.reason;
    return this.#refused;
  }

  /** Sets what the thing called `key` takes on disk, as measured. */
  setCharge(key: string, bytes: number): void {
    this.#usedBytes += bytes - (this.#charges.get(key) ?? 0);
    if (bytes === 0) this.#charges.delete(key);
    else this.#charges.set(key, bytes);
  }

  /** Adds `bytes` to `key` if quota and floor allow it and the disk is not being left alone after a failure. */
  take(key: string, bytes: number): boolean {
    if (this.#leftAlone || this.shortfall(bytes) > 0) return false;
    if (this.#refused !== undefined) {
      this.#refused = undefined;
      this.#log('cache: there is room for chunks again');
    }
    this.setCharge(key, (this.#charges.get(key) ?? 0) + bytes);
    return true;
  }

  /** What was charged to `key` and is no longer there. */
  giveBack(key: string, bytes: number): void {
    this.setCharge(key, Math.max(0, (this.#charges.get(key) ?? 0) - bytes));
  }

  /** How many bytes have to go before `bytes` more may come; 0 or less when they may come now. */
  shortfall(bytes: number): number {
    const overQuota =
      this.quotaBytes === undefined
        ? -Infinity
        : this.#usedBytes + bytes + CACHE_QUOTA_SLACK_BYTES - this.quotaBytes;
    return Math.max(overQuota, this.#belowFloor(bytes));
  }

  #belowFloor(bytes: number): number {
    try {
      const { bavail, bsize } = statfsSync(this.#folder);
      return bytes + this.#minFreeBytes - bavail * bsize;
    } catch {
      // A disk that cannot say is found out by the next write.
      return -Infinity;
    }
  }

  /** Looks for room for `bytes`; false, and `degraded` says so, when there is none to be made. */
  async reclaim(bytes: number): Promise<boolean> {
    if (this.#leftAlone) return false;
    if ((await this.reclaimer?.(bytes)) ?? false) return true;
    if (this.#leftAlone || this.shortfall(bytes) <= 0) return false;
    const reason =
      this.#belowFloor(bytes) > 0
        ? `the disk of ${this.#folder} is full but for the ${this.#minFreeBytes} bytes that stay free, and nothing can be evicted`
        : `the cache's quota of ${this.quotaBytes} bytes is used up, and nothing can be evicted`;
    if (this.#refused === undefined) this.#log(`cache: ${reason}; reads pass through`);
    this.#refused = reason;
    return false;
  }

  get #leftAlone(): boolean {
    return this.#failure !== undefined && performance.now() - this.#failure.atMs < CACHE_RETRY_MS;
  }

  /** Keeps a chunk that could not be stored, without the rest of the buffer it may be a window of. */
  keep(digest: Digest, plain: Buffer): void {
    this.memory.set(digest, plain.buffer.byteLength > 2 * plain.length ? Buffer.from(plain) : plain);
  }

  /** The disk took what it was given. */
  succeeded(): void {
    if (!this.#failure) return;
    this.#failure = undefined;
    this.#log('cache: the disk takes data again');
  }

  /** A write or sync failed: reads pass through, and the disk is left alone for a while. */
  failed(error: unknown, doing: string): void {
    const full = ['ENOSPC', 'EDQUOT'].includes(errnoOf(error) ?? '');
    const reason = full
      ? `the disk of ${this.#folder} is full`
      : `${doing}: ${error instanceof Error ? error.message : String(error)}`;
    if (this.#failure?.reason !== reason) this.#log(`cache: ${reason}; reads pass through`);
    this.#failure = { reason, full, atMs: performance.now() };
  }

  /** Clears the report of a full disk that has space again, so that health needs no traffic to recover. */
  async probe(): Promise<void> {
    if (this.#refused !== undefined && this.shortfall(HEALED_FREE_BYTES) <= 0) this.#refused = undefined;
    if (!this.#failure?.full) return;
    const { bavail, bsize } = await statfs(this.#folder);
    if (bavail * bsize >= HEALED_FREE_BYTES) this.succeeded();
  }
}

function defaultFloor(folder: string): number {
  try {
    const { blocks, bsize } = statfsSync(folder);
    return Math.min(CACHE_MIN_FREE_BYTES, Math.floor((blocks * bsize) / 20));
  } catch {
    return CACHE_MIN_FREE_BYTES;
  }
}
