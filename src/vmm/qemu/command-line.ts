/**
 * A MachineDescription as QEMU's arguments. Nothing is left to defaults that differ between hosts (-nodefaults,
 * formats and cache modes explicit). Disks and devices are given as JSON, so no path can be taken for an option;
 * what has no JSON form escapes its commas. Sockets and logs are relative names: QEMU runs in the machine's folder.
 */
import { MIB } from '../../core/limits.ts';
import { segmentSocket } from '../../core/machine.ts';
import type { MachineDescription, MachineDisk } from '../../core/machine.ts';
import { checkDescription, isAttached } from '../description.ts';
import type { Accelerator } from './accelerator.ts';

/** Names in the machine's folder. */
export const QMP_SOCKET = 'qmp.sock';
export const CONSOLE_SOCKET = 'console.sock';
export const IDENTITY_SOCKET = 'identity.sock';
export const INCOMING_SOCKET = 'incoming.sock';
export const AGENT_SOCKET = 'agent.sock';
export const SEED_FILE = 'seed.iso';
export const CONSOLE_LOG = 'console.log';
export const QEMU_LOG = 'qemu.log';
export const PID_FILE = 'qemu.pid';

/** What virtio has room for. */
const SERIAL_LENGTH = 20;
/** EDK II for a virtual machine; Debian's package ovmf. Its variables are in the guest's memory, as with any -bios. */
export const UEFI_FILE = '/usr/share/ovmf/OVMF.fd';

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

/** What is not in the description. */
export interface QemuChoices {
  readonly accelerator: Accelerator;
  /** Versioned, for a machine that is resumed; QEMU's newest otherwise. */
  readonly machine?: string;
  /** A memory image to map privately; the machine then waits for its device state. */
  readonly memoryImage?: string;
  /** The interface of the host that is the other end of its network device. */
  readonly tap?: string;
}

export const processorOf = (accelerator: Accelerator): string => PROCESSORS[accelerator];

const escaped = (text: string) => text.replaceAll(',', ',,');

/** A disk's nodes, as -blockdev and blockdev-add have them. */
export function blockNode(disk: MachineDisk, name: string): Record<string, unknown> {
  const file = { driver: 'file', filename: disk.path, discard: 'unmap', cache: DISK_CACHE };
  return {
    driver: disk.format,
    'node-name': name,
    'read-only': disk.readOnly,
    ...DISK_OPTIONS,
    file: { ...file, 'read-only': disk.readOnly },
  };
}

/** What an attached disk's node and device are called, and the device as -device and device_add have it. */
export function attachedDisk({ id, slot }: { id: string; slot: number }) {
  const [node, device] = [`attached${slot}`, `virtio-attached${slot}`];
  const options = { driver: 'virtio-blk-pci', id: device, drive: node, serial: id.slice(0, SERIAL_LENGTH) };
  return { node, device, options: { ...options, addr: slot.toString(16) } };
}

/** Ids of the devices of all disks. */
export function diskDevices({ disks, seed }: MachineDescription): string[] {
  const first = disks.filter((disk) => !isAttached(disk)).map((_, index) => `virtio-disk${index}`);
  const attached = disks.filter(isAttached).map((disk) => attachedDisk(disk).device);
  return [...first, ...(seed === undefined ? [] : ['virtio-seed']), ...attached];
}

/** QEMU's arguments for a checked description. Throws bad-request. */
export function qemuArguments(description: MachineDescription, choices: QemuChoices): string[] {
  checkDescription(description);
  const { name, vcpus, memoryBytes, disks, boot, macAddress, network, generationId = 'auto' } = description;
  const { accelerator, machine = 'pc', memoryImage, tap } = choices;
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
  disks
    .filter((disk) => !isAttached(disk))
    .forEach((disk, index) => {
      add('-blockdev', JSON.stringify(blockNode(disk, `disk${index}`)));
      addDevice({ driver: 'virtio-blk-pci', id: `virtio-disk${index}`, drive: `disk${index}` });
    });
  if (network !== 'none') {
    if (network === 'user') add('-netdev', `user,id=net0${description.isolated ? ',restrict=on' : ''}`);
    else
      add(
        '-netdev',
        JSON.stringify({ type: 'tap', id: 'net0', ifname: tap, script: 'no', downscript: 'no' }),
      );
    addDevice({ driver: 'virtio-net-pci', netdev: 'net0', mac: macAddress });
  }
  // Connected from outside, so that who connects can come again; see src/network.
  (description.segments ?? []).forEach(({ macAddress: mac }, index) => {
    const id = `segment${index}`;
    add('-netdev', `stream,id=${id},server=on,addr.type=unix,addr.path=${segmentSocket(index)}`);
    addDevice({ driver: 'virtio-net-pci', id: `${id}-device`, netdev: id, mac });
  });
  if (description.seed !== undefined) {
    const disk = { path: SEED_FILE, format: 'raw' as const, readOnly: true };
    add('-blockdev', JSON.stringify(blockNode(disk, 'seed')));
    addDevice({ driver: 'virtio-blk-pci', id: 'virtio-seed', drive: 'seed', serial: 'seed' });
  }
  if (description.guestAgent === true) {
    addDevice({ driver: 'virtio-serial-pci', id: 'serial' });
    add('-chardev', `socket,id=agent,path=${AGENT_SOCKET},server=on,wait=off`);
    addDevice({ driver: 'virtserialport', chardev: 'agent', name: 'org.qemu.guest_agent.0' });
  }
  for (const disk of disks.filter(isAttached)) {
    const { node, options } = attachedDisk(disk);
    add('-blockdev', JSON.stringify(blockNode(disk, node)));
    addDevice(options);
  }
  if (description.firmware === 'uefi') add('-bios', UEFI_FILE);
  // A guest that goes on has its kernel in its memory. QEMU would read the file (megabytes, perhaps through a slow
  // link) before it did anything else, only for the guest's next boot: that one has a QEMU of its own.
  if (boot !== undefined && memoryImage !== undefined) add('-action', 'reboot=shutdown');
  else if (boot !== undefined) {
    add('-kernel', boot.kernel, '-append', boot.commandLine);
    if (boot.initrd !== undefined) add('-initrd', boot.initrd);
  }
  return args;
}
