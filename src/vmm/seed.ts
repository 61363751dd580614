/**
 * The seed that a guest reads about itself: cloud-init's NoCloud, a disk with the label `cidata` and the files
 * meta-data and user-data. Here it is an ISO 9660 image (ECMA-119), as small as one gets:
 *
 *   sector (2048 bytes)  0-15  system area, zeros        18  path table, little-endian
 *                        16    primary volume descriptor 19  path table, big-endian
 *                        17    terminator                20  root directory   21… the files, each from a sector on
 *
 * Names have no extensions of any kind: Linux shows META-DATA.;1 as meta-data.
 */
import type { MachineSeed } from '../core/machine.ts';

const SECTOR = 2048;
const [DESCRIPTOR_AT, TERMINATOR_AT, TABLE_LE_AT, TABLE_BE_AT, ROOT_AT, FILES_AT] = [
  16, 17, 18, 19, 20, 21,
] as const;
const PATH_TABLE_BYTES = 10;
/** A recording date: years since 1900, month, day; the rest is midnight, UTC. Always the same: same seed, same bytes. */
const DATE = Buffer.from([120, 1, 1, 0, 0, 0, 0]);
/** Seeds of one size, whatever they say: one may take another's place below a guest that was forked. */
const SEED_BYTES = 64 * 1024;

export function seedImage(seed: MachineSeed): Buffer {
  const text = (lines: readonly string[]) => Buffer.from(lines.map((line) => `${line}\n`).join(''));
  const quoted = (value: string) => JSON.stringify(value); // YAML takes JSON's strings
  const metaData = text([
    `instance-id: ${quoted(seed.instanceId)}`,
    `local-hostname: ${quoted(seed.hostName)}`,
    ...(seed.sshKeys.length === 0
      ? []
      : ['public-keys:', ...seed.sshKeys.map((key) => `  - ${quoted(key)}`)]),
  ]);
  return isoImage('cidata', [
    ['META-DATA.;1', metaData],
    ['USER-DATA.;1', seed.userData === undefined ? text(['#cloud-config']) : Buffer.from(seed.userData)],
  ]);
}

function isoImage(label: string, files: readonly (readonly [name: string, bytes: Buffer])[]): Buffer {
  const sectorsOf = (bytes: Buffer) => Math.max(1, Math.ceil(bytes.length / SECTOR));
  const used = FILES_AT + files.reduce((sum, [, bytes]) => sum + sectorsOf(bytes), 0);
  const sectors = Math.max(used, SEED_BYTES / SECTOR);
  const image = Buffer.alloc(sectors * SECTOR);
  const root = directoryRecord('\0', ROOT_AT, SECTOR, true);
  const entries = [root, directoryRecord('\x01', ROOT_AT, SECTOR, true)];
  let at = FILES_AT;
  for (const [name, bytes] of files) {
    bytes.copy(image, at * SECTOR);
    entries.push(directoryRecord(name, at, bytes.length, false));
    at += sectorsOf(bytes);
  }
  Buffer.concat(entries).copy(image, ROOT_AT * SECTOR);

  const descriptor = image.subarray(DESCRIPTOR_AT * SECTOR, TERMINATOR_AT * SECTOR);
  descriptor[0] = 1;
  descriptor.write('CD001\x01', 1, 'latin1');
  descriptor.fill(' ', 8, 72);
  descriptor.write(label, 40, 'latin1');
  bothEnds32(descriptor, 80, sectors);
  bothEnds16(descriptor, 120, 1); // volumes in the set
  bothEnds16(descriptor, 124, 1); // this one's number
  bothEnds16(descriptor, 128, SECTOR);
  bothEnds32(descriptor, 132, PATH_TABLE_BYTES);
  descriptor.writeUInt32LE(TABLE_LE_AT, 140);
  descriptor.writeUInt32BE(TABLE_BE_AT, 148);
  root.copy(descriptor, 156);
  descriptor.fill(' ', 190, 813);
  for (const dateAt of [813, 830, 847, 864]) descriptor.fill('0', dateAt, dateAt + 16); // "not specified"
  descriptor[881] = 1;
  image[TERMINATOR_AT * SECTOR] = 255;
  image.write('CD001\x01', TERMINATOR_AT * SECTOR + 1, 'latin1');
  // One folder: its name's length, no extended attributes, sector, parent, name.
  for (const table of [TABLE_LE_AT, TABLE_BE_AT]) image[table * SECTOR] = 1;
  image.writeUInt32LE(ROOT_AT, TABLE_LE_AT * SECTOR + 2);
  image.writeUInt16LE(1, TABLE_LE_AT * SECTOR + 6);
  image.writeUInt32BE(ROOT_AT, TABLE_BE_AT * SECTOR + 2);
  image.writeUInt16BE(1, TABLE_BE_AT * SECTOR + 6);
  return image;
}

/** ECMA-119 9.1. */
function directoryRecord(name: string, sector: number, lengthBytes: number, isFolder: boolean): Buffer {
  const record = Buffer.alloc((33 + name.length + 1) & ~1);
  record[0] = record.length;
  bothEnds32(record, 2, sector);
  bothEnds32(record, 10, lengthBytes);
  DATE.copy(record, 18);
  record[25] = isFolder ? 2 : 0;
  bothEnds16(record, 28, 1);
  record[32] = name.length;
  record.write(name, 33, 'latin1');
  return record;
}

function bothEnds16(target: Buffer, at: number, value: number): void {
  target.writeUInt16LE(value, at);
  target.writeUInt16BE(value, at + 2);
}

function bothEnds32(target: Buffer, at: number, value: number): void {
  target.writeUInt32LE(value, at);
  target.writeUInt32BE(value, at + 4);
}
