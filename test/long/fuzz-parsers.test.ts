/**
 * Every parser of what comes from outside, under fuzz: whatever the bytes, the answer is a value that keeps the
 * format's invariants or a GridError; it comes at once, and without more memory than the input may ask for.
 *
 * `npm test` runs 20,000 inputs, GRIDVFS_LONG=1 two million (some minutes), from a seed that a failure names:
 * GRIDVFS_SEED=… repeats it. At least half of the inputs get past magic, length and syntax; the test counts them.
 */
import assert from 'node:assert/strict';
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { getHeapStatistics } from 'node:v8';
import xxhash from 'xxhash-wasm';
import { closeFiles, createFiles, openFiles, scanRecords } from '../../cache/map-file.ts';
import type { ImageShape } from '../../cache/map-file.ts';
import { FrameReader, parseBatchRequest, remoteError } from '../../proxy/protocol.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { ChunkTable, encodeChunkTable } from '../../src/core/chunk-table.ts';
import { decodeChunk } from '../../src/core/chunk.ts';
import { GridError } from '../../src/core/errors.ts';
import { MIB, PROFILE_CHUNKS_MAX } from '../../src/core/limits.ts';
import { encodeManifest, isName, parseManifest, parseTags } from '../../src/core/manifest.ts';
import { encodeProfile, parseProfile } from '../../src/core/profile.ts';
import { randomBuffer, randomNumbers } from '../suites/fixtures.ts';
import {
  BATCH_REFS,
  chunkInput,
  DIGEST,
  framesInput,
  manifestInput,
  profileInput,
  requestInput,
  tableInput,
  tagsInput,
} from './parser-inputs.ts';
import type { Next } from './parser-inputs.ts';

const IS_LONG = process.env['GRIDVFS_LONG'] === '1';
const INPUTS = IS_LONG ? 2_000_000 : 20_000;
const SEED = Number(process.env['GRIDVFS_SEED'] ?? (IS_LONG ? Date.now() % 1_000_000 : 1));
/** Of one input: the largest list that a profile may name takes half of it. */
const ALLOCATED_BYTES_MAX = 64 * MIB;
/** Of one input; the machine may be busy. */
const MILLISECONDS_MAX = 2000;

interface Subject {
  /** Of 100 inputs. */
  readonly share: number;
  /** Makes one input and parses it: throws what the parser throws, asserts on what it returns. `keep` gets the bytes. */
  readonly run: (next: Next, keep: (bytes: Buffer) => void) => void;
  /** What is refused before anything of the content was looked at. */
  readonly shallow: RegExp;
  /** Different refusals, at least: that the inputs get everywhere. */
  readonly refusals: number;
  /** Some inputs are whole. */
  readonly accepts: boolean;
}

const SYNTAX = /is not JSON|size bound|is not an object|is not a tag list|not an object/;

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-fuzz-'));
after(() => rmSync(folder, { recursive: true, force: true }));
const SHAPE: ImageShape = { manifestDigest: DIGEST, sizeBytes: 1 << 20, chunkBytes: 4096, count: 256 };
const MAP_FOLDER = path.join(folder, DIGEST);
closeFiles(createFiles(MAP_FOLDER, SHAPE));
const hasher = await xxhash();

/** The files of an image as another program, a crash or a bad disk may have left them. */
function runMap(next: Next, keep: (bytes: Buffer) => void): void {
  const map = openSync(path.join(MAP_FOLDER, 'map'), 'r+');
  const data = openSync(path.join(MAP_FOLDER, 'data'), 'r+');
  try {
    const bytes = Buffer.alloc(4096 + 8 * SHAPE.count);
    bytes.write('GVFSMAP1');
    bytes.writeUInt32LE(SHAPE.chunkBytes, 8);
    bytes.writeUInt32LE(SHAPE.count, 12);
    bytes.writeBigUInt64LE(BigInt(SHAPE.sizeBytes), 16);
    bytes.write(DIGEST, 24, 32, 'hex');
    const kind = next() % 4;
    if (kind === 1) bytes[next() % 56]! ^= 1 << (next() % 8);
    bytes.writeBigUInt64LE(hasher.h64Raw(bytes.subarray(0, 56)), 56);
    if (kind === 2) bytes[56 + (next() % 4040)]! ^= 1 << (next() % 8);
    for (let i = next() % 20; i > 0; i--)
      randomBuffer(next, 24).copy(bytes, 4096 + (next() % (8 * SHAPE.count)));
    keep(bytes);
    const cut = next() % 8;
    ftruncateSync(map, cut === 0 ? next() % bytes.length : bytes.length);
    ftruncateSync(data, cut === 1 ? next() % (2 * SHAPE.sizeBytes) : SHAPE.sizeBytes);
    writeSync(map, bytes, 0, cut === 0 ? 0 : bytes.length, 0);
  } finally {
    closeSync(map);
    closeSync(data);
  }
  const files = openFiles(MAP_FOLDER, SHAPE);
  assert.ok(files);
  try {
    let last = -1;
    scanRecords(files.mapFd, SHAPE.count, (index) => {
      assert.ok(index > last && index < SHAPE.count);
      last = index;
    });
  } finally {
    closeFiles(files);
  }
}

