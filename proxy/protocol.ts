/**
 * The inter-proxy protocol: HTTP/1.1, paths equal to the store's file layout, so that a static server can stand
 * in for all of it but the batch.
 *
 *   GET  /v1/                        hello: { protocol, software, openings: true, idleLanes? }; idleLanes: so many lanes
 *                                    may stand idle between starts, they cost this side next to nothing
 *   GET  /v1/tags.json               encodeTags(); the only thing that changes
 *   GET  /v1/manifests/<ab>/<digest> manifest bytes
 *   GET  /v1/openings/<ab>/<digest>  a manifest, with what is asked for next (openings.ts)
 *   GET  /v1/tables/<ab>/<digest>    zstd of the chunk table
 *   GET  /v1/chunks/<ab>/<digest>    zstd of the chunk
 *   GET  /v1/profiles/<ab>/<manifest>/<purpose>.json   the profile, where there is one
 *   POST the same                    merges a recording into it; only over a way that says who comes (ssh, stdio,
 *                                    a unix socket): plain http is answered with `denied`
 *   POST /v1/holds/<holder>          what a host's clones lie on (holds.ts)
 *   POST /v1/uploads/…               new images (upload-protocol.ts)
 *   POST /v1/batch                   many chunks for one round trip
 *   GET  /healthz                    { status: 'ok' | 'degraded', reason? }
 *   GET  /metrics                    Prometheus text (server-metrics.ts)
 *
 * An error is a status of 400 and above with the body { code, message }.
 *
 * Invariants of the batch: each chunk asked for comes at most once, in any order, as soon as it was read; an END
 * frame comes last and only after all of them, so a stream that was cut anywhere is never taken as complete; an
 * ERROR frame ends a stream that had begun. Nothing is allocated that the asker did not allow: a chunk may be as
 * long as its plain bytes, which the request names, and STORED_OVERHEAD_BYTES_MAX.
 *
 * Request (little-endian):
 *   0  4  magic "GVB1"
 *   4  1  priority: 0 demand, 1 prefetch
 *   5  1  0
 *   6  2  count, 1 to BATCH_CHUNKS_MAX
 *   8  36 × count   { 32 SHA-256 of the plain chunk, u32 its plain bytes }
 *
 * Response frames:
 *   0  1  type: 1 CHUNK, 2 END, 3 ERROR
 *   1  1  CHUNK: encoding, 0 plain, 1 zstd; else 0
 *   2  2  CHUNK: index into the request; else 0
 *   4  4  CHUNK, ERROR: length of what follows; END: chunks sent
 *   8  …  CHUNK: the bytes; ERROR: JSON { code, message }
 */
import { bufferOf, isDigest } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { ERROR_CODES, GridError } from '../src/core/errors.ts';
import type { ErrorCode } from '../src/core/errors.ts';
import { BATCH_CHUNKS_MAX, CHUNK_BYTES_MAX, KIB, STORED_OVERHEAD_BYTES_MAX } from '../src/core/limits.ts';
import { isName } from '../src/core/manifest.ts';
import type { Purpose } from '../src/core/profile.ts';
import type { Priority } from '../src/core/source.ts';

export const PROTOCOL_VERSION = 1;
export const SOFTWARE = 'gridvfs/0.1.0';
export const BATCH_PATH = '/v1/batch';
export const TAGS_PATH = '/v1/tags.json';
export const HELLO_PATH = '/v1/';
export const BATCH_TYPE = 'application/x-gridvfs-batch';

export type ObjectKind = 'manifests' | 'tables' | 'chunks';

/** Throws bad-request: what is not a digest never becomes a path. */
export function objectPath(kind: ObjectKind, digest: Digest): string {
  refuseOdd(digest);
  return `/v1/${kind}/${digest.slice(0, 2)}/${digest}`;
}

function refuseOdd(digest: Digest): void {
  if (!isDigest(digest))
    throw new GridError('bad-request', `'${String(digest).slice(0, 80)}' is not a digest`);
}

