/**
 * Words with a guest over its second serial port (ttyS1), lines of JSON, for guests that have a program there (label
 * `boot.answers` = `ttyS1`; bench/guest has one in a few lines of shell). It answers every line that has an event:
 *
 *   { "event": "suspend", "id", "nonce" }                      it keeps the nonce, in memory alone
 *   { "event": "resume", "id" }                                it goes on where it was
 *   { "event": "fork", "id", "name", "instanceId", "macAddress" }   and is another machine from now on
 *   { "event": "here", "id", "nonce" }                         its answer: the question's id, the nonce that it has
 *
 * A guest that has booted instead of going on does not know the nonce. Guests without such a program hear nothing: of
 * forks the line stays in the port's buffer, where whoever wants to know who he is may read it.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, openSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { GridError } from '../core/errors.ts';
import type { Machine, MachineDescription } from '../core/machine.ts';
import { instanceIdOf } from './machine-description.ts';

/** A guest whose pages come over a long link may have missed half a line. */
const AGAIN_MS = 5_000;
const ANSWER_LENGTH_MAX = 64 * 1024;
const NONCE_BYTES = 16;

export type Question =
  | { readonly event: 'suspend'; readonly nonce: string }
  | { readonly event: 'resume' }
  | {
      readonly event: 'fork';
      readonly name: string;
      readonly instanceId: string;
      readonly macAddress: string;
    };

export const newNonce = () => randomBytes(NONCE_BYTES).toString('hex');

export function forkQuestion({ name, macAddress, generationId }: MachineDescription): Question {
  return { event: 'fork', name, instanceId: instanceIdOf(name, generationId), macAddress };
}

/** Connects to a machine's socket by its file. */
export function connectTo(socketFile: string): net.Socket {
  const folder = openSync(path.dirname(socketFile), 'r');
  // A socket's path may be longer than an address holds: see its folder's descriptor.
  const socket = net.connect(`/proc/self/fd/${folder}/${path.basename(socketFile)}`);
  socket.once('close', () => closeSync(folder));
  return socket;
}

/** Says it to whoever may read it. */
export function tellGuest(machine: Machine, question: Question): void {
  const socket = connectTo(machine.identitySocket);
  socket.unref();
  socket.once('connect', () => socket.end(`${JSON.stringify(question)}\n`));
  // The machine may be gone again, and has nothing to be told then.
  socket.on('error', () => socket.destroy());
}

/** Resolves with the nonce that the guest has. Throws timeout, vm-failed (the machine is gone). */
export async function askGuest(machine: Machine, question: Question, timeoutMs: number): Promise<string> {
  const { name } = machine.description;
  const id = randomBytes(6).toString('hex');
  const socket = connectTo(machine.identitySocket);
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const say = () => socket.write(`${JSON.stringify({ ...question, id })}\n`);
  const again = setInterval(say, AGAIN_MS);
  const late = setTimeout(
    () => reject(new GridError('timeout', `the guest of ${name} did not answer within ${timeoutMs} ms`)),
    timeoutMs,
  );
  let heard = '';
  socket.once('connect', say);
  socket.on('data', (bytes: Buffer) => {
    heard = (heard + bytes.toString('latin1')).slice(-ANSWER_LENGTH_MAX);
    for (const line of heard.split('\n')) {
      const answer = line.includes(id) && line.includes('"here"') ? /"nonce":"([0-9a-f]*)"/.exec(line) : null;
      if (answer) resolve(answer[1]!);
    }
  });
  socket.on('error', () => undefined);
  socket.on('close', () => reject(new GridError('vm-failed', `the guest of ${name} is gone`)));
  try {
    return await promise;
  } finally {
    clearInterval(again);
    clearTimeout(late);
    socket.destroy();
  }
}
