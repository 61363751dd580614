/**
 * gridvfs vm move: a VM goes on on another host that mounts the same store. It is suspended here, its checkpoint goes to the
 * store (which has all of it but what the VM changed), and the other host's `vm arrive`, reached by ssh, goes on with
 * it as the same machine: name, addresses, instance. Only when it says that its guest runs there is the VM here thrown
 * away. When it cannot be reached any more nobody knows whether it runs there, so the VM stays suspended here.
 */
import { spawn } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import type { PublishedCheckpoint } from '../agent/machine-parts.ts';
import type { ControlClient } from '../agent/client.ts';
import type { VmStatus } from '../agent/vm-record.ts';
import { asGridError, ERROR_CODES, GridError } from '../core/errors.ts';
import type { ErrorCode } from '../core/errors.ts';
import { jsonOption, show, verb } from './kit.ts';
import { findProxy, withProxyOption } from './registry.ts';
import { answered, vmText } from './vm-checkpoint.ts';

interface Options {
  json?: boolean;
  proxy?: string;
}

interface MoveOptions extends Options {
  readonly to: string;
  readonly toProxy?: string;
  readonly rsh: string;
  readonly remoteCommand: string;
}

const routeOf = (id: string, action: string) => `/v1/vms/${encodeURIComponent(id)}/${action}`;
/** What ssh itself ends with when it does not get through. */
const SSH_FAILED = 255;
const TAG_SEEN_MS = 20_000;
const TAG_LOOK_MS = 200;

/** A word for the far side's shell. */
const quoted = (word: string) => `'${word.replaceAll("'", `'\\''`)}'`;

/** `gridvfs …` over there. Throws unreachable when ssh does not get through, and the far side's own error. */
async function there<T>(
  { to, rsh, remoteCommand, toProxy }: MoveOptions,
  args: readonly string[],
): Promise<T> {
  const words = [...args, ...(toProxy === undefined ? [] : ['--proxy', toProxy]), '--json'];
  const [program, ...options] = rsh.split(' ').filter(Boolean);
  if (program === undefined) throw new GridError('bad-request', '--rsh is empty');
  const child = spawn(program, [...options, to, `${remoteCommand} ${words.map(quoted).join(' ')}`], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let [output, errors] = ['', ''];
  child.stdout.on('data', (text: Buffer) => (output += text.toString()));
  child.stderr.on('data', (text: Buffer) => (errors += text.toString()));
  const code = await new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  }).catch((error: unknown) => {
    throw asGridError(error, `cannot start ${program}`, 'unreachable');
  });
  if (code === 0) return JSON.parse(output) as T;
  const lastWords = errors.trim().split('\n').at(-1) ?? '';
  const known = /^gridvfs: (.*) \[([a-z-]+)\]$/.exec(lastWords);
  if (known && Object.hasOwn(ERROR_CODES, known[2]!))
    throw new GridError(known[2] as ErrorCode, `on ${to}: ${known[1]}`);
  const what = code === SSH_FAILED ? `cannot reach ${to}` : `${remoteCommand} at ${to} ended with ${code}`;
  throw new GridError('unreachable', `${what}: ${lastWords || 'no reason given'}`);
}

/** Whether it is sure that the VM does not run there. */
async function isNotThere(options: MoveOptions, id: string): Promise<boolean> {
  try {
    const { state } = await there<VmStatus>(options, ['vm', 'show', id]);
    return state === 'failed';
  } catch (error) {
    return error instanceof GridError && error.code === 'not-found' && error.message.includes(`VM '${id}'`);
  }
}

async function move(client: ControlClient, id: string, options: MoveOptions): Promise<VmStatus> {
  const { state } = await client.call<VmStatus>('GET', `/v1/vms/${encodeURIComponent(id)}`);
  // Before anything is done to it: can it arrive there at all?
  await there(options, ['vm', 'ls']);
  const reference = `${id}.moved:${Date.now().toString(36)}`;
  await client.call('POST', '/v1/may-checkpoint', { checkpoint: reference });
  if (state !== 'suspended') await client.call('POST', routeOf(id, 'suspend'), {});
  const goOnHere = async (error: unknown): Promise<never> => {
    if (state !== 'suspended') await client.call('POST', routeOf(id, 'resume'), {});
    throw error;
  };
  try {
    await client.call<PublishedCheckpoint>('POST', routeOf(id, 'checkpoint'), { reference });
  } catch (error) {
    return goOnHere(error);
  }
  let vm: VmStatus;
  try {
    vm = await there<VmStatus>(options, ['vm', 'arrive', reference, '--name', id]);
  } catch (error) {
    if (await isNotThere(options, id)) return goOnHere(error);
    const { code, message } = asGridError(error, 'cannot move', 'unreachable');
    throw new GridError(
      code,
      `${message}; whether '${id}' runs on ${options.to} is not known, so it stays suspended here: look there, then \`gridvfs vm resume ${id}\` or \`gridvfs vm stop ${id}\``,
      { cause: error },
    );
  }
  await client.call('POST', routeOf(id, 'stop'), {});
  return vm;
}

/** A checkpoint that was just made may be in this host's list of tags only after a while. */
async function whenSeen(
  client: ControlClient,
  request: { checkpoint: string; name: string; same: true },
): Promise<VmStatus> {
  for (const endMs = performance.now() + TAG_SEEN_MS; ; await sleep(TAG_LOOK_MS)) {
    try {
      return await client.call<VmStatus>('POST', '/v1/vms/resume', request);
    } catch (error) {
      const isUnseen = error instanceof GridError && error.code === 'not-found';
      if (!isUnseen || performance.now() > endMs) throw error;
    }
  }
}

export function moveVerbs(): Command[] {
  return [
    withProxyOption(
      verb(
        'move',
        'Have a VM go on on another host that mounts the same store: suspended here, resumed there. Its checkpoint stays in the store as VM.moved:….',
        ['gridvfs vm move web --to root@host2', "gridvfs vm move web --to host2 --rsh 'ssh -p 2222'"],
      ),
    )
      .argument('<vm>')
      .requiredOption('--to <host>', 'where to; ssh’s word for it')
      .option('--to-proxy <name>', 'which proxy there, when more than one runs')
      .option('--rsh <command>', 'how that host is reached', 'ssh -o BatchMode=yes')
      .option('--remote-command <command>', 'what gridvfs is called there', 'gridvfs')
      .addOption(jsonOption())
      .action(async (id: string, options: MoveOptions) => {
        const { client } = await findProxy(options.proxy);
        const vm = await move(client, id, options);
        show(options, vm, () => `on ${options.to}:\n${vmText(vm)}`);
      }),
    withProxyOption(
      verb('arrive', 'The far side of `vm move`: go on with a checkpoint as the same machine.', [
        'gridvfs vm arrive web.moved:1 --name web',
      ]),
    )
      .argument('<checkpoint>', 'name:version')
      .requiredOption('--name <name>', 'the VM’s name')
      .addOption(jsonOption())
      .action(async (checkpoint: string, options: Options & { name: string }) => {
        const { client } = await findProxy(options.proxy);
        const request = { checkpoint, name: options.name, same: true as const };
        const vm = await answered(client, await whenSeen(client, request), true);
        show(options, vm, () => vmText(vm));
      }),
  ];
}
