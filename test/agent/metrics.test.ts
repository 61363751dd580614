/** The figures of a host's proxy as a scraper sees them, and what its health says. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ProxyMetrics, healthOf, listenMetrics } from '../../src/agent/metrics.ts';
import type { StatusForMetrics } from '../../src/agent/metrics.ts';
import { LATENCY_BUCKETS_SECONDS } from '../../src/core/usage.ts';
import { GridError } from '../../src/core/errors.ts';
import type { ChunkSource } from '../../src/core/source.ts';

const STATUS: StatusForMetrics = {
  vms: 2,
  clones: 3,
  cache: {
    usedBytes: 1000,
    quotaBytes: 5000,
    presentBytes: 900,
    images: [{ touchedChunks: 10 }, { touchedChunks: 5 }],
    corruptChunks: 1,
    droppedImages: 0,
    fetchedChunks: 7,
    fetchedPlainBytes: 700,
    fetchedStoredBytes: 300,
    refetchedChunks: 0,
    missedChunks: 4,
    prefetchedChunks: 3,
    prefetchedBytes: 333,
    prefetchedUsedChunks: 2,
    savedChunks: 0,
    savedBytes: 0,
    evictedChunks: 6,
    inFlightChunks: 1,
    tags: { ageMs: 1500 },
  },
  mount: {
    directReads: 100,
    directReadBytes: 409_600,
    directWrites: 0,
    directWriteBytes: 0,
    forwarded: 12,
    failures: 0,
    interrupted: 0,
    openFiles: 1,
    inFlight: 2,
    operations: [
      {
        operation: 'read',
        answeredBy: 'worker',
        seconds: 0.5,
        buckets: [3, 2, ...Array.from({ length: LATENCY_BUCKETS_SECONDS.length - 2 }, () => 0), 1],
      },
    ],
  },
  sources: [
    { name: 'ssh://one/store', down: 'it did not answer', bytesReceived: 300, failovers: 2 },
    { name: 'ssh://two/store', bytesReceived: 50, chunksReceived: 1 },
  ],
};

const TIMES = 'gridvfs_mount_request_duration_seconds';
const READS = 'operation="read",answered_by="worker"';

/** `name{labels} value` of each line that is no comment. */
function samples(text: string): Map<string, number> {
  const found = new Map<string, number>();
  for (const line of text.split('\n')) {
    if (line === '' || line.startsWith('#')) continue;
    const match = /^([a-z_]+(?:\{[^}]*\})?) (\S+)$/.exec(line);
    assert.ok(match, `not a sample: ${line}`);
    assert.ok(!found.has(match[1]!), `twice: ${line}`);
    found.set(match[1]!, Number(match[2]));
  }
  return found;
}

test('every figure is there once, with base units and the prefix', async () => {
  const text = await new ProxyMetrics().text(STATUS);
  const found = samples(text);
  for (const [name, value] of Object.entries({
    gridvfs_vms: 2,
    gridvfs_cache_hit_chunks_total: 11,
    gridvfs_cache_missed_chunks_total: 4,
    gridvfs_cache_fetched_bytes_total: 300,
    gridvfs_cache_prefetched_used_chunks_total: 2,
    gridvfs_cache_evicted_chunks_total: 6,
    gridvfs_cache_corrupt_chunks_total: 1,
    gridvfs_cache_in_flight_chunks: 1,
    gridvfs_cache_quota_bytes: 5000,
    gridvfs_cache_degraded: 0,
    gridvfs_cache_tags_age_seconds: 1.5,
    'gridvfs_mount_direct_requests_total{operation="read"}': 100,
    gridvfs_mount_in_flight: 2,
    [`${TIMES}_bucket{${READS},le="0.00001"}`]: 3,
    [`${TIMES}_bucket{${READS},le="60"}`]: 5,
    [`${TIMES}_bucket{${READS},le="+Inf"}`]: 6,
    [`${TIMES}_count{${READS}}`]: 6,
    [`${TIMES}_sum{${READS}}`]: 0.5,
    'gridvfs_source_up{source="ssh://one/store"}': 0,
    'gridvfs_source_up{source="ssh://two/store"}': 1,
    'gridvfs_source_received_bytes_total{source="ssh://one/store"}': 300,
    'gridvfs_source_failovers_total{source="ssh://one/store"}': 2,
  })) {
    assert.equal(found.get(name), value, name);
  }
  for (const name of found.keys()) assert.match(name, /^gridvfs_/);
  assert.doesNotMatch(text, /NaN|undefined/);
});

test('calls to the source are timed by priority; what it lacks stays missing', async () => {
  const metrics = new ProxyMetrics();
  const source: ChunkSource = {
    name: 'bare',
    listTags: () => Promise.resolve([]),
    readManifest: () => Promise.reject(new GridError('not-found', 'no')),
    readTable: () => Promise.reject(new GridError('not-found', 'no')),
    readChunks: (refs) =>
      refs.length > 0 ? Promise.resolve() : Promise.reject(new GridError('bad-request', 'none')),
    close: () => Promise.resolve(),
  };
  const timed = metrics.timed(source);
  assert.ok(!('readProfile' in timed) && !('reportCorrupt' in timed));
  const ref = { digest: 'ab'.repeat(32), plainBytes: 4096 };
  await timed.readChunks([ref], { priority: 'demand' }, () => {});
  await assert.rejects(timed.readChunks([], { priority: 'prefetch' }, () => {}));
  const found = samples(await metrics.text(STATUS));
  const count = 'gridvfs_source_read_duration_seconds_count';
  assert.equal(found.get(`${count}{priority="demand"}`), 1);
  assert.equal(found.get(`${count}{priority="prefetch"}`), undefined);
});

test('health says why it is degraded', () => {
  const two = healthOf(STATUS);
  assert.deepEqual(two, { status: 'degraded', reasons: ['ssh://one/store: it did not answer'] });
  const healthy = { ...STATUS, sources: [STATUS.sources[1]!] };
  assert.deepEqual(healthOf(healthy), { status: 'ok', reasons: [] });
  const full = healthOf({ ...healthy, cache: { ...STATUS.cache, degraded: 'the disk is full' } });
  assert.deepEqual(full, { status: 'degraded', reasons: ['the disk is full'] });
});

test('a listener of its own serves both, and an address in use is said', async () => {
  const metrics = new ProxyMetrics();
  const status = () => Promise.resolve(STATUS);
  const listener = await listenMetrics({ host: '127.0.0.1', port: 0 }, metrics, status);
  try {
    const url = `http://127.0.0.1:${listener.port}`;
    const scraped = await fetch(`${url}/metrics`);
    assert.match(scraped.headers.get('content-type')!, /^text\/plain; version=0\.0\.4/);
    assert.equal(samples(await scraped.text()).get('gridvfs_clones'), 3);
    assert.equal(((await (await fetch(`${url}/healthz`)).json()) as { status: string }).status, 'degraded');
    assert.equal((await fetch(`${url}/v1/status`)).status, 404);
    await assert.rejects(
      listenMetrics({ host: '127.0.0.1', port: listener.port }, metrics, status),
      (error: unknown) => error instanceof GridError && error.message.includes(String(listener.port)),
    );
  } finally {
    await listener.close();
  }
});
