/** gridvfs vm run|ls|show|console|stop: thin calls of the proxy's control socket. Suspension and checkpoints:
 * vm-checkpoint.ts. */
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { stripVTControlCharacters } from 'node:util';
import { Option } from 'commander';
import type { Command } from 'commander';
import type { BaseRequest } from '../agent/base-checkpoints.ts';
import type { ControlClient } from '../agent/client.ts';
import type { RunRequest, VmStatus } from '../agent/vm-record.ts';
import { GridError } from '../core/errors.ts';
import { collect, jsonOption, parseBytes, parseCount, parseDuration, show, table, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';
import { allOf, checkpointVerbs, namesFor, runFrom, runFromBase, seconds, vmText } from './vm-checkpoint.ts';
import { keysIn, textOf } from './seed.ts';
import { attachConsole } from './vm-console.ts';
import { moveVerbs } from './vm-move.ts';
import { limitsOf, volumeVerbs } from './vm-volumes.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

/** The control socket's own bound. */
const TIMEOUT_MS_MAX = 3_600_000;

function runVerb(): Command {
  return withProxyOption(
    verb('run', 'Boot a VM from a non-persistent clone of an image, and wait until its guest answers.', [
      'gridvfs vm run debian:12',
      'gridvfs vm run debian:12 --memory 1G --vcpus 2 --name web',
      'gridvfs vm run --clone work        # a clone of your own: a persistent one stays when the VM goes',
      'gridvfs vm run --from-checkpoint web:warm --count 8',
      'gridvfs vm run --vmm container debian:12   # its root file system under this host’s kernel',
    ]),
  )
    .argument('[image]', 'name:version')
    .option('--clone <id>', 'start from this clone instead of a new one')
    .option(
      '--from-checkpoint [name:version]',
      'resume this checkpoint as a new VM; with an image and no name: its base checkpoint where that fits, else boot',
    )
    .option('--count <count>', 'so many VMs at once, named NAME-1, NAME-2, …', parseCount)
    .option('--name <name>', "the VM's name; made up when left out")
    .addOption(
      new Option(
        '--vmm <kind>',
        'what runs it; a container (systemd-nspawn, root) has no network and no memory of its own',
      )
        .choices(['qemu', 'container'])
        .default('qemu'),
    )
    .option('--memory <size>', 'memory; the image’s own default, else 512M', parseBytes)
    .option('--vcpus <count>', 'virtual processors (default: 1)', parseCount)
    .option('--no-network', 'no network device')
    .option('--bridge <name>', 'put its network device into this bridge of the host (default: outbound only)')
    .option(
      '--ssh-key <file>',
      'public key that lets one in, by the seed (NoCloud; may be given again)',
      collect,
    )
    .option('--hostname <name>', 'the guest’s name, by the seed (default: the VM’s)')
    .option('--user-data <file>', 'cloud-init’s user-data, by the seed')
    .option('--io-bytes <size>', 'most bytes a second that its disks may move', parseBytes)
    .option('--io-ops <count>', 'most operations a second on its disks', parseCount)
    .option('--append <text>', 'kernel command line instead of the image’s own')
    .option('--ready-text <text>', 'console text that means the guest is ready, instead of the image’s own')
    .option('--no-wait', 'return when the VM runs, before its guest is ready')
    .option('--timeout <duration>', 'how long to wait for the guest', parseDuration, 300_000)
    .addOption(jsonOption())
    .action(
      async (
        image: string | undefined,
        options: Options & {
          clone?: string;
          fromCheckpoint?: string | true;
          count?: number;
          name?: string;
          vmm: 'qemu' | 'container';
          memory?: number;
          vcpus?: number;
          network: boolean;
          bridge?: string;
          sshKey?: string[];
          hostname?: string;
          userData?: string;
          ioBytes?: number;
          ioOps?: number;
          append?: string;
          readyText?: string;
          wait: boolean;
          timeout: number;
        },
      ) => {
        const { fromCheckpoint } = options;
        const isBase = fromCheckpoint === true;
        const named = [image, options.clone, isBase ? undefined : fromCheckpoint].filter(
          (one) => one !== undefined,
        );
        if (isBase && image === undefined)
          throw new GridError('bad-request', '--from-checkpoint without a name needs an image');
        if (named.length !== 1) {
          throw new GridError(
            'bad-request',
            'name an image, a clone with --clone, or a checkpoint with --from-checkpoint (one of the three)',
          );
        }
        const isContainer = options.vmm === 'container';
        if (isContainer) checkContainer(options);
        const { client } = await findProxy(options.proxy);
        if (typeof fromCheckpoint === 'string') return runFrom(client, fromCheckpoint, options);
        const request: RunRequest = {
          ...(image === undefined ? {} : { image }),
          ...(options.clone === undefined ? {} : { clone: options.clone }),
          ...(options.name === undefined ? {} : { name: options.name }),
          ...(options.memory === undefined ? {} : { memoryBytes: options.memory }),
          ...(options.vcpus === undefined ? {} : { vcpus: options.vcpus }),
          ...(options.append === undefined ? {} : { commandLine: options.append }),
          ...(options.readyText === undefined ? {} : { readyText: options.readyText }),
          ...(isContainer ? { vmm: 'container' as const } : {}),
          network:
            options.bridge !== undefined
              ? { bridge: options.bridge }
              : options.network && !isContainer
                ? 'user'
                : 'none',
          ...(options.hostname === undefined ? {} : { hostName: options.hostname }),
          ...(options.userData === undefined ? {} : { userData: await textOf(options.userData) }),
          ...(options.sshKey === undefined
            ? {}
            : { sshKeys: (await Promise.all(options.sshKey.map(textOf))).flatMap(keysIn) }),
          ...(options.ioBytes === undefined && options.ioOps === undefined
            ? {}
            : { limits: limitsOf(options) }),
        };
        if (options.timeout < 1 || options.timeout > TIMEOUT_MS_MAX) {
          throw new GridError('bad-request', '--timeout must be from 1ms to 1h');
        }
        const runOne = async (name: string | undefined) =>
          (isBase ? await runFromBase(client, baseRequestOf(request), name) : undefined) ??
          runAndWait(client, { ...request, ...(name === undefined ? {} : { name }) }, options);
        if (options.count === undefined) {
          const vm = await runOne(options.name);
          return show(options, vm, () => vmText(vm));
        }
        if (options.clone !== undefined)
          throw new GridError('bad-request', '--count needs an image, not one clone');
        const vms = await allOf(namesFor(options.name, options.count), runOne);
        show(options, vms, () => vms.map(vmText).join('\n'));
      },
    );
}

/** Refuses what only a virtual machine has. */
function checkContainer(options: object): void {
  const lacking = [
    'fromCheckpoint',
    'memory',
    'vcpus',
    'bridge',
    'append',
    'sshKey',
    'userData',
    'ioBytes',
    'ioOps',
  ];
  const given = new Map(Object.entries(options));
  const asked = lacking.filter((name) => given.get(name) !== undefined);
  if (asked.length === 0) return;
  const names = asked.map((name) => `--${name.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`);
  throw new GridError('bad-request', `a container has no ${names.join(', ')}`);
}

/** What a VM asks of a base checkpoint; anything else that is asked for is nothing that was booted with. */
function baseRequestOf(request: RunRequest): BaseRequest {
  const { image, memoryBytes, vcpus, network } = request;
  const known = new Set(['image', 'memoryBytes', 'vcpus', 'network', 'name']);
  if (Object.keys(request).some((key) => !known.has(key)) || network !== 'user')
    throw new GridError('bad-request', '--from-checkpoint goes with an image, --memory and --vcpus alone');
  return {
    image: image!,
    ...(memoryBytes === undefined ? {} : { memoryBytes }),
    ...(vcpus === undefined ? {} : { vcpus }),
  };
}

/** Starts one, and waits for its guest where that is wanted and can be told. */
async function runAndWait(
  client: ControlClient,
  request: RunRequest,
  options: { wait: boolean; timeout: number },
): Promise<VmStatus> {
  const vm = await client.call<VmStatus>('POST', '/v1/vms', request);
  if (!options.wait) return vm;
  if (vm.readyText === undefined) {
    process.stderr.write(
      'gridvfs: not waiting for the guest: the image has no boot.ready label; --ready-text names what its console says when it is ready\n',
    );
    return vm;
  }
  try {
    return await client.call<VmStatus>('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${options.timeout}`);
  } catch (error) {
    if (error instanceof GridError && error.code === 'timeout') {
      throw new GridError('timeout', `${error.message}; the VM '${vm.id}' still runs`, { cause: error });
    }
    throw error;
  }
}

export function vmVerbs(): Command {
  const group = verb('vm', 'Run, list and stop VMs over clones.');
  group.addCommand(runVerb());
  group.addCommand(
    withProxyOption(verb('ls', 'List VMs, also those that failed lately.', ['gridvfs vm ls']))
      .addOption(jsonOption())
      .action(async (options: Options) => {
        const { client } = await findProxy(options.proxy);
        const vms = await client.call<VmStatus[]>('GET', '/v1/vms');
        show(options, vms, () =>
          table(
            ['VM', 'STATE', 'IMAGE', 'CLONE', 'PID', 'READY AFTER', 'REASON'],
            vms.map((vm) => [
              vm.id,
              vm.state,
              vm.image,
              vm.clone,
              vm.pid ?? '-',
              seconds(vm.timeline.readyMs),
              vm.reason?.split('\n')[0] ?? '',
            ]),
          ),
        );
      }),
  );
  group.addCommand(
    withProxyOption(verb('show', 'Show one VM and the end of its console.', ['gridvfs vm show web']))
      .argument('<vm>')
      .addOption(jsonOption())
      .action(async (id: string, options: Options) => {
        const { client } = await findProxy(options.proxy);
        const vm = await client.call<VmStatus>('GET', `/v1/vms/${encodeURIComponent(id)}`);
        show(options, vm, () => {
          const lines = Object.entries(vm).map(([key, value]) => `${key}: ${wordsOf(value)}`);
          return [...lines, ...consoleTail(vm.consoleLog)].join('\n');
        });
      }),
  );
  group.addCommand(
    withProxyOption(
      verb(
        'stop',
        'Power VMs down; their non-persistent clones go with them. A suspended VM is thrown away.',
        ['gridvfs vm stop web', 'gridvfs vm stop web --now'],
      ),
    )
      .argument('<vm...>')
      .option('--now', 'end it at once, as if the power failed')
      .option('--grace <duration>', 'how long the guest may take to power down', parseDuration, 15_000)
      .addOption(jsonOption())
      .action(async (ids: string[], options: Options & { now?: boolean; grace: number }) => {
        const { client } = await findProxy(options.proxy);
        const graceMs = options.now ? 0 : options.grace;
        await allOf(ids, (id) => client.call('POST', `/v1/vms/${encodeURIComponent(id)}/stop`, { graceMs }));
        show(options, { stopped: ids }, () => `stopped ${ids.join(', ')}`);
      }),
  );
  group.addCommand(
    withProxyOption(
      verb('console', 'Attach this terminal to the serial console of a VM; Ctrl-] ends it.', [
        'gridvfs vm console web',
      ]),
    )
      .argument('<vm>')
      .action(async (id: string, options: Options) => {
        const { client } = await findProxy(options.proxy);
        const vm = await client.call<VmStatus>('GET', `/v1/vms/${encodeURIComponent(id)}`);
        if (vm.state === 'suspended')
          throw new GridError('bad-request', `'${id}' is suspended; resume it first`);
        await attachConsole(vm.consoleSocket);
      }),
  );
  for (const command of [...checkpointVerbs(), ...volumeVerbs(), ...moveVerbs()]) group.addCommand(command);
  return group;
}

/** A field as people read it. */
function wordsOf(value: unknown): string {
  if (Array.isArray(value)) return value.map(wordsOf).join('; ') || 'none';
  if (typeof value === 'object' && value !== null)
    return Object.entries(value)
      .map(([key, each]) => `${key} ${wordsOf(each)}`)
      .join(', ');
  return typeof value === 'number' && !Number.isInteger(value) ? value.toFixed(2) : String(value);
}

const CONSOLE_LINES = 10;
const TAIL_BYTES = 16 * 1024;

/** The last lines as text: what a guest writes must not work on the terminal of whoever looks. */
function consoleTail(file: string): string[] {
  let text: string;
  try {
    const fd = openSync(file, 'r');
    try {
      const { size } = fstatSync(fd);
      const bytes = Buffer.alloc(Math.min(size, TAIL_BYTES));
      text = bytes.toString('utf8', 0, readSync(fd, bytes, 0, bytes.length, size - bytes.length));
    } finally {
      closeSync(fd);
    }
  } catch {
    return []; // the VM is gone, and its log with it
  }
  // eslint-disable-next-line no-control-regex
  const plain = stripVTControlCharacters(text).replaceAll(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, '');
  return ['', ...plain.trimEnd().split('\n').slice(-CONSOLE_LINES)];
}
