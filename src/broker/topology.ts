/**
 * Networks that hosts say they are on, and the links between them that operators tell: what `scope` of a query goes by.
 * A link is of both directions, whichever end is named first.
 */
import { GridError } from '../core/errors.ts';
import type { Database } from './database.ts';

export interface LinkRequest {
  readonly a: string;
  readonly b: string;
  readonly roundTripMs?: number;
  readonly bitsPerSecond?: number;
}

export interface NetworkInfo {
  readonly id: string;
  /** Hosts on it that are up. */
  readonly hosts: number;
  readonly links: readonly {
    readonly to: string;
    readonly roundTripMs?: number;
    readonly bitsPerSecond?: number;
  }[];
}

export async function listNetworks(db: Database): Promise<NetworkInfo[]> {
  const networks = await db.all<{ id: string; hosts: number }>(
    `SELECT n.id, (SELECT count(*) FROM host_networks m JOIN hosts h ON h.id = m.host
       WHERE m.network = n.id AND h.state = 'up') AS hosts FROM networks n ORDER BY n.id`,
  );
  const links = await db.all<{
    a: string;
    b: string;
    round_trip_ms: number | null;
    bits_per_second: number | null;
  }>('SELECT a, b, round_trip_ms, bits_per_second FROM links ORDER BY a, b');
  return networks.map(({ id, hosts }) => ({
    id,
    hosts,
    links: links
      .filter(({ a, b }) => a === id || b === id)
      .map((one) => ({
        to: one.a === id ? one.b : one.a,
        ...(one.round_trip_ms === null ? {} : { roundTripMs: one.round_trip_ms }),
        ...(one.bits_per_second === null ? {} : { bitsPerSecond: one.bits_per_second }),
      })),
  }));
}

/** Makes a link, or changes what is known of it. Throws not-found for a network that no host is on, bad-request. */
export async function setLink(db: Database, link: LinkRequest): Promise<void> {
  const [a, b] = [link.a, link.b].toSorted() as [string, string];
  if (a === b) throw new GridError('bad-request', `'${a}' needs no link to itself`);
  await db.transaction(async (tx) => {
    for (const id of [a, b]) {
      const known = await tx.all('SELECT id FROM networks WHERE id = ?', id);
      if (known.length === 0) throw new GridError('not-found', `no host is on a network '${id}'`);
    }
    await tx.run(
      `INSERT INTO links (a, b, round_trip_ms, bits_per_second) VALUES (?, ?, ?, ?)
       ON CONFLICT (a, b) DO UPDATE SET round_trip_ms = excluded.round_trip_ms, bits_per_second = excluded.bits_per_second`,
      ...[a, b, link.roundTripMs ?? null, link.bitsPerSecond ?? null],
    );
  });
}

export async function removeLink(db: Database, one: string, other: string): Promise<void> {
  const [a, b] = [one, other].toSorted() as [string, string];
  const removed = await db.run('DELETE FROM links WHERE a = ? AND b = ?', a, b);
  if (removed === 0) throw new GridError('not-found', `there is no link between '${a}' and '${b}'`);
}
