/** What is said of machines that are asked for: the same of single ones (`broker request`) and of a workspace's. */
import { Option } from 'commander';
import type { Command } from 'commander';
import { POLICIES } from '../broker/index.ts';
import type { VmRequest } from '../broker/index.ts';
import { GridError } from '../core/errors.ts';
import { collect, parseBytes, parseCount } from './kit.ts';

export interface MachineOptions {
  count?: number;
  name?: string;
  os?: string;
  kernel?: string;
  library?: string[];
  label?: string[];
  memory?: number;
  vcpus?: number;
  network?: string;
  policy?: NonNullable<VmRequest['policy']>;
  restart?: boolean;
}

/** The image as the argument, and an option for each of the others; `help` is of those whose meaning differs. */
export function withMachines(
  command: Command,
  help: { readonly name: string; readonly network: string; readonly restart: string },
): Command {
  return command
    .argument('[image]', 'name or name:version; any that fits when left out')
    .option('--count <number>', 'how many machines', parseCount)
    .option('--name <name>', help.name)
    .option('--network <name>', help.network)
    .option('--os <range>', 'label os')
    .option('--kernel <range>', 'label kernel, e.g. ">=6.1 <7"')
    .option('--library <range>', 'label library.NAME, e.g. "libc>=2.36" (may be given again)', collect)
    .option('--label <range>', 'any other label (may be given again)', collect)
    .option('--memory <size>', 'memory of each (default: 512M)', parseBytes)
    .option('--vcpus <count>', 'virtual processors of each', parseCount)
    .addOption(new Option('--policy <which>', 'how hosts are chosen (default: warm)').choices(POLICIES))
    .option('--restart', help.restart);
}

type MachineRequest = Pick<
  VmRequest,
  | 'image'
  | 'count'
  | 'name'
  | 'os'
  | 'kernel'
  | 'libraries'
  | 'labels'
  | 'memoryBytes'
  | 'vcpus'
  | 'network'
  | 'policy'
  | 'restart'
>;

/** What was given, as the broker takes it. Throws bad-request for a label without a range. */
export function machineRequest(image: string | undefined, options: MachineOptions): MachineRequest {
  const { count, name, os, kernel, library, label, memory, vcpus, network, policy, restart } = options;
  return {
    ...(image === undefined ? {} : { image }),
    ...(count === undefined ? {} : { count }),
    ...(name === undefined ? {} : { name }),
    ...(os === undefined ? {} : { os }),
    ...(kernel === undefined ? {} : { kernel }),
    ...(library === undefined ? {} : { libraries: ranges(library) }),
    ...(label === undefined ? {} : { labels: ranges(label) }),
    ...(memory === undefined ? {} : { memoryBytes: memory }),
    ...(vcpus === undefined ? {} : { vcpus }),
    ...(network === undefined ? {} : { network }),
    ...(policy === undefined ? {} : { policy }),
    ...(restart === undefined ? {} : { restart }),
  };
}

/** "libc>=2.36" or "libc=2.36" → name and range. */
function ranges(texts: readonly string[]): Record<string, string> {
  return Object.fromEntries(
    texts.map((text) => {
      const match = /^([A-Za-z0-9][A-Za-z0-9._+-]*?)\s*(=|(?=[<>]))(.+)$/.exec(text);
      if (!match)
        throw new GridError(
          'bad-request',
          `'${text}' is no label with a range; write libc>=2.36 or os=debian`,
        );
      return [match[1]!, match[3]!.trim()];
    }),
  );
}
