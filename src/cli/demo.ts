/** gridvfs demo and gridvfs bench: they start the programs of bench/, which are run and never imported. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import path from 'node:path';
import type { Command } from 'commander';
import { GridError } from '../core/errors.ts';
import { verb } from './kit.ts';

const INSTANTIATE_HELP = `
Options:
  --guest small|debian      small: a few MiB, boots in seconds; debian: the full multi-user system (default: small)
  --runs <count>            rounds of local, LAN warm, WAN warm, interleaved (default: 5)
  --lan <rtt,rate>          the LAN link (default: 0.2ms,1gbit)
  --wan <rtt,rate>          the WAN link (default: 30ms,100mbit)
  --json <file>             also write the rows to this file`;

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

/** The programs run under the Node that runs us; Ctrl-C reaches both, and the program cleans up. */
async function runBench(file: string, args: readonly string[]): Promise<void> {
  const program = path.resolve(import.meta.dirname, '..', '..', 'bench', file);
  if (!existsSync(program)) throw new GridError('unsupported', `${program} is not part of this installation`);
  const ignore = () => {};
  process.on('SIGINT', ignore);
  const child = spawn(process.execPath, [program, ...args], { stdio: 'inherit' });
  process.on('SIGTERM', () => child.kill('SIGTERM'));
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  child.on('error', reject);
  child.on('exit', (code, signal) => resolve(code ?? (signal === 'SIGINT' ? 130 : 143)));
  process.exitCode = await promise;
}

function passThrough(command: Command, file: string, help: string): Command {
  return command
    .argument('[options...]')
    .usage('[options]')
    .allowUnknownOption()
    .passThroughOptions()
    .addHelpText('after', help)
    .action((args: string[]) => runBench(file, args));
}

export function demoVerb(): Command {
  return passThrough(
    verb(
      'demo',
      'Boot a real guest from an image that was never copied: local, LAN and WAN, cold and warm.',
      ['gridvfs demo', 'gridvfs demo --guest debian --json rows.json'],
    ),
    'instantiate.ts',
    INSTANTIATE_HELP,
  );
}

export function benchVerbs(): Command {
  const group = verb(
    'bench',
    'Measure on this host: cold and warm instantiation, disk I/O beside its peers.',
  ).enablePositionalOptions();
  group.addCommand(
    passThrough(
      verb('instantiate', "The field's founding table: reboot from local disk, LAN and WAN, cold and warm.", [
        'gridvfs bench instantiate --guest debian --runs 7 --json rows.json',
      ]),
      'instantiate.ts',
      INSTANTIATE_HELP,
    ),
  );
  group.addCommand(
    passThrough(
      verb(
        'io',
        'A recorded boot replayed at full speed: gridvfs, the local file, and what hosts use today.',
        [
          'gridvfs bench io --link 30ms,100mbit --json rows.json',
          'gridvfs bench io --guest small --peers sshfs,nbdkit',
        ],
      ),
      'io.ts',
      IO_HELP,
    ),
  );
  group.addCommand(
    passThrough(
      verb('pull', 'A whole image over long and fat links, and demand reads beside it.', [
        'gridvfs bench pull --json rows.json',
        'gridvfs bench pull --cases demand --guest small',
      ]),
      'pull.ts',
      PULL_HELP,
    ),
  );
  return group;
}
