/**
 * A Perl that waits to be told what to do. To start a process costs 18 ms in one that is as large as a proxy, in which it
 * does nothing else (fork(2) copies its page tables), and each page that it writes after that is copied once; a start of
 * a machine takes two. So one is started when nobody waits, gets its task by a line, and the next is started later.
 *
 * It ends when this process does, for its standard input ends then, and keeps no process alive. Where there is no Perl,
 * there is no spare.
 */
import { spawn } from 'node:child_process';
import type { ChildProcessByStdio } from 'node:child_process';
import type { Socket } from 'node:net';
import type { Writable } from 'node:stream';

export type Perl = ChildProcessByStdio<Writable, null, null>;

/** When a start is over in which one was taken. */
const AGAIN_MS = 2_000;

/** In a session of its own: it may become something that lives on. */
export function startPerl(script: string, args: readonly string[]): Perl {
  return spawn('perl', ['-e', script, '--', ...args], {
    detached: true,
    stdio: ['pipe', 'ignore', 'ignore'],
    env: { PATH: process.env['PATH'], LC_ALL: 'C' },
  });
}

/** Words for a script that begins with READ_WORDS. */
export function tellWords(perl: Perl, words: readonly string[]): void {
  const all = words.map((word) => Buffer.from(word));
  perl.stdin.write(Buffer.concat([Buffer.from(`${all.map(({ length }) => length).join(' ')}\n`), ...all]));
}

/** Perl: waits for them, and has them in @words. */
export const READ_WORDS = `
my $lengths = <STDIN> // exit;
my @words = map { my $word = ''; read STDIN, $word, $_ if $_; $word } split ' ', $lengths;
`;

export class Spare {
  readonly #script: string;
  readonly #args: readonly string[];
  #perl: Perl | undefined;

  constructor(script: string, args: readonly string[]) {
    this.#script = script;
    this.#args = args;
  }

  /** Has one ready, from now on. */
  prepare(): void {
    if (this.#perl) return;
    const perl = startPerl(this.#script, this.#args);
    const gone = () => {
      if (this.#perl === perl) this.#perl = undefined;
    };
    perl.on('error', gone);
    perl.on('exit', gone);
    perl.stdin.on('error', () => undefined);
    if (perl.pid === undefined) return;
    perl.unref();
    (perl.stdin as Socket).unref();
    this.#perl = perl;
  }

  /** The one that is ready; undefined where there is none. */
  take(): Perl | undefined {
    const perl = this.#perl;
    if (!perl) return undefined;
    this.#perl = undefined;
    perl.ref();
    (perl.stdin as Socket).ref();
    setTimeout(() => this.prepare(), AGAIN_MS).unref();
    return perl;
  }
}
