/**
 * The whole chain for somebody who is not root: fusermount3, XDG folders, reads, clones, a proxy that dies. It runs
 * in a mount namespace where /dev/fuse and fusectl are as most hosts have them (open to users; mounted).
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { chmodSync, chownSync, copyFileSync, existsSync, mkdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, suite, test } from 'node:test';
import { isRunning } from '../../src/core/linux.ts';
import { Namespace } from './namespace.ts';
import { World } from './world.ts';

/** nobody: fusermount3 wants a user with a name. */
const UID = 65534;

interface Status {
  pid: number;
  mount: { passthroughOpens: number; directReads: number };
}

suite('mounts of a user who is not root', () => {
  const world = new World();
  const home = path.join(world.folder, 'home');
  const mountpoint = path.join(home, 'grid');
  const store = path.join(home, 'store');
  const raw = path.join(home, 'disk.raw');
  const mounted = path.join(mountpoint, 'images', 'plain', '1', 'disk.raw');
  let space: Namespace;

  const asUser = (...command: string[]) =>
    space.program(
      ...['setpriv', '--reuid', String(UID), '--regid', String(UID), '--clear-groups'],
      ...['env', '-C', home, '-u', 'GRIDVFS_RUNTIME_DIR', '-u', 'XDG_CACHE_HOME', '-u', 'XDG_STATE_HOME'],
      ...[
        '-u',
        'XDG_CONFIG_HOME',
        `HOME=${home}`,
        `XDG_RUNTIME_DIR=${home}/run`,
        `NODE_COMPILE_CACHE=${home}/compiled`,
        ...command,
      ],
    );
  const run = (...args: string[]) => asUser(...space.gridvfs(...args));
  const json = async <T>(...args: string[]): Promise<T> => {
    const outcome = await run(...args, '--json');
    assert.equal(outcome.code, 0, `gridvfs ${args.join(' ')}: ${outcome.stderr}`);
    return JSON.parse(outcome.stdout) as T;
  };
  const succeeds = async (...command: string[]) => {
    const outcome = await asUser(...command);
    assert.equal(outcome.code, 0, `${command.join(' ')}: ${outcome.stderr}`);
    return outcome.stdout;
  };

  before(async () => {
    for (const folder of [home, mountpoint, path.join(home, 'run')]) {
      mkdirSync(folder);
      chownSync(folder, UID, UID);
    }
    writeFileSync(raw, randomBytes(3 << 20));
    chmodSync(raw, 0o644);
    space = await Namespace.make(
      world,
      `mkdir dev; mount -t tmpfs none dev; mknod dev/fuse c 10 229; chmod 666 dev/fuse
       mount --bind dev/fuse /dev/fuse; mount -t fusectl none /sys/fs/fuse/connections`,
    );
    await json('store', 'init', store);
    await json('store', 'import', store, raw, 'plain:1');
  });
  after(async () => {
    if (space) {
      await run('umount', mountpoint, '--force');
      await space.leave();
    }
    await world.dispose();
  });

  test('a store is mounted, read, cloned, written, and unmounted; passthrough is given up by itself', async () => {
    await json('mount', store, mountpoint);
    await succeeds('cmp', raw, mounted);
    await succeeds('cmp', raw, mounted); // the second open finds all of it here
    assert.equal((await json<Status>('proxy', 'status')).mount.passthroughOpens, 0);
    const shown = await succeeds('findmnt', '-n', '-t', 'fuse.gridvfs', '-o', 'SOURCE,OPTIONS', mountpoint);
    assert.match(shown, new RegExp(`^${store} .*nosuid,nodev.*user_id=${UID}`));
    assert.match(await succeeds('df', mountpoint), new RegExp(`^${store} `, 'm'));
    const { disk } = await json<{ disk: string }>('clone', 'create', 'plain:1', '--name', 'work');
    await succeeds('dd', `if=${raw}`, `of=${disk}`, 'bs=64k', 'count=3', 'seek=5', 'conv=notrunc,fsync');
    assert.equal((await asUser('cmp', '-n', '196608', '-i', '0:327680', raw, disk)).code, 0);
    const other = await space.program('ls', mountpoint);
    assert.notEqual(other.code, 0, 'the mount is for its user alone');
    assert.ok(
      existsSync(path.join(home, '.cache/gridvfs')) && existsSync(path.join(home, '.local/state/gridvfs')),
    );
  });

  test('programs on the mount outlive its proxy, and what was written is there', async () => {
    const { pid } = await json<Status>('proxy', 'status');
    const disk = path.join(mountpoint, 'clones', 'work', 'disk.raw');
    process.kill(pid, 'SIGKILL');
    while (isRunning(pid)) await sleep(5);
    await succeeds('cmp', '-n', '196608', '-i', '0:327680', raw, disk);
    await succeeds('cmp', raw, mounted);
  });

  test('a mount in use is not unmounted unless forced; then its users are cut off', async () => {
    const holder = spawn('sh', ['-c', 'exec "$@"', 'sh', ...commandOf(holdCommand())], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    await new Promise((resolve) => holder.stdout.once('data', resolve));
    const busy = await run('umount', mountpoint);
    assert.equal(busy.code, 1);
    assert.match(busy.stderr, /in use by .*\[in-use\]/);
    await json('umount', mountpoint, '--force');
    const ended = new Promise<number | null>((resolve) => holder.once('exit', resolve));
    holder.stdin.end('\n');
    assert.notEqual(await ended, 0, 'whoever had a file open cannot open it again');
  });

  test('a mount over ssh with a key of his own reads the same', async () => {
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json('store', 'import', world.store, raw, 'plain:1');
    const server = await world.server();
    const identity = path.join(home, 'id');
    copyFileSync(world.identity, identity);
    chownSync(identity, UID, UID);
    const key = ['--identity', identity, '--host-key', server.fingerprint];
    await json('mount', server.url, mountpoint, '--name', 'far', ...key);
    await succeeds('cmp', raw, mounted);
    await json('umount', mountpoint);
    await server.stop();
  });

  /** Opens the image, says so, and opens it anew after a line of input. */
  function holdCommand(): string[] {
    return [
      'sh',
      '-c',
      `exec 3<"${mounted}"; echo open; read line; dd if=/proc/self/fd/3 bs=4k count=1 of=/dev/null 2>/dev/null`,
    ];
  }
  function commandOf(command: string[]): string[] {
    return [
      ...['nsenter', `--mount=/proc/${space.pid}/ns/mnt`, 'setpriv', '--reuid', String(UID)],
      ...['--regid', String(UID), '--clear-groups', ...command],
    ];
  }

  test('what a user may not do is one line that says so', async () => {
    const foreign = path.join(world.folder, 'foreign');
    mkdirSync(foreign);
    const refusals: [RegExp, Promise<{ code: number | null; stderr: string }>][] = [
      [/fusermount3.*\[no-permission\]$/m, run('mount', store, foreign)],
      [
        /user_allow_other.*\[no-permission\]$/m,
        run('mount', store, mountpoint, '--allow-other', '--name', 'o'),
      ],
    ];
    for (const [pattern, outcome] of refusals) {
      const { code, stderr } = await outcome;
      assert.equal(code, 1, stderr);
      assert.match(stderr, pattern);
    }
    const doctor = await run('doctor');
    assert.equal(doctor.code, 0, doctor.stdout);
    assert.match(
      doctor.stdout,
      /limited privilege: user nobody: mounts through fusermount3.*without passthrough/,
    );
  });
});
