/** qemu-img as a child process: started, cancelled, its words kept. What an exit code means is the caller's. */
import { spawn } from 'node:child_process';
import { asGridError, errnoOf, GridError } from '../core/errors.ts';
import { MIB } from '../core/limits.ts';

export interface QemuImgResult {
  readonly code: number;
  /** The signal that ended it, where one did. */
  readonly killedBy: string | undefined;
  readonly stdout: string;
  readonly stderr: string;
}

/** What qemu-img says is a page; of more we keep the beginning. */
const OUTPUT_CHARS_MAX = 1 * MIB;

/**
 * Runs qemu-img to its end. `doing` is for messages: "the import of /x". Throws unsupported (it is not installed),
 * closed (cancelled; it has ended then), local-io (it cannot be started).
 */
export function runQemuImg(
  args: readonly string[],
  doing: string,
  signal: AbortSignal | undefined,
  onOutput?: (piece: string) => void,
): Promise<QemuImgResult> {
  return new Promise((resolve, reject) => {
    const cancelled = () => new GridError('closed', `${doing} was cancelled`);
    if (signal?.aborted) return reject(cancelled());
    const child = spawn('qemu-img', args, {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, LC_ALL: 'C' },
    });
    let stdout = '';
    let stderr = '';
    child.stdout.setEncoding('utf8').on('data', (piece: string) => {
      if (stdout.length < OUTPUT_CHARS_MAX) stdout += piece;
      onOutput?.(piece);
    });
    child.stderr.setEncoding('utf8').on('data', (piece: string) => {
      if (stderr.length < OUTPUT_CHARS_MAX) stderr += piece;
    });
    const kill = () => child.kill('SIGKILL');
    signal?.addEventListener('abort', kill, { once: true });
    child.on('error', (error) => {
      signal?.removeEventListener('abort', kill);
      reject(
        errnoOf(error) === 'ENOENT'
          ? new GridError(
              'unsupported',
              `${doing} needs qemu-img, for what is not raw, and it is not there: install the Debian package qemu-utils`,
              { cause: error },
            )
          : asGridError(error, 'cannot run qemu-img'),
      );
    });
    child.on('close', (code, killedBy) => {
      signal?.removeEventListener('abort', kill);
      if (signal?.aborted) reject(cancelled());
      else resolve({ code: code ?? -1, killedBy: killedBy ?? undefined, stdout, stderr });
    });
  });
}

/** The share that is done, 0 to 1, in a piece of output: with -p it writes "    (12.34/100%)\r", over and over. */
export function shareDone(piece: string): number | undefined {
  const percent = [...piece.matchAll(/\(([\d.]+)\/100%\)/g)].at(-1)?.[1];
  return percent === undefined ? undefined : Number(percent) / 100;
}

/** The first error names the place; what follows repeats it or tells of its consequences. */
export function firstLine({ stdout, stderr }: QemuImgResult): string {
  const lines = (stderr.trim() || stdout.trim()).split('\n').filter((line) => line.trim() !== '');
  return lines[0]?.replace(/^qemu-img: /, '') ?? 'it gave no reason';
}
