/** The database as a PostgreSQL server, so that it can lie elsewhere and be backed up by those who do that already. */
import pg from 'pg';
import type { PoolClient, QueryResult } from 'pg';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import type { Database, Queries, Value } from './database.ts';

const CONNECTIONS_MAX = 8;
const CONNECT_TIMEOUT_MS = 10_000;
/** A transaction that lost against others this often met something else. */
const ATTEMPTS_MAX = 50;
/** SQLSTATE of serialization_failure and deadlock_detected: nothing happened, try again. */
const CONFLICTS = new Set(['40001', '40P01']);

// bigint (oid 20) and numeric (1700: sums of them) as numbers: all of ours are below 2^53.
const types = {
  getTypeParser: (oid: number, format?: 'text' | 'binary') =>
    oid === 20 || oid === 1700 ? Number : pg.types.getTypeParser(oid, format),
};

/** `?` → `$1`, `$2`, …; no statement of ours has a question mark in a literal. */
const numbered = (sql: string) => {
  let count = 0;
  return sql.replaceAll('?', () => `$${++count}`);
};

type Send = (sql: string, values: Value[]) => Promise<QueryResult>;

function queriesOver(send: Send): Queries {
  return {
    async all<T extends object>(sql: string, ...values: Value[]): Promise<T[]> {
      return (await send(numbered(sql), values)).rows as T[];
    },
    async run(sql, ...values) {
      return (await send(numbered(sql), values)).rowCount ?? 0;
    },
  };
}

export async function openPostgres(url: string): Promise<Database> {
  let pool: pg.Pool;
  try {
    pool = new pg.Pool({
      connectionString: url,
      max: CONNECTIONS_MAX,
      connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
      types,
    });
  } catch (error) {
    throw new GridError('bad-request', 'the database URL is malformed; write postgres://user@host/name', {
      cause: error,
    });
  }
  // An idle connection that breaks is replaced by the next query; without a listener it would end the process.
  pool.on('error', () => {});
  const failed = (error: unknown) => asGridError(error, 'the database failed', 'unreachable');
  const plain = queriesOver((sql, values) =>
    pool.query(sql, values).catch((error: unknown) => {
      throw failed(error);
    }),
  );
  try {
    await pool.query('SELECT 1');
  } catch (error) {
    await pool.end();
    throw asGridError(error, 'cannot reach the database', 'unreachable');
  }

  const attempt = async <T>(client: PoolClient, work: (queries: Queries) => Promise<T>): Promise<T> => {
    await client.query('BEGIN ISOLATION LEVEL SERIALIZABLE');
    try {
      const result = await work(queriesOver((sql, values) => client.query(sql, values)));
      await client.query('COMMIT');
      return result;
    } catch (error) {
      await client.query('ROLLBACK').catch(() => undefined);
      throw error;
    }
  };
  return {
    dialect: 'postgres',
    ...plain,
    async transaction(work) {
      for (let attempts = 1; ; attempts++) {
        const client = await pool.connect().catch((error: unknown) => {
          throw failed(error);
        });
        let broken = false;
        try {
          return await attempt(client, work);
        } catch (error) {
          const sqlState = errnoOf(error) ?? '';
          broken = !(error instanceof GridError) && !/^[0-9A-Z]{5}$/.test(sqlState);
          if (attempts >= ATTEMPTS_MAX || !CONFLICTS.has(sqlState)) throw failed(error);
        } finally {
          client.release(broken);
        }
      }
    },
    close: () => pool.end(),
  };
}
