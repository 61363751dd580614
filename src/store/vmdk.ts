/**
 * What must hold of a sparse vmdk file before qemu-img may see it: it does not only lead to other files, and every
 * grain that its tables name lies within it (QEMU reads zeros where a file was cut short within its last grain).
 *
 * Header (little-endian), from VMware's "Virtual Disk Format 5.0"; offsets and sizes in sectors of 512 bytes:
 *   0 4 magic "KDMV"   12 8 capacity     44 4 entries in a grain table
 *   8 4 flags          20 8 grain size   56 8 offset of the grain directory
 * Directory entry: u32 offset of a grain table. Table entry: u32 offset of a grain; 0 absent, 1 zeros.
 */
import { fstatSync, readSync } from 'node:fs';
import { GridError } from '../core/errors.ts';
import { IMAGE_BYTES_MAX } from '../core/limits.ts';
import { refersElsewhere } from './qcow2.ts';

const SECTOR_BYTES = 512;
/** Grains are compressed, each with a length of its own: there, what is missing does not decompress. */
const FLAG_COMPRESSED = 1 << 16;
/** The format has 512; QEMU accepts no more. */
const TABLE_ENTRIES_MAX = 512;

/** Throws bad-request for a reference, bad-format for damage; `file` is for the message. */
export function checkVmdk(fd: number, file: string): void {
  const fileBytes = fstatSync(fd).size;
  const cutShort = () =>
    new GridError('bad-format', `${file} is cut short: it names data beyond its ${fileBytes} bytes`);
  const readAt = (offset: number, length: number): Buffer => {
    if (offset + length > fileBytes) throw cutShort();
    const bytes = Buffer.allocUnsafe(length);
    for (let done = 0; done < length;) {
      const count = readSync(fd, bytes, done, length - done, offset + done);
      if (count === 0) throw cutShort();
      done += count;
    }
    return bytes;
  };
  const header = readAt(0, SECTOR_BYTES);
  const capacity = Number(header.readBigUInt64LE(12));
  // Then the header only leads to a descriptor, which names other files.
  if (capacity === 0) throw refersElsewhere(file, 'other files');
  if (header.readUInt32LE(8) & FLAG_COMPRESSED) return;
  const grain = Number(header.readBigUInt64LE(20));
  const perTable = header.readUInt32LE(44);
  if (
    capacity * SECTOR_BYTES > IMAGE_BYTES_MAX ||
    grain === 0 ||
    perTable === 0 ||
    perTable > TABLE_ENTRIES_MAX
  ) {
    throw new GridError('bad-format', `${file} is a damaged vmdk: its header has wild sizes`);
  }
  const grains = Math.ceil(capacity / grain);
  const directory = readAt(
    Number(header.readBigUInt64LE(56)) * SECTOR_BYTES,
    Math.ceil(grains / perTable) * 4,
  );
  const seen = new Set<number>();
  for (let at = 0; at < directory.length; at += 4) {
    const tableAt = directory.readUInt32LE(at);
    if (tableAt <= 1) continue;
    // Each table once: else a small file could keep us reading for hours.
    if (seen.has(tableAt))
      throw new GridError('bad-format', `${file} is a damaged vmdk: it uses a table twice`);
    seen.add(tableAt);
    const table = readAt(tableAt * SECTOR_BYTES, perTable * 4);
    for (let entry = 0; entry < perTable; entry++) {
      const grainAt = table.readUInt32LE(entry * 4);
      const left = capacity - ((at / 4) * perTable + entry) * grain;
      if (left <= 0) break;
      if (grainAt > 1 && (grainAt + Math.min(grain, left)) * SECTOR_BYTES > fileBytes) throw cutShort();
    }
  }
}
