/**
 * Users' data volumes. A volume is a line of versions in the store, each a data image that never changes; what was
 * written since the last of them is on one host, where the VM that may write to it runs or ran (agent/grid-volumes.ts).
 *
 *   making → free ⇄ attached (one VM may write, its `writer`) → saving → free
 *
 *   unsaved   from the placement of its writer until its host has said what became of it: with a checkpoint of the
 *             VM, or after the VM's end. Nobody else may have it until then, so nothing that was written is passed over
 *   host      where the clone is that was written to last: VMs that write to it go there, where there is room
 *   readers   have the version that was the last one when they asked for it; any number of VMs, on any hosts
 *
 * What hosts are to do for it is ordered by `round`, again until it is done.
 */
import { randomBytes } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import type { CarriedVolume, Order, OrderResult, SavedVolume, VolumeSave } from '../core/grid.ts';
import type { Principal } from './access.ts';
import type { Database, Queries } from './database.ts';
import { endJob, giveOrder, placedAs } from './vm-table.ts';
import type { JobEnd, VmRow } from './vm-table.ts';

export interface VolumeUse {
  /** By name, by id, or `owner/name` of one that is shared. */
  readonly volume: string;
  readonly readOnly?: boolean;
}

export interface VolumeRow {
  readonly id: string;
  readonly owner: string;
  readonly name: string;
  readonly size_bytes: number;
  readonly version: number;
  readonly manifest: string | null;
  /** Of all versions together, compressed; what it began with is not counted. */
  readonly stored_bytes: number;
  readonly host: string | null;
  readonly unsaved: number;
  readonly writer: string | null;
  readonly made_from: string | null;
  readonly failed: number;
  readonly reason: string | null;
  readonly created_ms: number;
  readonly removed_ms: number | null;
}

/** A failed order for a volume is given again after this. */
const AGAIN_MS = 5_000;

/** SQL that holds for volumes that `principal` may read; operators see all. */
function readable(principal: Principal): { sql: string; values: string[] } {
  return principal.role === 'operator'
    ? { sql: '1 = 1', values: [] }
    : {
        sql: '(v.owner = ? OR EXISTS (SELECT 1 FROM volume_shares s WHERE s.volume = v.id AND s.user_name = ?))',
        values: [principal.user, principal.user],
      };
}

/** Throws not-found, also for volumes that one may not read, and bad-request where the name is not enough. */
export async function findVolume(tx: Queries, principal: Principal, which: string): Promise<VolumeRow> {
  const { sql, values } = readable(principal);
  const slash = which.indexOf('/');
  const owner = slash === -1 ? principal.user : which.slice(0, slash);
  const rows = await tx.all<VolumeRow>(
    `SELECT v.* FROM volumes v
     WHERE v.removed_ms IS NULL AND (v.id = ? OR (v.name = ? AND v.owner = ?)) AND ${sql}`,
    ...[which, which.slice(slash + 1), owner, ...values],
  );
  if (rows[0]) return rows[0];
  throw new GridError(
    'not-found',
    `there is no volume '${which}' of yours; \`gridvfs volume ls\` lists them, another user's is OWNER/NAME`,
  );
}

/** One's own, to change it. Throws denied for one that is only shared. */
export async function ownVolume(tx: Queries, principal: Principal, which: string): Promise<VolumeRow> {
  const volume = await findVolume(tx, principal, which);
  if (volume.owner !== principal.user && principal.role !== 'operator')
    throw new GridError(
      'denied',
      `volume '${which}' is shared with you for reading; it is ${volume.owner}'s`,
    );
  return volume;
}

async function writerName(tx: Queries, volume: VolumeRow): Promise<string> {
  const [vm] = await tx.all<{ name: string }>('SELECT name FROM vms WHERE id = ?', volume.writer);
  return vm?.name ?? String(volume.writer);
}

/** Throws in-use, saying who has it. */
export async function checkNotWritten(tx: Queries, volume: VolumeRow): Promise<void> {
  if (volume.writer !== null) {
    throw new GridError(
      'in-use',
      `volume '${volume.name}' is attached writable to VM '${await writerName(tx, volume)}': one VM at a time writes to a volume; attach it read-only, or detach it there`,
    );
  }
}

/** Gives VMs that are asked for their volumes: all of them to read, or one to write. Throws in-use, denied, not-found,
 * bad-request. */
