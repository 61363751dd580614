/** A TCP port of a guest on QEMU's own network, reached by a port of the host's loopback for as long as it is wanted. */
import { GridError } from '../../core/errors.ts';
import type { MachineForward } from '../../core/machine.ts';
import { freePort } from '../../core/ports.ts';
import type { QmpClient } from './qmp.ts';

/** A port that was free a moment ago may be somebody else's when QEMU asks for it. */
const ATTEMPTS_MAX = 5;

/** Throws vm-failed with QEMU's words. */
export async function forwardPort(
  qmp: Pick<QmpClient, 'execute'>,
  guestPort: number,
): Promise<MachineForward> {
  const say = (line: string) => qmp.execute('human-monitor-command', { 'command-line': line });
  let answer: unknown;
  for (let attempt = 0; attempt < ATTEMPTS_MAX; attempt++) {
    const port = await freePort();
    answer = await say(`hostfwd_add net0 tcp:127.0.0.1:${port}-:${guestPort}`);
    if (answer === '') {
      return { port, close: async () => void (await say(`hostfwd_remove net0 tcp:127.0.0.1:${port}`)) };
    }
  }
  throw new GridError(
    'vm-failed',
    `port ${guestPort} of the guest cannot be reached: ${String(answer).trim()}`,
  );
}
