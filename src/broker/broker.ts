/**
 * The broker: users ask for machines, hosts offer to carry them, and everything that was accepted stands in the
 * database. This file holds the parts together and turns the crank: a round places what waits, finds hosts that fell
 * silent, and wakes whoever waits for orders or for a job.
 *
 *   request → [jobs, vms: requested] → placement → [vms: placed, orders: open, futures less]
 *     → the host's long poll → boot → report with the result → [orders: done, vms: running]
 *
 * Nothing in memory is needed to go on: after a kill the next start finds open orders and requested VMs, and hosts
 * get a whole lease to report before they are taken for silent.
 */
import { EventEmitter } from 'node:events';
import { Access } from './access.ts';
import { openDatabase } from './database.ts';
import type { Database } from './database.ts';
import { Hosts } from './hosts.ts';
import { LEASE_TIMES, Loads } from './loads.ts';
import type { LeaseTimes } from './loads.ts';
import { Placement } from './placement.ts';
import { Lives } from './lives.ts';
import { Requests } from './requests.ts';
import { Warming } from './warming.ts';
import type { Relay } from './segments.ts';
import { Streams } from './streams.ts';
import { VolumeCatalog } from './volume-catalog.ts';
import { orderVolumes } from './volumes.ts';
import { Workspaces } from './workspaces.ts';

const ROUND_EVERY_MS = 1_000;

export interface BrokerOptions {
  /** A file, or postgres://… */
  readonly database: string;
  readonly log: (line: string) => void;
  readonly leaseTimes?: LeaseTimes;
  /** Joins the hosts' parts of virtual networks. */
  readonly relay?: Relay;
}

export class Broker {
  readonly db: Database;
  readonly access: Access;
  readonly hosts: Hosts;
  readonly requests: Requests;
  readonly lives: Lives;
  readonly warming: Warming;
  readonly workspaces: Workspaces;
  readonly volumes: VolumeCatalog;
  readonly relay: Relay | undefined;
  readonly streams: Streams;
  readonly placement: Placement;
  readonly loads: Loads;
  /** `host:<id>`: orders may wait. `job:<id>`: something changed. `changed`: for any. `closed`. */
  readonly events = new EventEmitter().setMaxListeners(0);
  readonly log: (line: string) => void;
  readonly #timer: NodeJS.Timeout;
  #round: Promise<void> | undefined;
  #again = false;
  #closed = false;

  private constructor(db: Database, options: BrokerOptions) {
    this.db = db;
    this.log = options.log;
    this.access = new Access(db);
    const changed = (jobs: Iterable<string>) => {
      for (const job of jobs) this.events.emit(`job:${job}`);
      this.events.emit('changed');
      this.wake();
    };
    this.loads = new Loads(options.leaseTimes ?? LEASE_TIMES);
    this.hosts = new Hosts(db, this.loads, changed);
    this.requests = new Requests(db, changed);
    this.lives = new Lives(db, this.requests, changed);
    this.warming = new Warming(db, this.loads, this.requests, changed);
    this.volumes = new VolumeCatalog(db, this.requests, changed);
    this.relay = options.relay;
    this.streams = new Streams({
      ...{ db, access: this.access, requests: this.requests, log: this.log },
      wake: (host) => this.events.emit(`host:${host}`),
    });
    this.workspaces = new Workspaces(db, this.requests, this.lives);
    this.placement = new Placement(db, this.loads, (host, job) => {
      this.events.emit(`host:${host}`);
      this.events.emit(`job:${job}`);
      this.events.emit('changed');
    });
    this.#timer = setInterval(() => this.wake(), ROUND_EVERY_MS);
    this.#timer.unref();
  }

  static async open(options: BrokerOptions): Promise<Broker> {
    const broker = new Broker(await openDatabase(options.database), options);
    broker.wake();
    return broker;
  }

  /** Has a round made soon. */
  wake(): void {
    if (this.#closed) return;
    if (this.#round) {
      this.#again = true;
      return;
    }
    this.#round = this.#turn().finally(() => {
      this.#round = undefined;
      if (!this.#again) return;
      this.#again = false;
      this.wake();
    });
  }

  async #turn(): Promise<void> {
    try {
      await this.hosts.expire();
      await this.workspaces.expire();
      await this.placement.round();
      await this.lives.orderCheckpoints();
      await this.warming.round();
      await orderVolumes(this.db);
      // Orders that came otherwise (a stop): their hosts look for themselves when told.
      const open = await this.db.all<{ host: string }>(
        `SELECT DISTINCT host FROM orders WHERE state = 'open'`,
      );
      for (const { host } of open) this.events.emit(`host:${host}`);
    } catch (error) {
      this.log(
        `the round failed and is made again: ${error instanceof Error ? error.message : String(error)}`,
      );
    }
  }

  /** Resolves with true when `event` comes, with false after `timeoutMs`, an abort, or the broker's end. */
  wait(event: string, timeoutMs: number, signal?: AbortSignal): Promise<boolean> {
    return new Promise((resolve) => {
      const finish = (came: boolean) => {
        clearTimeout(timer);
        this.events.off(event, onEvent);
        this.events.off('closed', onEnd);
        signal?.removeEventListener('abort', onEnd);
        resolve(came);
      };
      const onEvent = () => finish(true);
      const onEnd = () => finish(false);
      const timer = setTimeout(onEnd, timeoutMs);
      this.events.once(event, onEvent);
      this.events.once('closed', onEnd);
      signal?.addEventListener('abort', onEnd);
      if (this.#closed || signal?.aborted) finish(false);
    });
  }

  get closed(): boolean {
    return this.#closed;
  }

  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    this.events.emit('closed');
    await this.#round;
    await this.db.close();
  }
}
