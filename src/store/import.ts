/**
 * Import: a file becomes a manifest, a chunk table and those chunks that the store does not have yet.
 *
 *   source (raw; others through qemu-img into a sparse temp file)
 *     → runs of data (SEEK_DATA/SEEK_HOLE; holes are never read) → units of whole chunks
 *     → lanes: pread, all zero?, SHA-256, already there?, zstd, temp file
 *     → flush per batch: syncfs, rename (meanwhile the lanes work on the next one)
 *     → syncfs → rename of the rest, the tables, the manifests → syncfs → tag
 *
 * A chunk that was found in the store may be garbage that a collection takes meanwhile (gc.ts): then the manifest is
 * not published, and another pass packs what is gone.
 *
 * Memory is bounded by the lanes' buffers plus about 150 bytes per nonzero chunk. Whatever fails or is cancelled
 * leaves no tag, no temp file, and of chunks only whole ones, which the next import of the same image finds.
 */
import { closeSync, fstatSync, openSync } from 'node:fs';
import type { Stats } from 'node:fs';
import path from 'node:path';
import { encodeChunkTable } from '../core/chunk-table.ts';
import { compress } from '../core/chunk.ts';
import type { Digest } from '../core/bytes.ts';
import { asGridError, GridError } from '../core/errors.ts';
import {
  CHUNK_BYTES_DEFAULT,
  CHUNK_BYTES_MAX,
  CHUNK_BYTES_MIN,
  IMAGE_BYTES_MAX,
  MIB,
  PARTS_MAX,
} from '../core/limits.ts';
import { nextData } from '../core/linux.ts';
import { encodeManifest, isName, MANIFEST_KINDS, parseManifest, parseReference } from '../core/manifest.ts';
import type { Manifest, ManifestKind, Tag } from '../core/manifest.ts';
import { convertToRaw, detectFormat, IMAGE_FORMATS } from './formats.ts';
import type { ImageFormat } from './formats.ts';
import { Batches } from './batches.ts';
import type { PackedChunk, PackJob } from './jobs.ts';
import { Lanes } from './lanes.ts';
import { checkLabels } from './new-version.ts';
import type { Store } from './store.ts';
import { Writer } from './writer.ts';

/** A unit of work of a lane: about 15 ms of one processor, so that a cancel is felt at once. */
const UNIT_BYTES = 4 * MIB;
/** Below this much data the start of threads takes longer than the work. */
const INLINE_BYTES_MAX = 8 * MIB;
const SECTOR_BYTES = 512;
/** What a garbage collection took from under an import is stored by the next pass and then stays; what that pass
 * finds is renewed and stays too, but for one that is being removed at that very moment. So the second pass
 * succeeds; the others are for such moments and a clock that jumps. */
const PASSES_MAX = 4;

export interface ImportPart {
  /** The name that the mount shows, e.g. `kernel`. */
  readonly name: string;
  readonly kind: ManifestKind;
  readonly path: string;
}

export interface ImportOptions {
  readonly path: string;
  /** `name:version` to point at the result. */
  readonly reference: string;
  readonly kind?: ManifestKind;
  /** 'auto' tells the format by the first bytes. */
  readonly format?: ImageFormat | 'auto';
  readonly chunkBytes?: number;
  readonly labels?: Readonly<Record<string, string>>;
  /** Other files of the same version; always raw. */
  readonly parts?: readonly ImportPart[];
  /** The manifest this version was made from; must be in the store. */
  readonly parent?: Digest;
  /** 'unpack' (what is not raw) and then 'pack'. Bytes done of all there are; when packing, of data, not of holes. */
  readonly onProgress?: (doneBytes: number, totalBytes: number, phase: 'unpack' | 'pack') => void;
  readonly signal?: AbortSignal;
}

export interface ImportResult {
  readonly manifest: Manifest;
  readonly digest: Digest;
  readonly tag: Tag;
  /** Of the image; the counts below are of the image and its parts together. */
  readonly sizeBytes: number;
  /** Plain bytes in chunks that are not all zero. */
  readonly nonzeroBytes: number;
  /** Chunks that are not all zero. */
  readonly chunks: number;
  /** Of those, what the store did not have. */
  readonly newChunks: number;
  readonly newStoredBytes: number;
}

