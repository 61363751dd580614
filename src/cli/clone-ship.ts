/** gridvfs clone commit|push|pull|export|import: what takes clones elsewhere, by calls of the proxy's control socket and qemu-img. */
import { existsSync } from 'node:fs';
import path from 'node:path';
import type { Command } from 'commander';
import type { ControlClient } from '../agent/client.ts';
import type { CloneStatus } from '../agent/clone-status.ts';
import { GridError } from '../core/errors.ts';
import { exportQcow2 } from './clone-qcow2.ts';
import { diskOf, routeOf } from './clone-routes.ts';
import { abortOnSignals, bytesText, jsonOption, Progress, show, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

/** A call that takes long, with its progress; Ctrl-C cancels it. */
async function longCall<T>(
  client: ControlClient,
  what: string,
  options: Options,
  route: string,
  body: unknown,
): Promise<T> {
  const progress = new Progress(what, options);
  try {
    return await client.longCall<T>('POST', route, body, {
      signal: abortOnSignals(),
      onProgress: (done, total) => progress.update(done, total),
    });
  } finally {
    progress.end();
  }
}

export function commitVerb(): Command {
  return withProxyOption(
    verb('commit', 'Make a new version of the image from a stopped clone. Only what changed is stored.', [
      'gridvfs clone commit work debian:12-mine',
      'gridvfs clone commit work debian:12-mine --store /srv/store --label libraries=openmpi',
    ]),
  )
    .argument('<clone>')
    .argument('<new>', 'name:version to make')
    .option(
      '--store <folder>',
      "a store on this host; default: the proxy's source, which has to accept uploads where it is remote",
    )
    .option('--label <KEY=VALUE>', 'a label of the new version; may be given several times', collectLabel)
    .addOption(jsonOption())
    .action(
      async (
        id: string,
        target: string,
        options: Options & { store?: string; label?: Record<string, string> },
      ) => {
        const { client } = await findProxy(options.proxy);
        const result = await longCall<{
          digest: string;
          changedChunks: number;
          newChunks: number;
          newStoredBytes: number;
        }>(client, `commit ${id}`, options, routeOf(id, '/commit'), {
          reference: target,
          ...(options.store === undefined ? {} : { store: path.resolve(options.store) }),
          ...(options.label === undefined ? {} : { labels: options.label }),
        });
        show(options, result, () =>
          [
            `${target} is ${result.digest}`,
            `${result.changedChunks} chunks had changes; ${result.newChunks} objects were new, ${bytesText(result.newStoredBytes)} compressed`,
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

interface Pushed {
  reference: string;
  generation: number;
  unchanged: boolean;
  changedChunks: number;
  newChunks: number;
  newStoredBytes: number;
}

export function pushVerb(): Command {
  return withProxyOption(
    verb(
      'push',
      'Send a persistent clone, as it is at this moment, to the image server; its VM may run. Only what the server lacks is sent.',
      ['gridvfs clone push work', 'gridvfs clone push work --as backup:monday'],
    ),
  )
    .argument('<clone>')
    .option('--as <tag>', 'name:version to push it as; default: as the last time, at first CLONE:pushed')
    .addOption(jsonOption())
    .action(async (id: string, options: Options & { as?: string }) => {
      const { client } = await findProxy(options.proxy);
      const body = options.as === undefined ? {} : { reference: options.as };
      const pushed = await longCall<Pushed>(client, `push ${id}`, options, routeOf(id, '/push'), body);
      show(options, pushed, () =>
        pushed.unchanged
          ? `${pushed.reference} is ${id} as it is already`
          : `${pushed.reference} is ${id}, generation ${pushed.generation}; ${pushed.newChunks} objects were new, ${bytesText(pushed.newStoredBytes)} compressed`,
      );
    });
}

export function pullVerb(): Command {
  return withProxyOption(
    verb('pull', 'Make a persistent clone of one that was pushed, to go on with it on this host.', [
      'gridvfs clone pull work:pushed',
      'gridvfs clone pull work:pushed --name work-2',
    ]),
  )
    .argument('<tag>', 'name:version that it was pushed as')
    .option('--name <name>', 'another name than it had')
    .addOption(jsonOption())
    .action(async (reference: string, options: Options & { name?: string }) => {
      const { client, record } = await findProxy(options.proxy);
      const clone = await longCall<CloneStatus>(client, `pull ${reference}`, options, '/v1/clones/pull', {
        reference,
        ...(options.name === undefined ? {} : { name: options.name }),
      });
      const disk = diskOf(record, clone.id);
      show(options, { ...clone, disk }, () => `${clone.id}\n${disk}`);
    });
}

export function exportVerb(): Command {
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
        const info = await longCall<{ dataBlocks: number }>(
          client,
          `export ${id}`,
          options,
          routeOf(id, '/export'),
          { file: target },
        );
        return show(options, { ...info, file: target }, () => `exported ${id} to ${target}`);
      }
      const clone = await client.call<CloneStatus>('GET', routeOf(id));
      if (clone.open)
        throw new GridError('in-use', `clone '${id}' is open; stop its VM or close its file first`);
      const disk = diskOf(record, id);
      const backing = options.backing === undefined ? undefined : path.resolve(options.backing);
      const progress = new Progress(`export ${id}`, options);
      try {
        await exportQcow2(disk, target, backing, {
          signal: abortOnSignals(),
          onProgress: (done, total) => progress.update(done, total),
        });
      } finally {
        progress.end();
      }
      show(options, { file: target }, () => `exported ${id} to ${target}`);
    });
}

export function importVerb(): Command {
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
      const clone = await longCall<CloneStatus>(client, 'import', options, '/v1/clones/import', {
        file: path.resolve(file),
        ...(options.name === undefined ? {} : { name: options.name }),
        ...(options.image === undefined ? {} : { image: options.image }),
      });
      const disk = diskOf(record, clone.id);
      show(options, { ...clone, disk }, () => `${clone.id}\n${disk}`);
    });
}
