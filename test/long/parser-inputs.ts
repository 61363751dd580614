/**
 * Inputs for the fuzz of the parsers: random bytes, and mutations of valid inputs that keep what a parser looks at
 * first (magic, lengths, digests), so that the checks behind it are met. All from one seeded stream of numbers.
 */
import { sha256 } from '../../src/core/bytes.ts';
import { encodeChunkTable } from '../../src/core/chunk-table.ts';
import type { NewEntry } from '../../src/core/chunk-table.ts';
import { compress } from '../../src/core/chunk.ts';
import type { ChunkRef } from '../../src/core/chunk.ts';
import { MIB } from '../../src/core/limits.ts';
import { encodeManifest, encodeTags } from '../../src/core/manifest.ts';
import { encodeProfile } from '../../src/core/profile.ts';
import { encodeBatchRequest, encodeChunkHeader, encodeEnd, encodeError } from '../../proxy/protocol.ts';
import { GridError } from '../../src/core/errors.ts';
import { randomBuffer, randomNumbers } from '../suites/fixtures.ts';

/** The next 32 random bits. */
export type Next = () => number;

export const DIGEST = 'ab'.repeat(32);
const below = (next: Next, bound: number) => next() % bound;
const pick = <T>(next: Next, list: readonly T[]): T => list[next() % list.length]!;

const WORDS = [0, 1, 2, 3, 7, 8, 255, 256, 4095, 4096, 4097, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff];

/** A word that a length or index check is likely to have got wrong; or any. */
function word(next: Next, near: number): number {
  const kind = below(next, 4);
  if (kind === 0) return pick(next, WORDS);
  if (kind === 1) return (near + below(next, 5) - 2) >>> 0;
  return kind === 2 ? below(next, 64) : next();
}

export function randomBytes(next: Next, magic: Buffer): Buffer {
  const bytes = randomBuffer(next, below(next, 200));
  if (below(next, 2) === 0) magic.copy(bytes, 0, 0, Math.min(magic.length, bytes.length));
  return bytes;
}

/** Flips, cuts, lengthens or repeats anywhere. */
export function mutateAnywhere(next: Next, valid: Buffer): Buffer {
  const bytes = Buffer.from(valid);
  switch (below(next, 4)) {
    case 0:
      return bytes.subarray(0, below(next, bytes.length + 1));
    case 1:
      return Buffer.concat([bytes, randomBuffer(next, below(next, 40))]);
    case 2: {
      const from = below(next, bytes.length);
      return Buffer.concat([bytes.subarray(0, from + 1), bytes.subarray(from)]);
    }
    default:
      for (let i = below(next, 4); i >= 0 && bytes.length > 0; i--)
        bytes[below(next, bytes.length)]! ^= 1 << below(next, 8);
      return bytes;
  }
}

/** Replaces some of the little-endian words from `from` on, nothing before and not the length. */
function mutateWords(next: Next, valid: Buffer, from: number): Buffer {
  const bytes = Buffer.from(valid);
  const words = Math.floor((bytes.length - from) / 4);
  if (words < 1) return bytes;
  for (let i = below(next, 3); i >= 0; i--) {
    // The first words are the interesting ones.
    const at = from + 4 * below(next, below(next, 2) === 0 ? Math.min(words, 8) : words);
    bytes.writeUInt32LE(word(next, bytes.readUInt32LE(at)), at);
  }
  return bytes;
}

const TABLES = [1, 2, 3].map((seed) => {
  const next = randomNumbers(seed);
  const chunks: { index: number; digest: string; storedBytes: number }[] = [];
  for (let index = 0; index < 60; index++) {
    if (next() % 3 === 0) continue;
    const digest = randomBuffer(next, 32).toString('hex');
    chunks.push({ index, digest, storedBytes: 1 + (next() % 4096) });
  }
  return encodeChunkTable(4096 * seed, 60 + seed, chunks).bytes;
});
/** With patches over every third chunk, in two packs. */
const PATCHED_TABLE = (() => {
  const next = randomNumbers(4);
  const digest = () => randomBuffer(next, 32).toString('hex');
  const packs = [8, 16].map((blocks) => ({ digest: digest(), storedBytes: 5000, blocks }));
  const chunks = Array.from({ length: 30 }, (_, index): NewEntry => {
    const base = { digest: digest(), storedBytes: 1 + (next() % 4096) };
    if (index % 3 > 0) return { index, ...base };
    const pack = index % 2 === 0 ? packs[(index % 4) >>> 1] : undefined;
    return {
      index,
      patch: { base, pack, firstBlock: pack ? index % 5 : 0, data: pack ? 0b101n : 0n, zero: 0b1000n },
    };
  });
  return encodeChunkTable(65536, 40, chunks).bytes;
})();
/** Where its second part begins. */
const PATCHES_FROM = 24 + 8 + 36 * 30;
export const TABLE_MAGIC = Buffer.from('GVFSTAB1');

