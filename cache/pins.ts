/**
 * What is never evicted: whole images, or what a profile names of them (a boot set). Kept in `pins.json`,
 * { schema: 1, pins: [{ manifest, purpose? }] }; on the disk when `pin` returns, as nobody can fetch it again.
 */
import { isDigest } from '../src/core/bytes.ts';
import type { Digest } from '../src/core/bytes.ts';
import { GridError } from '../src/core/errors.ts';
import { isName } from '../src/core/manifest.ts';
import type { Profile, Purpose } from '../src/core/profile.ts';
import { readWhole, replaceFileDurably } from './folder.ts';
import type { CacheFolder } from './folder.ts';

const PINS_MAX = 10_000;
const PINS_BYTES_MAX = 4 * 1024 * 1024;

/** `purpose` left out: the whole image. */
export interface Pin {
  readonly manifest: Digest;
  readonly purpose?: Purpose;
}

export class Pins {
  readonly #folder: CacheFolder;
  readonly #profileOf: (manifest: Digest, purpose: Purpose) => Profile | undefined;
  #pins: Pin[];
  /** What each pinned image may not lose; made when it is first asked for. */
  readonly #covers = new Map<Digest, 'all' | ReadonlySet<number>>();

  /** Throws bad-format for a pins file that cannot be read: forgetting pins in silence would be worse. */
  constructor(folder: CacheFolder, profileOf: (manifest: Digest, purpose: Purpose) => Profile | undefined) {
    this.#folder = folder;
    this.#profileOf = profileOf;
    this.#pins = load(folder.path('pins.json'));
  }

  list(): readonly Pin[] {
    return this.#pins;
  }

  of(manifest: Digest): readonly Pin[] {
    return this.#pins.filter((pin) => pin.manifest === manifest);
  }

  covers(manifest: Digest, index: number): boolean {
    if (this.#pins.length === 0) return false;
    let cover = this.#covers.get(manifest);
    if (cover === undefined) {
      const pins = this.of(manifest);
      const chunks = new Set<number>();
      for (const { purpose } of pins) {
        const profile = purpose === undefined ? undefined : this.#profileOf(manifest, purpose);
        for (const chunk of [...(profile?.early ?? []), ...(profile?.late ?? [])]) chunks.add(chunk);
      }
      cover = pins.some(({ purpose }) => purpose === undefined) ? 'all' : chunks;
      this.#covers.set(manifest, cover);
    }
    return cover === 'all' || cover.has(index);
  }

  /** The profile of this image has changed. */
  refresh(manifest: Digest): void {
    this.#covers.delete(manifest);
  }

  /** Throws bad-request, no-space, local-io. Twice is once. */
  add(pin: Pin): void {
    if (this.#pins.some((one) => isSame(one, pin))) return;
    if (this.#pins.length >= PINS_MAX) {
      throw new GridError('bad-request', `there are ${PINS_MAX} pins already; unpin some`);
    }
    this.#save([...this.#pins, pin]);
  }

  /** Removes one pin, or all of an image. False when there was none. */
  remove(manifest: Digest, purpose?: Purpose): boolean {
    const left = this.#pins.filter(
      (pin) => pin.manifest !== manifest || (purpose !== undefined && pin.purpose !== purpose),
    );
    if (left.length === this.#pins.length) return false;
    this.#save(left);
    return true;
  }

  #save(pins: Pin[]): void {
    const text = JSON.stringify({ schema: 1, pins }, null, 1) + '\n';
    replaceFileDurably(this.#folder.path('pins.json'), Buffer.from(text));
    this.#pins = pins;
    this.#covers.clear();
  }
}

function isSame(a: Pin, b: Pin): boolean {
  return a.manifest === b.manifest && a.purpose === b.purpose;
}

function load(file: string): Pin[] {
  const bytes = readWhole(file, PINS_BYTES_MAX);
  if (bytes === undefined) return [];
  const bad = (cause?: unknown) =>
    new GridError('bad-format', `${file} is damaged; remove it and pin again`, { cause });
  let raw: { schema?: unknown; pins?: unknown };
  try {
    raw = JSON.parse(bytes.toString()) as typeof raw;
  } catch (cause) {
    throw bad(cause);
  }
  if (typeof raw?.schema === 'number' && raw.schema > 1) {
    throw new GridError('newer-format', `${file} was written by a newer gridvfs; upgrade this one`);
  }
  if (raw?.schema !== 1 || !Array.isArray(raw.pins)) throw bad();
  return raw.pins.map((entry: unknown): Pin => {
    const { manifest, purpose } = (entry ?? {}) as Record<string, unknown>;
    if (!isDigest(manifest) || (purpose !== undefined && !isName(purpose))) throw bad();
    return purpose === undefined ? { manifest } : { manifest, purpose };
  });
}
