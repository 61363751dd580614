/**
 * A shell command in a guest, with its exit code and output: by the QEMU guest agent where the guest has one (label
 * `boot.agent=qemu`), else on the root shell that its first serial console is (label `boot.shell=ttyS0`), typed in short
 * lines, because shells and terminals cut long ones. Standard output and error are one text, of which the last part is kept.
 */
import { randomBytes } from 'node:crypto';
import net from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { GridError } from '../core/errors.ts';
import type { GuestCommandResult } from '../core/grid.ts';
import type { Machine } from '../core/machine.ts';

/** Of the image: what of it takes commands. */
export const LABEL_SHELL = 'boot.shell';
const OUTPUT_BYTES_MAX = 16 * 1024;
const AGENT_CALL_MS = 20_000;
const POLL_MS = 100;
/** Typed again after this: the shell may have started only then. */
const AGAIN_MS = 3_000;
const LINE_LENGTH = 300;
const HEARD_MAX = 1024 * 1024;

/** The command is a file there, and what it says goes to another, of which the end is read. */
const runFile = (file: string) => `sh ${file} > ${file}.out 2>&1 < /dev/null`;
const tellOutput = (file: string) => `tail -c ${OUTPUT_BYTES_MAX} ${file}.out; rm -f ${file} ${file}.out`;

/** Throws unsupported (nothing in the guest takes commands), timeout, vm-failed. */
export async function runInGuest(
  machine: Machine,
  shell: string | undefined,
  command: string,
  timeoutMs: number,
): Promise<GuestCommandResult> {
  if (machine.description.guestAgent === true && machine.askAgent !== undefined)
    return byAgent(machine, command, timeoutMs);
  if (shell === 'ttyS0') return byShell(machine, command, timeoutMs);
  throw new GridError(
    'unsupported',
    'its image says of nothing in the guest that takes commands: a guest agent (label boot.agent=qemu) or a root shell on the console (boot.shell=ttyS0)',
  );
}

async function byAgent(machine: Machine, command: string, timeoutMs: number): Promise<GuestCommandResult> {
  const ask = (call: string, args: object) => machine.askAgent!(call, args, AGENT_CALL_MS);
  const endMs = performance.now() + timeoutMs;
  const file = `/tmp/.gridvfs-${randomBytes(6).toString('hex')}`;
  const started = async (): Promise<{ pid: number }> => {
    for (;;) {
      try {
        return (await ask('guest-exec', {
          path: '/bin/sh',
          arg: ['-c', `cat > ${file}; ${runFile(file)}; c=$?; ${tellOutput(file)}; exit $c`],
          'input-data': Buffer.from(`${command}\n`).toString('base64'),
          'capture-output': true,
        })) as { pid: number };
      } catch (error) {
        // It may come up after what says that the guest is ready.
        const early = error instanceof GridError && error.code === 'timeout' && performance.now() < endMs;
        if (!early) throw error;
      }
    }
  };
  const { pid } = await started();
  for (;;) {
    const status = (await ask('guest-exec-status', { pid })) as {
      exited: boolean;
      exitcode?: number;
      'out-data'?: string;
    };
    if (status.exited) {
      const output = Buffer.from(status['out-data'] ?? '', 'base64').toString('utf8');
      // No exit code where a signal ended it.
      return { exitCode: status.exitcode ?? -1, output };
    }
    if (performance.now() > endMs) throw late(timeoutMs);
    await sleep(POLL_MS);
  }
}

const late = (timeoutMs: number) =>
  new GridError('timeout', `the command did not end within ${timeoutMs} ms; it may still run`);

async function byShell(machine: Machine, command: string, timeoutMs: number): Promise<GuestCommandResult> {
  const mark = `gridvfs-${randomBytes(6).toString('hex')}`;
  const file = `/tmp/.${mark}`;
  const endMs = performance.now() + timeoutMs;
  const socket = net.connect(machine.consoleSocket);
  let heard = '';
  let gone: Error | undefined;
  let look = () => {};
  socket.on('data', (bytes: Buffer) => {
    heard = (heard + bytes.toString('latin1')).slice(-HEARD_MAX);
    look();
  });
  socket.on('error', () => undefined);
  socket.on('close', () => {
    gone = new GridError('vm-failed', 'the guest is gone');
    look();
  });
  /** Types a line until the shell says so; what is typed is echoed, so its mark is in two pieces there. */
  const type = (line: string, word: string, again: boolean) =>
    new Promise<RegExpExecArray>((resolve, reject) => {
      const say = () => socket.write(`${line}; echo ${mark}'-${word}' $?\n`);
      const repeat = again ? setInterval(say, AGAIN_MS) : undefined;
      const timer = setTimeout(
        () => settle(() => reject(late(timeoutMs))),
        Math.max(0, endMs - performance.now()),
      );
      const settle = (act: () => void) => {
        clearInterval(repeat);
        clearTimeout(timer);
        look = () => {};
        act();
      };
      look = () => {
        const found = new RegExp(`${mark}-${word} (\\d+)\\r*\\n`).exec(heard);
        if (found) settle(() => resolve(found));
        else if (gone) settle(() => reject(gone!));
      };
      say();
    });
  try {
    await type(`: > ${file}.64`, 'up', true);
    const text = Buffer.from(`${command}\n`).toString('base64');
    for (let at = 0; at < text.length; at += LINE_LENGTH)
      await type(`printf %s ${text.slice(at, at + LINE_LENGTH)} >> ${file}.64`, `at${at}`, false);
    await type(`base64 -d < ${file}.64 > ${file}; rm -f ${file}.64`, 'there', false);
    const { 1: exitCode } = await type(runFile(file), 'ran', false);
    await type(`echo ${mark}'-out'; ${tellOutput(file)}; echo`, 'end', false);
    const said = new RegExp(`${mark}-out\\r*\\n([^]*?)\\r*\\n${mark}-end `).exec(heard)?.[1] ?? '';
    const output = Buffer.from(said, 'latin1').toString('utf8').replaceAll(/\r+\n/g, '\n');
    return { exitCode: Number(exitCode), output };
  } finally {
    socket.destroy();
  }
}
