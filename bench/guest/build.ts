/**
 * Builds the guests that demo, benches and tests boot: `node bench/guest/build.ts --guest small|debian --out FOLDER`.
 * A finished folder holds disk.raw (sparse ext4, no partition table), kernel, initrd and guest.json (`Guest`).
 *
 * It is built in a folder beside and renamed when whole, under a lock, so a half-made guest is never seen and two
 * builders do not collide. A folder whose `recipe` is that of this source code is used as it is, without a look
 * at the network. Progress goes to stderr. Ctrl-C leaves nothing.
 */
import { closeSync, fstatSync, openSync, readFileSync, rmSync, statSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { sha256 } from '../../src/core/bytes.ts';
import { asGridError, errnoOf, GridError } from '../../src/core/errors.ts';
import { isRoot, tryLock } from '../../src/core/linux.ts';
import { debian } from './debian.ts';
import { measure, type BuildContext } from './host.ts';
import { small } from './small.ts';

/** What a kind of guest is made of; `make` puts disk.raw, kernel and initrd into `folder` and returns versions. */
export interface Recipe {
  readonly name: string;
  readonly commandLine: string;
  readonly readyText: string;
  readonly memoryBytes: number;
  make(context: BuildContext, folder: string): Promise<Record<string, string>>;
}

const RECIPES = { small, debian };
export type GuestName = keyof typeof RECIPES;

/** guest.json. */
export interface Guest {
  readonly name: GuestName;
  /** Kernel command line: console on ttyS0, root read-write on /dev/vda. */
  readonly commandLine: string;
  /** The first serial console says a line with this text when the guest is ready. */
  readonly readyText: string;
  /** Memory that it needs to boot with ease. */
  readonly memoryBytes: number;
  readonly sha256: { readonly disk: string; readonly kernel: string; readonly initrd: string };
  /** Size of disk.raw. */
  readonly sizeBytes: number;
  /** Bytes of those 4 KiB blocks of disk.raw that are not all zero. */
  readonly nonzeroBytes: number;
  /** Versions by Debian package name. */
  readonly packages: Readonly<Record<string, string>>;
  /** SHA-256 of the source code that built it. */
  readonly recipe: string;
}

export interface BuiltGuest extends Guest {
  readonly folder: string;
  readonly disk: string;
  readonly kernel: string;
  readonly initrd: string;
  /** 'built' by this call, or 'reused'. */
  readonly result: 'built' | 'reused';
}

export interface BuildOptions {
  readonly guest: GuestName;
  /** Holds nothing else; made, and replaced when it holds a guest of another recipe. */
  readonly folder: string;
  readonly signal?: AbortSignal;
  readonly progress?: (line: string) => void;
}

/** Where guests are kept between runs: GRIDVFS_GUEST_CACHE, or /var/cache for root, or the user's cache folder. */
export function guestCacheFolder(): string {
  const given = process.env['GRIDVFS_GUEST_CACHE'];
  if (given !== undefined && given !== '') return path.resolve(given);
  if (isRoot()) return '/var/cache/gridvfs/guests';
  return path.join(process.env['XDG_CACHE_HOME'] || path.join(os.homedir(), '.cache'), 'gridvfs/guests');
}

/**
 * One digest per guest over the files of this folder that make it: whoever changes a recipe gets new guests. Taken
 * when the code is loaded, so that an edit meanwhile is not written down as what has been run.
 */
const RECIPE_DIGESTS = Object.fromEntries(
  Object.keys(RECIPES).map((name) => {
    const files = ['answer', 'build', 'host', 'initramfs', name].map(
      (file) => file + path.extname(import.meta.filename),
    );
    const texts = files.map((file) => readFileSync(path.join(import.meta.dirname, file)));
    return [name, sha256(Buffer.concat(texts))];
  }),
) as Record<GuestName, string>;

async function finished(folder: string, recipe: string): Promise<Guest | undefined> {
  try {
    const guest = JSON.parse(await readFile(path.join(folder, 'guest.json'), 'utf8')) as Guest;
    const size = statSync(path.join(folder, 'disk.raw')).size;
    return guest.recipe === recipe && size === guest.sizeBytes ? guest : undefined;
  } catch {
    return undefined;
  }
}

/** Refuses to replace a folder that is not ours. */
async function checkReplaceable(folder: string): Promise<void> {
  let names: string[];
  try {
    names = await readdir(folder);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return;
    throw asGridError(error, `cannot use ${folder}`);
  }
  if (names.length > 0 && !names.includes('guest.json')) {
    throw new GridError('exists', `${folder} holds something that is no guest; choose another folder`);
  }
}

/** Takes the lock file, waiting for another builder; the function returned removes and releases it. */
async function lock(file: string, context: Omit<BuildContext, 'temporary'>): Promise<() => void> {
  for (let waited = false; ; waited = true) {
    const fd = openSync(file, 'a');
    // Whoever held it removes it, so the file locked may be one that is gone already.
    if (tryLock(fd) && statSync(file, { throwIfNoEntry: false })?.ino === fstatSync(fd).ino) {
      return () => {
        rmSync(file, { force: true });
        closeSync(fd);
      };
    }
    closeSync(fd);
    if (!waited) context.progress('another builder is at work; waiting for it');
    await sleep(200, undefined, { signal: context.signal });
  }
}

/** Removes a folder that this builder made, unless something is still mounted in it. */
async function removeOwn(folder: string): Promise<void> {
  if (readFileSync('/proc/self/mountinfo', 'utf8').includes(` ${folder}/`)) {
    throw new GridError('in-use', `something is mounted below ${folder}; unmount it, then remove the folder`);
  }
  await rm(folder, { recursive: true, force: true });
}

/**
 * The guest in `options.folder`, built if it is not there yet. Throws unsupported (a program is not installed, or
 * not on Debian), local-io with the program's last words, exists (the folder holds something else), closed (aborted).
 */
export async function buildGuest(options: BuildOptions): Promise<BuiltGuest> {
  const folder = path.resolve(options.folder);
  const recipe = RECIPES[options.guest];
  const digest = RECIPE_DIGESTS[options.guest];
  const signal = options.signal ?? new AbortController().signal;
  const progress = (line: string) => options.progress?.(`guest ${recipe.name}: ${line}`);
  const of = (guest: Guest, result: BuiltGuest['result']): BuiltGuest => ({
    ...guest,
    folder,
    disk: path.join(folder, 'disk.raw'),
    kernel: path.join(folder, 'kernel'),
    initrd: path.join(folder, 'initrd'),
    result,
  });
  const found = await finished(folder, digest);
  if (found !== undefined) return of(found, 'reused');
  await checkReplaceable(folder);
  const parent = path.dirname(folder);
  try {
    await mkdir(parent, { recursive: true });
    const unlock = await lock(path.join(parent, `.${path.basename(folder)}.lock`), { signal, progress });
    try {
      const meanwhile = await finished(folder, digest);
      if (meanwhile !== undefined) return of(meanwhile, 'reused');
      const prefix = `.${path.basename(folder)}.making-`;
      // Only who holds the lock makes these, so any that is here was left by a builder that was killed.
      for (const name of (await readdir(parent)).filter((each) => each.startsWith(prefix))) {
        await removeOwn(path.join(parent, name));
      }
      const temporary = await mkdtemp(path.join(parent, prefix));
      try {
        const whole = path.join(temporary, 'guest');
        await mkdir(whole);
        const packages = await recipe.make({ temporary, signal, progress }, whole);
        progress('measuring');
        const disk = await measure(path.join(whole, 'disk.raw'));
        const guest: Guest = {
          name: options.guest,
          commandLine: recipe.commandLine,
          readyText: recipe.readyText,
          memoryBytes: recipe.memoryBytes,
          sha256: {
            disk: disk.sha256,
            kernel: (await measure(path.join(whole, 'kernel'))).sha256,
            initrd: (await measure(path.join(whole, 'initrd'))).sha256,
          },
          sizeBytes: disk.sizeBytes,
          nonzeroBytes: disk.nonzeroBytes,
          packages,
          recipe: digest,
        };
        await writeFile(path.join(whole, 'guest.json'), JSON.stringify(guest, null, 2) + '\n');
        signal.throwIfAborted();
        await removeOwn(folder);
        await rename(whole, folder);
        return of(guest, 'built');
      } finally {
        await removeOwn(temporary);
      }
    } finally {
      unlock();
    }
  } catch (error) {
    if (signal.aborted) throw new GridError('closed', `building the ${recipe.name} guest was cancelled`);
    throw asGridError(error, `cannot build the ${recipe.name} guest`);
  }
}

const USAGE = `usage: node bench/guest/build.ts [--guest small|debian] [--out FOLDER] [--json]

Builds a guest (disk.raw, kernel, initrd, guest.json) into FOLDER, or uses the one that is there.
Without --out it goes to the cache folder that tests and the demo use (${guestCacheFolder()}/GUEST).
`;

async function main(): Promise<number> {
  let values;
  try {
    ({ values } = parseArgs({
      options: {
        guest: { type: 'string', default: 'small' },
        out: { type: 'string' },
        json: { type: 'boolean', default: false },
        help: { type: 'boolean', default: false },
      },
    }));
  } catch (error) {
    process.stderr.write(`${(error as Error).message}\n${USAGE}`);
    return 2;
  }
  if (values.help) {
    process.stdout.write(USAGE);
    return 0;
  }
  if (!Object.hasOwn(RECIPES, values.guest)) {
    process.stderr.write(`no guest named ${values.guest}; there are ${Object.keys(RECIPES).join(' and ')}\n`);
    return 2;
  }
  const guest = values.guest as GuestName;
  const aborter = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => aborter.abort());
  try {
    const built = await buildGuest({
      guest,
      folder: values.out ?? path.join(guestCacheFolder(), guest),
      signal: aborter.signal,
      progress: (line) => process.stderr.write(line + '\n'),
    });
    if (values.json) process.stdout.write(JSON.stringify(built, null, 2) + '\n');
    else process.stdout.write(`${built.folder} (${built.result}, disk ${built.sha256.disk.slice(0, 12)})\n`);
    return 0;
  } catch (error) {
    process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
    return 1;
  }
}

if (import.meta.main) process.exitCode = await main();
