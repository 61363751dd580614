/**
 * The files of one image as its states see them: making them when the disk allows it, writing chunks, hashing what
 * is there, giving space back. What a failing disk means is decided in image-file.ts; here it is told to Space.
 */
import { closeSync, constants, fstatSync, openSync } from 'node:fs';
import { isAllZero } from '../src/core/bytes.ts';
import { chunkHash } from '../src/core/chunk-hash.ts';
import { DirectFile } from '../src/core/direct-io.ts';
import type { DirectMap } from '../src/core/image.ts';
import { KIB } from '../src/core/limits.ts';
import { punchHole } from '../src/core/linux.ts';
import { chunkCountOf, chunkLengthOf } from '../src/core/manifest.ts';
import type { Usage } from '../src/core/usage.ts';
import type { ChunkStates } from './chunk-states.ts';
import { Commits } from './commits.ts';
import { GatheredWrites } from './gathered-writes.ts';
import {
  closeFiles,
  createFiles,
  mapBytesOf,
  openFiles,
  punchRuns,
  readFull,
  readRecord,
  syncData,
  writeFull,
  writeRecords,
} from './map-file.ts';
import type { ImageFiles, ImageShape } from './map-file.ts';
import type { Space } from './space.ts';

/** What is no larger costs less to write than to bring to the thread pool. */
const GATHERED_BYTES_MAX = 32 * KIB;
/** A chunk takes whole blocks of the file system. */
const DISK_BLOCK_BYTES = 4096;

export interface DiskContext {
  readonly space: Space;
  readonly usage: Usage;
  /** No chunk is being written: what the files take can be measured. */
  isQuiescent(): boolean;
  readonly log: (message: string) => void;
}

export class ImageDisk {
  readonly folder: string;
  readonly #shape: ImageShape;
  readonly #states: ChunkStates;
  readonly #context: DiskContext;
  #files: ImageFiles | undefined;
  #commits: Commits | undefined;
  #gathered: GatheredWrites | undefined;
  #direct: DirectMap | undefined;
  #directFile: DirectFile | undefined;
  #readOnlyFd: number | undefined;

  /** Opens what is there, or makes it if the disk allows it now. Throws bad-format (see `openFiles`). */
  constructor(folder: string, manifestDigest: string, states: ChunkStates, context: DiskContext) {
    const { manifest } = states;
    this.folder = folder;
    this.#shape = {
      manifestDigest,
      sizeBytes: manifest.sizeBytes,
      chunkBytes: manifest.chunkBytes,
      count: chunkCountOf(manifest),
    };
    this.#states = states;
    this.#context = context;
    const files = openFiles(folder, this.#shape);
    if (!files) {
      this.ensure();
      return;
    }
    try {
      this.#use(files, false);
      states.adopt(files);
      this.#recount();
    } catch (error) {
      closeFiles(files);
      throw error;
    }
  }

  /** Undefined while a full disk keeps the files from being made. */
  get direct(): DirectMap | undefined {
    return this.#direct;
  }

  get dataFd(): number | undefined {
    return this.#files?.dataFd;
  }

  get unrecordedChunks(): number {
    return this.#commits?.unrecordedChunks ?? 0;
  }

  isUnrecorded(index: number): boolean {
    return this.#commits?.recordOf(index) !== undefined;
  }

