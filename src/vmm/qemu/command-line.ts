/**
 * A MachineDescription as QEMU's arguments. Nothing is left to defaults that differ between hosts (-nodefaults,
 * formats and cache modes explicit). Disks and devices are given as JSON, so no path can be taken for an option;
 * what has no JSON form escapes its commas. Sockets and logs are relative names: QEMU runs in the machine's folder.
 */
import path from 'node:path';
import { checkedNumber } from '../../core/bytes.ts';
import { GridError } from '../../core/errors.ts';
import { GIB, MIB, NAME_LENGTH_MAX } from '../../core/limits.ts';
import type { MachineDescription } from '../../core/machine.ts';
import type { Accelerator } from './accelerator.ts';

/** Names in the machine's folder. */
export const QMP_SOCKET = 'qmp.sock';
export const CONSOLE_SOCKET = 'console.sock';
export const IDENTITY_SOCKET = 'identity.sock';
export const INCOMING_SOCKET = 'incoming.sock';
export const CONSOLE_LOG = 'console.log';
export const QEMU_LOG = 'qemu.log';
export const PID_FILE = 'qemu.pid';

const VCPUS_MAX = 255;
const MEMORY_BYTES_MIN = 16 * MIB;
const MEMORY_BYTES_MAX = 4096 * GIB;
/** PCI slots of the machine, less the devices that are always there. */
const DISKS_MAX = 24;
/** The kernel's COMMAND_LINE_SIZE on x86. */
const KERNEL_COMMAND_LINE_BYTES_MAX = 2047;

/**
 * One cache mode for every disk, on a mount and on local storage alike: through the host's page cache, guest
 * flushes honoured. Trims go down (the layer and sparse files give space back); zeroes are not looked for in
 * ordinary writes, because that would turn a write, which is fast, into a hole to punch, which is not.
 */
const DISK_CACHE = { direct: false, 'no-flush': false } as const;
const DISK_OPTIONS = { discard: 'unmap', 'detect-zeroes': 'off', cache: DISK_CACHE } as const;

/** Five-level page tables are a level more to walk, which an emulated processor does in software. */
const PROCESSORS = { kvm: 'host', tcg: 'max,la57=off' } as const;
/** Where its memory lies unless it is resumed. */
export const RAM_NAME = 'memory-backend-memfd';
const UUID = /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

/** What is not in the description. */
export interface QemuChoices {
  readonly accelerator: Accelerator;
  /** Versioned, for a machine that is resumed; QEMU's newest otherwise. */
  readonly machine?: string;
  /** A memory image to map privately; the machine then waits for its device state. */
  readonly memoryImage?: string;
}

export const processorOf = (accelerator: Accelerator): string => PROCESSORS[accelerator];

const escaped = (text: string) => text.replaceAll(',', ',,');

function refuse(name: string, what: string): never {
  throw new GridError('bad-request', `machine ${JSON.stringify(name)}: ${what}`);
}

/** Throws bad-request, naming what is wrong. Files are not looked at: they may lie on a mount of this process. */
export function checkDescription(description: MachineDescription): void {
  const { name, vcpus, memoryBytes, disks, boot, macAddress, network, readyText, generationId } = description;
  // eslint-disable-next-line no-control-regex
  if (name === '' || name.length > NAME_LENGTH_MAX || /[\0-\x1f\x7f]/.test(name)) {
    refuse(name, `the name must have 1 to ${NAME_LENGTH_MAX} printable characters`);
  }
  if (checkedNumber(vcpus, `machine ${name}: vcpus`, VCPUS_MAX) < 1) refuse(name, 'vcpus must be 1 or more');
  checkedNumber(memoryBytes, `machine ${name}: memoryBytes`, MEMORY_BYTES_MAX);
  if (memoryBytes < MEMORY_BYTES_MIN || memoryBytes % MIB !== 0) {
    refuse(
      name,
      `memory must be a whole number of MiB from ${MEMORY_BYTES_MIN / MIB}, not ${memoryBytes} bytes`,
    );
  }
  if (disks.length > DISKS_MAX)
    refuse(name, `${disks.length} disks are more than the ${DISKS_MAX} it has room for`);
  if (disks.length === 0 && boot === undefined)
    refuse(name, 'it has neither a disk nor a kernel to boot from');
  const files = [...disks.map((disk) => disk.path), boot?.kernel, boot?.initrd];
  for (const file of files) {
    if (file !== undefined && (!path.isAbsolute(file) || file.includes('\0'))) {
      refuse(name, `${JSON.stringify(file)} must be an absolute path`);
    }
  }
  for (const disk of disks) {
    if (disk.format !== 'raw' && disk.format !== 'qcow2') {
      refuse(name, `disk ${disk.path} has format ${String(disk.format)}, not raw or qcow2`);
    }
  }
  if (boot !== undefined && /[\0\n]/.test(boot.commandLine))
    refuse(name, 'the kernel command line has a line end');
  if (boot !== undefined && Buffer.byteLength(boot.commandLine) > KERNEL_COMMAND_LINE_BYTES_MAX) {
    refuse(name, `the kernel command line is longer than ${KERNEL_COMMAND_LINE_BYTES_MAX} bytes`);
  }
  if (network !== 'user' && network !== 'none') refuse(name, `unknown network ${JSON.stringify(network)}`);
  // The lowest bit of the first byte would make it a multicast address.
  if (!/^[0-9a-f][02468ace](?::[0-9a-f]{2}){5}$/i.test(macAddress)) {
    refuse(name, `${JSON.stringify(macAddress)} is no MAC address of one device, like 52:54:00:12:34:56`);
  }
  if (readyText !== undefined && (readyText === '' || /[\r\n]/.test(readyText))) {
    refuse(name, 'readyText must be part of one line, and not empty');
  }
  if (generationId !== undefined && !UUID.test(generationId)) refuse(name, 'generationId must be a UUID');
}

