/**
 * What the recipes need of the host: programs run to their end with the reason when they fail, Debian packages
 * downloaded and unpacked without installing them, and an ext4 disk made from a folder without mounting anything.
 */
import { spawn } from 'node:child_process';
import { createReadStream } from 'node:fs';
import { mkdir, readdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { isAllZero, sha256Stream } from '../../src/core/bytes.ts';
import { errnoOf, GridError } from '../../src/core/errors.ts';
import { MIB } from '../../src/core/limits.ts';

/** The time that everything in a guest bears, so that the same packages give the same disk. */
export const EPOCH_SECONDS = 1_750_000_000;

export interface BuildContext {
  /** Everything made on the way goes below it; the builder removes it. */
  readonly temporary: string;
  readonly signal: AbortSignal;
  /** One line about what is being done. */
  readonly progress: (line: string) => void;
}

const WHERE: Record<string, string> = {
  mke2fs: 'e2fsprogs',
  debugfs: 'e2fsprogs',
  'dpkg-deb': 'dpkg',
  'apt-get': 'apt (the guest is made of Debian packages: build it on Debian)',
  mmdebstrap: 'mmdebstrap',
  'dpkg-query': 'dpkg',
};

/**
 * Runs a program and returns what it printed. Throws unsupported where it is not installed, closed when aborted
 * (after it has ended), local-io with its last words when it fails.
 */
export async function run(
  context: Pick<BuildContext, 'signal'>,
  program: string,
  args: readonly string[],
  options: { cwd?: string; env?: Record<string, string>; input?: string } = {},
): Promise<string> {
  context.signal.throwIfAborted();
  const child = spawn(program, args, {
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    env: {
      ...process.env,
      LC_ALL: 'C.UTF-8',
      PATH: `${process.env['PATH']}:/usr/sbin:/sbin`,
      ...options.env,
    },
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  const stop = () => void child.kill('SIGTERM');
  context.signal.addEventListener('abort', stop, { once: true });
  try {
    const output: Buffer[] = [];
    let last = '';
    child.stdout.on('data', (bytes: Buffer) => void output.push(bytes));
    child.stderr.on('data', (bytes: Buffer) => (last = (last + bytes.toString()).slice(-2000)));
    child.stdin.on('error', () => undefined);
    child.stdin.end(options.input ?? '');
    const code = await new Promise<number | string>((resolve, reject) => {
      child.on('error', (error) => {
        const missing = errnoOf(error) === 'ENOENT';
        const text = missing
          ? `${program} is not installed; it is in the Debian package ${WHERE[program] ?? program}`
          : `cannot run ${program}: ${error.message}`;
        reject(new GridError(missing ? 'unsupported' : 'local-io', text, { cause: error }));
      });
      child.on('close', (status, signal) => resolve(signal ?? status ?? 0));
    });
    context.signal.throwIfAborted();
    if (code !== 0) {
      const words = last.trim().split('\n').slice(-3).join(' / ');
      throw new GridError('local-io', `${program} failed (${code}): ${words || 'it said nothing'}`);
    }
    return Buffer.concat(output).toString();
  } finally {
    context.signal.removeEventListener('abort', stop);
  }
}

/**
 * Downloads Debian packages with the host's apt configuration and unpacks them below `folder`; returns their
 * versions by name. Where the host's package lists are missing or stale, lists of our own are fetched into the
 * temporary folder: nothing on the host changes and no privilege is needed.
 */
export async function unpackPackages(
  context: BuildContext,
  names: (apt: (args: readonly string[]) => Promise<string>) => Promise<readonly string[]>,
  folder: string,
): Promise<Record<string, string>> {
  const downloads = path.join(context.temporary, 'packages');
  await mkdir(downloads, { recursive: true });
  const fetchWith = async (aptOptions: readonly string[]) => {
    const apt = (args: readonly string[]) =>
      run(context, args[0]!, [...aptOptions, ...args.slice(1)], { cwd: downloads });
    await apt(['apt-get', '-q', '-o', 'APT::Sandbox::User=root', 'download', ...(await names(apt))]);
  };
  try {
    await fetchWith([]);
  } catch (error) {
    context.signal.throwIfAborted();
    if (error instanceof GridError && error.code === 'unsupported') throw error;
    context.progress('fetching fresh package lists (those of this host did not do)');
    const state = path.join(context.temporary, 'apt');
    await mkdir(path.join(state, 'lists/partial'), { recursive: true });
    await mkdir(path.join(state, 'cache/archives/partial'), { recursive: true });
    const own = ['-o', `Dir::State::lists=${state}/lists`, '-o', `Dir::Cache=${state}/cache`];
    await run(context, 'apt-get', [...own, '-q', '-o', 'APT::Sandbox::User=root', 'update']);
    await fetchWith(own);
  }
  const versions: Record<string, string> = {};
  for (const file of (await readdir(downloads)).filter((each) => each.endsWith('.deb')).toSorted()) {
    const whole = path.join(downloads, file);
    const [name, version] = (await run(context, 'dpkg-deb', ['-W', whole])).trim().split('\t');
    versions[name!] = version!;
    await run(context, 'dpkg-deb', ['-x', whole, folder]);
  }
  return versions;
}

/**
 * An ext4 file system (journal on, no partition table) of `sizeBytes` with the content of `folder`, as a sparse
 * file. The UUID and the hash seed are `uuid`; the times in it are EPOCH_SECONDS, so it depends on the content
 * alone.
 */
export async function makeDisk(
  context: BuildContext,
  disk: string,
  folder: string,
  options: { sizeBytes: number; label: string; uuid: string; journalBytes: number },
): Promise<void> {
  const env = { E2FSPROGS_FAKE_TIME: String(EPOCH_SECONDS) };
  // Not lazily: otherwise the guest's kernel writes the inode tables in the background of its first boot.
  const extended = `hash_seed=${options.uuid},lazy_itable_init=0,lazy_journal_init=0,nodiscard`;
  const args = ['-q', '-F', '-t', 'ext4', '-b', '4096', '-m', '0', '-L', options.label, '-U', options.uuid];
  const journal = ['-J', `size=${options.journalBytes / MIB}`, '-E', extended];
  await run(context, 'mke2fs', [...args, ...journal, '-d', folder, disk, `${options.sizeBytes / 1024}k`], {
    env,
  });
  // mke2fs 1.47.0 copies the change and access times of the files on this host; give them ours.
  const inodes = await run(context, 'debugfs', ['-R', 'stats', disk], { env });
  const total = Number(/Inode count:\s+(\d+)/.exec(inodes)?.[1] ?? 0);
  const free = Number(/Free inodes:\s+(\d+)/.exec(inodes)?.[1] ?? 0);
  const lines: string[] = [];
  for (let inode = 11; inode <= total - free; inode++) {
    for (const field of ['atime', 'ctime', 'mtime', 'crtime']) {
      lines.push(`set_inode_field <${inode}> ${field} @${EPOCH_SECONDS}`);
      lines.push(`set_inode_field <${inode}> ${field}_extra 0`);
    }
  }
  const script = path.join(context.temporary, 'times');
  await writeFile(script, lines.join('\n') + '\n');
  await run(context, 'debugfs', ['-w', '-f', script, disk], { env });
  await rm(script);
  // mke2fs leaves zeros and reserved blocks behind; the copy has neither.
  await run(context, 'cp', ['--sparse=always', disk, `${disk}.sparse`]);
  await rename(`${disk}.sparse`, disk);
}

/** SHA-256 of a file, its size, and the bytes of those of its 4 KiB blocks that are not all zero. */
export async function measure(
  file: string,
): Promise<{ sha256: string; sizeBytes: number; nonzeroBytes: number }> {
  const digest = sha256Stream();
  let sizeBytes = 0;
  let nonzeroBytes = 0;
  // A stream's pieces are full but for the last, so blocks do not straddle them.
  for await (const piece of createReadStream(file, { highWaterMark: MIB }) as AsyncIterable<Buffer>) {
    digest.update(piece);
    sizeBytes += piece.length;
    for (let at = 0; at < piece.length; at += 4096) {
      const block = piece.subarray(at, at + 4096);
      if (!isAllZero(block)) nonzeroBytes += block.length;
    }
  }
  return { sha256: digest.digest(), sizeBytes, nonzeroBytes };
}
