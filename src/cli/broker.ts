/** gridvfs broker: calls of the front end that users of several hosts talk to. `run` is in broker-run.ts, what is done
 * to VMs that are there in broker-vms.ts, images in broker-images.ts. */
import { randomUUID } from 'node:crypto';
import { Option } from 'commander';
import type { Command } from 'commander';
import type { BrokerClient } from '../agent/broker-client.ts';
import { ROLES } from '../broker/index.ts';
import type {
  Answer,
  Explanation,
  HostInfo,
  JobInfo,
  Role,
  TokenInfo,
  UsageBy,
  VmInfo,
  VmRequest,
} from '../broker/index.ts';
import { GridError } from '../core/errors.ts';
import { imagesVerb, imageVerbs, scheduleVerbs } from './broker-images.ts';
import { checkJob, follow, vmTable, withBroker, withClient } from './broker-kit.ts';
import type { Connection } from './broker-kit.ts';
import { networkVerbs } from './broker-networks.ts';
import { runVerb } from './broker-run.ts';
import { vmVerbs } from './broker-vms.ts';
import { bytesText, parseDuration, show, table, verb } from './kit.ts';
import { machineRequest, withMachines } from './machine-options.ts';
import type { MachineOptions } from './machine-options.ts';

function hostsVerb(): Command {
  return withBroker(
    verb('hosts', 'List hosts, what they promise, and what they have warm.', ['gridvfs broker hosts']),
  ).action(async (options: Connection) => {
    const hosts = await withClient(options, (client) => client.call<HostInfo[]>('GET', '/v1/hosts'));
    show(options, hosts, () =>
      table(
        ['HOST', 'STATE', 'VMS', 'PROMISES', 'VCPUS', 'WARM', 'LOAD', 'NETWORKS'],
        hosts.map((one) => [
          one.id,
          one.unusable ?? one.state,
          one.vms,
          bytesText(one.future.memoryBytes),
          one.future.vcpus,
          bytesText(Object.values(one.warmBytes).reduce((sum, bytes) => sum + bytes, 0)),
          one.load.toFixed(2),
          one.networks.join(', '),
        ]),
      ),
    );
  });
}

function vmsVerb(): Command {
  return withBroker(
    verb('vms', 'List your VMs; operators see everybody’s.', [
      'gridvfs broker vms',
      'gridvfs broker vms --all',
    ]),
  )
    .option('--all', 'also those that ended')
    .action(async (options: Connection & { all?: boolean }) => {
      const vms = await withClient(options, (client) =>
        client.call<VmInfo[]>('GET', `/v1/vms?all=${options.all === true}`),
      );
      show(options, vms, () => vmTable(vms));
    });
}

function vmVerb(): Command {
  return withBroker(verb('vm', 'Show one VM, by name or id.', ['gridvfs broker vm web-1 --json']))
    .argument('<vm>')
    .action(async (which: string, options: Connection) => {
      const vm = await withClient(options, (client) =>
        client.call<VmInfo>('GET', `/v1/vms/${encodeURIComponent(which)}`),
      );
      show(options, vm, () => vmTable([vm]));
    });
}

interface RequestOptions extends Connection, MachineOptions {
  checkpointEvery?: number;
  explain?: boolean;
  wait: boolean;
  timeout: number;
}

function requestVerb(): Command {
  const command = verb('request', 'Ask for VMs, and wait until their guests answer.', [
    'gridvfs broker request debian:12 --count 4 --memory 1G',
    "gridvfs broker request --os debian --kernel '>=6.1 <7' --library 'libc>=2.36' --restart",
    'gridvfs broker request debian --explain',
  ]);
  return withMachines(withBroker(command), {
    name: 'what they are called, with a number each when there are several',
    network: 'on hosts of this network only',
    restart: 'start them again, from their last checkpoint if there is one, when their host falls silent',
  })
    .option(
      '--checkpoint-every <duration>',
      'make a checkpoint this often, for --restart to go on from (10s or more)',
      parseDuration,
    )
    .option('--explain', 'only say what would be chosen, and why')
    .option('--no-wait', 'return when the request is accepted')
    .option('--timeout <duration>', 'how long to wait', parseDuration, 600_000)
    .action(async (image: string | undefined, options: RequestOptions) => {
      const request: VmRequest = {
        ...machineRequest(image, options),
        ...(options.checkpointEvery === undefined ? {} : { checkpointEveryMs: options.checkpointEvery }),
      };
      await withClient(options, async (client) => {
        if (options.explain) return explain(client, request, options);
        let job = await client.call<JobInfo>('POST', '/v1/vms', request, {
          headers: { 'idempotency-key': randomUUID() },
        });
        if (options.wait) job = await follow(client, job, options);
        show(options, job, () => `${job.id}  ${job.state}\n${vmTable(job.vms)}`);
        checkJob(job);
      });
    });
}

