/** What a link is in fact, seen by a TCP client of ours on the first host with a server of ours at the origin. */
import { readFileSync } from 'node:fs';
import { once } from 'node:events';
import net from 'node:net';
import type { AddressInfo } from 'node:net';
import { median } from '../lib/facts.ts';
import type { Network } from './network.ts';

export interface LinkMeasured {
  /** Median of an echo's time on an open connection. */
  readonly rttMs: number;
  /** Of one connection's bytes, after slow start, without the headers of TCP and IP (3 % of full packets). */
  readonly bitsPerSecond: number;
}

const ECHOES = 7;
const WARM_UP_MS = 700;
const MEASURED_MS = 800;
const PIECE = Buffer.alloc(64 * 1024, 7);

/** Echoes bytes until it gets an `s`, then sends until the client has had enough. */
function serve(socket: net.Socket): void {
  socket.on('error', () => undefined);
  socket.setNoDelay(true);
  socket.on('data', (part: Buffer) => {
    if (part[0] !== 's'.charCodeAt(0)) {
      socket.write(part);
      return;
    }
    const send = () => {
      while (!socket.destroyed && socket.write(PIECE));
    };
    socket.on('drain', send);
    send();
  });
}

export async function measureLink(network: Network, link: string): Promise<LinkMeasured> {
  // Ended by hand: the client's last packet may be on a link that is being taken away.
  const served: net.Socket[] = [];
  const server = net.createServer((socket) => {
    served.push(socket);
    serve(socket);
  });
  await network.atOrigin(async () => {
    server.listen(0, network.listen);
    await once(server, 'listening');
  });
  try {
    const address = await network.reach(link, (server.address() as AddressInfo).port);
    const socket = net.connect({ ...address, noDelay: true });
    try {
      await once(socket, 'connect');
      const trips: number[] = [];
      for (let echo = 0; echo < ECHOES; echo++) {
        const sentMs = performance.now();
        socket.write('e');
        await once(socket, 'data');
        trips.push(performance.now() - sentMs);
      }
      socket.write('s');
      let bytes = 0;
      let startMs = 0;
      const beginMs = performance.now() + WARM_UP_MS;
      for (;;) {
        const [part] = (await once(socket, 'data')) as [Buffer];
        const now = performance.now();
        if (startMs !== 0) bytes += part.length;
        else if (now >= beginMs) startMs = now;
        if (startMs !== 0 && now - startMs >= MEASURED_MS)
          return { rttMs: median(trips), bitsPerSecond: (bytes * 8000) / (now - startMs) };
      }
    } finally {
      socket.destroy();
    }
  } finally {
    server.close();
    for (const socket of served) socket.destroy();
  }
}

/** Counters of a device of the calling thread's namespace (proc_pid_net(5), dev: 8 columns each way). */
export function deviceBytes(device: string): { received: number; transmitted: number } {
  const line = readFileSync('/proc/thread-self/net/dev', 'utf8')
    .split('\n')
    .find((each) => each.trim().startsWith(`${device}:`));
  const columns = line?.split(':')[1]?.trim().split(/\s+/).map(Number) ?? [];
  return { received: columns[0] ?? 0, transmitted: columns[8] ?? 0 };
}
