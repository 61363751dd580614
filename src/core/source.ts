/**
 * The contract between everything that gives chunks: a store, a proxy's client in front of a store, a cache in
 * front of either, several of them with failover. One suite (test/suites/chunk-source.ts) runs for each.
 */
import type { Digest } from './bytes.ts';
import type { ChunkRef, StoredChunk } from './chunk.ts';
import type { Tag } from './manifest.ts';
import type { Purpose } from './profile.ts';
import type { UploadTarget } from './uploads.ts';

/** 'demand': a guest waits for it. 'prefetch': nobody does yet; it must never delay a demand read. */
export type Priority = 'demand' | 'prefetch';

export interface ReadChunksOptions {
  readonly priority: Priority;
  readonly signal?: AbortSignal;
}

/** What a source knows of the way to it, measured on what came over it. */
export interface WayFigures {
  /** Shortest time from a request to the first byte of its answer, of late. */
  readonly roundTripMs: number;
  /** Stored bytes per second of late; undefined while too little came to say. */
  readonly bytesPerSecond: number | undefined;
  /** Stored bytes of prefetch that keep the way full: more at a time would only queue on it. */
  readonly prefetchBytes: number;
}

export interface ChunkSource {
  /** For messages and metrics, e.g. `ssh://host/srv/store`. Never holds a secret. */
  readonly name: string;

  /** All tags, as of now. Throws unreachable/tunnel-lost/… when the source cannot say. */
  listTags(): Promise<Tag[]>;

  /** A manifest's bytes; the receiver checks them with `parseManifest`. Throws not-found. */
  readManifest(digest: Digest): Promise<Buffer>;

  /** A chunk table's plain bytes; the receiver checks them with `ChunkTable.parse`. Throws not-found. */
  readTable(digest: Digest): Promise<Buffer>;

  /**
   * Streams the chunks asked for, each once, in any order; `deliver` gets the index into `refs`. Chunks are as
   * stored and NOT verified: the receiver decodes with `decodeChunk`. `deliver` may keep the bytes. At most
   * BATCH_CHUNKS_MAX refs a call. Resolves when all were delivered; rejects on the first failure
   * (not-found, tunnel and origin errors, `closed` on abort), after which nothing more is delivered.
   * What was delivered before stays good.
   */
  readChunks(
    refs: readonly ChunkRef[],
    options: ReadChunksOptions,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void>;

  /**
   * The profile's bytes, or undefined when there is none. From outside: read with `parseProfile`. A source that
   * keeps no profiles has neither of these two.
   */
  readProfile?(manifest: Digest, purpose: Purpose): Promise<Buffer | undefined>;

  /** Merges one recording into the profile that the source keeps. Throws denied where the source may not be
   * written to, bad-format. */
  recordProfile?(manifest: Digest, purpose: Purpose, recording: Buffer): Promise<void>;

  /**
   * Keeps these images, which clones lie on, from garbage collection for HOLD_MS, whatever becomes of their names;
   * replaces what `holder` held before. What is not there is passed over. Throws bad-request, denied where nothing
   * is kept for hosts. A source that has nothing to keep has no such method.
   */
  hold?(holder: string, manifests: readonly Digest[]): Promise<void>;

  /** Takes new images. A source that nobody can write to has none; one that may refuse says so when it is asked. */
  readonly uploads?: UploadTarget | undefined;

  /**
   * The receiver could not decode a chunk that `readChunks` delivered; `chunk` is the very object. Called before
   * the chunk is asked for again, so that a source over several others asks another one then. A source that has
   * nobody else to ask may leave it out, or count.
   */
  reportCorrupt?(ref: ChunkRef, chunk: StoredChunk): void;

  /** Undefined before the first answer. A source on this host has no such method. */
  way?(): WayFigures | undefined;

  /** Ends connections and open reads (they reject with `closed`). Idempotent. */
  close(): Promise<void>;
}
