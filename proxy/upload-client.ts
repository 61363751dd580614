/**
 * The client's side of uploads (upload-protocol.ts). Calls go the way of every other fetch of a RemoteSource: one that
 * meets a broken tunnel waits for it and is sent again, which does no harm.
 */
import type { Digest } from '../src/core/bytes.ts';
import { GridError } from '../src/core/errors.ts';
import { KIB } from '../src/core/limits.ts';
import { parseTags } from '../src/core/manifest.ts';
import type { Tag } from '../src/core/manifest.ts';
import { UPLOAD_QUESTION_MAX } from '../src/core/uploads.ts';
import type { NewChunk, NewImage, UploadTarget } from '../src/core/uploads.ts';
import {
  encodeChunks,
  encodeFind,
  encodeImage,
  parseFound,
  UPLOAD_CHUNKS_PATH,
  UPLOAD_FIND_PATH,
  UPLOAD_IMAGE_PATH,
  UPLOAD_REMOVE_PATH,
} from './upload-protocol.ts';
import type { Wanted } from './work.ts';

const ANSWER_BYTES_MAX = 64 * KIB;

export class UploadClient implements UploadTarget {
  readonly #source: { readonly name: string };
  readonly #send: (wanted: Wanted) => Promise<Buffer>;

  constructor(source: { readonly name: string }, send: (wanted: Wanted) => Promise<Buffer>) {
    this.#source = source;
    this.#send = send;
  }

  async findChunks(digests: readonly Digest[]): Promise<number[]> {
    if (digests.length === 0) return [];
    const body = encodeFind(digests);
    const answer = await this.#call({ path: UPLOAD_FIND_PATH, bytesMax: 4 * UPLOAD_QUESTION_MAX, body });
    return parseFound(answer, digests.length, this.#source.name);
  }

  async putChunks(chunks: readonly NewChunk[]): Promise<void> {
    if (chunks.length === 0) return;
    const body = encodeChunks(chunks);
    await this.#call({ path: UPLOAD_CHUNKS_PATH, bytesMax: ANSWER_BYTES_MAX, body });
  }

  async putImage(image: NewImage): Promise<Tag> {
    const body = encodeImage(image);
    const answer = await this.#call({ path: UPLOAD_IMAGE_PATH, bytesMax: ANSWER_BYTES_MAX, body });
    const [tag] = parseTags(answer, `the answer of ${this.#source.name} to an upload`);
    if (!tag) throw new GridError('origin-failed', `${this.#source.name} took an image and gave no tag`);
    return tag;
  }

  async removeCheckpoint(name: string, version: string): Promise<string[]> {
    const body = Buffer.from(`${name}:${version}`);
    const answer = await this.#call({ path: UPLOAD_REMOVE_PATH, bytesMax: ANSWER_BYTES_MAX, body });
    const removed: unknown = parsedJson(answer);
    if (Array.isArray(removed) && removed.every((one) => typeof one === 'string')) return removed;
    throw new GridError('origin-failed', `${this.#source.name} does not say what it removed`);
  }

  async #call(wanted: Wanted): Promise<Buffer> {
    try {
      return await this.#send(wanted);
    } catch (error) {
      // An older server or a static one has no such path.
      if (error instanceof GridError && /not there \(HTTP|no such path|HTTP 405/.test(error.message)) {
        throw new GridError('denied', `${this.#source.name} takes no uploads`, { cause: error });
      }
      throw error;
    }
  }
}

function parsedJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString('utf8'));
  } catch {
    return undefined;
  }
}
