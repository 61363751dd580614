/** What the agent needs of layers and disks, which whoever wires it gives, and what a new clone is made of. */
import type { Digest } from '../core/bytes.ts';
import type { Image } from '../core/image.ts';
import { GridError } from '../core/errors.ts';
import type { CloneKind, PushedState } from './clone-record.ts';

/** What a disk lies on: the digest that its lowest layer names, and folders of layers, bottom first. */
export interface CloneChain {
  readonly base: Digest;
  readonly layers: readonly string[];
}

/** A disk as of one moment; what reads it is the wiring's. */
export interface DiskSnapshot {
  close(): void;
}

/** A clone's disk, open. */
export interface CloneDisk extends Image {
  /** What the clone's own layer names as its base. */
  readonly baseDigest: Digest;
  /** Whether its own layer says nothing of any block. */
  isEmpty(): boolean;
  /** Bound of the data in its own layer; takes effect at once. */
  setQuota(quotaBytes: number | undefined): void;
  /** The disk as of now, to be read while others write to it. Throws in-use while there is another. */
  snapshot(): Promise<DiskSnapshot>;
  /** Copies whatever lies below into its own layer, durable when it resolves. */
  fillUp(options: { signal: AbortSignal; onProgress(done: number, total: number): void }): Promise<void>;
}

/** How layers are made and laid over their bases; given by whoever wires the agent. */
export interface CloneParts {
  /** Unless `durable` is false, it survives power loss when this resolves; else when `syncLayer` has resolved. */
  createLayer(folder: string, below: CloneChain, sizeBytes: number, durable?: boolean): Promise<void>;
  syncLayer(folder: string): Promise<void>;
  /** The writable disk: the layers over `image`, or over zeros when undefined. */
  openDisk(chain: CloneChain, image: Digest | undefined): Promise<CloneDisk>;
}

/** A clone to make. */
export interface CreateOptions {
  readonly image: string;
  readonly base: Digest;
  readonly sizeBytes: number;
  readonly name?: string;
  readonly kind?: CloneKind;
  readonly quotaBytes?: number;
  readonly vm?: string;
  /** The clone whose disk, as it is now, the new one starts from: it is frozen. Not open. */
  readonly from?: string;
  /** Where it was pulled from. */
  readonly pushed?: PushedState;
  /** Set for a disk that needs no base: what its layer names instead. */
  readonly detached?: Digest;
  /** Fills the clone's layer, which is there and empty, before anybody can see the clone. */
  readonly content?: (layer: CloneChain) => Promise<void>;
}

/** Of a clone that something is done to, or that is kept for somebody: `doing` as in "clone X is being <doing>". */
export function heldError(id: string, doing: string): GridError {
  const text = doing.startsWith('kept')
    ? `${doing}; resume or stop that first`
    : `being ${doing}; wait until that is done`;
  return new GridError('in-use', `clone '${id}' is ${text}`);
}
