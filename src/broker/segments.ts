/**
 * Virtual networks as the broker has them: who owns a name, which addresses its machines have, and the trunks that join
 * the hosts which carry them. Hosts call the broker, so trunks form a star with it in the middle: each is a request of
 * the agent's that is upgraded to a stream of frames (src/network/trunk.ts), under the agent's token.
 *
 *   GET /v1/agent/trunks/<network>?host=…    Connection: Upgrade, Upgrade: gridvfs-trunk
 *
 * A host gets a trunk of a network only while it has, or is about to have, one of its machines.
 */
import { createHash } from 'node:crypto';
import type http from 'node:http';
import type { Duplex } from 'node:stream';
import { asGridError, GridError } from '../core/errors.ts';
import type { MachineSegment } from '../core/machine.ts';
import type { Access, Principal } from './access.ts';
import type { Database, Queries } from './database.ts';
import { isStreamRequest } from './streams.ts';

/** Each network is a /24 of 10.64.0.0/10; the first address is its DHCP server's. */
const NETWORKS_MAX = 64 * 256;
const FIRST_MACHINE = 2;
const LAST_MACHINE = 254;

/** What joins streams of frames; `Networks` of src/network is one. */
export interface Relay {
  join(network: string, stream: Duplex): Promise<string>;
}

/** A machine's MAC address on virtual networks: its own, and the same wherever it runs. */
const macOf = (vm: string) =>
  `52:${createHash('sha256')
    .update(vm)
    .digest('hex')
    .slice(0, 10)
    .replaceAll(/(..)(?=.)/g, '$1:')}`;

/** Puts VMs on the network, which is made for its first user. Throws denied (another's), no-space. */
export async function joinSegment(
  tx: Queries,
  principal: Principal,
  network: string,
  vms: readonly { readonly id: string; readonly name: string }[],
): Promise<void> {
  const [known] = await tx.all<{ owner: string; subnet: number }>(
    'SELECT owner, subnet FROM segments WHERE name = ?',
    network,
  );
  if (known && known.owner !== principal.user) {
    throw new GridError('denied', `network '${network}' belongs to another user; choose another name`);
  }
  let subnet = known?.subnet;
  if (subnet === undefined) {
    const [last] = await tx.all<{ subnet: number | null }>('SELECT max(subnet) AS subnet FROM segments');
    subnet = (last?.subnet ?? -1) + 1;
    if (subnet >= NETWORKS_MAX) throw new GridError('no-space', `there are ${NETWORKS_MAX} networks already`);
    await tx.run(
      'INSERT INTO segments (name, owner, subnet, created_ms) VALUES (?, ?, ?, ?)',
      ...[network, principal.user, subnet, Date.now()],
    );
  }
  const taken = new Set(
    (
      await tx.all<{ address: number }>(
        `SELECT s.address FROM vm_segments s JOIN vms v ON v.id = s.vm
         WHERE s.network = ? AND v.ended_ms IS NULL`,
        network,
      )
    ).map(({ address }) => address),
  );
  let address = FIRST_MACHINE;
  for (const vm of vms) {
    while (taken.has(address)) address++;
    if (address > LAST_MACHINE) {
      throw new GridError('no-space', `network '${network}' has room for ${LAST_MACHINE - 1} machines`);
    }
    taken.add(address);
    await tx.run('INSERT INTO vm_segments (vm, network, address) VALUES (?, ?, ?)', vm.id, network, address);
  }
}

const subnetText = (subnet: number) => `10.${64 + (subnet >> 8)}.${subnet & 255}`;

/** The virtual networks of a VM, as its host is told. */
export async function segmentsOf(
  tx: Queries,
  vm: { readonly id: string; readonly name: string },
): Promise<MachineSegment[]> {
  const rows = await tx.all<{ network: string; address: number; subnet: number }>(
    `SELECT v.network, v.address, s.subnet FROM vm_segments v JOIN segments s ON s.name = v.network
     WHERE v.vm = ? ORDER BY v.network`,
    vm.id,
  );
  return rows.map(({ network, address, subnet }) => ({
    network,
    macAddress: macOf(vm.id),
    address: `${subnetText(subnet)}.${address}`,
    server: `${subnetText(subnet)}.1/24`,
    hostName: vm.name,
  }));
}

/** Addresses of the VMs of a request, by VM. */
export async function addressesOf(db: Queries, job: string): Promise<Map<string, string>> {
  const rows = await db.all<{ vm: string; address: number; subnet: number }>(
    `SELECT v.vm, v.address, s.subnet FROM vm_segments v JOIN segments s ON s.name = v.network
     JOIN vms m ON m.id = v.vm WHERE m.job = ?`,
    job,
  );
  return new Map(rows.map(({ vm, address, subnet }) => [vm, `${subnetText(subnet)}.${address}`]));
}

interface TrunkParts {
  readonly access: Access;
  readonly db: Database;
  /** No trunks without it. */
  readonly relay: Relay | undefined;
  readonly log: (line: string) => void;
}

/** Takes requests for trunks; `log` hears of those that failed. */
export function serveTrunks(server: http.Server, parts: TrunkParts): { close(): void } {
  const sockets = new Set<Duplex>();
  server.on('upgrade', (request: http.IncomingMessage, socket: Duplex, head: Buffer) => {
    if (isStreamRequest(request)) return; // streams.ts
    socket.on('error', () => {});
    sockets.add(socket);
    socket.once('close', () => sockets.delete(socket));
    const { relay } = parts;
    admit(parts, request)
      .then(async (network) => {
        if (relay === undefined) throw new GridError('unsupported', 'this broker joins no networks');
        socket.write(
          'HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: gridvfs-trunk\r\n\r\n',
        );
        if (head.length > 0) socket.unshift(head);
        await relay.join(network, socket);
      })
      .catch((error: unknown) => {
        const { code, message } = asGridError(error, 'the trunk failed', 'bug');
        parts.log(`trunk: ${message} [${code}]`);
        if (socket.writable) {
          socket.end('HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n');
        }
      });
  });
  return {
    close() {
      for (const socket of sockets) socket.destroy();
    },
  };
}

/** The network that a request may have a trunk of. Throws denied, bad-request. */
async function admit({ access, db }: TrunkParts, request: http.IncomingMessage): Promise<string> {
  const url = new URL(request.url ?? '/', 'http://broker');
  const network = /^\/v1\/agent\/trunks\/([a-z0-9][a-z0-9._-]{0,127})$/.exec(url.pathname)?.[1];
  if (network === undefined || request.headers.upgrade !== 'gridvfs-trunk') {
    throw new GridError('bad-request', 'nothing but trunks is upgraded here');
  }
  const token = /^Bearer (\S{1,200})$/.exec(request.headers.authorization ?? '')?.[1];
  if (token === undefined) throw new GridError('denied', 'a trunk without a token');
  const principal = await access.authenticate(token);
  const host = url.searchParams.get('host') ?? '';
  const [carried] = await db.all(
    `SELECT 1 AS one FROM vm_segments s JOIN vms v ON v.id = s.vm JOIN hosts h ON h.id = v.host
     WHERE s.network = ? AND h.id = ? AND h.owner = ? AND v.ended_ms IS NULL LIMIT 1`,
    ...[network, host, principal.user],
  );
  if (principal.role !== 'agent' || !carried) {
    throw new GridError('denied', `host '${host.slice(0, 128)}' has no machine on network '${network}'`);
  }
  return network;
}
