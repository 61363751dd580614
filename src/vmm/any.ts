/** Both kinds of machines as one Vmm: what is started says which it is, and what runs is known by its folder. */
import { existsSync } from 'node:fs';
import path from 'node:path';
import type { Vmm } from '../core/machine.ts';
import { createContainers } from './container/container.ts';
import { PID_FILE } from './container/folder.ts';
import { createQemu } from './qemu/qemu.ts';
import type { QemuOptions } from './qemu/qemu.ts';

/** QEMU, and containers for descriptions of that kind. */
export function createMachines(options: QemuOptions = {}): Vmm {
  const qemu = createQemu(options);
  const containers = createContainers(options.log === undefined ? {} : { log: options.log });
  // A container's supervisor writes it before anything else runs.
  const inFolder = (folder: string) => (existsSync(path.join(folder, PID_FILE)) ? containers : qemu);
  return {
    ...qemu,
    start: (description, folder) =>
      (description.kind === 'container' ? containers : qemu).start(description, folder),
    adopt: (folder) => inFolder(folder).adopt(folder),
    endLost: (folder) => inFolder(folder).endLost(folder),
  };
}
