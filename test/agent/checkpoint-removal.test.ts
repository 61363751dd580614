/** What keeps a checkpoint's names: whatever on this host goes on from it, a store that takes nothing, and other hosts. */
import assert from 'node:assert/strict';
import { beforeEach, test } from 'node:test';
import { removeCheckpoint } from '../../src/agent/checkpoint-removal.ts';
import type { RemovalParts } from '../../src/agent/checkpoint-removal.ts';
import type { CloneRecord } from '../../src/agent/clone-record.ts';
import type { VmRecord } from '../../src/agent/vm-record.ts';
import type { Digest } from '../../src/core/bytes.ts';
import { encodeManifest, parseManifest } from '../../src/core/manifest.ts';
import type { Manifest } from '../../src/core/manifest.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { encodeChunkTable } from '../../src/core/chunk-table.ts';
import { compress } from '../../src/core/chunk.ts';
import type { Store } from '../../src/store/index.ts';
import { newStore, testFolder } from '../store/helpers.ts';

const CHUNK = 16 * 1024;
const folder = testFolder('removal');
const plain = Buffer.alloc(CHUNK, 'a');
const chunk = { digest: sha256(plain), plainBytes: CHUNK, stored: compress(plain) };

let store: Store;
let of: Record<'memory' | 'disk' | 'state', Digest>;
let vms: VmRecord[];
let clones: CloneRecord[];
/** What this host tells the store that it needs. */
let settle: () => Promise<void>;

async function put(name: string, kind: Manifest['kind'], chunks: number, parts = {}): Promise<Digest> {
  const entries = Array.from({ length: chunks }, (_, index) => ({
    index,
    digest: chunk.digest,
    storedBytes: chunk.stored.length,
  }));
  const table = encodeChunkTable(CHUNK, chunks, entries);
  const { bytes, digest } = encodeManifest({
    ...{ schema: 1, kind, sizeBytes: chunks * CHUNK, chunkBytes: CHUNK, table: table.digest },
    ...{ nonzeroBytes: chunks * CHUNK, labels: {}, parts, created: '2026-01-01T00:00:00.000Z' },
  });
  await store.uploads.putImage({ manifest: bytes, table: compress(table.bytes), name, version: '1' });
  return digest;
}

beforeEach(async () => {
  store = await newStore(folder);
  await store.uploads.putChunks([chunk]);
  const disk = await put('web.disk', 'disk', 1);
  const state = await put('web.state', 'state', 2);
  of = { disk, state, memory: await put('web', 'memory', 3, { disk, state }) };
  [vms, clones, settle] = [[], [], async () => {}];
});

const remove = (reference = 'web:1', source: RemovalParts['source'] = store) =>
  removeCheckpoint(
    {
      catalog: {
        async resolve(wanted) {
          const { manifest: digest } = await store.resolve(wanted);
          const manifest = parseManifest(await store.readManifest(digest), digest);
          return { digest, manifest, folder: '' };
        },
      },
      machines: { records: () => vms },
      clones: { records: () => clones },
      settle: () => settle(),
      source,
    },
    reference,
  );
const names = async () => (await store.listTags()).map(({ name }) => name).toSorted();

async function refuses(code: string, message: RegExp, ...args: Parameters<typeof remove>): Promise<void> {
  await assert.rejects(remove(...args), { code, message });
  assert.deepEqual(await names(), ['web', 'web.disk', 'web.state'], 'a refusal takes nothing away');
}

// Of records only what is looked at.
const vm = (id: string, image: Digest) => ({ id, memory: { image } }) as VmRecord;
const clone = (id: string, base: Digest, more: object = {}) => ({ id, base, ...more }) as CloneRecord;

test('a VM that has the memory of it keeps it', async () => {
  // Fails without the loop over machines in usersOf.
  vms = [vm('fork-1', of.memory), vm('stranger', of.state)];
  await refuses('in-use', /^web:1 is needed here by VM 'fork-1', VM 'stranger'; stop or remove them first$/);
});

test('a clone over its disk keeps it, as what it is or as its VM’s, once; one that was filled does not', async () => {
  // Fails without the loop over clones in usersOf.
  clones = [
    clone('mine', of.disk),
    clone('fork-1-disk', of.disk, { vm: 'fork-1' }),
    clone('fork-1-more', of.disk, { vm: 'fork-1' }),
    clone('other', chunk.digest),
  ];
  await refuses('in-use', /needed here by clone 'mine', VM 'fork-1'; stop/);
  // It needs nothing of its base any more. Fails without `detached === undefined`.
  clones = [clone('full', of.disk, { detached: of.disk })];
  assert.deepEqual((await remove()).removed.toSorted(), ['web.disk:1', 'web.state:1', 'web:1']);
});

test('what is no checkpoint, and what is not there, is not taken for one', async () => {
  clones = [clone('mine', of.disk)];
  // Fails without the look at `manifest.kind`: it would be said to be in use, as if it could be removed otherwise.
  await refuses('bad-request', /web\.disk:1 is no checkpoint but of kind 'disk'/, 'web.disk:1');
  await refuses('not-found', /nothing:1/, 'nothing:1');
});

test('a store that takes no uploads is left alone, and said so', async () => {
  // Fails without the look at `uploads`.
  await refuses(
    'denied',
    /^a static server takes no uploads, so nothing can be removed from here$/,
    'web:1',
    {
      name: 'a static server',
    },
  );
});

test('the store hears first what this host needs, and what another host holds it keeps', async () => {
  // Fails without `settle`: the hold of a clone that was removed a moment ago would still be there, or a new one not yet.
  await store.hold('this-host', [of.disk]);
  settle = () => store.hold('this-host', []);
  await store.hold('host-b', [of.memory]);
  await refuses('in-use', /VMs or clones of host-b lie on web:1/);
  await store.hold('host-b', []);
  await remove();
  assert.deepEqual(await names(), []);
});

test('a checkpoint that went meanwhile is not said to be removed', async () => {
  settle = async () => void (await store.uploads.removeCheckpoint('web', '1'));
  // Fails without the look at what was removed.
  await assert.rejects(remove(), { code: 'not-found', message: /^web:1 is no longer in / });
});
