/**
 * The information service's database: SQL with `?` for parameters, on node:sqlite inside the process (the default)
 * or on PostgreSQL (`postgres://…`). Both get the same migrations and the same statements; what differs between the
 * two stays in sqlite.ts and postgres.ts. Values are never pasted into a statement.
 *
 * Transactions are serializable: one at a time in SQLite, and in PostgreSQL tried again when the server finds a
 * conflict, so `work` must do nothing but SQL.
 */
import { GridError } from '../core/errors.ts';
import { MIGRATIONS } from './migrations.ts';

export type Value = string | number | null;
export type Row = Record<string, Value>;

export interface Queries {
  /** Rows of a query. */
  all<T extends object = Row>(sql: string, ...values: Value[]): Promise<T[]>;
  /** Rows that a statement changed. */
  run(sql: string, ...values: Value[]): Promise<number>;
}

export interface Database extends Queries {
  readonly dialect: 'sqlite' | 'postgres';
  /** All of it or nothing; on disk when this resolves. */
  transaction<T>(work: (queries: Queries) => Promise<T>): Promise<T>;
  close(): Promise<void>;
}

/** `postgres://…`, or the path of a file, which is made. */
export async function openDatabase(where: string): Promise<Database> {
  const postgres = /^postgres(ql)?:\/\//.test(where);
  if (!postgres && /^[a-z][a-z0-9+]*:\/\//i.test(where)) {
    throw new GridError('bad-request', 'a database is the path of a file, or postgres://user@host/name');
  }
  const database = postgres
    ? await (await import('./postgres.ts')).openPostgres(where)
    : (await import('./sqlite.ts')).openSqlite(where);
  try {
    await migrate(database);
  } catch (error) {
    await database.close();
    throw error;
  }
  return database;
}

/** Applies what is missing, each migration in a transaction of its own that also counts it. */
async function migrate(database: Database): Promise<void> {
  await database.transaction(async (db) => {
    await db.run('CREATE TABLE IF NOT EXISTS migrations (number BIGINT PRIMARY KEY, applied TEXT NOT NULL)');
  });
  for (const [index, statements] of MIGRATIONS.entries()) {
    await database.transaction(async (db) => {
      const [last] = await db.all<{ number: number | null }>('SELECT max(number) AS number FROM migrations');
      const done = last?.number ?? 0;
      if (done > MIGRATIONS.length) {
        throw new GridError(
          'newer-format',
          `the database has schema ${done}; this gridvfs knows ${MIGRATIONS.length}`,
        );
      }
      if (done > index) return;
      for (const statement of statements) await db.run(statement);
      await db.run(
        'INSERT INTO migrations (number, applied) VALUES (?, ?)',
        index + 1,
        new Date().toISOString(),
      );
    });
  }
}