export async function claimVolumes(
  tx: Queries,
  principal: Principal,
  uses: readonly VolumeUse[],
  vms: readonly { readonly id: string }[],
  restart = false,
): Promise<void> {
  for (const { volume: which, readOnly = false } of uses) {
    const volume = readOnly ? await findVolume(tx, principal, which) : await ownVolume(tx, principal, which);
    if (readOnly && volume.manifest === null)
      throw new GridError('in-use', `volume '${volume.name}' is still being made`);
    if (!readOnly) {
      if (vms.length > 1) {
        throw new GridError(
          'bad-request',
          `volume '${volume.name}' cannot be attached writable to ${vms.length} machines: one at a time writes to a volume; ask for it as ${volume.name}:ro`,
        );
      }
      if (restart) {
        throw new GridError(
          'bad-request',
          `a machine that is started again elsewhere cannot write to volume '${volume.name}': what was not saved would be lost then`,
        );
      }
      await checkNotWritten(tx, volume);
      await tx.run('UPDATE volumes SET writer = ? WHERE id = ?', vms[0]!.id, volume.id);
    }
    for (const { id } of vms) {
      const [same] = await tx.all('SELECT name FROM vm_volumes WHERE vm = ? AND name = ?', id, volume.name);
      if (same) throw new GridError('exists', `the machine has a volume '${volume.name}' already`);
      await tx.run(
        'INSERT INTO vm_volumes (vm, volume, name, read_only, manifest, size_bytes) VALUES (?, ?, ?, ?, ?, ?)',
        ...[id, volume.id, volume.name, readOnly ? 1 : 0],
        ...(readOnly ? [volume.manifest, volume.size_bytes] : [null, null]),
      );
    }
  }
}

interface VmVolumeRow extends VolumeRow {
  readonly read_only: number;
  readonly used_manifest: string | null;
  readonly used_bytes: number | null;
  readonly used_name: string;
}

export type PlacedVolumes = readonly VmVolumeRow[];

const volumesOfVm = (tx: Queries, vm: string) =>
  tx.all<VmVolumeRow>(
    `SELECT v.*, u.read_only, u.manifest AS used_manifest, u.size_bytes AS used_bytes, u.name AS used_name
     FROM vm_volumes u JOIN volumes v ON v.id = u.volume WHERE u.vm = ? ORDER BY u.name`,
    vm,
  );

/** What a VM that is about to be placed has; a text where it has to wait, and why. */
export async function volumesToPlace(tx: Queries, vm: string): Promise<VmVolumeRow[] | string> {
  const rows = await volumesOfVm(tx, vm);
  for (const { name, manifest, unsaved, host, read_only: readOnly } of rows) {
    if (readOnly === 1) continue;
    if (manifest === null) return `volume '${name}' is still being made`;
    if (unsaved === 1) return `what was written to volume '${name}' on host ${host} is being saved first`;
  }
  return rows;
}

/** Bytes of these volumes on a host, as far as the broker knows. */
export function volumeBytesOn(
  rows: readonly VmVolumeRow[],
  host: string,
  warmBytes: Readonly<Record<string, number>>,
): number {
  return rows.reduce((sum, row) => {
    const manifest = row.used_manifest ?? row.manifest ?? '';
    const carried = row.read_only === 0 && row.host === host ? row.stored_bytes : 0;
    return sum + Math.max(carried, warmBytes[manifest] ?? 0);
  }, 0);
}

/** As its host is told when a VM is placed there: from here on what is written is there and nowhere else. */
export async function placeVolumes(
  tx: Queries,
  rows: readonly VmVolumeRow[],
  host: string,
): Promise<CarriedVolume[]> {
  const carried: CarriedVolume[] = [];
  for (const row of rows) {
    const readOnly = row.read_only === 1;
    if (!readOnly) await bindTo(tx, row, host);
    carried.push({
      id: row.id,
      name: row.used_name,
      manifest: row.used_manifest ?? row.manifest!,
      sizeBytes: row.used_bytes ?? row.size_bytes,
      readOnly,
    });
  }
  return carried;
}

async function bindTo(tx: Queries, volume: VolumeRow, host: string): Promise<void> {
  await tx.run('UPDATE volumes SET unsaved = 1, host = ? WHERE id = ?', host, volume.id);
  if (volume.host !== null && volume.host !== host) await orderDrop(tx, volume.host, volume.id);
}

async function orderDrop(tx: Queries, host: string, volume: string): Promise<void> {
  const id = `${volume}.drop.${randomBytes(4).toString('hex')}`;
  await giveOrder(tx, host, null, { id, kind: 'drop-volume', volume });
}

