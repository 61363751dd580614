/** Patched chunks: the bits, what a patch makes, and the chunk table that says it. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { sha256 } from '../../src/core/bytes.ts';
import { ChunkTable, encodeChunkTable } from '../../src/core/chunk-table.ts';
import type { NewEntry } from '../../src/core/chunk-table.ts';
import { GridError } from '../../src/core/errors.ts';
import { KIB } from '../../src/core/limits.ts';
import { applyPatch, bitsOf, countOf, patchDigest } from '../../src/core/patch.ts';
import type { Patch } from '../../src/core/patch.ts';

const BLOCK = 4 * KIB;
const CHUNK = 64 * BLOCK;
const digestOf = (text: string) => sha256(Buffer.from(text));
const PACK = { digest: digestOf('pack'), storedBytes: 9000, blocks: 7 };
const patch = (more: Partial<Patch> = {}): Patch => ({
  base: { digest: digestOf('base'), storedBytes: 1000 },
  pack: PACK,
  firstBlock: 2,
  data: 0b1010n | (1n << 63n),
  zero: 1n << 32n,
  ...more,
});

const isBadFormat = (error: unknown) => error instanceof GridError && error.code === 'bad-format';

test('the bits of a mask, all 64 of them', () => {
  assert.deepEqual([...bitsOf(0n)], []);
  assert.deepEqual([...bitsOf(0b1011n)], [0, 1, 3]);
  assert.deepEqual([...bitsOf((1n << 31n) | (1n << 32n) | (1n << 63n))], [31, 32, 63]);
  assert.deepEqual(
    [...bitsOf(2n ** 64n - 1n)],
    Array.from({ length: 64 }, (_, i) => i),
  );
  for (let bit = 0; bit < 64; bit++) {
    const mask = 2n ** 64n - 1n - (1n << BigInt(bit));
    assert.deepEqual([countOf(1n << BigInt(bit)), countOf(mask), [...bitsOf(mask)].length], [1, 63, 63]);
    assert.deepEqual([...bitsOf(1n << BigInt(bit))], [bit]);
  }
});

test('a patch replaces its blocks and no others; beyond the chunk or the pack it is refused', () => {
  const below = randomBytes(CHUNK);
  const pack = randomBytes(7 * BLOCK);
  const plain = Buffer.from(below);
  applyPatch(plain, patch(), pack);
  const wanted = Buffer.from(below);
  for (const [i, block] of [1, 3, 63].entries())
    pack.copy(wanted, block * BLOCK, (2 + i) * BLOCK, (3 + i) * BLOCK);
  wanted.fill(0, 32 * BLOCK, 33 * BLOCK);
  assert.ok(plain.equals(wanted));
  const refused = (part: Partial<Patch>, bytes = CHUNK, packed: Buffer | null = pack) =>
    assert.throws(() => applyPatch(Buffer.alloc(bytes), patch(part), packed ?? undefined), isBadFormat);
  refused({ firstBlock: 5 });
  refused({}, CHUNK - 1);
  refused({ data: 1n }, 32 * BLOCK);
  refused({}, CHUNK, null);
});

test('the name of a patch is another with anything that makes another chunk of it', () => {
  const others: Partial<Patch>[] = [
    { base: { digest: digestOf('other'), storedBytes: 1000 } },
    { pack: { ...PACK, digest: digestOf('other') } },
    { firstBlock: 1 },
    { data: 0b1011n },
    { zero: 0n },
    { pack: undefined, data: 0n },
  ];
  const names = [patch(), ...others.map(patch)].map(patchDigest);
  assert.equal(new Set(names).size, names.length);
  assert.equal(patchDigest(patch({ pack: { ...PACK, storedBytes: 1 } })), names[0]);
});

const ENTRIES: NewEntry[] = [
  { index: 0, digest: digestOf('a'), storedBytes: 10 },
  { index: 1, patch: patch() },
  { index: 5, patch: patch({ firstBlock: 0, data: 1n, zero: 0n }) },
  { index: 6, digest: digestOf('b'), storedBytes: 20 },
  { index: 9, patch: patch({ pack: undefined, firstBlock: 0, data: 0n }) },
];

test('a table gives back what was put into it, and one without patches is what it always was', () => {
  const { bytes, digest } = encodeChunkTable(CHUNK, 12, ENTRIES);
  const table = ChunkTable.parse(bytes, digest);
  assert.equal(bytes.toString('latin1', 0, 8), 'GVFSTAB2');
  assert.deepEqual([table.entryCount, table.patchCount], [5, 3]);
  for (const entry of ENTRIES) {
    const found = table.at(entry.index)!;
    assert.deepEqual(found.patch, entry.patch);
    const name = entry.patch ? patchDigest(entry.patch) : (entry as { digest: string }).digest;
    assert.equal(table.digestOf(entry.index), name);
    assert.equal(
      table.digestPrefixOfEntry(table.entryOf(entry.index)),
      Number.parseInt(name.slice(0, 8), 16),
    );
  }
  assert.equal(table.at(2), undefined);
  assert.equal(table.patchOf(0), undefined);
  assert.equal(table.patchOf(2), undefined);
  assert.equal(table.at(5)!.storedBytes, 1000 + Math.ceil(9000 / 7));
  const objects = [...table.objects()].map((object) => object.digest);
  const [base, pack] = [patch().base.digest, PACK.digest];
  assert.deepEqual(objects, [digestOf('a'), base, base, digestOf('b'), base, pack]);
  assert.deepEqual(encodeChunkTable(CHUNK, 12, [...table.entries()]).bytes, bytes);
  const plain = encodeChunkTable(CHUNK, 12, [ENTRIES[0]!, ENTRIES[3]!]);
  assert.equal(plain.bytes.toString('latin1', 0, 8), 'GVFSTAB1');
});

test('a table whose patches are not what they have to be is refused', () => {
  const { bytes } = encodeChunkTable(CHUNK, 12, ENTRIES);
  const patchesAt = bytes.length - 3 * 28;
  const packAt = patchesAt - 40;
  const u64 = (at: number, value: bigint) => (copy: Buffer) => void copy.writeBigUInt64LE(value, at);
  const u32 = (at: number, value: number) => (copy: Buffer) => void copy.writeUInt32LE(value, at);
  const cases: Record<string, (copy: Buffer) => void> = {
    'more patches than there are': u32(packAt - 4, 4),
    'more packs than there are': u32(packAt - 8, 2),
    'no packs': u32(packAt - 8, 0),
    'a pack of nothing': u32(packAt + 36, 0),
    'a pack over its bound': u32(packAt + 36, 65),
    'a pack of no stored bytes': u32(packAt + 32, 0),
    'a pack of too many stored bytes': u32(packAt + 32, 7 * BLOCK + 4 * KIB + 1),
    'the same entry twice': u32(patchesAt + 28, 1),
    'an entry that is not there': u32(patchesAt + 56, 5),
    'a pack that is not there': u32(patchesAt + 4, 2),
    'data without a pack': u32(patchesAt + 4, 0),
    'a pack without data': u32(patchesAt + 56 + 4, 1),
    'blocks beyond the pack': u32(patchesAt + 8, 5),
    'a block that is data and zeros': u64(patchesAt + 20, 0b10n),
    'nothing at all': u64(patchesAt + 56 + 20, 0n),
    'a chunk below of no bytes': u32(24 + 3 * 8 + 36 + 32, 0),
  };
  for (const [what, change] of Object.entries(cases)) {
    const copy = Buffer.from(bytes);
    change(copy);
    assert.throws(() => ChunkTable.parse(copy, sha256(copy)), isBadFormat, what);
  }
  for (const cut of [1, 28, 28 * 3 + 40, 28 * 3 + 48, 28 * 3 + 49]) {
    const copy = bytes.subarray(0, bytes.length - cut);
    assert.throws(() => ChunkTable.parse(copy, sha256(copy)), isBadFormat, `cut by ${cut}`);
  }
  // Blocks beyond a smaller chunk, and chunks that a mask does not cover.
  const small = encodeChunkTable(4 * BLOCK, 12, [{ index: 0, patch: patch({ data: 1n << 3n, zero: 0n }) }]);
  assert.equal(ChunkTable.parse(small.bytes, small.digest).patchCount, 1);
  for (const blocks of [4, 16, 31, 32, 33, 63, 64]) {
    const last = [{ index: 0, patch: patch({ data: 1n << BigInt(blocks - 1), zero: 0n }) }];
    const fits = encodeChunkTable(blocks * BLOCK, 12, last);
    assert.equal(ChunkTable.parse(fits.bytes, fits.digest).patchCount, 1, `${blocks} blocks`);
  }
  for (const [chunkBytes, data] of [
    ...[4, 16, 31, 32, 33, 63].map((blocks): [number, bigint] => [blocks * BLOCK, 1n << BigInt(blocks)]),
    [32 * BLOCK, 1n << 63n],
    [2 * CHUNK, 1n],
  ] as const) {
    const wrong = encodeChunkTable(chunkBytes, 12, [{ index: 0, patch: patch({ data, zero: 0n }) }]);
    assert.throws(() => ChunkTable.parse(wrong.bytes, wrong.digest), isBadFormat);
  }
});
