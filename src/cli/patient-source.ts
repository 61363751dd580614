/**
 * A source that may be connected later: a successor has a mount to serve, and all that is in the cache, whether the
 * source answers now or not. Calls wait for the connection; the cache bounds how long its readers wait.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { GridError } from '../core/errors.ts';
import type { ChunkSource, ReadChunksOptions } from '../core/source.ts';

const RETRY_MS = 1_000;

export class PatientSource implements ChunkSource {
  readonly name: string;
  readonly #connected: Promise<ChunkSource>;
  readonly #closing = new AbortController();

  /** `open` is tried until it succeeds. */
  constructor(name: string, open: () => Promise<ChunkSource>, log: (line: string) => void) {
    this.name = name;
    this.#connected = this.#connect(open, log);
    this.#connected.catch(() => undefined); // whoever waits hears of it
  }

  async #connect(open: () => Promise<ChunkSource>, log: (line: string) => void): Promise<ChunkSource> {
    for (let tries = 1; !this.#closing.signal.aborted; tries++) {
      try {
        return await open();
      } catch (error) {
        if (tries === 1) log(`${this.name} does not answer, and is tried again: ${String(error)}`);
        await sleep(RETRY_MS, undefined, { signal: this.#closing.signal }).catch(() => undefined);
      }
    }
    throw new GridError('closed', `${this.name} was closed before it answered`);
  }

  async listTags() {
    return (await this.#connected).listTags();
  }

  async readManifest(digest: string) {
    return (await this.#connected).readManifest(digest);
  }

  async readTable(digest: string) {
    return (await this.#connected).readTable(digest);
  }

  async readChunks(
    refs: Parameters<ChunkSource['readChunks']>[0],
    options: ReadChunksOptions,
    deliver: Parameters<ChunkSource['readChunks']>[2],
  ): Promise<void> {
    await (await this.#connected).readChunks(refs, options, deliver);
  }

  async hold(holder: string, manifests: readonly string[]): Promise<void> {
    const source = await this.#connected;
    if (!source.hold) throw new GridError('denied', `${this.name} holds nothing for hosts`);
    await source.hold(holder, manifests);
  }

  async close(): Promise<void> {
    this.#closing.abort();
    const source = await this.#connected.catch(() => undefined);
    await source?.close();
  }
}
