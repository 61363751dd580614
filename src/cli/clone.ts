/** gridvfs clone create|ls|show|set|rm|commit|export|import: calls of the proxy's control socket, and qemu-img. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Option } from 'commander';
import type { Command } from 'commander';
import type { ControlClient } from '../agent/client.ts';
import type { CloneKind } from '../agent/clone-record.ts';
import type { CloneRequest } from '../agent/clone-routes.ts';
import type { CloneStatus } from '../agent/clones.ts';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { bytesText, jsonOption, parseBytes, Progress, show, table, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

const routeOf = (id: string, action = '') => `/v1/clones/${encodeURIComponent(id)}${action}`;
/** Where programs find a clone's disk. */
const diskOf = (proxy: { mountpoint: string }, id: string) =>
  path.join(proxy.mountpoint, 'clones', id, 'disk.raw');
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

function commitVerb(): Command {
  return withProxyOption(
    verb('commit', 'Make a new version of the image from a stopped clone. Only what changed is stored.', [
      'gridvfs clone commit work debian:12-mine',
      'gridvfs clone commit work debian:12-mine --store /srv/store --label libraries=openmpi',
    ]),
  )
    .argument('<clone>')
    .argument('<new>', 'name:version to make')
    .option('--store <folder>', "the store on this host; default: the proxy's source, when that is a folder")
    .option('--label <KEY=VALUE>', 'a label of the new version; may be given several times', collectLabel)
    .addOption(jsonOption())
    .action(
      async (
        id: string,
        target: string,
        options: Options & { store?: string; label?: Record<string, string> },
      ) => {
        const { client } = await findProxy(options.proxy);
        const result = await client.call<{
          digest: string;
          changedChunks: number;
          newChunks: number;
          newStoredBytes: number;
        }>('POST', routeOf(id, '/commit'), {
          reference: target,
          ...(options.store === undefined ? {} : { store: path.resolve(options.store) }),
          ...(options.label === undefined ? {} : { labels: options.label }),
        });
        show(options, result, () =>
          [
            `${target} is ${result.digest}`,
            `${result.changedChunks} chunks had changes; ${result.newChunks} were new, ${bytesText(result.newStoredBytes)} compressed`,
          ].join('\n'),
        );
      },
    );
}

function collectLabel(text: string, before: Record<string, string> = {}): Record<string, string> {
  const at = text.indexOf('=');
  if (at < 1) throw new GridError('bad-request', `'${text}' is not a label: write KEY=VALUE`);
  return { ...before, [text.slice(0, at)]: text.slice(at + 1) };
}

function exportVerb(): Command {
  return withProxyOption(
    verb('export', 'Write a stopped clone to one file, for another host or for use without gridvfs.', [
      'gridvfs clone export work work.tar',
      'gridvfs clone export work work.qcow2 --qcow2              # needs nothing else',
      'gridvfs clone export work work.qcow2 --qcow2 --backing /srv/debian-12.raw',
    ]),
  )
    .argument('<clone>')
    .argument('<file>', 'must not exist')
    .option('--qcow2', 'a qcow2 disk instead of the archive that `clone import` takes')
    .option('--backing <raw>', 'with --qcow2: only what differs from this raw file, which it will need')
    .addOption(jsonOption())
    .action(async (id: string, file: string, options: Options & { qcow2?: boolean; backing?: string }) => {
      const { client, record } = await findProxy(options.proxy);
      const target = path.resolve(file);
      if (existsSync(target)) {
        throw new GridError('exists', `${target} is there already; choose another name or remove it`);
      }
      if (!options.qcow2) {
        if (options.backing !== undefined) throw new GridError('bad-request', '--backing goes with --qcow2');
        const info = await client.call<{ dataBlocks: number }>('POST', routeOf(id, '/export'), {
          file: target,
        });
        return show(options, { ...info, file: target }, () => `exported ${id} to ${target}`);
      }
      const clone = await client.call<CloneStatus>('GET', routeOf(id));
      if (clone.open)
        throw new GridError('in-use', `clone '${id}' is open; stop its VM or close its file first`);
      const disk = diskOf(record, id);
      await exportQcow2(
        disk,
        target,
        options.backing === undefined ? undefined : path.resolve(options.backing),
      );
      show(options, { file: target }, () => `exported ${id} to ${target}`);
    });
}

/** Under another name until it is whole. */
async function exportQcow2(disk: string, target: string, backing: string | undefined): Promise<void> {
  const partial = `${target}.partial`;
  try {
    if (backing === undefined) {
      await qemuImg('convert', '-f', 'raw', '-O', 'qcow2', disk, partial);
    } else {
      // An overlay over the clone itself, which then takes in whatever the other backing file has not.
      await qemuImg('create', '-q', '-f', 'qcow2', '-b', disk, '-F', 'raw', partial);
      await qemuImg('rebase', '-f', 'qcow2', '-b', backing, '-F', 'raw', partial);
    }
    await rename(partial, target);
  } catch (error) {
    throw asGridError(error, `cannot export to ${target}`);
  } finally {
    await rm(partial, { force: true });
  }
}

function qemuImg(...args: string[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const child = spawn('qemu-img', args, { stdio: ['ignore', 'ignore', 'pipe'] });
    let errors = '';
    child.stderr.on('data', (part: Buffer) => (errors = (errors + part.toString('utf8')).slice(-1000)));
    child.on('error', (error) =>
      reject(
        errnoOf(error) === 'ENOENT'
          ? new GridError('unsupported', 'qemu-img is not here; install qemu-utils')
          : error,
      ),
    );
    child.on('close', (code) => {
      if (code === 0) resolve();
      else reject(new GridError('local-io', `qemu-img ${args[0]} failed: ${errors.trim()}`));
    });
  });
}

function importVerb(): Command {
  return withProxyOption(
    verb(
      'import',
      'Make a persistent clone from an archive that `clone export` wrote, also on another host.',
      ['gridvfs clone import work.tar', 'gridvfs clone import work.tar --name copy --image debian:12'],
    ),
  )
    .argument('<file>')
    .option('--name <name>', 'another name than it had')
    .option('--image <image>', 'refuse it unless it belongs over this image')
    .addOption(jsonOption())
    .action(async (file: string, options: Options & { name?: string; image?: string }) => {
      const { client, record } = await findProxy(options.proxy);
      const clone = await client.call<CloneStatus>('POST', '/v1/clones/import', {
        file: path.resolve(file),
        ...(options.name === undefined ? {} : { name: options.name }),
        ...(options.image === undefined ? {} : { image: options.image }),
      });
      const disk = diskOf(record, clone.id);
      show(options, { ...clone, disk }, () => `${clone.id}\n${disk}`);
    });
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