/** The digest that a request names, below its own folder. Throws bad-request. */
export function checkedObject({ ab, digest }: { ab: string; digest: string }): Digest {
  if (isDigest(digest) && ab === digest.slice(0, 2)) return digest;
  throw new GridError('bad-request', `'${digest.slice(0, 80)}' is not a digest below its own folder`);
}

/** Throws bad-request, likewise. */
export function profilePath(manifest: Digest, purpose: Purpose): string {
  refuseOdd(manifest);
  if (!isName(purpose))
    throw new GridError('bad-request', `'${String(purpose).slice(0, 80)}' is not the name of a purpose`);
  return `/v1/profiles/${manifest.slice(0, 2)}/${manifest}/${purpose}.json`;
}

const REQUEST_MAGIC = Buffer.from('GVB1');
const REQUEST_HEADER_BYTES = 8;
const ENTRY_BYTES = 36;
/** The largest request body that a server reads. */
export const REQUEST_BYTES_MAX = REQUEST_HEADER_BYTES + BATCH_CHUNKS_MAX * ENTRY_BYTES;

const FRAME_BYTES = 8;
const FRAME_CHUNK = 1;
const FRAME_END = 2;
const FRAME_ERROR = 3;
/** A code and one sentence. */
const ERROR_BYTES_MAX = 8 * KIB;

/** Refuses refs that no store could have; `bad-request`. */
export function checkRefs(refs: readonly ChunkRef[]): void {
  if (refs.length > BATCH_CHUNKS_MAX) {
    throw new GridError(
      'bad-request',
      `${refs.length} chunks in one call, more than the ${BATCH_CHUNKS_MAX} allowed`,
    );
  }
  for (const { digest, plainBytes } of refs) {
    if (!isDigest(digest)) throw new GridError('bad-request', `'${String(digest)}' is not a chunk digest`);
    if (!Number.isSafeInteger(plainBytes) || plainBytes < 1 || plainBytes > CHUNK_BYTES_MAX) {
      throw new GridError(
        'bad-request',
        `chunk ${digest.slice(0, 12)} cannot have ${plainBytes} plain bytes`,
      );
    }
  }
}

export function encodeBatchRequest(refs: readonly ChunkRef[], priority: Priority): Buffer {
  const bytes = Buffer.allocUnsafe(REQUEST_HEADER_BYTES + refs.length * ENTRY_BYTES);
  REQUEST_MAGIC.copy(bytes);
  bytes[4] = priority === 'demand' ? 0 : 1;
  bytes[5] = 0;
  bytes.writeUInt16LE(refs.length, 6);
  let at = REQUEST_HEADER_BYTES;
  for (const { digest, plainBytes } of refs) {
    bytes.write(digest, at, 32, 'hex');
    bytes.writeUInt32LE(plainBytes, at + 32);
    at += ENTRY_BYTES;
  }
  return bytes;
}

/** Throws bad-request on anything that `encodeBatchRequest` would not have written. */
export function parseBatchRequest(bytes: Buffer): { refs: ChunkRef[]; priority: Priority } {
  const bad = (why: string) => new GridError('bad-request', `batch request ${why}`);
  if (bytes.length < REQUEST_HEADER_BYTES || !bytes.subarray(0, 4).equals(REQUEST_MAGIC)) {
    throw bad('does not start with GVB1');
  }
  if (bytes[4]! > 1 || bytes[5] !== 0) throw bad('has an unknown priority or flag');
  const count = bytes.readUInt16LE(6);
  if (count < 1 || count > BATCH_CHUNKS_MAX) throw bad(`asks for ${count} chunks`);
  if (bytes.length !== REQUEST_HEADER_BYTES + count * ENTRY_BYTES) throw bad('has the wrong length');
  const refs: ChunkRef[] = [];
  for (let at = REQUEST_HEADER_BYTES; at < bytes.length; at += ENTRY_BYTES) {
    const plainBytes = bytes.readUInt32LE(at + 32);
    if (plainBytes < 1 || plainBytes > CHUNK_BYTES_MAX) throw bad(`has a chunk of ${plainBytes} bytes`);
    refs.push({ digest: bytes.toString('hex', at, at + 32), plainBytes });
  }
  return { refs, priority: bytes[4] === 0 ? 'demand' : 'prefetch' };
}

