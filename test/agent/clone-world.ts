/** A store with one image, a cache over it and clones over that, as a proxy has them, in one process. */
import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { openCache } from '../../cache/index.ts';
import type { Cache } from '../../cache/index.ts';
import type { CloneParts, CreateOptions } from '../../src/agent/clone-parts.ts';
import { Clones } from '../../src/agent/clones.ts';
import { cloneParts } from '../../src/cli/clone-parts.ts';
import type { Image } from '../../src/core/image.ts';
import { openStore } from '../../src/store/index.ts';
import type { Store } from '../../src/store/index.ts';
import { makeFixtureStore } from '../suites/fixtures.ts';

export const SIZE = 3 * 1024 * 1024;

export class CloneWorld {
  readonly folder: string;
  readonly state: string;
  readonly log: string[] = [];
  content!: Buffer;
  digest!: string;
  store!: Store;
  cache!: Cache;
  clones!: Clones;

  private constructor(folder: string) {
    this.folder = folder;
    this.state = path.join(folder, 'state');
  }

  static async create(): Promise<CloneWorld> {
    const world = new CloneWorld(mkdtempSync(path.join(os.tmpdir(), 'gridvfs-clones-')));
    const fixture = await makeFixtureStore(world.folder, { sizeBytes: SIZE, seed: 3 });
    world.content = readFileSync(fixture.rawPath);
    world.digest = fixture.digest;
    world.store = await openStore(fixture.storeFolder);
    world.cache = await openCache({ folder: path.join(world.folder, 'cache'), source: world.store });
    await world.load();
    return world;
  }

  get parts(): CloneParts {
    return cloneParts(this.cache);
  }

  async load(parts = this.parts): Promise<void> {
    this.clones = await Clones.load(this.state, parts, (line) => this.log.push(line));
  }

  async reload(): Promise<void> {
    await this.clones.close();
    await this.load();
  }

  make(name: string, options: Partial<CreateOptions> = {}) {
    return this.clones.create({ image: 'test:1', base: this.digest, sizeBytes: SIZE, name, ...options });
  }

  /** Opens a clone for the time of `task`. */
  async using<T>(name: string, task: (disk: Image) => Promise<T>): Promise<T> {
    const disk = await this.clones.open(name);
    try {
      return await task(disk);
    } finally {
      await disk.close();
    }
  }

  write(name: string, offset: number, bytes: Buffer): Promise<void> {
    return this.using(name, (disk) => disk.write(bytes, offset));
  }

  read(name: string): Promise<Buffer> {
    return this.using(name, async (disk) => {
      const all = Buffer.alloc(disk.sizeBytes, 0xee);
      await disk.read(all, 0);
      return all;
    });
  }

  layers(): string[] {
    return readdirSync(path.join(this.state, 'layers'));
  }

  async dispose(): Promise<void> {
    await this.clones.close();
    await this.cache.close();
    await this.store.close();
    rmSync(this.folder, { recursive: true });
  }
}

/** Until it is so, for ten seconds at most. */
export async function eventually(what: string, check: () => boolean): Promise<void> {
  for (let i = 0; i < 1000 && !check(); i++) await new Promise((resolve) => setTimeout(resolve, 10));
  assert.ok(check(), what);
}
