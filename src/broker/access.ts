/**
 * Who may do what. A token is `gvt_<id>_<secret>`: the id finds its row, the secret is kept only as its SHA-256
 * (256 random bits need no slow hash). Roles: `user` asks for VMs and sees its own; `operator` sees and does
 * everything and makes tokens; `agent` speaks for hosts and may do nothing else.
 */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import { GridError } from '../core/errors.ts';
import { isName } from '../core/manifest.ts';
import type { Database } from './database.ts';

export const ROLES = ['user', 'operator', 'agent'] as const;
export type Role = (typeof ROLES)[number];

export interface Principal {
  readonly user: string;
  readonly role: Role;
}

export interface TokenInfo {
  readonly id: string;
  readonly user: string;
  readonly role: Role;
  readonly created: string;
  readonly revoked?: string;
}

const TOKEN = /^gvt_([0-9a-f]{12})_([A-Za-z0-9_-]{43})$/;

const hashOf = (secret: string) => createHash('sha256').update(secret).digest('hex');

export class Access {
  readonly #db: Database;

  constructor(db: Database) {
    this.#db = db;
  }

  /** The only moment at which the token can be seen. */
  async create(user: string, role: Role): Promise<{ token: string; info: TokenInfo }> {
    if (!isName(user)) throw new GridError('bad-request', `'${String(user)}' cannot be a user's name`);
    const id = randomBytes(6).toString('hex');
    const secret = randomBytes(32).toString('base64url');
    const nowMs = Date.now();
    await this.#db.transaction(async (db) => {
      await db.run(
        'INSERT INTO users (name, created_ms) VALUES (?, ?) ON CONFLICT (name) DO NOTHING',
        user,
        nowMs,
      );
      await db.run(
        'INSERT INTO tokens (id, user_name, role, hash, created_ms) VALUES (?, ?, ?, ?, ?)',
        ...[id, user, role, hashOf(secret), nowMs],
      );
    });
    return { token: `gvt_${id}_${secret}`, info: { id, user, role, created: new Date(nowMs).toISOString() } };
  }

  /** Throws denied for a token that is malformed, unknown, wrong or revoked, without saying which. */
  async authenticate(token: string): Promise<Principal> {
    const match = TOKEN.exec(token);
    const [row] = match
      ? await this.#db.all<{ user_name: string; role: Role; hash: string }>(
          'SELECT user_name, role, hash FROM tokens WHERE id = ? AND revoked_ms IS NULL',
          match[1]!,
        )
      : [];
    if (!match || !row || !timingSafeEqual(Buffer.from(hashOf(match[2]!)), Buffer.from(row.hash))) {
      throw new GridError('denied', 'the token is not valid here; `gridvfs broker token create` makes one');
    }
    return { user: row.user_name, role: row.role };
  }

  async list(): Promise<TokenInfo[]> {
    const rows = await this.#db.all<{
      id: string;
      user_name: string;
      role: Role;
      created_ms: number;
      revoked_ms: number | null;
    }>('SELECT id, user_name, role, created_ms, revoked_ms FROM tokens ORDER BY created_ms, id');
    return rows.map((row) => ({
      id: row.id,
      user: row.user_name,
      role: row.role,
      created: new Date(row.created_ms).toISOString(),
      ...(row.revoked_ms === null ? {} : { revoked: new Date(row.revoked_ms).toISOString() }),
    }));
  }

  async revoke(id: string): Promise<void> {
    const changed = await this.#db.run(
      'UPDATE tokens SET revoked_ms = ? WHERE id = ? AND revoked_ms IS NULL',
      ...[Date.now(), id],
    );
    if (changed === 0) throw new GridError('not-found', `there is no token '${id}' that could be revoked`);
  }

  /** Whether nobody can do anything here yet. */
  async isEmpty(): Promise<boolean> {
    return (await this.#db.all('SELECT id FROM tokens LIMIT 1')).length === 0;
  }
}