function runFrames(next: Next, keep: (bytes: Buffer) => void): void {
  const bytes = framesInput(next);
  keep(bytes);
  const delivered = new Set<number>();
  const reader = new FrameReader(BATCH_REFS, 'the fuzz', (index, chunk) => {
    assert.ok(!delivered.has(index) && BATCH_REFS[index]);
    delivered.add(index);
    try {
      assert.equal(sha256(decodeChunk(chunk, BATCH_REFS[index])), BATCH_REFS[index].digest);
    } catch (error) {
      assert.ok(error instanceof GridError && error.code === 'corrupt');
    }
  });
  for (let at = 0; at < bytes.length;) {
    const take = next() % 3 === 0 ? 1 + (next() % 9) : 1 + (next() % 9000);
    reader.push(bytes.subarray(at, at + take));
    at += take;
  }
  if (!reader.ended) throw new GridError('tunnel-lost', 'the stream was cut');
  assert.equal(delivered.size, BATCH_REFS.length);
}

const SUBJECTS: Record<string, Subject> = {
  'chunk table': {
    share: 20,
    shallow: /bytes long|wrong magic|another version|wrong length/,
    refusals: 7,
    accepts: true,
    run: (next, keep) => {
      const bytes = tableInput(next);
      keep(bytes);
      const table = ChunkTable.parse(bytes, sha256(bytes));
      const entries = [...table.entries()];
      assert.equal(entries.length, table.entryCount);
      for (const { index, digest } of entries) assert.equal(table.digestOf(index), digest);
      const again = encodeChunkTable(table.chunkBytes, table.count, entries);
      // What touches may have been written as two extents; read, it is the same.
      assert.ok(again.bytes.length <= bytes.length);
    },
  },
  manifest: {
    share: 16,
    shallow: SYNTAX,
    refusals: 14,
    accepts: true,
    run: (next, keep) => {
      const bytes = manifestInput(next);
      keep(bytes);
      const manifest = parseManifest(bytes, sha256(bytes));
      for (const name of Object.keys(manifest.parts)) assert.ok(isName(name));
      const again = encodeManifest(manifest);
      assert.deepEqual(parseManifest(again.bytes, again.digest), manifest);
    },
  },
  tags: {
    share: 14,
    shallow: SYNTAX,
    refusals: 4,
    accepts: true,
    run: (next, keep) => {
      const bytes = tagsInput(next);
      keep(bytes);
      for (const { name, version, manifest } of parseTags(bytes, 'tags'))
        assert.ok(isName(name) && isName(version) && /^[0-9a-f]{64}$/.test(manifest));
    },
  },
  profile: {
    share: 16,
    shallow: SYNTAX,
    refusals: 9,
    accepts: true,
    run: (next, keep) => {
      const bytes = profileInput(next);
      keep(bytes);
      const chunkCount = [0, 50, 200, 2 ** 32 - 1][next() % 4]!;
      const profile = parseProfile(bytes, { manifest: DIGEST, purpose: 'boot', chunkCount });
      const all = [...profile.early, ...profile.late];
      assert.ok(all.length <= PROFILE_CHUNKS_MAX && new Set(all).size === all.length);
      assert.ok(all.every((index) => Number.isSafeInteger(index) && index >= 0 && index < chunkCount));
      assert.ok(encodeProfile(profile).length <= bytes.length + 200);
    },
  },
  'batch request': {
    share: 10,
    shallow: /does not start with|wrong length/,
    refusals: 4,
    accepts: true,
    run: (next, keep) => {
      const bytes = requestInput(next);
      keep(bytes);
      const { refs } = parseBatchRequest(bytes);
      assert.ok(refs.length >= 1 && bytes.length === 8 + 36 * refs.length);
    },
  },
  'batch frames': {
    share: 12,
    shallow: /malformed frame/,
    refusals: 6,
    accepts: true,
    run: runFrames,
  },
  chunk: {
    share: 6,
    shallow: /over its bound/,
    refusals: 2,
    accepts: true,
    run: (next, keep) => {
      const { index, bytes } = chunkInput(next);
      keep(bytes);
      const plain = decodeChunk({ encoding: next() % 8 === 0 ? 'plain' : 'zstd', bytes }, BATCH_REFS[index]!);
      assert.equal(sha256(plain), BATCH_REFS[index]!.digest);
    },
  },
  'error body': {
    share: 2,
    shallow: /^$/,
    refusals: 3,
    accepts: false,
    run: (next, keep) => {
      const bytes = tagsInput(next);
      keep(bytes);
      throw remoteError(bytes, [200, 302, 401, 404, 500, 599][next() % 6]!, 'the fuzz');
    },
  },
  'cache map': {
    share: 4,
    shallow: /lacks one of/,
    refusals: 3,
    accepts: true,
    run: runMap,
  },
};

