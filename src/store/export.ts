/**
 * Export: an image of the store becomes a file again, raw (sparse: chunks of zeros are holes) or qcow2.
 *
 * Every chunk is checked against its digest before it is written. The file appears whole and durable under its name,
 * or not at all: it is made beside its place under a temporary name, which goes away when the export fails or is
 * cancelled.
 */
import { randomBytes } from 'node:crypto';
import {
  closeSync,
  fsync,
  ftruncateSync,
  linkSync,
  openSync,
  renameSync,
  statSync,
  unlinkSync,
} from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import { ChunkTable } from '../core/chunk-table.ts';
import type { Digest } from '../core/bytes.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import { chunkCountOf, chunkLengthOf, parseManifest } from '../core/manifest.ts';
import type { Manifest } from '../core/manifest.ts';
import type { UnpackJob } from './jobs.ts';
import { Lanes } from './lanes.ts';
import { syncFolder } from './layout.ts';
import { firstLine, runQemuImg, shareDone } from './qemu-img.ts';
import type { Store } from './store.ts';

const syncFile = promisify(fsync);

export const EXPORT_FORMATS = ['raw', 'qcow2'] as const;
export type ExportFormat = (typeof EXPORT_FORMATS)[number];

/** A unit of work of a lane: about 10 ms of one processor. */
const UNIT_BYTES = 4 * MIB;
/** Below this much data the start of threads takes longer than the work. */
const INLINE_BYTES_MAX = 8 * MIB;
const SECTOR_BYTES = 512;

export interface ExportOptions {
  /** Digest of the manifest: of an image, or of a part of one. */
  readonly manifest: Digest;
  /** Where to. */
  readonly path: string;
  readonly format?: ExportFormat;
  /** Replace a file that is there. */
  readonly force?: boolean;
  /** 'unpack', and then 'convert' for what is not raw. Bytes done of all there are; unpacking, of data, not of holes. */
  readonly onProgress?: (doneBytes: number, totalBytes: number, phase: 'unpack' | 'convert') => void;
  readonly signal?: AbortSignal;
}

export interface ExportResult {
  readonly manifest: Digest;
  readonly path: string;
  readonly format: ExportFormat;
  /** As a guest sees it. */
  readonly sizeBytes: number;
  /** What was written of it; the rest is holes. */
  readonly nonzeroBytes: number;
}

/**
 * Throws bad-request (options, a place that is no file), exists (without `force`), not-found (manifest, chunk,
 * folder), corrupt, bad-format, unsupported (no qemu-img), no-space, local-io, closed (cancelled).
 */
export async function exportImage(store: Store, options: ExportOptions): Promise<ExportResult> {
  const { format = 'raw', force = false } = options;
  if (!EXPORT_FORMATS.includes(format)) {
    throw new GridError('bad-request', `'${format as string}' is not one of ${EXPORT_FORMATS.join(', ')}`);
  }
  const file = path.resolve(options.path);
  checkPlace(file, force);
  const manifest = parseManifest(await store.readManifest(options.manifest), options.manifest);
  if (format !== 'raw' && (manifest.sizeBytes === 0 || manifest.sizeBytes % SECTOR_BYTES !== 0)) {
    throw new GridError(
      'bad-request',
      `${manifest.sizeBytes} bytes are not a whole number of sectors, as ${format} needs: export it as raw`,
    );
  }
  const table = ChunkTable.parse(await store.readTable(manifest.table), manifest.table);
  if (table.chunkBytes !== manifest.chunkBytes || table.count !== chunkCountOf(manifest)) {
    throw new GridError(
      'bad-format',
      `chunk table ${manifest.table} does not fit manifest ${options.manifest}`,
    );
  }
  const temporary = (what: string) =>
    path.join(
      path.dirname(file),
      `.${path.basename(file).slice(0, 100)}.${what}-${randomBytes(6).toString('hex')}`,
    );
  const raw = temporary('raw');
  const converted = temporary(format);
  try {
    await unpack(store, manifest, table, raw, options);
    if (format !== 'raw') await convert(raw, converted, manifest.sizeBytes, options);
    if (options.signal?.aborted) throw cancelled(options);
    appear(format === 'raw' ? raw : converted, file, force);
  } catch (error) {
    if (options.signal?.aborted) throw cancelled(options);
    throw asGridError(error, `cannot write ${file}`);
  } finally {
    for (const one of [raw, converted]) discard(one);
  }
  return {
    manifest: options.manifest,
    path: file,
    format,
    sizeBytes: manifest.sizeBytes,
    nonzeroBytes: manifest.nonzeroBytes,
  };
}

