/**
 * File systems on a clone whose proxy is killed in the middle of a package installation's load of writes: they can
 * always be mounted, are clean, and every file that was synced is there. Once with this host's kernel over a loop
 * device, which sees of the clone what a guest does: writes, flushes, and then a disk that is gone; and once with
 * guests of QEMU, one on each file system, which are killed with their proxy.
 *
 * Guarded line, tried by taking it out: direct-io.ts #commit, #writeMap (files that were synced are not there).
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { closeSync, constants, mkdirSync, openSync, truncateSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, suite, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { isRunning } from '../../src/core/linux.ts';
import { World } from './world.ts';
import { makeWriterGuest, READY } from './writer-guest.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';
/** Of each file system, and of the guests. */
const KILLS = Number(process.env['GRIDVFS_KILLS'] ?? 50);
const RELEASE_TIMEOUT_MS = 120_000;
const WRITER = path.join(import.meta.dirname, 'fsync-writer.ts');

const FILE_SYSTEMS = [
  { name: 'ext4', make: ['mkfs.ext4', '-q', '-F'], options: 'noatime', check: ['e2fsck', '-f', '-n'] },
  // The same image is mounted again and again, also beside a loop device that is still going away.
  { name: 'xfs', make: ['mkfs.xfs', '-q', '-f'], options: 'noatime,nouuid', check: ['xfs_repair', '-n'] },
];

