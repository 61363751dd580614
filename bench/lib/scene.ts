/**
 * What the starts of a bench share: the guest, its image in a store behind gridvfs's own ssh endpoint at the origin, and the
 * network between them. Made once, undone by the stack: VMs, proxies, mounts, server, links, files.
 */
import { execFile } from 'node:child_process';
import { statSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { promisify } from 'node:util';
import { makeSshKey } from '../../proxy/ssh-key.ts';
import { bytesText } from '../../src/cli/kit.ts';
import { asGridError, errnoOf } from '../../src/core/errors.ts';
import { MIB } from '../../src/core/limits.ts';
import { buildGuest, guestCacheFolder } from '../guest/build.ts';
import type { BuiltGuest, GuestName } from '../guest/build.ts';
import { startNetwork } from '../link/network.ts';
import type { Emulator, LinkSetting, Network } from '../link/network.ts';
import type { LinkMeasured } from '../link/probe.ts';
import { gridvfs, startService } from './child.ts';

export const IMAGE = 'guest:1';

export const say = (text: string) => process.stderr.write(`${text}\n`);

export interface Scene {
  readonly folder: string;
  readonly guest: BuiltGuest;
  /** Of the disk, the kernel and the initial RAM disk together: a cold start fetches from all three. */
  readonly nonzeroBytes: number;
  readonly store: string;
  readonly identity: string;
  readonly fingerprint: string;
  readonly serverPid: number;
  readonly network: Network;
  /** As found by a program of ours, where links are of packets. */
  readonly measured: Readonly<Record<string, LinkMeasured>>;
  /** What a proxy mounts to reach the store over this link. */
  sourceOver(link: string): Promise<string>;
  readonly signal: AbortSignal;
}

export interface SceneOptions {
  readonly guest: GuestName;
  readonly emulator: Emulator;
  readonly links: readonly LinkSetting[];
  readonly hosts?: number;
  readonly signal: AbortSignal;
}

export async function prepareScene(stack: AsyncDisposableStack, options: SceneOptions): Promise<Scene> {
  const { signal, links, hosts = 1 } = options;
  const guest = await buildGuest({
    guest: options.guest,
    folder: path.join(guestCacheFolder(), options.guest),
    signal,
    progress: say,
  });
  const nonzeroBytes = guest.nonzeroBytes + statSync(guest.kernel).size + statSync(guest.initrd).size;
  say(
    `guest ${guest.name}: ${bytesText(guest.sizeBytes)} disk, ${bytesText(nonzeroBytes)} of data with its kernel, sha256 ${guest.sha256.disk.slice(0, 12)}`,
  );

  const folder = await mkdtemp(path.join(process.env['TMPDIR'] ?? '/var/tmp', 'gridvfs-demo-'));
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  process.env['GRIDVFS_RUNTIME_DIR'] = path.join(folder, 'run');
  const store = path.join(folder, 'store');
  const main = path.resolve(import.meta.dirname, '../../src/main.ts');
  await promisify(execFile)(process.execPath, [main, 'store', 'init', store]);
  const startedMs = performance.now();
  const imported = await gridvfs<{ chunks: number; newStoredBytes: number }>(
    [
      ...['store', 'import', store, guest.disk, IMAGE, '--kernel', guest.kernel, '--initrd', guest.initrd],
      ...['--label', `boot.cmdline=${guest.commandLine}`, '--label', `boot.ready=${guest.readyText}`],
      ...['--label', `machine.memory-mib=${Math.ceil(guest.memoryBytes / MIB)}`],
      ...['--label', 'boot.answers=ttyS1', '--json'],
    ],
    signal,
  );
  say(
    `import: ${imported.chunks} chunks, ${bytesText(imported.newStoredBytes)} compressed, in ${((performance.now() - startedMs) / 1000).toFixed(1)} s`,
  );

  const network = await startNetwork(options.emulator, links, hosts);
  stack.defer(() => network.close());
  const measured: Record<string, LinkMeasured> = {};
  if (options.emulator === 'packets') {
    for (const { name } of links) {
      measured[name] = await network.measure(name);
      const { rttMs, bitsPerSecond } = measured[name];
      say(
        `link ${name}: ${rttMs.toFixed(2)} ms, ${(bitsPerSecond / 1e6).toFixed(0)} Mbit/s for one TCP connection`,
      );
    }
  }

  const keys = makeSshKey();
  const identity = path.join(folder, 'id_ed25519');
  await writeFile(identity, keys.private, { mode: 0o600 });
  const authorizedKeys = path.join(folder, 'authorized_keys');
  await writeFile(authorizedKeys, keys.public + '\n');
  const server = await network.atOrigin(() =>
    startService('src/main.ts', [
      ...['server', store, '--ssh', `${network.listen}:0`, '--authorized-keys', authorizedKeys],
      // A checkpoint to resume from is made through the link.
      ...['--host-key', path.join(folder, 'host_key'), '--accept-uploads', '--json'],
    ]),
  );
  stack.defer(() => server.stop());
  const port = Number(new URL(String(server.ready['ssh'])).port);
  return {
    folder,
    guest,
    nonzeroBytes,
    store,
    identity,
    fingerprint: String(server.ready['fingerprint']),
    serverPid: server.pid,
    network,
    measured,
    signal,
    async sourceOver(link) {
      const address = await network.reach(link, port);
      return `ssh://grid@${address.host}:${address.port}${store}`;
    },
  };
}

/** What comes first: the result, or Ctrl-C; what was begun is then ended by the stack that holds it. */
export async function orInterrupted<T>(signal: AbortSignal, work: Promise<T>): Promise<T> {
  // Nobody waits for it after an interruption, and what fails unseen would end the process before it has cleaned up.
  work.catch(() => undefined);
  signal.throwIfAborted();
  const { promise, reject } = Promise.withResolvers<never>();
  const stop = () => reject(signal.reason as Error);
  signal.addEventListener('abort', stop, { once: true });
  try {
    return await Promise.race([work, promise]);
  } finally {
    signal.removeEventListener('abort', stop);
  }
}

/** Aborts on Ctrl-C, SIGTERM and SIGHUP, and says so. */
export function abortOnSignals(): AbortSignal {
  const interrupted = new AbortController();
  const stop = (signal: string) => {
    if (!interrupted.signal.aborted) say(`${signal}: stopping what runs and cleaning up`);
    interrupted.abort(new Error(`interrupted by ${signal}`));
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, stop);
  return interrupted.signal;
}

/** The end of a bench that failed: one line, and exit code 2 for a mistake in the options. */
export function failed(verb: string, error: unknown): void {
  if (error instanceof SuppressedError) {
    failed(verb, error.suppressed);
    failed(`${verb}: cleaning up`, error.error);
    return;
  }
  const usage = error instanceof RangeError || errnoOf(error)?.startsWith('ERR_PARSE_ARGS') === true;
  const { message, code } = asGridError(error, verb, usage ? 'bad-request' : 'local-io');
  say(`gridvfs: ${message} [${code}]`);
  if (process.env['GRIDVFS_DEBUG']) console.error(error);
  process.exitCode = usage ? 2 : 1;
}
