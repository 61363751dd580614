/**
 * The manifest: the immutable description of one image version, and tags, the only thing that moves.
 *
 * A manifest is UTF-8 JSON, named by the SHA-256 of exactly these bytes, so it is parsed from bytes and never
 * re-encoded. Whatever comes from outside goes through `parseManifest`/`parseTags`, which refuse unknown
 * schemas, wild sizes and names that could leave a folder.
 */
import { isDigest, sha256 } from './bytes.ts';
import type { Digest } from './bytes.ts';
import { GridError, invariant } from './errors.ts';
import {
  CHUNK_BYTES_MAX,
  CHUNK_BYTES_MIN,
  IMAGE_BYTES_MAX,
  LABEL_LENGTH_MAX,
  LABELS_MAX,
  MANIFEST_BYTES_MAX,
  NAME_LENGTH_MAX,
  PARTS_MAX,
  TAGS_BYTES_MAX,
  TAGS_MAX,
} from './limits.ts';

export const MANIFEST_KINDS = ['disk', 'memory', 'data', 'kernel', 'initrd', 'firmware', 'state'] as const;
export type ManifestKind = (typeof MANIFEST_KINDS)[number];

export interface Manifest {
  readonly schema: 1;
  readonly kind: ManifestKind;
  /** Size of the image as its user sees it. */
  readonly sizeBytes: number;
  readonly chunkBytes: number;
  /** Digest of the chunk table's bytes (see chunk-table.ts). */
  readonly table: Digest;
  /** Plain bytes in chunks that are not all zero, whole chunks counted. */
  readonly nonzeroBytes: number;
  /** The manifest this one was made from. */
  readonly parent?: Digest;
  /** os, kernel, libraries, boot.cmdline, … */
  readonly labels: Readonly<Record<string, string>>;
  /** Other files of the same version by the name the mount shows, e.g. { kernel: digest, initrd: digest }. */
  readonly parts: Readonly<Record<string, Digest>>;
  /** ISO 8601, UTC. */
  readonly created: string;
}

/** Label of a clone that was pushed: what all its versions have in common (PushedState of the agent). */
export const LABEL_PUSH_LINEAGE = 'push.lineage';

/** One moving name. `name:version` is how people write it. */
export interface Tag {
  readonly name: string;
  readonly version: string;
  readonly manifest: Digest;
  /** When it last moved, ISO 8601, UTC. */
  readonly moved: string;
}

/** Lower-case letters, digits, dot, dash, underscore; starts with a letter or digit: safe as a file name, in a
 * URL and in a shell. */
const NAME_PATTERN = /^[a-z0-9][a-z0-9._-]*$/;

export function isName(text: unknown): text is string {
  return typeof text === 'string' && text.length <= NAME_LENGTH_MAX && NAME_PATTERN.test(text);
}

/** `name` or `name:version` (version `latest` when left out) as a person types it. */
export function parseReference(text: string): { name: string; version: string } {
  const [name, version = 'latest', ...rest] = text.split(':');
  if (rest.length > 0 || !isName(name) || !isName(version)) {
    throw new GridError(
      'bad-request',
      `${JSON.stringify(text.slice(0, 2 * NAME_LENGTH_MAX))} is not an image reference: write name:version, in lower-case letters, digits, '.', '-' and '_'`,
    );
  }
  return { name, version };
}

/** The file name a kind has in the mount, e.g. images/debian/12/disk.raw. */
export function fileNameOf(kind: ManifestKind): string {
  return kind === 'disk' || kind === 'memory' || kind === 'data' ? `${kind}.raw` : kind;
}

export function chunkCountOf(manifest: Pick<Manifest, 'sizeBytes' | 'chunkBytes'>): number {
  return Math.ceil(manifest.sizeBytes / manifest.chunkBytes);
}

/** Plain length of chunk `index`: the last one of an image may be short. */
export function chunkLengthOf(manifest: Pick<Manifest, 'sizeBytes' | 'chunkBytes'>, index: number): number {
  return Math.min(manifest.chunkBytes, manifest.sizeBytes - index * manifest.chunkBytes);
}

/** The bytes to store and their digest. Keys are sorted, so equal manifests have equal digests. */
export function encodeManifest(manifest: Manifest): { bytes: Buffer; digest: Digest } {
  const sorted = (record: Readonly<Record<string, string>>) =>
    Object.fromEntries(Object.entries(record).toSorted(([a], [b]) => (a < b ? -1 : 1)));
  const bytes = Buffer.from(
    JSON.stringify({
      schema: manifest.schema,
      kind: manifest.kind,
      sizeBytes: manifest.sizeBytes,
      chunkBytes: manifest.chunkBytes,
      table: manifest.table,
      nonzeroBytes: manifest.nonzeroBytes,
      parent: manifest.parent,
      labels: sorted(manifest.labels),
      parts: sorted(manifest.parts),
      created: manifest.created,
    }) + '\n',
  );
  invariant(bytes.length <= MANIFEST_BYTES_MAX, 'an encoded manifest is within its bound');
  return { bytes, digest: sha256(bytes) };
}

