/**
 * The reads of one client in the log of nbdkit's log filter, with the number of them under way at each issue.
 * A read that only wants what the client has written itself is no read of the disk and is left out.
 *   2026-01-01 00:00:00.000000 connection=1 Read id=5 offset=0x1000 count=0x2000 ...
 *   2026-01-01 00:00:00.030000 connection=1 ...Read id=5 return=0
 */
import type { TraceRead } from './format.ts';

const BLOCK_BYTES = 4096;

export function readsOfLog(log: string): TraceRead[] {
  const reads: TraceRead[] = [];
  const underWay = new Set<string>();
  const written = new Set<number>();
  const blocksOf = (offsetBytes: number, lengthBytes: number): number[] => {
    const first = Math.floor(offsetBytes / BLOCK_BYTES);
    const end = Math.ceil((offsetBytes + lengthBytes) / BLOCK_BYTES);
    return Array.from({ length: end - first }, (_, index) => first + index);
  };
  for (const line of log.split('\n')) {
    const issued =
      /connection=\d+ (Read|Write|Trim|Zero) id=(\d+) offset=0x([0-9a-f]+) count=0x([0-9a-f]+)/.exec(line);
    if (issued) {
      const [, verb, id] = issued;
      const offsetBytes = Number.parseInt(issued[3]!, 16);
      const lengthBytes = Number.parseInt(issued[4]!, 16);
      const blocks = blocksOf(offsetBytes, lengthBytes);
      if (verb !== 'Read') {
        for (const block of blocks) written.add(block);
      } else if (!blocks.every((block) => written.has(block))) {
        underWay.add(id!);
        reads.push({ offsetBytes, lengthBytes, depth: underWay.size });
      }
      continue;
    }
    const ended = /connection=\d+ \.\.\.Read id=(\d+) return=(-?\d+)/.exec(line);
    if (ended) underWay.delete(ended[1]!);
  }
  return reads;
}
