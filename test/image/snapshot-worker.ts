/** A writer of snapshot.test.ts: counts upwards, each number in block A and, once that is written, in block B. */
import { workerData } from 'node:worker_threads';
import { DirectFile } from '../../src/core/direct-io.ts';
import type { DirectMap } from '../../src/core/image.ts';
import { QuietThread } from '../../src/core/quiet.ts';

export interface SnapshotWriter {
  readonly map: DirectMap;
  readonly counters: SharedArrayBuffer;
  readonly slot: number;
  /** [0] stop, [1] the last number that is in both. */
  readonly shared: SharedArrayBuffer;
  readonly a: number;
  readonly b: number;
  /** Blocks written for the first time, one after the other, from this one on. */
  readonly firstNew: number;
  readonly newBlocks: number;
}

const { map, counters, slot, shared, a, b, firstNew, newBlocks } = workerData as SnapshotWriter;
const file = new DirectFile(map);
const quiet = new QuietThread(counters, slot);
const view = new Int32Array(shared);

/** False when it is to stop. Not by process.exit, which ends a thread in the middle of a call to native code. */
function write(block: number, value: number): boolean {
  const bytes = Buffer.alloc(4096);
  for (let at = 0; at < bytes.length; at += 4) bytes.writeUInt32LE(value, at);
  for (let done = false; !done;) {
    quiet.enter();
    try {
      done = file.write(bytes, block * 4096);
    } finally {
      quiet.leave();
    }
    if (done) return true;
    // Held: what comes to the main thread otherwise waits here, unacknowledged, until writes go on.
    if (Atomics.load(view, 0) === 1) break;
    Atomics.wait(view, 0, 0, 0.2);
  }
  return false;
}

for (let i = 1; Atomics.load(view, 0) === 0; i++) {
  if (!write(a, i) || !write(b, i)) break;
  if (i <= newBlocks && !write(firstNew + i - 1, i)) break;
  Atomics.store(view, 1, i);
}
