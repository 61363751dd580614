/** What users do with their data volumes: make, list, grow, snapshot, revert, share, attach, remove (volumes.ts). */
import { randomBytes } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import type { Principal } from './access.ts';
import type { Database, Queries } from './database.ts';
import { listImages } from './images.ts';
import { checkQuota } from './quotas.ts';
import type { Requests } from './requests.ts';
import { noteVolumeSize } from './usage.ts';
import { endJob } from './vm-table.ts';
import {
  checkNotWritten,
  claimVolumes,
  findVolume,
  forgetClone,
  orderAttach,
  orderDetach,
  orderSnapshot,
  ownVolume,
} from './volumes.ts';
import type { VolumeRow } from './volumes.ts';

export interface VolumeRequest {
  readonly name: string;
  /** Of an empty one; of others at least as much as what they are made of has. */
  readonly sizeBytes?: number;
  /** name:version of a data or disk image; or … */
  readonly image?: string;
  /** … a volume that one may read, as it was saved last or in `version`. */
  readonly from?: string;
  readonly version?: number;
}

export interface VolumeInfo {
  readonly id: string;
  readonly name: string;
  readonly owner: string;
  readonly state: 'making' | 'failed' | 'free' | 'attached' | 'saving';
  readonly sizeBytes: number;
  /** Of its versions together, compressed, without what it was made of. */
  readonly storedBytes: number;
  /** The last one; 0 while it is being made. */
  readonly version: number;
  /** Where it was written to last. */
  readonly host?: string;
  /** There are things written on that host which no version has yet. */
  readonly unsaved: boolean;
  readonly reason?: string;
  readonly created: string;
  readonly sharedWith: readonly string[];
  readonly attached: readonly { readonly vm: string; readonly readOnly: boolean }[];
  readonly versions: readonly {
    readonly version: number;
    readonly sizeBytes: number;
    readonly storedBytes: number;
    readonly created: string;
  }[];
}

export class VolumeCatalog {
  readonly #db: Database;
  readonly #requests: Requests;
  readonly #wake: (jobs: Iterable<string>) => void;

  constructor(db: Database, requests: Requests, wake: (jobs: Iterable<string>) => void) {
    this.#db = db;
    this.#requests = requests;
    this.#wake = wake;
  }

