/**
 * Chunks of a memory image that are on this host, brought into the kernel's pages of the mount while QEMU starts: a guest
 * that goes on touches one page after the other, and each that the kernel does not have is a request to the mount, with
 * the guest waiting. Here they are large requests, beside a start that has other things to wait for.
 *
 * In a process of its own, not in ours: whoever waits for our mount cannot be ended while nobody answers, and a
 * daemon that cannot die keeps its successor waiting. (FUSE_NOTIFY_STORE waits in the same way, for pages of which a
 * neighbour is being fetched.) One line of Perl, as in src/vmm/qemu/page-faults.ts: a second Node is ready when the
 * guest has long gone on. Where there is no Perl, nothing is read ahead.
 */
import { PassThrough } from 'node:stream';
import type { ByteRange } from '../core/bytes.ts';
import { MIB } from '../core/limits.ts';
import { READ_WORDS, Spare, startPerl, tellWords } from '../core/spare.ts';
import type { Perl } from '../core/spare.ts';

/** Of one file. */
export interface PagesAhead {
  /** These bytes are on this host: reading them waits for no link. */
  here(this: void, range: ByteRange): void;
  /** No more will come. */
  finish(): void;
  /** Nobody needs them any more. Idempotent. */
  stop(): void;
  /** Resolves when the file is closed. */
  readonly ended: Promise<void>;
}

/** fadvise64 in the kernel's asm/unistd.h. */
const FADVISE: Partial<Record<NodeJS.Architecture, number>> = { x64: 221, arm64: 223 };
/** A few turns of the event loop. */
const SPAWN_MS = 3;
/** Of one VM, at most: more than a guest touches before anybody could notice the difference. */
const TOTAL_BYTES_MAX = 256 * MIB;

/** POSIX_FADV_RANDOM: what is asked for is read as it is, in requests as large as the mount takes, and nothing beside it. */
const SCRIPT = `
my ($fadvise) = @ARGV;
${READ_WORDS}
my ($name) = @words;
open(my $file, '<:raw', $name) or exit 1;
syscall($fadvise, fileno($file), 0, 0, 1);
while (my $line = <STDIN>) {
  my ($at, $left) = split ' ', $line;
  sysseek($file, $at, 0);
  while ($left > 0) {
    my $got = sysread($file, my $bytes, $left > 1048576 ? 1048576 : $left) or last;
    $left -= $got;
  }
}
`;

const ARGUMENTS = [String(FADVISE[process.arch])];
const spare = new Spare(SCRIPT, ARGUMENTS);

/** The next start need not wait for a process. */
export function prepareToReadPages(): void {
  if (FADVISE[process.arch] !== undefined) spare.prepare();
}

/** Begins to read `file`, which is on our own mount. Says nothing of failures: the guest's own reads will say why. */
export function readPagesAhead(file: string): PagesAhead {
  if (FADVISE[process.arch] === undefined)
    return { here() {}, finish() {}, stop() {}, ended: Promise.resolve() };
  const over = Promise.withResolvers<void>();
  const input = new PassThrough();
  let child: Perl | undefined;
  const begin = (reader: Perl) => {
    reader.on('error', () => over.resolve()); // no Perl here
    reader.on('exit', () => over.resolve());
    reader.stdin.on('error', () => undefined); // it has ended
    tellWords(reader, [file]);
    input.pipe(reader.stdin);
    child = reader;
  };
  const ready = spare.take();
  if (ready) begin(ready);
  // Starting a process holds this one up for some milliseconds: what the start asks of the link first goes out before.
  const timer = ready ? undefined : setTimeout(() => begin(startPerl(SCRIPT, ARGUMENTS)), SPAWN_MS);
  let leftBytes = TOTAL_BYTES_MAX;
  let next: { startBytes: number; endBytes: number } | undefined;
  const flush = () => {
    if (next) input.write(`${next.startBytes} ${next.endBytes - next.startBytes}\n`);
    next = undefined;
  };
  return {
    here({ startBytes, endBytes }) {
      leftBytes -= endBytes - startBytes;
      if (leftBytes < 0) return;
      if (next?.endBytes === startBytes) {
        next.endBytes = endBytes;
        return;
      }
      // Chunks that come together go as one request where they lie side by side.
      if (next) flush();
      else setImmediate(flush);
      next = { startBytes, endBytes };
    },
    finish() {
      setImmediate(() => {
        flush();
        input.end();
      });
    },
    stop() {
      clearTimeout(timer);
      child?.kill('SIGKILL');
      if (!child) over.resolve();
    },
    ended: over.promise,
  };
}
