/**
 * Child of clone-kill.test.ts, in a file system that lies on a clone: installs files as a package manager does (write
 * under another name, fsync, rename, fsync of the folder) and says on standard output which ones are durable; or
 * checks the ones named on standard input.
 *
 *   node fsync-writer.ts write FOLDER FIRST     until it is killed, or the disk fails
 *   node fsync-writer.ts check FOLDER           exits with 1 and a sentence when a file is not what it was
 *   node fsync-writer.ts check-guest FOLDER     the same of files that writer-guest.ts installed
 */
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';

const [mode, folder, first = '1'] = process.argv.slice(2) as [string, string, string?];

const BY_GUEST = mode === 'check-guest';
const folderOf = (number: number) => `${folder}/d${number % (BY_GUEST ? 8 : 16)}`;
const fileOf = (number: number) => `${folderOf(number)}/f${number}`;

/** The content of file `number`: up to 200 KiB, by its number alone. */
function contentOf(number: number): Buffer {
  if (BY_GUEST) return Buffer.alloc(((number * 7919) % 60_000) + 1, `${number}\n`);
  const word = Buffer.alloc(4);
  word.writeUInt32LE(number);
  return Buffer.alloc((number * 7919) % 200_000, word);
}

function install(number: number): void {
  const temporary = `${fileOf(number)}.new`;
  const file = openSync(temporary, 'w');
  writeSync(file, contentOf(number));
  fsyncSync(file);
  closeSync(file);
  renameSync(temporary, fileOf(number));
  const parent = openSync(folderOf(number), 'r');
  fsyncSync(parent);
  closeSync(parent);
}

if (mode === 'write') {
  for (let i = 0; i < 16; i++) mkdirSync(folderOf(i), { recursive: true });
  try {
    for (let number = Number(first); ; number++) {
      install(number);
      writeSync(1, `+${number}\n`);
      // What nobody waits for, and what goes again: the disk does not fill.
      writeFileSync(`${folder}/scratch`, contentOf(number + 1));
      if (number % 3 === 0 && number > Number(first) + 30) {
        writeSync(1, `-${number - 30}\n`);
        unlinkSync(fileOf(number - 30));
      }
    }
  } catch (error) {
    process.stderr.write(`${String(error)}\n`);
  }
} else {
  const numbers = readFileSync(0, 'utf8').split('\n').filter(Boolean).map(Number);
  for (const number of numbers) {
    let found: Buffer | undefined;
    try {
      found = readFileSync(fileOf(number));
    } catch (error) {
      process.stdout.write(`file ${number} of ${numbers.length}: ${String(error)}\n`);
      process.exit(1);
    }
    if (!found.equals(contentOf(number))) {
      process.stdout.write(`file ${number} of ${numbers.length} is not what was written\n`);
      process.exit(1);
    }
  }
}
