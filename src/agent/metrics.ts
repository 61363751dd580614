/**
 * The figures of a host's proxy as Prometheus text, and its health. Nothing is counted here but the times of calls
 * to the source: all else is read from the status when somebody scrapes. Base units, prefix `gridvfs_`; the only
 * labels are the sources' names, priorities, the mount's operations and who answered them.
 */
import fastify from 'fastify';
import type { FastifyInstance } from 'fastify';
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import { asGridError } from '../core/errors.ts';
import type { ChunkSource } from '../core/source.ts';
import { LATENCY_BUCKETS_SECONDS } from '../core/usage.ts';
import type { OperationFigures } from '../core/usage.ts';

/** What is needed of the proxy's status; every figure counts since its start. */
export interface StatusForMetrics {
  readonly vms: number;
  readonly clones: number;
  readonly cache: {
    readonly usedBytes: number;
    readonly quotaBytes?: number;
    readonly presentBytes: number;
    readonly degraded?: string;
    readonly tags?: { readonly ageMs: number; readonly stale?: string };
    readonly images: readonly { readonly touchedChunks: number }[];
    readonly corruptChunks: number;
    readonly droppedImages: number;
    readonly fetchedChunks: number;
    readonly fetchedPlainBytes: number;
    readonly fetchedStoredBytes: number;
    readonly refetchedChunks: number;
    readonly missedChunks: number;
    readonly prefetchedChunks: number;
    readonly prefetchedBytes: number;
    readonly prefetchedUsedChunks: number;
    readonly savedChunks: number;
    readonly savedBytes: number;
    readonly evictedChunks: number;
    readonly inFlightChunks: number;
  };
  readonly mount: {
    readonly directReads: number;
    readonly directReadBytes: number;
    readonly directWrites: number;
    readonly directWriteBytes: number;
    readonly forwarded: number;
    readonly failures: number;
    readonly interrupted: number;
    readonly openFiles: number;
    readonly inFlight: number;
    readonly operations: readonly OperationFigures[];
  };
  readonly sources: readonly SourceForMetrics[];
}

export interface SourceForMetrics {
  readonly name: string;
  /** Why it is not asked now. */
  readonly down?: string;
  readonly roundTrips?: number;
  readonly chunksReceived?: number;
  readonly bytesReceived?: number;
  readonly reconnects?: number;
  readonly corruptChunks?: number;
  readonly failovers?: number;
}

export interface Health {
  readonly status: 'ok' | 'degraded';
  /** Why, one sentence each. */
  readonly reasons: readonly string[];
}

/** From a near source to one that a cut of a minute was waited for. */
const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120];

type Cache = StatusForMetrics['cache'];
type Mount = StatusForMetrics['mount'];

const touched = (cache: Cache) => cache.images.reduce((sum, image) => sum + image.touchedChunks, 0);

const CACHE_COUNTERS: Record<string, [help: string, of: (cache: Cache) => number]> = {
  hit_chunks: [
    'Distinct chunks read that were here when they were first asked for.',
    (cache) => Math.max(0, touched(cache) - cache.missedChunks),
  ],
  missed_chunks: ['Chunks that a reader had to wait for.', (cache) => cache.missedChunks],
  fetched_chunks: ['Chunks that came from a source and were right.', (cache) => cache.fetchedChunks],
  fetched_bytes: ['Their bytes as stored.', (cache) => cache.fetchedStoredBytes],
  fetched_plain_bytes: ['Their bytes as read.', (cache) => cache.fetchedPlainBytes],
  prefetched_chunks: ['Chunks fetched before anybody asked.', (cache) => cache.prefetchedChunks],
  prefetched_plain_bytes: ['Their bytes as read.', (cache) => cache.prefetchedBytes],
  prefetched_used_chunks: ['Prefetched chunks that were read later.', (cache) => cache.prefetchedUsedChunks],
  saved_chunks: ['Chunks copied from another image here, not fetched.', (cache) => cache.savedChunks],
  saved_plain_bytes: ['Their bytes as read.', (cache) => cache.savedBytes],
  evicted_chunks: ['Chunks given up to stay within the quota.', (cache) => cache.evictedChunks],
  corrupt_chunks: ['Chunks that came and did not match their digest.', (cache) => cache.corruptChunks],
  refetched_chunks: ['Chunks found damaged on this disk and made right.', (cache) => cache.refetchedChunks],
  dropped_images: ['Images whose files were damaged and thrown away.', (cache) => cache.droppedImages],
};

