/**
 * A clone as one file that another host can take: a tar (ustar, sizes above 8 GiB in GNU's binary form) with exactly these
 * entries in this order. A chain of layers travels as the one layer that it amounts to.
 *
 * Invariants: every entry is padded to a multiple of 512 bytes, so that no byte of the file is outside of what is
 * checked (contents by their digests, headers by the tar's own sums). Lengths follow from clone.json and are
 * checked before anything is written. Nothing of an archive becomes the name of a file.
 *
 *   clone.json   JSON, padded with spaces: ArchiveInfo below
 *   runs         12 bytes per run, rising and apart: { u32 first block, u32 blocks, u32 state: 1 data, 2 zero };
 *                zeros at the end
 *   data         the data runs' blocks, 4096 bytes each, one after another; a short last one ends in zeros
 *   sha256.json  JSON, padded with spaces: the digest of each entry above, by name
 */
import { createReadStream, createWriteStream } from 'node:fs';
import { link, open, rm } from 'node:fs/promises';
import { pipeline } from 'node:stream/promises';
import tar from 'tar-stream';
import type { Digest } from '../core/bytes.ts';
import { isAllZero, isDigest, sha256, sha256Stream } from '../core/bytes.ts';
import { asGridError, GridError } from '../core/errors.ts';
import { IMAGE_BYTES_MAX, LABEL_LENGTH_MAX, LABELS_MAX, LAYER_BLOCK_BYTES, MIB } from '../core/limits.ts';
import { isName } from '../core/manifest.ts';
import { changedRuns } from './changes.ts';
import type { ChangeRun } from './changes.ts';
import type { Clone } from './clone.ts';
import { blockCountOf } from './layer-format.ts';

/** What clone.json says. */
export interface ArchiveInfo {
  readonly format: 'gridvfs-clone';
  readonly schema: 1;
  /** The clone's name where it came from. */
  readonly id: string;
  /** For people: the reference of the base where it came from. */
  readonly image: string;
  /** Manifest digest of the base. */
  readonly base: Digest;
  /** Whether the disk needs nothing of the base: what no run names is zeros. */
  readonly standalone: boolean;
  readonly sizeBytes: number;
  readonly runs: number;
  readonly dataBlocks: number;
  /** Labels of the base that say how its machine is made. */
  readonly machine: Readonly<Record<string, string>>;
  readonly created: string;
}

const NAMES = ['clone.json', 'runs', 'data', 'sha256.json'] as const;
type EntryName = (typeof NAMES)[number];

const PAD = 512;
const RUN_BYTES = 12;
const STATE_DATA = 1;
const STATE_ZERO = 2;
const JSON_BYTES_MAX = 1 * MIB;
/** 22 million runs: more than a disk of 85 GiB has when every other block is another. They are held in memory. */
const RUNS_BYTES_MAX = 256 * MIB;
/** Where a tar header has its sum: 8 bytes. */
const SUM_AT = 148;
/** Two blocks of zeros end a tar; other programs fill up to 10 KiB. */
const END_BYTES_MAX = 20 * PAD;
const PIECE_BYTES = 1 * MIB;

const padded = (bytes: number) => Math.ceil(bytes / PAD) * PAD;

function paddedJson(value: unknown): Buffer {
  const text = Buffer.from(JSON.stringify(value));
  return Buffer.concat([text, Buffer.alloc(padded(text.length) - text.length, ' ')]);
}

/** Hears how far it is, in bytes of data, and may end it with `closed`. */
export interface ArchiveWatch {
  readonly onProgress?: (doneBytes: number, totalBytes: number) => void;
  readonly signal?: AbortSignal;
}

function checkCancelled({ signal }: ArchiveWatch, file: string): void {
  if (signal?.aborted) throw new GridError('closed', `the work on ${file} was cancelled`);
}

/**
 * Writes the clone to `file`, which must not exist; nobody writes to the clone meanwhile. Durable when it resolves;
 * a failure leaves nothing. Throws exists, no-space, and what reads of the clone throw.
 */
