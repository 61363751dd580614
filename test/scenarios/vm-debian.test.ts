/** What needs a whole Debian, or a firmware of its own: guest agent, ssh by the seed's key, UEFI. All in the long run. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { buildGuest, guestCacheFolder } from '../../bench/guest/build.ts';
import { ask } from './console.ts';
import { importSmall, nonceOf, setNonce } from './vm-world.ts';
import type { Vm } from './vm-world.ts';
import { World } from './world.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';

suite('a whole Debian, and UEFI', { skip: LONG ? false : 'minutes; in the long run' }, () => {
  const world = new World();

  before(async () => {
    const small = await importSmall(world);
    await world.json(
      ...['store', 'import', world.store, small.disk, 'uefi:1', '--kernel', small.kernel],
      ...['--initrd', small.initrd, '--label', `boot.cmdline=${small.commandLine}`],
      ...['--label', `boot.ready=${small.readyText}`, '--label', 'machine.memory-mib=192'],
      ...['--label', 'boot.answers=ttyS1', '--label', 'boot.firmware=uefi'],
    );
    const debian = await buildGuest({ guest: 'debian', folder: path.join(guestCacheFolder(), 'debian') });
    await world.json(
      ...['store', 'import', world.store, debian.disk, 'debian:12', '--kernel', debian.kernel],
      ...['--initrd', debian.initrd, '--label', `boot.cmdline=${debian.commandLine}`],
      ...['--label', `boot.ready=${debian.readyText}`, '--label', 'machine.memory-mib=512'],
      ...['--label', 'boot.answers=ttyS1', '--label', 'boot.agent=qemu', '--label', 'boot.seed=nocloud'],
    );
    await world.mount(world.store);
  });
  after(() => world.dispose());

  test('a machine starts by UEFI, is suspended, and goes on', async () => {
    const vm = await world.json<Vm>('vm', 'run', 'uefi:1', '--name', 'uefi');
    await ask(vm.consoleSocket, '[ -d /sys/firmware/efi ] && echo efi-$((6*7))', /efi-42/);
    const nonce = await setNonce(vm);
    await world.json('vm', 'suspend', 'uefi');
    const [back] = await world.json<Vm[]>('vm', 'resume', 'uefi');
    assert.equal(await nonceOf(back!), nonce);
    await world.json('vm', 'stop', 'uefi', '--now');
  });

  test('its guest lets the seed’s key in, has its name, and holds its file systems still for a suspension', async () => {
    await world.succeeds('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', path.join(world.folder, 'key'));
    const vm = await world.json<Vm>(
      ...['vm', 'run', 'debian:12', '--name', 'deb', '--hostname', 'seeded'],
      ...['--ssh-key', path.join(world.folder, 'key.pub')],
    );
    await ask(vm.consoleSocket, 'echo "name $(hostname)"', /name seeded/, { lateMs: 60_000 });
    // The private key goes in by the console, as no network leads there from here.
    const key = readFileSync(path.join(world.folder, 'key'), 'utf8').trim();
    await ask(
      vm.consoleSocket,
      `cat > /run/key << 'END'\n${key}\nEND\nchmod 600 /run/key; echo there-$((6*7))`,
      /there-42/,
      {
        lateMs: 60_000,
        againMs: 60_000,
      },
    );
    await ask(
      vm.consoleSocket,
      'ssh -i /run/key -o BatchMode=yes -o StrictHostKeyChecking=no root@127.0.0.1 echo let-in-$((6*7))',
      /let-in-42/,
      { lateMs: 120_000, againMs: 30_000 },
    );
    const nonce = await setNonce(vm);
    await world.json('vm', 'suspend', 'deb');
    const [back] = await world.json<Vm[]>('vm', 'resume', 'deb');
    assert.equal(await nonceOf(back!), nonce);
    const log = () => readFileSync(path.join(world.folder, 'state', 'proxy.log'), 'utf8');
    assert.match(log(), /deb: guest-fsfreeze-freeze: [1-9]/);
    // Held still, it could not write.
    await ask(back!.consoleSocket, 'echo x > /root/x; sync; echo written-$((6*7))', /written-42/, {
      lateMs: 60_000,
    });
    assert.match(log(), /deb: guest-fsfreeze-thaw: [1-9]/);
    await world.json('vm', 'stop', 'deb', '--now');
  });
});
