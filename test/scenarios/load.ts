/**
 * Run as a program: works on a file of a mount until its input ends, and stops with an error at the first wrong byte
 * or failed call. Arguments: 'read' FILE EQUAL (random reads, compared with the same ranges of EQUAL), 'direct' FILE
 * EQUAL (the same past the page cache), or 'write' FILE (random writes, compared with a copy in memory, all of it at
 * the end). Prints a dot for every few operations, and at last how
 * long the longest took.
 */
import { constants, fstatSync, openSync, readFileSync, readSync, writeSync } from 'node:fs';

const OPERATIONS_A_DOT = 10;
const LENGTH_MAX = 64 * 1024;

const [how, file, equal] = process.argv.slice(2);
const { O_RDONLY, O_RDWR, O_DIRECT } = constants;
const fd = openSync(file!, how === 'write' ? O_RDWR : how === 'direct' ? O_RDONLY | O_DIRECT : O_RDONLY);
const expected = how === 'write' ? read(0, fstatSync(fd).size) : readFileSync(equal!);

function read(offsetBytes: number, lengthBytes: number): Buffer {
  const bytes = Buffer.alloc(lengthBytes);
  let done = 0;
  while (done < lengthBytes) {
    const count = readSync(fd, bytes, done, lengthBytes - done, offsetBytes + done);
    if (count === 0) throw new Error(`${file} ends at ${offsetBytes + done}`);
    done += count;
  }
  return bytes;
}

function check(offsetBytes: number, lengthBytes: number): void {
  if (!read(offsetBytes, lengthBytes).equals(expected.subarray(offsetBytes, offsetBytes + lengthBytes))) {
    throw new Error(`${file} has wrong bytes in ${lengthBytes} at ${offsetBytes}`);
  }
}

function operate(): void {
  const lengthBytes = 1 + Math.floor(Math.random() * LENGTH_MAX);
  const offsetBytes = Math.floor(Math.random() * (expected.length - lengthBytes));
  if (how === 'write' && Math.random() < 0.5) {
    expected.fill(Math.floor(Math.random() * 256), offsetBytes, offsetBytes + lengthBytes);
    const written = writeSync(fd, expected, offsetBytes, lengthBytes, offsetBytes);
    if (written !== lengthBytes) throw new Error(`${file}: a short write of ${written}`);
  } else {
    check(offsetBytes, lengthBytes);
  }
}

let longestMs = 0;
let going = true;
process.stdin.on('end', () => (going = false)).resume();
function turn(): void {
  if (!going) {
    check(0, expected.length);
    process.stdout.write(`longest ${longestMs.toFixed(0)} ms\n`);
    return;
  }
  for (let i = 0; i < OPERATIONS_A_DOT; i++) {
    const startMs = performance.now();
    operate();
    longestMs = Math.max(longestMs, performance.now() - startMs);
  }
  process.stdout.write('.');
  setImmediate(turn);
}
turn();
