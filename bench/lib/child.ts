/** Programs that a bench starts: the `gridvfs` command of this checkout, servers that say where they listen. */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import path from 'node:path';
import { createInterface } from 'node:readline';

const ROOT = path.resolve(import.meta.dirname, '..', '..');

/** Runs a verb of gridvfs to its end and gives its JSON; throws with its last words when it fails. In a process group of
 * its own: a second Ctrl-C must not end the unmounting that the first began. */
export async function gridvfs<T>(args: readonly string[], signal?: AbortSignal): Promise<T> {
  const child = spawn(process.execPath, [path.join(ROOT, 'src', 'main.ts'), ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
    ...(signal === undefined ? {} : { signal, killSignal: 'SIGTERM' }),
  });
  let output = '';
  let errors = '';
  child.stdout.on('data', (part: Buffer) => (output += part.toString('utf8')));
  child.stderr.on('data', (part: Buffer) => (errors = (errors + part.toString('utf8')).slice(-4000)));
  const code = await exitOf(child);
  if (code !== 0) {
    throw new Error(
      `gridvfs ${args.slice(0, 2).join(' ')} failed (${code}): ${errors.trim().split('\n').at(-1) ?? ''}`,
    );
  }
  return JSON.parse(output) as T;
}

export interface Service {
  /** The JSON line it printed when it was ready. */
  readonly ready: Record<string, unknown>;
  readonly pid: number;
  /** Writes a line to its standard input and gives the JSON line it answers with. One at a time. */
  ask(line: string): Promise<Record<string, unknown>>;
  /** SIGTERM, and its end. */
  stop(): Promise<void>;
}

/** Starts a program that prints one JSON line when it is ready. It gets a process group of its own, so that
 * Ctrl-C on the terminal reaches only the bench, which then stops everything in order. `descriptors` are its 3, 4, … */
export async function startService(
  program: string,
  args: readonly string[],
  descriptors: readonly number[] = [],
): Promise<Service> {
  const child = spawn(process.execPath, [path.join(ROOT, program), ...args], {
    stdio: ['pipe', 'pipe', 'inherit', ...descriptors],
    detached: true,
  });
  const ended = exitOf(child);
  // It may be gone when it is asked; `next` says so.
  child.stdin!.on('error', () => undefined);
  const lines = createInterface({ input: child.stdout! })[Symbol.asyncIterator]();
  const next = async (): Promise<Record<string, unknown>> => {
    const { value, done } = await lines.next();
    if (done) throw new Error(`${program} ${args[0] ?? ''} ended (${await ended}) before it answered`);
    return JSON.parse(value) as Record<string, unknown>;
  };
  return {
    ready: await next(),
    pid: child.pid!,
    ask(line) {
      child.stdin!.write(`${line}\n`);
      return next();
    },
    async stop() {
      child.kill('SIGTERM');
      await ended;
    },
  };
}

function exitOf(child: ChildProcess): Promise<number | string> {
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('exit', (code, signal) => resolve(code ?? signal ?? 'unknown'));
  });
}
