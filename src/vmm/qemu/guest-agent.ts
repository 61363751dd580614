/**
 * A few words with the QEMU guest agent of a machine that has one (qemu-ga, over its virtio port): JSON lines, like QMP's.
 * The port keeps what an earlier asker left in it, so every conversation begins with guest-sync-delimited, whose
 * answer comes after a byte 0xff.
 */
import { randomInt } from 'node:crypto';
import path from 'node:path';
import { GridError } from '../../core/errors.ts';
import { AGENT_SOCKET } from './command-line.ts';
import { connectSocket } from '../socket.ts';

const ANSWER_BYTES_MAX = 64 * 1024;

/** Resolves with what the command returns. Throws timeout when nobody answers, vm-failed with the agent's words. */
export async function askGuestAgent(
  folder: string,
  command: string,
  timeoutMs: number,
  args?: object,
): Promise<unknown> {
  const socket = await connectSocket(path.join(folder, AGENT_SOCKET));
  const { promise, resolve, reject } = Promise.withResolvers<unknown>();
  const late = () =>
    reject(new GridError('timeout', `the guest agent did not answer ${command} within ${timeoutMs} ms`));
  const timer = setTimeout(late, timeoutMs);
  const id = randomInt(2 ** 31);
  let heard = '';
  let synced = false;
  socket.on('error', (error) => reject(error));
  socket.on('close', () => reject(new GridError('vm-failed', 'the guest agent’s port closed')));
  socket.on('data', (bytes: Buffer) => {
    heard += bytes.toString('latin1');
    if (heard.length > ANSWER_BYTES_MAX)
      return reject(new GridError('vm-failed', 'the guest agent says too much'));
    for (let end; (end = heard.indexOf('\n')) !== -1;) {
      const line = heard.slice(0, end);
      heard = heard.slice(end + 1);
      let answer: { return?: unknown; error?: { desc?: string } };
      try {
        answer = JSON.parse(line.replaceAll('\xff', '')) as typeof answer;
      } catch {
        continue; // the end of what somebody else asked
      }
      if (!synced) {
        if (answer.return !== id) continue;
        synced = true;
        socket.write(
          `${JSON.stringify({ execute: command, ...(args === undefined ? {} : { arguments: args }) })}\n`,
        );
      } else if (answer.error !== undefined) {
        reject(
          new GridError(
            'vm-failed',
            `the guest agent refused ${command}: ${answer.error.desc ?? 'no reason'}`,
          ),
        );
      } else {
        resolve(answer.return);
      }
    }
  });
  const sync = { execute: 'guest-sync-delimited', arguments: { id } };
  socket.write(Buffer.concat([Buffer.from([0xff]), Buffer.from(`${JSON.stringify(sync)}\n`)]));
  try {
    return await promise;
  } finally {
    clearTimeout(timer);
    socket.destroy();
  }
}
