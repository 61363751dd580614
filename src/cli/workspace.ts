/** gridvfs workspace: machines that are asked for, looked at, suspended, moved and ended together. */
import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import type { BrokerClient } from '../agent/broker-client.ts';
import type { QuotaInfo, VolumeUse, WorkspaceInfo, WorkspaceRequest } from '../broker/index.ts';
import { GridError } from '../core/errors.ts';
import { withBroker, withClient } from './broker-kit.ts';
import type { Connection } from './broker-kit.ts';
import {
  abortOnSignals,
  bytesText,
  collect,
  parseBytes,
  parseCount,
  parseDuration,
  Progress,
  show,
  table,
  verb,
} from './kit.ts';
import { machineRequest, withMachines } from './machine-options.ts';
import type { MachineOptions } from './machine-options.ts';
import { keysIn, textOf } from './seed.ts';
import { sshVerbs } from './workspace-ssh.ts';

const at = (which: string) => `/v1/workspaces/${encodeURIComponent(which)}`;

const seconds = (ms: number | undefined) => (ms === undefined ? '-' : `${(ms / 1000).toFixed(2)} s`);

function details(one: WorkspaceInfo): string {
  const about = [
    `${one.name} (${one.id})  ${one.state}`,
    ...(one.network === undefined ? [] : [`network ${one.network}`]),
    ...(one.ends === undefined ? [] : [`ends ${one.ends}`]),
    `fetched ${bytesText(one.fetchedBytes)}`,
  ].join('   ');
  const placedMs = (vm: WorkspaceInfo['machines'][number]) =>
    vm.placed === undefined ? undefined : Date.parse(vm.placed) - Date.parse(vm.asked);
  const rows = one.machines.map((vm) => [
    vm.name,
    vm.state,
    vm.host ?? '',
    vm.address ?? '',
    seconds(placedMs(vm)),
    seconds(vm.timeline?.['clonedMs']),
    seconds(vm.timeline?.['startedMs']),
    seconds(vm.timeline?.['readyMs']),
    vm.fetchedBytes === undefined ? '-' : bytesText(vm.fetchedBytes),
    vm.reason ?? '',
  ]);
  const head = [
    'VM',
    'STATE',
    'HOST',
    'ADDRESS',
    'PLACED',
    'MOUNTED',
    'STARTED',
    'ANSWERED',
    'FETCHED',
    'WHY',
  ];
  return [about, ...volumeLines(one), table(head, rows), ...one.machines.flatMap(commandText)].join('\n');
}

/** A line for each volume, with the machines that have it. */
function volumeLines({ volumes = [] }: WorkspaceInfo): string[] {
  return [...new Set(volumes.map(({ name }) => name))].map((name) => {
    const uses = volumes.filter((use) => use.name === name);
    return `volume ${name}: ${uses.map(({ vm, readOnly }) => (readOnly ? `${vm} (ro)` : vm)).join(', ')}`;
  });
}

function commandText({ name, command }: WorkspaceInfo['machines'][number]): string[] {
  if (command === undefined) return [];
  const { exitCode, output = '', error } = command;
  const went = error ?? (exitCode === undefined ? 'is not over' : `ended with exit code ${exitCode}`);
  return [`\n${name}: ${command.command}: ${went}`, ...(output === '' ? [] : [output.trimEnd()])];
}

interface Waiting extends Connection {
  wait: boolean;
  timeout: number;
}

/** Asks until the workspace is in none of these states. */
async function settled(
  client: BrokerClient,
  first: WorkspaceInfo,
  options: Waiting,
  moving: (one: WorkspaceInfo) => boolean,
): Promise<WorkspaceInfo> {
  const signal = AbortSignal.any([abortOnSignals(), AbortSignal.timeout(options.timeout)]);
  const progress = new Progress(first.name, options);
  let one = first;
  try {
    while (options.wait && moving(one)) {
      if (signal.aborted) {
        throw new GridError(
          'timeout',
          `workspace '${one.name}' is still ${one.state}; \`gridvfs workspace show ${one.name}\` shows it`,
        );
      }
      await sleep(100, undefined, { signal }).catch(() => undefined);
      try {
        one = await client.call<WorkspaceInfo>('GET', at(one.id));
      } catch (error) {
        // A broker that starts again meanwhile is asked again.
        if (!(error instanceof GridError) || error.blame !== 'tunnel') throw error;
      }
      progress.update(one.machines.filter((vm) => !isMoving(vm.state)).length, one.machines.length);
    }
    return one;
  } finally {
    progress.end();
  }
}

