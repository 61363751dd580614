/**
 * Containers through the command: the same images, clones, console and end as virtual machines, and a clear word for what
 * they cannot. In the long run; needs root and systemd-nspawn.
 */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { isRoot, isRunning } from '../../src/core/linux.ts';
import { ask } from './console.ts';
import { importSmall, killProxy, nonceOf, setNonce } from './vm-world.ts';
import type { Vm } from './vm-world.ts';
import { World } from './world.ts';

function whyNot(): string | false {
  if (process.env['GRIDVFS_LONG'] !== '1') return 'a long test';
  if (!isRoot()) return 'containers need root';
  const folders = (process.env['PATH'] ?? '').split(':');
  const isThere = folders.some((folder) => existsSync(path.join(folder, 'systemd-nspawn')));
  return isThere ? false : 'systemd-nspawn is not installed';
}

suite('containers over clones', { skip: whyNot() }, () => {
  const world = new World();

  before(async () => {
    await importSmall(world);
    await world.mount(world.store);
  });
  after(() => world.dispose());

  test('a container runs over a clone, outlives its proxy, is listed and stopped, and leaves nothing', async () => {
    const vm = await world.json<Vm & { accelerator: string }>(
      ...['vm', 'run', '--vmm', 'container', 'small:1', '--name', 'box'],
    );
    assert.deepEqual([vm.state, vm.accelerator], ['running', 'container']);
    const nonce = await setNonce(vm);
    const release = readFileSync('/proc/sys/kernel/osrelease', 'utf8').trim();
    await ask(
      vm.consoleSocket,
      'echo "kernel $(uname -r) on $(hostname)."',
      new RegExp(`kernel ${release} on box\\.`),
    );
    await ask(vm.consoleSocket, 'echo mine > /root/mine; sync; echo written-$((6*7))', /written-42/);
    await world.refuses(1, /is a container, which cannot be suspended.*unsupported/, 'vm', 'suspend', 'box');
    await world.refuses(
      1,
      /is a container, which cannot be suspended/,
      'vm',
      'checkpoint',
      'box',
      '--to',
      'box:1',
    );
    await world.refuses(
      2,
      /a container has no --memory, --bridge/,
      ...run('--memory', '1G', '--bridge', 'br0'),
    );

    await killProxy(world);
    const [listed] = await world.json<Vm[]>('vm', 'ls');
    assert.deepEqual([listed?.id, listed?.state], ['box', 'running']);
    assert.equal(await nonceOf(listed!), nonce);
    await ask(listed!.consoleSocket, 'cat /root/mine', /^mine\r?$/m);
    // A virtual machine beside it, over the same image, has a file system of its own.
    const machine = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'machine');
    await ask(machine.consoleSocket, 'ls /root/mine', /No such file/);
    await world.json('vm', 'stop', 'machine', '--now');

    await world.json('vm', 'stop', 'box');
    assert.deepEqual(await world.json('vm', 'ls'), []);
    assert.equal(isRunning(vm.pid), false);
    assert.deepEqual(await world.json('clone', 'ls'), []);
    assert.ok(!(await world.succeeds('losetup', '--list', '--output', 'BACK-FILE')).includes(world.folder));
  });
});

const run = (...options: string[]) => ['vm', 'run', '--vmm', 'container', 'small:1', ...options];
