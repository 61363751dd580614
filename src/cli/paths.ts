/**
 * Where things lie. Root: /var/cache, /var/lib, /run, /etc. Users: the XDG base directories. Everything of one
 * proxy is found by its name, which comes from the mount point unless it is given: /mnt/grid → "mnt-grid".
 */
import os from 'node:os';
import path from 'node:path';
import { sha256 } from '../core/bytes.ts';
import { isName } from '../core/manifest.ts';
import { isRoot } from '../core/linux.ts';
import { GridError } from '../core/errors.ts';

/** unix(7): sun_path without its final zero byte. */
const SOCKET_PATH_BYTES_MAX = 107;

export interface ProxyPaths {
  readonly name: string;
  /** Chunks of images: may be thrown away. */
  readonly cache: string;
  /** Clones: must be kept. */
  readonly state: string;
  /** Sockets and process ids: gone at reboot. */
  readonly runtime: string;
}

function xdg(variable: string, fallback: string): string {
  const value = process.env[variable];
  return value !== undefined && path.isAbsolute(value) ? value : path.join(os.homedir(), fallback);
}

export function cacheRoot(): string {
  return isRoot() ? '/var/cache/gridvfs' : path.join(xdg('XDG_CACHE_HOME', '.cache'), 'gridvfs');
}

export function stateRoot(): string {
  return isRoot() ? '/var/lib/gridvfs' : path.join(xdg('XDG_STATE_HOME', '.local/state'), 'gridvfs');
}

export function runtimeRoot(): string {
  if (process.env['GRIDVFS_RUNTIME_DIR']) return process.env['GRIDVFS_RUNTIME_DIR'];
  if (isRoot()) return '/run/gridvfs';
  const runtime = process.env['XDG_RUNTIME_DIR'];
  return runtime !== undefined
    ? path.join(runtime, 'gridvfs')
    : path.join(os.tmpdir(), `gridvfs-${os.userInfo().uid}`);
}

export function configPath(): string {
  return isRoot()
    ? '/etc/gridvfs/gridvfs.toml'
    : path.join(xdg('XDG_CONFIG_HOME', '.config'), 'gridvfs', 'gridvfs.toml');
}

/** Longer names would not leave room for the sockets below the runtime folder. */
const NAME_LENGTH_DERIVED_MAX = 40;

/** "/mnt/grid" → "mnt-grid"; characters that a name cannot have become "_". Where that loses something (such a
 * character, upper case, a long path), the start of the path's SHA-256 keeps names of different paths apart. */
export function nameOfMountpoint(mountpoint: string): string {
  const whole = path.resolve(mountpoint);
  const plain = whole.slice(1).replaceAll('/', '-');
  if (plain === '') return 'root';
  const start = /^[^a-z0-9]+/;
  const name = plain
    .toLowerCase()
    .replaceAll(/[^a-z0-9._-]/g, '_')
    .replace(start, '');
  if (name === plain && name.length <= NAME_LENGTH_DERIVED_MAX) return name;
  const tail = name.slice(-(NAME_LENGTH_DERIVED_MAX - 9)).replace(start, '');
  const mark = sha256(Buffer.from(whole)).slice(0, 8);
  return tail === '' ? mark : `${tail}-${mark}`;
}

export function proxyPaths(
  name: string,
  overrides: { cacheDir?: string; stateDir?: string } = {},
): ProxyPaths {
  if (!isName(name)) {
    throw new GridError(
      'bad-request',
      `'${String(name)}' cannot be a proxy's name: use lower-case letters, digits, '.', '-' and '_'`,
    );
  }
  const runtime = path.join(runtimeRoot(), name);
  const room = SOCKET_PATH_BYTES_MAX - Buffer.byteLength(path.join(runtime, 'control.sock'));
  if (room < 0) {
    throw new GridError(
      'bad-request',
      `the path of the proxy's sockets, ${runtime}, is ${-room} bytes too long: give a shorter --name, or a shorter XDG_RUNTIME_DIR`,
    );
  }
  return {
    name,
    cache: path.resolve(overrides.cacheDir ?? path.join(cacheRoot(), name)),
    state: path.resolve(overrides.stateDir ?? path.join(stateRoot(), name)),
    runtime,
  };
}
