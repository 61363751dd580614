/** A chunk as it is stored. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { sha256 } from '../../src/core/bytes.ts';
import { compress, decodeTogether, decompress } from '../../src/core/chunk.ts';
import { KIB } from '../../src/core/limits.ts';

// Guards chunkSize in compressionOf: with zlib's own 16 KiB, 9 bytes of another frame follow at 16,374 bytes.
test('a chunk is one frame, also where that ends with a buffer of zlib', () => {
  for (const bufferBytes of [16, 32, 48, 64].map((kib) => kib * 1024)) {
    // What does not compress is a raw block behind 4 + 1 + 2 + 3 bytes of frame and block header (RFC 8878, 3.1.1).
    const plain = randomBytes(bufferBytes - 10);
    const stored = compress(plain);
    assert.equal(stored.length, bufferBytes);
    assert.ok(decompress(stored, plain.length, 'it').equals(plain));
  }
});

test('neighbours are decoded together, unless any of them is not what it should be', () => {
  const plains = [1, 5000, 16 * KIB, 16 * KIB, 300].map((size) => randomBytes(size));
  const refs = plains.map((plain) => ({ digest: sha256(plain), plainBytes: plain.length }));
  const stored = plains.map((plain) => compress(plain));
  assert.ok(decodeTogether(Buffer.concat(stored), refs)?.equals(Buffer.concat(plains)));
  for (const [index, wrong] of stored.entries()) {
    for (const bad of [wrong.subarray(1), compress(randomBytes(plains[index]!.length)), Buffer.alloc(0)]) {
      assert.equal(decodeTogether(Buffer.concat(stored.with(index, bad)), refs), undefined);
    }
  }
  // Of the right length in all, but the border is elsewhere.
  const moved = refs.with(1, { ...refs[1]!, plainBytes: 4999 }).with(2, { ...refs[2]!, plainBytes: 16385 });
  assert.equal(decodeTogether(Buffer.concat(stored), moved), undefined);
  assert.equal(decodeTogether(Buffer.concat([...stored, compress(Buffer.alloc(1 << 20))]), refs), undefined);
});
