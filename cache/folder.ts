/**
 * The cache's folder: who may use it, what it must contain, and the small whole files in it. One process at a
 * time (flock on `lock`, which names the holder); folders and files that turn out to be symbolic links are
 * refused or replaced, never followed. Whole files appear by rename; only the format file is synced, because all
 * others are checked when they are read (digest or parse) and can be fetched again.
 */
import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import { asGridError, errnoOf, GridError } from '../src/core/errors.ts';
import { tryLock } from '../src/core/linux.ts';

const FORMAT = 'gridvfs-cache';
const VERSION = 1;
const FORMAT_FILE = 'gridvfs-cache.json';
const LOCK_FILE = 'lock';
const SUBFOLDERS = ['manifests', 'tables', 'images', 'profiles'] as const;
/** What a folder may hold and still be turned into a cache: the root of a disk of its own, a first start that died. */
const HARMLESS = new Set(['lost+found', LOCK_FILE]);
/** Unfinished files and folders carry this prefix; the next start removes them. */
export const UNFINISHED = '.new-';

let unfinishedCount = 0;

export class CacheFolder {
  readonly folder: string;
  readonly #lockFd: number;

  private constructor(folder: string, lockFd: number) {
    this.folder = folder;
    this.#lockFd = lockFd;
  }

  /** Makes or opens a cache folder and locks it. Throws in-use, bad-format, newer-format, no-space, local-io. */
  static open(folder: string): CacheFolder {
    const doing = `cannot open cache folder ${folder}`;
    try {
      mkdirSync(folder, { recursive: true, mode: 0o700 });
    } catch (error) {
      throw asGridError(error, doing);
    }
    const known = checkFormat(folder);
    const lockFd = lockFolder(folder);
    try {
      for (const name of SUBFOLDERS) ensureFolder(path.join(folder, name));
      if (!known) {
        replaceFileDurably(
          path.join(folder, FORMAT_FILE),
          Buffer.from(JSON.stringify({ format: FORMAT, version: VERSION }) + '\n'),
        );
      }
      for (const name of ['', ...SUBFOLDERS]) removeUnfinished(path.join(folder, name));
      return new CacheFolder(folder, lockFd);
    } catch (error) {
      closeSync(lockFd);
      throw asGridError(error, doing);
    }
  }

  path(...names: string[]): string {
    return path.join(this.folder, ...names);
  }

  /** Gives the folder to the next process. */
  close(): void {
    closeSync(this.#lockFd);
  }
}

/** Whether the folder is a cache already; false for one that may become a cache. */
function checkFormat(folder: string): boolean {
  const bytes = readWhole(path.join(folder, FORMAT_FILE), 4096);
  if (bytes === undefined) {
    const foreign = readdirSync(folder).filter(
      (name) =>
        !HARMLESS.has(name) && !name.startsWith(UNFINISHED) && !SUBFOLDERS.some((known) => known === name),
    );
    if (foreign.length > 0) {
      throw new GridError(
        'bad-format',
        `${folder} is not empty and not a gridvfs cache (it holds '${foreign[0]}'); name an empty or new folder`,
      );
    }
    return false;
  }
  let raw: { format?: unknown; version?: unknown };
  try {
    raw = JSON.parse(bytes.toString()) as typeof raw;
  } catch (cause) {
    throw new GridError(
      'bad-format',
      `${path.join(folder, FORMAT_FILE)} is damaged; remove the cache folder`,
      {
        cause,
      },
    );
  }
  if (raw?.format !== FORMAT || typeof raw.version !== 'number') {
    throw new GridError('bad-format', `${folder} is not a gridvfs cache; name an empty or new folder`);
  }
  if (raw.version !== VERSION) {
    throw new GridError(
      'newer-format',
      `cache folder ${folder} has version ${raw.version}, this gridvfs reads ${VERSION}; upgrade, or name another folder`,
    );
  }
  return true;
}

function lockFolder(folder: string): number {
  const file = path.join(folder, LOCK_FILE);
  let fd: number;
  try {
    fd = openSync(file, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600);
  } catch (error) {
    throw asGridError(error, `cannot open ${file}`);
  }
  try {
    if (!tryLock(fd)) {
      const holder = readFileSync(fd, 'utf8').trim();
      throw new GridError(
        'in-use',
        `cache folder ${folder} is held by process ${holder || 'unknown'}; stop it or name another folder`,
      );
    }
    ftruncateSync(fd, 0);
    try {
      writeSync(fd, `${process.pid}\n`, 0);
    } catch (error) {
      // The lock holds without its holder's name; a full disk is no reason to refuse.
      if (errnoOf(error) !== 'ENOSPC') throw error;
    }
    return fd;
  } catch (error) {
    closeSync(fd);
    throw asGridError(error, `cannot lock ${file}`);
  }
}

function ensureFolder(folder: string): void {
  try {
    mkdirSync(folder, { mode: 0o700 });
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') throw error;
    if (!lstatSync(folder).isDirectory()) {
      throw new GridError(
        'bad-format',
        `${folder} is not a folder (symbolic links are not followed in a cache)`,
      );
    }
  }
}

function removeUnfinished(folder: string): void {
  for (const name of readdirSync(folder)) {
    if (name.startsWith(UNFINISHED)) rmSync(path.join(folder, name), { recursive: true, force: true });
  }
}

/** A fresh name beside `file` that the next start removes if this process dies before it renames it. */
export function unfinishedPath(file: string): string {
  return path.join(path.dirname(file), `${UNFINISHED}${process.pid}-${++unfinishedCount}`);
}

/** Puts `bytes` at `file` in one step; a symbolic link there is replaced, not followed. Throws system errors. */
export function replaceFile(file: string, bytes: Uint8Array): void {
  const temporary = unfinishedPath(file);
  try {
    writeFileSync(temporary, bytes, { flag: 'wx', mode: 0o600 });
    renameSync(temporary, file);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
}

/** The same, on the disk when it returns: for what cannot be fetched again. */
export function replaceFileDurably(file: string, bytes: Uint8Array): void {
  const temporary = unfinishedPath(file);
  try {
    writeFileSync(temporary, bytes, { flag: 'wx', mode: 0o600, flush: true });
    renameSync(temporary, file);
    const folderFd = openSync(path.dirname(file), constants.O_RDONLY | constants.O_DIRECTORY);
    try {
      fsyncSync(folderFd);
    } finally {
      closeSync(folderFd);
    }
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
}

/** A regular file's bytes; undefined when it is not there, not a file of its own, or longer than `bytesMax`. */
export function readWhole(file: string, bytesMax: number): Buffer | undefined {
  let fd: number;
  try {
    fd = openSync(file, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    if (['ENOENT', 'ELOOP', 'ENOTDIR', 'ENXIO'].includes(errnoOf(error) ?? '')) return undefined;
    throw asGridError(error, `cannot read ${file}`);
  }
  try {
    const stat = fstatSync(fd);
    if (!stat.isFile() || stat.size > bytesMax) return undefined;
    return readFileSync(fd);
  } catch (error) {
    throw asGridError(error, `cannot read ${file}`);
  } finally {
    closeSync(fd);
  }
}
