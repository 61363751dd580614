/** gridvfs volume: data volumes of one's own behind a broker, which stay when machines go. */
import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import type { BrokerClient } from '../agent/broker-client.ts';
import type { JobInfo, VolumeInfo, VolumeRequest } from '../broker/index.ts';
import { GridError } from '../core/errors.ts';
import { checkJob, follow, withBroker, withClient } from './broker-kit.ts';
import type { Connection } from './broker-kit.ts';
import { bytesText, parseBytes, parseCount, parseDuration, show, table, verb } from './kit.ts';

const at = (which: string) => `/v1/volumes/${encodeURIComponent(which)}`;
const WAIT_MS = 600_000;
const LOOK_MS = 100;

interface Waiting extends Connection {
  timeout: number;
}

const withWaiting = (command: Command) =>
  withBroker(command).option('--timeout <duration>', 'how long to wait', parseDuration, WAIT_MS);

const about = (one: VolumeInfo) =>
  [
    `${one.owner}/${one.name} (${one.id})  ${one.state}, ${bytesText(one.sizeBytes)}, version ${one.version}`,
    ...(one.host === undefined
      ? []
      : [`last written to on host ${one.host}${one.unsaved ? ', not saved yet' : ''}`]),
    ...one.attached.map(({ vm, readOnly }) => `attached to ${vm}${readOnly ? ', read-only' : ''}`),
    ...(one.sharedWith.length === 0 ? [] : [`shared with ${one.sharedWith.join(', ')}`]),
    ...(one.reason === undefined ? [] : [one.reason]),
    table(
      ['VERSION', 'SIZE', 'STORED', 'CREATED'],
      one.versions.map((each) => [
        each.version,
        bytesText(each.sizeBytes),
        bytesText(each.storedBytes),
        each.created,
      ]),
    ),
  ].join('\n');

function createVerb(): Command {
  return withWaiting(
    verb(
      'create',
      'Make a volume: empty, of an image’s content, or of another volume as it was saved last.',
      [
        'gridvfs volume create home --size 20G',
        'gridvfs volume create tables --image tables:7',
        'gridvfs volume create before --from home --version 3',
      ],
    ),
  )
    .argument('<name>')
    .option('--size <size>', 'of its disk', parseBytes)
    .option('--image <name:version>', 'a data or disk image')
    .option('--from <volume>', 'a volume of yours, or OWNER/NAME')
    .option('--version <number>', 'this version of it', parseCount)
    .action(
      async (
        name: string,
        options: Waiting & { size?: number; image?: string; from?: string; version?: number },
      ) => {
        const { size, image, from, version } = options;
        const request: VolumeRequest = {
          name,
          ...(size === undefined ? {} : { sizeBytes: size }),
          ...(image === undefined ? {} : { image }),
          ...(from === undefined ? {} : { from }),
          ...(version === undefined ? {} : { version }),
        };
        const one = await withClient(options, async (client) => {
          let now = await client.call<VolumeInfo>('POST', '/v1/volumes', request);
          const endMs = performance.now() + options.timeout;
          while (now.state === 'making') {
            if (performance.now() > endMs) {
              const why = now.reason === undefined ? '' : `: ${now.reason}`;
              throw new GridError('timeout', `volume '${name}' is still being made${why}`);
            }
            await sleep(LOOK_MS);
            now = await client.call<VolumeInfo>('GET', at(now.id));
          }
          return now;
        });
        show(options, one, () => about(one));
        if (one.state === 'failed')
          throw new GridError('origin-failed', `volume '${name}' could not be made: ${one.reason ?? ''}`);
      },
    );
}

function lsVerb(): Command {
  return withBroker(
    verb('ls', 'List your volumes and those that are shared with you; operators see everybody’s.', [
      'gridvfs volume ls',
    ]),
  ).action(async (options: Connection) => {
    const all = await withClient(options, (client) => client.call<VolumeInfo[]>('GET', '/v1/volumes'));
    show(options, all, () =>
      table(
        ['VOLUME', 'STATE', 'SIZE', 'STORED', 'VERSION', 'HOST', 'ATTACHED TO'],
        all.map((one) => [
          `${one.owner}/${one.name}`,
          one.state,
          bytesText(one.sizeBytes),
          bytesText(one.storedBytes),
          one.version,
          one.host ?? '',
          one.attached.map(({ vm, readOnly }) => (readOnly ? `${vm} (ro)` : vm)).join(', '),
        ]),
      ),
    );
  });
}

