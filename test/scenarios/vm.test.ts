/** VMs over clones on the mount, through the real command, the ssh tunnel, the kernel and QEMU. */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isRunning } from '../../src/core/linux.ts';
import { ask } from './console.ts';
import { World } from './world.ts';
import type { ProxyHandle, ServerHandle } from './world.ts';

const isLong = process.env['GRIDVFS_LONG'] === '1';

interface Vm {
  id: string;
  pid: number;
  clone: string;
  state: string;
  consoleSocket: string;
  consoleLog: string;
  timeline: { clonedMs: number; startedMs: number; readyMs: number };
}

suite('VMs over clones', () => {
  const world = new World();
  let server: ServerHandle;

  before(async () => {
    await world.storeWithGuest();
    server = await world.server();
    await world.mount(server.url, server);
  });
  after(() => world.dispose());

  test('a VM boots from a non-persistent clone, its guest answers, and the clone goes with it', async () => {
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'one');
    assert.equal(vm.state, 'running');
    assert.ok(vm.timeline.clonedMs <= vm.timeline.startedMs && vm.timeline.startedMs < vm.timeline.readyMs);
    assert.equal(await ask(vm.consoleSocket, 'ping 4711', /pong \d+(?=\r?\n)/), 'pong 4711');
    const [listed] = await world.json<Vm[]>('vm', 'ls');
    assert.equal(listed?.id, 'one');
    await world.refuses(1, /open/, 'clone', 'rm', vm.clone);
    await world.refuses(1, /1 VM/, 'umount', world.mountpoint);
    await world.json('vm', 'stop', 'one');
    assert.deepEqual(await world.json('vm', 'ls'), []);
    assert.equal(isRunning(vm.pid), false);
    await eventually(async () => (await world.json<unknown[]>('clone', 'ls')).length === 0);
    assert.equal(existsSync(path.join(world.folder, 'state', 'clones', vm.clone)), false);
  });

  test(
    'two VMs of one image run side by side, and the second fetches nothing',
    { skip: !isLong && 'a long test' },
    async () => {
      const fetched = async () =>
        (await world.json<{ cache: { fetchedChunks: number } }>('proxy', 'status')).cache.fetchedChunks;
      const before = await fetched();
      const vms = await Promise.all(
        ['a', 'b'].map((name) => world.json<Vm>('vm', 'run', 'small:1', '--name', name)),
      );
      assert.equal(await fetched(), before);
      assert.notEqual(vms[0]!.clone, vms[1]!.clone);
      await world.json('vm', 'stop', 'a', 'b', '--now');
    },
  );

  test('the file system of a clone whose VM was killed is clean or replays its journal', async () => {
    const { disk } = await world.json<{ disk: string }>(
      'clone',
      'create',
      'small:1',
      '--name',
      'kept',
      '--persistent',
    );
    for (let round = 0; round < 3; round++) {
      const vm = await world.json<Vm>('vm', 'run', '--clone', 'kept', '--name', 'victim');
      await sleep(300 * round);
      process.kill(vm.pid, 'SIGKILL');
      await eventually(async () => {
        const listed = await world.json<Vm[]>('vm', 'ls');
        return listed.every((one) => one.state === 'failed');
      });
      const copy = path.join(world.folder, 'copy.raw');
      await world.succeeds('cp', '--sparse=always', disk, copy);
      // -p replays the journal and repairs what is safe; 1 is "errors corrected", 4 and up are real damage.
      const check = await world.program('e2fsck', '-p', '-f', copy);
      assert.ok(
        check.code === 0 || check.code === 1,
        `e2fsck said ${check.code}: ${check.stdout}${check.stderr}`,
      );
      assert.doesNotMatch(check.stdout, /UNEXPECTED INCONSISTENCY/);
    }
    await world.json('clone', 'rm', 'kept');
  });

  const skip = process.env['GRIDVFS_LONG'] === '1' ? false : 'a long test';
  test(
    'a guest whose clone has reached its quota waits and is told nothing; it goes on when the quota is raised',
    { skip },
    async () => {
      await world.json('clone', 'create', 'small:1', '--name', 'narrow', '--persistent', '--quota', '4M');
      const { consoleSocket } = await world.json<Vm>('vm', 'run', '--clone', 'narrow', '--name', 'full');
      const state = async () => (await world.json<{ reason?: string }>('vm', 'show', 'full')).reason;
      // Eight megabytes.
      const four = '/bin/busybox /bin/busybox /bin/busybox /bin/busybox';
      const write = `(cat ${four} > /root/data; sync; touch /run/written) & ping begun`;
      await ask(consoleSocket, write, /pong begun(?=\r?\n)/);
      await eventually(async () => /disk is full/.test((await state()) ?? ''), 60_000);
      await world.json('clone', 'set', 'narrow', '--quota', '40M');
      await ask(
        consoleSocket,
        'while [ ! -e /run/written ]; do sleep 1; done; ping written',
        /pong written(?=\r?\n)/,
      );
      const sums = `cat ${four} | md5sum; md5sum < /root/data; dmesg | grep -c 'I/O error'`;
      const [, wanted, found, errors] = /([0-9a-f]{32})\s.*?([0-9a-f]{32})\s+-\s+(\d+)/s.exec(
        await ask(consoleSocket, sums, /([0-9a-f]{32})\s.*?([0-9a-f]{32})\s+-\s+(\d+)(?=\r?\n)/s),
      )!;
      assert.deepEqual([found, errors], [wanted, '0']);
      await eventually(async () => (await state()) === undefined);
      await world.json('vm', 'stop', 'full');
      await world.json('clone', 'rm', 'narrow');
    },
  );

  test('a proxy that was killed with its holder leaves no VM behind once the next one has started', async () => {
    const proxy = await world.json<ProxyHandle>('proxy', 'status');
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'orphan');
    await world.killWhole(proxy);
    await world.mount(server.url, server);
    assert.equal(isRunning(vm.pid), false);
    assert.deepEqual(await world.json('clone', 'ls'), []);
    assert.match(readFileSync(path.join(world.folder, 'state', 'proxy.log'), 'utf8'), /orphan .*ended/);
  });

  test('umount --force stops what runs', async () => {
    const vm = await world.json<Vm>('vm', 'run', 'small:1');
    await world.json('umount', world.mountpoint, '--force');
    assert.equal(isRunning(vm.pid), false);
    assert.deepEqual(world.mountsLeft(), []);
  });
});

async function eventually(condition: () => Promise<boolean>, withinMs = 15_000): Promise<void> {
  for (const endMs = performance.now() + withinMs; !(await condition()); await sleep(50)) {
    assert.ok(performance.now() < endMs, `not within ${withinMs} ms: ${condition.toString()}`);
  }
}
