/** A chunk as it is stored. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { compress, decompress } from '../../src/core/chunk.ts';

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