/** QEMU's arguments for a checked description. Throws bad-request. */
export function qemuArguments(description: MachineDescription, choices: QemuChoices): string[] {
  checkDescription(description);
  const { name, vcpus, memoryBytes, disks, boot, macAddress, network, generationId = 'auto' } = description;
  const { accelerator, machine = 'pc', memoryImage } = choices;
  const args: string[] = [];
  const add = (...words: string[]) => void args.push(...words);
  const addDevice = (options: Record<string, unknown>) => add('-device', JSON.stringify(options));

  add('-name', `guest=${escaped(name)},debug-threads=on`);
  add('-nodefaults', '-no-user-config', '-display', 'none');
  // No process of its own, no privilege, no system call that only old programs use.
  add('-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny');
  // Disks can be plugged into a running pc's only bus; q35 boots no slower, but would need a port for each.
  // The device state is loaded by itself, without the sections that precede and follow it in a migration.
  add('-machine', `${machine},vmport=off,usb=off,memory-backend=ram,suppress-vmdesc=on`);
  add('-global', 'migration.send-configuration=off');
  add('-accel', accelerator === 'kvm' ? 'kvm' : 'tcg,thread=multi', '-cpu', processorOf(accelerator));
  add('-smp', String(vcpus), '-m', `size=${memoryBytes / MIB}M`);
  const ram = { id: 'ram', size: memoryBytes };
  if (memoryImage === undefined) {
    add('-object', JSON.stringify({ 'qom-type': RAM_NAME, ...ram, share: true }));
  } else {
    add(
      '-object',
      JSON.stringify({ 'qom-type': 'memory-backend-file', ...ram, 'mem-path': memoryImage, share: false }),
    );
    add('-S', '-incoming', 'defer');
  }
  addDevice({ driver: 'vmgenid', guid: generationId });
  add('-pidfile', PID_FILE);
  add('-chardev', `socket,id=qmp,path=${QMP_SOCKET},server=on,wait=off`, '-mon', 'chardev=qmp,mode=control');
  add('-chardev', `socket,id=console,path=${CONSOLE_SOCKET},server=on,wait=off,logfile=${CONSOLE_LOG}`);
  add('-serial', 'chardev:console');
  add(
    '-chardev',
    `socket,id=identity,path=${IDENTITY_SOCKET},server=on,wait=off`,
    '-serial',
    'chardev:identity',
  );
  add('-object', 'rng-random,id=random,filename=/dev/urandom');
  addDevice({ driver: 'virtio-rng-pci', rng: 'random' });
  disks.forEach((disk, index) => {
    const file = { driver: 'file', filename: disk.path, discard: 'unmap', cache: DISK_CACHE };
    const node = {
      driver: disk.format,
      'node-name': `disk${index}`,
      'read-only': disk.readOnly,
      ...DISK_OPTIONS,
      file: { ...file, 'read-only': disk.readOnly },
    };
    add('-blockdev', JSON.stringify(node));
    addDevice({ driver: 'virtio-blk-pci', id: `virtio-disk${index}`, drive: `disk${index}` });
  });
  if (network === 'user') {
    add('-netdev', 'user,id=net0');
    addDevice({ driver: 'virtio-net-pci', netdev: 'net0', mac: macAddress });
  }
  if (boot !== undefined) {
    add('-kernel', boot.kernel, '-append', boot.commandLine);
    if (boot.initrd !== undefined) add('-initrd', boot.initrd);
  }
  return args;
}
