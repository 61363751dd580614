/** A terminal on a VM's serial console. */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { asGridError, GridError } from '../core/errors.ts';

/** Ctrl-], as telnet has it. */
const ESCAPE = 0x1d;

/** Joins this process's terminal (or pipe) and the console at a socket until either ends, or Ctrl-]. Throws not-found. */
export async function attachConsole(socketPath: string): Promise<void> {
  const socket = net.connect(socketPath);
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  socket.on('error', (error) => reject(asGridError(error, `the console at ${socketPath} cannot be reached`)));
  socket.on('close', () => resolve());
  await Promise.race([
    new Promise<void>((connected) => socket.once('connect', () => connected())),
    promise.then(() => {
      throw new GridError('not-found', `the console at ${socketPath} is gone`);
    }),
  ]);
  await attachTo(socket, promise);
}

/** The same for a console that is reached already; `ended` settles when it is over. */
export async function attachTo(socket: Duplex, ended: Promise<void>): Promise<void> {
  const { stdin, stdout } = process;
  if (stdin.isTTY) {
    stdin.setRawMode(true);
    process.stderr.write('gridvfs: attached; Ctrl-] ends it\r\n');
  }
  const typed = (bytes: Buffer) => {
    const end = stdin.isTTY ? bytes.indexOf(ESCAPE) : -1;
    socket.write(end < 0 ? bytes : bytes.subarray(0, end));
    if (end >= 0) socket.end();
  };
  stdin.on('data', typed);
  // A pipe that has ended: what the guest still says to it is not cut off at once by our own end.
  stdin.once('end', () => socket.end());
  socket.pipe(stdout, { end: false });
  try {
    await ended;
  } finally {
    stdin.off('data', typed);
    if (stdin.isTTY) stdin.setRawMode(false);
    stdin.pause();
    socket.destroy();
  }
}
