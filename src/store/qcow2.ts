/**
 * What must hold of a qcow2 file before qemu-img may see it: it refers to no other file, is not encrypted, and
 * every cluster that its tables name lies within it. qemu-img itself opens the files that a header names, and
 * reads zeros, without an error, where a file was cut short.
 *
 * Header (big-endian), from QEMU's docs/interop/qcow2.txt:
 *   0 4 magic "QFI\xfb"        20 4 cluster_bits           40 8 l1_table_offset
 *   4 4 version 2 or 3         24 8 size                   72 8 incompatible_features (version 3)
 *   8 8 backing_file_offset    32 4 crypt_method
 *  16 4 backing_file_size      36 4 l1_size
 * L1 entry: bits 9–55 offset of an L2 table. L2 entry (16 bytes with extended entries, else 8): bit 62 compressed;
 *   if not: bits 9–55 offset, bit 0 reads as zeros. If so: with x = 62 − (cluster_bits − 8), bits 0…x−1 offset,
 *   bits x…61 further sectors of 512 bytes.
 */
import { fstatSync, readSync } from 'node:fs';
import { GridError } from '../core/errors.ts';
import { IMAGE_BYTES_MAX } from '../core/limits.ts';

const INCOMPATIBLE_CORRUPT = 1 << 1;
const INCOMPATIBLE_DATA_FILE = 1 << 2;
const INCOMPATIBLE_EXTENDED_L2 = 1 << 4;
const SECTOR_BYTES = 512;
const HIGH = 2 ** 32;

/** Throws bad-request for a reference or encryption, bad-format for damage; `file` is for the message. */
export async function checkQcow2(fd: number, file: string, signal: AbortSignal | undefined): Promise<void> {
  const fileBytes = fstatSync(fd).size;
  const cutShort = () =>
    new GridError('bad-format', `${file} is cut short: its tables name data beyond its ${fileBytes} bytes`);
  const damaged = (why: string) => new GridError('bad-format', `${file} is a damaged qcow2: ${why}`);
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
  const header = readAt(0, 72);
  const version = header.readUInt32BE(4);
  const features = version >= 3 ? readAt(72, 8).readUInt32BE(4) : 0;
  if (header.readBigUInt64BE(8) !== 0n) throw refersElsewhere(file, 'a backing file');
  if (features & INCOMPATIBLE_DATA_FILE) throw refersElsewhere(file, 'an external data file');
  if (header.readUInt32BE(32) !== 0) {
    throw new GridError('bad-request', `${file} is encrypted: decrypt it with qemu-img convert first`);
  }
  if (features & INCOMPATIBLE_CORRUPT) {
    throw damaged(`QEMU has marked it as corrupt; see 'qemu-img check -r all'`);
  }
  const clusterBits = header.readUInt32BE(20);
  const size = Number(header.readBigUInt64BE(24));
  const l1Size = header.readUInt32BE(36);
  const l1Offset = Number(header.readBigUInt64BE(40));
  if (clusterBits < 9 || clusterBits > 21) throw damaged(`clusters of 2^${clusterBits} bytes`);
  if (size > IMAGE_BYTES_MAX)
    throw new GridError('bad-request', `${file} has ${size} bytes, more than ${IMAGE_BYTES_MAX}`);

  const clusterBytes = 2 ** clusterBits;
  const entryBytes = features & INCOMPATIBLE_EXTENDED_L2 ? 16 : 8;
  const entriesPerTable = clusterBytes / entryBytes;
  const tables = Math.ceil(size / (clusterBytes * entriesPerTable));
  if (tables > l1Size) throw damaged('its L1 table is too short for its size');
  const l1 = readAt(l1Offset, tables * 8);
  // Bits 9–55 as high and low word.
  const offsetOf = (entries: Buffer, at: number) =>
    (entries.readUInt32BE(at) & 0x00ffffff) * HIGH + ((entries.readUInt32BE(at + 4) & 0xfffffe00) >>> 0);
  const compressedOffsetBits = 62 - (clusterBits - 8);
  const seen = new Set<number>();
  for (let table = 0; table < tables; table++) {
    const l2Offset = offsetOf(l1, table * 8);
    if (l2Offset === 0) continue;
    // Each table once: else a small file could keep us reading for hours.
    if (seen.has(l2Offset)) throw damaged('two entries of its L1 table are the same');
    seen.add(l2Offset);
    const l2 = readAt(l2Offset, clusterBytes);
    for (let entry = 0; entry < entriesPerTable; entry++) {
      const at = entry * entryBytes;
      const high = l2.readUInt32BE(at);
      if (high === 0 && l2.readUInt32BE(at + 4) === 0) continue;
      const guestOffset = (table * entriesPerTable + entry) * clusterBytes;
      if (guestOffset >= size) break;
      let end: number;
      if (high & 0x40000000) {
        const [offset, sectors] = compressedExtent(high, l2.readUInt32BE(at + 4), compressedOffsetBits);
        // The last sector may be partly there: what is in it only the decoder knows.
        end = Math.floor(offset / SECTOR_BYTES) * SECTOR_BYTES + sectors * SECTOR_BYTES + 1;
      } else {
        const offset = offsetOf(l2, at);
        const zeros = entryBytes === 8 && (l2.readUInt32BE(at + 4) & 1) !== 0;
        end = offset === 0 || zeros ? 0 : offset + Math.min(clusterBytes, size - guestOffset);
      }
      if (end > fileBytes) throw cutShort();
    }
    if (table % 16 === 15) await new Promise(setImmediate);
    if (signal?.aborted) throw new GridError('closed', `the import of ${file} was cancelled`);
  }
}

/** Offset, and full sectors between the one it starts in and the last. */
function compressedExtent(high: number, low: number, offsetBits: number): [offset: number, sectors: number] {
  const word = (BigInt(high) << 32n) | BigInt(low);
  const offset = Number(word & ((1n << BigInt(offsetBits)) - 1n));
  const sectors = Number((word & ((1n << 62n) - 1n)) >> BigInt(offsetBits));
  return [offset, sectors];
}

export function refersElsewhere(file: string, to: string): GridError {
  return new GridError(
    'bad-request',
    `${file} refers to ${to}, and an image must stand alone: ` +
      `flatten it first with 'qemu-img convert -O qcow2 ${file} flat.qcow2'`,
  );
}
