/**
 * Image formats: told apart by our own look at the first bytes, checked and turned into raw by qemu-img, which is
 * always given the format and never guesses (a raw disk whose guest wrote a qcow2 header would otherwise make it
 * open files of the guest's choice). An image that refers to any other file is refused for the same reason, and
 * so is one that was cut short: for qcow2, vmdk and vdi that takes a look of our own, QEMU reads zeros there.
 */
import { fstatSync, readSync } from 'node:fs';
import path from 'node:path';
import { GridError } from '../core/errors.ts';
import { IMAGE_BYTES_MAX } from '../core/limits.ts';
import type { ManifestKind } from '../core/manifest.ts';
import { checkQcow2, refersElsewhere } from './qcow2.ts';
import { firstLine, runQemuImg, shareDone } from './qemu-img.ts';
import type { QemuImgResult } from './qemu-img.ts';
import { checkVmdk } from './vmdk.ts';

/** Formats that import reads, by qemu-img's names. */
export const IMAGE_FORMATS = ['raw', 'qcow2', 'vmdk', 'vhdx', 'vpc', 'vdi'] as const;
export type ImageFormat = (typeof IMAGE_FORMATS)[number];

interface Magic {
  readonly at: number;
  readonly magic: Buffer;
  readonly format?: ImageFormat;
  /** Where there is no format: what it is and what to do about it. */
  readonly refusal?: string;
}

const text = (magic: string) => Buffer.from(magic, 'latin1');
const OBSOLETE = `convert it with 'qemu-img convert -O qcow2' first`;

const DISK_MAGICS: readonly Magic[] = [
  { at: 0, magic: text('QFI\xfb\0\0\0\x01'), refusal: `is in the obsolete format qcow: ${OBSOLETE}` },
  { at: 0, magic: text('QFI\xfb'), format: 'qcow2' },
  { at: 0, magic: text('QED\0'), refusal: `is in the obsolete format qed: ${OBSOLETE}` },
  { at: 0, magic: text('KDMV'), format: 'vmdk' },
  { at: 0, magic: text('COWD'), refusal: `is in an obsolete vmdk format: ${OBSOLETE}` },
  {
    at: 0,
    magic: text('# Disk DescriptorFile'),
    refusal: `is a vmdk descriptor whose data is in other files: flatten it with 'qemu-img convert -O qcow2' first`,
  },
  { at: 0, magic: text('vhdxfile'), format: 'vhdx' },
  { at: 0, magic: text('conectix'), format: 'vpc' },
  { at: 64, magic: Buffer.from([0x7f, 0x10, 0xda, 0xbe]), format: 'vdi' },
];

/** No disk starts like these, but downloads do. */
const ARCHIVE_MAGICS: readonly Magic[] = [
  ['gzip', '\x1f\x8b'],
  ['xz', '\xfd7zXZ\0'],
  ['zstd', '\x28\xb5\x2f\xfd'],
  ['bzip2', 'BZh'],
  ['zip', 'PK\x03\x04'],
].map(([name, magic]) => ({
  at: 0,
  magic: text(magic!),
  refusal: `is a ${name} archive: unpack it first, or name the format raw`,
}));

/**
 * The format of an open file by its first bytes: raw when nothing else fits. Kernels and the like are always raw.
 * Throws bad-request for what is no image by itself; `file` is for the message.
 */
export function detectFormat(fd: number, file: string, kind: ManifestKind): ImageFormat {
  if (kind !== 'disk' && kind !== 'data') return 'raw';
  const head = Buffer.alloc(512);
  const length = readSync(fd, head, 0, head.length, 0);
  const found = [...DISK_MAGICS, ...(kind === 'disk' ? ARCHIVE_MAGICS : [])].find(
    ({ at, magic }) => at + magic.length <= length && head.subarray(at, at + magic.length).equals(magic),
  );
  if (found?.refusal !== undefined) throw new GridError('bad-request', `${file} ${found.refusal}`);
  return found?.format ?? 'raw';
}

export interface ConvertOptions {
  readonly signal: AbortSignal | undefined;
  /** Bytes of the disk done, of its size. */
  readonly onProgress: ((doneBytes: number, totalBytes: number, phase: 'unpack') => void) | undefined;
}

/**
 * Checks an image that is not raw and writes its disk to `rawFile`, sparse. Throws bad-request for one that is
 * encrypted or refers to other files, bad-format for a damaged or truncated one, unsupported without qemu-img,
 * in-use while a machine writes to it, no-space, closed.
 */
