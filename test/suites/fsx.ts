/**
 * In the manner of fsx: one random operation after the other on a file of fixed size and on a buffer, compared all
 * along. Reads and writes buffered and O_DIRECT, mapped reads and writes, truncation (refused), holes and zeroed
 * ranges (or their refusal, where a driver has none), fsync, dropped pages, reopen.
 */
import assert from 'node:assert/strict';
import {
  closeSync,
  constants,
  fsyncSync,
  ftruncateSync,
  openSync,
  readFileSync,
  readSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { constants as osConstants } from 'node:os';
import { dropPages, fallocate, withMapping } from './mapped-file.ts';

const FALLOC_PUNCH_HOLE = 3;
const FALLOC_ZERO_RANGE = 17;

/** xorshift32: the same operations for the same seed. */
export function randomFrom(seed: number): (below: number) => number {
  let state = seed >>> 0 || 1;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}

export interface FsxOptions {
  readonly seed: number;
  readonly operations: number;
  /** Whether ranges can be punched and zeroed; else both must be refused with EOPNOTSUPP and change nothing. */
  readonly trims: boolean;
}

/** `reference` holds what `file` holds, before and after. A failure names the seed and the step. */
export function fsx(file: string, reference: string, options: FsxOptions): void {
  const random = randomFrom(options.seed);
  const model = readFileSync(reference);
  const openBy = (direct: boolean) => openSync(file, constants.O_RDWR | (direct ? constants.O_DIRECT : 0));
  let fds = [openBy(false), openBy(true)] as const;
  const range = (aligned: boolean, max: number): [number, number] => {
    const offset = aligned ? random(model.length / 4096) * 4096 : random(model.length);
    const length = aligned ? (1 + random(max / 4096)) * 4096 : 1 + random(max);
    return [offset, Math.min(length, model.length - offset)];
  };
  const fill = (length: number) => Buffer.alloc(length, `${random(1_000_000)},`);
  const trim = (fd: number, offset: number, length: number, note: string) => {
    const errno = fallocate(fd, random(2) ? FALLOC_PUNCH_HOLE : FALLOC_ZERO_RANGE, offset, length);
    assert.equal(errno, options.trims ? 0 : osConstants.errno.EOPNOTSUPP, note);
    if (options.trims) model.fill(0, offset, offset + length);
  };
  const mapped = (offset: number, length: number, note: string) => {
    withMapping(file, 'shared', offset, length, (mapping) => {
      assert.ok(mapping.read(0, length).equals(model.subarray(offset, offset + length)), note);
      const bytes = fill(1 + random(length));
      const start = random(length - bytes.length + 1);
      mapping.write(start, bytes);
      bytes.copy(model, offset + start);
      if (random(2) === 0) mapping.sync();
    });
  };
  try {
    for (let step = 0; step < options.operations; step++) {
      const what = random(24);
      const direct = random(3) === 0;
      const fd = fds[direct ? 1 : 0];
      const isMapped = what >= 16 && what < 18;
      const [offset, length] = range(direct || isMapped, random(16) === 0 ? 1 << 20 : 1 << 15);
      const note = `seed ${options.seed}, step ${step}: operation ${what}${direct ? ' direct' : ''} at ${offset} + ${length}`;
      if (what < 8) {
        const bytes = Buffer.alloc(length);
        assert.equal(readSync(fd, bytes, 0, length, offset), length, note);
        assert.ok(bytes.equals(model.subarray(offset, offset + length)), note);
      } else if (what < 16) {
        const bytes = fill(length);
        assert.equal(writeSync(fd, bytes, 0, length, offset), length, note);
        bytes.copy(model, offset);
      } else if (isMapped) mapped(offset, length, note);
      else if (what < 20) trim(fd, offset, length, note);
      else if (what === 20) fsyncSync(fd);
      else if (what === 21) dropPages(fds[0]);
      else if (what === 22) {
        const size = random(model.length);
        assert.throws(() => ftruncateSync(fd, size), { code: 'EPERM' }, note);
      } else {
        for (const old of fds) closeSync(old);
        fds = [openBy(false), openBy(true)];
      }
    }
    // What the kernel kept must not be all that agrees.
    fsyncSync(fds[0]);
    dropPages(fds[0]);
    const bytes = Buffer.alloc(model.length);
    for (let at = 0; at < bytes.length;) at += readSync(fds[0], bytes, at, bytes.length - at, at);
    assert.ok(bytes.equals(model), `seed ${options.seed}: the whole file at the end`);
  } finally {
    for (const fd of fds) closeSync(fd);
    writeFileSync(reference, model);
  }
}
