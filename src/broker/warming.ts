/**
 * What operators have prepared before anybody asks for a machine: hosts that fetch an image ahead, now or whenever a
 * newer version of it comes, and sources whose tags are looked at on a schedule.
 *
 *   a schedule is due → a host of each source looks at its tags (order `refresh`) and reports them
 *   the newest version of its image is another than the one it warmed last → `warm` orders to as many hosts
 */
import { randomBytes } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import type { Principal } from './access.ts';
import type { Database, Queries } from './database.ts';
import type { Loads } from './loads.ts';
import type { Requests } from './requests.ts';
import { giveOrder } from './vm-table.ts';

export interface ScheduleRequest {
  readonly image: string;
  /** How often its source is asked for its tags. */
  readonly everyMs: number;
  /** Hosts that fetch each newest version ahead; none when left out. */
  readonly hosts?: number;
}

export interface ScheduleInfo extends Required<ScheduleRequest> {
  readonly id: string;
  readonly next: string;
  /** The version that was fetched ahead last. */
  readonly warmed?: string;
}

interface ScheduleRow {
  readonly id: string;
  readonly image: string;
  readonly every_ms: number;
  readonly hosts: number;
  readonly due_ms: number;
  readonly warmed: string | null;
  readonly warmed_manifest: string | null;
}

interface Version {
  readonly image: string;
  readonly version: string;
  readonly manifest: string;
}

export const SCHEDULE_EVERY_MS_MIN = 10_000;
export const WARM_HOSTS_MAX = 1000;
const SCHEDULES_MAX = 1000;

export class Warming {
  readonly #db: Database;
  readonly #loads: Loads;
  readonly #requests: Requests;
  readonly #wake: (jobs: Iterable<string>) => void;

  constructor(db: Database, loads: Loads, requests: Requests, wake: (jobs: Iterable<string>) => void) {
    this.#db = db;
    this.#loads = loads;
    this.#requests = requests;
    this.#wake = wake;
  }

  /** Has `hosts` hosts fetch a version ahead. The job is done when they all have. Throws not-found. */
  async warm(
    principal: Principal,
    image: string,
    version: string,
    hosts: number,
    key?: string,
  ): Promise<string> {
    const job = await this.#db.transaction((tx) =>
      this.#requests.once(tx, principal, key, { image, version, hosts }, 'warm', null, async (id) => {
        const [known] = await tx.all<Version>(
          'SELECT image, version, manifest FROM versions WHERE image = ? AND version = ?',
          ...[image, version],
        );
        if (!known) throw new GridError('not-found', `there is no image ${image}:${version}`);
        if ((await this.#orderWarm(tx, known, hosts, id)) === 0) {
          throw new GridError('not-found', `no host that is up offers ${image}:${version}`);
        }
      }),
    );
    this.#wake([job]);
    return job;
  }

  /** To those that have most of it, and then to those that promise most. How many. */
  async #orderWarm(tx: Queries, one: Version, count: number, job: string): Promise<number> {
    const hosts = await tx.all<{ id: string }>(
      `SELECT h.id FROM hosts h JOIN host_versions o ON o.host = h.id AND o.image = ? AND o.version = ?
         JOIN futures f ON f.host = h.id
       WHERE h.state = 'up' AND h.unusable IS NULL AND h.is_virtual = 0 ORDER BY f.memory_bytes DESC, h.id`,
      ...[one.image, one.version],
    );
    const warm = (id: string) => this.#loads.of(id).warmBytes[one.manifest] ?? 0;
    const chosen = hosts.toSorted((a, b) => warm(b.id) - warm(a.id)).slice(0, count);
    for (const { id } of chosen) {
      const order = { id: `${job}.${id}`, kind: 'warm' as const, image: `${one.image}:${one.version}` };
      await giveOrder(tx, id, null, order, job);
    }
    return chosen.length;
  }

  async addSchedule(principal: Principal, request: ScheduleRequest): Promise<ScheduleInfo> {
    const id = `schedule-${randomBytes(4).toString('hex')}`;
    await this.#db.transaction(async (tx) => {
      const [held] = await tx.all<{ count: number }>('SELECT count(*) AS count FROM schedules');
      if (held!.count >= SCHEDULES_MAX) {
        throw new GridError('no-space', `there are ${SCHEDULES_MAX} schedules already; remove some`);
      }
      await tx.run(
        'INSERT INTO schedules (id, owner, image, every_ms, hosts, due_ms) VALUES (?, ?, ?, ?, ?, ?)',
        ...[id, principal.user, request.image, request.everyMs, request.hosts ?? 0, Date.now()],
      );
    });
    this.#wake([]);
    return (await this.schedules()).find((one) => one.id === id)!;
  }

  async removeSchedule(id: string): Promise<void> {
    const removed = await this.#db.run('DELETE FROM schedules WHERE id = ?', id);
    if (removed === 0) throw new GridError('not-found', `there is no schedule '${id}'`);
  }

  async schedules(): Promise<ScheduleInfo[]> {
    const rows = await this.#db.all<ScheduleRow>('SELECT * FROM schedules ORDER BY image, id');
    return rows.map((row) => ({
      id: row.id,
      image: row.image,
      everyMs: row.every_ms,
      hosts: row.hosts,
      next: new Date(row.due_ms).toISOString(),
      ...(row.warmed === null ? {} : { warmed: row.warmed }),
    }));
  }

  /** What is due now. */
  async round(): Promise<void> {
    const rows = await this.#db.all<ScheduleRow>('SELECT * FROM schedules');
    for (const { id } of rows) {
      const job = await this.#db.transaction(async (tx) => {
        const [row] = await tx.all<ScheduleRow>('SELECT * FROM schedules WHERE id = ?', id);
        return row && this.#turn(tx, row);
      });
      if (job !== undefined) this.#wake([job]);
    }
  }

  async #turn(tx: Queries, row: ScheduleRow): Promise<string | undefined> {
    const nowMs = Date.now();
    if (row.due_ms <= nowMs) {
      await tx.run('UPDATE schedules SET due_ms = ? WHERE id = ?', nowMs + row.every_ms, row.id);
      const hosts = await tx.all<{ id: string }>(
        `SELECT min(id) AS id FROM hosts WHERE state = 'up' GROUP BY source`,
      );
      for (const host of hosts) {
        await giveOrder(tx, host.id, null, { id: `${row.id}.${host.id}.${nowMs}`, kind: 'refresh' });
      }
    }
    if (row.hosts === 0) return undefined;
    const [newest] = await tx.all<Version>(
      `SELECT image, version, manifest FROM versions WHERE image = ? AND kind = 'disk' AND deprecated IS NULL
       ORDER BY created DESC, version DESC LIMIT 1`,
      row.image,
    );
    if (!newest || newest.manifest === row.warmed_manifest) return undefined;
    const operator: Principal = { user: 'operator', role: 'operator' };
    const what = { schedule: row.id, ...newest };
    let ordered = 0;
    const job = await this.#requests.once(tx, operator, undefined, what, 'warm', null, async (made) => {
      ordered = await this.#orderWarm(tx, newest, row.hosts, made);
    });
    if (ordered === 0) {
      await tx.run('DELETE FROM jobs WHERE id = ?', job); // nobody has it yet
      return undefined;
    }
    await tx.run(
      'UPDATE schedules SET warmed = ?, warmed_manifest = ? WHERE id = ?',
      ...[`${newest.image}:${newest.version}`, newest.manifest, row.id],
    );
    return job;
  }
}
