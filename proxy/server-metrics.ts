/**
 * What a server counts, as Prometheus text: base units, prefix `gridvfs_server_`, labels with few values. A module
 * of its own that only listeners load: a stdio server lives for one channel and is scraped by nobody.
 */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { ErrorCode } from '../src/core/errors.ts';
import type { Priority } from '../src/core/source.ts';

export type ServedRoute = 'tags' | 'opening' | 'manifest' | 'table' | 'chunk' | 'profile' | 'batch' | 'other';

export interface ServerMetrics {
  readonly contentType: string;
  text(): Promise<string>;
  /** A request came; call what it returns when its answer has gone or broke off. */
  begin(route: ServedRoute): () => void;
  sent(route: ServedRoute, bytes: number): void;
  failed(code: ErrorCode): void;
  /** `fromMemory`: chunks that no file had to be read for. */
  batch(priority: Priority, chunks: number, seconds: number, fromMemory: number): void;
}

/** From a chunk on a local disk to a full batch on a slow link. */
const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];

export function createServerMetrics(): ServerMetrics {
  const registry = new Registry();
  const registers = [registry];
  const requests = new Counter({
    name: 'gridvfs_server_requests_total',
    help: 'Requests that came, by what was asked for.',
    labelNames: ['route'],
    registers,
  });
  const bytes = new Counter({
    name: 'gridvfs_server_sent_bytes_total',
    help: 'Bodies of answers, as stored, without HTTP and ssh around them.',
    labelNames: ['route'],
    registers,
  });
  const errors = new Counter({
    name: 'gridvfs_server_errors_total',
    help: "Requests that failed, by gridvfs's error code.",
    labelNames: ['code'],
    registers,
  });
  const inFlight = new Gauge({
    name: 'gridvfs_server_requests_in_flight',
    help: 'Requests being answered now.',
    registers,
  });
  const chunks = new Counter({
    name: 'gridvfs_server_batch_chunks_total',
    help: 'Chunks sent in batches.',
    labelNames: ['priority'],
    registers,
  });
  const memoryChunks = new Counter({
    name: 'gridvfs_server_memory_chunks_total',
    help: 'Chunks sent in batches that were kept in memory: no file was read for them.',
    registers,
  });
  const seconds = new Histogram({
    name: 'gridvfs_server_batch_duration_seconds',
    help: 'From a batch request to the last byte of its answer handed to the connection.',
    labelNames: ['priority'],
    buckets: SECONDS,
    registers,
  });
  const memory = new Gauge({
    name: 'gridvfs_process_resident_memory_bytes',
    help: 'Resident memory of this process.',
    registers,
  });
  return {
    contentType: registry.contentType,
    text() {
      memory.set(process.memoryUsage.rss());
      return registry.metrics();
    },
    begin(route) {
      requests.inc({ route });
      inFlight.inc();
      return () => inFlight.dec();
    },
    sent: (route, count) => bytes.inc({ route }, count),
    failed: (code) => errors.inc({ code }),
    batch(priority, count, elapsed, fromMemory) {
      memoryChunks.inc(fromMemory);
      chunks.inc({ priority }, count);
      seconds.observe({ priority }, elapsed);
    },
  };
}
