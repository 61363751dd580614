/**
 * Workspaces of the Debian guest: a command by the guest agent, OpenSSH to a machine by way of broker and host, and from one
 * machine to another over their network.
 */
import assert from 'node:assert/strict';
import { copyFileSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { buildGuest, guestCacheFolder } from '../../bench/guest/build.ts';
import type { WorkspaceInfo } from '../../src/broker/index.ts';
import { eventually, Grid } from './grid.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1' ? false : 'a long test';

suite('a workspace of a Debian guest', { skip: LONG }, () => {
  const grid = new Grid(['one', 'two']);
  const { world } = grid;
  before(async () => {
    const guest = await buildGuest({ guest: 'debian', folder: path.join(guestCacheFolder(), 'debian') });
    await grid.start();
    await world.json(
      ...['store', 'import', world.store, guest.disk, 'debian:12', '--kernel', guest.kernel],
      ...['--initrd', guest.initrd, '--label', `boot.cmdline=${guest.commandLine}`],
      ...['--label', `boot.ready=${guest.readyText}`, '--label', 'boot.agent=qemu'],
    );
    await eventually(async () => (await grid.ask<unknown[]>('ada', 'images')).length === 2);
  });
  after(() => grid.stop());

  test('it runs a command by its guest agent, and lets its user in by ssh, who is known by the key of the seed', async () => {
    const key = path.join(world.folder, 'user-key');
    await world.succeeds('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key);
    copyFileSync(`${key}.pub`, path.join(world.folder, 'user.pub'));
    const made = await world.json<WorkspaceInfo>(
      ...['workspace', 'request', 'debian:12', '--name', 'deb', '--memory', '512M'],
      ...['--ssh-key', path.join(world.folder, 'user.pub'), ...grid.as('ada')],
      ...['--command', 'cut -c 1-2 /etc/debian_version; id -un >&2; exit 3'],
    );
    const { exitCode, output } = made.machines[0]!.command!;
    assert.deepEqual([exitCode, output], [3, '12\nroot\n']);
    const ssh = (who: string, ...command: string[]) =>
      world.run(
        ...['workspace', 'ssh', 'deb', '--identity', key, ...grid.as(who)],
        ...['--known-hosts', path.join(world.folder, 'known'), '--', ...command],
      );
    const { code, stdout } = await ssh('ada', 'hostname; exit 5');
    assert.deepEqual([code, stdout], [5, 'deb\n']);
    const refused = await ssh('bob', 'hostname');
    assert.deepEqual([refused.code, refused.stdout], [1, '']);
    assert.match(refused.stderr, /no VM 'deb'/);
    await world.json('workspace', 'end', 'deb', ...grid.as('ada'));
  });

  test('two machines on two hosts log in to each other over their network', async () => {
    const key = path.join(world.folder, 'pair-key');
    await world.succeeds('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key);
    copyFileSync(`${key}.pub`, path.join(world.folder, 'pair.pub'));
    // More than half of what a host has for guests: one machine on each.
    await world.json<WorkspaceInfo>(
      ...['workspace', 'request', 'debian:12', '--name', 'pair', '--count', '2', '--network', 'pair'],
      ...['--memory', '600M', '--ssh-key', path.join(world.folder, 'pair.pub'), ...grid.as('ada')],
    );
    const { machines } = await world.json<WorkspaceInfo>('workspace', 'show', 'pair', ...grid.as('ada'));
    assert.equal(new Set(machines.map(({ host }) => host)).size, 2);
    const [one, two] = machines;
    const secret = readFileSync(key, 'base64');
    for (const [from, to] of [[one!, two!] as const, [two!, one!] as const]) {
      const hop = `ssh -i /root/key -o StrictHostKeyChecking=accept-new -o ConnectTimeout=20 root@${to.address}`;
      const { code, stdout, stderr } = await world.run(
        ...['workspace', 'ssh', from.name, '--identity', key, ...grid.as('ada')],
        ...['--known-hosts', path.join(world.folder, 'known'), '--'],
        `umask 077; echo ${secret} | base64 -d > /root/key; ${hop} 'hostname; ip -4 -o address'`,
      );
      assert.equal(code, 0, stderr);
      assert.match(stdout, new RegExp(`^${to.name}\n[^]*inet ${to.address!.replaceAll('.', '\\.')}/`));
    }
    await world.json('workspace', 'end', 'pair', ...grid.as('ada'));
  });
});
