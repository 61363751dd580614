/**
 * Disks that come and go while a machine runs. A disk is plugged into a free slot of the pc's bus; to unplug it the guest
 * is asked (ACPI), lets go of it in its own time, and QEMU says DEVICE_DELETED. A guest that is still booting misses
 * the question, so it is asked again.
 */
import { GridError } from '../../core/errors.ts';
import type { IoLimits, MachineDescription, MachineDisk } from '../../core/machine.ts';
import { isAttached, SLOT_FIRST, SLOT_LAST } from '../description.ts';
import { attachedDisk, blockNode, diskDevices } from './command-line.ts';
import type { QmpClient } from './qmp.ts';

const ASK_AGAIN_MS = 2_000;
/** One bound for all disks together. */
const LIMITS_GROUP = 'machine';

/** Devices that QEMU said are gone, and who waits for that. */
export class Departures {
  readonly #waiting = new Map<string, () => void>();

  gone(device: string): void {
    this.#waiting.get(device)?.();
  }

  /** Asks by `ask`, again and again, until the device is gone; false when it is not within `timeoutMs`. */
  async until(device: string, ask: () => Promise<boolean>, timeoutMs: number): Promise<boolean> {
    const { promise, resolve } = Promise.withResolvers<boolean>();
    this.#waiting.set(device, () => resolve(true));
    const askOnce = () => void ask().then((there) => there || resolve(true));
    const again = setInterval(askOnce, ASK_AGAIN_MS);
    const late = setTimeout(() => resolve(false), timeoutMs);
    askOnce();
    try {
      return await promise;
    } finally {
      clearInterval(again);
      clearTimeout(late);
      this.#waiting.delete(device);
    }
  }
}

/** Plugs it in; resolves with the machine as it is then. */
export async function attachDisk(
  qmp: QmpClient,
  description: MachineDescription,
  disk: MachineDisk & { readonly id: string },
): Promise<MachineDescription> {
  const attached = description.disks.filter(isAttached);
  if (attached.some(({ id }) => id === disk.id))
    throw new GridError('exists', `${description.name} has a disk '${disk.id}' already`);
  const taken = new Set(attached.map(({ slot }) => slot));
  let slot = SLOT_FIRST;
  while (taken.has(slot)) slot++;
  if (slot > SLOT_LAST)
    throw new GridError(
      'bad-request',
      `${description.name} has no room for another disk (${taken.size} attached)`,
    );
  const placed = { ...disk, slot };
  const { node, options } = attachedDisk(placed);
  await qmp.execute('blockdev-add', blockNode(disk, node));
  try {
    await qmp.execute('device_add', options);
    const next = { ...description, disks: [...description.disks, placed] };
    if (description.limits !== undefined) await limitDisks(qmp, next, description.limits);
    return next;
  } catch (error) {
    await qmp.execute('blockdev-del', { 'node-name': node }).catch(() => undefined);
    throw error;
  }
}

/** Unplugs it; resolves with the machine as it is then. */
export async function detachDisk(
  qmp: QmpClient,
  departures: Departures,
  description: MachineDescription,
  id: string,
  timeoutMs: number,
): Promise<MachineDescription> {
  const disk = description.disks.filter(isAttached).find((one) => one.id === id);
  if (disk === undefined)
    throw new GridError('not-found', `${description.name} has no attached disk '${id}'`);
  const { node, device } = attachedDisk(disk);
  // Asked twice, QEMU says that it is being unplugged; asked of one that is gone, that there is none.
  const ask = () =>
    qmp.execute('device_del', { id: device }).then(
      () => true,
      (error: unknown) => !/not found/.test(String(error)),
    );
  if (!(await departures.until(device, ask, timeoutMs))) {
    throw new GridError(
      'timeout',
      `the guest of ${description.name} did not let go of disk '${id}' within ${timeoutMs} ms; it stays attached`,
    );
  }
  await qmp.execute('blockdev-del', { 'node-name': node });
  return { ...description, disks: description.disks.filter((one) => one !== disk) };
}

/** Bounds what all disks of a machine together do a second. */
export async function limitDisks(
  qmp: QmpClient,
  description: MachineDescription,
  { bytesPerSecond = 0, operationsPerSecond = 0 }: IoLimits,
): Promise<void> {
  for (const id of diskDevices(description)) {
    await qmp.execute('block_set_io_throttle', {
      ...{
        id: `/machine/peripheral/${id}/virtio-backend`,
        bps: bytesPerSecond,
        bps_rd: 0,
        bps_wr: 0,
        iops: operationsPerSecond,
        iops_rd: 0,
        iops_wr: 0,
      },
      ...(bytesPerSecond + operationsPerSecond === 0 ? {} : { group: LIMITS_GROUP }),
    });
  }
}
