/**
 * What several threads did to one disk, and whether what was read and what is left fits: each 1 KiB cell is a
 * register, each operation on it happened at one moment between its start and its end by a clock that all threads
 * share. A value is wrong when another operation lies wholly between its writer and its reader.
 */
import assert from 'node:assert/strict';

export const CELL_BYTES = 1024;

export interface LoggedOperation {
  /** A trim is a write of stamp 0. */
  readonly kind: 'write' | 'read';
  readonly firstCell: number;
  readonly cells: number;
  readonly stamp: number;
  readonly start: number;
  readonly end: number;
}

export interface RaceData {
  /** Two 32-bit words: the clock; how many workers have yet to begin, -1 when all shall end. */
  readonly clock: SharedArrayBuffer;
  readonly seed: number;
  readonly stepsMax: number;
  readonly firstStamp: number;
}

export function tick(ticks: Int32Array): number {
  return Atomics.add(ticks, 0, 1);
}

export function stampedBytes(cells: number, stamp: number): Buffer {
  const word = Buffer.alloc(4);
  word.writeUInt32LE(stamp);
  return Buffer.alloc(cells * CELL_BYTES, word);
}

/** Whole blocks, parts of blocks and ranges over several, all in cells. */
export function randomRange(random: () => number, cellCount: number): { firstCell: number; cells: number } {
  let firstCell = Math.floor(random() * cellCount);
  let cells = 1 + Math.floor(random() * [1, 4, 24][Math.floor(random() * 3)]!);
  if (random() < 0.5) {
    firstCell -= firstCell % 4;
    cells = Math.ceil(cells / 4) * 4;
  }
  return { firstCell, cells: Math.min(cells, cellCount - firstCell) };
}

/** Throws where a read or the final content (`finalStamps`, one per cell) cannot be explained. */
export function checkLog(
  log: readonly LoggedOperation[],
  baseStamps: readonly number[],
  finalStamps: readonly number[],
): void {
  const end = 2 ** 31;
  const writes: LoggedOperation[][] = baseStamps.map((stamp, cell) => [
    { kind: 'write', firstCell: cell, cells: 1, stamp, start: -2, end: -1 },
  ]);
  const reads: LoggedOperation[] = finalStamps.map((stamp, cell) => ({
    kind: 'read',
    firstCell: cell,
    cells: 1,
    stamp,
    start: end,
    end,
  }));
  for (const operation of log) {
    if (operation.kind === 'read') reads.push(operation);
    else for (let i = 0; i < operation.cells; i++) writes[operation.firstCell + i]!.push(operation);
  }
  for (const read of reads) {
    const all = writes[read.firstCell]!;
    const possible = all.some(
      (writer) =>
        writer.stamp === read.stamp &&
        writer.start < read.end &&
        !all.some((other) => other.start > writer.end && other.end < read.start),
    );
    const last = read.start === end ? 'in the end' : `at ${read.start} to ${read.end}`;
    assert.ok(
      possible,
      `cell ${read.firstCell} reads ${read.stamp} ${last}, which its writes do not explain`,
    );
  }
}