export async function exportArchive(
  file: string,
  clone: Clone,
  about: Pick<ArchiveInfo, 'id' | 'image' | 'base' | 'standalone' | 'machine'>,
  watch: ArchiveWatch = {},
): Promise<ArchiveInfo> {
  const runs = [...changedRuns(clone)].filter(({ zero }) => !(zero && about.standalone));
  const info: ArchiveInfo = {
    format: 'gridvfs-clone',
    schema: 1,
    ...about,
    sizeBytes: clone.sizeBytes,
    runs: runs.length,
    dataBlocks: runs.reduce((sum, { zero, count }) => sum + (zero ? 0 : count), 0),
    created: new Date().toISOString(),
  };
  if (runs.length * RUN_BYTES > RUNS_BYTES_MAX) {
    throw new GridError(
      'unsupported',
      `clone '${about.id}' is in ${runs.length} pieces, too many for an archive; commit it instead`,
    );
  }
  const partial = `${file}.partial`;
  const pack = tar.pack();
  const look = { check: () => checkCancelled(watch, file), told: watch.onProgress ?? (() => {}) };
  const feeding = feed(pack, info, runs, clone, look).then(
    () => pack.finalize(),
    (error: unknown) => pack.destroy(error instanceof Error ? error : new Error(String(error))),
  );
  try {
    await pipeline(pack, createWriteStream(partial, { flags: 'wx', mode: 0o600, flush: true }));
    await feeding;
    // Unlike rename(2), link(2) refuses a name that is there.
    await link(partial, file);
    return info;
  } catch (error) {
    throw asGridError(error, `cannot export clone '${about.id}' to ${file}`);
  } finally {
    await rm(partial, { force: true });
  }
}

async function feed(
  pack: tar.Pack,
  info: ArchiveInfo,
  runs: readonly ChangeRun[],
  clone: Clone,
  look: { check(): void; told(doneBytes: number, totalBytes: number): void },
): Promise<void> {
  const digests: Record<string, Digest> = {};
  const put = (name: EntryName, bytes: Buffer) => {
    digests[name] = sha256(bytes);
    return new Promise<void>((resolve, reject) => {
      pack.entry({ name, mode: 0o600 }, bytes, (error) => (error ? reject(error) : resolve()));
    });
  };
  await put('clone.json', paddedJson(info));
  const table = Buffer.alloc(padded(runs.length * RUN_BYTES));
  for (const [i, { first, count, zero }] of runs.entries()) {
    table.writeUInt32LE(first, i * RUN_BYTES);
    table.writeUInt32LE(count, i * RUN_BYTES + 4);
    table.writeUInt32LE(zero ? STATE_ZERO : STATE_DATA, i * RUN_BYTES + 8);
  }
  await put('runs', table);

  const digest = sha256Stream();
  const ended = Promise.withResolvers<void>();
  const entry = pack.entry(
    { name: 'data', mode: 0o600, size: info.dataBlocks * LAYER_BLOCK_BYTES },
    (error) => (error ? ended.reject(error) : ended.resolve()),
  );
  // A pack that is destroyed says so here too, and nobody else listens: the failure itself is thrown below.
  entry.on('error', () => {});
  ended.promise.catch(() => {});
  let doneBytes = 0;
  for (const { first, count, zero } of runs) {
    if (zero) continue;
    look.check();
    const end = (first + count) * LAYER_BLOCK_BYTES;
    for (let at = first * LAYER_BLOCK_BYTES; at < end; at += PIECE_BYTES) {
      const piece = Buffer.alloc(Math.min(PIECE_BYTES, end - at));
      await clone.read(piece.subarray(0, Math.min(piece.length, clone.sizeBytes - at)), at);
      digest.update(piece);
      if (!entry.write(piece)) await Promise.race([once(entry, 'drain'), ended.promise]);
      look.told((doneBytes += piece.length), info.dataBlocks * LAYER_BLOCK_BYTES);
      look.check();
    }
  }
  entry.end(Buffer.alloc(0));
  await ended.promise;
  digests['data'] = digest.digest();
  await put('sha256.json', paddedJson(digests));
}

function once(stream: { once(event: string, listener: () => void): unknown }, event: string): Promise<void> {
  return new Promise((resolve) => stream.once(event, resolve));
}

/** Where an archive's content goes; nothing is called before its lengths were checked. */
export interface ArchiveTarget {
  write(bytes: Uint8Array, offsetBytes: number): Promise<void>;
  /** These blocks read as zeros. */
  zero(firstBlock: number, count: number): Promise<void>;
}

/** What the archive says of itself; its content is not checked yet. Throws bad-format, newer-format, not-found. */
export async function readArchiveInfo(file: string): Promise<ArchiveInfo> {
  try {
    return await infoOf(file);
  } catch (error) {
    throw asGridError(error, `cannot read the archive ${file}`, 'bad-format');
  }
}

async function infoOf(file: string): Promise<ArchiveInfo> {
  for await (const { name, stream, bytes } of entriesOf(file)) {
    if (name === 'clone.json') return parseInfo(await collect(stream, bytes, JSON_BYTES_MAX, file), file);
  }
  throw damaged(file, 'it is empty');
}

/** Puts the archive's content into `target`. Resolved means that every byte was what its digest says; when it
 * throws (bad-format, corrupt, what `target` throws), what it has written is worth nothing. */
