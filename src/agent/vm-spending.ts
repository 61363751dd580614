/**
 * What the file service spent on behalf of each VM: requests and bytes of its clones (and of the memory image that it
 * shares with others, each has the same part of those), and CPU time. The process knows its CPU time as a whole, so it
 * is shared out, interval by interval, by what the requests of that time cost about: an operation and a byte as measured
 * on one thread of the kernel driver. What nobody asked for in an interval is on no VM's account. What the kernel
 * answers by itself (kept pages, passthrough) costs the service nothing and is in no count.
 */
import type { Digest } from '../core/bytes.ts';
import type { UsageFigures } from '../core/usage.ts';
import { disksOf } from './vm-record.ts';
import type { VmRecord } from './vm-record.ts';

/** Relative to each other: 14,800 reads of 4 KiB a second and 1.5 GB a second, one thread. */
const OPERATION_WEIGHT = 1 / 14_800;
const BYTE_WEIGHT = 1 / 1.5e9;
const INTERVAL_MS = 5_000;

export interface VmSpending extends UsageFigures {
  readonly cpuSeconds: number;
}

export interface SpendingParts {
  records(): readonly VmRecord[];
  /** Of clones that are open, since they were opened. */
  clones(): readonly ({ readonly id: string } & UsageFigures)[];
  /** Of images, since the process started. */
  images(): Promise<readonly ({ readonly manifest: Digest } & UsageFigures)[]>;
  /** Of this process, all its threads. */
  cpuSeconds(): number;
}

const NOTHING: UsageFigures = { reads: 0, readBytes: 0, writes: 0, writeBytes: 0 };
const KEYS = ['reads', 'readBytes', 'writes', 'writeBytes'] as const;

const combine = (a: UsageFigures, b: UsageFigures, factor: number): UsageFigures => ({
  reads: a.reads + factor * b.reads,
  readBytes: a.readBytes + factor * b.readBytes,
  writes: a.writes + factor * b.writes,
  writeBytes: a.writeBytes + factor * b.writeBytes,
});

const weightOf = ({ reads, readBytes, writes, writeBytes }: UsageFigures) =>
  (reads + writes) * OPERATION_WEIGHT + (readBytes + writeBytes) * BYTE_WEIGHT;

export class Spending {
  readonly #parts: SpendingParts;
  readonly #spent = new Map<string, VmSpending>();
  /** By clone, or `image:` and digest. */
  #before = new Map<string, UsageFigures>();
  #cpuBefore: number;
  #timer: NodeJS.Timeout | undefined;
  #counting: Promise<void> = Promise.resolve();

  constructor(parts: SpendingParts) {
    this.#parts = parts;
    this.#cpuBefore = parts.cpuSeconds();
  }

  start(): void {
    this.#timer = setInterval(() => {
      // An idle host is not looked at; what its housekeeping costs is nobody's.
      if (this.#parts.records().length > 0) void this.#count();
      else this.#cpuBefore = this.#parts.cpuSeconds();
    }, INTERVAL_MS);
    this.#timer.unref();
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  /** As of now. */
  async all(): Promise<ReadonlyMap<string, VmSpending>> {
    await this.#count();
    return this.#spent;
  }

  #count(): Promise<void> {
    this.#counting = this.#counting.then(() => this.#countOnce()).catch(() => undefined);
    return this.#counting;
  }

  async #countOnce(): Promise<void> {
    const now = new Map<string, UsageFigures>();
    for (const { manifest, ...figures } of await this.#parts.images())
      now.set(`image:${manifest}`, pick(figures));
    for (const { id, ...figures } of this.#parts.clones()) now.set(id, pick(figures));
    const cpu = this.#parts.cpuSeconds();
    const cpuSeconds = cpu - this.#cpuBefore;
    this.#cpuBefore = cpu;
    const done = new Map([...now].map(([key, figures]) => [key, since(figures, this.#before.get(key))]));
    this.#before = now;
    const all = [...done.values()].reduce((sum, figures) => sum + weightOf(figures), 0);

    const records = this.#parts.records();
    const images = records.flatMap(({ memory }) => memory?.image ?? []);
    for (const id of this.#spent.keys())
      if (!records.some((record) => record.id === id)) this.#spent.delete(id);
    for (const record of records) {
      const { memory } = record;
      const own = [...new Set([...disksOf(record), memory?.clone, memory?.own])];
      let figures = own.reduce((sum, id) => combine(sum, (id && done.get(id)) || NOTHING, 1), NOTHING);
      if (memory?.image !== undefined) {
        const sharers = images.filter((image) => image === memory.image).length;
        figures = combine(figures, done.get(`image:${memory.image}`) ?? NOTHING, 1 / sharers);
      }
      const { cpuSeconds: before, ...counts } = this.#spent.get(record.id) ?? { ...NOTHING, cpuSeconds: 0 };
      const share = all === 0 ? 0 : (cpuSeconds * weightOf(figures)) / all;
      this.#spent.set(record.id, { ...combine(counts, figures, 1), cpuSeconds: before + share });
    }
  }
}

function pick({ reads, readBytes, writes, writeBytes }: UsageFigures): UsageFigures {
  return { reads, readBytes, writes, writeBytes };
}

/** What came to it; counts that fell began anew. */
function since(now: UsageFigures, before: UsageFigures | undefined): UsageFigures {
  return before === undefined || KEYS.some((key) => now[key] < before[key]) ? now : combine(now, before, -1);
}
