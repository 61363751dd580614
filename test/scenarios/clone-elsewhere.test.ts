/** A guest's clone goes to another host, in a file and through the image server, and boots there with what it wrote. */
import assert from 'node:assert/strict';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isRunning } from '../../src/core/linux.ts';
import { ask } from './console.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

interface Vm {
  pid: number;
  consoleSocket: string;
}

const LONG = process.env['GRIDVFS_LONG'] === '1';
const KILLS = 6;

suite('a clone of a guest on two hosts', { skip: LONG ? false : 'a long test' }, () => {
  const world = new World();
  const second = World.onSecondHost(world);
  let server: ServerHandle;
  /** What the guest says of its file. */
  let sum = '';

  before(async () => {
    await world.storeWithGuest();
    server = await world.server('--accept-uploads');
    await world.mount(server.url, server);
    await second.mount(server.url, server);
  });
  after(async () => {
    await second.dispose();
    await world.dispose();
  });

  const sumOf = (vm: Vm) => ask(vm.consoleSocket, 'md5sum /root/data', /[0-9a-f]{32}(?= +\/root\/data)/);

  test('pushed while its VM runs and exported when that has stopped, it boots on the other host, where no tag shows its image any more', async () => {
    await world.json('clone', 'create', 'small:1', '--name', 'work', '--persistent');
    const vm = await world.json<Vm>('vm', 'run', '--clone', 'work', '--name', 'here');
    await ask(
      vm.consoleSocket,
      'dd if=/dev/urandom of=/root/data bs=1k count=300 2>/dev/null; sync; ping written',
      /pong written(?=\r?\n)/,
    );
    sum = await sumOf(vm);
    await world.json('clone', 'push', 'work');
    await world.json('vm', 'stop', 'here');
    const archive = path.join(world.folder, 'work.tar');
    await world.json('clone', 'export', 'work', archive);

    // The kernel is of the image that both clones lie on; no name leads to it now.
    await world.json('store', 'tag', world.store, 'small:1', 'spare:1');
    await second.json('clone', 'import', archive, '--name', 'imported');
    await world.json('store', 'rm', world.store, 'spare:1');
    await world.json('store', 'rm', world.store, 'small:1');
    await second.json('clone', 'pull', 'work:pushed', '--name', 'pulled');
    for (const clone of ['imported', 'pulled']) {
      const there = await second.json<Vm>('vm', 'run', '--clone', clone, '--name', clone);
      assert.equal(await sumOf(there), sum, clone);
      await second.json('vm', 'stop', clone, '--now');
    }
  });

  test(`${KILLS} times the VM and its proxy are killed while the guest writes: it boots again with all that it synced`, async () => {
    let synced = 0;
    for (let kill = 0; kill <= KILLS; kill++) {
      const vm = await second.json<Vm>('vm', 'run', '--clone', 'pulled', '--name', 'victim');
      assert.equal(await sumOf(vm), sum);
      const number = '$(cat /root/n 2>/dev/null || echo 0)';
      const check = `for i in $(seq 1 ${number}); do [ "$(cat /root/f$i)" = "this is $i" ] || ping lost $i; done; ping checked ${number}`;
      // The line itself comes back as an echo, and where it is long, in pieces.
      const said = await ask(vm.consoleSocket, check, /(?:pong lost|pong checked) \d+(?=\r?\n)/);
      assert.match(said, /checked/, `kill ${kill}, ${synced} files were synced`);
      assert.ok(Number(said.split(' ').at(-1)) >= synced, `${synced} files were synced: ${said}`);
      if (kill === KILLS) {
        await second.json('vm', 'stop', 'victim', '--now');
        return;
      }
      const write =
        'i=$(cat /root/n 2>/dev/null || echo 0); while :; do i=$((i+1)); echo this is $i > /root/f$i; sync; echo $i > /root/n; sync; ping synced $i; done';
      const from = synced + 3 + kill;
      const last = await ask(vm.consoleSocket, write, new RegExp(`pong synced ${from}(?=\\r?\\n)`));
      synced = Number(last.split(' ').at(-1));
      // The VM, the proxy, and what would start the next one.
      const pids = second
        .processesLeft()
        .filter((line) => /qemu| proxy (run|serve) /.test(line))
        .map((line) => Number.parseInt(line, 10));
      assert.ok(pids.includes(vm.pid) && pids.length > 1);
      for (const pid of pids) process.kill(pid, 'SIGKILL');
      while (pids.some(isRunning)) await sleep(20);
      await second.mount(server.url, server);
    }
  });
});
