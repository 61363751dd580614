/**
 * kill -9 of the broker at random moments in a storm of requests. Afterwards every accepted request is done or its VMs
 * run, each once, and the VMs that the broker lists are those that the hosts have. Seeded; a failure prints its seed.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { randomBytes, randomInt } from 'node:crypto';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { BrokerClient } from '../../src/agent/broker-client.ts';
import { seeded } from '../../bench/lib/inventory.ts';
import { Access } from '../../src/broker/access.ts';
import { openDatabase } from '../../src/broker/database.ts';
import type { JobInfo, VmInfo } from '../../src/broker/index.ts';
import { GridError } from '../../src/core/errors.ts';
import { GIB, MIB } from '../../src/core/limits.ts';
import { Databases, DIALECTS, eventually, TestHost } from './harness.ts';
import type { TableMachines } from './harness.ts';
import { DEBIAN } from './scene.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';
const KILLS = { sqlite: LONG ? 100 : 4, postgres: LONG ? 25 : 1 };
const CHILD = path.join(import.meta.dirname, 'broker-child.ts');
const HOSTS = 3;
const USERS = 4;

class MortalBroker {
  readonly socket: string;
  readonly #arguments: string[];
  #child: ChildProcess | undefined;

  constructor(database: string, folder: string) {
    this.socket = path.join(folder, `s${randomBytes(4).toString('hex')}.sock`);
    this.#arguments = [CHILD, database, this.socket, '10000', '20000'];
  }

  async start(): Promise<void> {
    const child = spawn(process.execPath, this.#arguments, { stdio: ['ignore', 'pipe', 'inherit'] });
    this.#child = child;
    await new Promise<void>((resolve, reject) => {
      child.stdout.once('data', () => resolve());
      child.once('exit', (code) => reject(new Error(`the broker ended (${code}) before it was ready`)));
    });
  }

  async kill(): Promise<void> {
    const child = this.#child!;
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await ended;
  }
}

/** One user: asks, and asks again with the same key until there is an answer; remembers what was accepted. */
class Storm {
  readonly accepted = new Map<string, { job: string; verb: string }>();
  readonly refused: string[] = [];
  over = false;
  readonly #client: BrokerClient;
  readonly #random: () => number;

  constructor(client: BrokerClient, random: () => number) {
    this.#client = client;
    this.#random = random;
  }

