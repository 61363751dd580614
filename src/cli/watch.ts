/**
 * gridvfs proxy status --watch: what the mount does now, as the difference of two statuses. Per image and clone:
 * requests a second and their bytes; in all: also how many of the reads found their chunks here, and what is in
 * flight. What the kernel answers by itself (kept pages, passthrough) is in no figure.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { ControlClient } from '../agent/client.ts';
import type { UsageFigures } from '../core/usage.ts';
import { abortOnSignals, bytesText, table } from './kit.ts';

/** What is needed of /v1/status. */
export interface WatchedStatus {
  readonly name: string;
  readonly openClones: readonly ({ readonly id: string } & UsageFigures)[];
  readonly cache: {
    readonly inFlightChunks: number;
    readonly images: readonly ({
      readonly manifest: string;
      readonly missedChunks: number;
      readonly hitRate?: number;
      readonly references: number;
    } & UsageFigures)[];
  };
  readonly mount: { readonly inFlight: number };
}

/** Requests and bytes a second. */
export interface Rates {
  readonly readsPerSecond: number;
  readonly readBytesPerSecond: number;
  readonly writesPerSecond: number;
  readonly writeBytesPerSecond: number;
}

export interface WatchedRow extends Rates {
  readonly kind: 'image' | 'clone';
  readonly name: string;
  /** Images: chunks a second that a reader had to wait for, also a clone's reader. */
  readonly missesPerSecond?: number;
  /** Images: of the chunks read since the proxy's start, those that were here. */
  readonly hitRate?: number;
}

export interface Watched {
  readonly time: string;
  readonly seconds: number;
  readonly total: Rates & {
    /** Of this interval's reads, those that waited for no chunk; missing when there were none. */
    readonly hitRate?: number;
    readonly inFlightRequests: number;
    readonly inFlightChunks: number;
  };
  readonly rows: readonly WatchedRow[];
}

const FIELDS = ['reads', 'readBytes', 'writes', 'writeBytes'] as const;

/** What happened between two statuses, `seconds` apart. `nameOf` gives an image's name by its manifest. */
export function differenceOf(
  before: WatchedStatus,
  now: WatchedStatus,
  seconds: number,
  nameOf: (manifest: string) => string,
): Watched {
  // What was closed and opened again meanwhile counts from 0.
  const since = (value: number, earlier = 0) => (value >= earlier ? value - earlier : value);
  const ratesOf = (one: UsageFigures, earlier: UsageFigures | undefined): Rates => {
    const [reads, readBytes, writes, writeBytes] = FIELDS.map(
      (field) => since(one[field], earlier?.[field]) / seconds,
    ) as [number, number, number, number];
    return {
      readsPerSecond: reads,
      readBytesPerSecond: readBytes,
      writesPerSecond: writes,
      writeBytesPerSecond: writeBytes,
    };
  };
  const clones = now.openClones.map((one): WatchedRow => {
    const earlier = before.openClones.find(({ id }) => id === one.id);
    return { kind: 'clone', name: one.id, ...ratesOf(one, earlier) };
  });
  const images = now.cache.images.flatMap((one): WatchedRow[] => {
    const earlier = before.cache.images.find(({ manifest }) => manifest === one.manifest);
    const missesPerSecond = since(one.missedChunks, earlier?.missedChunks) / seconds;
    const rates = ratesOf(one, earlier);
    const quiet = one.references === 0 && missesPerSecond === 0 && rates.readsPerSecond === 0;
    if (quiet) return [];
    const hitRate = one.hitRate === undefined ? {} : { hitRate: one.hitRate };
    return [{ kind: 'image', name: nameOf(one.manifest), ...rates, missesPerSecond, ...hitRate }];
  });
  const rows = [...images, ...clones];
  const sum = (of: (row: WatchedRow) => number) => rows.reduce((total, row) => total + of(row), 0);
  const reads = sum((row) => row.readsPerSecond);
  const misses = sum((row) => row.missesPerSecond ?? 0);
  return {
    time: new Date().toISOString(),
    seconds,
    total: {
      readsPerSecond: reads,
      readBytesPerSecond: sum((row) => row.readBytesPerSecond),
      writesPerSecond: sum((row) => row.writesPerSecond),
      writeBytesPerSecond: sum((row) => row.writeBytesPerSecond),
      ...(reads === 0 ? {} : { hitRate: Math.max(0, 1 - misses / reads) }),
      inFlightRequests: now.mount.inFlight,
      inFlightChunks: now.cache.inFlightChunks,
    },
    rows,
  };
}

function textOf({ total, rows }: Watched, proxy: string): string {
  const percent = (rate: number | undefined) => (rate === undefined ? '-' : `${(rate * 100).toFixed(1)} %`);
  const cells = (rates: Rates) => [
    Math.round(rates.readsPerSecond),
    bytesText(Math.round(rates.readBytesPerSecond)),
    Math.round(rates.writesPerSecond),
    bytesText(Math.round(rates.writeBytesPerSecond)),
  ];
  const text = table(
    ['WHAT', 'NAME', 'READS/S', 'READ/S', 'WRITES/S', 'WRITTEN/S', 'MISSES/S', 'HIT RATE'],
    [
      ['all', proxy, ...cells(total), '-', percent(total.hitRate)],
      ...rows.map((row) => [
        ...[row.kind, row.name, ...cells(row)],
        row.missesPerSecond === undefined ? '-' : Math.round(row.missesPerSecond),
        percent(row.hitRate),
      ]),
    ],
  );
  return `${text}\nin flight: ${total.inFlightRequests} requests, ${total.inFlightChunks} chunks`;
}

/** Prints what happens, once per interval, until Ctrl-C or `count` intervals. Throws not-found when the proxy ends. */
export async function watch(
  client: ControlClient,
  options: { readonly json?: boolean; readonly intervalMs: number; readonly count?: number },
): Promise<void> {
  const signal = abortOnSignals();
  const names = new Map<string, string>();
  const learnNames = async () => {
    const { images } = await client.call<{ images: { manifest: string; names?: readonly string[] }[] }>(
      'GET',
      '/v1/cache',
    );
    for (const image of images) names.set(image.manifest, image.names?.[0] ?? image.manifest.slice(0, 12));
  };
  const nextStatus = async () => {
    const status = await client.call<WatchedStatus>('GET', '/v1/status');
    if (status.cache.images.some(({ manifest }) => !names.has(manifest))) await learnNames();
    return status;
  };
  let before = await nextStatus();
  let beforeMs = performance.now();
  for (let shown = 0; shown < (options.count ?? Infinity); shown++) {
    await sleep(options.intervalMs, undefined, { signal }).catch(() => undefined);
    if (signal.aborted) return;
    const now = await nextStatus();
    const nowMs = performance.now();
    const watched = differenceOf(before, now, (nowMs - beforeMs) / 1000, (manifest) => {
      return names.get(manifest) ?? manifest.slice(0, 12);
    });
    const clear = process.stdout.isTTY ? '\x1b[H\x1b[J' : '';
    process.stdout.write(
      options.json ? JSON.stringify(watched) + '\n' : `${clear}${textOf(watched, now.name)}\n\n`,
    );
    [before, beforeMs] = [now, nowMs];
  }
}