  /** Whether there are files to store in; makes them if the disk allows it now. */
  ensure(): boolean {
    if (this.#files) return true;
    const { space } = this.#context;
    const { manifestDigest, count } = this.#shape;
    if (!space.take(manifestDigest, mapBytesOf(count))) return false;
    try {
      this.#use(createFiles(this.folder, this.#shape), true);
      return true;
    } catch (error) {
      space.setCharge(manifestDigest, 0);
      space.failed(error, `cannot create ${this.folder}`);
      return false;
    }
  }

  #use(files: ImageFiles, filesAreNew: boolean): void {
    this.#files = files;
    this.#gathered = new GatheredWrites(files.dataFd);
    this.#commits = new Commits({
      folder: this.folder,
      files,
      filesAreNew,
      space: this.#context.space,
      lost: (index) => this.#states.lost(index),
      committed: () => this.#recount(),
    });
    this.#direct = {
      sizeBytes: this.#shape.sizeBytes,
      usage: this.#context.usage.counters,
      base: {
        fd: files.dataFd,
        unitBytes: this.#shape.chunkBytes,
        states: this.#states.stateBytes,
        touched: this.#states.touchedBytes,
        notes: this.#states.noteBytes,
        hashes: this.#states.hashBytes,
      },
    };
    this.#directFile = new DirectFile(this.#direct);
  }

  /** True when the whole range was PRESENT and has been read. Throws what the disk says. */
  read(target: Uint8Array, offsetBytes: number): boolean {
    return this.#directFile?.read(target, offsetBytes) ?? false;
  }

  /** Bytes of a chunk that is on the disk; undefined when they are not what they should be. Throws what the disk
   * says. */
  async readChecked(index: number): Promise<Buffer | undefined> {
    const { dataFd, mapFd } = this.#files!;
    const plain = Buffer.allocUnsafeSlow(chunkLengthOf(this.#states.manifest, index));
    await readFull(dataFd, plain, index * this.#shape.chunkBytes);
    if (this.#states.table.entryOf(index) < 0) return isAllZero(plain) ? plain : undefined;
    // The record of a chunk that was stored a moment ago is still on its way to the map.
    const record = this.#commits?.recordOf(index) ?? readRecord(mapFd, index);
    return chunkHash(plain) === record ? plain : undefined;
  }

  /** Makes a chunk of zeros a hole again; false when the disk refuses. */
  async writeZeros(index: number, zeros: Buffer): Promise<boolean> {
    const { dataFd } = this.#files!;
    const start = index * this.#shape.chunkBytes;
    try {
      punchHole(dataFd, start, zeros.length);
    } catch {
      try {
        await writeFull(dataFd, zeros, start);
      } catch (error) {
        this.#context.space.failed(error, `cannot write ${this.folder}/data`);
        return false;
      }
    }
    return true;
  }

  /** Writes a chunk, or has it copied from another file, and gives its record to the next commit. False when a sync
   * failed meanwhile: the bytes may not reach the disk. Throws what the disk says. */
  async write(
    index: number,
    plain: Buffer,
    copyTo: ((fd: number, offsetBytes: number) => Promise<boolean>) | undefined,
    written: () => void,
  ): Promise<boolean> {
    const commits = this.#commits!;
    const { dataFd } = this.#files!;
    const failuresBefore = commits.syncFailures;
    const start = index * this.#shape.chunkBytes;
    if (!(await copyTo?.(dataFd, start))) {
      if (plain.length <= GATHERED_BYTES_MAX) await this.#gathered!.write(plain, start);
      else await writeFull(dataFd, plain, start);
    }
    if (failuresBefore !== commits.syncFailures) return false;
    const record = chunkHash(plain);
    this.#states.expect(index, record);
    written();
    commits.add(index, record, plain.length);
    return true;
  }

  /** Clears the records and gives the space back of chunks that nobody can read any more. Never rejects. */
  async takeAway(victims: readonly number[]): Promise<void> {
    const { dataFd, mapFd } = this.#files!;
    const { log } = this.#context;
    try {
      await writeRecords(
        mapFd,
        victims.map((index) => ({ index, record: 0n })),
      );
      await syncData(mapFd);
    } catch (error) {
      // The space is needed all the same; the hash finds what the map then calls present.
      log(`cache: cannot clear records of ${this.folder}/map: ${String(error)}`);
    }
    try {
      await punchRuns(dataFd, victims, this.#shape);
    } catch (error) {
      log(`cache: cannot give space of ${this.folder}/data back: ${String(error)}`);
    }
  }

  /** A second descriptor of the data, for readers only; one for all, closed with the files. */
  readOnlyFd(): number {
    this.#readOnlyFd ??= openSync(`/proc/self/fd/${this.#files!.dataFd}`, constants.O_RDONLY);
    return this.#readOnlyFd;
  }

  /** What the files really take; only while nothing is being written, or chunks would count twice or never. */
  #recount(): void {
    if (!this.#files || !this.#context.isQuiescent()) return;
    const { space } = this.#context;
    try {
      const dataBytes = fstatSync(this.#files.dataFd).blocks * 512;
      space.setCharge(this.#shape.manifestDigest, dataBytes + mapBytesOf(this.#shape.count));
    } catch (error) {
      space.failed(error, `cannot measure ${this.folder}/data`);
    }
  }

  async flush(): Promise<void> {
    await this.#commits?.flush();
  }

  /** No commit starts by itself any more. */
  stop(): void {
    this.#commits?.stop();
  }

  async close(): Promise<void> {
    if (!this.#files) return;
    try {
      await syncData(this.#files.mapFd);
    } catch (error) {
      this.#context.log(`cache: cannot sync ${this.folder}/map: ${String(error)}`);
    }
    if (this.#readOnlyFd !== undefined) closeSync(this.#readOnlyFd);
    closeFiles(this.#files);
  }
}

/** What a chunk takes on the disk. */
export function diskBytesOf(plainBytes: number): number {
  return Math.ceil(plainBytes / DISK_BLOCK_BYTES) * DISK_BLOCK_BYTES;
}