/** Whatever kept the export from making it keeps it from being there. */
function discard(temporary: string): void {
  try {
    unlinkSync(temporary);
  } catch (error) {
    if (!['ENOENT', 'ENOTDIR'].includes(errnoOf(error) ?? '')) {
      throw asGridError(error, `cannot remove the unfinished file ${temporary}`);
    }
  }
}

function cancelled({ path: file }: ExportOptions): GridError {
  return new GridError('closed', `the export to ${file} was cancelled`);
}

/** At the door, before anything is read; `appear` looks again. */
function checkPlace(file: string, force: boolean): void {
  try {
    const stats = statSync(file, { throwIfNoEntry: false });
    if (!stats) return;
    if (!stats.isFile()) throw new GridError('bad-request', `${file} is there and not a regular file`);
    if (!force) throw isThere(file);
  } catch (error) {
    throw asGridError(error, `cannot write ${file}`);
  }
}

function isThere(file: string): GridError {
  return new GridError('exists', `${file} is there already: name another file, or replace it with --force`);
}

async function unpack(
  store: Store,
  manifest: Manifest,
  table: ChunkTable,
  raw: string,
  { onProgress, signal }: ExportOptions,
): Promise<void> {
  const fd = openSync(raw, 'wx', 0o666);
  const lanes = new Lanes(manifest.nonzeroBytes > INLINE_BYTES_MAX);
  let doneBytes = 0;
  try {
    ftruncateSync(fd, manifest.sizeBytes);
    await lanes.runAll(jobsOf(store, manifest, table, { fd, path: raw }), signal, (_, { chunks }) => {
      for (const { plainBytes } of chunks) doneBytes += plainBytes;
      onProgress?.(doneBytes, manifest.nonzeroBytes, 'unpack');
    });
    await syncFile(fd);
  } finally {
    await lanes.close();
    closeSync(fd);
  }
}

function* jobsOf(
  store: Store,
  manifest: Manifest,
  table: ChunkTable,
  target: { fd: number; path: string },
): Generator<UnpackJob> {
  const storeFolder = store.layout.folder;
  let chunks: UnpackJob['chunks'][number][] = [];
  let bytes = 0;
  for (const { index, digest, patch } of table.entries()) {
    const plainBytes = chunkLengthOf(manifest, index);
    const offsetBytes = index * manifest.chunkBytes;
    chunks.push(
      patch
        ? { digest: patch.base.digest, offsetBytes, plainBytes, patch }
        : { digest, offsetBytes, plainBytes },
    );
    bytes += plainBytes;
    if (bytes < UNIT_BYTES) continue;
    yield { type: 'unpack', storeFolder, ...target, chunks };
    chunks = [];
    bytes = 0;
  }
  if (chunks.length > 0) yield { type: 'unpack', storeFolder, ...target, chunks };
}

async function convert(
  raw: string,
  converted: string,
  sizeBytes: number,
  { path: file, onProgress, signal }: ExportOptions,
): Promise<void> {
  const args = ['convert', '-p', '-f', 'raw', '-O', 'qcow2', raw, converted];
  const result = await runQemuImg(args, `the export to ${file}`, signal, (piece) => {
    const share = shareDone(piece);
    if (share !== undefined) onProgress?.(Math.round(sizeBytes * share), sizeBytes, 'convert');
  });
  if (result.code !== 0) {
    const code = result.stderr.includes('No space left') ? 'no-space' : 'local-io';
    throw new GridError(code, `qemu-img cannot write ${file}: ${result.killedBy ?? firstLine(result)}`);
  }
  const fd = openSync(converted, 'r');
  try {
    await syncFile(fd);
  } finally {
    closeSync(fd);
  }
}

/** Gives the finished file its name; without `force` never that of a file which came meanwhile. */
function appear(temporary: string, file: string, force: boolean): void {
  if (force) {
    renameSync(temporary, file);
  } else {
    try {
      linkSync(temporary, file);
      unlinkSync(temporary);
    } catch (error) {
      if (errnoOf(error) === 'EEXIST') throw isThere(file);
      // A file system without hard links.
      if (!['EPERM', 'ENOTSUP', 'ENOSYS'].includes(errnoOf(error) ?? '')) throw error;
      checkPlace(file, force);
      renameSync(temporary, file);
    }
  }
  syncFolder(path.dirname(file));
}