export async function convertToRaw(
  source: { readonly fd: number; readonly path: string },
  format: Exclude<ImageFormat, 'raw'>,
  rawFile: string,
  options: ConvertOptions,
): Promise<void> {
  const { signal, onProgress } = options;
  // Absolute: qemu-img takes 'nbd:…' or 'json:…' for something else than a file.
  const file = path.resolve(source.path);
  if (format === 'qcow2') await checkQcow2(source.fd, file, signal);
  else if (format === 'vdi') checkVdi(source.fd, file);
  else if (format === 'vpc') checkVpc(source.fd, file);
  else if (format === 'vmdk') checkVmdk(source.fd, file);

  const info = await qemuImg(['info', '--output=json', '-f', format, file], file, signal);
  const sizeBytes = checkedInfo(file, info.stdout);
  const check = await qemuImg(['check', '-q', '-f', format, file], file, signal, [
    CHECK_LEAKS,
    CHECK_UNSUPPORTED,
    CHECK_DAMAGED,
  ]);
  if (check.code === CHECK_DAMAGED) {
    throw new GridError(
      'bad-format',
      `${file} is damaged or cut short: ${firstLine(check)}; see 'qemu-img check'`,
    );
  }
  const onOutput = (piece: string) => {
    const share = shareDone(piece);
    if (share !== undefined) onProgress?.(Math.round(sizeBytes * share), sizeBytes, 'unpack');
  };
  await qemuImg(
    ['convert', '-p', '-W', '-f', format, '-O', 'raw', file, rawFile],
    file,
    signal,
    [],
    onOutput,
  );
}

/** Exit codes of qemu-img check beside 0. Leaked clusters cost space and no more. */
const CHECK_DAMAGED = 2;
const CHECK_LEAKS = 3;
const CHECK_UNSUPPORTED = 63;

function head(fd: number, length: number, file: string): Buffer {
  const bytes = Buffer.alloc(length);
  if (readSync(fd, bytes, 0, length, 0) < length)
    throw new GridError('bad-format', `${file} is cut short within its header`);
  return bytes;
}

function checkVdi(fd: number, file: string): void {
  const header = head(fd, 512, file);
  const needed = header.readUInt32LE(344) + header.readUInt32LE(376) * header.readUInt32LE(388);
  const { size } = fstatSync(fd);
  if (needed > size) {
    throw new GridError('bad-format', `${file} is cut short: it has ${size} bytes of ${needed}`);
  }
}

function checkVpc(fd: number, file: string): void {
  const DIFFERENCING = 4;
  if (head(fd, 512, file).readUInt32BE(60) === DIFFERENCING) throw refersElsewhere(file, 'a parent image');
}

/** The disk's size. Whatever in qemu-img's description of the image names a file must name this one. */
function checkedInfo(file: string, json: string): number {
  const visit = (value: unknown): void => {
    if (typeof value !== 'object' || value === null) return;
    for (const [key, inner] of Object.entries(value)) {
      if (typeof inner === 'string' && /filename|data-file$/.test(key) && path.resolve(inner) !== file) {
        throw refersElsewhere(file, `'${inner}'`);
      }
      if (key === 'encrypted' && inner === true) {
        throw new GridError('bad-request', `${file} is encrypted: decrypt it with qemu-img convert first`);
      }
      visit(inner);
    }
  };
  let info: unknown;
  try {
    info = JSON.parse(json);
  } catch (cause) {
    throw new GridError('unsupported', 'qemu-img info does not answer in JSON; is it too old?', { cause });
  }
  visit(info);
  const sizeBytes = (info as Record<string, unknown> | null)?.['virtual-size'];
  if (typeof sizeBytes !== 'number' || sizeBytes > IMAGE_BYTES_MAX) {
    throw new GridError(
      'bad-request',
      `${file} has ${String(sizeBytes)} bytes, more than ${IMAGE_BYTES_MAX}`,
    );
  }
  return sizeBytes;
}

/** Runs qemu-img on an image to read; an exit code that is neither 0 nor in `accepted` is an error with its line. */
async function qemuImg(
  args: readonly string[],
  file: string,
  signal: AbortSignal | undefined,
  accepted: readonly number[] = [],
  onOutput?: (piece: string) => void,
): Promise<QemuImgResult> {
  const result = await runQemuImg(args, `the import of ${file}`, signal, onOutput);
  if (result.killedBy === undefined && (result.code === 0 || accepted.includes(result.code))) return result;
  throw failed(file, args[0]!, result);
}

function failed(file: string, verb: string, result: QemuImgResult): GridError {
  const { stderr, killedBy } = result;
  if (killedBy !== undefined)
    return new GridError('local-io', `qemu-img ${verb} of ${file} was killed by ${killedBy}`);
  if (stderr.includes('No space left')) {
    return new GridError(
      'no-space',
      `no space in the store for ${file} while it is unpacked: ${firstLine(result)}`,
    );
  }
  if (/Failed to get .* lock/.test(stderr)) {
    return new GridError('in-use', `${file} is in use, by a running machine perhaps: ${firstLine(result)}`);
  }
  return new GridError(
    'bad-format',
    `${file} cannot be read, it is damaged or cut short: ${firstLine(result)}`,
  );
}