suite('file systems on clones whose proxy is killed', { skip: LONG ? false : 'a long test' }, () => {
  const world = new World();
  const place = path.join(world.folder, 'fs');
  const loops = new Set<string>();

  before(async () => {
    mkdirSync(place);
    const main = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
    await world.succeeds(process.execPath, main, 'store', 'init', world.store);
    const { kernel, initrd } = await makeWriterGuest(path.join(world.folder, 'guest'));
    for (const { name, make } of FILE_SYSTEMS) {
      const raw = path.join(world.folder, `${name}.raw`);
      writeFileSync(raw, '');
      truncateSync(raw, 400 * MIB);
      await world.succeeds(make[0]!, ...make.slice(1), raw);
      await world.json(
        ...([
          'store',
          'import',
          world.store,
          raw,
          `${name}:1`,
          '--kernel',
          kernel,
          '--initrd',
          initrd,
        ] as const),
        ...['--label', `boot.cmdline=console=ttyS0 quiet fs=${name}`, '--label', `boot.ready=${READY}`],
        ...['--label', 'machine.memory-mib=128'],
      );
    }
    await world.mount(world.store);
  });
  after(async () => {
    await world.program('umount', '-l', place);
    for (const loop of loops) await world.program('losetup', '-d', loop);
    await world.dispose();
  });

  const attach = async (disk: string, options: string) => {
    const loop = (await world.succeeds('losetup', '-f', '--show', disk)).trim();
    loops.add(loop);
    await world.succeeds('mount', '-o', options, loop, place);
    return loop;
  };
  /** Not before it is unmounted everywhere: a process that made a mount namespace of its own meanwhile holds it for
   * a while, and its log is not closed until then. */
  const detach = async (loop: string) => {
    await world.program('umount', place);
    for (const endMs = performance.now() + RELEASE_TIMEOUT_MS; ; await sleep(50)) {
      try {
        closeSync(openSync(loop, constants.O_RDONLY | constants.O_EXCL));
        break;
      } catch (error) {
        assert.ok(performance.now() < endMs, `${loop} is still held: ${String(error)}`);
      }
    }
    await world.program('losetup', '-d', loop);
    loops.delete(loop);
  };
  /** The disk goes away under whoever uses it: the proxy is killed together with what would start the next one, and
   * with VMs. */
  const killProxy = async (vms: readonly number[] = []) => {
    const proxies = world
      .processesLeft()
      .filter((line) => / proxy (run|serve) /.test(line))
      .map((line) => Number.parseInt(line, 10));
    assert.ok(proxies.length > 0, 'there is a proxy to kill');
    const pids = [...proxies, ...vms];
    for (const pid of pids) process.kill(pid, 'SIGKILL');
    while (pids.some(isRunning)) await sleep(10);
  };

  /** Files that were said to be durable, with what the writer says from now on. */
  const listen = (said: NodeJS.ReadableStream, durable: Set<number>) => {
    let rest = '';
    let count = 0;
    said.on('data', (part: Buffer) => {
      const lines = (rest + part.toString('utf8')).split(/\r*\n/);
      rest = lines.pop()!;
      for (const line of lines) {
        if (!/^[+-]\d+$/.test(line)) continue;
        const number = Number(line.slice(1));
        if (line.startsWith('+')) durable.add(number);
        else durable.delete(number);
        count++;
      }
    });
    return () => count;
  };

  const verify = async (durable: ReadonlySet<number>, mode: 'check' | 'check-guest', what: string) => {
    const child = spawn(process.execPath, [WRITER, mode, place], { stdio: ['pipe', 'pipe', 'inherit'] });
    let said = '';
    child.stdout.on('data', (part: Buffer) => (said += part.toString('utf8')));
    child.stdin.end([...durable].join('\n'));
    const code = await new Promise((resolve) => child.once('close', resolve));
    assert.equal(code, 0, `${what}: ${said}`);
  };

  /** Mounted, looked at, and checked. */
  const verifyDisk = async (
    disk: string,
    options: string,
    check: readonly string[],
    what: string,
    look: () => Promise<void>,
  ) => {
    const loop = await attach(disk, options);
    await look();
    await detach(loop);
    const fsck = await world.program(check[0]!, ...check.slice(1), disk);
    assert.equal(fsck.code, 0, `${what}: ${fsck.stdout}${fsck.stderr}`);
  };

  for (const { name, options, check } of FILE_SYSTEMS) {
    test(`${name} after ${KILLS} kills: mountable, clean, and every synced file is there`, async (t) => {
      const { disk } = await world.json<{ disk: string }>(
        ...(['clone', 'create', `${name}:1`, '--name', name, '--persistent'] as const),
      );
      const durable = new Set<number>();
      let installed = 0;
      for (let kill = 0; kill < KILLS; kill++) {
        const loop = await attach(disk, options);
        const child = spawn(process.execPath, [WRITER, 'write', place, String(1 + kill * 100_000)], {
          stdio: ['ignore', 'pipe', 'ignore'],
        });
        const count = listen(child.stdout, durable);
        const ended = new Promise((resolve) => child.once('close', resolve));
        const target = 20 + ((kill * 37) % 90);
        while (count() < target && child.exitCode === null) await sleep(5);
        await killProxy();
        child.kill('SIGKILL');
        await ended;
        installed += count();
        await detach(loop);

        await world.mount(world.store);
        const what = `kill ${kill}`;
        await verifyDisk(disk, options, check, what, () => verify(durable, 'check', what));
      }
      t.diagnostic(`${installed} operations, ${durable.size} files to check at the end`);
      await world.json('clone', 'rm', name);
    });
  }

  test(`guests on ext4 and XFS, side by side, after ${KILLS} kills: mountable, clean, and every synced file is there`, async (t) => {
    const guests = await Promise.all(
      FILE_SYSTEMS.map(async (fileSystem) => {
        const id = `guest-${fileSystem.name}`;
        const { disk } = await world.json<{ disk: string }>(
          ...(['clone', 'create', `${fileSystem.name}:1`, '--name', id, '--persistent'] as const),
        );
        return { ...fileSystem, id, disk, durable: new Set<number>(), installed: 0 };
      }),
    );
    for (let kill = 0; kill < KILLS; kill++) {
      const victims = await Promise.all(
        guests.map(async ({ id, durable }) => {
          const vm = await world.json<{ pid: number; consoleSocket: string }>(
            ...(['vm', 'run', '--clone', id, '--name', `victim-${id}`] as const),
          );
          const console = net.connect(vm.consoleSocket);
          console.on('error', () => {}); // it ends with its VM
          const count = listen(console, durable);
          console.write(`install-files ${1 + kill * 100_000}\n`);
          return { ...vm, console, count };
        }),
      );
      const target = 10 + ((kill * 37) % 40);
      const deadlineMs = performance.now() + 120_000;
      while (victims.some(({ count }) => count() < target)) {
        const said = victims.map(({ count }) => count()).join(' and ');
        assert.ok(performance.now() < deadlineMs, `kill ${kill}: the guests installed ${said} files`);
        await sleep(5);
      }
      await killProxy(victims.map(({ pid }) => pid));
      for (const { console } of victims) console.destroy();

      await world.mount(world.store);
      for (const [i, guest] of guests.entries()) {
        guest.installed += victims[i]!.count();
        const what = `${guest.name}, kill ${kill}`;
        await verifyDisk(guest.disk, guest.options, guest.check, what, () =>
          verify(guest.durable, 'check-guest', what),
        );
      }
    }
    for (const { id, name, installed, durable } of guests) {
      t.diagnostic(`${name}: ${installed} operations, ${durable.size} files to check at the end`);
      await world.json('clone', 'rm', id);
    }
  });
});
