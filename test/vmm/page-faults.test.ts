/** The one thing that a resumed machine's QEMU is refused, and that it is refused nothing else. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { test } from 'node:test';
import { promisify } from 'node:util';
import { withSmallFaults } from '../../src/vmm/qemu/page-faults.ts';

const run = promisify(execFile);

// mmap(2) of 4 MiB, then madvise(2) with MADV_HUGEPAGE (14), MADV_WILLNEED (3) and MADV_DONTFORK (10).
const ASKS = `
my $at = syscall(9, 0, 4194304, 3, 0x22, -1, 0);
for my $advice (14, 3, 10) { $! = 0; my $got = syscall(28, $at, 4194304, $advice); print "$advice: $got ", $! + 0, "; " }
`;

test(
  'of all advice on memory, only that for huge pages is refused',
  { skip: process.arch !== 'x64' },
  async () => {
    const plain = await run('perl', ['-e', ASKS]);
    assert.equal(plain.stdout, '14: 0 0; 3: 0 0; 10: 0 0; ');
    const { program, args } = await withSmallFaults('/usr/bin/perl', ['-e', ASKS]);
    const { stdout, stderr } = await run(program, [...args]);
    assert.equal(stdout, '14: -1 22; 3: 0 0; 10: 0 0; ');
    assert.equal(stderr, '');
  },
);

test('the program is the same process, with its arguments as they were', async () => {
  const words = [
    '-c',
    'echo $$; for word; do echo "<$word>"; done',
    'sh',
    '--',
    '-e',
    'a b',
    '{"json": "ünïcode"}',
  ];
  const { program, args } = await withSmallFaults('/bin/sh', words);
  const started = run(program, [...args]);
  const lines = (await started).stdout.trimEnd().split('\n');
  assert.deepEqual(lines, [String(started.child.pid), '<-->', '<-e>', '<a b>', '<{"json": "ünïcode"}>']);
});

test('a program that cannot be run says so by its name', async () => {
  const { program, args } = await withSmallFaults('/nowhere/qemu', []);
  await assert.rejects(run(program, [...args]), /\/nowhere\/qemu: No such file or directory/);
});
