/** What a clone's layers change of its base, by ranges. */
import { isAllZero } from '../core/bytes.ts';
import { visibleState } from '../core/direct-io.ts';
import { BLOCK_ABSENT, BLOCK_ZERO } from '../core/image.ts';
import { LAYER_BLOCK_BYTES } from '../core/limits.ts';
import type { Clone } from './clone.ts';

/**
 * Numbers, rising, of units of `unitBytes` (a multiple of the block) that hold a block which some layer has written
 * or zeroed. `dataOnly`: zeroed ones do not count; for a clone over zeros, whose other units are zeros anyway.
 */
export function changedUnits(clone: Clone, unitBytes: number, dataOnly = false): Generator<number> {
  return changedUnitsOf(new Uint8Array(clone.direct.layer!.states), unitBytes, dataOnly);
}

/** The same of the states of a snapshot. */
export function* changedUnitsOf(view: Uint8Array, unitBytes: number, dataOnly = false): Generator<number> {
  const unitBlocks = unitBytes / LAYER_BLOCK_BYTES;
  for (let first = 0, unit = 0; first < view.length; first += unitBlocks, unit++) {
    const part = view.subarray(first, first + unitBlocks);
    if (isAllZero(part)) continue;
    if (part.some((state) => isChange(visibleState(state), dataOnly))) yield unit;
  }
}

/** Whether some layer has written or zeroed a block. `dataOnly` as above. */
export function blockChangeOf(clone: Clone, dataOnly = false): (block: number) => boolean {
  return blockChangeIn(new Uint8Array(clone.direct.layer!.states), dataOnly);
}

/** The same of the states of a snapshot. */
export function blockChangeIn(states: Uint8Array, dataOnly = false): (block: number) => boolean {
  return (block) => isChange(visibleState(states[block]!), dataOnly);
}

function isChange(state: number, dataOnly: boolean): boolean {
  return state !== BLOCK_ABSENT && !(dataOnly && state === BLOCK_ZERO);
}

export interface ChangeRun {
  readonly first: number;
  readonly count: number;
  readonly zero: boolean;
}

/** Runs of changed blocks, data and zeros apart. */
export function* changedRuns(clone: Clone): Generator<ChangeRun> {
  const { states } = clone.direct.layer!;
  const view = new Uint8Array(states);
  const kindOf = (block: number) => {
    const state = visibleState(view[block]!);
    return state === BLOCK_ABSENT ? undefined : state === BLOCK_ZERO;
  };
  const step = 4096;
  for (let block = 0; block < view.length;) {
    if (block % step === 0 && isAllZero(view.subarray(block, block + step))) {
      block += step;
      continue;
    }
    const zero = kindOf(block);
    const first = block++;
    if (zero === undefined) continue;
    while (block < view.length && kindOf(block) === zero) block++;
    yield { first, count: block - first, zero };
  }
}