  /** Undefined when it was refused. */
  async #call<T>(method: 'GET' | 'POST', route: string, body: object | undefined, key: string) {
    for (;;) {
      try {
        const headers = { 'idempotency-key': key };
        return await this.#client.call<T>(method, route, body, { headers, timeoutMs: 5_000 });
      } catch (error) {
        if (!(error instanceof GridError)) throw error;
        // Nobody knows whether it was accepted: that is what keys are for.
        const again = ['unreachable', 'tunnel-lost', 'timeout', 'closed', 'local-io'].includes(error.code);
        if (!again) {
          this.refused.push(`${route}: ${error.code}`);
          return undefined;
        }
        await sleep(20);
      }
    }
  }

  async run(): Promise<void> {
    const pick = <T>(items: readonly T[]) => items[Math.floor(this.#random() * items.length)]!;
    while (!this.over) {
      const key = randomBytes(8).toString('hex');
      const vms = (await this.#call<VmInfo[]>('GET', '/v1/vms', undefined, key)) ?? [];
      const verb =
        vms.length < 4
          ? 'request'
          : pick(['request', 'stop', 'stop', 'suspend', 'resume', 'move', 'checkpoint']);
      if (verb === 'request') {
        const body = { image: 'debian', count: 1 + Math.floor(this.#random() * 3), memoryBytes: 64 * MIB };
        const job = await this.#call<JobInfo>('POST', '/v1/vms', { ...body, policy: 'spread' }, key);
        if (job) this.accepted.set(key, { job: job.id, verb });
      } else {
        const able = vms.filter(({ state }) => state === (verb === 'resume' ? 'suspended' : 'running'));
        if (able.length === 0) continue;
        const job = await this.#call<JobInfo>('POST', `/v1/vms/${pick(able).id}/${verb}`, {}, key);
        if (job && verb !== 'stop') this.accepted.set(key, { job: job.id, verb });
      }
      await sleep(5);
    }
  }
}

for (const dialect of DIALECTS) {
  suite(`a broker on ${dialect} that is killed again and again`, () => {
    const databases = new Databases(dialect);
    before(() => databases.start());
    after(() => databases.stop());

    test(`every accepted request is carried out once, whenever it is killed (${KILLS[dialect]} times)`, async (t) => {
      const seed = randomInt(2 ** 31);
      t.diagnostic(`seed ${seed}`);
      await using stack = new AsyncDisposableStack();
      const database = await databases.fresh();
      const db = await openDatabase(database);
      stack.defer(() => db.close());
      const access = new Access(db);
      const { token } = await access.create('hosts', 'agent');
      const broker = new MortalBroker(database, databases.folder);
      await broker.start();
      stack.defer(() => broker.kill());

      const store = new Map<string, string>();
      const hosts: TestHost[] = [];
      for (let index = 0; index < HOSTS; index++) {
        const host = new TestHost(`s${index}-${dialect}`, databases.folder, DEBIAN, {
          memoryBytes: 64 * GIB,
          guestMemoryBytes: 64 * GIB,
          guestVcpus: 1000,
        });
        host.machines.store = store;
        host.connect(new BrokerClient({ url: `unix:${broker.socket}`, token }));
        stack.defer(() => host.close());
        hosts.push(host);
      }
      const all = () => hosts.map(({ machines }) => machines);
      // A second copy of a VM, at any moment: looked for at each start, of whatever host.
      const twice: string[] = [];
      for (const { machines } of hosts) {
        machines.onStart = (id) => {
          const vm = id.split('.')[0]!;
          const copies = all().flatMap((one) => one.running().filter((name) => name.startsWith(`${vm}.`)));
          if (copies.length > 1) twice.push(copies.join(' '));
        };
      }
      const users: { client: BrokerClient; storm: Storm }[] = [];
      for (let index = 0; index < USERS; index++) {
        const made = await access.create(`user${index}`, 'user');
        const client = new BrokerClient({ url: `unix:${broker.socket}`, token: made.token });
        stack.defer(() => client.close());
        users.push({ client, storm: new Storm(client, seeded(seed + index)) });
      }
      await eventually(async () => (await db.all('SELECT 1 AS one FROM versions')).length > 0);
      const storms = users.map(({ storm }) => storm.run());

      const random = seeded(seed);
      for (let kill = 0; kill < KILLS[dialect]; kill++) {
        await sleep(random() * 600);
        await broker.kill();
        await broker.start();
      }
      // A machine that is slow gets as many requests accepted, later.
      await eventually(async () => users.reduce((sum, { storm }) => sum + storm.accepted.size, 0) > 10);
      await sleep(300);
      for (const { storm } of users) storm.over = true;
      await Promise.all(storms);

      // What is accepted is carried out, whoever has to do it.
      await eventually(async () => {
        const open = await db.all<{ count: number }>(
          `SELECT (SELECT count(*) FROM vms WHERE state IN ('requested', 'placed', 'suspending', 'stopping'))
             + (SELECT count(*) FROM jobs WHERE state = 'running') + (SELECT count(*) FROM orders WHERE state = 'open') AS count`,
        );
        return open[0]!.count === 0;
      });
      const accepted = users.flatMap(({ storm }) => [...storm.accepted.values()]);
      const jobs = await db.all<{ id: string; kind: string; state: string | null; error: string | null }>(
        'SELECT id, kind, state, error FROM jobs',
      );
      // Each key is one job: what was asked again after a kill was not accepted twice, and nothing is lost.
      assert.deepEqual(
        accepted.map(({ job }) => job).toSorted(),
        jobs.map(({ id }) => id).toSorted(),
        JSON.stringify(users.map(({ storm }) => storm.refused)),
      );
      for (const { kind, state, error } of jobs) {
        if (kind === 'request' || state === 'done') continue;
        // Another call of the same user got in between; everything else would be a loss.
        assert.match(error ?? '', /stopped meanwhile|is stopped|is lost/, `${kind} ${state}`);
      }
      const vms = await db.all<{ id: string; state: string; reason: string | null; generation: number }>(
        'SELECT id, state, reason, generation FROM vms',
      );
      for (const { id, state, reason } of vms) {
        assert.ok(['running', 'suspended', 'stopped'].includes(state), `${id} ${state}: ${reason}`);
      }
      // The hosts' own lists are the broker's.
      const listed = async () =>
        (await Promise.all(users.map(({ client }) => client.call<VmInfo[]>('GET', '/v1/vms'))))
          .flat()
          .filter(({ state }) => state === 'running')
          .map(({ placedAs }) => placedAs!)
          .toSorted();
      const there = () => all().flatMap((machines: TableMachines) => [...machines.vms.keys()]);
      await eventually(async () => there().length === (await listed()).length);
      assert.deepEqual(there().toSorted(), await listed());
      // No placement was ever carried out twice, and no VM ran in two places.
      const started = all().flatMap((machines) => machines.started);
      assert.equal(new Set(started).size, started.length);
      assert.deepEqual(twice, []);
      t.diagnostic(
        `${KILLS[dialect]} kills, ${accepted.length} jobs accepted, ${vms.length} VMs, ${started.length} starts`,
      );
      assert.ok(accepted.length > 10);
    });
  });
}
