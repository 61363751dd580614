/**
 * Why a resumed machine's QEMU is started through a line of Perl.
 *
 * QEMU asks for huge pages for all guest memory (madvise(2) with MADV_HUGEPAGE, softmmu/physmem.c) and has no option
 * against it. Where that memory is a file, the kernel then answers every fault with a read of 4 MiB around the page
 * (VM_HUGEPAGE in do_sync_mmap_readahead, mm/filemap.c; no read-ahead setting of the mount counts): a guest that
 * touches 14 MB had all of its memory fetched, 140 MB. Pages that it writes are small ones either way, for the mapping
 * is private. So that one call is answered with EINVAL, by a seccomp filter that only this process has. QEMU takes no
 * note of the answer.
 *
 * Perl, because something has to set the filter between fork and exec: Node offers nothing there, a second Node
 * takes as long to start as a tenth of a resume, setpriv has --seccomp-filter from util-linux 2.40 on only, and
 * perl-base is an essential package of Debian. Where there is none, QEMU starts as it is.
 */
import { readFile } from 'node:fs/promises';
import { MOUNTINFO, mountOf, parseMountinfo } from '../../core/mountinfo.ts';
import { READ_WORDS, Spare } from '../../core/spare.ts';
import { findProgram } from '../program.ts';

/** Of the kernel's headers: prctl and madvise in asm/unistd.h, the architecture in linux/audit.h. */
const NUMBERS: Partial<Record<NodeJS.Architecture, { prctl: number; madvise: number; audit: number }>> = {
  x64: { prctl: 157, madvise: 28, audit: 0xc000_003e },
  arm64: { prctl: 167, madvise: 233, audit: 0xc000_00b7 },
};

/**
 * The filter (linux/filter.h, linux/seccomp.h): another architecture, another call or another advice than 14 is
 * allowed. PR_SET_NO_NEW_PRIVS (38) lets users other than root set it; QEMU's own sandbox does that too. A kernel
 * without seccomp starts the program all the same.
 */
const FILTER = `
my ($prctl, $madvise, $audit) = splice @ARGV, 0, 3;
my $filter = join '', map { pack 'SCCL', @$_ } (
  [0x20, 0, 0, 4], [0x15, 0, 5, $audit], [0x20, 0, 0, 0], [0x15, 0, 3, $madvise],
  [0x20, 0, 0, 32], [0x15, 0, 1, 14], [0x06, 0, 0, 0x00050016], [0x06, 0, 0, 0x7fff0000]);
syscall($prctl, 38, 1, 0, 0, 0);
syscall($prctl, 22, 2, pack 'Sx![J]P', length($filter) / 8, $filter);
`;
const EXEC = 'exec { $words[0] } @words or die "$words[0]: $!\\n";';
const SCRIPT = `${FILTER} my @words = @ARGV; ${EXEC}`;
/** The words: where to be at home, what to write to, program and arguments. */
const SPARE_SCRIPT = `${READ_WORDS}
my ($home, $log) = splice @words, 0, 2;
open STDIN, '<', '/dev/null' and open STDOUT, '>>', $log and open STDERR, '>&', *STDOUT or exit 1;
chdir $home or die "$home: $!\\n";
${FILTER} ${EXEC}`;

export interface CommandLine {
  readonly program: string;
  readonly args: readonly string[];
}

/**
 * Whether somebody has to be asked for what is read of a file: on a disk, 4 MiB at a time are as well. Nothing is asked of
 * the file itself (as statfs(2) does): it may be on a mount of this very process, which answers with the help of the
 * threads that would wait for it. Four resumes at once waited for ever.
 */
export async function isOnFuse(file: string): Promise<boolean> {
  const mount = mountOf(file, parseMountinfo(await readFile(MOUNTINFO, 'utf8')));
  return mount !== undefined && /^fuse(\.|$)/.test(mount.type);
}

const numbers = NUMBERS[process.arch];
/** Processes that become QEMU, as `withSmallFaults` has it: told to by `tellWords` with folder, log, program, arguments. */
export const smallFaultsSpare =
  numbers && new Spare(SPARE_SCRIPT, [numbers.prctl, numbers.madvise, numbers.audit].map(String));

/** The same program, as the same process, but for huge pages. */
export async function withSmallFaults(program: string, args: readonly string[]): Promise<CommandLine> {
  const perl = numbers && (await findProgram('perl'));
  if (!numbers || perl === undefined) return { program, args };
  const { prctl, madvise, audit } = numbers;
  return {
    program: perl,
    args: ['-e', SCRIPT, '--', ...[prctl, madvise, audit].map(String), program, ...args],
  };
}
