/** A mount namespace of a test's own: what is mounted in it goes with it, and the host sees none of it. */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import os from 'node:os';
import path from 'node:path';
import type { Outcome, World } from './world.ts';

const ROOT = path.resolve(import.meta.dirname, '..', '..');

/**
 * For sh, inside a new mount namespace: lets go of the copies of what other tests have mounted in temp folders by
 * now. Kept, they would hold those mounts after their own tests unmounted them, where `/` is private. `$0` and what
 * lies below it stay.
 */
export const LEAVE_OTHERS_MOUNTS = `findmnt -rno TARGET | while read -r place; do
  case "$place" in "$0"|"$0"/*) ;; '${os.tmpdir()}'/*) umount -l "$place" 2>/dev/null || true ;; esac; done`;

export class Namespace {
  readonly #world: World;
  readonly #holder: ChildProcess;
  /** The repository, under a path that every user may go to. */
  readonly repository: string;

  private constructor(world: World, holder: ChildProcess, repository: string) {
    this.#world = world;
    this.#holder = holder;
    this.repository = repository;
  }

  /** Runs `setup` (sh, in the world's folder) inside; the world's folder becomes open to other users. */
  static async make(world: World, setup: string): Promise<Namespace> {
    const script = `${LEAVE_OTHERS_MOUNTS}; set -e; cd "$0"; chmod 755 .; mkdir repo; mount --bind "$1" repo; ${setup}\necho ready; read over || true`;
    const holder = spawn('unshare', ['--mount', 'sh', '-c', script, world.folder, ROOT], {
      stdio: ['pipe', 'pipe', 'pipe'],
    });
    let said = '';
    holder.stderr.on('data', (part: Buffer) => (said += part.toString('utf8')));
    await new Promise<void>((resolve, reject) => {
      holder.stdout.once('data', () => resolve());
      holder.once('exit', () => reject(new Error(`the namespace was not made: ${said}`)));
    });
    return new Namespace(world, holder, path.join(world.folder, 'repo'));
  }

  get pid(): number {
    return this.#holder.pid!;
  }

  /** Any program inside, as root. */
  program(...command: string[]): Promise<Outcome> {
    return this.#world.program('nsenter', `--mount=/proc/${this.#holder.pid}/ns/mnt`, ...command);
  }

  /** The command line of `gridvfs …` inside. */
  gridvfs(...args: string[]): string[] {
    const node = process.execPath.startsWith(`${ROOT}/`)
      ? path.join(this.repository, path.relative(ROOT, process.execPath))
      : process.execPath;
    return [node, path.join(this.repository, 'src', 'main.ts'), ...args];
  }

  async leave(): Promise<void> {
    if (this.#holder.exitCode !== null) return;
    const ended = new Promise((resolve) => this.#holder.once('exit', resolve));
    this.#holder.stdin!.end();
    await ended;
  }
}
