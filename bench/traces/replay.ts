/**
 * Replays one boot of a trace against a file or an NBD server, as fast as it answers, in a process of its own (a
 * process must not read its own mount, and the bench's link runs in the bench's):
 *   node bench/traces/replay.ts --trace FILE --boot 1 --file PATH | --nbd SOCKET
 *
 * Says {"ready":true} when all is loaded, begins at a line on stdin, and says {"done":true,"seconds":…}: from before
 * the open until the last byte is here. Reads are issued in recorded order, each as soon as fewer than its recorded
 * depth are under way; there is no think time. Then, off the clock, {"sha256":…} of all that was read, piece after
 * piece in order of issue.
 */
import { closeSync, open, read, readFileSync } from 'node:fs';
import { once } from 'node:events';
import { parseArgs, promisify } from 'node:util';
import { sha256 } from '../../src/core/bytes.ts';
import { GridError } from '../../src/core/errors.ts';
import { parseTrace, summaryOf } from './format.ts';
import type { Boot, TraceRead } from './format.ts';
import { connectNbd } from './libnbd.ts';
import type { NbdClient } from './libnbd.ts';

/** Where each read's bytes go: one piece of `memory` after the other. */
export function piecesOf(boot: Boot, memory: Buffer): Buffer[] {
  let at = 0;
  return boot.reads.map(({ lengthBytes }) => memory.subarray(at, (at += lengthBytes)));
}

/** Issues the reads in order, each as soon as fewer than its depth are under way. Resolves with the most that were
 * under way at once; the first failure ends it when what is under way has ended. */
export async function replay(
  reads: readonly TraceRead[],
  readOne: (index: number) => Promise<void>,
): Promise<number> {
  const underWay = new Set<Promise<void>>();
  let deepest = 0;
  let failure: unknown;
  for (const [index, { depth }] of reads.entries()) {
    while (underWay.size >= depth) await Promise.race(underWay);
    if (failure !== undefined) break;
    const one: Promise<void> = readOne(index)
      .catch((error: unknown) => void (failure ??= error))
      .finally(() => underWay.delete(one));
    underWay.add(one);
    deepest = Math.max(deepest, underWay.size);
  }
  await Promise.all(underWay);
  if (failure !== undefined) throw failure;
  return deepest;
}

async function replayFile(path: string, boot: Boot, pieces: readonly Buffer[]): Promise<void> {
  const fd = await promisify(open)(path, 'r');
  try {
    await replay(
      boot.reads,
      (index) =>
        new Promise((resolve, reject) => {
          const piece = pieces[index]!;
          read(fd, piece, 0, piece.length, boot.reads[index]!.offsetBytes, (error, bytesRead) => {
            if (error) reject(error);
            else if (bytesRead === piece.length) resolve();
            else
              reject(new GridError('local-io', `${path}: ${bytesRead} of ${piece.length} bytes were read`));
          });
        }),
    );
  } finally {
    closeSync(fd);
  }
}

function replayNbd(client: NbdClient, boot: Boot, pieces: readonly Buffer[]): void {
  try {
    for (const [index, { offsetBytes, depth }] of boot.reads.entries()) {
      while (client.underWay >= depth) client.wait();
      client.begin(pieces[index]!, offsetBytes);
    }
    while (client.underWay > 0) client.wait();
  } finally {
    client.close();
  }
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      trace: { type: 'string' },
      boot: { type: 'string', default: '0' },
      file: { type: 'string' },
      nbd: { type: 'string' },
    },
  });
  const { trace: file = '', file: target, nbd } = values;
  const boot = parseTrace(readFileSync(file, 'utf8')).boots[Number(values.boot)];
  if (!boot) throw new RangeError(`${file} has no boot ${values.boot}`);
  // Filled, so that the kernel has given all its pages before the clock runs.
  const memory = Buffer.alloc(summaryOf(boot).bytes, 0xaa);
  const pieces = piecesOf(boot, memory);
  const print = (value: unknown) => process.stdout.write(JSON.stringify(value) + '\n');
  // Connected before the clock runs, as a mount is.
  const client = nbd === undefined ? undefined : connectNbd(nbd);
  print({ ready: true });
  await once(process.stdin, 'data');
  const startedMs = performance.now();
  if (client) replayNbd(client, boot, pieces);
  else await replayFile(target!, boot, pieces);
  print({ done: true, seconds: (performance.now() - startedMs) / 1000 });
  print({ sha256: sha256(memory) });
  process.stdin.destroy();
}

if (import.meta.main) {
  try {
    await main();
  } catch (error) {
    process.stderr.write(`replay: ${error instanceof Error ? error.message : String(error)}\n`);
    process.exit(1);
  }
}
