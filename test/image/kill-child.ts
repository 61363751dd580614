/**
 * Child process of kill.test.ts: writes and trims a clone until it is killed, and says on standard output, one JSON
 * line each, what it is about to do and when that was acknowledged.
 */
import { writeSync } from 'node:fs';
import { openClone, openLayer } from '../../src/image/index.ts';
import { FileImage, seededRandom } from './file-image.ts';
import { BASE, baseContent, SIZE_BYTES } from './kill-record.ts';
import type { RecordLine } from './kill-record.ts';

const [layerFolder, baseFile, seedText] = process.argv.slice(2);
const random = seededRandom(Number(seedText));
const base = new FileImage(baseFile!, baseContent(), (unit) => unit % 4 === 3, 0);
const clone = openClone(base, await openLayer(layerFolder!, { baseDigest: BASE }));
const say = (line: RecordLine) => writeSync(1, JSON.stringify(line) + '\n');

say({ ready: true });
for (let stamp = 1 + Number(seedText) * 1_000_000; ; stamp++) {
  const longest = [4096, 20_000, 900_000][Math.floor(random() * 3)]!;
  let offset = 4 * Math.floor((random() * SIZE_BYTES) / 4);
  if (random() < 0.5) offset -= offset % 4096;
  const length = Math.min(4 + 4 * Math.floor((random() * longest) / 4), SIZE_BYTES - offset);
  const value = random() < 0.2 ? 0 : stamp;
  const word = Buffer.alloc(4);
  word.writeUInt32LE(value);
  const bytes = Buffer.alloc(length, word);
  say({ begin: { offset, length, stamp: value } });
  if (value === 0) await clone.trim(offset, length);
  else await clone.write(bytes, offset);
  say({ done: stamp });
  if (random() < 0.002) await clone.flush();
}
