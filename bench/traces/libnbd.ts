/**
 * libnbd's client from Node, as much of it as a replay needs: reads under way at once over one connection, by its
 * asynchronous calls and its own poll loop. The library is the one that nbdcopy and nbdfuse use.
 */
import koffi from 'koffi';
import { GridError } from '../../src/core/errors.ts';

export interface NbdClient {
  /** Starts one read; the buffer must stay until it is done. */
  begin(target: Buffer, offsetBytes: number): void;
  /** Blocks until at least one read is done. */
  wait(): void;
  readonly underWay: number;
  close(): void;
}

/** Connects to nbdkit's (or any NBD server's) unix socket. Throws unsupported without the library, tunnel-lost. */
export function connectNbd(socketPath: string): NbdClient {
  let library;
  try {
    library = koffi.load('libnbd.so.0');
  } catch (cause) {
    throw new GridError('unsupported', 'libnbd.so.0 is not installed; Debian: libnbd0', { cause });
  }
  const completion = koffi.struct({ callback: 'void *', user_data: 'void *', free: 'void *' });
  const create = library.func('nbd_create', 'void *', []);
  const close = library.func('nbd_close', 'void', ['void *']);
  const connect = library.func('nbd_connect_unix', 'int', ['void *', 'str']);
  const pread = library.func('nbd_aio_pread', 'int64_t', [
    'void *',
    'void *',
    'size_t',
    'uint64_t',
    completion,
    'uint32_t',
  ]);
  const poll = library.func('nbd_poll', 'int', ['void *', 'int']);
  const peek = library.func('nbd_aio_peek_command_completed', 'int64_t', ['void *']);
  const completed = library.func('nbd_aio_command_completed', 'int', ['void *', 'int64_t']);
  const lastError = library.func('nbd_get_error', 'str', []);
  const fail = (what: string) => new GridError('tunnel-lost', `libnbd: ${what}: ${String(lastError())}`);

  const handle = create() as unknown;
  if (connect(handle, socketPath) === -1) {
    const error = fail(`cannot connect to ${socketPath}`);
    close(handle);
    throw error;
  }
  const buffers = new Map<number, Buffer>();
  /** Takes back what is done; the number of them. */
  const reap = (): number => {
    let count = 0;
    for (;;) {
      const cookie = Number(peek(handle));
      if (cookie < 1) return count;
      if (completed(handle, cookie) !== 1) throw fail('a read failed');
      buffers.delete(cookie);
      count++;
    }
  };
  const none = { callback: null, user_data: null, free: null };
  return {
    begin(target, offsetBytes) {
      const cookie = Number(pread(handle, target, target.length, offsetBytes, none, 0));
      if (cookie === -1) throw fail('cannot begin a read');
      buffers.set(cookie, target);
    },
    wait() {
      while (reap() === 0) if (poll(handle, -1) === -1) throw fail('the connection broke');
    },
    get underWay() {
      return buffers.size;
    },
    close() {
      close(handle);
    },
  };
}
