/** QEMU as a `Vmm`: finds the program, chooses the accelerator, starts machines. */
import { existsSync } from 'node:fs';
import { GridError } from '../../core/errors.ts';
import type { MachineDescription, Vmm } from '../../core/machine.ts';
import { checkDescription } from '../description.ts';
import { findProgram } from '../program.ts';
import { chooseAccelerator, type Accelerator } from './accelerator.ts';
import { checkCompatibility, readDeviceState } from './checkpoint.ts';
import { UEFI_FILE } from './command-line.ts';
import { killMachine } from './folder.ts';
import { QemuMachine } from './machine.ts';
import { smallFaultsSpare } from './page-faults.ts';

export interface QemuOptions {
  /** Name or path of the program; by default qemu-system-x86_64 from PATH. */
  readonly binary?: string;
  /** 'auto' (default): KVM where it really works, else TCG. */
  readonly accelerator?: 'auto' | Accelerator;
  /** One line per start, readiness and end. */
  readonly log?: (line: string) => void;
}

const PROGRAM = 'qemu-system-x86_64';
const PACKAGE = 'qemu-system-x86';

export function createQemu(options: QemuOptions = {}): Vmm {
  const binary = options.binary ?? PROGRAM;
  const missing = `${binary} is not installed or not executable; it is in the Debian package ${PACKAGE}`;
  const log = options.log ?? (() => undefined);
  const findQemu = async (description: MachineDescription) => {
    checkDescription(description);
    const program = await findProgram(binary);
    if (program === undefined) throw new GridError('unsupported', missing);
    const firmware = description.firmware === 'uefi' ? UEFI_FILE : undefined;
    if (firmware !== undefined && !existsSync(firmware)) {
      throw new GridError(
        'unsupported',
        `${description.name} starts by UEFI, and ${firmware} is not there; it is in the Debian package ovmf`,
      );
    }
    return { program, ...(await chooseAccelerator(options.accelerator ?? 'auto')) };
  };
  return {
    name: 'qemu',
    lacks: new Set(),
    async probe() {
      if ((await findProgram(binary)) === undefined) return { usable: false, reason: missing };
      return { usable: true, ...(await chooseAccelerator(options.accelerator ?? 'auto')) };
    },
    async start(description, folder) {
      const { program, accelerator } = await findQemu(description);
      return QemuMachine.start({ program, accelerator, description, folder, log });
    },
    async resume(description, folder, files, compatibility) {
      const { program, accelerator } = await findQemu(description);
      await checkCompatibility(compatibility, accelerator, description.name);
      const deviceState = await readDeviceState(files.deviceState);
      const from = { machine: compatibility.machine, memoryImage: files.memory, deviceState };
      return QemuMachine.start({ program, accelerator, description, folder, log, from });
    },
    prepare: () => smallFaultsSpare?.prepare(),
    adopt: (folder) => QemuMachine.adopt(folder, log),
    endLost: killMachine,
  };
}
