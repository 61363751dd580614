/**
 * Operating system containers as a `Vmm`: systemd-nspawn (Debian: systemd-container) over a disk that is mounted through a
 * loop device, for grids that run such things, and to show that the contract is not QEMU's. A container has the host's
 * kernel, so it has no boot of its own, no memory to capture, and no device whose speed could be bounded; it is given
 * no network. Needs root.
 */
import { GridError } from '../../core/errors.ts';
import { isRoot } from '../../core/linux.ts';
import type { MachineAbility, MachineDescription, Vmm } from '../../core/machine.ts';
import { checkDescription } from '../description.ts';
import { findProgram } from '../program.ts';
import { ContainerMachine, endContainer } from './machine.ts';

const PROGRAM = 'systemd-nspawn';
const LACKS: ReadonlySet<MachineAbility> = new Set(['capture', 'boot', 'network', 'limits', 'qcow2']);

export function createContainers(options: { log?: (line: string) => void } = {}): Vmm {
  const log = options.log ?? (() => undefined);
  const missing = async () => {
    if (!isRoot()) return 'containers need root';
    if ((await findProgram(PROGRAM)) !== undefined) return undefined;
    return `${PROGRAM} is not installed; it is in the Debian package systemd-container`;
  };
  return {
    name: 'container',
    lacks: LACKS,
    async probe() {
      const reason = await missing();
      if (reason !== undefined) return { usable: false, reason };
      return { usable: true, accelerator: 'container', reason: 'containers run on the host’s own kernel' };
    },
    async start(description, folder) {
      checkDescription(description);
      checkPossible(description);
      const reason = await missing();
      if (reason !== undefined) throw new GridError('unsupported', reason);
      return ContainerMachine.start(description, folder, log);
    },
    resume({ name }) {
      return Promise.reject(
        new GridError('unsupported', `${name} cannot be resumed: containers are not captured`),
      );
    },
    adopt: (folder) => ContainerMachine.adopt(folder, log),
    endLost: endContainer,
  };
}

function checkPossible({ name, disks, boot, network, limits }: MachineDescription): void {
  const refuse = (what: string) => {
    throw new GridError('unsupported', `container ${name}: ${what}`);
  };
  if (boot !== undefined) refuse('it has no kernel of its own');
  if (network !== 'none') refuse('it has no network');
  if (limits !== undefined) refuse('its disks cannot be bounded');
  if (disks.some(({ format }) => format !== 'raw')) refuse('its disks must be raw');
  if (disks.length !== 1) refuse('it starts with one disk; others are attached');
}