/** A chunk table; two of three have the length that their header asks for. */
export function tableInput(next: Next): Buffer {
  const kind = below(next, 8);
  // The counts of packs and patches decide the length: mostly they stay.
  if (kind >= 6) return mutateWords(next, PATCHED_TABLE, PATCHES_FROM + (below(next, 8) === 0 ? 0 : 8));
  if (kind === 0) return randomBytes(next, TABLE_MAGIC);
  if (kind === 1) return mutateAnywhere(next, pick(next, TABLES));
  if (kind <= 3) {
    const valid = pick(next, TABLES);
    const extentBytes = 8 * valid.readUInt32LE(16);
    const bytes = Buffer.from(valid);
    // The counts decide the length and stay; extents, lengths of entries, chunk size and chunk count do not.
    for (let i = below(next, 3); i >= 0; i--) {
      const entries = valid.readUInt32LE(20);
      const places = [8, 12, 24 + 4 * below(next, extentBytes / 4)];
      places.push(24 + extentBytes + 36 * below(next, entries) + 32);
      const at = pick(next, places);
      bytes.writeUInt32LE(word(next, bytes.readUInt32LE(at)), at);
    }
    return bytes;
  }
  // Made from nothing, with the right length.
  const extents = below(next, 6);
  const entries = below(next, 12);
  const bytes = Buffer.alloc(24 + 8 * extents + 36 * entries);
  TABLE_MAGIC.copy(bytes);
  bytes.writeUInt32LE(below(next, 8) === 0 ? next() : 4096 * (1 + below(next, 4)), 8);
  bytes.writeUInt32LE(word(next, 20), 12);
  bytes.writeUInt32LE(extents, 16);
  bytes.writeUInt32LE(entries, 20);
  let at = 0;
  for (let i = 0; i < extents; i++) {
    const chunks = below(next, 4) === 0 ? word(next, 2) : 1 + below(next, 4);
    bytes.writeUInt32LE(below(next, 8) === 0 ? word(next, at) : at, 24 + 8 * i);
    bytes.writeUInt32LE(chunks, 28 + 8 * i);
    at = (at + chunks + 1 + below(next, 3)) >>> 0;
  }
  for (let i = 0; i < entries; i++) {
    const where = 24 + 8 * extents + 36 * i + 32;
    bytes.writeUInt32LE(below(next, 12) === 0 ? word(next, 4096) : 100, where);
  }
  return bytes;
}

const LONG_TEXT = 'x'.repeat(5000);
const VALUES: readonly unknown[] = [
  ...[0, -0, 1, -1, 0.5, 4096, 2 ** 31, 2 ** 32, 2 ** 53, 2 ** 53 + 2, 1e308, true, false, null],
  ...[
    '',
    'x',
    '../x',
    'a/b',
    'UPPER',
    '\0',
    '\ud800',
    'ä',
    LONG_TEXT,
    DIGEST,
    DIGEST.toUpperCase(),
    `${DIGEST}0`,
  ],
  ...[
    '1970-01-01T00:00:00Z',
    'disk',
    'latest',
    [],
    {},
    [[]],
    [[0, 1]],
    [[0, 4294967295]],
    [
      [1, 1],
      [0, 1],
    ],
  ],
  ...[{ length: 1 }, { toString: 1 }, { a: DIGEST }, Array.from({ length: 300 }, () => 0)],
];
const KEYS = [
  '__proto__',
  'constructor',
  'toString',
  'length',
  'schema',
  'kernel',
  '../x',
  '',
  'a',
  LONG_TEXT,
];
const DEEP = '['.repeat(50_000) + ']'.repeat(50_000);

type Node = unknown[] | Record<string, unknown>;

