/** Streams to a TCP port or the console of a guest, for a user who comes by way of the broker. */
import { once } from 'node:events';
import { open } from 'node:fs/promises';
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { GridError } from '../core/errors.ts';
import { KIB } from '../core/limits.ts';
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

/** What is shown of a console's past. */
const CONSOLE_PAST_BYTES = 8 * KIB;

/** The first serial console, and the end of what was said on it. One client at a time is served: others wait. */
export async function openConsole(
  machine: Machine,
): Promise<{ readonly stream: Duplex; readonly past: Buffer }> {
  try {
    const log = await open(machine.consoleLog, 'r');
    try {
      const { size } = await log.stat();
      const past = Buffer.alloc(Math.min(size, CONSOLE_PAST_BYTES));
      const { bytesRead } = await log.read(past, 0, past.length, size - past.length);
      const stream = net.connect(machine.consoleSocket);
      await once(stream, 'connect');
      return { stream, past: past.subarray(0, bytesRead) };
    } finally {
      await log.close();
    }
  } catch (cause) {
    throw new GridError('vm-failed', `the console of ${machine.description.name} does not answer`, { cause });
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