export async function readArchive(
  file: string,
  target: ArchiveTarget,
  watch: ArchiveWatch = {},
): Promise<void> {
  try {
    await copyOut(file, target, watch);
  } catch (error) {
    throw asGridError(error, `cannot read the archive ${file}`, 'bad-format');
  }
}

async function copyOut(file: string, target: ArchiveTarget, watch: ArchiveWatch): Promise<void> {
  const found: Record<string, Digest> = {};
  let info: ArchiveInfo | undefined;
  let runs: ChangeRun[] = [];
  let complete = false;
  const lengths: number[] = [];
  for await (const { name, stream, bytes } of entriesOf(file)) {
    lengths.push(bytes);
    if (name === 'clone.json') {
      const content = await collect(stream, bytes, JSON_BYTES_MAX, file);
      info = parseInfo(content, file);
      found[name] = sha256(content);
    } else if (name === 'runs') {
      if (bytes !== padded(info!.runs * RUN_BYTES))
        throw damaged(file, 'its runs are not as many as it says');
      const content = await collect(stream, bytes, RUNS_BYTES_MAX, file);
      runs = parseRuns(content, info!, file);
      found[name] = sha256(content);
    } else if (name === 'data') {
      if (bytes !== info!.dataBlocks * LAYER_BLOCK_BYTES)
        throw damaged(file, 'its data is not as long as it says');
      for (const { first, count, zero } of runs) if (zero) await target.zero(first, count);
      let doneBytes = 0;
      const watched: ArchiveTarget = {
        zero: (first, count) => target.zero(first, count),
        async write(bytes, offsetBytes) {
          checkCancelled(watch, file);
          await target.write(bytes, offsetBytes);
          watch.onProgress?.((doneBytes += bytes.length), info!.dataBlocks * LAYER_BLOCK_BYTES);
        },
      };
      found[name] = await copyData(stream, runs, info!, watched, file);
    } else {
      const digests = parseJson(await collect(stream, bytes, JSON_BYTES_MAX, file), file);
      for (const [entry, digest] of Object.entries(found)) {
        if (digests[entry] === digest) continue;
        throw new GridError(
          'corrupt',
          `${file} is damaged: its ${entry} does not match its digest; export the clone again`,
        );
      }
      complete = true;
    }
  }
  if (!complete) throw damaged(file, 'it is cut short');
  await checkFrame(file, lengths);
}

/** What a tar reader passes over: how the sums of the headers are written, and the zeros at the end. */
async function checkFrame(file: string, lengths: readonly number[]): Promise<void> {
  const handle = await open(file, 'r');
  try {
    const header = Buffer.alloc(PAD);
    let at = 0;
    for (const length of lengths) {
      await handle.read(header, 0, PAD, at);
      let sum = 8 * 32;
      for (const [i, byte] of header.entries()) if (i < SUM_AT || i >= SUM_AT + 8) sum += byte;
      if (header.toString('latin1', SUM_AT, SUM_AT + 8) !== `${sum.toString(8).padStart(6, '0')} \0`) {
        throw damaged(file, `the header at ${at} is damaged`);
      }
      at += PAD + padded(length);
    }
    const rest = Buffer.alloc(END_BYTES_MAX);
    const { bytesRead } = await handle.read(rest, 0, rest.length, at);
    if (bytesRead < 2 * PAD || !isAllZero(rest.subarray(0, bytesRead))) {
      throw damaged(file, 'something follows where its end should be');
    }
  } finally {
    await handle.close();
  }
}

async function copyData(
  stream: AsyncIterable<Buffer>,
  runs: readonly ChangeRun[],
  info: ArchiveInfo,
  target: ArchiveTarget,
  file: string,
): Promise<Digest> {
  const digest = sha256Stream();
  const dataRuns = runs.filter(({ zero }) => !zero).values();
  let at = 0;
  let left = 0;
  const piece = Buffer.allocUnsafeSlow(PIECE_BYTES);
  let filled = 0;
  const emit = async () => {
    const inDisk = Math.min(filled, info.sizeBytes - at);
    if (piece.subarray(inDisk, filled).some((byte) => byte !== 0))
      throw damaged(file, 'its last block is too long');
    await target.write(piece.subarray(0, inDisk), at);
    at += filled;
    left -= filled;
    filled = 0;
  };
  for await (const part of stream) {
    digest.update(part);
    for (let from = 0; from < part.length;) {
      if (left === 0) {
        const { first, count } = dataRuns.next().value!;
        at = first * LAYER_BLOCK_BYTES;
        left = count * LAYER_BLOCK_BYTES;
      }
      const take = Math.min(part.length - from, piece.length - filled, left - filled);
      part.copy(piece, filled, from, from + take);
      from += take;
      filled += take;
      if (filled === piece.length || filled === left) await emit();
    }
  }
  return digest.digest();
}

