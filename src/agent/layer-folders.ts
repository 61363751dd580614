/** The folders of layers on a host: names, who uses each, what they take. A layer that nobody uses is removed. */
import { randomBytes } from 'node:crypto';
import { statSync } from 'node:fs';
import { mkdir, readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { RECORD_FILE } from './clone-record.ts';

export class LayerFolders {
  readonly #folder: string;
  /** How many records name a layer, those that are just being made included. */
  readonly #users = new Map<string, number>();

  constructor(folder: string) {
    this.#folder = folder;
  }

  make(): Promise<unknown> {
    return mkdir(this.#folder, { recursive: true });
  }

  newName(): string {
    return `l-${randomBytes(12).toString('hex')}`;
  }

  pathOf(name: string): string {
    return path.join(this.#folder, name);
  }

  use(names: readonly string[]): void {
    for (const name of names) this.#users.set(name, (this.#users.get(name) ?? 0) + 1);
  }

  /** Takes one use of each back, and removes those that have none left. */
  async drop(names: readonly string[]): Promise<void> {
    const unused = names.filter((name) => {
      const users = (this.#users.get(name) ?? 0) - 1;
      if (users > 0) this.#users.set(name, users);
      else this.#users.delete(name);
      return users <= 0;
    });
    for (const name of unused) await rm(this.pathOf(name), { recursive: true, force: true });
  }

  /** Removes what nobody uses: left by a process that was killed. */
  async sweep(): Promise<void> {
    for (const name of await readdir(this.#folder)) {
      if (!this.#users.has(name)) await rm(this.pathOf(name), { recursive: true, force: true });
    }
  }
}

const FILES = ['.', RECORD_FILE, 'data', 'map', 'map.durable'];

/** What du says of a clone's or a layer's folder: blocks that it and its files really take. Synchronous: a microsecond
 * each, where the thread pool takes fifty. */
export function allocatedIn(folder: string): number {
  let total = 0;
  for (const name of FILES) {
    const stats = statSync(`${folder}/${name}`, { throwIfNoEntry: false });
    if (stats) total += stats.blocks * 512;
  }
  return total;
}
