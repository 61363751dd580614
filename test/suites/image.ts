/**
 * Conformance of everything that is an `Image`: run `imageSuite` for each implementation, with `readOnly` for those
 * that cannot be written to.
 */
import assert from 'node:assert/strict';
import { after, before, suite, test } from 'node:test';
import { DirectFile } from '../../src/core/direct-io.ts';
import { GridError } from '../../src/core/errors.ts';
import type { Image } from '../../src/core/image.ts';

export interface ImageFixture {
  readonly image: Image;
  /** What the image holds at the start; as long as the image. */
  readonly content: Buffer;
  /** Opens the same image again after it was closed; kept content is checked when it is there. */
  reopen?(): Promise<Image>;
  /** Closes what is open and removes what was made. */
  dispose(): Promise<void>;
}

/** `seed` makes the random parts repeat; it is part of their names. */
export function imageSuite(
  name: string,
  make: () => Promise<ImageFixture>,
  options: { readonly readOnly?: boolean; readonly seed?: number } = {},
): void {
  const seed = options.seed ?? 1;
  suite(`${name} as an Image`, () => {
    let fixture: ImageFixture;
    let image: Image;
    let model: Buffer;

    before(async () => {
      fixture = await make();
      image = fixture.image;
      model = Buffer.from(fixture.content);
    });
    after(() => fixture.dispose());

    const readAll = async (from: Image) => {
      const all = Buffer.alloc(from.sizeBytes);
      await from.read(all, 0);
      return all;
    };

    test('it is as large as its content and says whether it can be written to', () => {
      assert.equal(image.sizeBytes, fixture.content.length);
      assert.equal(image.writable, !options.readOnly);
    });

    test('reads at any offset and of any length give the content', async () => {
      const random = randomOf(seed);
      for (let i = 0; i < 200; i++) {
        const { offset, length } = rangeIn(image.sizeBytes, random);
        const target = Buffer.alloc(length, 0xee);
        await image.read(target, offset);
        assert.ok(
          target.equals(model.subarray(offset, offset + length)),
          `read ${length} at ${offset}, seed ${seed}`,
        );
      }
    });

    test('many reads at once, also of the same bytes, give the content', async () => {
      const random = randomOf(seed + 1);
      await Promise.all(
        Array.from({ length: 64 }, async (_, i) => {
          const { offset, length } =
            i % 4 === 0 ? { offset: 0, length: 1 } : rangeIn(image.sizeBytes, random);
          const target = Buffer.alloc(length, 0xee);
          await image.read(target, offset);
          assert.ok(target.equals(model.subarray(offset, offset + length)));
        }),
      );
    });

    test('an empty read is right anywhere up to the end', async () => {
      await image.read(Buffer.alloc(0), 0);
      await image.read(Buffer.alloc(0), image.sizeBytes);
    });

    test('a range that is not within the image is refused with bad-request', async () => {
      const size = image.sizeBytes;
      const wild: [number, number][] = [
        [-1, 1],
        [size, 1],
        [size - 1, 2],
        [0.5, 1],
        [Number.NaN, 1],
        [2 ** 60, 1],
      ];
      for (const [offset, length] of wild) {
        const refused = (run: () => Promise<void>) => assert.rejects(run, hasCode('bad-request'));
        await refused(() => image.read(Buffer.alloc(length), offset));
        if (options.readOnly) continue;
        await refused(() => image.write(Buffer.alloc(length), offset));
        await refused(() => image.trim(offset, length));
      }
      assert.ok((await readAll(image)).equals(model));
    });

    test('what is served directly is the same as what read gives', () => {
      if (!image.direct) return;
      assert.equal(image.direct.sizeBytes, image.sizeBytes);
      const file = new DirectFile(image.direct);
      const random = randomOf(seed + 2);
      for (let i = 0; i < 200; i++) {
        const { offset, length } = rangeIn(image.sizeBytes, random);
        const target = Buffer.alloc(length, 0xee);
        if (file.read(target, offset)) assert.ok(target.equals(model.subarray(offset, offset + length)));
      }
    });

    if (options.readOnly) {
      test('write and trim are refused with read-only', async () => {
        await assert.rejects(() => image.write(Buffer.alloc(1), 0), hasCode('read-only'));
        await assert.rejects(() => image.trim(0, 1), hasCode('read-only'));
        await image.flush();
        assert.ok((await readAll(image)).equals(model));
      });
    } else {
      writableTests();
    }

    function writableTests(): void {
      test('a read after a write gives what was written, also in the middle of a block', async () => {
        const random = randomOf(seed + 3);
        for (let i = 0; i < 100; i++) {
          const { offset, length } = rangeIn(image.sizeBytes, random);
          const source = bytesOf(length, random);
          await image.write(source, offset);
          source.copy(model, offset);
          const target = Buffer.alloc(length);
          await image.read(target, offset);
          assert.ok(target.equals(source), `write ${length} at ${offset}, seed ${seed}`);
        }
        assert.ok((await readAll(image)).equals(model));
      });

      test('writes next to each other within one block, at once, all arrive', async () => {
        const at = Math.floor(image.sizeBytes / 8192) * 4096;
        const length = Math.min(4096, image.sizeBytes - at);
        await image.trim(at, length);
        model.fill(0, at, at + length);
        await Promise.all(
          Array.from({ length: Math.floor(length / 64) }, async (_, i) => {
            const source = Buffer.alloc(64, i + 1);
            source.copy(model, at + i * 64);
            await image.write(source, at + i * 64);
          }),
        );
        assert.ok((await readAll(image)).equals(model));
      });

      test('a trimmed range reads as zeros and its neighbours keep their bytes', async () => {
        const random = randomOf(seed + 4);
        for (let i = 0; i < 60; i++) {
          const { offset, length } = rangeIn(image.sizeBytes, random);
          await image.trim(offset, length);
          model.fill(0, offset, offset + length);
        }
        await image.trim(0, 0);
        assert.ok((await readAll(image)).equals(model), `seed ${seed}`);
      });

      test('random operations leave the same bytes as in a model', async () => {
        const random = randomOf(seed + 5);
        for (let i = 0; i < 400; i++) {
          const { offset, length } = rangeIn(image.sizeBytes, random);
          const what = random();
          if (what < 0.45) {
            const source = bytesOf(length, random);
            await image.write(source, offset);
            source.copy(model, offset);
          } else if (what < 0.6) {
            await image.trim(offset, length);
            model.fill(0, offset, offset + length);
          } else if (what < 0.63) {
            await image.flush();
          } else {
            const target = Buffer.alloc(length);
            await image.read(target, offset);
            assert.ok(target.equals(model.subarray(offset, offset + length)), `step ${i}, seed ${seed}`);
          }
        }
        assert.ok((await readAll(image)).equals(model), `seed ${seed}`);
      });

      test('flushes at once all resolve', async () => {
        await Promise.all(Array.from({ length: 20 }, () => image.flush()));
      });
    }

    test('closing twice is closing once, and what was written is there when it is opened again', async () => {
      await image.close();
      await image.close();
      if (!fixture.reopen) return;
      image = await fixture.reopen();
      assert.ok((await readAll(image)).equals(model));
      await image.close();
    });
  });
}

