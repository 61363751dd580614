/**
 * Images as the broker knows them: what the hosts' sources offer, who owns a name, who may use it, what is
 * deprecated. An image without an owner is everybody's; one with an owner is seen by its owner, those it is shared
 * with, and operators.
 */
import { GridError } from '../core/errors.ts';
import { CHECKPOINT_IMAGE } from '../core/grid.ts';
import type { OfferedVersion } from '../core/grid.ts';
import type { Principal } from './access.ts';
import type { Database, Queries, Value } from './database.ts';
import type { VersionCandidate } from './policies/versions.ts';

export interface ImageInfo extends Omit<VersionCandidate, 'warmBytes'> {
  readonly kind: string;
  readonly sizeBytes: number;
  readonly owner?: string;
  readonly parent?: string;
  /** Hosts whose source offers it, that are up. */
  readonly hosts: number;
}

/** SQL that holds for images that `principal` may use; `i` is the images table. */
function visible(principal: Principal): { sql: string; values: Value[] } {
  if (principal.role === 'operator') return { sql: '1 = 1', values: [] };
  return {
    sql: `(i.owner IS NULL OR i.owner = ?
           OR EXISTS (SELECT 1 FROM image_shares s WHERE s.image = i.name AND s.user_name = ?))`,
    values: [principal.user, principal.user],
  };
}

/** Replaces what `host` offers. */
export async function takeOffers(
  db: Queries,
  host: string,
  versions: readonly OfferedVersion[],
): Promise<void> {
  await db.run('DELETE FROM host_versions WHERE host = ?', host);
  for (const one of versions) {
    // What a broker's VMs were suspended to is nobody's to start but their own.
    if (CHECKPOINT_IMAGE.test(one.name)) continue;
    await db.run(
      'INSERT INTO images (name, created_ms) VALUES (?, ?) ON CONFLICT (name) DO NOTHING',
      ...[one.name, Date.now()],
    );
    const [known] = await db.all<{ manifest: string }>(
      'SELECT manifest FROM versions WHERE image = ? AND version = ?',
      ...[one.name, one.version],
    );
    if (known?.manifest !== one.manifest) {
      await db.run(
        `INSERT INTO versions (image, version, manifest, kind, size_bytes, parent, created) VALUES (?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT (image, version) DO UPDATE SET manifest = excluded.manifest, kind = excluded.kind,
           size_bytes = excluded.size_bytes, parent = excluded.parent, created = excluded.created`,
        ...[one.name, one.version, one.manifest, one.kind, one.sizeBytes, one.parent ?? null, one.created],
      );
      await db.run('DELETE FROM labels WHERE image = ? AND version = ?', one.name, one.version);
      for (const [name, value] of Object.entries(one.labels)) {
        await db.run(
          'INSERT INTO labels (image, version, name, value) VALUES (?, ?, ?, ?)',
          ...[one.name, one.version, name, value],
        );
      }
    }
    await db.run(
      'INSERT INTO host_versions (host, image, version) VALUES (?, ?, ?) ON CONFLICT DO NOTHING',
      ...[host, one.name, one.version],
    );
  }
}

/** Notes that `principal` makes a new version: the image becomes its own, unless it is already. Throws denied, exists. */
export async function claimVersion(
  tx: Queries,
  principal: Principal,
  name: string,
  version: string,
): Promise<void> {
  const [image] = await tx.all<{ owner: string | null }>('SELECT owner FROM images WHERE name = ?', name);
  if (!image) {
    await tx.run(
      'INSERT INTO images (name, owner, created_ms) VALUES (?, ?, ?)',
      ...[name, principal.user, Date.now()],
    );
    return;
  }
  if (image.owner !== principal.user && principal.role !== 'operator') {
    throw new GridError('denied', `an image '${name}' is there and is not yours; choose another name`);
  }
  const known = await tx.all('SELECT version FROM versions WHERE image = ? AND version = ?', name, version);
  if (known.length > 0) throw new GridError('exists', `image '${name}' has a version '${version}' already`);
}

