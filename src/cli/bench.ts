/**
 * gridvfs demo and gridvfs bench: they start the programs of bench/, which are run and never imported. A program's
 * options are its own (node:util parseArgs); their help is here.
 */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import path from 'node:path';
import type { Command } from 'commander';
import { GridError } from '../core/errors.ts';
import { isRoot } from '../core/linux.ts';
import { verb } from './kit.ts';

const LINK_HELP = `  --lan <rtt,rate>          the LAN link (default: 0.2ms,1gbit)
  --wan <rtt,rate>          the WAN link (default: 30ms,100mbit)
  --link packets|relay      packets: hosts are network namespaces, links carry packets (root; TCP's own windows and
                            slow start count); relay: a relay of bytes on loopback, for quick runs`;

const INSTANTIATE_HELP = `
Options:
  --guest small|debian      small: a few MiB, boots in seconds; debian: the full multi-user system (default: small)
  --runs <count>            rounds of local, LAN warm, WAN warm, interleaved (default: 23 of reboots, 13 of
                            resumes; demo and --quick: 5 of each)
  --cold-runs <count>       rounds of the cold starts (default: 3; demo and --quick: 1)
${LINK_HELP} (default: packets; demo: relay)
  --quick                   fewer runs: less than five minutes
  --no-application          leave out the application in the guest (the demo does)
  --no-full                 leave out the full copies (the demo does)
  --check                   fail when a promise is broken beyond the spread of the runs
  --json <file>             also write the record to this file`;

const IO_HELP = `
Options:
  --case boot|fuse          boot: a recorded boot replayed against gridvfs and its peers; fuse: the mount itself
                            (default: boot; the rest is for boot)
  --guest small|debian      whose boot (default: debian)
  --link <rtt,rate>         a link; may be given again (default: 30ms,100mbit and 150ms,50mbit)
  --runs <count>            rounds of gridvfs and the local file (default: 3)
  --peer-runs <count>       rounds of the peers (default: 1)
  --peers <names>           sshfs, rclone, nbdkit, scp, zstd|ssh, with commas; all; none (default: all)
  --no-profile              leave out the cold start with a profile
  --install                 install the peers' Debian packages that are missing
  --json <file>             also write the rows to this file`;

const PULL_HELP = `
Options:
  --cases <names>           whole, nolimit, fat, demand, with commas (default: all)
  --guest small|debian      whose disk (default: debian)
  --runs <count>            of gridvfs for each case (default: 3)
  --no-peers                leave out scp and rsync (\`whole\` takes four minutes with them)
  --json <file>             also write the rows to this file`;

const PEERS_HELP = `
Options:
  --guest small|debian      which guest starts (default: small)
  --runs <count>            rounds of everything, interleaved (default: 1)
  --peers <names>           sshfs, rclone, nbdkit, scp, zstd|ssh, qemu nbd, qemu ssh, with commas; all; none
                            (default: all)
  --links lan,wan           over which links (default: lan,wan)
${LINK_HELP} (default: packets)
  --install                 install the peers' Debian packages that are missing
  --json <file>             also write the record to this file`;

const SCALE_HELP = `
Options:
  --guest small|debian      which guest starts (default: small)
  --clones <counts>         clones at once on one host, or none (default: 1,2,4,8)
  --hosts <counts>          hosts at once behind one origin and one link, or none (default: 1,2,4)
  --wan <rtt,rate>          that link (default: 30ms,100mbit)
  --link packets|relay      as for instantiate; relay has one host (default: packets)
  --check                   fail when a promise is broken
  --json <file>             also write the record to this file`;

const ALL_HELP = `
Options:
  --out <folder>            where the records and report.html go (default: bench-results)
  --guest small|debian      which guest starts (default: small)
  --quick                   fewer runs of each
  --only <names>            instantiate, peers, scale, io, with commas (default: all four)`;

const REPORT_HELP = `
Options:
  --html <file>             the page (default: report.html)
  --pictures <folder>       also write each picture as an SVG file`;

const COMPARE_HELP = `
Options:
  --json <file>             also write the rows to this file`;

