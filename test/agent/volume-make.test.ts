/** A new volume of an image or of another volume is that one, and zeros behind its end. */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openCache } from '../../cache/index.ts';
import { volumeWork } from '../../src/cli/vm-parts.ts';
import { KIB, MIB } from '../../src/core/limits.ts';
import { openStore } from '../../src/store/index.ts';
import { readBack } from '../store/helpers.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-volume-'));
after(() => rmSync(folder, { recursive: true }));

// Fails where `read` of `make` gives nothing: what the memory held before is the last chunk then.
test('a volume that is larger than what it is made of, whose last chunk is short, has all of it', async () => {
  const fixture = await makeFixtureStore(folder, { sizeBytes: MIB + 44 * KIB, seed: 8, kind: 'data' });
  const store = await openStore(fixture.storeFolder);
  const cache = await openCache({ folder: path.join(folder, 'cache'), source: store });
  try {
    const content = readFileSync(fixture.rawPath);
    assert.ok(!content.subarray(MIB).every((byte) => byte === 0), 'the short chunk holds data');
    for (const more of [0, 8 * KIB, 3 * MIB]) {
      const sizeBytes = content.length + more;
      const { digest } = await volumeWork(cache, store).make({
        reference: `volume:${more}`,
        sizeBytes,
        from: { digest: fixture.digest },
      });
      assert.ok(
        (await readBack(store, digest)).equals(Buffer.concat([content, Buffer.alloc(more)])),
        `${more}`,
      );
    }
    assert.equal(
      (await volumeWork(cache, store).make({ reference: 'empty:1', sizeBytes: MIB })).digest.length,
      64,
    );
  } finally {
    await cache.close();
    await store.close();
  }
});
