/** mount(8) and fstab with `-t fuse.gridvfs`, through the helper as it is installed, in a mount namespace of its own. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { after, before, suite, test } from 'node:test';
import { Namespace } from './namespace.ts';
import { World } from './world.ts';

suite('mount -t fuse.gridvfs', () => {
  const world = new World();
  const raw = path.join(world.folder, 'disk.raw');
  const mounted = path.join(world.mountpoint, 'images', 'plain', '1', 'disk.raw');
  const folders = `name=world,cache-dir=${world.folder}/cache,state-dir=${world.folder}/state`;
  let space: Namespace;
  const succeeds = async (...command: string[]) => {
    const outcome = await space.program(...command);
    assert.equal(outcome.code, 0, `${command.join(' ')}: ${outcome.stderr}`);
    return outcome.stdout;
  };

  before(async () => {
    writeFileSync(raw, randomBytes(1 << 20));
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json('store', 'import', world.store, raw, 'plain:1');
    // A copy of /sbin with the helper in it lies over the host's, for this namespace alone.
    space = await Namespace.make(
      world,
      `mkdir sbin; cp -a /sbin/mount* sbin/ 2>/dev/null || true
       ln -s "$0/repo/src/setup/mount.fuse.gridvfs" sbin/mount.fuse.gridvfs
       mount --bind sbin "$(readlink -f /sbin)"`,
    );
  });
  after(async () => {
    if (space) {
      await space.program(...space.gridvfs('umount', world.mountpoint, '--force'));
      await space.leave();
    }
    await world.dispose();
  });

  test('options reach the mount, findmnt and df show it, and umount(8) ends it', async () => {
    const options = `ro,noatime,_netdev,x-systemd.automount,uid=1234,gid=567,quota=1G,${folders}`;
    await succeeds('mount', '-t', 'fuse.gridvfs', world.store, world.mountpoint, '-o', options);
    await succeeds('cmp', raw, mounted);
    assert.equal((await succeeds('stat', '-c', '%u %g', mounted)).trim(), '1234 567');
    const shown = await succeeds(
      'findmnt',
      '-n',
      '-t',
      'fuse.gridvfs',
      '-o',
      'SOURCE,OPTIONS',
      world.mountpoint,
    );
    assert.match(shown, new RegExp(`^${world.store} +ro,nosuid,nodev`));
    assert.match(await succeeds('df', world.mountpoint), new RegExp(`^${world.store} `, 'm'));
    await succeeds('umount', world.mountpoint);
    while (world.processesLeft().some((line) => line.includes('proxy'))) await sleep(20);
  });

  test('a line of fstab is enough', async () => {
    const fstab = path.join(world.folder, 'fstab');
    writeFileSync(fstab, `${world.store} ${world.mountpoint} fuse.gridvfs noauto,nofail,${folders} 0 0\n`);
    await succeeds('mount', '-T', fstab, world.mountpoint);
    await succeeds('cmp', raw, mounted);
    await succeeds(...space.gridvfs('umount', world.mountpoint));
  });

  test('an option that nobody has is refused, and nothing is mounted', async () => {
    const outcome = await space.program(
      ...['mount', '-t', 'fuse.gridvfs', world.store, world.mountpoint, '-o', 'nonsense=1'],
    );
    assert.equal(outcome.code, 32);
    assert.match(outcome.stderr, /no option 'nonsense'.*\[bad-request\]/);
    assert.notEqual((await space.program('findmnt', world.mountpoint)).code, 0);
  });
});
