/** `DirectFile` alone, over real files: what it refuses, what it leaves behind when it fails, whose claims it touches. */
import assert from 'node:assert/strict';
import { closeSync, constants, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { Worker } from 'node:worker_threads';
import { DirectFile, pwriteFull } from '../../src/core/direct-io.ts';
import {
  BLOCK_ABSENT,
  BLOCK_BUSY_ABSENT,
  BLOCK_BUSY_ZERO,
  BLOCK_DATA,
  BLOCK_FROZEN,
  BLOCK_ZERO,
  UNIT_PRESENT,
} from '../../src/core/image.ts';
import type { DirectLayer, DirectMap } from '../../src/core/image.ts';
import { hasCode } from '../suites/image.ts';

const BLOCK = 4096;
const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-direct-'));
const fds: number[] = [];
after(() => {
  for (const fd of fds) closeSync(fd);
  rmSync(folder, { recursive: true });
});

function open(name: string, flags: number, sizeBytes?: number): number {
  const fd = openSync(path.join(folder, name), flags, 0o600);
  fds.push(fd);
  if (sizeBytes !== undefined) ftruncateSync(fd, sizeBytes);
  return fd;
}

const NEW = constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC;
let made = 0;

/** Ten blocks over a base of five that are all 0xbb, the last 96 bytes of the image missing. */
function makeMap(
  flags: { data?: number; map?: number } = {},
): DirectMap & { layer: DirectLayer; name: string } {
  const name = `map${++made}`;
  const sizeBytes = 10 * BLOCK - 96;
  const baseFd = open(`${name}.base`, NEW);
  pwriteFull(baseFd, Buffer.alloc(5 * BLOCK, 0xbb), 0);
  open(`${name}.data`, NEW, sizeBytes);
  open(`${name}.map`, NEW, 10);
  const states = new SharedArrayBuffer(5);
  new Uint8Array(states).fill(UNIT_PRESENT);
  return {
    name,
    sizeBytes,
    base: { fd: baseFd, unitBytes: BLOCK, states, touched: new SharedArrayBuffer(5) },
    layer: {
      dataFd: open(`${name}.data`, flags.data ?? constants.O_RDWR),
      mapFd: open(`${name}.map`, flags.map ?? constants.O_RDWR),
      mapOffsetBytes: 0,
      blockBytes: BLOCK,
      states: new SharedArrayBuffer(10),
      dirtyPages: new SharedArrayBuffer(1),
    },
  };
}

const statesOf = (map: { layer: DirectLayer }) => new Uint8Array(map.layer.states);
const mapFileOf = (map: { name: string }) => [...readFileSync(path.join(folder, `${map.name}.map`))];

test('a read over the end of the base gives its bytes and then zeros, one over the end of the image is refused', () => {
  const map = makeMap();
  const file = new DirectFile(map);
  const target = Buffer.alloc(BLOCK, 1);
  assert.ok(file.read(target, 5 * BLOCK - 100));
  assert.ok(target.subarray(0, 100).equals(Buffer.alloc(100, 0xbb)));
  assert.ok(target.subarray(100).equals(Buffer.alloc(BLOCK - 100)));
  assert.ok(file.read(target.subarray(0, 10), map.sizeBytes - 10));
  for (const offset of [map.sizeBytes - 9, -1, Number.NaN, 2 ** 53]) {
    assert.throws(() => file.read(target.subarray(0, 10), offset), hasCode('bad-request'));
    assert.throws(() => file.write(target.subarray(0, 10), offset), hasCode('bad-request'));
  }
});

test('a base or data file that became shorter is local-io, not zeros', () => {
  const map = makeMap();
  const file = new DirectFile(map);
  assert.ok(file.write(Buffer.alloc(BLOCK, 7), 6 * BLOCK));
  ftruncateSync(map.base.fd, BLOCK);
  assert.throws(() => file.read(Buffer.alloc(BLOCK), 2 * BLOCK), hasCode('local-io'));
  ftruncateSync(map.layer.dataFd, 6 * BLOCK + 5);
  assert.throws(() => file.read(Buffer.alloc(BLOCK), 6 * BLOCK), hasCode('local-io'));
});

test('a unit that is not present is left to the main thread, and one that is read is marked as touched', () => {
  const map = makeMap();
  const units = new Uint8Array(map.base.states);
  units[1] = 0;
  const file = new DirectFile(map);
  assert.equal(file.read(Buffer.alloc(2 * BLOCK), 0), false);
  assert.ok(file.read(Buffer.alloc(BLOCK), 2 * BLOCK));
  assert.equal(new Uint8Array(map.base.touched)[2], 1);
});

test('the last, short block is whole when a write goes to the end of the image', () => {
  const map = makeMap();
  const file = new DirectFile(map);
  assert.equal(file.write(Buffer.alloc(100), 9 * BLOCK), false, 'a part of it needs the rest');
  assert.ok(file.write(Buffer.alloc(BLOCK - 96, 3), 9 * BLOCK));
  assert.equal(statesOf(map)[9], BLOCK_DATA);
});

test('a write that meets a block of another thread undoes its own claims and leaves that one alone', () => {
  const map = makeMap();
  const states = statesOf(map);
  states.set([BLOCK_ABSENT, BLOCK_ZERO, BLOCK_DATA, BLOCK_BUSY_ZERO], 0);
  assert.equal(new DirectFile(map).write(Buffer.alloc(4 * BLOCK), 0), false);
  assert.deepEqual([...states.subarray(0, 4)], [BLOCK_ABSENT, BLOCK_ZERO, BLOCK_DATA, BLOCK_BUSY_ZERO]);
});

test('a write whose data or map cannot be written leaves states and map as they were', () => {
  for (const flags of [{ data: constants.O_RDONLY }, { map: constants.O_RDONLY }]) {
    const map = makeMap(flags);
    const states = statesOf(map);
    states.set([BLOCK_ABSENT, BLOCK_ZERO, BLOCK_DATA, BLOCK_ABSENT], 0);
    const before = mapFileOf(map);
    assert.throws(() => new DirectFile(map).write(Buffer.alloc(4 * BLOCK), 0), { code: 'EBADF' });
    assert.deepEqual([...states.subarray(0, 4)], [BLOCK_ABSENT, BLOCK_ZERO, BLOCK_DATA, BLOCK_ABSENT]);
    assert.deepEqual(mapFileOf(map), before);
    assert.equal(new Uint8Array(map.layer.dirtyPages)[0], 0);
  }
});

test('fillBlock does nothing unless the block is what the caller took it for', () => {
  const map = makeMap();
  const states = statesOf(map);
  const file = new DirectFile(map);
  const pairs = [
    [BLOCK_ABSENT, BLOCK_ZERO],
    [BLOCK_ABSENT, BLOCK_DATA],
    [BLOCK_ABSENT, BLOCK_BUSY_ABSENT],
    [BLOCK_ZERO, BLOCK_ABSENT],
    [BLOCK_ZERO, BLOCK_BUSY_ZERO],
  ] as const;
  for (const [expected, is] of pairs) {
    states[3] = is;
    assert.equal(file.fillBlock(3, expected, Buffer.alloc(BLOCK, 9)), false);
    assert.equal(states[3], is);
  }
  assert.deepEqual(
    [...readFileSync(path.join(folder, `${map.name}.data`)).subarray(3 * BLOCK, 4 * BLOCK)].filter(
      (b) => b !== 0,
    ),
    [],
  );
  states[3] = BLOCK_ZERO;
  assert.ok(file.fillBlock(3, BLOCK_ZERO, Buffer.alloc(BLOCK, 9)));
  assert.equal(states[3], BLOCK_DATA);
  assert.equal(mapFileOf(map)[3], BLOCK_DATA);
});

test('a write longer than a request is left to the main thread, an image without layer is read-only', () => {
  const map = makeMap();
  const file = new DirectFile({ ...map, sizeBytes: 4 * 1024 * 1024 });
  assert.equal(file.write(Buffer.alloc(2 * 1024 * 1024), 0), false);
  const { layer, ...image } = map;
  assert.ok(layer);
  assert.throws(() => new DirectFile(image).write(Buffer.alloc(1), 0), hasCode('read-only'));
});

/**
 * Guards `if (this.#claims[i] === 1)` in #commit and the runs in #writeMap: without them the block that was trimmed
 * and claimed by another while the data was on its way is published. O_DSYNC makes that way long enough to act.
 */
test('a block that is trimmed and claimed by another while a write over it runs is not published by that write', async (t) => {
  let acted = 0;
  for (let attempt = 0; attempt < 50 && acted < 3; attempt++) {
    const map = makeMap({ data: constants.O_RDWR | constants.O_DSYNC });
    const states = statesOf(map);
    states[2] = BLOCK_DATA;
    const worker = new Worker(
      `const { workerData } = require('node:worker_threads');
       import(workerData.module).then(({ DirectFile }) => {
         const done = new DirectFile(workerData.map).write(Buffer.alloc(5 * 4096, 1), 0);
         if (!done) throw new Error('not written');
       });`,
      {
        eval: true,
        workerData: { map, module: new URL('../../src/core/direct-io.ts', import.meta.url).href },
      },
    );
    const ended = new Promise<void>((resolve, reject) => {
      worker.on('error', reject);
      worker.on('exit', () => resolve());
    });
    while (Atomics.load(states, 4) === BLOCK_ABSENT) await new Promise(setImmediate);
    Atomics.store(states, 2, BLOCK_BUSY_ZERO);
    const inTime = Atomics.load(states, 4) === BLOCK_BUSY_ABSENT;
    await ended;
    if (!inTime) continue;
    acted++;
    assert.deepEqual([...states.subarray(0, 5)], [1, 1, BLOCK_BUSY_ZERO, 1, 1]);
    assert.deepEqual(mapFileOf(map).slice(0, 5), [1, 1, 0, 1, 1]);
  }
  t.diagnostic(`${acted} writes were met in the middle`);
  assert.ok(acted > 0, 'no write was met in the middle in 50 attempts');
});

/** Blocks 0, 1 of frozen layer 0 are 0xf0, blocks 1, 2 of frozen layer 1 are 0xf1, which ends within block 2. */
function makeChain() {
  const map = makeMap();
  const fds = [0xf0, 0xf1].map((value) => {
    const fd = open(`${map.name}.frozen${value}`, NEW);
    pwriteFull(fd, Buffer.alloc(3 * BLOCK - 10, value), 0);
    return { fd, sizeBytes: 3 * BLOCK - 10 };
  });
  const layer = { ...map.layer, frozen: fds, budget: new SharedArrayBuffer(12) };
  new Int32Array(layer.budget).set([2, 1]);
  statesOf(map).set([BLOCK_FROZEN, BLOCK_FROZEN + 1, BLOCK_FROZEN + 1, BLOCK_ZERO], 0);
  return { ...map, layer };
}

test('blocks of frozen layers are read from their files, zeros beyond the end of a shorter one', () => {
  const file = new DirectFile(makeChain());
  const target = Buffer.alloc(5 * BLOCK, 1);
  assert.ok(file.read(target, 0));
  const expected = Buffer.concat([
    Buffer.alloc(BLOCK, 0xf0),
    Buffer.alloc(2 * BLOCK - 10, 0xf1),
    Buffer.alloc(10 + BLOCK),
    Buffer.alloc(BLOCK, 0xbb),
  ]);
  assert.ok(target.equals(expected));
});

test('a write over frozen blocks makes them data, one over a part of one is left to the main thread', () => {
  const map = makeChain();
  const file = new DirectFile(map);
  assert.equal(file.write(Buffer.alloc(10), 0), false);
  assert.equal(statesOf(map)[0], BLOCK_FROZEN);
  assert.ok(file.write(Buffer.alloc(2 * BLOCK, 7), BLOCK));
  assert.deepEqual([...statesOf(map).subarray(0, 3)], [BLOCK_FROZEN, BLOCK_DATA, BLOCK_DATA]);
  assert.deepEqual(mapFileOf(map).slice(0, 3), [0, 1, 1]);
});

test('a first write beyond the budget is no-space and leaves everything as it was, an overwrite costs none of it', () => {
  const map = makeChain();
  const file = new DirectFile(map);
  const before = [...statesOf(map)];
  assert.throws(() => file.write(Buffer.alloc(3 * BLOCK), 0), hasCode('no-space'));
  assert.deepEqual([...statesOf(map)], before);
  assert.ok(file.write(Buffer.alloc(2 * BLOCK), 0));
  assert.throws(() => file.write(Buffer.alloc(BLOCK), 2 * BLOCK), hasCode('no-space'));
  assert.ok(file.write(Buffer.alloc(2 * BLOCK, 3), 0));
  assert.equal(new Int32Array(map.layer.budget)[0], 0);
});

test('a write that fails gives back what it took of the budget', () => {
  const map = makeChain();
  const file = new DirectFile({
    ...map,
    layer: { ...map.layer, dataFd: open(`${map.name}.data`, constants.O_RDONLY) },
  });
  assert.throws(() => file.write(Buffer.alloc(2 * BLOCK), 0), { code: 'EBADF' });
  assert.equal(new Int32Array(map.layer.budget)[0], 2);
});

test('copyUp takes absent and frozen blocks, not data, zeros or what another thread is filling, and says so', () => {
  const map = makeChain();
  new Int32Array(map.layer.budget)[1] = 0;
  const states = statesOf(map);
  states.set([BLOCK_FROZEN, BLOCK_DATA, BLOCK_BUSY_ABSENT, BLOCK_ZERO, BLOCK_ABSENT], 0);
  const put: [number, number][] = [];
  const complete = new DirectFile(map).copyUp(0, 10, (offset, length) => put.push([offset, length]));
  assert.equal(complete, false);
  assert.deepEqual(put, [
    [0, BLOCK],
    [4 * BLOCK, 6 * BLOCK - 96],
  ]);
  assert.deepEqual([...states.subarray(0, 6)], [1, 1, BLOCK_BUSY_ABSENT, BLOCK_ZERO, 1, 1]);
});