const isMoving = (state: string) => ['requested', 'placed', 'suspending', 'stopping'].includes(state);
const anyMoves = (one: WorkspaceInfo) => one.machines.some(({ state }) => isMoving(state));
const isAtCommand = ({ state, command }: WorkspaceInfo['machines'][number]) =>
  state === 'running' &&
  command !== undefined &&
  command.exitCode === undefined &&
  command.error === undefined;

function withWaiting(command: Command): Command {
  return withBroker(command)
    .option('--no-wait', 'return when it is accepted')
    .option('--timeout <duration>', 'how long to wait', parseDuration, 600_000);
}

interface RequestOptions extends Waiting, MachineOptions {
  lifetime?: number;
  volume?: string[];
  sshKey?: string[];
  userData?: string;
  command?: string;
}

/** NAME, NAME:ro, OWNER/NAME:ro. */
function volumeUse(text: string): VolumeUse {
  const [volume, mode, ...rest] = text.split(':');
  if (!volume || rest.length > 0 || (mode !== undefined && mode !== 'ro'))
    throw new GridError('bad-request', `--volume ${text}: write NAME, or NAME:ro to read it only`);
  return { volume, ...(mode === 'ro' ? { readOnly: true } : {}) };
}

function requestVerb(): Command {
  const command = verb(
    'request',
    'Ask for machines together, and wait until their guests answer and a command is over.',
    [
      'gridvfs workspace request debian:12 --name lab --count 4 --memory 1G --network lab --lifetime 8h',
      'gridvfs workspace request debian:12 --name work --volume home --volume ada/tables:ro',
    ],
  );
  return withMachines(withWaiting(command), {
    name: 'of the workspace; its machines are named after it',
    network: 'a virtual network of yours that they are on, made when it is not there',
    restart: 'place them again when their host falls silent',
  })
    .option('--lifetime <duration>', 'ended after this', parseDuration)
    .option('--volume <name[:ro]>', 'a data volume; :ro as it was saved last (may be given again)', collect)
    .option('--ssh-key <file>', 'public key that lets one in, by the seed (may be given again)', collect)
    .option('--user-data <file>', 'cloud-init’s user-data, by the seed')
    .option('--command <text>', 'a shell command that is run in each guest when it has booted')
    .action(async (image: string | undefined, options: RequestOptions) => {
      const { lifetime, volume, sshKey, userData, command: shell } = options;
      const request: WorkspaceRequest = {
        ...machineRequest(image, options),
        ...(lifetime === undefined ? {} : { lifetimeMs: lifetime }),
        ...(volume === undefined ? {} : { volumes: volume.map(volumeUse) }),
        ...(sshKey === undefined ? {} : { sshKeys: (await Promise.all(sshKey.map(textOf))).flatMap(keysIn) }),
        ...(userData === undefined ? {} : { userData: await textOf(userData) }),
        ...(shell === undefined ? {} : { command: shell }),
      };
      await withClient(options, async (client) => {
        const made = await client.call<WorkspaceInfo>('POST', '/v1/workspaces', request, {
          headers: { 'idempotency-key': randomUUID() },
        });
        const moves = (now: WorkspaceInfo) => anyMoves(now) || now.machines.some(isAtCommand);
        const one = await settled(client, made, options, moves);
        show(options, one, () => details(one));
        const failed = one.machines.find(({ state }) => state === 'failed');
        if (failed) {
          throw new GridError(
            'vm-failed',
            `not all of '${one.name}' runs: ${failed.name}: ${failed.reason ?? ''}`,
          );
        }
      });
    });
}

function lsVerb(): Command {
  return withBroker(
    verb('ls', 'List your workspaces; operators see everybody’s.', ['gridvfs workspace ls --all']),
  )
    .option('--all', 'also those that ended')
    .action(async (options: Connection & { all?: boolean }) => {
      const all = await withClient(options, (client) =>
        client.call<WorkspaceInfo[]>('GET', `/v1/workspaces?all=${options.all === true}`),
      );
      show(options, all, () =>
        table(
          ['WORKSPACE', 'ID', 'STATE', 'OWNER', 'VMS', 'HOSTS', 'NETWORK', 'FETCHED', 'ENDS'],
          all.map((one) => [
            one.name,
            one.id,
            one.state,
            one.owner,
            one.machines.length,
            [...new Set(one.machines.flatMap(({ host }) => host ?? []))].join(', '),
            one.network ?? '',
            bytesText(one.fetchedBytes),
            one.ends ?? '',
          ]),
        ),
      );
    });
}

function showVerb(): Command {
  return withBroker(
    verb('show', 'One workspace: its machines, how to reach them, and how long each step took.', [
      'gridvfs workspace show lab',
    ]),
  )
    .argument('<workspace>')
    .action(async (which: string, options: Connection) => {
      const one = await withClient(options, (client) => client.call<WorkspaceInfo>('GET', at(which)));
      show(options, one, () => details(one));
    });
}