/** Of no other save: a version is made once. */
const nextVersion = ({ id, version }: VolumeRow) => `${id}:${version + 1}.${randomBytes(4).toString('hex')}`;

/** What a checkpoint of the VM has to save. */
export async function savesOf(tx: Queries, vm: string): Promise<{ saves?: VolumeSave[] }> {
  const rows = (await volumesOfVm(tx, vm)).filter((row) => row.read_only === 0);
  const saves = rows.map((row) => ({ id: row.id, reference: nextVersion(row) }));
  return saves.length === 0 ? {} : { saves };
}

async function orderSave(tx: Queries, volume: VolumeRow, last: boolean, job: string | null): Promise<void> {
  const reference = nextVersion(volume);
  const id = `${volume.id}.save.${reference.split('.')[1]}`;
  await giveOrder(
    tx,
    volume.host!,
    null,
    { id, kind: 'save-volume', volume: volume.id, reference, last },
    job,
  );
}

/** A version at this moment, of a volume that is being written to. */
export const orderSnapshot = (tx: Queries, volume: VolumeRow, job: string) =>
  orderSave(tx, volume, false, job);

/** Plugs a volume into, or out of, a VM that runs; the job tells how it went. */
export async function orderAttach(tx: Queries, vm: VmRow, use: VolumeUse, job: string): Promise<void> {
  const rows = await volumesOfVm(tx, vm.id);
  const row = rows.find(({ id, name }) => id === use.volume || name === use.volume)!;
  if (row.read_only === 0 && row.unsaved === 1)
    throw new GridError(
      'in-use',
      `what was written to volume '${row.name}' before is being saved; try again`,
    );
  const [volume] = await placeVolumes(tx, [row], vm.host!);
  const placed = placedAs(vm);
  const id = `${placed}.attach.${job}`;
  await giveOrder(tx, vm.host!, vm.id, { id, kind: 'attach', vm: placed, volume: volume! }, job);
}

export async function orderDetach(tx: Queries, vm: VmRow, volume: VolumeRow, job: string): Promise<void> {
  const [use] = await tx.all<{ name: string }>(
    'SELECT name FROM vm_volumes WHERE vm = ? AND volume = ?',
    ...[vm.id, volume.id],
  );
  if (!use) throw new GridError('not-found', `VM '${vm.name}' has no volume '${volume.name}'`);
  const placed = placedAs(vm);
  const id = `${placed}.detach.${job}`;
  await giveOrder(tx, vm.host!, vm.id, { id, kind: 'detach', vm: placed, name: use.name }, job);
}

async function unuse(tx: Queries, vm: string, name: string): Promise<void> {
  await tx.run(
    `UPDATE volumes SET writer = NULL WHERE writer = ?
       AND id IN (SELECT volume FROM vm_volumes WHERE vm = ? AND name = ?)`,
    ...[vm, vm, name],
  );
  await tx.run('DELETE FROM vm_volumes WHERE vm = ? AND name = ?', vm, name);
}

/** Results of orders that are about a VM's volume. */
export async function tookAttachment(
  tx: Queries,
  vm: VmRow,
  order: Extract<Order, { kind: 'attach' | 'detach' }>,
  { error }: OrderResult,
): Promise<void> {
  const failed = error !== undefined;
  if (order.kind === 'attach' && failed) await unuse(tx, vm.id, order.volume.name);
  if (order.kind === 'detach' && !failed) await unuse(tx, vm.id, order.name);
}

type VolumeOrder = Extract<Order, { kind: 'make-volume' | 'save-volume' | 'drop-volume' }>;

export const isVolumeOrder = (order: Order): order is VolumeOrder => order.kind.endsWith('-volume');

/** Results of orders that are about a volume alone. */
export async function tookVolumeResult(
  tx: Queries,
  host: string,
  order: VolumeOrder,
  { error, made, saved }: OrderResult,
  job: string | null,
): Promise<void> {
  let end: JobEnd = error ? { error } : { result: {} };
  if (order.kind === 'make-volume') {
    if (made) await addVersion(tx, { id: order.volume, reference: order.reference, ...made });
    // What the caller said is at fault does not get better.
    const hopeless = error !== undefined && ['bad-request', 'not-found', 'denied'].includes(error.code);
    if (error) await tx.run('UPDATE volumes SET reason = ? WHERE id = ?', error.message, order.volume);
    // Else the next round asks again.
    if (hopeless) await tx.run('UPDATE volumes SET failed = 1 WHERE id = ?', order.volume);
  }
  if (order.kind === 'save-volume') {
    for (const one of saved ?? []) if (one.id === order.volume) await addVersion(tx, one);
    if (error) await tx.run('UPDATE volumes SET reason = ? WHERE id = ?', error.message, order.volume);
    else if (order.last) {
      await tx.run(
        'UPDATE volumes SET unsaved = 0, reason = NULL WHERE id = ? AND host = ?',
        order.volume,
        host,
      );
    }
    if (saved?.[0]?.reference !== undefined) end = { result: { version: saved[0].reference } };
  }
  if (job !== null) await endJob(tx, job, end);
}

