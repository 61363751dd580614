/**
 * What users do to VMs that are there: stop, suspend, resume, move, checkpoint, commit. Each is accepted in one
 * transaction that changes the VM's state, writes the order for its host and the job that tells how it went; what
 * hosts answer is results.ts, and who resumes is placement.ts.
 */
import { randomBytes } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import { CHECKPOINT_IMAGE, VOLUME_IMAGE } from '../core/grid.ts';
import { parseReference } from '../core/manifest.ts';
import type { Principal } from './access.ts';
import type { Database, Queries } from './database.ts';
import { claimVersion } from './images.ts';
import type { Requests } from './requests.ts';
import { endJobs, endVm, giveOrder, placedAs, voidOrders } from './vm-table.ts';
import type { VmRow } from './vm-table.ts';
import { savesOf } from './volumes.ts';

export type LifeVerb = 'suspend' | 'resume' | 'move' | 'checkpoint';

export interface LifeOptions {
  /** Resume and move: where to. */
  readonly host?: string;
}

export class Lives {
  readonly #db: Database;
  readonly #requests: Requests;
  readonly #wake: (jobs: Iterable<string>) => void;

  constructor(db: Database, requests: Requests, wake: (jobs: Iterable<string>) => void) {
    this.#db = db;
    this.#requests = requests;
    this.#wake = wake;
  }

  /** Asks for the end of a VM, by id or name. Done when its state is `stopped`. Idempotent. */
  async stop(principal: Principal, which: string, graceMs: number): Promise<string> {
    const jobs: string[] = [];
    const id = await this.#db.transaction(async (tx) => {
      jobs.length = 0;
      const vm = await this.#requests.find(tx, principal, which);
      jobs.push(vm.job);
      if (vm.ended_ms !== null || vm.state === 'stopping') return vm.id;
      await tx.run(`UPDATE vms SET wanted = 'stopped' WHERE id = ?`, vm.id);
      if (vm.state === 'requested' || vm.state === 'lost' || vm.state === 'suspended') {
        // A lost one whose host comes back is ended there: it is not among those that may run.
        await endVm(tx, vm, 'stopped');
        return vm.id;
      }
      const error = { code: 'closed' as const, message: 'the VM was stopped meanwhile' };
      jobs.push(...(await endJobs(tx, vm.id, 'all', { error })));
      await voidOrders(tx, vm.id);
      const placed = placedAs(vm);
      await giveOrder(tx, vm.host!, vm.id, { id: `${placed}.stop`, kind: 'stop', vm: placed, graceMs });
      await tx.run(`UPDATE vms SET state = 'stopping' WHERE id = ?`, vm.id);
      return vm.id;
    });
    this.#wake(jobs);
    return id;
  }

  /** Accepts it; the id of the job. Throws not-found, in-use where the VM is not in a state for it. */
  async act(
    principal: Principal,
    which: string,
    verb: LifeVerb,
    options: LifeOptions = {},
    key?: string,
  ): Promise<string> {
    const job = await this.#db.transaction(async (tx) => {
      const vm = await this.#requests.find(tx, principal, which);
      return this.#requests.once(tx, principal, key, { verb, which, ...options }, verb, vm.id, (id) =>
        this.#begin(tx, vm, verb, options, id),
      );
    });
    this.#wake([job]);
    return job;
  }

  async #begin(tx: Queries, vm: VmRow, verb: LifeVerb, options: LifeOptions, job: string): Promise<void> {
    const needs = verb === 'resume' ? 'suspended' : 'running';
    // One that waits for a host with room may be told another.
    const waits = verb === 'resume' && vm.state === 'requested' && vm.checkpoint !== null;
    if (vm.state !== needs && !waits) {
      throw new GridError('in-use', `VM '${vm.name}' is ${vm.state}; only one that is ${needs} can do this`);
    }
    if (options.host !== undefined) await this.#checkHost(tx, options.host);
    else if (verb === 'move') await checkElsewhere(tx, vm);
    if (verb === 'checkpoint') return orderCheckpoint(tx, vm, job);
    if (verb === 'resume') {
      await tx.run(
        `UPDATE vms SET state = 'requested', wanted = 'running', target = ?, avoid = NULL, failures = 0, ran_ms = ?, asked_ms = ? WHERE id = ?`,
        ...[options.host ?? null, Date.now(), Date.now(), vm.id],
      );
      return;
    }
    await tx.run(
      `UPDATE vms SET state = 'suspending', wanted = ?, target = ?, avoid = ? WHERE id = ?`,
      ...(verb === 'move'
        ? ['running', options.host ?? null, options.host === undefined ? vm.host : null]
        : ['suspended', null, null]),
      vm.id,
    );
    await orderSuspend(tx, vm, job);
  }

  async #checkHost(tx: Queries, host: string): Promise<void> {
    const [row] = await tx.all<{ state: string }>('SELECT state FROM hosts WHERE id = ?', host);
    if (!row)
      throw new GridError('not-found', `there is no host '${host}'; \`gridvfs broker hosts\` lists them`);
    if (row.state !== 'up') throw new GridError('in-use', `host '${host}' is ${row.state}`);
  }

  /** The disk of a VM that runs becomes a version of an image, which is then the user's. */
  async commit(
    principal: Principal,
    which: string,
    request: { reference: string; labels?: Readonly<Record<string, string>> },
    key?: string,
  ): Promise<string> {
    const { name, version } = parseReference(request.reference);
    if (CHECKPOINT_IMAGE.test(name) || VOLUME_IMAGE.test(name)) {
      throw new GridError('bad-request', `'${name}' is a name of the broker's own; choose another`);
    }
    const job = await this.#db.transaction(async (tx) => {
      const vm = await this.#requests.find(tx, principal, which);
      const what = { verb: 'commit', which, ...request };
      return this.#requests.once(tx, principal, key, what, 'commit', vm.id, async (id) => {
        if (vm.state !== 'running') {
          throw new GridError(
            'in-use',
            `VM '${vm.name}' is ${vm.state}; only a running one can be committed`,
          );
        }
        await claimVersion(tx, principal, name, version);
        const placed = placedAs(vm);
        await giveOrder(
          tx,
          vm.host!,
          vm.id,
          {
            id: `${placed}.commit.${id}`,
            kind: 'commit',
            vm: placed,
            reference: `${name}:${version}`,
            ...(request.labels === undefined ? {} : { labels: request.labels }),
          },
          id,
        );
      });
    });
    this.#wake([job]);
    return job;
  }

  /** Orders the checkpoints that are due by the VMs' own requests. */
  async orderCheckpoints(): Promise<void> {
    const due = await this.#db.all<VmRow>(
      `SELECT * FROM vms v WHERE state = 'running' AND checkpoint_every_ms IS NOT NULL
         AND checkpoint_every_ms < ? - coalesce(
           (SELECT max(o.created_ms) FROM orders o WHERE o.vm = v.id AND o.kind = 'checkpoint'), ran_ms, ?)`,
      Date.now(),
      Date.now(),
    );
    for (const { id } of due) {
      await this.#db.transaction(async (tx) => {
        const [vm] = await tx.all<VmRow>(`SELECT * FROM vms WHERE id = ? AND state = 'running'`, id);
        if (vm) await orderCheckpoint(tx, vm, null);
      });
    }
  }
}

