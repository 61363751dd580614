/** Run by fork: mounts a FileTree and does what its parent says. Arguments: mount point, scratch folder, JSON. */
import { setTimeout } from 'node:timers/promises';
import { QuietPoints } from '../../../src/core/quiet.ts';
import { mountTree } from '../../../src/frontend/fuse/index.ts';
import type { Driver, MountOptions, UnmountOptions } from '../../../src/frontend/fuse/index.ts';
import { FileTree, openDescriptors, threadCount } from './file-tree.ts';
import type { FileSpec } from './file-tree.ts';

export type Command =
  | { readonly do: 'unmount'; readonly options?: UnmountOptions }
  | { readonly do: 'mount'; readonly specs: readonly FileSpec[] }
  | { readonly do: 'ended' }
  | { readonly do: 'statistics' }
  | { readonly do: 'specs'; readonly specs: readonly FileSpec[] }
  | { readonly do: 'release' }
  | { readonly do: 'quiet'; readonly withinMs: number }
  | { readonly do: 'exit' };

export interface Setup {
  readonly specs: readonly FileSpec[];
  readonly options?: Partial<MountOptions & { driver: Driver }>;
}

const [mountpoint, scratch, json] = process.argv.slice(2);
const { specs, options } = JSON.parse(json!) as Setup;
const logged: string[] = [];
const quiet = new QuietPoints();
// Two workers, because starting a thread is most of a test's time.
const mountOptions = {
  fsName: 'gridvfs-test',
  workers: 2,
  quiet,
  log: (line: string) => void logged.push(line),
  ...options,
};
let tree = new FileTree(specs, scratch!);

try {
  let mounted = await mountTree(tree, mountpoint!, mountOptions);
  const run = async (command: Command): Promise<unknown> => {
    switch (command.do) {
      case 'unmount':
        return mounted.unmount(command.options);
      case 'mount':
        tree = new FileTree(command.specs, scratch!);
        mounted = await mountTree(tree, mountpoint!, mountOptions);
        return undefined;
      case 'ended': {
        const { reason, error } = await mounted.ended;
        return { reason, message: error?.message, code: error?.code };
      }
      case 'statistics':
        return {
          ...mounted.statistics(),
          opens: tree.opens,
          openImages: tree.openImages.size,
          claims: [...tree.openImages].reduce((sum, image) => sum + image.claims, 0),
          descriptors: openDescriptors(),
          threads: threadCount(),
          logged,
        };
      case 'specs':
        tree.specs = command.specs;
        return undefined;
      case 'release':
        return tree.release();
      case 'quiet':
        return Promise.race([quiet.quiet().then(() => 'quiet'), setTimeout(command.withinMs, 'busy')]);
      case 'exit':
        break;
    }
    return process.exit(0);
  };
  process.on('message', ({ id, command }: { id: number; command: Command }) => {
    run(command).then(
      (result) => process.send!({ id, result }),
      (error: Error & { code?: string }) =>
        process.send!({ id, failure: { message: error.message, code: error.code } }),
    );
  });
  // The parent died: leave nothing mounted.
  process.on('disconnect', () => void mounted.unmount({ force: true }));
  process.send!({ id: 0 });
} catch (error) {
  const { message, code } = error as Error & { code?: string };
  process.send!({ id: 0, failure: { message, code } });
  process.disconnect?.();
}
