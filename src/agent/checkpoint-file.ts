/**
 * A checkpoint file: all of a checkpoint that is neither memory nor disk, in one piece that is whole or refused. A
 * suspended VM has one in the state folder; a checkpoint in a store has one as its part `state`.
 *
 *   0     8  magic "GVFSCKPT"
 *   8     4  u32 LE version, 1
 *   12    4  u32 LE bytes of JSON
 *   16    j  JSON: CheckpointFacts
 *   16+j  d  device state, the Vmm's own format
 *   end  32  SHA-256 of everything before it
 */
import { isDigest, sha256 } from '../core/bytes.ts';
import type { Digest } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';
import type { CarriedVolume } from '../core/grid.ts';
import type { MachineCompatibility, MachineDescription } from '../core/machine.ts';
import type { VmRecord } from './vm-record.ts';

const MAGIC = 'GVFSCKPT';
const HEADER_BYTES = 16;
const DIGEST_BYTES = 32;
/** Device states have a few hundred KB. */
export const CHECKPOINT_FILE_BYTES_MAX = 65 * MIB;

export interface CheckpointFacts {
  readonly description: MachineDescription;
  readonly compatibility: MachineCompatibility;
  /** The base image of the disk. */
  readonly base: Digest;
  /** What the guest's memory holds and nothing else does (vm-answer.ts); of a guest that answers. */
  readonly nonce?: string;
  /** Of a checkpoint in a store: what was attached, as it was then. */
  readonly volumes?: readonly CarriedVolume[];
  /** Of a suspended VM: what it is on this host. */
  readonly local?: {
    readonly vm: VmRecord;
    readonly memoryClone: string;
    /** What the clones' layers looked like then (see seals.ts); without it the VM was not yet ended. */
    readonly diskSeal?: string;
    readonly memorySeal?: string;
  };
}

export interface Checkpoint {
  readonly facts: CheckpointFacts;
  readonly deviceState: Buffer;
}

export function encodeCheckpoint({ facts, deviceState }: Checkpoint): Buffer {
  const json = Buffer.from(JSON.stringify(facts));
  const header = Buffer.alloc(HEADER_BYTES);
  header.write(MAGIC, 'latin1');
  header.writeUInt32LE(1, 8);
  header.writeUInt32LE(json.length, 12);
  const bytes = Buffer.concat([header, json, deviceState]);
  return Buffer.concat([bytes, Buffer.from(sha256(bytes), 'hex')]);
}

/** Throws bad-format, newer-format, corrupt; `what` names it. */
export function parseCheckpoint(bytes: Buffer, what: string): Checkpoint {
  const bad = (why: string) => new GridError('bad-format', `${what} is no checkpoint: ${why}`);
  if (bytes.length > CHECKPOINT_FILE_BYTES_MAX) throw bad('over its size bound');
  if (bytes.length < HEADER_BYTES + DIGEST_BYTES) throw bad('too short');
  if (bytes.toString('latin1', 0, MAGIC.length) !== MAGIC) throw bad('a foreign file');
  const version = bytes.readUInt32LE(8);
  if (version !== 1)
    throw new GridError('newer-format', `${what} has version ${version}; this gridvfs reads 1`);
  const end = bytes.length - DIGEST_BYTES;
  if (sha256(bytes.subarray(0, end)) !== bytes.toString('hex', end))
    throw new GridError('corrupt', `${what} is damaged: it does not match its digest`);
  const stateAt = HEADER_BYTES + bytes.readUInt32LE(12);
  if (stateAt > end) throw bad('its JSON is longer than the file');
  let facts: Partial<CheckpointFacts>;
  try {
    facts = JSON.parse(bytes.toString('utf8', HEADER_BYTES, stateAt)) as Partial<CheckpointFacts>;
  } catch (cause) {
    throw new GridError('bad-format', `${what} is no checkpoint: its JSON cannot be read`, { cause });
  }
  const { description, compatibility, base } = facts;
  const good =
    typeof description === 'object' &&
    Array.isArray(description.disks) &&
    description.disks.length > 0 &&
    Number.isSafeInteger(description.memoryBytes) &&
    typeof compatibility === 'object' &&
    [compatibility.vmm, compatibility.machine, compatibility.version].every(
      (text) => typeof text === 'string',
    ) &&
    isDigest(base);
  if (!good) throw bad('a field is missing');
  return { facts: facts as CheckpointFacts, deviceState: bytes.subarray(stateAt, end) };
}
