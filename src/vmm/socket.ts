/**
 * Unix sockets at paths of any length. The kernel's address holds 107 bytes; a longer path is reached through its
 * folder's descriptor under /proc/self/fd. QEMU itself makes its sockets by relative names in its own folder.
 */
import { closeSync, openSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';

/** sizeof(sun_path) less the final NUL. */
const ADDRESS_BYTES_MAX = 107;

/** Connects; resolves with the open socket, rejects with the system's error (ENOENT, ECONNREFUSED, …). */
export function connectSocket(socketPath: string): Promise<net.Socket> {
  const long = Buffer.byteLength(socketPath) > ADDRESS_BYTES_MAX;
  return new Promise((resolve, reject) => {
    const fd = long ? openSync(path.dirname(socketPath), 'r') : undefined;
    const socket = net.connect(
      fd === undefined ? socketPath : `/proc/self/fd/${fd}/${path.basename(socketPath)}`,
    );
    const settle = (done: () => void) => {
      socket.off('connect', connected);
      socket.off('error', failed);
      if (fd !== undefined) closeSync(fd);
      done();
    };
    const connected = () => settle(() => resolve(socket));
    const failed = (error: Error) => settle(() => reject(error));
    socket.once('connect', connected);
    socket.once('error', failed);
  });
}