const BENCHES: Record<string, { file: string; summary: string; examples: string[]; help: string }> = {
  instantiate: {
    file: 'instantiate.ts',
    summary: "The field's founding table: reboot from local disk, LAN and WAN, cold and warm.",
    examples: [
      'gridvfs bench instantiate --guest debian --wan 80ms,50mbit --json rows.json',
      'gridvfs bench instantiate --quick --check',
    ],
    help: INSTANTIATE_HELP,
  },
  io: {
    file: 'io.ts',
    summary: 'A recorded boot replayed at full speed: gridvfs, the local file, and what hosts use today.',
    examples: [
      'gridvfs bench io --link 30ms,100mbit --json rows.json',
      'gridvfs bench io --guest small --peers sshfs,nbdkit',
    ],
    help: IO_HELP,
  },
  peers: {
    file: 'peers.ts',
    summary: 'The same starts through sshfs, rclone, nbdkit, QEMU, scp and gridvfs, on the same links.',
    examples: ['gridvfs bench peers --links wan --json peers.json', 'gridvfs bench peers --peers sshfs,scp'],
    help: PEERS_HELP,
  },
  scale: {
    file: 'scale.ts',
    summary: 'Many clones at once on one host, many hosts behind one origin, and what more would see.',
    examples: [
      'gridvfs bench scale --json scale.json',
      'gridvfs bench scale --clones 1,8 --hosts none --check',
    ],
    help: SCALE_HELP,
  },
  all: {
    file: 'all.ts',
    summary: 'All of them one after the other, and the report.',
    examples: ['gridvfs bench all --out results', 'gridvfs bench all --quick --only instantiate,scale'],
    help: ALL_HELP,
  },
  report: {
    file: 'report.ts',
    summary: 'Records as one HTML page with pictures.',
    examples: ['gridvfs bench report rows.json peers.json --html report.html --pictures pictures'],
    help: REPORT_HELP,
  },
  compare: {
    file: 'compare.ts',
    summary: 'Two records row by row; a verdict only where the difference exceeds the spread.',
    examples: ['gridvfs bench compare old.json new.json'],
    help: COMPARE_HELP,
  },
  pull: {
    file: 'pull.ts',
    summary: 'A whole image over long and fat links, and demand reads beside it.',
    examples: ['gridvfs bench pull --json rows.json', 'gridvfs bench pull --cases demand --guest small'],
    help: PULL_HELP,
  },
};

/** The programs run under the Node that runs us; Ctrl-C reaches both, and the program cleans up. */
async function runBench(
  file: string,
  args: readonly string[],
  as: 'bench' | 'demo' = 'bench',
): Promise<void> {
  const program = path.resolve(import.meta.dirname, '..', '..', 'bench', file);
  if (!existsSync(program)) throw new GridError('unsupported', `${program} is not part of this installation`);
  // What the program ends with after a signal is the signal, however it cleaned up.
  let stopped: number | undefined;
  process.on('SIGINT', () => (stopped = 130));
  const child = spawn(process.execPath, [program, ...args], {
    stdio: 'inherit',
    env: { ...process.env, GRIDVFS_BENCH_AS: as },
  });
  process.on('SIGTERM', () => {
    stopped = 143;
    child.kill('SIGTERM');
  });
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  child.on('error', reject);
  child.on('exit', (code, signal) => resolve(code ?? (signal === 'SIGINT' ? 130 : 143)));
  const code = await promise;
  process.exitCode = code === 0 ? 0 : (stopped ?? code);
}

function passThrough(command: Command, help: string, run: (args: string[]) => Promise<void>): Command {
  return command
    .argument('[options...]')
    .usage('[options]')
    .allowUnknownOption()
    .passThroughOptions()
    .addHelpText('after', help)
    .action((args: string[]) => {
      if (args.some((argument) => argument === '--help' || argument === '-h')) return command.help();
      return run(args);
    });
}

export function demoVerb(): Command {
  const summary = 'Boot a real guest from an image that was never copied: local, LAN and WAN, cold and warm.';
  const command = verb('demo', summary, ['gridvfs demo', 'gridvfs demo --guest debian --json rows.json']);
  return passThrough(command, INSTANTIATE_HELP, (args) => {
    if (isRoot()) return runBench('instantiate.ts', args, 'demo');
    throw new GridError(
      'unsupported',
      'the demo drops the page cache between starts, which needs root: use sudo, or `npm run demo`',
    );
  });
}

export function benchVerbs(): Command {
  const group = verb(
    'bench',
    'Measure on this host: cold and warm instantiation, disk I/O, scale, beside its peers.',
  ).enablePositionalOptions();
  for (const [name, { file, summary, examples, help }] of Object.entries(BENCHES)) {
    group.addCommand(passThrough(verb(name, summary, examples), help, (args) => runBench(file, args)));
  }
  return group;
}