interface Changing extends Connection {
  version?: number;
}

/** A verb that changes a volume, and shows it. */
function changeVerb(
  command: Command,
  change: (client: BrokerClient, which: string, more: unknown[], options: Changing) => Promise<VolumeInfo>,
): Command {
  return withBroker(command).action(async (which: string, ...rest: unknown[]) => {
    const options = rest.at(-2) as Changing;
    const more = rest.slice(0, -2);
    const one = await withClient(options, (client) => change(client, which, more, options));
    show(options, one, () => about(one));
  });
}

/** Waits for a job about a volume, then shows the volume. */
async function wait(options: Waiting, which: string, route: string, body: object): Promise<void> {
  const one = await withClient(options, async (client) => {
    const job = await client.call<JobInfo>('POST', `${at(which)}/${route}`, body, {
      headers: { 'idempotency-key': randomUUID() },
    });
    checkJob(await follow(client, job, options));
    return client.call<VolumeInfo>('GET', at(which));
  });
  show(options, one, () => about(one));
}

export function volumeVerbs(): Command {
  const group = verb(
    'volume',
    'Data volumes of your own, behind a broker: they stay when machines go, one machine writes to one at a time.',
    ['gridvfs volume create home --size 20G', 'gridvfs workspace request debian:12 --volume home'],
  );
  const commands = [
    createVerb(),
    lsVerb(),
    changeVerb(
      verb('show', 'One volume: who has it, where it was written to, its versions.', [
        'gridvfs volume show home',
      ]).argument('<volume>', 'a name of yours, or OWNER/NAME'),
      (client, which) => client.call('GET', at(which)),
    ),
    changeVerb(
      verb('grow', 'Make its disk larger, from the next attachment on.', ['gridvfs volume grow home 40G'])
        .argument('<volume>')
        .argument('<size>', 'the new size', parseBytes),
      (client, which, [sizeBytes]) => client.call('POST', `${at(which)}/grow`, { sizeBytes }),
    ),
    withWaiting(
      verb('snapshot', 'Keep it as it is at this moment, as its next version; its machine writes on.', [
        'gridvfs volume snapshot home',
      ]),
    )
      .argument('<volume>')
      .action((which: string, options: Waiting) => wait(options, which, 'snapshot', {})),
    changeVerb(
      verb('revert', 'Go back to a version; what was written since and is not saved is given up.', [
        'gridvfs volume revert home --version 3',
      ])
        .argument('<volume>')
        .option('--version <number>', 'default: the last one', parseCount),
      (client, which, _more, { version }) =>
        client.call('POST', `${at(which)}/revert`, version === undefined ? {} : { version }),
    ),
    ...(['share', 'unshare'] as const).map((name) =>
      changeVerb(
        verb(name, name === 'share' ? 'Let other users read it.' : 'Let them no longer read it.', [
          `gridvfs volume ${name} home bob`,
        ])
          .argument('<volume>')
          .argument('<users...>'),
        (client, which, [users]) => client.call('POST', `${at(which)}/${name}`, { users }),
      ),
    ),
    withWaiting(
      verb('attach', 'Give it to a machine that runs; the guest finds /dev/disk/by-id/virtio-NAME.', [
        'gridvfs volume attach home lab-1',
        'gridvfs volume attach ada/tables lab-2 --read-only',
      ]),
    )
      .argument('<volume>')
      .argument('<vm>')
      .option('--read-only', 'as it was saved last')
      .action((which: string, vm: string, options: Waiting & { readOnly?: boolean }) =>
        wait(options, which, 'attach', { vm, ...(options.readOnly ? { readOnly: true } : {}) }),
      ),
    withWaiting(
      verb(
        'detach',
        'Take it from a machine; its guest is asked to let go of it, and what it wrote is saved.',
        ['gridvfs volume detach home lab-1'],
      ),
    )
      .argument('<volume>')
      .argument('<vm>')
      .action((which: string, vm: string, options: Waiting) => wait(options, which, 'detach', { vm })),
    withBroker(
      verb('rm', 'Remove volumes that no machine has. Their versions stay in the store as images.', [
        'gridvfs volume rm old',
      ]),
    )
      .argument('<volumes...>')
      .action(async (names: string[], options: Connection) => {
        await withClient(options, async (client) => {
          for (const name of names) await client.call('DELETE', at(name));
        });
        show(options, { removed: names }, () => `removed ${names.join(', ')}`);
      }),
  ];
  for (const command of commands) group.addCommand(command);
  return group;
}