const ACTIONS = {
  suspend:
    'Suspend all of its machines: memory and devices go to the store. Connections on its network go on later.',
  resume: 'Let its suspended machines go on, where there is room.',
  move: 'Suspend its machines and resume them on other hosts. Connections on its network go on.',
  end: 'End its machines; what they wrote to disks of their own goes with them.',
} as const;

/** What becomes of its machines' connections when they are suspended, or moved, which is the same to them. */
function connectionsNote({ network }: Pick<WorkspaceInfo, 'network'>): string {
  const outside = 'connections with the outside are over';
  return network === undefined
    ? `${outside}: its machines are on no network of their own`
    : `connections on network '${network}' go on with their machines; ${outside}`;
}

function actionVerb(name: keyof typeof ACTIONS): Command {
  const command = withWaiting(verb(name, ACTIONS[name], [`gridvfs workspace ${name} lab`])).argument(
    '<workspace>',
  );
  if (name === 'resume' || name === 'move') command.option('--to <host>', 'on this host');
  return command.action(async (which: string, options: Waiting & { to?: string }) => {
    await withClient(options, async (client) => {
      const begun = await client.call<WorkspaceInfo>(
        'POST',
        `${at(which)}/${name}`,
        options.to === undefined ? {} : { host: options.to },
      );
      const one = await settled(client, begun, options, anyMoves);
      const notes = name === 'suspend' || name === 'move' ? [connectionsNote(one)] : [];
      show(options, one, () => [details(one), ...notes].join('\n'));
    });
  });
}

function extendVerb(): Command {
  return withBroker(
    verb('extend', 'Let a workspace live this long from now on; never shorter than it would.', [
      'gridvfs workspace extend lab 12h',
    ]),
  )
    .argument('<workspace>')
    .argument('<duration>', 'e.g. 4h', parseDuration)
    .action(async (which: string, lifetimeMs: number, options: Connection) => {
      const one = await withClient(options, (client) =>
        client.call<WorkspaceInfo>('POST', `${at(which)}/extend`, { lifetimeMs }),
      );
      show(options, one, () => details(one));
    });
}

function quotaVerb(): Command {
  return withBroker(
    verb('quota', 'What you may have and have; operators set it for others.', [
      'gridvfs workspace quota',
      'gridvfs workspace quota ada --machines 16 --memory 64G',
    ]),
  )
    .argument('[user]', 'whose to set (operators)')
    .option('--machines <count>', 'at a time', parseCount)
    .option('--vcpus <count>', 'virtual processors of all together', parseCount)
    .option('--memory <size>', 'of all together', parseBytes)
    .option('--volumes <size>', 'of all data volumes together', parseBytes)
    .action(
      async (
        user: string | undefined,
        options: Connection & { machines?: number; vcpus?: number; memory?: number; volumes?: number },
      ) => {
        const { machines, vcpus, memory, volumes } = options;
        const quota = await withClient(options, (client) =>
          user === undefined
            ? client.call<QuotaInfo>('GET', '/v1/quota')
            : client.call<QuotaInfo>('PUT', `/v1/quotas/${encodeURIComponent(user)}`, {
                ...(machines === undefined ? {} : { machines }),
                ...(vcpus === undefined ? {} : { vcpus }),
                ...(memory === undefined ? {} : { memoryBytes: memory }),
                ...(volumes === undefined ? {} : { volumeBytes: volumes }),
              }),
        );
        const of = (used: string, limit: string | undefined) => `${used} of ${limit ?? 'any'}`;
        const size = (bytes: number | undefined) => (bytes === undefined ? undefined : bytesText(bytes));
        show(options, quota, () =>
          [
            `${quota.user}: ${of(String(quota.used.machines), quota.machines?.toString())} machines`,
            `${of(String(quota.used.vcpus), quota.vcpus?.toString())} vcpus`,
            `${of(bytesText(quota.used.memoryBytes), size(quota.memoryBytes))} memory`,
            `${of(bytesText(quota.used.volumeBytes), size(quota.volumeBytes))} data volumes`,
          ].join(', '),
        );
      },
    );
}

export function workspaceVerbs(): Command {
  const group = verb(
    'workspace',
    'Machines that are asked for together, on one virtual network if wanted, and suspended, moved and ended together.',
    ['gridvfs workspace request debian:12 --name lab --count 4 --network lab'],
  );
  for (const command of [
    requestVerb(),
    lsVerb(),
    showVerb(),
    ...(Object.keys(ACTIONS) as (keyof typeof ACTIONS)[]).map(actionVerb),
    extendVerb(),
    ...sshVerbs(),
    quotaVerb(),
  ]) {
    group.addCommand(command);
  }
  return group;
}