assert.equal(
  Object.values(SUBJECTS).reduce((sum, { share }) => sum + share, 0),
  100,
);

function bytesInUse(): number {
  const { used_heap_size: heap, external_memory: external } = getHeapStatistics();
  return heap + external;
}

interface Tally {
  inputs: number;
  deep: number;
  accepted: number;
  readonly refusals: Set<string>;
}

/** One subject for `count` inputs; throws with the seed and the input on the first that is not as it must be. */
function fuzz(name: string, { run, shallow }: Subject, count: number): Tally {
  const tally: Tally = { inputs: count, deep: 0, accepted: 0, refusals: new Set() };
  const next = randomNumbers(SEED + Object.keys(SUBJECTS).indexOf(name) * 7919);
  let input: Buffer = Buffer.alloc(0);
  const keep = (bytes: Buffer) => (input = bytes);
  for (let i = 0; i < count; i++) {
    const before = bytesInUse();
    const startMs = performance.now();
    let failure: unknown;
    try {
      run(next, keep);
      tally.accepted++;
      tally.deep++;
    } catch (error) {
      if (error instanceof GridError && error.code !== 'bug') {
        if (!shallow.test(error.message)) tally.deep++;
        tally.refusals.add(error.message.replaceAll(/[0-9a-f]{12,}|\d+|'[^']{16,}'/g, '#').slice(0, 120));
      } else {
        failure = error;
      }
    }
    const grownBytes = bytesInUse() - before;
    const tookMs = performance.now() - startMs;
    if (grownBytes > ALLOCATED_BYTES_MAX) failure ??= new Error(`took ${grownBytes} bytes of memory`);
    if (tookMs > MILLISECONDS_MAX) failure ??= new Error(`took ${tookMs} ms`);
    if (failure === undefined) continue;
    throw new Error(
      `${name}, input ${i} of seed ${SEED} (${input.length} bytes): ${input.toString('latin1').slice(0, 500)}`,
      { cause: failure },
    );
  }
  return tally;
}

let total = 0;
let deep = 0;
for (const [name, subject] of Object.entries(SUBJECTS)) {
  test(`${name}: whatever the bytes, a value that keeps the invariants or a GridError`, (t) => {
    const tally = fuzz(name, subject, (INPUTS * subject.share) / 100);
    total += tally.inputs;
    deep += tally.deep;
    const { inputs, accepted, refusals } = tally;
    t.diagnostic(
      `${inputs} inputs, ${tally.deep} past the first checks, ${accepted} accepted, ${refusals.size} reasons`,
    );
    assert.ok(refusals.size >= subject.refusals, [...refusals].join('\n'));
    assert.equal(accepted > 0, subject.accepts);
  });
}

test('at least half of the inputs got past magic, length and syntax', (t) => {
  t.diagnostic(`${deep} of ${total}, seed ${SEED}`);
  assert.equal(total, INPUTS);
  assert.ok(deep >= total / 2, `${deep} of ${total}`);
});
