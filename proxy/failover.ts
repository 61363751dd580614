/**
 * Several sources for one store as one ChunkSource. They are asked in the order given; who fails decides what comes
 * next, and only `afterFailure` decides it:
 *
 *   up     asked in order; a not-found alone sends the question on to the next (a mirror may lack an object)
 *   down   its way, its own side or its disk failed. Nobody waits for it while another one is up; it is probed in
 *          the background with backoff, and at once when somebody waits, and is up again when it answers
 *   aside  it sent bytes that do not match their digest: asked only when no other can answer, until a time has
 *          passed that doubles with each offence
 *
 * Where no source can answer, a caller waits for one to come up, `reconnectTimeoutMs` after its last progress at
 * most; it fails at once where waiting cannot help (every source refused, or has not got it). A read that breaks in
 * the middle asks the next source for the chunks that are still missing: each is delivered once.
 *
 * Chunks are decoded by the receiver, which says `reportCorrupt` of what does not decode, so nothing is decoded
 * twice. Manifests and tables are few and are checked here, for a wrong one must not end in an error.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { sha256 } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import type { ChunkRef, StoredChunk } from '../src/core/chunk.ts';
import { asGridError, GridError } from '../src/core/errors.ts';
import { RECONNECT_TIMEOUT_MS } from '../src/core/limits.ts';
import type { Tag } from '../src/core/manifest.ts';
import type { Purpose } from '../src/core/profile.ts';
import type { ChunkSource, ReadChunksOptions, WayFigures } from '../src/core/source.ts';
import type { UploadTarget } from '../src/core/uploads.ts';
import { newCounters } from './statistics.ts';
import type { SourceEvent, SourceStatistics } from './statistics.ts';

/** A probe of a source that is down: the first after this long, then with doubled pauses. */
const PROBE_MIN_MS = 1_000;
const PROBE_MAX_MS = 30_000;
/** While somebody waits. */
const PROBE_WAITED_FOR_MS = 250;
/** How long a source that sent wrong bytes is put aside: first, and at most. */
const ASIDE_MIN_MS = 60_000;
const ASIDE_MAX_MS = 3_600_000;
/** A start waits this long for the sources before the first one that answered. */
const START_GRACE_MS = 2_000;

export interface Member {
  /** For messages until it is open. */
  readonly name: string;
  /** Connects; called again after it failed. */
  open(): Promise<ChunkSource>;
}

export interface FailoverOptions {
  /** How long a caller without progress waits when no source answers. Default RECONNECT_TIMEOUT_MS. */
  readonly reconnectTimeoutMs?: number;
  readonly asideMs?: number;
  readonly onEvent?: (event: SourceEvent) => void;
}

export interface MemberStatistics extends Partial<SourceStatistics> {
  readonly name: string;
  readonly state: 'up' | 'down' | 'aside';
  /** Why it is not up. */
  readonly reason?: string;
  readonly corruptChunks: number;
  /** Questions that another source had to answer for it. */
  readonly failovers: number;
}

export interface FailoverStatistics extends SourceStatistics {
  readonly sources: readonly MemberStatistics[];
}

/** Whether an error of one source may not be one of another. */
function worthAnother(error: GridError): boolean {
  return error.code === 'not-found' || (error.blame !== 'caller' && error.blame !== 'bug');
}

class MemberState {
  readonly member: Member;
  name: string;
  source: ChunkSource | undefined;
  /** Set while it is down. */
  down: GridError | undefined;
  asideUntilMs = 0;
  asideMs: number;
  corruptChunks = 0;
  failovers = 0;
  /** Ends the probe's pause. */
  hurry = new AbortController();

  constructor(member: Member, asideMs: number) {
    this.member = member;
    this.name = member.name;
    this.asideMs = asideMs;
  }

  get aside(): boolean {
    return performance.now() < this.asideUntilMs;
  }

  get state(): MemberStatistics['state'] {
    if (this.down || !this.source) return 'down';
    return this.aside ? 'aside' : 'up';
  }
}

