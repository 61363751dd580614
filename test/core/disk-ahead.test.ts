/** What is read ahead from the disk, as the kernel's page cache shows it (fincore of util-linux). */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { closeSync, fsyncSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { DiskAhead } from '../../src/core/disk-ahead.ts';
import { UNIT_ABSENT, UNIT_PRESENT } from '../../src/core/image.ts';
import { KIB } from '../../src/core/limits.ts';
import { NOTE_READ, noteRange, wasQuarterRead, wasRead } from '../../src/core/unit-notes.ts';

const UNIT_BYTES = 64 * KIB;
const UNITS = 1024;

const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-ahead-'));
const file = path.join(folder, 'data');
const fd = openSync(file, 'w+');
for (let unit = 0; unit < UNITS; unit++) writeSync(fd, Buffer.alloc(UNIT_BYTES, unit));
fsyncSync(fd);
after(() => {
  closeSync(fd);
  rmSync(folder, { recursive: true });
});

const residentUnits = () =>
  Number(execFileSync('fincore', ['-n', '-b', '-r', '-o', 'RES', file], { encoding: 'utf8' })) / UNIT_BYTES;

function drop(): void {
  execFileSync('dd', [`of=${file}`, 'oflag=nocache', 'conv=notrunc', 'count=0', 'status=none']);
}

/** An open of the file: all of it is here but for the units named. `read`: what earlier opens had, if anybody knows. */
function open(absent: readonly number[] = [], read?: readonly number[]) {
  drop();
  const touched = new SharedArrayBuffer(UNITS);
  const notes = new SharedArrayBuffer(UNITS);
  const ranges = (unit: number, from: number, end: number) =>
    noteRange(new Uint8Array(notes), unit, UNIT_BYTES, from, end);
  for (const unit of read ?? []) new Uint8Array(notes)[unit] = NOTE_READ;
  const states = new SharedArrayBuffer(UNITS);
  const bytes = new Uint8Array(states).fill(UNIT_PRESENT);
  for (const unit of absent) bytes[unit] = UNIT_ABSENT;
  const met = new SharedArrayBuffer(UNITS);
  return {
    ahead: new DiskAhead({ fd, unitBytes: UNIT_BYTES, states, touched, ...(read ? { notes } : {}) }, met),
    met: new Uint8Array(met),
    ranges,
  };
}

/** Reads were answered, one after the other. */
function answered(ahead: DiskAhead, reads: number): void {
  for (let i = 0; i < reads; i++) ahead.go();
}

async function shows(units: number): Promise<void> {
  for (let tries = 0; residentUnits() !== units && tries < 200; tries++) await sleep(5);
  assert.equal(residentUnits(), units);
}

drop();
const skip = residentUnits() === 0 ? false : 'the temp folder keeps what it has in memory';

test(
  'what a reader comes to is read to its end, and more each time behind it, past what is not here',
  { skip },
  async () => {
    const { ahead, met } = open([11, 12]);
    ahead.note(10);
    ahead.go();
    await shows(2);
    answered(ahead, 8);
    await shows(3);
    assert.deepEqual([...met.subarray(9, 16)], [0, 2, 0, 0, 1, 1, 0]);
    // What was asked for asks for nothing.
    ahead.note(13);
    answered(ahead, 8);
    await shows(3);
    ahead.note(100);
    answered(ahead, 8);
    await shows(3 + 5);
  },
);

test('a reader that jumps causes sixteen units more than it comes to, and no more', { skip }, async () => {
  const { ahead } = open();
  let met = 0;
  for (let unit = 0; unit < UNITS; unit += 64, met++) {
    ahead.note(unit);
    answered(ahead, 80);
  }
  await sleep(50);
  const behind = residentUnits() - met;
  assert.ok(behind >= 16 && behind < 16 + 32, `${behind} units behind the ${met}`);
});

test('of what is here, what nobody has read is not read ahead where others were', { skip }, async () => {
  const read = [3, 200, 201, 900, 1020];
  const { ahead, met } = open([201], read);
  ahead.note(900);
  answered(ahead, 8);
  await shows(4);
  assert.deepEqual(
    read.map((unit) => met[unit]),
    [1, 1, 0, 2, 1],
  );
});

test('where nobody has read anything yet, what is here is read ahead', { skip }, async () => {
  const { ahead } = open([], []);
  ahead.note(10);
  answered(ahead, 8);
  await shows(3);
});

test('each unit is asked for once by all threads of an open together', { skip }, async () => {
  const { ahead, met } = open();
  ahead.note(5);
  answered(ahead, 8);
  await shows(3);
  drop();
  ahead.note(5);
  ahead.note(6);
  answered(ahead, 8);
  assert.deepEqual([...met.subarray(5, 8)], [2, 2, 1]);
  assert.equal(residentUnits(), 0);
});

test(
  'of a unit, the quarters that readers had are read ahead, all where nobody knows',
  { skip },
  async () => {
    const { ahead, ranges } = open([], [7]);
    ranges(5, 0, 1);
    ranges(6, 3 * 16 * KIB, UNIT_BYTES);
    ahead.note(5);
    answered(ahead, 8);
    await shows(0.25 + 0.25 + 1);
  },
);

test('a range is noted as the quarters that it touches', () => {
  const quartersOf = (from: number, end: number) => {
    const notes = new Uint8Array(new SharedArrayBuffer(1));
    noteRange(notes, 0, UNIT_BYTES, from, end);
    assert.ok(wasRead(notes[0]!));
    return [0, 1, 2, 3].map((quarter) => Number(wasQuarterRead(notes[0]!, quarter)));
  };
  const quarter = UNIT_BYTES / 4;
  assert.deepEqual(quartersOf(0, 1), [1, 0, 0, 0]);
  assert.deepEqual(quartersOf(quarter - 1, quarter + 1), [1, 1, 0, 0]);
  assert.deepEqual(quartersOf(quarter, 2 * quarter), [0, 1, 0, 0]);
  assert.deepEqual(quartersOf(quarter + 5, UNIT_BYTES), [0, 1, 1, 1]);
  assert.deepEqual(quartersOf(0, UNIT_BYTES), [1, 1, 1, 1]);
  assert.ok(!wasRead(0) && !wasRead(2));
});
