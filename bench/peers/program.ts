/**
 * Other people's programs as a bench runs them: started in a process group of their own (Ctrl-C on the terminal
 * reaches only the bench, which stops them in order), known to be ready by a look at what they make, ended by
 * SIGTERM or by what ends them properly, their last words kept for the message when they fail.
 */
import { execFile, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { GridError } from '../../src/core/errors.ts';

const READY_TIMEOUT_MS = 30_000;
const END_TIMEOUT_MS = 5_000;
const LOOK_INTERVAL_MS = 20;

export interface ProgramOptions {
  /** The program and its arguments. */
  readonly command: readonly string[];
  readonly environment?: Record<string, string>;
  readonly isReady: () => Promise<boolean> | boolean;
  /** Instead of SIGTERM: unmounting, say. */
  readonly end?: () => Promise<void>;
}

export interface Program {
  readonly pid: number;
  /** Resolves when it is gone. Idempotent. */
  stop(): Promise<void>;
}

/** Starts a program and resolves when it is ready; a failed start leaves nothing and throws its last words. */
export async function startProgram(options: ProgramOptions): Promise<Program> {
  const [program, ...args] = options.command;
  const child = spawn(program!, args, {
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...options.environment },
  });
  let words = '';
  const hear = (part: Buffer) => (words = (words + part.toString('utf8')).slice(-2000));
  child.stdout.on('data', hear);
  child.stderr.on('data', hear);
  let failure: Error | undefined;
  let gone = false;
  const ended = new Promise<void>((resolve) => {
    const end = () => {
      gone = true;
      resolve();
    };
    child.once('error', (error) => {
      failure = error;
      end();
    });
    child.once('exit', end);
  });
  const endsWithin = async (ms: number) => {
    const timer = new AbortController();
    const late = sleep(ms, undefined, { signal: timer.signal }).catch(() => undefined);
    await Promise.race([ended, late]);
    timer.abort();
    return gone;
  };
  let stopping: Promise<void> | undefined;
  const stop = () =>
    (stopping ??= (async () => {
      if (gone) return;
      if (options.end) await options.end();
      else child.kill('SIGTERM');
      if (await endsWithin(END_TIMEOUT_MS)) return;
      child.kill('SIGKILL');
      await ended;
    })());
  const deadlineMs = performance.now() + READY_TIMEOUT_MS;
  while (!(await options.isReady())) {
    if (gone || performance.now() > deadlineMs) {
      if (!gone) child.kill('SIGKILL');
      await ended;
      const why = failure?.message ?? words.trim().split('\n').slice(-3).join(' / ');
      throw new GridError('local-io', `${program} did not start: ${why || 'it said nothing'}`);
    }
    await sleep(LOOK_INTERVAL_MS);
  }
  return { pid: child.pid!, stop };
}

/** Runs a program to its end; throws with its last words when it fails. Aborting ends it. */
export function runProgram(command: readonly string[], signal?: AbortSignal): Promise<string> {
  const [program, ...args] = command;
  return new Promise((resolve, reject) => {
    execFile(
      program!,
      args,
      { maxBuffer: 16 * 1024 * 1024, ...(signal === undefined ? {} : { signal }) },
      (error, stdout, stderr) => {
        if (error === null) resolve(stdout);
        else {
          const why = stderr.trim().split('\n').slice(-3).join(' / ') || error.message;
          reject(new GridError('local-io', `${program} failed: ${why}`, { cause: error }));
        }
      },
    );
  });
}

export function isMounted(mountpoint: string): boolean {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .some((line) => line.split(' ')[4] === mountpoint);
}

/** Unmounts what a FUSE program has mounted; lazily when it is still in use. */
export async function unmountFuse(mountpoint: string): Promise<void> {
  if (!isMounted(mountpoint)) return;
  await runProgram(['fusermount3', '-u', mountpoint]).catch(() =>
    runProgram(['fusermount3', '-u', '-z', mountpoint]),
  );
}

/** As somebody would type it. */
export function commandLine(command: readonly string[]): string {
  return command.map((word) => (/^[\w@%+=:,./~-]+$/.test(word) ? word : `'${word}'`)).join(' ');
}