function parseJson(bytes: Uint8Array, what: string): unknown {
  try {
    return JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch (cause) {
    throw new GridError('bad-format', `${what} is not JSON`, { cause });
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isCount(value: unknown, max: number): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 && value <= max;
}

/** Only a number is put into words: whatever else comes from outside may be deeper than the stack. */
function checkSchema(schema: unknown, what: string): void {
  if (schema === 1) return;
  if (typeof schema !== 'number') throw new GridError('bad-format', `${what} has no schema`);
  throw new GridError('newer-format', `${what} has schema ${schema}; this gridvfs reads 1`);
}

/** Checks bytes against `digest` and parses them; throws corrupt, bad-format or newer-format. */
export function parseManifest(bytes: Uint8Array, digest: Digest): Manifest {
  const what = `manifest ${digest.slice(0, 12)}`;
  if (bytes.length > MANIFEST_BYTES_MAX) throw new GridError('bad-format', `${what} is over its size bound`);
  if (sha256(bytes) !== digest) throw new GridError('corrupt', `${what} does not match its digest`);
  const raw = parseJson(bytes, what);
  if (!isRecord(raw)) throw new GridError('bad-format', `${what} is not an object`);
  checkSchema(raw['schema'], what);
  const bad = (field: string) => new GridError('bad-format', `${what} has a bad field '${field}'`);
  const { kind, sizeBytes, chunkBytes, table, nonzeroBytes, parent, labels, parts, created } = raw;
  if (!MANIFEST_KINDS.includes(kind as ManifestKind)) throw bad('kind');
  if (!isCount(sizeBytes, IMAGE_BYTES_MAX)) throw bad('sizeBytes');
  if (
    !isCount(chunkBytes, CHUNK_BYTES_MAX) ||
    chunkBytes < CHUNK_BYTES_MIN ||
    chunkBytes % CHUNK_BYTES_MIN !== 0
  ) {
    throw bad('chunkBytes');
  }
  if (!isDigest(table)) throw bad('table');
  if (!isCount(nonzeroBytes, sizeBytes)) throw bad('nonzeroBytes');
  if (parent !== undefined && !isDigest(parent)) throw bad('parent');
  if (!isRecord(labels) || Object.keys(labels).length > LABELS_MAX) throw bad('labels');
  for (const [key, value] of Object.entries(labels)) {
    if (typeof value !== 'string' || value.length > LABEL_LENGTH_MAX || key.length > NAME_LENGTH_MAX)
      throw bad('labels');
  }
  if (!isRecord(parts) || Object.keys(parts).length > PARTS_MAX) throw bad('parts');
  for (const [key, value] of Object.entries(parts)) if (!isName(key) || !isDigest(value)) throw bad('parts');
  if (typeof created !== 'string' || Number.isNaN(Date.parse(created))) throw bad('created');
  return {
    schema: 1,
    kind: kind as ManifestKind,
    sizeBytes,
    chunkBytes,
    table,
    nonzeroBytes,
    ...(parent === undefined ? {} : { parent }),
    labels: labels as Record<string, string>,
    parts: parts as Record<string, Digest>,
    created,
  };
}

/** The tag listing, the body of GET /v1/tags.json and a file of the store: { schema: 1, tags: [...] }. */
export function encodeTags(tags: readonly Tag[]): Buffer {
  const sorted = tags.toSorted((a, b) => (a.name + ':' + a.version < b.name + ':' + b.version ? -1 : 1));
  return Buffer.from(JSON.stringify({ schema: 1, tags: sorted }, null, 1) + '\n');
}

export function parseTags(bytes: Uint8Array, what: string): Tag[] {
  if (bytes.length > TAGS_BYTES_MAX) throw new GridError('bad-format', `${what} is over its size bound`);
  const raw = parseJson(bytes, what);
  if (!isRecord(raw) || !Array.isArray(raw['tags']))
    throw new GridError('bad-format', `${what} is not a tag list`);
  checkSchema(raw['schema'], what);
  if (raw['tags'].length > TAGS_MAX) throw new GridError('bad-format', `${what} has over ${TAGS_MAX} tags`);
  return raw['tags'].map((entry: unknown): Tag => {
    if (isRecord(entry)) {
      const { name, version, manifest, moved } = entry;
      if (isName(name) && isName(version) && isDigest(manifest) && typeof moved === 'string') {
        return { name, version, manifest, moved };
      }
    }
    throw new GridError('bad-format', `${what} has a malformed tag`);
  });
}
