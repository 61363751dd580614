/** The store against the contract of everything that gives chunks, and what only a folder of files can get wrong. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before } from 'node:test';
import { openStore } from '../../src/store/index.ts';
import { chunkSourceSuite, SUITE_FIXTURE } from '../suites/chunk-source.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';
import type { FixtureStore } from '../suites/fixtures.ts';

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-store-source-'));
let fixture: FixtureStore | undefined;

before(async () => {
  fixture = await makeFixtureStore(folder, SUITE_FIXTURE);
});

after(() => rmSync(folder, { recursive: true }));

chunkSourceSuite('store', async () => {
  assert.ok(fixture);
  const source = await openStore(fixture.storeFolder);
  return { source, fixture, close: () => source.close() };
});