/** One that is moved from the only host would be suspended until there is another. */
async function checkElsewhere(tx: Queries, { name, host }: VmRow): Promise<void> {
  const [other] = await tx.all(`SELECT id FROM hosts WHERE state = 'up' AND id <> ? LIMIT 1`, host);
  if (other) return;
  throw new GridError(
    'in-use',
    `no host is up but '${host}', where VM '${name}' is; \`gridvfs broker hosts\` lists them`,
  );
}

/** Of no other checkpoint: tags that moved would be seen by hosts at different times. */
const checkpointName = (vm: VmRow) => `${vm.id}:${vm.generation}.${randomBytes(4).toString('hex')}`;

async function orderCheckpoint(tx: Queries, vm: VmRow, job: string | null): Promise<void> {
  const placed = placedAs(vm);
  const [open] = await tx.all(
    `SELECT id FROM orders WHERE vm = ? AND state = 'open' AND kind = 'checkpoint' LIMIT 1`,
    vm.id,
  );
  if (open) {
    if (job === null) return;
    throw new GridError('in-use', `a checkpoint of VM '${vm.name}' is being made already`);
  }
  const checkpoint = checkpointName(vm);
  const id = `${placed}.checkpoint.${checkpoint.split('.')[1]}`;
  const saves = await savesOf(tx, vm.id);
  await giveOrder(tx, vm.host!, vm.id, { id, kind: 'checkpoint', vm: placed, checkpoint, ...saves }, job);
}

/** The VM's state is `suspending` already. */
export async function orderSuspend(tx: Queries, vm: VmRow, job: string | null): Promise<void> {
  const placed = placedAs(vm);
  const checkpoint = checkpointName(vm);
  const id = `${placed}.suspend.${checkpoint.split('.')[1]}`;
  const saves = await savesOf(tx, vm.id);
  await giveOrder(tx, vm.host!, vm.id, { id, kind: 'suspend', vm: placed, checkpoint, ...saves }, job);
}
