/**
 * A QEMU process, whether this process started it or an earlier one did. Of one that was adopted nobody hears how it
 * ended, only that it did.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { open } from 'node:fs/promises';
import path from 'node:path';
import { tellWords } from '../../core/spare.ts';
import type { Perl } from '../../core/spare.ts';
import { lastWords } from '../console.ts';
import type { Exit, RunningProcess } from '../process.ts';
import { QEMU_LOG } from './command-line.ts';
import type { CommandLine } from './page-faults.ts';

/** Starts QEMU in a session of its own, at home in `folder`, its words in `qemu.log` there; `spare` becomes it, where there
 * is one. */
export async function startProcess(
  { program, args }: CommandLine,
  folder: string,
  onError: (message: string) => void,
  spare?: Perl,
): Promise<RunningProcess> {
  const log = path.join(folder, QEMU_LOG);
  const output = await open(log, 'w', 0o600);
  try {
    const child =
      spare ??
      spawn(program, args, {
        cwd: folder,
        detached: true,
        stdio: ['ignore', output.fd, output.fd],
        env: { PATH: process.env['PATH'], LC_ALL: 'C' },
      });
    if (spare) {
      tellWords(spare, [folder, log, program, ...args]);
      spare.stdin.end();
    }
    let exit: Exit | undefined;
    // From the first moment: it may be gone again before the next line of this function runs.
    const exited = new Promise<Exit>((resolve) => {
      child.once('exit', (...how: [number | null, NodeJS.Signals | null]) => resolve((exit = how)));
    });
    if (!spare) await once(child, 'spawn');
    child.on('error', (error) => onError(error.message));
    return {
      pid: child.pid!,
      get exit() {
        return exit;
      },
      exited,
      kill: () => void child.kill('SIGKILL'),
      look: () => undefined,
    };
  } finally {
    await output.close();
  }
}

/** Some of its errors have a second line that explains. */
const QEMU_LINES = 2;

/** What QEMU said last, without its name and without the option's text, which can be long JSON. */
export async function qemuWords(folder: string): Promise<string> {
  const words = await lastWords(path.join(folder, QEMU_LOG), QEMU_LINES);
  return words.replaceAll(/qemu-system-\w+: (?:-\w+ \{.*?\}: )?/g, '');
}
