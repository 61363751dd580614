/**
 * A host and an image server on this machine, for tests that go through the real command: a temp folder with a
 * store, keys, and everything that a proxy keeps, all of it removed at the end. Operations on a mount are done by
 * child processes, never by the test's own thread.
 */
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { buildGuest, guestCacheFolder } from '../../bench/guest/build.ts';
import type { BuiltGuest } from '../../bench/guest/build.ts';
import { isRunning } from '../../src/core/linux.ts';
import { makeSshKey } from '../../proxy/ssh-key.ts';

const ROOT = path.resolve(import.meta.dirname, '..', '..');
const MAIN = path.join(ROOT, 'src', 'main.ts');

export interface Outcome {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface ServerHandle {
  readonly url: string;
  readonly fingerprint: string;
  readonly pid: number;
  stop(): Promise<void>;
}

/** What `gridvfs mount --json` says. */
export interface ProxyHandle {
  readonly pid: number;
  /** The proxy and its holder. */
  readonly processes: readonly { readonly pid: number }[];
  readonly runtime: string;
  readonly mountpoint: string;
}

/** What the tests look at of `cache status --json`. */
export interface CacheView {
  readonly images: readonly {
    readonly names: readonly string[];
    readonly touchedChunks: number;
    readonly missedChunks: number;
    readonly prefetchedChunks: number;
    readonly prefetchedUsedChunks: number;
  }[];
}

export class World {
  readonly folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-world-'));
  readonly store = path.join(this.folder, 'store');
  readonly mountpoint = path.join(this.folder, 'mnt');
  readonly identity = path.join(this.folder, 'id_ed25519');
  readonly authorizedKeys = path.join(this.folder, 'authorized_keys');
  readonly environment: NodeJS.ProcessEnv;
  /** Where servers listen. */
  listen = '127.0.0.1';
  readonly #services: ChildProcess[] = [];

  /** Another host with the same key. */
  static onSecondHost(first: World): World {
    const second = new World();
    copyFileSync(first.identity, second.identity);
    return second;
  }

  constructor() {
    mkdirSync(this.mountpoint);
    const keys = makeSshKey();
    writeFileSync(this.identity, keys.private, { mode: 0o600 });
    writeFileSync(this.authorizedKeys, keys.public + '\n');
    this.environment = { ...process.env, GRIDVFS_RUNTIME_DIR: path.join(this.folder, 'run') };
  }

  /** Makes the store, with the small guest in it as `small:1`. */
  async storeWithGuest(...options: string[]): Promise<BuiltGuest> {
    const guest = await buildGuest({ guest: 'small', folder: path.join(guestCacheFolder(), 'small') });
    assert.equal((await this.run('store', 'init', this.store)).code, 0);
    await this.json(
      ...(['store', 'import', this.store, guest.disk, 'small:1', '--kernel', guest.kernel] as const),
      ...['--initrd', guest.initrd, '--label', `boot.cmdline=${guest.commandLine}`],
      ...['--label', `boot.ready=${guest.readyText}`, '--label', 'machine.memory-mib=128', ...options],
    );
    return guest;
  }

  /** Runs `gridvfs …` to its end. */
  run(...args: string[]): Promise<Outcome> {
    return this.program(process.execPath, MAIN, ...args);
  }

  /** Runs `gridvfs … --json`, expects success, and gives its JSON. */
  async json<T = Record<string, unknown>>(...args: string[]): Promise<T> {
    const outcome = await this.run(...args, '--json');
    assert.equal(outcome.code, 0, `gridvfs ${args.join(' ')}: ${outcome.stderr}`);
    return JSON.parse(outcome.stdout) as T;
  }

  /** Expects `gridvfs …` to fail with one clear line that matches. */
  async refuses(code: 1 | 2, message: RegExp, ...args: string[]): Promise<void> {
    const outcome = await this.run(...args);
    // Where it takes a second, it says how far it is.
    const lines = outcome.stderr
      .trimEnd()
      .split('\n')
      .filter((line) => !/^[^:]+: \d+ %$/.test(line));
    assert.equal(outcome.code, code, `gridvfs ${args.join(' ')} said: ${outcome.stderr}${outcome.stdout}`);
    assert.match(outcome.stderr, message);
    assert.equal(lines.length, 1, `more than one line: ${outcome.stderr}`);
  }