  /** Throws exists, bad-request, not-found, no-space (quota). An empty one and one of an image are `making` until a host has made them. */
  async create(principal: Principal, request: VolumeRequest): Promise<VolumeInfo> {
    const { name, image, from, version } = request;
    if (image !== undefined && from !== undefined)
      throw new GridError('bad-request', 'a volume is made of an image or of a volume, not of both');
    const id = `d${randomBytes(6).toString('hex')}`;
    const least = image === undefined ? 0 : await this.#imageSize(principal, image);
    await this.#db.transaction(async (tx) => {
      const [taken] = await tx.all(
        'SELECT id FROM volumes WHERE owner = ? AND name = ? AND removed_ms IS NULL',
        ...[principal.user, name],
      );
      if (taken) throw new GridError('exists', `you have a volume '${name}' already`);
      const parent = from === undefined ? undefined : await this.#savedVersion(tx, principal, from, version);
      const smallest = parent?.size_bytes ?? least;
      const sizeBytes = request.sizeBytes ?? smallest;
      if (sizeBytes === 0) throw new GridError('bad-request', 'say how large an empty volume is to be');
      if (sizeBytes < smallest) {
        throw new GridError(
          'bad-request',
          `${image ?? from} has ${smallest} bytes; a volume of it can be larger, not smaller`,
        );
      }
      await checkQuota(tx, principal.user, { volumeBytes: sizeBytes });
      const nowMs = Date.now();
      await tx.run(
        `INSERT INTO volumes (id, owner, name, size_bytes, version, manifest, stored_bytes, unsaved, made_from, failed, created_ms)
         VALUES (?, ?, ?, ?, ?, ?, 0, 0, ?, 0, ?)`,
        ...[id, principal.user, name, sizeBytes, parent ? 1 : 0, parent?.manifest ?? null],
        ...[image ?? null, nowMs],
      );
      await noteVolumeSize(tx, id, sizeBytes);
      if (parent) await this.#copyVersion(tx, id, 1, parent);
    });
    this.#wake([]);
    return this.get(principal, id);
  }

  async #imageSize(principal: Principal, reference: string): Promise<number> {
    const images = await listImages(this.#db, { user: principal.user, role: 'user' });
    const found = images.find(({ image, version }) => `${image}:${version}` === reference);
    if (found?.kind !== 'data' && found?.kind !== 'disk') {
      const why = found === undefined ? 'is no version of an image of yours' : `is of kind '${found.kind}'`;
      throw new GridError('not-found', `${reference} ${why}; \`gridvfs broker images\` lists them`);
    }
    return found.sizeBytes;
  }

  async #savedVersion(tx: Queries, principal: Principal, which: string, version: number | undefined) {
    const volume = await findVolume(tx, principal, which);
    const number = version ?? volume.version;
    const [found] = await tx.all<{ manifest: string; size_bytes: number }>(
      'SELECT manifest, size_bytes FROM volume_versions WHERE volume = ? AND version = ?',
      ...[volume.id, number],
    );
    if (!found) throw new GridError('not-found', `volume '${which}' has no version ${number}`);
    return found;
  }

  async #copyVersion(
    tx: Queries,
    volume: string,
    version: number,
    { manifest, size_bytes: sizeBytes }: { manifest: string; size_bytes: number },
  ): Promise<void> {
    await tx.run(
      `INSERT INTO volume_versions (volume, version, reference, manifest, size_bytes, stored_bytes, created_ms)
       VALUES (?, ?, ?, ?, ?, 0, ?)`,
      ...[volume, version, `${volume}:${version}.copy`, manifest, sizeBytes, Date.now()],
    );
  }

  async get(principal: Principal, which: string): Promise<VolumeInfo> {
    return this.#info(await findVolume(this.#db, principal, which), principal);
  }

  /** One's own and those that are shared; operators see all. */
  async list(principal: Principal): Promise<VolumeInfo[]> {
    const rows = await this.#db.all<VolumeRow>(
      `SELECT v.* FROM volumes v WHERE v.removed_ms IS NULL AND (? = 'operator' OR v.owner = ? OR EXISTS
         (SELECT 1 FROM volume_shares s WHERE s.volume = v.id AND s.user_name = ?)) ORDER BY v.owner, v.name LIMIT 1000`,
      ...[principal.role, principal.user, principal.user],
    );
    return Promise.all(rows.map((row) => this.#info(row, principal)));
  }

  async #info(row: VolumeRow, principal: Principal): Promise<VolumeInfo> {
    const shares = await this.#db.all<{ user_name: string }>(
      'SELECT user_name FROM volume_shares WHERE volume = ? ORDER BY user_name',
      row.id,
    );
    const attached = await this.#db.all<{ name: string; owner: string; read_only: number }>(
      `SELECT m.name, m.owner, u.read_only FROM vm_volumes u JOIN vms m ON m.id = u.vm
       WHERE u.volume = ? AND m.ended_ms IS NULL ORDER BY m.name`,
      row.id,
    );
    const versions = await this.#db.all<{
      version: number;
      size_bytes: number;
      stored_bytes: number;
      created_ms: number;
    }>('SELECT * FROM volume_versions WHERE volume = ? ORDER BY version', row.id);
    return {
      id: row.id,
      name: row.name,
      owner: row.owner,
      state: stateOf(row, attached.length > 0),
      sizeBytes: row.size_bytes,
      storedBytes: row.stored_bytes,
      version: row.version,
      unsaved: row.unsaved === 1,
      ...(row.host === null ? {} : { host: row.host }),
      ...(row.reason === null ? {} : { reason: row.reason }),
      created: new Date(row.created_ms).toISOString(),
      sharedWith: shares.map((one) => one.user_name),
      // Whose it is sees all of them, others their own.
      attached: attached
        .filter(({ owner }) => [row.owner, owner].includes(principal.user) || principal.role === 'operator')
        .map((one) => ({ vm: one.name, readOnly: one.read_only === 1 })),
      versions: versions.map((one) => ({
        version: one.version,
        sizeBytes: one.size_bytes,
        storedBytes: one.stored_bytes,
        created: new Date(one.created_ms).toISOString(),
      })),
    };
  }

  /** Its next attachment has the new size. Throws in-use, bad-request, no-space (its owner's quota). */
  grow(principal: Principal, which: string, sizeBytes: number): Promise<VolumeInfo> {
    return this.#change(principal, which, async (tx, volume) => {
      await checkNotWritten(tx, volume);
      if (sizeBytes < volume.size_bytes) {
        throw new GridError(
          'bad-request',
          `volume '${volume.name}' has ${volume.size_bytes} bytes; it can only grow`,
        );
      }
      await resize(tx, volume, sizeBytes);
    });
  }

  /** Back to a version, the last one when left out; what was written since and not saved is given up. */
  revert(principal: Principal, which: string, version?: number): Promise<VolumeInfo> {
    return this.#change(principal, which, async (tx, volume) => {
      await checkNotWritten(tx, volume);
      const found = await this.#savedVersion(tx, principal, volume.id, version);
      await forgetClone(tx, volume);
      if (version === undefined || version === volume.version) return;
      await this.#copyVersion(tx, volume.id, volume.version + 1, found);
      await tx.run(
        'UPDATE volumes SET version = version + 1, manifest = ?, reason = NULL WHERE id = ?',
        ...[found.manifest, volume.id],
      );
      await resize(tx, volume, found.size_bytes);
    });
  }

  share(principal: Principal, which: string, users: readonly string[], may: boolean): Promise<VolumeInfo> {
    return this.#change(principal, which, async (tx, volume) => {
      for (const user of users) {
        await tx.run(
          may
            ? 'INSERT INTO volume_shares (volume, user_name) VALUES (?, ?) ON CONFLICT DO NOTHING'
            : 'DELETE FROM volume_shares WHERE volume = ? AND user_name = ?',
          ...[volume.id, user],
        );
      }
    });
  }

  /** Throws in-use while a VM has it. Its versions stay in the store until an operator removes them. */
  async remove(principal: Principal, which: string): Promise<void> {
    await this.#change(principal, which, async (tx, volume) => {
      const [user] = await tx.all<{ name: string }>(
        `SELECT m.name FROM vm_volumes u JOIN vms m ON m.id = u.vm
         WHERE u.volume = ? AND m.ended_ms IS NULL ORDER BY m.name LIMIT 1`,
        volume.id,
      );
      if (user)
        throw new GridError('in-use', `VM '${user.name}' has volume '${volume.name}'; detach it first`);
      await forgetClone(tx, volume);
      await tx.run('UPDATE volumes SET removed_ms = ? WHERE id = ?', Date.now(), volume.id);
      await noteVolumeSize(tx, volume.id);
    });
  }

  async #change(
    principal: Principal,
    which: string,
    work: (tx: Queries, volume: VolumeRow) => Promise<void>,
  ): Promise<VolumeInfo> {
    const id = await this.#db.transaction(async (tx) => {
      const volume = await ownVolume(tx, principal, which);
      await work(tx, volume);
      return volume.id;
    });
    this.#wake([]);
    const [row] = await this.#db.all<VolumeRow>('SELECT * FROM volumes WHERE id = ?', id);
    return this.#info(row!, principal);
  }

  /** A version of it as it is at this moment; the id of the job. Where nothing is unsaved the last one is that. */
  snapshot(principal: Principal, which: string, key?: string): Promise<string> {
    return this.#job(principal, { verb: 'snapshot', which }, null, key, async (tx, job) => {
      const volume = await ownVolume(tx, principal, which);
      if (volume.manifest === null)
        throw new GridError('in-use', `volume '${volume.name}' is still being made`);
      if (volume.unsaved === 0) return endJob(tx, job, { result: { version: volume.version } });
      const [host] = await tx.all<{ state: string }>('SELECT state FROM hosts WHERE id = ?', volume.host);
      if (host?.state !== 'up')
        throw new GridError('in-use', `host ${volume.host}, which has volume '${volume.name}', is silent`);
      return orderSnapshot(tx, volume, job);
    });
  }

  /** To a VM of one's own that runs. Throws in-use (another one writes to it), denied, exists, not-found. */
  attach(
    principal: Principal,
    which: string,
    { vm: machine, readOnly = false }: { vm: string; readOnly?: boolean },
    key?: string,
  ): Promise<string> {
    return this.#withVm(principal, { verb: 'attach', which, machine, readOnly }, key, async (tx, vm, job) => {
      const volume = await findVolume(tx, principal, which);
      const as = { user: vm.owner, role: 'user' } as const;
      await claimVolumes(tx, as, [{ volume: volume.id, readOnly }], [vm], vm.restart === 1);
      await orderAttach(tx, vm, { volume: volume.id }, job);
    });
  }

  /** Its guest is asked to let go of it. */
  detach(principal: Principal, which: string, machine: string, key?: string): Promise<string> {
    return this.#withVm(principal, { verb: 'detach', which, machine }, key, async (tx, vm, job) =>
      orderDetach(tx, vm, await findVolume(tx, principal, which), job),
    );
  }

  #withVm(
    principal: Principal,
    what: { verb: string; which: string; machine: string; readOnly?: boolean },
    key: string | undefined,
    work: (tx: Queries, vm: Awaited<ReturnType<Requests['find']>>, job: string) => Promise<void>,
  ): Promise<string> {
    return this.#job(principal, what, what.machine, key, async (tx, job) => {
      const vm = await this.#requests.find(tx, principal, what.machine);
      if (vm.state !== 'running')
        throw new GridError('in-use', `VM '${vm.name}' is ${vm.state}; only one that is running can do this`);
      await work(tx, vm, job);
    });
  }

  async #job(
    principal: Principal,
    what: { verb: string; which: string },
    machine: string | null,
    key: string | undefined,
    begin: (tx: Queries, job: string) => Promise<void>,
  ): Promise<string> {
    const job = await this.#db.transaction(async (tx) => {
      const vm = machine === null ? null : (await this.#requests.find(tx, principal, machine)).id;
      return this.#requests.once(tx, principal, key, what, what.verb, vm, (id) => begin(tx, id));
    });
    this.#wake([job]);
    return job;
  }
}

async function resize(tx: Queries, volume: VolumeRow, sizeBytes: number): Promise<void> {
  if (sizeBytes === volume.size_bytes) return;
  await checkQuota(tx, volume.owner, { volumeBytes: sizeBytes - volume.size_bytes });
  await tx.run('UPDATE volumes SET size_bytes = ? WHERE id = ?', sizeBytes, volume.id);
  await noteVolumeSize(tx, volume.id, sizeBytes);
}

function stateOf(row: VolumeRow, isAttached: boolean): VolumeInfo['state'] {
  if (row.manifest === null) return row.failed === 1 ? 'failed' : 'making';
  if (isAttached) return 'attached';
  return row.unsaved === 1 ? 'saving' : 'free';
}
