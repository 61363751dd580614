/**
 * What hosts need of a store though no tag may point at it any more: the images that their clones lie on. Each holder
 * has one file of digests, `holds/HOLDER`, which it writes anew from time to time; one that it has not written for
 * HOLD_MS counts no more, so a host that is gone for good keeps nothing for ever.
 */
import { mkdirSync, rmSync, statSync } from 'node:fs';
import path from 'node:path';
import { isDigest } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { HOLD_MANIFESTS_MAX, HOLD_MS, HOLDERS_MAX } from '../core/limits.ts';
import { isName } from '../core/manifest.ts';
import { entriesOf, readBounded, replaceFile, syncFolder } from './layout.ts';
import type { StoreLayout } from './layout.ts';
import { withStoreLock } from './lock.ts';

/** A digest and the end of its line. */
const LINE_BYTES = 65;

export interface Hold {
  readonly holder: string;
  readonly manifests: readonly Digest[];
  /** ms since 1970. */
  readonly renewedMs: number;
}

/** See `ChunkSource.hold`. Throws bad-request, no-space (a holder too many, or the disk), local-io, in-use. */
export async function writeHold(
  layout: StoreLayout,
  holder: string,
  manifests: readonly Digest[],
): Promise<void> {
  if (!isName(holder)) {
    throw new GridError('bad-request', `'${String(holder).slice(0, 80)}' is not the name of a holder`);
  }
  if (manifests.length > HOLD_MANIFESTS_MAX || !manifests.every(isDigest)) {
    throw new GridError('bad-request', `a hold is a list of at most ${HOLD_MANIFESTS_MAX} digests`);
  }
  const file = path.join(layout.holds, holder);
  await withStoreLock(layout, async () => {
    const others = (await entriesOf(layout.holds)).filter(({ name }) => name !== holder);
    try {
      if (manifests.length === 0) return rmSync(file, { force: true });
      if (others.length >= HOLDERS_MAX) {
        throw new GridError(
          'no-space',
          `${HOLDERS_MAX} hosts hold images of ${layout.folder}, the most there can be`,
        );
      }
      if (mkdirSync(layout.holds, { recursive: true }) !== undefined) syncFolder(layout.folder);
      replaceFile(layout, file, Buffer.from(manifests.map((digest) => `${digest}\n`).join('')));
    } catch (error) {
      throw asGridError(error, `cannot hold images in the store ${layout.folder}`);
    }
  });
}

/** The holds that count now. */
export async function readHolds(layout: StoreLayout, nowMs = Date.now()): Promise<Hold[]> {
  const holds: Hold[] = [];
  for (const { name: holder } of await entriesOf(layout.holds)) {
    const file = path.join(layout.holds, holder);
    try {
      const renewedMs = statSync(file).mtimeMs;
      if (renewedMs < nowMs - HOLD_MS) continue;
      const text = (await readBounded(file, HOLD_MANIFESTS_MAX * LINE_BYTES)).toString('latin1');
      holds.push({ holder, manifests: text.split('\n').filter(isDigest), renewedMs });
    } catch (error) {
      // Its holder has let go of everything meanwhile.
      if (errnoOf(error) !== 'ENOENT') throw asGridError(error, `cannot read ${file}`);
    }
  }
  return holds;
}

/** Removes the files of holds that count no more. The caller holds the store's lock. */
export async function dropOldHolds(layout: StoreLayout): Promise<void> {
  const live = new Set((await readHolds(layout)).map(({ holder }) => holder));
  for (const { name } of await entriesOf(layout.holds)) {
    if (!live.has(name)) rmSync(path.join(layout.holds, name), { force: true });
  }
}