interface SourceFile {
  readonly path: string;
  readonly kind: ManifestKind;
  fd: number;
  /** As it was when it was opened: a source that changes meanwhile is refused. */
  stats: Stats;
}

/**
 * Imports an image and its parts and points `reference` at it, durable when it resolves.
 *
 * Throws bad-request (options, a size that no disk has, a source that refers to other files or changed
 * meanwhile), not-found (source, parent), bad-format (damaged source), unsupported (no qemu-img), no-space,
 * local-io, closed (cancelled).
 */
export async function importImage(store: Store, options: ImportOptions): Promise<ImportResult> {
  const run = new ImportRun(store, await checkedOptions(store, options));
  return run.run();
}

type CheckedOptions = ImportOptions & { readonly kind: ManifestKind; readonly chunkBytes: number };

async function checkedOptions(store: Store, options: ImportOptions): Promise<CheckedOptions> {
  const bad = (message: string) => new GridError('bad-request', message);
  parseReference(options.reference);
  const {
    kind = 'disk',
    chunkBytes = CHUNK_BYTES_DEFAULT,
    format = 'auto',
    labels = {},
    parts = [],
  } = options;
  for (const one of [kind, ...parts.map((part) => part.kind)]) {
    if (!MANIFEST_KINDS.includes(one)) throw bad(`'${one}' is not one of ${MANIFEST_KINDS.join(', ')}`);
  }
  if (format !== 'auto' && !IMAGE_FORMATS.includes(format)) {
    throw bad(`'${format as string}' is not one of the image formats ${IMAGE_FORMATS.join(', ')}`);
  }
  if (
    !Number.isSafeInteger(chunkBytes) ||
    chunkBytes % CHUNK_BYTES_MIN !== 0 ||
    chunkBytes < CHUNK_BYTES_MIN ||
    chunkBytes > CHUNK_BYTES_MAX
  ) {
    throw bad(
      `a chunk of ${chunkBytes} bytes: it must be a multiple of ${CHUNK_BYTES_MIN} up to ${CHUNK_BYTES_MAX}`,
    );
  }
  checkLabels(labels);
  if (parts.length > PARTS_MAX) throw bad(`more than ${PARTS_MAX} parts`);
  for (const { name } of parts as readonly { name: string }[]) {
    if (!isName(name))
      throw bad(`'${String(name)}' is not a name for a part: lower-case letters, digits, '.', '-', '_'`);
    if (parts.filter((part) => part.name === name).length > 1) throw bad(`two parts are named '${name}'`);
  }
  if (options.parent !== undefined) {
    parseManifest(await store.readManifest(options.parent), options.parent);
  }
  return { ...options, kind, chunkBytes };
}

const renewing = (job: PackJob): PackJob => ({ ...job, renew: true });

class ImportRun {
  readonly #store: Store;
  readonly #options: CheckedOptions;
  readonly #sources: SourceFile[] = [];
  #writer: Writer | undefined;
  #lanes: Lanes | undefined;
  #doneBytes = 0;
  #totalBytes = 0;
  #chunks = 0;
  #nonzeroBytes = 0;
  #newChunks = 0;
  #newStoredBytes = 0;
  #batches: Batches | undefined;
  /** Tables and manifests, by digest (two parts may be the same file), for the last flush. */
  readonly #described = new Map<Digest, { kind: 'tables' | 'manifests'; digest: Digest }>();

  /** Chunks of the image and its parts. */
  readonly #used = new Set<Digest>();

  constructor(store: Store, options: CheckedOptions) {
    this.#store = store;
    this.#options = options;
  }

