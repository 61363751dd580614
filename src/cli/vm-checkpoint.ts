/** gridvfs vm suspend|resume|checkpoint|fork: thin calls of the proxy's control socket. */
import { randomBytes } from 'node:crypto';
import type { Command } from 'commander';
import { baseReference } from '../agent/base-checkpoints.ts';
import type { BaseRequest } from '../agent/base-checkpoints.ts';
import type { Suspended } from '../agent/checkpoints.ts';
import type { PublishedCheckpoint } from '../agent/machine-parts.ts';
import type { ControlClient } from '../agent/client.ts';
import type { Rehearsed } from '../agent/rehearsal.ts';
import type { VmStatus } from '../agent/vm-record.ts';
import { GridError } from '../core/errors.ts';
import { bytesText, jsonOption, parseBytes, parseCount, show, verb } from './kit.ts';
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
  const ready =
    vm.resumed && vm.timeline.readyMs === undefined
      ? 'resumed'
      : `guest ${vm.resumed ? 'answered' : 'ready'} ${seconds(vm.timeline.readyMs)}`;
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
    const reasons = failures.map(({ error }) => (error instanceof Error ? error.message : String(error)));
    const isOne = new Set(reasons).size === 1;
    const text = isOne ? reasons[0]! : failures.map(({ id }, at) => `${id}: ${reasons[at]!}`).join('; ');
    const code = first!.error instanceof GridError ? first!.error.code : 'bug';
    throw new GridError(code, `${failures.length} of ${ids.length} failed: ${text}`, { cause: first!.error });
  }
  return results.map((result) => (result as PromiseFulfilledResult<T>).value);
}

const BOOT_TIMEOUT_MS = 600_000;
/** How long a resumed guest may take to answer, where it does. */
const ANSWER_TIMEOUT_MS = 120_000;

/** Waits until the guest of a VM that goes on has shown by its answer that it does; at once for one that cannot. */
export async function answered(client: ControlClient, vm: VmStatus, wait: boolean): Promise<VmStatus> {
  if (!wait || !vm.answers) return vm;
  return client.call<VmStatus>('GET', `${routeOf(vm.id, 'ready')}?timeoutMs=${ANSWER_TIMEOUT_MS}`);
}

/** `vm run --from-checkpoint`, and `vm fork` of a checkpoint. */
export async function runFrom(
  client: ControlClient,
  checkpoint: string,
  options: Options & { name?: string; count?: number; wait?: boolean },
): Promise<void> {
  const resume = async (name: string | undefined) => {
    const request = { checkpoint, ...(name === undefined ? {} : { name }) };
    const vm = await client.call<VmStatus>('POST', '/v1/vms/resume', request);
    return answered(client, vm, options.wait ?? true);
  };
  if (options.count === undefined) {
    const vm = await resume(options.name);
    return show(options, vm, () => vmText(vm));
  }
  const vms = await allOf(namesFor(options.name, options.count), resume);
  show(options, vms, () => vms.map(vmText).join('\n'));
}

interface CheckpointOptions extends Options {
  to?: string;
  base?: string;
  remove?: string;
  memory?: number;
  vcpus?: number;
  rehearsal: boolean;
}

async function checkpoint(client: ControlClient, vm: string | undefined, options: CheckpointOptions) {
  const { to, base, memory, vcpus } = options;
  const publish = (id: string, reference: string, isBase: boolean) =>
    client.call<PublishedCheckpoint>('POST', routeOf(id, 'checkpoint'), { reference, base: isBase });
  if (base === undefined) {
    if (memory !== undefined || vcpus !== undefined)
      throw new GridError('bad-request', '--memory and --vcpus are of a machine that --base makes');
    if (vm === undefined || to === undefined)
      throw new GridError(
        'bad-request',
        'name a VM and what to call its checkpoint (--to), or an image (--base)',
      );
    return { to, made: await publish(vm, to, false) };
  }
  if (vm !== undefined || to !== undefined)
    throw new GridError('bad-request', '--base makes a VM of its own, and is called after its image');
  const { id } = await client.call<VmStatus>('POST', '/v1/vms', {
    image: base,
    ...(memory === undefined ? {} : { memoryBytes: memory }),
    ...(vcpus === undefined ? {} : { vcpus }),
  });
  try {
    await client.call('GET', `${routeOf(id, 'ready')}?timeoutMs=${BOOT_TIMEOUT_MS}`);
    await client.call('POST', routeOf(id, 'suspend'), {});
    const reference = baseReference(base);
    return { to: reference, made: await publish(id, reference, true) };
  } finally {
    await client.call('POST', routeOf(id, 'stop'), { graceMs: 0 });
  }
}