const CACHE_GAUGES: Record<string, [help: string, of: (cache: Cache) => number]> = {
  used_bytes: ['What the cache folder takes on disk.', (cache) => cache.usedBytes],
  present_plain_bytes: ['Bytes of images that are here.', (cache) => cache.presentBytes],
  in_flight_chunks: ['Chunks asked of a source and not here yet.', (cache) => cache.inFlightChunks],
  degraded: ['1 while chunks are not being stored.', (cache) => (cache.degraded === undefined ? 0 : 1)],
};

const MOUNT_COUNTERS: Record<string, [help: string, of: (mount: Mount) => number]> = {
  forwarded: ['Requests that the workers handed to the main thread.', (mount) => mount.forwarded],
  failures: [
    "Forwarded requests that failed for another reason than the caller's.",
    (mount) => mount.failures,
  ],
  interrupted: ['Requests given up because who waited was killed.', (mount) => mount.interrupted],
};

const SOURCE_COUNTERS: Record<string, [help: string, of: (source: SourceForMetrics) => number | undefined]> =
  {
    received_bytes: ['Bodies of answers, as they travel.', (source) => source.bytesReceived],
    received_chunks: ['Chunks received.', (source) => source.chunksReceived],
    round_trips: ['Exchanges with the source.', (source) => source.roundTrips],
    reconnects: ['Times its way was made again.', (source) => source.reconnects],
    corrupt_chunks: ['Chunks it sent that did not decode.', (source) => source.corruptChunks],
    failovers: ['Questions that another source had to answer for it.', (source) => source.failovers],
  };

export class ProxyMetrics {
  readonly #registry = new Registry();
  readonly #seconds: Histogram<'priority'>;

  constructor() {
    this.#seconds = new Histogram({
      name: 'gridvfs_source_read_duration_seconds',
      help: 'Calls for chunks, from the request to the last chunk, waits for a broken way included.',
      labelNames: ['priority'],
      buckets: SECONDS,
      registers: [this.#registry],
    });
  }

  /** `source`, with its calls timed. The methods that it lacks stay missing. */
  timed(source: ChunkSource): ChunkSource {
    return {
      name: source.name,
      listTags: () => source.listTags(),
      readManifest: (digest) => source.readManifest(digest),
      readTable: (digest) => source.readTable(digest),
      readChunks: async (refs, options, deliver) => {
        const end = this.#seconds.startTimer({ priority: options.priority });
        await source.readChunks(refs, options, deliver);
        end(); // what failed has no duration worth a bucket; failures are counted where they are known
      },
      ...(source.readProfile ? { readProfile: source.readProfile.bind(source) } : {}),
      ...(source.recordProfile ? { recordProfile: source.recordProfile.bind(source) } : {}),
      ...(source.hold ? { hold: source.hold.bind(source) } : {}),
      ...(source.reportCorrupt ? { reportCorrupt: source.reportCorrupt.bind(source) } : {}),
      ...(source.way ? { way: source.way.bind(source) } : {}),
      close: () => source.close(),
    };
  }

  /** The text for a scrape. */
  async text(status: StatusForMetrics): Promise<string> {
    const registry = new Registry();
    const registers = [registry];
    const counter = (name: string, help: string, value: number) =>
      new Counter({ name: `gridvfs_${name}_total`, help, registers }).inc(value);
    const gauge = (name: string, help: string, value: number) =>
      new Gauge({ name: `gridvfs_${name}`, help, registers }).set(value);
    const { cache, mount, sources } = status;
    gauge('vms', 'Virtual machines that run here.', status.vms);
    gauge('clones', 'Clones on this host.', status.clones);
    gauge('process_resident_memory_bytes', 'Resident memory of this process.', process.memoryUsage.rss());
    for (const [name, [help, of]] of Object.entries(CACHE_COUNTERS))
      counter(`cache_${name}`, help, of(cache));
    for (const [name, [help, of]] of Object.entries(CACHE_GAUGES)) gauge(`cache_${name}`, help, of(cache));
    if (cache.quotaBytes !== undefined) {
      gauge('cache_quota_bytes', 'Most that the cache folder may take.', cache.quotaBytes);
    }
    if (cache.tags) {
      gauge('cache_tags_age_seconds', 'Since the tags were last heard.', cache.tags.ageMs / 1000);
    }
    for (const [name, [help, of]] of Object.entries(MOUNT_COUNTERS))
      counter(`mount_${name}`, help, of(mount));
    gauge('mount_open_files', 'Files open on the mount.', mount.openFiles);
    gauge('mount_in_flight', 'Requests that the main thread has not answered yet.', mount.inFlight);
    const direct = { read: mount.directReads, write: mount.directWrites };
    const directBytes = { read: mount.directReadBytes, write: mount.directWriteBytes };
    for (const [name, help, values] of [
      ['requests', 'Reads and writes answered by the workers alone.', direct],
      ['bytes', 'Their bytes.', directBytes],
    ] as const) {
      const labelNames = ['operation'] as const;
      const one = new Counter({ name: `gridvfs_mount_direct_${name}_total`, help, labelNames, registers });
      for (const [operation, value] of Object.entries(values)) one.inc({ operation }, value);
    }
    const labelNames = ['source'] as const;
    const up = new Gauge({
      name: 'gridvfs_source_up',
      help: '1 while the source is asked.',
      labelNames,
      registers,
    });
    for (const { name, down } of sources) up.set({ source: name }, down === undefined ? 1 : 0);
    for (const [name, [help, of]] of Object.entries(SOURCE_COUNTERS)) {
      const one = new Counter({ name: `gridvfs_source_${name}_total`, help, labelNames, registers });
      for (const source of sources) {
        const value = of(source);
        if (value !== undefined) one.inc({ source: source.name }, value);
      }
    }
    return (await registry.metrics()) + requestTimes(mount.operations) + (await this.#registry.metrics());
  }
}