interface Entry {
  readonly name: EntryName;
  readonly bytes: number;
  readonly stream: AsyncIterable<Buffer>;
}

/** The entries, which must be plain files with the names that there are, in their order. */
async function* entriesOf(file: string): AsyncGenerator<Entry> {
  const extract = tar.extract();
  const input = createReadStream(file);
  const reading = pipeline(input, extract);
  reading.catch(() => {}); // the loop below meets it
  let next = 0;
  try {
    for await (const entry of extract) {
      const { name, type, size, pax } = entry.header;
      if (type !== 'file' || name !== NAMES[next] || pax) {
        throw damaged(
          file,
          `it has ${JSON.stringify(name.slice(0, 100))} (${type}) where ${NAMES[next] ?? 'its end'} should be`,
        );
      }
      next++;
      yield { name, bytes: size, stream: entry as AsyncIterable<Buffer> };
    }
    await reading;
  } finally {
    input.destroy();
    extract.destroy(new Error('nobody reads it any more'));
  }
}

async function collect(
  stream: AsyncIterable<Buffer>,
  bytes: number,
  bytesMax: number,
  file: string,
): Promise<Buffer> {
  if (bytes > bytesMax) throw damaged(file, `an entry claims ${bytes} bytes, more than ${bytesMax}`);
  const parts: Buffer[] = [];
  for await (const part of stream) parts.push(part);
  return Buffer.concat(parts);
}

function damaged(file: string, why: string): GridError {
  return new GridError('bad-format', `${file} is not the archive of a clone: ${why}`);
}

function parseJson(bytes: Buffer, file: string): Record<string, unknown> {
  try {
    return Object(JSON.parse(bytes.toString('utf8'))) as Record<string, unknown>;
  } catch (cause) {
    throw new GridError('bad-format', `${file} is damaged: an entry is not JSON`, { cause });
  }
}

function parseInfo(bytes: Buffer, file: string): ArchiveInfo {
  const raw = parseJson(bytes, file);
  if (raw['format'] !== 'gridvfs-clone') throw damaged(file, 'its clone.json is of something else');
  if (raw['schema'] !== 1) {
    throw new GridError(
      'newer-format',
      `${file} has schema ${JSON.stringify(raw['schema'])?.slice(0, 40)}, this gridvfs reads 1`,
    );
  }
  const { id, image, base, standalone, sizeBytes, runs, dataBlocks, machine, created } = raw;
  const count = (value: unknown, max: number): value is number =>
    Number.isSafeInteger(value) && (value as number) >= 0 && (value as number) <= max;
  const labels = Object.entries(Object(machine) as Record<string, unknown>);
  const good =
    isName(id) &&
    typeof image === 'string' &&
    image.length <= LABEL_LENGTH_MAX &&
    isDigest(base) &&
    typeof standalone === 'boolean' &&
    count(sizeBytes, IMAGE_BYTES_MAX) &&
    count(dataBlocks, blockCountOf(sizeBytes)) &&
    count(runs, Math.min(blockCountOf(sizeBytes), RUNS_BYTES_MAX / RUN_BYTES)) &&
    labels.length <= LABELS_MAX &&
    labels.every(([, value]) => typeof value === 'string' && value.length <= LABEL_LENGTH_MAX) &&
    typeof created === 'string' &&
    !Number.isNaN(Date.parse(created));
  if (!good) throw damaged(file, 'its clone.json is malformed');
  return raw as unknown as ArchiveInfo;
}

function parseRuns(bytes: Buffer, info: ArchiveInfo, file: string): ChangeRun[] {
  const blocks = blockCountOf(info.sizeBytes);
  const runs: ChangeRun[] = [];
  let end = 0;
  let dataBlocks = 0;
  for (let at = 0; at < info.runs * RUN_BYTES; at += RUN_BYTES) {
    const first = bytes.readUInt32LE(at);
    const count = bytes.readUInt32LE(at + 4);
    const state = bytes.readUInt32LE(at + 8);
    if (
      first < end ||
      count === 0 ||
      first + count > blocks ||
      (state !== STATE_DATA && state !== STATE_ZERO)
    ) {
      throw damaged(file, `run ${at / RUN_BYTES} is out of order or range`);
    }
    end = first + count;
    if (state === STATE_DATA) dataBlocks += count;
    runs.push({ first, count, zero: state === STATE_ZERO });
  }
  if (dataBlocks !== info.dataBlocks) throw damaged(file, 'its runs and its data disagree');
  return runs;
}