function frame(type: number, encoding: number, index: number, value: number): Buffer {
  const bytes = Buffer.allocUnsafe(FRAME_BYTES);
  bytes[0] = type;
  bytes[1] = encoding;
  bytes.writeUInt16LE(index, 2);
  bytes.writeUInt32LE(value, 4);
  return bytes;
}

/** The header that goes before the chunk's bytes. */
export function encodeChunkHeader(index: number, chunk: StoredChunk): Buffer {
  return frame(FRAME_CHUNK, chunk.encoding === 'zstd' ? 1 : 0, index, chunk.bytes.length);
}

export function encodeEnd(count: number): Buffer {
  return frame(FRAME_END, 0, 0, count);
}

export function encodeError(error: GridError): Buffer {
  const body = Buffer.from(JSON.stringify(errorBody(error)));
  return Buffer.concat([frame(FRAME_ERROR, 0, 0, body.length), body]);
}

/**
 * Reads the frames of one batch response from pieces of any size. `deliver` gets each chunk once, in a buffer of
 * its own. Throws origin-failed on frames that break the protocol, and the far side's error from an ERROR frame.
 */
export class FrameReader {
  readonly #refs: readonly ChunkRef[];
  readonly #deliver: (index: number, chunk: StoredChunk) => void;
  readonly #source: string;
  readonly #seen: Uint8Array;
  readonly #header = Buffer.alloc(FRAME_BYTES);
  #headerBytes = 0;
  #body: Buffer | undefined;
  #bodyBytes = 0;
  #count = 0;
  #ended = false;

  constructor(
    refs: readonly ChunkRef[],
    source: string,
    deliver: (index: number, chunk: StoredChunk) => void,
  ) {
    this.#refs = refs;
    this.#source = source;
    this.#deliver = deliver;
    this.#seen = new Uint8Array(refs.length);
  }

  /** Whether the END frame came: every chunk was delivered. */
  get ended(): boolean {
    return this.#ended;
  }