async function explain(client: BrokerClient, request: VmRequest, options: Connection): Promise<void> {
  const found = await client.call<Explanation>('POST', '/v1/vms/explain', request);
  show(options, found, () =>
    [
      found.choice ? `would start ${found.choice.image} on ${found.choice.host}` : 'nothing fits now',
      ...found.versions.map((one) => `  ${one.reference}: ${one.why}`),
      ...found.rejectedVersions.map((one) => `  not ${one.reference}: ${one.why}`),
      ...found.hosts.map((one) => `  ${one.host}: ${one.why}`),
      ...found.rejectedHosts.map((one) => `  not ${one.host}: ${one.why}`),
    ].join('\n'),
  );
}

function queryVerb(): Command {
  return withBroker(
    verb('query', 'Find sets of resources that together have what you need.', [
      `gridvfs broker query '{"find":"hosts","canRun":{"memoryBytes":1073741824},"limit":10}'`,
      `gridvfs broker query '{"find":"hosts","count":16,"same":"network","total":[{"field":"memoryBytes","atLeast":34359738368}]}'`,
      `gridvfs broker query '{"find":"vms","count":4,"same":"network","total":[{"field":"memoryBytes","atMost":1073741824}],"withinMs":100}'`,
    ]),
  )
    .argument('<query>', 'JSON; its form is in src/broker/query/form.ts and in the OpenAPI document')
    .action(async (text: string, options: Connection) => {
      let query: unknown;
      try {
        query = JSON.parse(text);
      } catch (error) {
        throw new GridError('bad-request', 'the query is not JSON', { cause: error });
      }
      const answer = await withClient(options, (client) => client.call<Answer>('POST', '/v1/query', query));
      show(options, answer, () =>
        [
          ...answer.sets.map((set) =>
            set.map((one) => `${one.id} (${bytesText(one.memoryBytes)}, ${one.vcpus} vcpus)`).join('  '),
          ),
          `${answer.sets.length} set(s)${answer.complete ? '' : ', not complete'} in ${answer.elapsedMs.toFixed(1)} ms`,
        ].join('\n'),
      );
    });
}

interface UsageRow {
  readonly [key: string]: string | number | boolean;
}

const gibHours = (byteSeconds: unknown) => (Number(byteSeconds) / 3600 / 1024 ** 3).toFixed(3);
const secondsOf = (value: unknown) => `${Number(value).toFixed(1)} s`;
const bytesOf = (value: unknown) => bytesText(Number(value));

