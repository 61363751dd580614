/**
 * Suspended VMs and checkpoints through the real command: a nonce that only the guest's memory holds proves that it
 * went on, and did not boot again. One guest for all of it; what takes minutes is in vm-lives.test.ts.
 */
import assert from 'node:assert/strict';
import { closeSync, openSync, readdirSync, readFileSync, readSync, writeSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isRunning } from '../../src/core/linux.ts';
import { ask } from './console.ts';
import { importSmall, killProxy, nonceOf, setNonce } from './vm-world.ts';
import type { Suspended, Vm } from './vm-world.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

suite('suspended VMs and checkpoints', () => {
  const world = new World();
  let server: ServerHandle;
  let nonce = '';

  before(async () => {
    await importSmall(world);
    server = await world.server('--accept-uploads');
    await world.mount(server.url, server);
  });
  after(() => world.dispose());

  test('a suspended VM goes on where it was, also after its proxy was stopped', async () => {
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'one');
    nonce = await setNonce(vm);
    await ask(vm.consoleSocket, 'echo kept > /root/kept; echo written-$((6*7))', /written-42/);
    const [first] = await world.json<Suspended[]>('vm', 'suspend', 'one');
    assert.ok(first!.memoryWrittenBytes > 0);
    assert.equal(isRunning(vm.pid), false);
    const [listed] = await world.json<Vm[]>('vm', 'ls');
    assert.deepEqual([listed?.id, listed?.state], ['one', 'suspended']);
    await world.refuses(1, /kept for the suspended VM 'one'/, 'clone', 'rm', vm.clone);
    await world.refuses(1, /there is a VM 'one'/, 'vm', 'run', 'small:1', '--name', 'one');

    await world.json('umount', world.mountpoint);
    await world.mount(server.url, server);
    const [resumed] = await world.json<Vm[]>('vm', 'resume', 'one');
    assert.equal(resumed!.state, 'running');
    assert.equal(await nonceOf(resumed!), nonce);
    await ask(resumed!.consoleSocket, 'cat /root/kept', /^kept\r?$/m);
    await world.refuses(1, /no VM 'one' is suspended/, 'vm', 'resume', 'one');
    // Without `memoryImage` in QemuMachine.adopt it would wait for a line that was said before the suspension.
    await killProxy(world);
    assert.equal((await world.json<Vm>('vm', 'show', 'one')).state, 'running');
    const [again] = await world.json<Suspended[]>('vm', 'suspend', 'one');
    assert.ok(again!.memoryWrittenBytes < first!.memoryWrittenBytes / 2, `${again!.memoryWrittenBytes}`);
  });

  test('what is not as it was suspended is refused with the reason, and stays suspended', async () => {
    const layers = path.join(world.folder, 'state', 'layers');
    const layerOf = async (clone: string) =>
      path.join(layers, (await world.json<{ layers: string[] }>('clone', 'show', clone)).layers.at(-1)!);
    const disk = path.join(await layerOf('one-disk'), 'data');
    const times = path.join(world.folder, 'times');
    await world.succeeds('touch', '-r', disk, times);
    await world.succeeds('touch', disk);
    await world.refuses(1, /disk, clone 'one-disk', is not as it was.*wrong-base/, 'vm', 'resume', 'one');
    await world.succeeds('touch', '-r', times, disk);

    const fd = openSync(path.join(await layerOf('one-memory'), 'data'), 'r+');
    const was = Buffer.alloc(6);
    readSync(fd, was, 0, was.length, 64 * 1024 * 1024);
    writeSync(fd, 'damage', 64 * 1024 * 1024);
    await world.refuses(1, /its memory, clone 'one-memory', is damaged.*corrupt/, 'vm', 'resume', 'one');
    writeSync(fd, was, 0, was.length, 64 * 1024 * 1024);
    closeSync(fd);
    const file = path.join(world.folder, 'state', 'vms', 'one');
    assert.equal(readFileSync(file).toString('latin1', 0, 8), 'GVFSCKPT');
    const [listed] = await world.json<Vm[]>('vm', 'ls');
    assert.equal(listed?.state, 'suspended');
    await world.refuses(2, /no checkpoint but of kind 'disk'/, 'vm', 'run', '--from-checkpoint', 'small:1');
    const [back] = await world.json<Vm[]>('vm', 'resume', 'one');
    assert.equal(await nonceOf(back!), nonce);
  });

  /** The names of a checkpoint are taken away, not before the forks have ended; without them it is garbage. */
  const removeWhileForksRun = async () => {
    const gc = () =>
      world.json<{ removed: { manifests: number } }>('store', 'gc', world.store, '--grace', '0s');
    const remove = ['vm', 'checkpoint', '--remove', 'warm:1'];
    await world.refuses(1, /warm:1 is needed here by VM 'fork-[12]', VM 'fork-[12]'/, ...remove);
    // Without the memory images of machines.records() in daemon.ts only their disk would be held.
    const images = await world.json<{ tag: { name: string; manifest: string } }[]>(
      'store',
      'ls',
      world.store,
    );
    const held = async () => {
      const holds = await world.json<{ manifests: string[] }[]>('store', 'holds', world.store);
      return holds.flatMap(({ manifests }) => manifests);
    };
    const needed = images.flatMap(({ tag }) => (['warm', 'warm.disk'].includes(tag.name) ? [tag] : []));
    assert.equal(needed.length, 2);
    for (const endMs = performance.now() + 20_000; ; await sleep(200)) {
      const now = await held();
      if (needed.every(({ manifest }) => now.includes(manifest))) break;
      assert.ok(performance.now() < endMs, `${JSON.stringify(now)} is held of ${JSON.stringify(needed)}`);
    }
    await world.json('vm', 'stop', 'fork-1', 'fork-2', '--now');
    const { removed } = await world.json<{ removed: string[] }>(...remove);
    assert.deepEqual(removed.toSorted(), ['warm.disk:1', 'warm.state:1', 'warm:1']);
    await world.refuses(1, /not-found/, ...remove);
    await world.refuses(2, /no checkpoint but of kind 'disk'/, 'vm', 'checkpoint', '--remove', 'small:1');
    assert.equal((await gc()).removed.manifests, 3);
  };

  /** A resumed VM's QEMU has no kernel to boot (command-line.ts): its guest's reboot is another QEMU over the same disk.
   * Without #restart of machines.ts it would be gone; without `reboot=shutdown` it would hang in its firmware. */
  const reboots = async (fork: Vm) => {
    // The whole line is with the guest before the console is left: what QEMU has not read by then is lost.
    await ask(fork.consoleSocket, 'echo bye-$((6*7)); sleep 1; reboot -f', /bye-42/);
    const booted = async () => {
      const vm = (await world.json<Vm[]>('vm', 'ls')).find(({ id }) => id === fork.id);
      assert.ok(vm, 'it is gone');
      return vm.pid !== undefined && vm.pid !== fork.pid ? vm : undefined;
    };
    let vm: (Vm & { resumed?: boolean }) | undefined;
    for (const endMs = performance.now() + 60_000; vm === undefined; await sleep(200)) {
      vm = await booted();
      assert.ok(performance.now() < endMs, 'its guest did not reboot');
    }
    assert.equal(vm.resumed, false);
    await ask(vm.consoleSocket, 'echo "me $(cat /root/me) =$N="', new RegExp(`me ${fork.id} ==`));
    await world.json('vm', 'suspend', fork.id);
    await world.json('vm', 'resume', fork.id);
  };

  /** A name that means another checkpoint than a moment ago. Fails without `namesMoved` in control.ts: names are believed
   * for a second. */
  const isMoved = async (fork: Vm) => {
    for (const word of ['first', 'second']) {
      await ask(fork.consoleSocket, `echo ${word} > /root/word; sync; echo done-$((6*7))`, /done-42/);
      await world.json('vm', 'checkpoint', fork.id, '--to', 'moved:1');
      const [late] = await world.json<Vm[]>('vm', 'fork', 'moved:1', '--name', 'late');
      await ask(late!.consoleSocket, 'echo "word $(cat /root/word)"', new RegExp(`word ${word}`));
      await world.json('vm', 'stop', late!.id, '--now');
    }
    await world.json('vm', 'checkpoint', '--remove', 'moved:1');
    await world.json('store', 'gc', world.store, '--grace', '0s');
  };

  test('forks of a published checkpoint answer with its nonce, and are machines of their own', async () => {
    await world.json('vm', 'checkpoint', 'one', '--to', 'warm:1');
    const [origin] = await world.json<Vm[]>('vm', 'ls');
    assert.equal(await nonceOf(origin!), nonce);
    await world.json('vm', 'stop', 'one', '--now');

    const forks = await world.json<Vm[]>('vm', 'fork', 'warm:1', '--count', '2', '--name', 'fork');
    assert.deepEqual(
      forks.map(({ id }) => id),
      ['fork-1', 'fork-2'],
    );
    const identities = new Set<string>();
    for (const fork of forks) {
      assert.equal(await nonceOf(fork), nonce);
      const line = await ask(fork.consoleSocket, 'cat /run/identity', /\{"event":"fork",.*\}/);
      const identity = JSON.parse(line) as { name: string; instanceId: string; macAddress: string };
      assert.equal(identity.name, fork.id);
      // Fails without withSmallFaults in machine.ts: each fault of the guest reads 4 MiB of its memory then ("hg").
      const mapping = readFileSync(`/proc/${fork.pid}/smaps`, 'utf8').split('memory.raw')[1]!;
      assert.match(mapping.split('VmFlags:')[1]!, /^(?: (?!hg\b)[a-z]{2})+ *$/m);
      identities.add(identity.instanceId).add(identity.macAddress);
      // Each has a disk of its own.
      await ask(fork.consoleSocket, `echo ${fork.id} > /root/me; sync; echo done-$((6*7))`, /done-42/);
    }
    assert.equal(identities.size, 2 * forks.length);
    for (const fork of forks)
      await ask(fork.consoleSocket, 'echo "me $(cat /root/me)"', new RegExp(`me ${fork.id}`));
    await isMoved(forks[0]!);
    await reboots(forks[1]!);
    await removeWhileForksRun();
    assert.deepEqual(await world.json('clone', 'ls'), []);
    assert.deepEqual(readdirSync(path.join(world.folder, 'state', 'vms')), []);
  });
});
