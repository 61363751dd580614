/** What a cache has and did, as plain figures: for `cache status`, `proxy status`, health and metrics. */
import { lstatSync, readdirSync } from 'node:fs';
import { isDigest } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import type { ChunkTable } from '../src/core/chunk-table.ts';
import { chunkCountOf, chunkLengthOf } from '../src/core/manifest.ts';
import type { Manifest } from '../src/core/manifest.ts';
import type { Catalog } from './catalog.ts';
import { usageOf } from './chunk-states.ts';
import { newFigures } from './figures.ts';
import type { ImageFigures } from './figures.ts';
import type { CacheFolder } from './folder.ts';
import type { UsageFigures } from '../src/core/usage.ts';
import type { ImageFile } from './image-file.ts';
import { closeFiles, openFiles, scanRecords } from './map-file.ts';
import type { Pins } from './pins.ts';
import type { Space } from './space.ts';

export interface CachedImageStatus extends UsageFigures {
  readonly manifest: Digest;
  readonly sizeBytes: number;
  /** Chunks of the image that are not all zero. */
  readonly chunks: number;
  /** Of them, here (in an earlier run stored ones count before they are hashed). */
  readonly presentChunks: number;
  readonly presentBytes: number;
  /** Of the present ones, known to the map on disk: what survives a crash now. */
  readonly recordedChunks: number;
  /** Open handles. */
  readonly references: number;
  /** Since the start of this process: distinct chunks read, and what the source sent for this image. */
  readonly touchedChunks: number;
  readonly fetchedChunks: number;
  readonly fetchedPlainBytes: number;
  readonly fetchedStoredBytes: number;
  /** Chunks that a reader had to wait for. */
  readonly missedChunks: number;
  /** Share of the touched chunks that were here when they were first touched: over chunks, not reads, because reads
   * of what is here tell nobody; nothing of what the kernel kept from earlier opens. Missing before any touch. */
  readonly hitRate?: number;
  /** Fetched before anybody asked (read-ahead, profiles, warming); how many of them were then read. */
  readonly prefetchedChunks: number;
  readonly prefetchedBytes: number;
  readonly prefetchedUsedChunks: number;
  /** Copied from another image here instead of fetched. */
  readonly savedChunks: number;
  readonly savedBytes: number;
  /** Chunks found damaged on this disk and made right. */
  readonly refetchedChunks: number;
  readonly evictedChunks: number;
  /** `all`, or the purposes whose chunks are kept from eviction. */
  readonly pinned: readonly string[];
}

export interface CacheStatus {
  readonly folder: string;
  readonly source: string;
  readonly images: readonly CachedImageStatus[];
  readonly usedBytes: number;
  readonly quotaBytes?: number;
  /** Why chunks are not being stored; reads are right all the same. */
  readonly degraded?: string;
  /** Tags known, their age, and why they are not fresher. */
  readonly tags?: { readonly count: number; readonly ageMs: number; readonly stale?: string };
  /** Chunks that arrived and did not match their digest. */
  readonly corruptChunks: number;
  /** Images whose files were damaged and thrown away at open. */
  readonly droppedImages: number;
  /** Sums over `images`. */
  readonly presentBytes: number;
  readonly fetchedChunks: number;
  readonly fetchedPlainBytes: number;
  readonly fetchedStoredBytes: number;
  readonly refetchedChunks: number;
  readonly missedChunks: number;
  readonly prefetchedChunks: number;
  readonly prefetchedBytes: number;
  readonly prefetchedUsedChunks: number;
  readonly savedChunks: number;
  readonly savedBytes: number;
  readonly evictedChunks: number;
  /** Chunks asked for and not there yet. */
  readonly inFlightChunks: number;
}

export interface StatusParts {
  readonly folder: CacheFolder;
  readonly sourceName: string;
  readonly space: Space;
  readonly catalog: Catalog;
  readonly figures: ReadonlyMap<Digest, ImageFigures>;
  readonly pins: Pins;
  readonly corruptChunks: number;
  readonly droppedImages: number;
  readonly evictedChunks: number;
  readonly inFlightChunks: number;
  readonly open: ReadonlyMap<Digest, { readonly file: ImageFile; readonly references: number }>;
}