/** Has it resumed once, for the sake of the next. The checkpoint is there however that ends. */
async function rehearsed(client: ControlClient, reference: string): Promise<Rehearsed | { reason: string }> {
  try {
    return await client.call<Rehearsed>('POST', '/v1/rehearse', { checkpoint: reference });
  } catch (error) {
    return { reason: error instanceof Error ? error.message : String(error) };
  }
}

function rehearsalText(rehearsal: Rehearsed | { reason: string }): string {
  if ('reason' in rehearsal) return `not rehearsed: ${rehearsal.reason}`;
  const { chunks, seconds: took } = rehearsal;
  return `rehearsed in ${took.toFixed(2)} s: a resume begins with ${chunks} chunks, which hosts fetch ahead now`;
}

/** Goes on from an image's base checkpoint where there is one that fits and that runs here; undefined: it must boot. */
export async function runFromBase(
  client: ControlClient,
  request: BaseRequest,
  name: string | undefined,
): Promise<VmStatus | undefined> {
  try {
    const { checkpoint: found } = await client.call<{ checkpoint: string }>(
      'POST',
      '/v1/base-checkpoint',
      request,
    );
    const vm = await client.call<VmStatus>('POST', '/v1/vms/resume', {
      checkpoint: found,
      ...(name === undefined ? {} : { name }),
    });
    return await answered(client, vm, true);
  } catch (error) {
    // Made for other machines than this host's, or not there.
    if (!(error instanceof GridError) || !['not-found', 'unsupported'].includes(error.code)) throw error;
    process.stderr.write(`gridvfs: booting: ${error.message}\n`);
    return undefined;
  }
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
      .option('--no-wait', 'return when its guest runs, before it has answered')
      .addOption(jsonOption())
      .action(async (ids: string[], options: Options & { wait: boolean }) => {
        const { client } = await findProxy(options.proxy);
        const vms = await allOf(ids, async (id) =>
          answered(client, await client.call<VmStatus>('POST', routeOf(id, 'resume'), {}), options.wait),
        );
        show(options, vms, () => vms.map(vmText).join('\n'));
      }),
    withProxyOption(
      verb(
        'checkpoint',
        'Publish a VM, memory and disk, as a version in the store, from which any host can resume it. A VM that runs pauses meanwhile.',
        [
          'gridvfs vm checkpoint web --to web:warm',
          'gridvfs vm run --from-checkpoint web:warm',
          'gridvfs vm checkpoint --base debian:12       # boots it, publishes debian.base:12, ends it',
          'gridvfs vm run debian:12 --from-checkpoint   # goes on from there where it fits, and boots where not',
          'gridvfs vm checkpoint web --to web:warm --no-rehearsal   # nobody resumes it before somebody needs it',
          'gridvfs vm checkpoint --remove web:warm      # refused while a VM or a clone goes on from it',
        ],
      ),
    )
      .argument('[vm]')
      .option('--to <name:version>', 'what to call it')
      .option('--base <image>', 'boot this image and publish it as it is when its guest is ready')
      .option('--remove <name:version>', 'take a checkpoint’s names away; the store’s next gc takes the rest')
      .option(
        '--no-rehearsal',
        'do not resume it once, apart from any network, to learn which pages a resume begins with',
      )
      .option('--memory <size>', 'with --base: memory; the image’s own default, else 512M', parseBytes)
      .option('--vcpus <count>', 'with --base: virtual processors (default: 1)', parseCount)
      .addOption(jsonOption())
      .action(async (vm: string | undefined, options: CheckpointOptions) => {
        const { client } = await findProxy(options.proxy);
        if (options.remove !== undefined) {
          if (vm !== undefined || options.to !== undefined || options.base !== undefined)
            throw new GridError('bad-request', '--remove goes with nothing else');
          const request = { checkpoint: options.remove };
          const gone = await client.call<{ removed: string[] }>('POST', '/v1/remove-checkpoint', request);
          return show(options, gone, () => `removed ${gone.removed.join(', ')}`);
        }
        const { to, made } = await checkpoint(client, vm, options);
        const rehearsal = options.rehearsal ? await rehearsed(client, to) : undefined;
        show(options, { ...made, ...(rehearsal === undefined ? {} : { rehearsal }) }, () =>
          [
            `${to} is ${made.digest}`,
            `${made.newChunks} chunks were new, ${bytesText(made.newStoredBytes)} compressed`,
            ...(rehearsal === undefined ? [] : [rehearsalText(rehearsal)]),
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