  async run(): Promise<ImportResult> {
    const { kind, parts = [], labels = {}, parent } = this.#options;
    try {
      const image = this.#open(this.#options.path, kind);
      const partFiles = parts.map((part) => ({ name: part.name, file: this.#open(part.path, part.kind) }));
      this.#checkAborted();
      this.#writer = await Writer.begin(this.#store.layout);
      this.#batches = new Batches(this.#writer);
      await this.#convert(image);
      let units = new Map(this.#sources.map((source) => [source, this.#unitsOf(source)]));
      for (const jobs of units.values()) for (const job of jobs) this.#totalBytes += job.lengthBytes;
      this.#lanes = new Lanes(this.#totalBytes > INLINE_BYTES_MAX);

      const created = new Date().toISOString();
      for (let pass = 1; ; pass++) {
        this.#doneBytes = this.#chunks = this.#nonzeroBytes = 0;
        this.#described.clear();
        this.#used.clear();
        const partDigests: Record<string, Digest> = {};
        for (const { name, file } of partFiles) {
          const manifest = await this.#pack(file, units.get(file)!, { labels: {}, parts: {}, created });
          partDigests[name] = this.#putManifest(manifest);
        }
        const manifest = await this.#pack(image, units.get(image)!, {
          labels,
          parts: partDigests,
          created,
          ...(parent === undefined ? {} : { parent }),
        });
        const digest = this.#putManifest(manifest);
        await this.#batches.settle();
        if (await this.#writer.publish(this.#batches.take(), [...this.#described.values()], this.#used))
          return await this.#finish(manifest, digest);
        if (pass === PASSES_MAX) {
          throw new GridError(
            'in-use',
            `garbage collections of the store ${this.#store.name} removed what the import of ${this.#options.path} had found there, ${pass} times: import it when none runs`,
          );
        }
        units = new Map([...units].map(([source, jobs]) => [source, jobs.map(renewing)]));
      }
    } catch (error) {
      // Whatever stopped first: what the caller did is the reason.
      this.#checkAborted();
      throw error;
    } finally {
      // A flush that is under way still renames files of the folder that goes away below.
      await this.#batches?.settle().catch(() => {});
      await this.#lanes?.close();
      for (const { fd } of this.#sources) closeSync(fd);
      this.#writer?.end();
    }
  }

  async #finish(manifest: Manifest, digest: Digest): Promise<ImportResult> {
    await this.#writer!.sync();
    this.#checkAborted();
    const { name, version } = parseReference(this.#options.reference);
    const tag = await this.#store.setTag(name, version, digest);
    return {
      manifest,
      digest,
      tag,
      sizeBytes: manifest.sizeBytes,
      nonzeroBytes: this.#nonzeroBytes,
      chunks: this.#chunks,
      newChunks: this.#newChunks,
      newStoredBytes: this.#newStoredBytes,
    };
  }

  #checkAborted(): void {
    if (this.#options.signal?.aborted) {
      throw new GridError('closed', `the import of ${this.#options.path} was cancelled`);
    }
  }

  #open(file: string, kind: ManifestKind): SourceFile {
    let fd: number;
    try {
      fd = openSync(file, 'r');
    } catch (error) {
      throw asGridError(error, `cannot read ${file}`);
    }
    const stats = fstatSync(fd);
    const source: SourceFile = { path: path.resolve(file), kind, fd, stats };
    this.#sources.push(source);
    if (!stats.isFile()) throw new GridError('bad-request', `${file} is not a regular file`);
    return source;
  }

  /** Replaces the source's descriptor by one of a raw file where it is of another format. */
  async #convert(source: SourceFile): Promise<void> {
    const { format = 'auto', signal, onProgress } = this.#options;
    const found = format === 'auto' ? detectFormat(source.fd, source.path, source.kind) : format;
    if (found === 'raw') return;
    const raw = path.join(this.#writer!.folder, 'raw');
    await convertToRaw(source, found, raw, { signal, onProgress });
    this.#checkUnchanged(source);
    const fd = openSync(raw, 'r');
    closeSync(source.fd);
    source.fd = fd;
    source.stats = fstatSync(fd);
  }

  /** The source's data as jobs of whole chunks, in order. */
  #unitsOf({ path: file, kind, fd, stats }: SourceFile): PackJob[] {
    const sizeBytes = stats.size;
    if (sizeBytes > IMAGE_BYTES_MAX) {
      throw new GridError('bad-request', `${file} has ${sizeBytes} bytes, more than ${IMAGE_BYTES_MAX}`);
    }
    if (kind === 'disk' && (sizeBytes === 0 || sizeBytes % SECTOR_BYTES !== 0)) {
      throw new GridError(
        'bad-request',
        sizeBytes === 0
          ? `${file} is empty, so it is no disk`
          : `${file} has ${sizeBytes} bytes, which is not a whole number of sectors: it may be cut short; ` +
              `what is not a disk is imported as kind data`,
      );
    }
    const { chunkBytes } = this.#options;
    const unitChunks = Math.max(1, Math.floor(UNIT_BYTES / chunkBytes));
    const units: PackJob[] = [];
    let chunk = 0;
    for (let data = nextData(fd, 0); data; data = nextData(fd, data.end)) {
      const end = Math.min(data.end, sizeBytes);
      chunk = Math.max(chunk, Math.floor(data.start / chunkBytes));
      const endChunk = Math.ceil(end / chunkBytes);
      while (chunk < endChunk) {
        const chunks = Math.min(unitChunks, endChunk - chunk);
        units.push({
          type: 'pack',
          fd,
          path: file,
          storeFolder: this.#store.layout.folder,
          writerFolder: this.#writer!.folder,
          chunkBytes,
          firstChunk: chunk,
          lengthBytes: Math.min(chunks * chunkBytes, sizeBytes - chunk * chunkBytes),
        });
        chunk += chunks;
      }
    }
    return units;
  }

  async #pack(
    source: SourceFile,
    units: readonly PackJob[],
    description: Pick<Manifest, 'labels' | 'parts' | 'parent' | 'created'>,
  ): Promise<Manifest> {
    const sizeBytes = source.stats.size;
    const { chunkBytes, onProgress, signal } = this.#options;
    const packed: PackedChunk[][] = [];
    await this.#lanes!.runAll(units, signal, async (chunks, unit) => {
      packed.push(chunks);
      this.#doneBytes += unit.lengthBytes;
      for (const { storedBytes, isNew } of chunks) {
        if (!isNew) continue;
        this.#newChunks++;
        this.#newStoredBytes += storedBytes;
      }
      onProgress?.(this.#doneBytes, this.#totalBytes, 'pack');
      await this.#batches!.add(chunks);
    });
    this.#checkUnchanged(source);
    const chunks = packed.flat().toSorted((a, b) => a.index - b.index);
    const table = encodeChunkTable(chunkBytes, Math.ceil(sizeBytes / chunkBytes), chunks);
    this.#writer!.put('tables', table.digest, compress(table.bytes));
    this.#described.set(table.digest, { kind: 'tables', digest: table.digest });
    let nonzeroBytes = 0;
    for (const { index, digest } of chunks) {
      nonzeroBytes += Math.min(chunkBytes, sizeBytes - index * chunkBytes);
      this.#used.add(digest);
    }
    this.#chunks += chunks.length;
    this.#nonzeroBytes += nonzeroBytes;
    return {
      schema: 1,
      kind: source.kind,
      sizeBytes,
      chunkBytes,
      table: table.digest,
      nonzeroBytes,
      ...description,
    };
  }

  #checkUnchanged({ path: file, fd, stats }: SourceFile): void {
    const now = fstatSync(fd);
    if (now.size !== stats.size || now.mtimeMs !== stats.mtimeMs) {
      throw new GridError(
        'bad-request',
        `${file} changed while it was read: import it when nothing writes to it`,
      );
    }
  }

  #putManifest(manifest: Manifest): Digest {
    const { bytes, digest } = encodeManifest(manifest);
    this.#writer!.put('manifests', digest, bytes);
    this.#described.set(digest, { kind: 'manifests', digest });
    return digest;
  }
}
