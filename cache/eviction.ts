/**
 * Which chunks go when there is no room: those unused for longest, over all images of the cache, whole rounds at a
 * time. "Used" is what the marks say (chunk-states.ts), read every CACHE_SWEEP_MS and before a round; chunks of one
 * generation are as good as each other. Images that nobody has opened since the start are older than all others:
 * they are opened for it one by one, the longest unchanged first.
 *
 * How a chunk goes without anybody seeing it go is in image-file.ts; one round at a time, everybody who needs room
 * waits for the same one.
 */
import { CACHE_EVICT_BYTES, CACHE_SWEEP_MS } from '../src/core/limits.ts';
import { chunkLengthOf } from '../src/core/manifest.ts';
import type { ImageFile } from './image-file.ts';
import type { Space } from './space.ts';

export interface EvictionContext {
  readonly space: Space;
  /** The images that are open now. */
  open(): Iterable<ImageFile>;
  /** Opens another image that is on the disk; false when there is none left. */
  openAnother(seen: Set<string>): Promise<boolean>;
  readonly log: (message: string) => void;
}

export class Eviction {
  evictedChunks = 0;
  evictedBytes = 0;
  readonly #context: EvictionContext;
  readonly #timer: NodeJS.Timeout;
  #round: Promise<number> | undefined;
  #closed = false;

  constructor(context: EvictionContext) {
    this.#context = context;
    this.#timer = setInterval(() => {
      this.#harvest();
      if (context.space.shortfall(0) > 0) void this.makeRoom(0);
    }, CACHE_SWEEP_MS).unref();
  }

  /** Evicts until `bytes` fit or nothing more can go. Whether it is worth trying again now. Never rejects. */
  async makeRoom(bytes: number): Promise<boolean> {
    if (this.#closed) return false;
    this.#round ??= this.#evict(bytes).finally(() => {
      this.#round = undefined;
    });
    return (await this.#round) > 0 || this.#context.space.shortfall(bytes) <= 0;
  }

  /** Ends the sweeps; waits for a round under way. */
  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    await this.#round;
  }

  #harvest(): void {
    const { space } = this.#context;
    for (const file of this.#context.open()) file.harvest();
    space.generation++;
  }

  /** One round. Resolves to the bytes that became free. */
  async #evict(bytes: number): Promise<number> {
    const { space, log } = this.#context;
    const wanted = space.shortfall(bytes);
    if (wanted <= 0) return 0;
    const batch = Math.min(CACHE_EVICT_BYTES, Math.max(4 * bytes, (space.quotaBytes ?? 0) / 32));
    const seen = new Set<string>();
    let freed = 0;
    try {
      // An image nobody has opened is older than any chunk of those that somebody has.
      let more = await this.#context.openAnother(seen);
      // What is not in the map cannot go: uncommitted, the newest chunks would outlive older ones that are used.
      await Promise.all([...this.#context.open()].map((file) => file.commit()));
      this.#harvest();
      while (freed < wanted && !this.#closed) {
        const bytesNow = await this.#evictOldest(Math.max(wanted - freed, batch));
        freed += bytesNow;
        if (bytesNow > 0) continue;
        if (!more) break;
        more = await this.#context.openAnother(seen);
      }
    } catch (error) {
      log(`cache: eviction failed: ${String(error)}`);
    }
    this.evictedBytes += freed;
    return freed;
  }

  /** About `bytes` of the oldest chunks. */
  async #evictOldest(bytes: number): Promise<number> {
    const files = [...this.#context.open()].filter((file) => !file.claimed);
    const bytesOf = new Map<number, number>();
    for (const file of files) {
      file.states.forEachPresent((index, usedAt) => {
        if (!file.isEvictable(index)) return;
        bytesOf.set(usedAt, (bytesOf.get(usedAt) ?? 0) + chunkLengthOf(file.manifest, index));
      });
    }
    let left = bytes;
    let newest = -1;
    for (const [generation, its] of [...bytesOf].toSorted(([a], [b]) => a - b)) {
      newest = generation;
      if (its >= left) break;
      left -= its;
    }
    let freed = 0;
    for (const file of files) {
      const victims: number[] = [];
      file.states.forEachPresent((index, usedAt) => {
        if (usedAt > newest || (usedAt === newest && left <= 0) || !file.isEvictable(index)) return;
        if (usedAt === newest) left -= chunkLengthOf(file.manifest, index);
        victims.push(index);
      });
      const before = file.figures.evictedChunks;
      freed += await file.evict(victims);
      this.evictedChunks += file.figures.evictedChunks - before;
    }
    return freed;
  }
}