/** Versions that `principal` may use. */
export async function listImages(db: Queries, principal: Principal): Promise<ImageInfo[]> {
  const { sql, values } = visible(principal);
  const rows = await db.all<{
    image: string;
    version: string;
    manifest: string;
    kind: string;
    size_bytes: number;
    parent: string | null;
    created: string;
    deprecated: string | null;
    owner: string | null;
    hosts: number;
  }>(
    `SELECT v.*, i.owner, (SELECT count(*) FROM host_versions o JOIN hosts h ON h.id = o.host
       WHERE o.image = v.image AND o.version = v.version AND h.state = 'up') AS hosts
     FROM versions v JOIN images i ON i.name = v.image WHERE ${sql} ORDER BY v.image, v.version`,
    ...values,
  );
  const labels = await db.all<{ image: string; version: string; name: string; value: string }>(
    `SELECT l.* FROM labels l JOIN images i ON i.name = l.image WHERE ${sql}`,
    ...values,
  );
  const byVersion = new Map<string, Record<string, string>>();
  for (const { image, version, name, value } of labels) {
    const key = `${image}:${version}`;
    const known = byVersion.get(key) ?? {};
    known[name] = value;
    byVersion.set(key, known);
  }
  return rows.map((row) => ({
    image: row.image,
    version: row.version,
    manifest: row.manifest,
    kind: row.kind,
    sizeBytes: row.size_bytes,
    created: row.created,
    labels: byVersion.get(`${row.image}:${row.version}`) ?? {},
    hosts: row.hosts,
    ...(row.parent === null ? {} : { parent: row.parent }),
    ...(row.deprecated === null ? {} : { deprecated: row.deprecated }),
    ...(row.owner === null ? {} : { owner: row.owner }),
  }));
}

export interface ImageChange {
  /** Takes an image that is everybody's for oneself (operators: gives it to a user), or back with null. */
  readonly owner?: string | null;
  readonly share?: readonly string[];
  readonly unshare?: readonly string[];
  /** What to use instead, by version; null: good again. */
  readonly deprecate?: Readonly<Record<string, string | null>>;
}

/** Only the owner of an image and operators change it. Throws not-found also for images that one may not see. */
export async function changeImage(
  db: Database,
  principal: Principal,
  name: string,
  change: ImageChange,
): Promise<void> {
  await db.transaction(async (tx) => {
    const { sql, values } = visible(principal);
    const [image] = await tx.all<{ owner: string | null }>(
      `SELECT i.owner FROM images i WHERE i.name = ? AND ${sql}`,
      ...[name, ...values],
    );
    if (!image)
      throw new GridError('not-found', `there is no image '${name}'; \`gridvfs broker images\` lists them`);
    if (principal.role !== 'operator' && image.owner !== principal.user) {
      throw new GridError('denied', `image '${name}' is not yours: its owner or an operator can change it`);
    }
    if (change.owner !== undefined) {
      if (principal.role !== 'operator')
        throw new GridError('denied', 'only an operator gives an image to somebody');
      await tx.run('UPDATE images SET owner = ? WHERE name = ?', change.owner, name);
    }
    for (const user of change.share ?? []) {
      await tx.run(
        'INSERT INTO image_shares (image, user_name) VALUES (?, ?) ON CONFLICT DO NOTHING',
        ...[name, user],
      );
    }
    for (const user of change.unshare ?? []) {
      await tx.run('DELETE FROM image_shares WHERE image = ? AND user_name = ?', name, user);
    }
    for (const [version, reason] of Object.entries(change.deprecate ?? {})) {
      const changed = await tx.run(
        'UPDATE versions SET deprecated = ? WHERE image = ? AND version = ?',
        ...[reason, name, version],
      );
      if (changed === 0) throw new GridError('not-found', `image '${name}' has no version '${version}'`);
    }
  });
}