/** With a checkpoint of the VM. `suspended`: nobody writes from here on. */
export async function tookSaves(
  tx: Queries,
  asked: readonly VolumeSave[] = [],
  saved: readonly SavedVolume[] = [],
  suspended: boolean,
): Promise<void> {
  for (const one of saved) {
    if (!asked.some(({ id }) => id === one.id)) continue;
    await addVersion(tx, one);
    if (suspended) await tx.run('UPDATE volumes SET unsaved = 0, reason = NULL WHERE id = ?', one.id);
  }
}

async function addVersion(tx: Queries, saved: SavedVolume): Promise<void> {
  const { id, reference, manifest, storedBytes } = saved;
  if (reference === undefined || manifest === undefined) return;
  const [volume] = await tx.all<VolumeRow>('SELECT * FROM volumes WHERE id = ?', id);
  const known = await tx.all('SELECT version FROM volume_versions WHERE reference = ?', reference);
  if (!volume || known.length > 0) return;
  await tx.run(
    `INSERT INTO volume_versions (volume, version, reference, manifest, size_bytes, stored_bytes, created_ms)
     VALUES (?, ?, ?, ?, ?, ?, ?)`,
    ...[id, volume.version + 1, reference, manifest, volume.size_bytes, storedBytes, Date.now()],
  );
  await tx.run(
    'UPDATE volumes SET version = version + 1, manifest = ?, stored_bytes = stored_bytes + ? WHERE id = ?',
    ...[manifest, storedBytes, id],
  );
}

/** Orders what volumes wait for: to be made, or to be saved where their writer is gone. True when it gave some. */
export async function orderVolumes(db: Database): Promise<boolean> {
  const waiting = await db.all<{ id: string }>(
    `SELECT id FROM volumes WHERE removed_ms IS NULL AND ((manifest IS NULL AND failed = 0) OR (unsaved = 1 AND (writer IS NULL
       OR writer IN (SELECT id FROM vms WHERE state = 'requested'))))`,
  );
  let given = false;
  for (const { id } of waiting) {
    given = (await db.transaction((tx) => orderFor(tx, id))) || given;
  }
  return given;
}

async function orderFor(tx: Queries, id: string): Promise<boolean> {
  const [volume] = await tx.all<VolumeRow>('SELECT * FROM volumes WHERE id = ?', id);
  if (!volume) return false;
  const [lately] = await tx.all(
    `SELECT o.id FROM orders o WHERE o.vm IS NULL AND o.kind IN ('make-volume', 'save-volume') AND o.id LIKE ?
       AND (o.state = 'open' OR (o.state = 'failed' AND o.created_ms > ?)) LIMIT 1`,
    ...[`${id}.%`, Date.now() - AGAIN_MS],
  );
  if (lately) return false;
  const up = (await tx.all<{ id: string }>(`SELECT id FROM hosts WHERE state = 'up' ORDER BY id`)).map(
    (host) => host.id,
  );
  if (volume.manifest !== null) {
    if (!up.includes(volume.host!)) return false;
    await orderSave(tx, volume, true, null);
    return true;
  }
  const host = up[Math.floor(Math.random() * up.length)];
  if (host === undefined) return false;
  const reference = nextVersion(volume);
  await giveOrder(tx, host, null, {
    id: `${id}.make.${reference.split('.')[1]}`,
    kind: 'make-volume',
    volume: id,
    reference,
    sizeBytes: volume.size_bytes,
    ...(volume.made_from === null ? {} : { from: volume.made_from }),
  });
  return true;
}

/** The clone that a host has of it is of no use any more. */
export async function forgetClone(tx: Queries, volume: VolumeRow): Promise<void> {
  if (volume.host !== null) await orderDrop(tx, volume.host, volume.id);
  await tx.run('UPDATE volumes SET host = NULL, unsaved = 0 WHERE id = ?', volume.id);
}
