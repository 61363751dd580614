/** gridvfs clone create|ls|show|set|rm: calls of the proxy's control socket. What ships clones: clone-ship.ts. */
import { setTimeout as sleep } from 'node:timers/promises';
import { Option } from 'commander';
import type { Command } from 'commander';
import type { ControlClient } from '../agent/client.ts';
import type { CloneKind } from '../agent/clone-record.ts';
import type { CloneRequest } from '../agent/clone-routes.ts';
import type { CloneStatus } from '../agent/clone-status.ts';
import { commitVerb, exportVerb, importVerb, pullVerb, pushVerb } from './clone-ship.ts';
import { diskOf, routeOf } from './clone-routes.ts';
import { GridError } from '../core/errors.ts';
import { bytesText, jsonOption, parseBytes, Progress, show, table, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

const POLL_MS = 200;

function createVerb(): Command {
  return withProxyOption(
    verb('create', 'Make a clone of an image, or of another clone. Nothing is copied, unless --full.', [
      'gridvfs clone create debian:12 --name scratch          # goes with the VM that runs over it',
      'gridvfs clone create debian:12 --name work --persistent --size 40G --quota 10G',
      'gridvfs clone create --from work --name experiment     # from the disk of a stopped clone',
      'gridvfs clone create debian:12 --name own --full --wait',
    ]),
  )
    .argument('[image]', 'name:version')
    .option('--from <clone>', 'start from this clone, which is stopped, instead of an image')
    .option('--name <name>', "the clone's name; made up when left out")
    .option('--persistent', 'keep it when the VM that runs over it goes')
    .addOption(
      new Option('--full', 'persistent, and a file of its own: filled in the background').conflicts(
        'persistent',
      ),
    )
    .option('--wait', 'with --full: until it is filled')
    .option('--size <size>', 'a larger disk than the base', parseBytes)
    .option('--quota <size>', 'most data that it may hold; beyond it the guest gets ENOSPC', parseBytes)
    .addOption(jsonOption())
    .action(
      async (
        image: string | undefined,
        options: Options & {
          from?: string;
          name?: string;
          persistent?: boolean;
          full?: boolean;
          wait?: boolean;
          size?: number;
          quota?: number;
        },
      ) => {
        const kind: CloneKind = options.full ? 'full' : options.persistent ? 'persistent' : 'non-persistent';
        const request: CloneRequest = {
          ...(image === undefined ? {} : { image }),
          ...(options.from === undefined ? {} : { from: options.from }),
          ...(options.name === undefined ? {} : { name: options.name }),
          kind,
          ...(options.size === undefined ? {} : { sizeBytes: options.size }),
          ...(options.quota === undefined ? {} : { quotaBytes: options.quota }),
        };
        const { client, record } = await findProxy(options.proxy);
        let clone = await client.call<CloneStatus>('POST', '/v1/clones', request);
        if (options.wait) clone = await waitUntilFull(client, clone, options);
        const disk = diskOf(record, clone.id);
        show(options, { ...clone, disk }, () => `${clone.id}\n${disk}`);
      },
    );
}

async function waitUntilFull(
  client: ControlClient,
  made: CloneStatus,
  options: Options,
): Promise<CloneStatus> {
  const progress = new Progress(`fill ${made.id}`, options);
  try {
    for (let clone = made; ; clone = await client.call<CloneStatus>('GET', routeOf(made.id))) {
      const { filling } = clone;
      if (!filling) return clone;
      if (filling.failure !== undefined) {
        throw new GridError('local-io', `clone '${clone.id}' is not filled: ${filling.failure}`);
      }
      progress.update(filling.doneBytes, filling.totalBytes);
      await sleep(POLL_MS);
    }
  } finally {
    progress.end();
  }
}

function kindText(clone: CloneStatus): string {
  const { kind, filling } = clone;
  if (!filling) return kind;
  if (filling.failure !== undefined) return `${kind}, not filled`;
  const percent = filling.totalBytes > 0 ? Math.floor((100 * filling.doneBytes) / filling.totalBytes) : 0;
  return `${kind}, ${percent} % filled`;
}

function setVerb(): Command {
  return withProxyOption(
    verb('set', 'Change a clone, also while its VM runs.', [
      'gridvfs clone set work --quota 20G',
      'gridvfs clone set work --no-quota',
    ]),
  )
    .argument('<clone>')
    .option('--quota <size>', 'most data that it may hold', parseBytes)
    .option('--no-quota', 'as much as the disk has')
    .addOption(jsonOption())
    .action(async (id: string, options: Options & { quota?: number | boolean }) => {
      if (options.quota === undefined || options.quota === true) {
        throw new GridError('bad-request', 'say what to change: --quota SIZE or --no-quota');
      }
      const { client } = await findProxy(options.proxy);
      const body = options.quota === false ? {} : { quotaBytes: options.quota };
      const clone = await client.call<CloneStatus>('POST', routeOf(id, '/quota'), body);
      show(options, clone, () =>
        clone.quotaBytes === undefined
          ? `${id} has no quota`
          : `${id} may hold ${bytesText(clone.quotaBytes)}`,
      );
    });
}

export function cloneVerbs(): Command {
  const group = verb('clone', 'Make, list, commit, ship and remove clones: writable disks over an image.');
  group.addCommand(createVerb());
  group.addCommand(
    withProxyOption(verb('ls', 'List the clones of this host.', ['gridvfs clone ls --json']))
      .addOption(jsonOption())
      .action(async (options: Options) => {
        const { client, record } = await findProxy(options.proxy);
        const clones = (await client.call<CloneStatus[]>('GET', '/v1/clones')).map((clone) => ({
          ...clone,
          disk: diskOf(record, clone.id),
        }));
        show(options, clones, () =>
          table(
            ['CLONE', 'IMAGE', 'KIND', 'SIZE', 'ON DISK', 'SHARED', 'QUOTA', 'OPEN', 'CREATED', 'DISK'],
            clones.map((clone) => [
              clone.id,
              clone.image,
              kindText(clone),
              bytesText(clone.sizeBytes),
              bytesText(clone.allocatedBytes),
              bytesText(clone.sharedBytes),
              clone.quotaBytes === undefined ? '-' : bytesText(clone.quotaBytes),
              clone.open ? 'yes' : 'no',
              clone.created,
              clone.disk,
            ]),
          ),
        );
      }),
  );
  group.addCommand(
    withProxyOption(verb('show', 'Show one clone.', ['gridvfs clone show work']))
      .argument('<clone>')
      .addOption(jsonOption())
      .action(async (id: string, options: Options) => {
        const { client, record } = await findProxy(options.proxy);
        const status = await client.call<CloneStatus>('GET', routeOf(id));
        const clone = { ...status, disk: diskOf(record, id) };
        show(options, clone, () =>
          Object.entries(clone)
            .map(
              ([key, value]) =>
                `${key}: ${typeof value === 'object' ? JSON.stringify(value) : String(value)}`,
            )
            .join('\n'),
        );
      }),
  );
  group.addCommand(setVerb());
  group.addCommand(commitVerb());
  group.addCommand(pushVerb());
  group.addCommand(pullVerb());
  group.addCommand(exportVerb());
  group.addCommand(importVerb());
  group.addCommand(
    withProxyOption(verb('rm', 'Remove clones and give their space back.', ['gridvfs clone rm work']))
      .argument('<clone...>')
      .addOption(jsonOption())
      .action(async (ids: string[], options: Options) => {
        const { client } = await findProxy(options.proxy);
        for (const id of ids) await client.call('DELETE', routeOf(id));
        show(options, { removed: ids }, () => `removed ${ids.join(', ')}`);
      }),
  );
  return group;
}
