/**
 * Tells the source which images the clones of this host lie on, so that no garbage collection there takes them though
 * their names move or go: when that changes, and from time to time, because the source forgets who is silent for
 * HOLD_MS. A source that does not answer is told again later; one that keeps nothing for hosts is asked seldom.
 */
import { randomBytes } from 'node:crypto';
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import type { Digest } from '../core/bytes.ts';
import { errnoOf, GridError } from '../core/errors.ts';
import { HOLD_MANIFESTS_MAX, HOLD_MS } from '../core/limits.ts';
import { isName } from '../core/manifest.ts';
import type { ChunkSource } from '../core/source.ts';

/** How soon a new clone's image is held: much sooner than anybody removes a tag and collects. */
const LOOK_MS = 2_000;
/** A host may miss many of them. */
const RENEW_MS = HOLD_MS / 120;
const RETRY_MS = 30_000;

export interface HoldParts {
  readonly source: Pick<ChunkSource, 'name' | 'hold'>;
  /** Where the name that this host goes by is kept. */
  readonly stateFolder: string;
  /** What clones lie on now. */
  readonly bases: () => Iterable<Digest>;
  readonly log: (line: string) => void;
}

export class Holds {
  readonly #parts: HoldParts;
  readonly #holder: Holder;
  readonly #timer: NodeJS.Timeout;
  #told: string | undefined;
  #nextMs = 0;
  #telling: Promise<void> | undefined;
  #complained = false;
  #closed = false;

  constructor(parts: HoldParts) {
    this.#parts = parts;
    this.#holder = holderOf(parts.stateFolder);
    this.#timer = setInterval(() => this.look(), LOOK_MS);
    this.#timer.unref();
    this.look();
  }

  /** Tells the source if there is something to tell. */
  look(): void {
    const { source, bases } = this.#parts;
    if (!source.hold || this.#telling) return;
    const digests = [...new Set(bases())].toSorted().slice(0, HOLD_MANIFESTS_MAX);
    const text = digests.join(' ');
    if (digests.length === 0 && this.#told === undefined && !this.#holder.isKnown) return;
    const due = performance.now() >= this.#nextMs;
    if (text === this.#told ? !due : !due && this.#complained) return;
    this.#telling = this.#tell(digests)
      .then(
        () => {
          this.#told = text;
          this.#nextMs = performance.now() + RENEW_MS;
          this.#complained = false;
        },
        (error: unknown) => {
          const isDenied = error instanceof GridError && error.code === 'denied';
          this.#nextMs = performance.now() + (isDenied ? RENEW_MS : RETRY_MS);
          if (!this.#complained && !this.#closed) this.#parts.log(refusal(source.name, error));
          this.#complained = true;
        },
      )
      .finally(() => (this.#telling = undefined));
  }

  /** Resolves when the source has been told what is needed now, or has not taken it. */
  async settle(): Promise<void> {
    await this.#telling;
    this.look();
    await this.#telling;
  }

  async #tell(digests: readonly Digest[]): Promise<void> {
    const { source, stateFolder } = this.#parts;
    // Kept before anything is held under it.
    if (!this.#holder.isKnown) keepHolder(stateFolder, this.#holder);
    await source.hold!(this.#holder.name, digests);
  }

  close(): void {
    this.#closed = true;
    clearInterval(this.#timer);
  }
}

function refusal(source: string, error: unknown): string {
  return `${source} does not hold the images of this host's clones (${error instanceof Error ? error.message : String(error)}): keep them there with \`gridvfs store pin\``;
}

interface Holder {
  readonly name: string;
  /** Whether something may be held under it already. */
  isKnown: boolean;
}

const HOLDER_FILE = 'holder';

/** The same for ever for one state folder, and another for each. */
function holderOf(stateFolder: string): Holder {
  try {
    const name = readFileSync(path.join(stateFolder, HOLDER_FILE), 'utf8').trim();
    if (isName(name)) return { name, isKnown: true };
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
  }
  const host = os
    .hostname()
    .toLowerCase()
    .replaceAll(/[^a-z0-9-]/g, '-')
    .slice(0, 60);
  const suffix = randomBytes(8).toString('hex');
  return { name: `${isName(host) ? host : 'host'}-${suffix}`, isKnown: false };
}

function keepHolder(stateFolder: string, holder: Holder): void {
  const file = path.join(stateFolder, HOLDER_FILE);
  writeFileSync(`${file}.new`, `${holder.name}\n`);
  renameSync(`${file}.new`, file);
  holder.isKnown = true;
}
