/**
 * The database inside the process: node:sqlite, one file with a write-ahead log. One connection writes, one
 * transaction after the other; another reads what was committed, also while a transaction is under way.
 */
import { DatabaseSync } from 'node:sqlite';
import type { StatementSync } from 'node:sqlite';
import { asGridError } from '../core/errors.ts';
import type { Database, Queries, Value } from './database.ts';

/** Statements kept prepared: those of the program are fewer, composed queries come and go. */
const PREPARED_MAX = 200;

class Connection implements Queries {
  readonly #db: DatabaseSync;
  readonly #prepared = new Map<string, StatementSync>();

  constructor(db: DatabaseSync) {
    this.#db = db;
  }

  #prepare(sql: string): StatementSync {
    let statement = this.#prepared.get(sql);
    if (!statement) {
      statement = this.#db.prepare(sql);
      const oldest = this.#prepared.keys().next();
      if (this.#prepared.size >= PREPARED_MAX && !oldest.done) this.#prepared.delete(oldest.value);
      this.#prepared.set(sql, statement);
    }
    return statement;
  }

  async all<T extends object>(sql: string, ...values: Value[]): Promise<T[]> {
    return this.#prepare(sql).all(...values) as T[];
  }

  async run(sql: string, ...values: Value[]): Promise<number> {
    return Number(this.#prepare(sql).run(...values).changes);
  }
}

class Sqlite implements Database {
  readonly dialect = 'sqlite';
  readonly #writer: DatabaseSync;
  readonly #reader: DatabaseSync;
  readonly #writes: Connection;
  readonly #reads: Connection;
  /** The transaction that the next one waits for. */
  #last: Promise<unknown> = Promise.resolve();

  constructor(file: string) {
    this.#writer = new DatabaseSync(file, { timeout: 5_000 });
    try {
      // FULL: a transaction that was answered is there after a power loss.
      this.#writer.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON');
      this.#reader = new DatabaseSync(file, { readOnly: true, timeout: 5_000 });
    } catch (error) {
      this.#writer.close();
      throw error;
    }
    this.#writes = new Connection(this.#writer);
    this.#reads = new Connection(this.#reader);
  }

  all<T extends object>(sql: string, ...values: Value[]): Promise<T[]> {
    return this.#reads.all<T>(sql, ...values);
  }

  run(sql: string, ...values: Value[]): Promise<number> {
    return this.transaction((queries) => queries.run(sql, ...values));
  }

  transaction<T>(work: (queries: Queries) => Promise<T>): Promise<T> {
    const mine = this.#last.then(async () => {
      this.#writer.exec('BEGIN IMMEDIATE');
      try {
        const result = await work(this.#writes);
        this.#writer.exec('COMMIT');
        return result;
      } catch (error) {
        if (this.#writer.isTransaction) this.#writer.exec('ROLLBACK');
        throw error;
      }
    });
    this.#last = mine.catch(() => undefined);
    return mine;
  }

  async close(): Promise<void> {
    await this.#last;
    this.#reader.close();
    this.#writer.close();
  }
}

export function openSqlite(file: string): Database {
  try {
    return new Sqlite(file);
  } catch (error) {
    throw asGridError(error, `cannot open the database ${file}`);
  }
}