/** The histogram of the mount's requests, which is counted in shared memory and not by prom-client. */
function requestTimes(operations: readonly OperationFigures[]): string {
  const name = 'gridvfs_mount_request_duration_seconds';
  const lines = [
    `# HELP ${name} Requests to the mount, from the kernel's question to the answer. Passthrough asks nothing.`,
    `# TYPE ${name} histogram`,
  ];
  for (const { operation, answeredBy, seconds, buckets } of operations) {
    const labels = `operation="${operation}",answered_by="${answeredBy}"`;
    let count = 0;
    for (const [index, inBucket] of buckets.entries()) {
      count += inBucket;
      const bound = LATENCY_BUCKETS_SECONDS[index] ?? '+Inf';
      lines.push(`${name}_bucket{${labels},le="${bound}"} ${count}`);
    }
    lines.push(`${name}_sum{${labels}} ${seconds}`, `${name}_count{${labels}} ${count}`);
  }
  return lines.join('\n') + '\n';
}

/** Reads are right in all of these states; some are slow, or not stored. */
export function healthOf({ cache, sources }: StatusForMetrics): Health {
  const reasons = [
    ...(cache.degraded === undefined ? [] : [cache.degraded]),
    ...(cache.tags?.stale === undefined ? [] : [cache.tags.stale]),
    ...sources.flatMap(({ name, down }) => (down === undefined ? [] : [`${name}: ${down}`])),
  ];
  return { status: reasons.length === 0 ? 'ok' : 'degraded', reasons };
}

/** GET /metrics and /healthz. Health answers 200 in both cases: who is degraded should not be killed for it. */
export function serveMetrics(
  app: FastifyInstance,
  metrics: ProxyMetrics,
  status: () => Promise<StatusForMetrics>,
): void {
  app.get('/metrics', async (_request, reply) =>
    reply
      .header('cache-control', 'no-store')
      .type(Registry.PROMETHEUS_CONTENT_TYPE)
      .send(await metrics.text(await status())),
  );
  app.get('/healthz', async (_request, reply) => {
    reply.header('cache-control', 'no-store');
    return healthOf(await status());
  });
}

/** The same two on a TCP address, for a scraper. Throws in-use, local-io. */
export async function listenMetrics(
  where: { host: string; port: number },
  metrics: ProxyMetrics,
  status: () => Promise<StatusForMetrics>,
): Promise<{ readonly port: number; close(): Promise<void> }> {
  const app = fastify({ logger: false, forceCloseConnections: true });
  serveMetrics(app, metrics, status);
  try {
    await app.listen(where);
  } catch (error) {
    throw asGridError(error, `cannot listen on ${where.host}:${where.port} for metrics`);
  }
  const address = app.server.address();
  const port = typeof address === 'object' && address !== null ? address.port : where.port;
  return { port, close: () => app.close() };
}