export class FailoverSource implements ChunkSource {
  readonly name: string;
  readonly #members: MemberState[];
  readonly #reconnectTimeoutMs: number;
  readonly #onEvent: (event: SourceEvent) => void;
  readonly #closing = new AbortController();
  readonly #background = new Set<Promise<unknown>>();
  /** Callers that wait for any source to come up. */
  readonly #waiting = new Set<() => void>();
  /** Who delivered a chunk, for as long as the receiver holds it. */
  readonly #senders = new WeakMap<StoredChunk, MemberState>();

  private constructor(members: readonly Member[], options: FailoverOptions) {
    this.name = members.map(({ name }) => name).join(', ');
    this.#members = members.map((member) => new MemberState(member, options.asideMs ?? ASIDE_MIN_MS));
    this.#reconnectTimeoutMs = options.reconnectTimeoutMs ?? RECONNECT_TIMEOUT_MS;
    this.#onEvent = options.onEvent ?? (() => {});
  }

  /**
   * Opens all of them and resolves when one can be used: the first, or after a short grace any other. Throws
   * bad-request of any, and the first one's error when none can be opened.
   */
  static async open(members: readonly Member[], options: FailoverOptions = {}): Promise<FailoverSource> {
    const self = new FailoverSource(members, options);
    const opening = self.#members.map((member) => self.#open(member));
    const results = Promise.allSettled(opening);
    self.#track(results);
    try {
      const anyAndGrace = Promise.any(opening).then(
        () => sleep(START_GRACE_MS, undefined, { ref: false }),
        () => results,
      );
      await Promise.race([opening[0]!.catch(() => results), anyAndGrace, results]);
      for (const { down } of self.#members) if (down?.code === 'bad-request') throw down;
      if (!self.#members.some(({ source }) => source)) throw self.#members[0]!.down!;
    } catch (error) {
      await self.close();
      throw error;
    }
    for (const [i, member] of self.#members.entries()) {
      opening[i]!.then(
        () => self.#wake(),
        () => self.#probe(member),
      );
    }
    return self;
  }

  statistics(): FailoverStatistics {
    const sum = newCounters();
    const sources = this.#members.map((member): MemberStatistics => {
      const own = statisticsOf(member.source);
      for (const key of Object.keys(sum) as Exclude<keyof typeof sum, 'down'>[]) {
        sum[key] += key === 'corruptChunks' ? member.corruptChunks : (own?.[key] ?? 0);
      }
      const reason =
        member.down?.message ?? (member.aside ? 'it sent bytes that do not match their digest' : undefined);
      return {
        ...own,
        name: member.name,
        state: member.state,
        ...(reason === undefined ? {} : { reason }),
        corruptChunks: member.corruptChunks,
        failovers: member.failovers,
      };
    });
    return { ...sum, sources };
  }

  listTags(): Promise<Tag[]> {
    return this.#ask('the tags', (source) => source.listTags());
  }

  readManifest(digest: Digest): Promise<Buffer> {
    return this.#checked('manifest', digest, (source) => source.readManifest(digest));
  }

  readTable(digest: Digest): Promise<Buffer> {
    return this.#checked('chunk table', digest, (source) => source.readTable(digest));
  }

  readProfile(manifest: Digest, purpose: Purpose): Promise<Buffer | undefined> {
    return this.#ask('a profile', async (source) => source.readProfile?.(manifest, purpose));
  }