  push(piece: Buffer): void {
    let at = 0;
    while (at < piece.length) {
      if (this.#ended) throw this.#bad('goes on after its end');
      if (!this.#body) {
        const take = Math.min(FRAME_BYTES - this.#headerBytes, piece.length - at);
        piece.copy(this.#header, this.#headerBytes, at, at + take);
        this.#headerBytes += take;
        at += take;
        if (this.#headerBytes === FRAME_BYTES) this.#startFrame();
      } else {
        const take = Math.min(this.#body.length - this.#bodyBytes, piece.length - at);
        piece.copy(this.#body, this.#bodyBytes, at, at + take);
        this.#bodyBytes += take;
        at += take;
        if (this.#bodyBytes === this.#body.length) this.#finishFrame(this.#body);
      }
    }
  }

  #bad(why: string): GridError {
    return new GridError('origin-failed', `the batch response of ${this.#source} ${why}`);
  }

  #startFrame(): void {
    const header = this.#header;
    const length = header.readUInt32LE(4);
    const index = header.readUInt16LE(2);
    const isChunk = header[0] === FRAME_CHUNK;
    if (!isChunk && (header[1] !== 0 || index !== 0)) throw this.#bad('has a malformed frame');
    if (isChunk) {
      const ref = this.#refs[index];
      if (!ref || header[1]! > 1) throw this.#bad('has a chunk that was not asked for');
      if (this.#seen[index] !== 0) throw this.#bad(`has chunk ${index} twice`);
      if (length < 1 || length > ref.plainBytes + STORED_OVERHEAD_BYTES_MAX) {
        throw this.#bad(`has ${length} bytes for a chunk of ${ref.plainBytes}`);
      }
    } else if (header[0] === FRAME_END) {
      if (length !== this.#count || length !== this.#refs.length) {
        throw this.#bad(`ends after ${this.#count} of ${this.#refs.length} chunks`);
      }
      this.#ended = true;
      return;
    } else if (header[0] !== FRAME_ERROR || length < 1 || length > ERROR_BYTES_MAX) {
      throw this.#bad('has a malformed frame');
    }
    this.#body = Buffer.allocUnsafe(length);
    this.#bodyBytes = 0;
  }

  #finishFrame(body: Buffer): void {
    this.#body = undefined;
    this.#headerBytes = 0;
    if (this.#header[0] === FRAME_ERROR) throw remoteError(body, 500, this.#source);
    const index = this.#header.readUInt16LE(2);
    this.#seen[index] = 1;
    this.#count++;
    this.#deliver(index, { encoding: this.#header[1] === 1 ? 'zstd' : 'plain', bytes: body });
  }
}

/** Each code as an HTTP status. */
export const HTTP_STATUS = {
  'bad-request': 400,
  'not-found': 404,
  exists: 409,
  'in-use': 409,
  'read-only': 403,
  'no-permission': 500,
  'no-space': 507,
  'local-io': 500,
  unsupported: 501,
  'bad-format': 500,
  'newer-format': 500,
  corrupt: 500,
  'wrong-base': 409,
  unreachable: 504,
  'tunnel-lost': 502,
  'host-key': 502,
  denied: 403,
  'origin-failed': 502,
  'vm-failed': 500,
  timeout: 504,
  closed: 503,
  bug: 500,
} as const satisfies Record<ErrorCode, number>;

/**
 * What a code of the far side is to us. Whatever failed over there (its disk, its own origin, a bug) is the
 * origin's failure here; a far side that is closing is a tunnel that will be made again.
 */
const CODE_HERE = {
  'bad-request': 'bad-request',
  'not-found': 'not-found',
  exists: 'exists',
  'in-use': 'origin-failed',
  'read-only': 'origin-failed',
  'no-permission': 'origin-failed',
  'no-space': 'origin-failed',
  'local-io': 'origin-failed',
  unsupported: 'origin-failed',
  'bad-format': 'bad-format',
  'newer-format': 'newer-format',
  corrupt: 'corrupt',
  'wrong-base': 'origin-failed',
  unreachable: 'origin-failed',
  'tunnel-lost': 'origin-failed',
  'host-key': 'origin-failed',
  denied: 'denied',
  'origin-failed': 'origin-failed',
  'vm-failed': 'origin-failed',
  timeout: 'origin-failed',
  closed: 'tunnel-lost',
  bug: 'origin-failed',
} as const satisfies Record<ErrorCode, ErrorCode>;

export function errorBody(error: GridError): { code: ErrorCode; message: string } {
  return { code: error.code, message: error.message.slice(0, 2048) };
}

function parseErrorBody(body: Uint8Array): { code: ErrorCode; message: string } | undefined {
  try {
    const raw: unknown = JSON.parse(bufferOf(body).toString());
    if (typeof raw !== 'object' || raw === null || !('code' in raw) || !('message' in raw)) return undefined;
    const { code, message } = raw;
    if (typeof code !== 'string' || !Object.hasOwn(ERROR_CODES, code)) return undefined;
    return { code: code as ErrorCode, message: String(message).slice(0, 2048) };
  } catch {
    return undefined; // a static server's page
  }
}

/** Whether a body is an error of this protocol, not some web server's page. */
export function isErrorBody(body: Uint8Array): boolean {
  return parseErrorBody(body) !== undefined;
}

/** The error that an answer says: its body where it is one of ours, its status otherwise. */
export function remoteError(body: Uint8Array, status: number, doing: string): GridError {
  const ours = parseErrorBody(body);
  if (ours) return new GridError(CODE_HERE[ours.code], `${doing}: ${ours.message}`);
  if (status === 404 || status === 410) {
    return new GridError('not-found', `${doing}: not there (HTTP ${status})`);
  }
  if (status === 401 || status === 403) return new GridError('denied', `${doing}: refused (HTTP ${status})`);
  const hint = status >= 300 && status < 400 ? '; redirects are not followed, give the final address' : '';
  return new GridError('origin-failed', `${doing}: HTTP ${status}${hint}`);
}
