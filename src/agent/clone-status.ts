/** What is said of clones: to the mounted tree, and to people. */
import type { Digest } from '../core/bytes.ts';
import type { CloneRecord } from './clone-record.ts';

/** What a name in the mounted tree needs to know. */
export interface CloneEntry {
  readonly id: string;
  readonly base: Digest;
  readonly sizeBytes: number;
  readonly modifiedMs: number;
}

export interface CloneStatus extends CloneRecord {
  /** Bytes on this host's disk, as du counts them: of its own layer and record … */
  readonly allocatedBytes: number;
  /** … and of the frozen layers below it, which others may share. */
  readonly sharedBytes: number;
  readonly open: boolean;
  /** Of a full clone that is being filled, or whose filling failed. */
  readonly filling?: { readonly doneBytes: number; readonly totalBytes: number; readonly failure?: string };
}

export function entryOf({ id, base, sizeBytes, created }: CloneRecord): CloneEntry {
  return { id, base, sizeBytes, modifiedMs: Date.parse(created) };
}

/** A full clone that takes in what lies below it. */
export interface Filling {
  readonly stop: AbortController;
  readonly ended: Promise<void>;
  doneBytes: number;
  totalBytes: number;
  failure?: string;
}

export function fillingOf({ doneBytes, totalBytes, failure }: Filling): CloneStatus['filling'] & {} {
  return { doneBytes, totalBytes, ...(failure === undefined ? {} : { failure }) };
}
