/**
 * Group commit of one image: chunks that were written to `data` gather here, and at most once a second (or after
 * CACHE_COMMIT_BYTES of them) one fdatasync covers them all and their records are written. The order is what power
 * loss is about: data, fdatasync, then the map (see map-file.ts).
 *
 * A failed fdatasync: the kernel reports a lost write once and then calls the pages clean, so nothing written since
 * the last good one counts, also what was being written meanwhile (`syncFailures` tells). A failed write of records
 * costs nothing: the data is safe, the records stay on the list.
 */
import { CACHE_COMMIT_BYTES, CACHE_COMMIT_INTERVAL_MS } from '../src/core/limits.ts';
import { syncData, syncNewFiles, writeRecords } from './map-file.ts';
import type { ImageFiles } from './map-file.ts';
import type { Space } from './space.ts';

export interface CommitContext {
  readonly folder: string;
  readonly files: ImageFiles;
  /** The files were made just now: their names have to reach the disk before the first record. */
  readonly filesAreNew: boolean;
  readonly space: Space;
  /** The chunk was written and may not be on the disk after all. */
  lost(index: number): void;
  /** A commit is through. */
  committed(): void;
}

export class Commits {
  /** Failed syncs so far: a chunk whose write spans one is not trusted. */
  syncFailures = 0;
  readonly #context: CommitContext;
  #filesAreNew: boolean;
  /** Of chunks that were written and are not in the map, with those that a commit is working on. */
  readonly #records = new Map<number, bigint>();
  #waiting: { index: number; record: bigint }[] = [];
  #waitingBytes = 0;
  #underWay: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #stopped = false;

  constructor(context: CommitContext) {
    this.#context = context;
    this.#filesAreNew = context.filesAreNew;
  }

  get unrecordedChunks(): number {
    return this.#records.size;
  }

  /** The record of a chunk that is not in the map yet. */
  recordOf(index: number): bigint | undefined {
    return this.#records.get(index);
  }

  /** A chunk has been written to `data`. */
  add(index: number, record: bigint, bytes: number): void {
    this.#waiting.push({ index, record });
    this.#waitingBytes += bytes;
    this.#records.set(index, record);
    if (this.#waitingBytes >= CACHE_COMMIT_BYTES) void this.#commit();
    else this.#schedule();
  }

  /** What was added before the call is on the disk and in the map, if the disk takes it. Never rejects. */
  async flush(): Promise<void> {
    await this.#underWay;
    await this.#commit();
  }

  /** No commit starts by itself any more. */
  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
  }

  #schedule(): void {
    if (this.#stopped) return;
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      void this.#commit();
    }, CACHE_COMMIT_INTERVAL_MS).unref();
  }

  #commit(): Promise<void> {
    this.#underWay ??= this.#commitOnce().finally(() => {
      this.#underWay = undefined;
    });
    return this.#underWay;
  }

  async #commitOnce(): Promise<void> {
    const batch = this.#waiting;
    if (batch.length === 0) return;
    const { folder, files, space } = this.#context;
    this.#waiting = [];
    this.#waitingBytes = 0;
    try {
      if (this.#filesAreNew) await syncNewFiles(folder, files);
      this.#filesAreNew = false;
      // Before any record: after power loss a record whose data is missing would be a lie.
      await syncData(files.dataFd);
    } catch (error) {
      space.failed(error, `cannot sync ${folder}/data`);
      this.syncFailures++;
      for (const { index } of [...batch, ...this.#waiting]) this.#context.lost(index);
      this.#waiting = [];
      this.#waitingBytes = 0;
      this.#records.clear();
      return;
    }
    try {
      await writeRecords(files.mapFd, batch);
      for (const { index, record } of batch) {
        if (this.#records.get(index) === record) this.#records.delete(index);
      }
    } catch (error) {
      space.failed(error, `cannot write ${folder}/map`);
      this.#waiting.push(...batch);
      this.#schedule();
    }
    this.#context.committed();
  }
}