  /** Any program, to its end, without blocking this process. */
  async program(file: string, ...args: string[]): Promise<Outcome> {
    const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'pipe'], env: this.environment });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (part: Buffer) => (stdout += part.toString('utf8')));
    child.stderr.on('data', (part: Buffer) => (stderr += part.toString('utf8')));
    const code = await new Promise<number | null>((resolve, reject) => {
      child.on('error', reject);
      child.on('close', resolve);
    });
    return { code, stdout, stderr };
  }

  async succeeds(file: string, ...args: string[]): Promise<string> {
    const outcome = await this.program(file, ...args);
    assert.equal(outcome.code, 0, `${file} ${args.join(' ')}: ${outcome.stderr}${outcome.stdout}`);
    return outcome.stdout;
  }

  /** `gridvfs server` with the ssh endpoint on a free port. */
  async server(...options: string[]): Promise<ServerHandle> {
    const child = spawn(
      process.execPath,
      [
        ...[
          MAIN,
          'server',
          this.store,
          '--ssh',
          `${this.listen}:0`,
          '--authorized-keys',
          this.authorizedKeys,
        ],
        ...['--host-key', path.join(this.folder, 'host_key'), '--json', ...options],
      ],
      { stdio: ['ignore', 'pipe', 'inherit'], env: this.environment },
    );
    this.#services.push(child);
    const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()));
    const line = await Promise.race([
      new Promise<string>((resolve) => createInterface({ input: child.stdout }).once('line', resolve)),
      ended.then(() => assert.fail('the server ended before it was ready')),
    ]);
    const ready = JSON.parse(line) as { ssh: string; fingerprint: string };
    return {
      url: ready.ssh.replace('ssh://', 'ssh://grid@'),
      fingerprint: ready.fingerprint,
      pid: child.pid!,
      async stop() {
        child.kill('SIGTERM');
        await ended;
      },
    };
  }

  /** Options that let this world's proxies in at `server`, and keep their files in this world. */
  proxyOptions(server?: ServerHandle): string[] {
    return [
      ...[
        '--name',
        'world',
        '--cache-dir',
        path.join(this.folder, 'cache'),
        '--state-dir',
        path.join(this.folder, 'state'),
      ],
      ...['--identity', this.identity],
      ...(server === undefined ? [] : ['--host-key', server.fingerprint]),
    ];
  }

  /** `gridvfs mount`, at this world's mount point unless another is given. */
  mount(source: string, server?: ServerHandle, ...options: string[]): Promise<ProxyHandle> {
    return this.json('mount', source, this.mountpoint, ...this.proxyOptions(server), ...options);
  }

  /** kill -9 of a proxy together with its holder, as the out-of-memory killer or a crash of the host would. */
  async killWhole({ processes }: ProxyHandle): Promise<void> {
    // The holder, which is the last, first: it would start a successor.
    for (const { pid } of processes.toReversed()) process.kill(pid, 'SIGKILL');
    for (const { pid } of processes) while (isRunning(pid)) await sleep(5);
  }

  dropPageCache(): void {
    spawnSync('sync');
    writeFileSync('/proc/sys/vm/drop_caches', '3');
  }

  mountsLeft(): string[] {
    return readFileSync('/proc/self/mountinfo', 'utf8')
      .split('\n')
      .filter((line) => line.includes(this.folder));
  }

  /** Processes with this world's folder in their command line. */
  processesLeft(): string[] {
    return readdirSync('/proc')
      .filter((name) => /^\d+$/.test(name) && Number(name) !== process.pid)
      .flatMap((pid) => {
        try {
          const line = readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ');
          return line.includes(this.folder) ? [`${pid}: ${line}`] : [];
        } catch {
          return [];
        }
      });
  }

  /** Ends everything, and fails when something was still there that should not have been. */
  async dispose(): Promise<void> {
    if (existsSync(this.mountpoint) && this.mountsLeft().length > 0)
      await this.run('umount', this.mountpoint, '--force');
    for (const child of this.#services) {
      if (child.exitCode !== null || child.signalCode !== null) continue;
      const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()));
      child.kill('SIGTERM');
      await ended;
    }
    const mounts = this.mountsLeft();
    const processes = this.processesLeft();
    if (mounts.length === 0) rmSync(this.folder, { recursive: true, force: true });
    assert.deepEqual({ mounts, processes }, { mounts: [], processes: [] });
  }
}
