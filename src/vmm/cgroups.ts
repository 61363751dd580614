/**
 * Control groups: NAME/proxy for the file service, NAME/vm-ID for each machine, so that an operator can weigh and bound
 * them. Version 2 has one tree; of version 1 there is a tree for each controller, and the groups are made in those
 * of cpu, memory, blkio and pids that are mounted. Nothing is limited here: the groups are there to be written to.
 */
import { existsSync, readFileSync } from 'node:fs';
import { mkdir, readdir, readFile, rmdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';

const CONTROLLERS = ['cpu', 'cpuacct', 'memory', 'blkio', 'io', 'pids'];
const EMPTY_TIMEOUT_MS = 5_000;

export class Cgroups {
  /** The folders of NAME, one per tree. */
  readonly folders: readonly string[];

  private constructor(folders: readonly string[]) {
    this.folders = folders;
  }

  /** Makes the groups below `name`, a path from the root of the trees. Throws unsupported, no-permission. */
  static async open(name: string): Promise<Cgroups> {
    if (!/^[\w./-]+$/.test(name) || name.split('/').includes('..'))
      throw new GridError('bad-request', `'${name}' is no path of a control group`);
    const trees = treesOf(readFileSync('/proc/self/mounts', 'utf8'));
    if (trees.length === 0)
      throw new GridError('unsupported', 'no control groups with controllers are mounted here');
    const folders = trees.map(({ root }) => path.join(root, name));
    try {
      for (const folder of folders) await mkdir(folder, { recursive: true });
      for (const { root, version } of trees) {
        if (version === 2) await enable(root, path.join(root, name));
      }
    } catch (error) {
      throw asGridError(error, `cannot make the control group ${name}`);
    }
    return new Cgroups(folders);
  }

  /** Puts a process, all its threads, and the processes that it has started into the group `name`/`child`. Throws
   * local-io, no-permission. */
  async place(child: string, pid: number): Promise<void> {
    const groups = this.folders.map((folder) => path.join(folder, child));
    try {
      for (const group of groups) await mkdir(group, { recursive: true });
      for (const group of groups) await writeFile(path.join(group, 'cgroup.procs'), String(pid));
      // Those that a process starts from now on are in its group: looked for when it is there itself.
      for (const of = [pid]; of.length > 0;) {
        for (const one of await childrenOf(of.shift()!)) {
          of.push(one);
          for (const group of groups) await putIfThere(group, one);
        }
      }
    } catch (error) {
      throw asGridError(error, `cannot put process ${pid} into the control group ${child}`);
    }
  }

  /** Removes the groups where nothing runs any more. */
  async dispose(): Promise<void> {
    await this.remove('proxy');
    await this.remove('.');
  }

  /** Removes a group whose process has ended; one that is in use stays. */
  async remove(child: string): Promise<void> {
    for (const folder of this.folders) {
      const endMs = performance.now() + EMPTY_TIMEOUT_MS;
      // A process leaves its group some time after it has ended.
      while (!(await removed(path.join(folder, child))) && performance.now() < endMs) await sleep(20);
    }
  }
}

async function removed(folder: string): Promise<boolean> {
  try {
    await rmdir(folder);
    return true;
  } catch (error) {
    return errnoOf(error) !== 'EBUSY';
  }
}

/** Also those that its threads have started. */
async function childrenOf(pid: number): Promise<number[]> {
  const found: number[] = [];
  for (const thread of await readdir(`/proc/${pid}/task`).catch(() => [])) {
    const text = await readFile(`/proc/${pid}/task/${thread}/children`, 'utf8').catch(() => '');
    found.push(...text.split(' ').filter(Boolean).map(Number));
  }
  return found;
}

async function putIfThere(group: string, pid: number): Promise<void> {
  try {
    await writeFile(path.join(group, 'cgroup.procs'), String(pid));
  } catch (error) {
    if (errnoOf(error) !== 'ESRCH') throw error; // it has ended meanwhile
  }
}

/** Of /proc/self/mounts. */
export function treesOf(mounts: string): { root: string; version: 1 | 2 }[] {
  const trees = mounts
    .split('\n')
    .flatMap((line): { root: string; version: 1 | 2; controllers: string[] }[] => {
      const [, root, type, options = ''] = line.split(' ');
      if (root === undefined) return [];
      if (type === 'cgroup2') return [{ root, version: 2, controllers: controllersAt(root) }];
      if (type === 'cgroup') return [{ root, version: 1, controllers: options.split(',') }];
      return [];
    });
  return trees
    .filter(({ controllers }) => CONTROLLERS.some((each) => controllers.includes(each)))
    .map(({ root, version }) => ({ root, version }));
}

function controllersAt(root: string): string[] {
  const file = path.join(root, 'cgroup.controllers');
  return existsSync(file) ? readFileSync(file, 'utf8').trim().split(/\s+/) : [];
}

/** Lets the groups below `folder` have the controllers, from the root of the tree on. */
async function enable(root: string, folder: string): Promise<void> {
  const steps = path.relative(root, folder).split('/');
  for (let depth = 0; depth <= steps.length; depth++) {
    const group = path.join(root, ...steps.slice(0, depth));
    const wanted = controllersAt(group).filter((each) => CONTROLLERS.includes(each));
    const words = wanted.map((each) => `+${each}`).join(' ');
    if (words !== '') await writeFile(path.join(group, 'cgroup.subtree_control'), words);
  }
}
