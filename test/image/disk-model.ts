/**
 * A model of a disk with a volatile cache, and a clone beside it that is killed and loses power.
 *
 * Model: the current content, and for each 4 KiB block every version it has had since the last completed flush
 * began (the version at that moment included). After a kill the content is the current one; after power loss each
 * block is one of its versions ("old or new"), never anything else.
 *
 * Kill: the layer is closed, which neither flushes nor writes anything, and opened under the same boot id.
 * Power loss: files are set to what a disk may hold then, and opened under another boot id. Each block of `data`
 * is as of the last flush's begin (what fdatasync promised) or as now; the working map, which nobody syncs, is
 * noise; the durable map is as written, and where power was lost within a flush, each byte is old or new.
 * Freeze: the disk, flushed, becomes a frozen layer under a new one; steps after it meet the chain. Of a frozen layer
 * a power loss takes nothing: its working map is noise from then on, which nobody may believe.
 * That the code calls fdatasync in the right order this cannot show: power-loss.test.ts does.
 */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { createLayerOver, openChain, openClone } from '../../src/image/index.ts';
import type { Clone } from '../../src/image/index.ts';
import { HEADER_BYTES } from '../../src/image/layer-format.ts';
import { FileImage, patternedContent, seededRandom } from './file-image.ts';

const BLOCK = 4096;
const BASE = 'c'.repeat(64);
const BASE_BYTES = 20 * BLOCK + 700;
export const DISK_BYTES = 32 * BLOCK + 1300;

export type Step =
  | { readonly kind: 'write' | 'trim' | 'read'; readonly offset: number; readonly length: number }
  | { readonly kind: 'flush' | 'kill' | 'freeze' }
  /** Writes begin when the flush has begun; `lose`: power is lost before it is complete. */
  | {
      readonly kind: 'flush-while-writing';
      readonly offset: number;
      readonly length: number;
      readonly lose: boolean;
    }
  | { readonly kind: 'power-loss'; readonly seed: number };

