/** A proxy's side of its holder (holder.ts): the descriptors that it got, and the messages between the two. */
import { GridError } from '../core/errors.ts';
import { closeOnExec } from '../core/linux.ts';
import type { HeldDevices } from '../frontend/fuse/index.ts';
import { FIRST_DEVICE_FD, LEDGER_FD } from './holder.ts';
import type { FromHolder, ToHolder } from './holder.ts';

/** The descriptors from the holder. QEMU and ssh must never inherit one: they would keep the mount alive. */
export function heldDevices(count: number): HeldDevices {
  const devices = Array.from({ length: count }, (_, index) => FIRST_DEVICE_FD + index);
  for (const fd of [LEDGER_FD, ...devices]) closeOnExec(fd);
  return { devices, ledger: LEDGER_FD };
}

/** A proxy goes on when its holder is gone, so nobody may be there to hear. Resolves when it is sent. */
export function tellHolder(message: ToHolder): Promise<void> {
  return new Promise((resolve) => {
    if (!process.connected) resolve();
    else process.send!(message, undefined, {}, () => resolve());
  });
}

export function onHolderGone(action: () => void): void {
  process.once('disconnect', action);
}

function nextMessage(): Promise<FromHolder> {
  return new Promise((resolve, reject) => {
    process.once('message', (message: FromHolder) => resolve(message));
    process.once('disconnect', () => reject(new GridError('closed', 'the holder of this mount is gone')));
  });
}

/** For a successor in an upgrade: says that it is ready to serve, and resolves when the old proxy is dead. */
export async function standBy(): Promise<void> {
  const go = nextMessage();
  await tellHolder({ kind: 'standby' });
  await go;
}

/** Asks for a successor. Resolves when it stands by; `handOver` then ends this process. Throws unsupported, in-use,
 * and what kept the successor from starting. */
export async function prepareSuccessor(): Promise<{ pid: number; handOver(): void }> {
  if (!process.connected) {
    throw new GridError('unsupported', 'the holder of this mount is gone: unmount it and mount it again');
  }
  const answer = nextMessage();
  await tellHolder({ kind: 'upgrade' });
  const message = await answer;
  if (message.kind === 'refused') throw new GridError(message.code, message.message);
  if (message.kind !== 'successor') throw new GridError('bug', `the holder answered '${message.kind}'`);
  return { pid: message.pid, handOver: () => void tellHolder({ kind: 'handover' }) };
}