  recordProfile(manifest: Digest, purpose: Purpose, recording: Buffer): Promise<void> {
    return this.#ask('a recording', async (source) => {
      if (!source.recordProfile) throw new GridError('denied', `${source.name} keeps no profiles`);
      await source.recordProfile(manifest, purpose, recording);
    });
  }

  /** In each that is there and keeps something for hosts; with one of them it is held. */
  async hold(holder: string, manifests: readonly Digest[]): Promise<void> {
    const holding = this.#members.flatMap(({ source }) => source?.hold?.(holder, manifests) ?? []);
    const results = await Promise.allSettled(holding);
    if (results.some(({ status }) => status === 'fulfilled')) return;
    const failed = results.find((result) => result.status === 'rejected');
    throw failed?.reason ?? new GridError('denied', `${this.name} holds nothing for hosts`);
  }

  /** Of the first source, up or not: what is made there the others get, or not, in their own ways. */
  get uploads(): UploadTarget | undefined {
    return this.#members[0]!.source?.uploads;
  }

  async readChunks(
    refs: readonly ChunkRef[],
    options: ReadChunksOptions,
    deliver: (index: number, chunk: StoredChunk) => void,
  ): Promise<void> {
    const cancelled = () => new GridError('closed', `a read from ${this.name} was cancelled`);
    if (options.signal?.aborted) throw cancelled();
    if (refs.length === 0) return;
    let left = refs.map((_, index) => index);
    const delivered = new Uint8Array(refs.length);
    const progress = { atMs: performance.now() };
    await this.#ask(
      `${refs.length} chunks`,
      async (source, member) => {
        left = left.filter((index) => delivered[index] === 0);
        const asked = left;
        const some = asked.length === refs.length ? refs : asked.map((index) => refs[index]!);
        await source.readChunks(some, options, (place, chunk) => {
          const index = asked[place]!;
          if (delivered[index] !== 0) return;
          delivered[index] = 1;
          progress.atMs = performance.now();
          this.#senders.set(chunk, member);
          deliver(index, chunk);
        });
      },
      { progress, ...(options.signal ? { signal: options.signal } : {}) },
    );
  }

  /** Puts the one who sent it aside, for longer each time. */
  reportCorrupt(ref: ChunkRef, chunk: StoredChunk): void {
    const member = this.#senders.get(chunk);
    if (!member) return;
    member.source?.reportCorrupt?.(ref, chunk);
    this.#putAside(member, `chunk ${ref.digest.slice(0, 12)}`);
  }

  /** Of the one that is asked first now. */
  way(): WayFigures | undefined {
    return this.#inOrder()[0]?.source?.way?.();
  }

  async close(): Promise<void> {
    this.#closing.abort();
    this.#wake();
    for (const { hurry } of this.#members) hurry.abort();
    await Promise.all(this.#members.flatMap(({ source }) => (source ? [source.close()] : [])));
    await Promise.all(this.#background);
  }

  #wake(): void {
    for (const wake of this.#waiting) wake();
  }

  /** Work that `close` waits for. */
  #track(work: Promise<unknown>): void {
    this.#background.add(work);
    void work.finally(() => this.#background.delete(work));
  }

  #closedError(): GridError {
    return new GridError('closed', `${this.name} was closed`);
  }

  #checked(what: string, digest: Digest, read: (source: ChunkSource) => Promise<Buffer>): Promise<Buffer> {
    const object = `${what} ${digest.slice(0, 12)}`;
    return this.#ask(object, async (source, member) => {
      const bytes = await read(source);
      if (sha256(bytes) === digest) return bytes;
      this.#putAside(member, object);
      throw new GridError('corrupt', `${object} of ${member.name} does not match its digest`);
    });
  }

  /** Asks one source after the other until one answers. See the drawing above. */
  async #ask<T>(
    what: string,
    ask: (source: ChunkSource, member: MemberState) => Promise<T>,
    {
      progress = { atMs: performance.now() },
      signal,
    }: { progress?: { atMs: number }; signal?: AbortSignal } = {},
  ): Promise<T> {
    for (;;) {
      let failure: GridError | undefined;
      let missing: GridError | undefined;
      const tried = new Set<MemberState>();
      // Looked up anew each time: while one was asked another may have come up.
      for (let member; (member = this.#inOrder().find((one) => !tried.has(one)));) {
        tried.add(member);
        if (this.#closing.signal.aborted) throw this.#closedError();
        try {
          return await ask(member.source!, member);
        } catch (thrown) {
          const error = asGridError(thrown, `cannot read ${what} from ${member.name}`, 'bug');
          if (this.#closing.signal.aborted) throw this.#closedError();
          if (signal?.aborted || !worthAnother(error)) throw error;
          this.#afterFailure(member, error);
          if (error.code === 'not-found') missing ??= error;
          else failure ??= error;
        }
      }
      // One that cannot be asked now might have it.
      const hopeful = this.#members.some(({ source, down }) => (down ? down.blame === 'tunnel' : !source));
      if (!hopeful) throw failure ?? missing ?? this.#members[0]!.down!;
      const waitMs = progress.atMs + this.#reconnectTimeoutMs - performance.now();
      if (waitMs <= 0) {
        const reason = this.#members.find(({ down }) => down)?.down ?? failure;
        throw new GridError(
          'unreachable',
          `no source had ${what} within ${this.#reconnectTimeoutMs / 1000} s: ${reason?.message}`,
          { cause: reason },
        );
      }
      await this.#someoneUp(waitMs, signal);
      if (signal?.aborted) throw new GridError('closed', `a read from ${this.name} was cancelled`);
    }
  }

  /** Who can be asked: those that are up in their order, then those put aside. */
  #inOrder(): MemberState[] {
    const open = this.#members.filter(({ source, down }) => source && !down);
    return [...open.filter(({ aside }) => !aside), ...open.filter(({ aside }) => aside)];
  }

  #afterFailure(member: MemberState, error: GridError): void {
    member.failovers++;
    if (error.code === 'not-found' || error.code === 'corrupt' || member.down) return;
    member.down = error;
    this.#onEvent({ type: 'lost', message: `${member.name} is left out: ${error.message}` });
    this.#probe(member);
  }

  #putAside(member: MemberState, what: string): void {
    member.corruptChunks++;
    if (member.aside) return;
    member.asideUntilMs = performance.now() + member.asideMs;
    const seconds = Math.round(member.asideMs / 1000);
    member.asideMs = Math.min(2 * member.asideMs, ASIDE_MAX_MS);
    const message = `${member.name} sent a wrong ${what}: put aside for ${seconds} s`;
    this.#onEvent({ type: 'lost', message });
  }

  async #open(member: MemberState): Promise<void> {
    try {
      const source = await member.member.open();
      if (this.#closing.signal.aborted) {
        await source.close();
        throw this.#closedError();
      }
      member.source = source;
      member.name = source.name;
      member.down = undefined;
    } catch (error) {
      member.down = asGridError(error, `cannot open ${member.name}`, 'unreachable');
      throw member.down;
    }
  }

  /** Asks a source that is down until it answers. */
  #probe(member: MemberState): void {
    const probing = (async () => {
      const { signal } = this.#closing;
      for (let pauseMs = PROBE_MIN_MS; !signal.aborted; pauseMs = Math.min(2 * pauseMs, PROBE_MAX_MS)) {
        if (this.#waiting.size === 0) {
          member.hurry = new AbortController();
          await sleep(pauseMs, undefined, { signal: member.hurry.signal, ref: false }).catch(() => {});
        } else await sleep(PROBE_WAITED_FOR_MS, undefined, { signal, ref: false }).catch(() => {});
        if (signal.aborted) return;
        try {
          if (member.source) await member.source.listTags();
          else await this.#open(member);
          break;
        } catch (error) {
          member.down = asGridError(error, `cannot use ${member.name}`, 'unreachable');
        }
      }
      if (signal.aborted) return;
      member.down = undefined;
      this.#onEvent({ type: 'reconnected', message: `${member.name} is there again` });
      this.#wake();
    })();
    this.#track(probing);
  }

  /** Resolves when a source came up, after `timeoutMs`, or on abort or close. */
  async #someoneUp(timeoutMs: number, signal?: AbortSignal): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, timeoutMs);
    this.#waiting.add(resolve);
    const onAbort = () => resolve();
    signal?.addEventListener('abort', onAbort);
    for (const { hurry } of this.#members) hurry.abort();
    try {
      await promise;
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
      this.#waiting.delete(resolve);
    }
  }
}

function statisticsOf(source: ChunkSource | undefined): SourceStatistics | undefined {
  if (!source || !('statistics' in source) || typeof source.statistics !== 'function') return undefined;
  return (source.statistics as () => SourceStatistics)();
}