export class ModelledDisk {
  /** In memory where there is such a place: power loss is simulated, so the disk's flushes only cost time. */
  readonly #folder = mkdtempSync(
    path.join(existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir(), 'gridvfs-model-'),
  );
  readonly #base = patternedContent(BASE_BYTES, 5);
  #clone!: Clone;
  #content = Buffer.alloc(DISK_BYTES);
  #versions: Buffer[][] = [];
  /** `data` and the durable map as a disk must have them at least. */
  #syncedData = Buffer.alloc(DISK_BYTES);
  #boots = 0;
  /** The last one is the disk's own. */
  readonly #layers: string[] = [];
  #stamp = 0;

  static async create(): Promise<ModelledDisk> {
    const disk = new ModelledDisk();
    await disk.#addLayer();
    disk.#base.copy(disk.#content);
    disk.#beginVersions();
    // createLayer wrote the real boot id; the first open here is already one after a restart.
    await disk.#open();
    return disk;
  }

  get #layerFolder(): string {
    return this.#layers.at(-1)!;
  }

  async #addLayer(): Promise<void> {
    const folder = path.join(this.#folder, `layer${this.#layers.length}`);
    await createLayerOver(folder, { base: BASE, layers: this.#layers }, DISK_BYTES);
    this.#layers.push(folder);
  }

  #file(name: string): string {
    return path.join(this.#layerFolder, name);
  }

  async #open(): Promise<void> {
    const base = new FileImage(path.join(this.#folder, 'base'), this.#base, (unit) => unit % 2 === 1, 0);
    const bootId = String(this.#boots).padStart(36, '0');
    this.#clone = openClone(base, await openChain({ base: BASE, layers: this.#layers }, { bootId }));
  }

  async dispose(): Promise<void> {
    await this.#clone.close();
    rmSync(this.#folder, { recursive: true });
  }

  async run(step: Step): Promise<void> {
    switch (step.kind) {
      case 'write':
        return await this.#write(step.offset, step.length);
      case 'trim':
        await this.#clone.trim(step.offset, step.length);
        return this.#changed(step.offset, Buffer.alloc(step.length));
      case 'read': {
        const target = Buffer.alloc(step.length, 0xee);
        await this.#clone.read(target, step.offset);
        return assert.ok(target.equals(this.#content.subarray(step.offset, step.offset + step.length)));
      }
      case 'flush': {
        const data = readFileSync(this.#file('data'));
        const before = this.#versions;
        this.#beginVersions();
        await this.#clone.flush().catch((error: unknown) => {
          this.#versions = before;
          throw error;
        });
        this.#syncedData = data;
        return;
      }
      case 'flush-while-writing':
        return await this.#flushWhileWriting(step.offset, step.length, step.lose);
      case 'kill':
        await this.#clone.close();
        await this.#open();
        return await this.#checkAll();
      case 'freeze': {
        await this.#clone.flush();
        await this.#clone.close();
        writeFileSync(this.#file('map'), 'noise');
        await this.#addLayer();
        await this.#open();
        this.#beginVersions();
        this.#syncedData = readFileSync(this.#file('data'));
        return await this.#checkAll();
      }
      case 'power-loss':
        return await this.#losePower(step.seed);
    }
  }

  async #write(offset: number, length: number): Promise<void> {
    const stamp = Buffer.alloc(4);
    stamp.writeUInt32LE(0x80000000 + ++this.#stamp);
    const source = Buffer.alloc(length, stamp);
    await this.#clone.write(source, offset);
    this.#changed(offset, source);
  }

  async #flushWhileWriting(offset: number, length: number, lose: boolean): Promise<void> {
    const data = readFileSync(this.#file('data'));
    const durable = readFileSync(this.#file('map.durable'));
    const before = this.#versions.map((versions) => [...versions]);
    this.#beginVersions();
    const flushed = this.#clone.flush();
    await this.#write(offset, length);
    const second = Math.floor(offset / 2);
    await this.#clone.trim(second, Math.min(length, DISK_BYTES - second));
    this.#changed(second, Buffer.alloc(Math.min(length, DISK_BYTES - second)));
    await flushed;
    this.#syncedData = data;
    if (!lose) return;
    // Never acknowledged: whatever was allowed before it still is. The sync of the data came first.
    this.#versions = this.#versions.map((versions, i) => [...before[i]!, ...versions]);
    await this.#losePower(this.#stamp, durable);
  }

  async #losePower(seed: number, olderDurable?: Buffer): Promise<void> {
    await this.#clone.close();
    const random = seededRandom(seed);
    const data = readFileSync(this.#file('data'));
    for (let at = 0; at < data.length; at += BLOCK) {
      if (random() < 0.5) this.#syncedData.copy(data, at, at, Math.min(at + BLOCK, data.length));
    }
    writeFileSync(this.#file('data'), data);
    if (olderDurable) {
      const durable = readFileSync(this.#file('map.durable'));
      for (let at = HEADER_BYTES; at < durable.length; at++) {
        if (random() < 0.5) durable[at] = olderDurable[at]!;
      }
      writeFileSync(this.#file('map.durable'), durable);
    }
    const map = readFileSync(this.#file('map'));
    for (let at = HEADER_BYTES; at < map.length; at++) map[at] = Math.floor(random() * 3);
    writeFileSync(this.#file('map'), map.subarray(0, random() < 0.3 ? HEADER_BYTES : map.length));

    this.#boots++;
    await this.#open();
    await this.#clone.read(this.#content, 0);
    this.#versions.forEach((versions, i) => {
      const now = this.#content.subarray(i * BLOCK, (i + 1) * BLOCK);
      assert.ok(
        versions.some((version) => version.equals(now)),
        `after power loss block ${i} holds none of its ${versions.length} versions but ${now.toString('hex', 0, 8)}`,
      );
    });
    this.#beginVersions();
    this.#syncedData = readFileSync(this.#file('data'));
  }

  async #checkAll(): Promise<void> {
    const all = Buffer.alloc(DISK_BYTES);
    await this.#clone.read(all, 0);
    for (let at = 0; at < DISK_BYTES; at += BLOCK) {
      const want = this.#content.subarray(at, at + BLOCK);
      assert.ok(all.subarray(at, at + BLOCK).equals(want), `block ${at / BLOCK} lost an acknowledged write`);
    }
  }

  #beginVersions(): void {
    this.#versions = [];
    for (let at = 0; at < DISK_BYTES; at += BLOCK) {
      this.#versions.push([Buffer.from(this.#content.subarray(at, at + BLOCK))]);
    }
  }

  #changed(offset: number, bytes: Buffer): void {
    bytes.copy(this.#content, offset);
    if (bytes.length === 0) return;
    const last = Math.floor((offset + bytes.length - 1) / BLOCK);
    for (let i = Math.floor(offset / BLOCK); i <= last; i++) {
      this.#versions[i]!.push(Buffer.from(this.#content.subarray(i * BLOCK, (i + 1) * BLOCK)));
    }
  }
}