/** A mutation of valid JSON that is JSON still, mostly. */
function mutateJson(next: Next, valid: string): Buffer {
  const root = JSON.parse(valid) as Record<string, unknown>;
  for (let i = below(next, 3); i >= 0; i--) {
    let node: Node = root;
    for (let depth = below(next, 4); depth > 0; depth--) {
      const inner: unknown = pick(next, Object.values(node));
      if (typeof inner !== 'object' || inner === null) break;
      node = inner as Node;
    }
    const keys = Object.keys(node).filter((key) => node !== root || key !== 'schema' || next() % 8 === 0);
    const key = keys.length === 0 || below(next, 8) === 0 ? pick(next, KEYS) : pick(next, keys);
    const record = node as Record<string, unknown>;
    if (Array.isArray(node) && !/^\d+$/.test(key)) continue;
    const op = below(next, 8);
    if (op === 0) delete record[key];
    else if (op === 1 && typeof record[key] === 'number') record[key] += below(next, 5) - 2;
    else if (op === 2 && Array.isArray(node)) node.push(...node.slice(0, 50));
    else
      Object.defineProperty(record, key, {
        value: structuredClone(pick(next, VALUES)),
        enumerable: true,
        configurable: true,
        writable: true,
      });
  }
  let text = JSON.stringify(root);
  const odd = below(next, 24);
  if (odd === 0) text = text.replace(/\d+/, '1e999');
  if (odd === 1) text = text.replace(/null|\d+|""/, DEEP);
  if (odd === 2) text = text.replace(/"/, '"\\u0000');
  return odd === 3 ? Buffer.from(text, 'latin1') : Buffer.from(text);
}

function jsonInput(next: Next, valid: readonly string[]): Buffer {
  const kind = below(next, 5);
  if (kind === 0) return randomBytes(next, Buffer.from('{"schema":1,'));
  if (kind === 1) return mutateAnywhere(next, Buffer.from(pick(next, valid)));
  return mutateJson(next, pick(next, valid));
}

const CREATED = '2026-01-01T00:00:00.000Z';
const MANIFESTS = [
  {},
  { parent: DIGEST, parts: { kernel: DIGEST, initrd: DIGEST }, labels: { os: 'debian', a: '' } },
].map((more) =>
  encodeManifest({
    ...{
      schema: 1,
      kind: 'disk',
      sizeBytes: 2 ** 31,
      chunkBytes: 262144,
      table: DIGEST,
      nonzeroBytes: 2 ** 30,
    },
    ...{ labels: {}, parts: {}, created: CREATED },
    ...more,
  }).bytes.toString(),
);
export const manifestInput = (next: Next): Buffer => jsonInput(next, MANIFESTS);

const TAG = { version: '1', manifest: DIGEST, moved: CREATED };
const TAGS = [[], ['a'], ['a', 'b', 'debian']].map((names) =>
  encodeTags(names.map((name) => ({ name, ...TAG }))).toString(),
);
export const tagsInput = (next: Next): Buffer => jsonInput(next, TAGS);

const PROFILES = [
  { early: [1, 2, 3, 9], late: [4, 5, 100] },
  { early: [], late: [] },
  {
    early: Array.from({ length: 40 }, (_, i) => i * 3),
    late: Array.from({ length: 40 }, (_, i) => i * 3 + 1),
  },
].map((sets) => encodeProfile({ manifest: DIGEST, purpose: 'boot', runs: 2, ...sets }).toString());
export const profileInput = (next: Next): Buffer => jsonInput(next, PROFILES);

/** Chunks that the batches are of: text, noise, and one that decodes to far more than it may. */
const PLAIN = [4096, 4096, 1, 8192].map((length, i) =>
  i === 1 ? randomBuffer(randomNumbers(9), length) : Buffer.alloc(length, `chunk ${i} `),
);
export const BATCH_REFS: readonly ChunkRef[] = PLAIN.map((plain) => ({
  digest: sha256(plain),
  plainBytes: plain.length,
}));
const STORED = PLAIN.map(compress);
const BOMB = compress(Buffer.alloc(4 * MIB));

export const REQUEST_MAGIC = Buffer.from('GVB1');
const REQUESTS = [1, 4].map((count) => encodeBatchRequest(BATCH_REFS.slice(0, count), 'demand'));

export function requestInput(next: Next): Buffer {
  const kind = below(next, 5);
  if (kind === 0) return randomBytes(next, REQUEST_MAGIC);
  if (kind === 1) return mutateAnywhere(next, pick(next, REQUESTS));
  return mutateWords(next, pick(next, REQUESTS), 8);
}

/** A stored chunk, mutated; its index in BATCH_REFS. */
export function chunkInput(next: Next): { index: number; bytes: Buffer } {
  const index = below(next, STORED.length);
  const kind = below(next, 6);
  if (kind === 0) return { index, bytes: randomBytes(next, Buffer.from([0x28, 0xb5, 0x2f, 0xfd])) };
  if (kind === 1) return { index, bytes: BOMB };
  return { index, bytes: mutateAnywhere(next, STORED[index]!) };
}

/** The stream of a whole batch with some of its headers, their order or their bytes changed. */
export function framesInput(next: Next): Buffer {
  if (below(next, 6) === 0) return randomBytes(next, Buffer.from([1, 1, 0, 0]));
  const pieces: Buffer[] = [];
  for (let index = 0; index < STORED.length; index++) {
    const bytes = below(next, 8) === 0 ? chunkInput(next).bytes : STORED[index]!;
    const header = encodeChunkHeader(index, { encoding: 'zstd', bytes });
    if (below(next, 8) === 0) header[below(next, 8)] = pick(next, [0, 1, 2, 3, 4, 127, 255]);
    if (below(next, 24) === 0) header.writeUInt32LE(word(next, bytes.length), 4);
    pieces.push(Buffer.concat([header, bytes]));
  }
  if (below(next, 6) === 0) pieces.splice(below(next, 4), 1);
  if (below(next, 6) === 0) pieces.splice(below(next, 4), 0, pieces[below(next, pieces.length)]!);
  const end = encodeEnd(pieces.length);
  if (below(next, 8) === 0) end.writeUInt32LE(word(next, pieces.length), 4);
  pieces.push(end);
  if (below(next, 8) === 0) {
    const error = encodeError(new GridError('not-found', 'not there'));
    pieces.splice(below(next, pieces.length), 0, below(next, 2) === 0 ? error : mutateWords(next, error, 4));
  }
  return Buffer.concat(pieces);
}