const OF_MACHINES = [
  ['TIME', 'seconds', secondsOf],
  ['GIB HOURS', 'memoryByteSeconds', gibHours],
  ['FETCHED', 'fetchedBytes', bytesOf],
  ['STORED', 'storedBytes', bytesOf],
  ['CPU', 'cpuSeconds', secondsOf],
] as const;
/** Columns of `usage --by`: head, field, how it is written. */
const USAGE_COLUMNS: Record<UsageBy, readonly (readonly [string, string, ((value: unknown) => string)?])[]> =
  {
    vm: [
      ...([
        ['VM', 'name'],
        ['ID', 'vm'],
        ['WORKSPACE', 'workspace'],
        ['OWNER', 'owner'],
        ['HOST', 'host'],
      ] as const),
      ...OF_MACHINES,
    ],
    workspace: [
      ...([
        ['WORKSPACE', 'name'],
        ['ID', 'workspace'],
        ['OWNER', 'owner'],
        ['VMS', 'vms'],
      ] as const),
      ...OF_MACHINES,
    ],
    user: [
      ...([
        ['USER', 'user'],
        ['VMS', 'vms'],
      ] as const),
      ...OF_MACHINES,
      ['VOLUMES', 'volumes'],
      ['VOLUME GIB HOURS', 'volumeByteSeconds', gibHours],
      ['VOLUMES STORE', 'volumeStoredBytes', bytesOf],
    ],
    volume: [
      ...([
        ['VOLUME', 'name'],
        ['ID', 'volume'],
        ['OWNER', 'owner'],
      ] as const),
      ['SIZE', 'sizeBytes', bytesOf],
      ['TIME', 'seconds', secondsOf],
      ['GIB HOURS', 'byteSeconds', gibHours],
      ['STORED', 'storedBytes', bytesOf],
    ],
  };

function usageVerb(): Command {
  return withBroker(
    verb('usage', 'What was used: time, memory, bytes fetched and stored, CPU time of the file service.', [
      'gridvfs broker usage',
      'gridvfs broker usage --by user --json',
    ]),
  )
    .addOption(new Option('--by <what>', 'a row for each').choices(Object.keys(USAGE_COLUMNS)).default('vm'))
    .action(async (options: Connection & { by: UsageBy }) => {
      const rows = await withClient(options, (client) =>
        client.call<UsageRow[]>('GET', `/v1/usage?by=${options.by}`),
      );
      const columns = USAGE_COLUMNS[options.by];
      show(options, rows, () =>
        table(
          columns.map(([head]) => head),
          rows.map((row) => columns.map(([, field, write = String]) => write(row[field]))),
        ),
      );
    });
}

function tokenVerbs(): Command {
  const group = verb('token', 'Tokens of users, operators and agents.');
  group.addCommand(
    withBroker(
      verb('create', 'Make a token; it is shown once.', [
        'gridvfs broker token create ada --role user > ada.token',
        'gridvfs broker token create hosts --role agent > /etc/gridvfs/agent.token',
      ]),
    )
      .argument('<user>')
      .addOption(new Option('--role <role>').choices(ROLES).default('user'))
      .action(async (user: string, options: Connection & { role: Role }) => {
        const made = await withClient(options, (client) =>
          client.call<{ token: string; info: TokenInfo }>('POST', '/v1/tokens', { user, role: options.role }),
        );
        show(options, made, () => made.token);
      }),
  );
  group.addCommand(
    withBroker(verb('ls', 'List tokens.', ['gridvfs broker token ls'])).action(
      async (options: Connection) => {
        const tokens = await withClient(options, (client) => client.call<TokenInfo[]>('GET', '/v1/tokens'));
        show(options, tokens, () =>
          table(
            ['ID', 'USER', 'ROLE', 'CREATED', 'REVOKED'],
            tokens.map((one) => [one.id, one.user, one.role, one.created, one.revoked ?? '']),
          ),
        );
      },
    ),
  );
  group.addCommand(
    withBroker(verb('revoke', 'Make a token useless.', ['gridvfs broker token revoke 0123456789ab']))
      .argument('<id>')
      .action(async (id: string, options: Connection) => {
        await withClient(options, (client) => client.call('DELETE', `/v1/tokens/${encodeURIComponent(id)}`));
        show(options, { revoked: id }, () => `${id} is revoked`);
      }),
  );
  return group;
}

export function brokerVerbs(): Command {
  const group = verb(
    'broker',
    'Users ask for machines; the broker finds images and hosts and has them started.',
    ['gridvfs broker run', 'gridvfs broker request debian:12 --count 4'],
  );
  for (const command of [
    runVerb(),
    requestVerb(),
    vmsVerb(),
    vmVerb(),
    ...vmVerbs(),
    hostsVerb(),
    imagesVerb(),
    imageVerbs(),
    scheduleVerbs(),
    ...networkVerbs(),
    queryVerb(),
    usageVerb(),
    tokenVerbs(),
  ]) {
    group.addCommand(command);
  }
  return group;
}
