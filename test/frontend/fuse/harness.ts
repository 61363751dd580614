/** Mounts in a child process, because a process must not do blocking I/O on its own mount. */
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { GridError } from '../../../src/core/errors.ts';
import type { ErrorCode } from '../../../src/core/errors.ts';
import type { MountStatistics } from '../../../src/frontend/fuse/index.ts';
import { cleanDeadMount } from '../../../src/frontend/fuse/index.ts';
import type { Command, Setup } from './mount-child.ts';

export type ChildStatistics = MountStatistics & {
  opens: number;
  openImages: number;
  claims: number;
  descriptors: number;
  threads: number;
  logged: string[];
};

interface Answer {
  id: number;
  result?: unknown;
  failure?: { message: string; code: ErrorCode };
}

/** A folder with a mount point, room for sources, and a scratch folder; removed with everything in it. */
export class Place {
  readonly folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-fuse-'));
  readonly mountpoint = path.join(this.folder, 'mnt');
  readonly scratch = path.join(this.folder, 'scratch');

  readonly children = new Set<MountChild>();

  constructor() {
    mkdirSync(this.mountpoint);
    mkdirSync(this.scratch);
  }

  /** A file of random bytes; every fourth 4 KiB block is zeros so that holes and data alternate. */
  source(name: string, sizeBytes: number): string {
    const file = path.join(this.folder, name);
    const bytes = randomBytes(sizeBytes);
    for (let at = 0; at < sizeBytes; at += 16384) bytes.fill(0, at, Math.min(at + 4096, sizeBytes));
    writeFileSync(file, bytes);
    return file;
  }

  /** Ends what a failed test left, so that the next one starts afresh. */
  async clean(): Promise<void> {
    for (const child of this.children) await child.kill();
    await cleanDeadMount(this.mountpoint);
  }

  async remove(): Promise<void> {
    await this.clean();
    rmSync(this.folder, { recursive: true });
  }
}

export class MountChild {
  readonly process: ChildProcess;
  readonly #waiting = new Map<number, (answer: Answer) => void>();
  #nextId = 1;

  private constructor(child: ChildProcess) {
    this.process = child;
    child.on('message', (answer: Answer) => {
      this.#waiting.get(answer.id)?.(answer);
      this.#waiting.delete(answer.id);
    });
    child.on('exit', (code, signal) => {
      for (const [id, settle] of this.#waiting) {
        settle({ id, failure: { code: 'closed', message: `the child ended (${code ?? signal})` } });
      }
    });
  }

  static async start(place: Place, setup: Setup): Promise<MountChild> {
    const script = path.join(import.meta.dirname, 'mount-child.ts');
    const child = fork(script, [place.mountpoint, place.scratch, JSON.stringify(setup)]);
    const self = new MountChild(child);
    place.children.add(self);
    child.once('exit', () => place.children.delete(self));
    try {
      await self.#answer(0);
    } catch (error) {
      if (child.exitCode === null) await once(child, 'exit');
      throw error;
    }
    return self;
  }

  #answer(id: number): Promise<unknown> {
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, ({ result, failure }) => {
        if (failure) reject(new GridError(failure.code, failure.message));
        else resolve(result);
      });
    });
  }

  run(command: Command): Promise<unknown> {
    const id = this.#nextId++;
    const answer = this.#answer(id);
    this.process.send({ id, command });
    return answer;
  }

  async statistics(): Promise<ChildStatistics> {
    return (await this.run({ do: 'statistics' })) as ChildStatistics;
  }

  async kill(): Promise<void> {
    const exit = once(this.process, 'exit');
    this.process.kill('SIGKILL');
    await exit;
  }

  /** Unmounts, and checks that nothing keeps the process from ending by itself. */
  async stop(): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return;
    const exit = once(this.process, 'exit');
    await this.run({ do: 'release' });
    await this.run({ do: 'unmount' });
    this.process.disconnect();
    await exit;
  }
}
