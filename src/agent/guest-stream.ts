/** A stream to a TCP port of a guest, for a user who comes by way of the broker. */
import { once } from 'node:events';
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { GridError } from '../core/errors.ts';
import type { Machine } from '../core/machine.ts';

/** Throws unsupported, vm-failed. What the guest does not listen at closes at once. */
export async function openGuestStream(machine: Machine, port: number): Promise<Duplex> {
  const { network, name } = machine.description;
  if (network !== 'user' || machine.forward === undefined)
    throw new GridError('unsupported', `${name} has no network by which this host reaches it`);
  const forward = await machine.forward(port);
  try {
    const socket = net.connect(forward.port, '127.0.0.1');
    await once(socket, 'connect');
    return socket;
  } catch (cause) {
    throw new GridError('vm-failed', `port ${port} of ${name} does not answer`, { cause });
  } finally {
    // It is this stream's alone: nobody else on the host gets by it to the guest afterwards.
    await forward.close().catch(() => undefined);
  }
}

/** What comes from one goes to the other, until one of them ends. */
export function joinStreams(one: Duplex, other: Duplex): void {
  for (const [from, to] of [
    [one, other],
    [other, one],
  ] as const) {
    from.pipe(to);
    from.on('error', () => to.destroy());
    from.once('close', () => to.destroy());
  }
}
