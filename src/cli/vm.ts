/** gridvfs vm run|ls|show|stop: thin calls of the proxy's control socket. */
import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import type { RunRequest, VmStatus } from '../agent/machines.ts';
import { GridError } from '../core/errors.ts';
import { jsonOption, parseBytes, parseCount, parseDuration, show, table, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

const seconds = (ms: number | undefined) => (ms === undefined ? '-' : `${(ms / 1000).toFixed(2)} s`);

/** The control socket's own bound. */
const TIMEOUT_MS_MAX = 3_600_000;

function runVerb(): Command {
  return withProxyOption(
    verb('run', 'Boot a VM from a non-persistent clone of an image, and wait until its guest answers.', [
      'gridvfs vm run debian:12',
      'gridvfs vm run debian:12 --memory 1G --vcpus 2 --name web',
      'gridvfs vm run --clone work        # a clone of your own: a persistent one stays when the VM goes',
    ]),
  )
    .argument('[image]', 'name:version')
    .option('--clone <id>', 'start from this clone instead of a new one')
    .option('--name <name>', "the VM's name; made up when left out")
    .option('--memory <size>', 'memory; the image’s own default, else 512M', parseBytes)
    .option('--vcpus <count>', 'virtual processors (default: 1)', parseCount)
    .option('--no-network', 'no network device')
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
          name?: string;
          memory?: number;
          vcpus?: number;
          network: boolean;
          append?: string;
          readyText?: string;
          wait: boolean;
          timeout: number;
        },
      ) => {
        if ((image === undefined) === (options.clone === undefined)) {
          throw new GridError('bad-request', 'name an image, or a clone with --clone (one of the two)');
        }
        const { client } = await findProxy(options.proxy);
        const request: RunRequest = {
          ...(image === undefined ? {} : { image }),
          ...(options.clone === undefined ? {} : { clone: options.clone }),
          ...(options.name === undefined ? {} : { name: options.name }),
          ...(options.memory === undefined ? {} : { memoryBytes: options.memory }),
          ...(options.vcpus === undefined ? {} : { vcpus: options.vcpus }),
          ...(options.append === undefined ? {} : { commandLine: options.append }),
          ...(options.readyText === undefined ? {} : { readyText: options.readyText }),
          network: options.network ? 'user' : 'none',
        };
        if (options.timeout < 1 || options.timeout > TIMEOUT_MS_MAX) {
          throw new GridError('bad-request', '--timeout must be from 1ms to 1h');
        }
        let vm = await client.call<VmStatus>('POST', '/v1/vms', request);
        if (options.wait && vm.readyText === undefined) {
          process.stderr.write(
            'gridvfs: not waiting for the guest: the image has no boot.ready label; --ready-text names what its console says when it is ready\n',
          );
        } else if (options.wait) {
          try {
            vm = await client.call<VmStatus>('GET', `/v1/vms/${vm.id}/ready?timeoutMs=${options.timeout}`);
          } catch (error) {
            if (error instanceof GridError && error.code === 'timeout') {
              throw new GridError('timeout', `${error.message}; the VM '${vm.id}' still runs`, {
                cause: error,
              });
            }
            throw error;
          }
        }
        show(options, vm, () =>
          [
            `${vm.id}  ${vm.state}  pid ${vm.pid ?? '-'}  ${vm.accelerator ?? ''}`,
            `clone ${vm.clone} after ${seconds(vm.timeline.clonedMs)}, started ${seconds(vm.timeline.startedMs)}, guest ready ${seconds(vm.timeline.readyMs)}`,
            `console: ${vm.consoleSocket}   log: ${vm.consoleLog}`,
          ].join('\n'),
        );
      },
    );
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
          const lines = Object.entries(vm).map(
            ([key, value]) => `${key}: ${typeof value === 'object' ? JSON.stringify(value) : String(value)}`,
          );
          return [...lines, ...consoleTail(vm.consoleLog)].join('\n');
        });
      }),
  );
  group.addCommand(
    withProxyOption(
      verb('stop', 'Power VMs down; their non-persistent clones go with them.', [
        'gridvfs vm stop web',
        'gridvfs vm stop web --now',
      ]),
    )
      .argument('<vm...>')
      .option('--now', 'end it at once, as if the power failed')
      .option('--grace <duration>', 'how long the guest may take to power down', parseDuration, 15_000)
      .addOption(jsonOption())
      .action(async (ids: string[], options: Options & { now?: boolean; grace: number }) => {
        const { client } = await findProxy(options.proxy);
        for (const id of ids) {
          const graceMs = options.now ? 0 : options.grace;
          await client.call('POST', `/v1/vms/${encodeURIComponent(id)}/stop`, { graceMs });
        }
        show(options, { stopped: ids }, () => `stopped ${ids.join(', ')}`);
      }),
  );
  return group;
}

const CONSOLE_LINES = 10;

function consoleTail(file: string): string[] {
  try {
    return ['', ...readFileSync(file, 'utf8').trimEnd().split('\n').slice(-CONSOLE_LINES)];
  } catch {
    return []; // the VM is gone, and its log with it
  }
}