/** For assert.rejects: a GridError with this code. */
export function hasCode(code: string): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof GridError, `not a GridError: ${String(error)}`);
    assert.equal(error.code, code, error.message);
    return true;
  };
}

function randomOf(seed: number): () => number {
  let state = (seed * 2654435761 + 1) >>> 0;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state / 4294967296;
  };
}

/** A range within the image: often short, often aligned, sometimes up to the very end. */
function rangeIn(sizeBytes: number, random: () => number): { offset: number; length: number } {
  if (sizeBytes === 0) return { offset: 0, length: 0 };
  let offset = Math.floor(random() * sizeBytes);
  if (random() < 0.5) offset -= offset % 4096;
  const longest = [600, 4096, 40_000, 3_000_000][Math.floor(random() * 4)]!;
  let length = 1 + Math.floor(random() * longest);
  if (random() < 0.4) length = Math.ceil(length / 4096) * 4096;
  length = Math.min(length, sizeBytes - offset);
  if (random() < 0.1) length = sizeBytes - offset;
  return { offset, length };
}

function bytesOf(length: number, random: () => number): Buffer {
  const value = 1 + Math.floor(random() * 255);
  const bytes = Buffer.alloc(length, value);
  for (let i = 0; i < length; i += 512) bytes[i] = Math.floor(random() * 256);
  return bytes;
}
