/** gridvfs vm suspend|resume|checkpoint|fork: thin calls of the proxy's control socket. */
import { randomBytes } from 'node:crypto';
import type { Command } from 'commander';
import type { PublishedCheckpoint, Suspended } from '../agent/checkpoints.ts';
import type { ControlClient } from '../agent/client.ts';
import type { VmStatus } from '../agent/vm-record.ts';
import { GridError } from '../core/errors.ts';
import { bytesText, jsonOption, parseCount, show, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

const routeOf = (id: string, action: string) => `/v1/vms/${encodeURIComponent(id)}/${action}`;
/** More at once make none of them faster. */
const COUNT_MAX = 256;

export const seconds = (ms: number | undefined) => (ms === undefined ? '-' : `${(ms / 1000).toFixed(2)} s`);

/** A VM that runs now, for people. */
export function vmText(vm: VmStatus): string {
  const ready = vm.resumed ? 'resumed' : `guest ready ${seconds(vm.timeline.readyMs)}`;
  return [
    `${vm.id}  ${vm.state}  pid ${vm.pid ?? '-'}  ${vm.accelerator ?? ''}`,
    `clone ${vm.clone} after ${seconds(vm.timeline.clonedMs)}, started ${seconds(vm.timeline.startedMs)}, ${ready}`,
    `console: ${vm.consoleSocket}   log: ${vm.consoleLog}`,
  ].join('\n');
}

/** Names for several VMs; undefined is for the proxy to make up. */
export function namesFor(name: string | undefined, count: number): string[] {
  if (count > COUNT_MAX) throw new GridError('bad-request', `at most ${COUNT_MAX} at once`);
  const stem = name ?? `vm-${randomBytes(3).toString('hex')}`;
  return Array.from({ length: count }, (_, index) => `${stem}-${index + 1}`);
}

/** Does it for all of them at once, also when some fail; then throws, naming those. */
export async function allOf<T>(ids: readonly string[], task: (id: string) => Promise<T>): Promise<T[]> {
  const results = await Promise.allSettled(ids.map(task));
  const failures = results.flatMap((result, index) =>
    result.status === 'rejected' ? [{ id: ids[index]!, error: result.reason as unknown }] : [],
  );
  if (failures.length === 1 && ids.length === 1) throw failures[0]!.error;
  if (failures.length > 0) {
    const [first] = failures;
    const text = failures
      .map(({ id, error }) => `${id}: ${error instanceof Error ? error.message : String(error)}`)
      .join('; ');
    const code = first!.error instanceof GridError ? first!.error.code : 'bug';
    throw new GridError(code, `${failures.length} of ${ids.length} failed: ${text}`, { cause: first!.error });
  }
  return results.map((result) => (result as PromiseFulfilledResult<T>).value);
}

/** `vm run --from-checkpoint`, and `vm fork` of a checkpoint. */
export async function runFrom(
  client: ControlClient,
  checkpoint: string,
  options: Options & { name?: string; count?: number },
): Promise<void> {
  const resume = (name: string | undefined) =>
    client.call<VmStatus>('POST', '/v1/vms/resume', { checkpoint, ...(name === undefined ? {} : { name }) });
  if (options.count === undefined) {
    const vm = await resume(options.name);
    return show(options, vm, () => vmText(vm));
  }
  const vms = await allOf(namesFor(options.name, options.count), resume);
  show(options, vms, () => vms.map(vmText).join('\n'));
}

export function checkpointVerbs(): Command[] {
  return [
    withProxyOption(
      verb('suspend', 'Write VMs to disk and end their processes; `vm resume` goes on with them.', [
        'gridvfs vm suspend web',
      ]),
    )
      .argument('<vm...>')
      .addOption(jsonOption())
      .action(async (ids: string[], options: Options) => {
        const { client } = await findProxy(options.proxy);
        const all = await allOf(ids, (id) => client.call<Suspended>('POST', routeOf(id, 'suspend'), {}));
        show(options, all, () =>
          all
            .map(
              ({ id, memoryWrittenBytes, pausedMs }) =>
                `${id} is suspended: ${bytesText(memoryWrittenBytes)} of memory written in ${seconds(pausedMs)}`,
            )
            .join('\n'),
        );
      }),
    withProxyOption(verb('resume', 'Go on with suspended VMs where they were.', ['gridvfs vm resume web']))
      .argument('<vm...>')
      .addOption(jsonOption())
      .action(async (ids: string[], options: Options) => {
        const { client } = await findProxy(options.proxy);
        const vms = await allOf(ids, (id) => client.call<VmStatus>('POST', routeOf(id, 'resume'), {}));
        show(options, vms, () => vms.map(vmText).join('\n'));
      }),
    withProxyOption(
      verb(
        'checkpoint',
        'Publish a VM, memory and disk, as a version in the store, from which any host can resume it. A VM that runs pauses meanwhile.',
        ['gridvfs vm checkpoint web --to web:warm', 'gridvfs vm run --from-checkpoint web:warm'],
      ),
    )
      .argument('<vm>')
      .requiredOption('--to <name:version>', 'what to call it')
      .addOption(jsonOption())
      .action(async (id: string, options: Options & { to: string }) => {
        const { client } = await findProxy(options.proxy);
        const made = await client.call<PublishedCheckpoint>('POST', routeOf(id, 'checkpoint'), {
          reference: options.to,
        });
        show(options, made, () =>
          [
            `${options.to} is ${made.digest}`,
            `${made.newChunks} chunks were new, ${bytesText(made.newStoredBytes)} compressed`,
          ].join('\n'),
        );
      }),
    withProxyOption(
      verb('fork', 'Make VMs that go on from one checkpoint, each as a machine of its own.', [
        'gridvfs vm fork web:warm --count 8 --name worker',
      ]),
    )
      .argument('<checkpoint>', 'name:version, made by `vm checkpoint`')
      .option('--count <count>', 'how many (default: 1)', parseCount, 1)
      .option('--name <name>', 'what to call them: NAME-1, NAME-2, …')
      .addOption(jsonOption())
      .action(async (checkpoint: string, options: Options & { count: number; name?: string }) => {
        const { client } = await findProxy(options.proxy);
        await runFrom(client, checkpoint, options);
      }),
  ];
}