export function statusOf(parts: StatusParts): CacheStatus {
  const { space, catalog } = parts;
  const images: CachedImageStatus[] = [];
  for (const { file, references } of parts.open.values()) images.push(ofOpen(parts, file, references));
  for (const local of localImages(parts.folder, catalog, parts.open)) {
    const found = ofClosed(parts, local);
    if (found) images.push(found);
  }
  const sum = (of: (image: CachedImageStatus) => number) =>
    images.reduce((total, image) => total + of(image), 0);
  const tags = catalog.tags();
  return {
    folder: parts.folder.folder,
    source: parts.sourceName,
    images,
    usedBytes: space.usedBytes,
    ...(space.quotaBytes === undefined ? {} : { quotaBytes: space.quotaBytes }),
    ...(space.degraded === undefined ? {} : { degraded: space.degraded }),
    ...(tags === undefined ? {} : { tags }),
    corruptChunks: parts.corruptChunks,
    droppedImages: parts.droppedImages,
    presentBytes: sum((image) => image.presentBytes),
    fetchedChunks: sum((image) => image.fetchedChunks),
    fetchedPlainBytes: sum((image) => image.fetchedPlainBytes),
    fetchedStoredBytes: sum((image) => image.fetchedStoredBytes),
    refetchedChunks: sum((image) => image.refetchedChunks),
    missedChunks: sum((image) => image.missedChunks),
    prefetchedChunks: sum((image) => image.prefetchedChunks),
    prefetchedBytes: sum((image) => image.prefetchedBytes),
    prefetchedUsedChunks: sum((image) => image.prefetchedUsedChunks),
    savedChunks: sum((image) => image.savedChunks),
    savedBytes: sum((image) => image.savedBytes),
    evictedChunks: sum((image) => image.evictedChunks),
    inFlightChunks: parts.inFlightChunks,
  };
}

/** What happened to an image, as its status says it. */
function happened(
  parts: StatusParts,
  digest: Digest,
  figures: ImageFigures | undefined,
  usage: { touchedChunks: number; prefetchedUsedChunks: number },
) {
  const { notes: _, usage: requests, ...counters } = figures ?? newFigures(0);
  const { touchedChunks } = usage;
  return {
    ...counters,
    ...usage,
    ...requests.figures(),
    ...(touchedChunks === 0 ? {} : { hitRate: Math.max(0, 1 - counters.missedChunks / touchedChunks) }),
    pinned: parts.pins.of(digest).map(({ purpose }) => purpose ?? 'all'),
  };
}

function ofOpen(parts: StatusParts, file: ImageFile, references: number): CachedImageStatus {
  return {
    manifest: file.manifestDigest,
    sizeBytes: file.manifest.sizeBytes,
    chunks: file.table.entryCount,
    presentChunks: file.states.presentChunks,
    presentBytes: file.states.presentBytes,
    recordedChunks: file.recordedChunks,
    references,
    ...happened(parts, file.manifestDigest, file.figures, file.states.usage()),
  };
}

interface LocalImage {
  readonly digest: Digest;
  readonly manifest: Manifest;
  readonly table: ChunkTable;
}

/** Images in the folder of which manifest and table are there too; none when the disk cannot be read. */
export function localImages(
  folder: CacheFolder,
  catalog: Catalog,
  except: { has(digest: Digest): boolean } = new Set(),
): LocalImage[] {
  let names: string[];
  try {
    names = readdirSync(folder.path('images')).toSorted();
  } catch {
    return [];
  }
  const found: LocalImage[] = [];
  for (const digest of names) {
    if (!isDigest(digest) || except.has(digest)) continue;
    const manifest = catalog.localManifest(digest);
    const table = manifest && catalog.localTable(manifest.table);
    if (table) found.push({ digest, manifest, table });
  }
  return found;
}

const NOTHING_USED = { touchedChunks: 0, prefetchedUsedChunks: 0 };

/** An image that is not open, from its files alone; undefined when they do not say enough. */
function ofClosed(
  parts: StatusParts,
  { digest, manifest, table }: LocalImage,
): CachedImageStatus | undefined {
  const present = presentIn(parts.folder.path('images', digest), digest, manifest);
  if (!present) return undefined;
  const figures = parts.figures.get(digest);
  return {
    manifest: digest,
    sizeBytes: manifest.sizeBytes,
    chunks: table.entryCount,
    ...present,
    recordedChunks: present.presentChunks,
    references: 0,
    ...happened(parts, digest, figures, figures ? usageOf(figures.notes, table) : NOTHING_USED),
  };
}

function presentIn(
  folder: string,
  digest: Digest,
  manifest: Manifest,
): { presentChunks: number; presentBytes: number } | undefined {
  const count = chunkCountOf(manifest);
  try {
    if (!lstatSync(folder).isDirectory()) return undefined;
    const files = openFiles(folder, {
      manifestDigest: digest,
      sizeBytes: manifest.sizeBytes,
      chunkBytes: manifest.chunkBytes,
      count,
    });
    if (!files) return undefined;
    let presentChunks = 0;
    let presentBytes = 0;
    try {
      scanRecords(files.mapFd, count, (index) => {
        presentChunks++;
        presentBytes += chunkLengthOf(manifest, index);
      });
    } finally {
      closeFiles(files);
    }
    return { presentChunks, presentBytes };
  } catch {
    // Damaged: the next open says so and drops it.
    return undefined;
  }
}
