/** What is checked of a machine's description before anything is made of it. */
import path from 'node:path';
import { checkedNumber } from '../core/bytes.ts';
import { GridError } from '../core/errors.ts';
import { GIB, KIB, MIB, NAME_LENGTH_MAX } from '../core/limits.ts';
import type { IoLimits, MachineDescription, MachineDisk } from '../core/machine.ts';

const VCPUS_MAX = 255;
const MEMORY_BYTES_MIN = 16 * MIB;
const MEMORY_BYTES_MAX = 4096 * GIB;
/**
 * QEMU's pc has a bus of 32 slots. What the machine starts with takes the lower half, in order; attached disks have the upper
 * half, by number, so that a disk is found where it was when the machine is resumed.
 */
const DISKS_MAX = 8;
export const SLOT_FIRST = 0x10;
export const SLOT_LAST = 0x1e;
const USER_DATA_BYTES_MAX = 256 * KIB;
/** The kernel's IFNAMSIZ, less its end. */
const INTERFACE_LENGTH_MAX = 15;
/** The kernel's COMMAND_LINE_SIZE on x86. */
const KERNEL_COMMAND_LINE_BYTES_MAX = 2047;
const UUID = /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

function refuse(name: string, what: string): never {
  throw new GridError('bad-request', `machine ${JSON.stringify(name)}: ${what}`);
}

/** Each is a device in a PCI slot of its own. */
export const SEGMENTS_MAX = 4;

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
  const [first, attached] = [disks.filter((disk) => disk.slot === undefined), disks.filter(isAttached)];
  if (first.length > DISKS_MAX)
    refuse(name, `${first.length} disks are more than the ${DISKS_MAX} it has room for`);
  if (new Set(attached.map((disk) => disk.slot)).size < attached.length)
    refuse(name, 'two disks in one slot');
  if (disks.length === 0 && boot === undefined)
    refuse(name, 'it has neither a disk nor a kernel to boot from');
  const files = [...disks.map((disk) => disk.path), boot?.kernel, boot?.initrd];
  for (const file of files) {
    if (file !== undefined && (!path.isAbsolute(file) || file.includes('\0'))) {
      refuse(name, `${JSON.stringify(file)} must be an absolute path`);
    }
  }
  for (const disk of disks) {
    const { slot, id } = disk;
    if (slot !== undefined && !(Number.isInteger(slot) && slot >= SLOT_FIRST && slot <= SLOT_LAST))
      refuse(name, `disk ${disk.path} is in slot ${slot}`);
    if (slot !== undefined && (id === undefined || !/^[a-z0-9][a-z0-9._-]*$/.test(id)))
      refuse(name, `an attached disk must have a name of lower-case letters, digits, '.', '-' and '_'`);
    if (disk.format !== 'raw' && disk.format !== 'qcow2') {
      refuse(name, `disk ${disk.path} has format ${String(disk.format)}, not raw or qcow2`);
    }
  }
  if (boot !== undefined && /[\0\n]/.test(boot.commandLine))
    refuse(name, 'the kernel command line has a line end');
  if (boot !== undefined && Buffer.byteLength(boot.commandLine) > KERNEL_COMMAND_LINE_BYTES_MAX) {
    refuse(name, `the kernel command line is longer than ${KERNEL_COMMAND_LINE_BYTES_MAX} bytes`);
  }
  if (typeof network === 'object') {
    const { bridge } = network;
    if (typeof bridge !== 'string' || !/^[^\s/,]+$/.test(bridge) || bridge.length > INTERFACE_LENGTH_MAX)
      refuse(name, `${JSON.stringify(bridge)} is no name of a bridge`);
  } else if (network !== 'user' && network !== 'none') {
    refuse(name, `unknown network ${JSON.stringify(network)}`);
  }
  if (description.isolated && typeof network === 'object')
    refuse(name, `it cannot be isolated: it is on the bridge ${network.bridge}`);
  const { segments = [] } = description;
  if (segments.length > SEGMENTS_MAX)
    refuse(name, `${segments.length} virtual networks are more than the ${SEGMENTS_MAX} it has room for`);
  for (const mac of [macAddress, ...segments.map((one) => one.macAddress)]) {
    // The lowest bit of the first byte would make it a multicast address.
    if (!/^[0-9a-f][02468ace](?::[0-9a-f]{2}){5}$/i.test(mac)) {
      refuse(name, `${JSON.stringify(mac)} is no MAC address of one device, like 52:54:00:12:34:56`);
    }
  }
  if (readyText !== undefined && (readyText === '' || /[\r\n]/.test(readyText))) {
    refuse(name, 'readyText must be part of one line, and not empty');
  }
  if (generationId !== undefined && !UUID.test(generationId)) refuse(name, 'generationId must be a UUID');
  checkLimits(name, description.limits ?? {});
  const { seed, firmware = 'bios' } = description;
  if (Buffer.byteLength(seed?.userData ?? '') > USER_DATA_BYTES_MAX)
    refuse(name, `the seed's user data is longer than ${USER_DATA_BYTES_MAX} bytes`);
  if (firmware !== 'bios' && firmware !== 'uefi')
    refuse(name, `unknown firmware ${JSON.stringify(firmware)}`);
}

export function checkLimits(name: string, limits: IoLimits): void {
  for (const [key, value] of Object.entries(limits)) {
    if (!Number.isSafeInteger(value) || value < 1) refuse(name, `${key} must be a whole number from 1`);
  }
}

export function isAttached(disk: MachineDisk): disk is MachineDisk & { id: string; slot: number } {
  return disk.slot !== undefined;
}
