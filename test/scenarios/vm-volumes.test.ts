/** Volumes, bounds, seed, control groups and the account of a VM through the real command, with one guest. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { existsSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { Cgroups } from '../../src/vmm/index.ts';
import { ask } from './console.ts';
import { importSmall, killProxy, nonceOf, setNonce } from './vm-world.ts';
import type { Vm } from './vm-world.ts';
import { World } from './world.ts';

interface Volume {
  readonly name: string;
  readonly clone: string;
}

interface Shown extends Vm {
  readonly volumes: readonly Volume[];
  readonly limits?: { bytesPerSecond?: number; operationsPerSecond?: number };
  readonly spent: {
    cpuSeconds: number;
    reads: number;
    readBytes: number;
    writes: number;
    writeBytes: number;
  };
}

suite('what a VM has beside its disk', () => {
  const world = new World();
  const cgroup = `gridvfs-test-${randomBytes(4).toString('hex')}`;
  const key = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample somebody@somewhere';
  let vm: Vm;

  before(async () => {
    await importSmall(world);
    const data = path.join(world.folder, 'data.raw');
    writeFileSync(data, 'volum');
    truncateSync(data, 4 * MIB);
    await world.json('store', 'import', world.store, data, 'data:1');
    await world.mount(world.store, undefined, '--cgroup', cgroup);
    writeFileSync(path.join(world.folder, 'key.pub'), `${key}\n`);
    vm = await world.json<Vm>(
      ...['vm', 'run', 'small:1', '--name', 'one', '--hostname', 'from-seed'],
      ...['--ssh-key', path.join(world.folder, 'key.pub')],
    );
  });
  after(async () => {
    await world.dispose();
    await (await Cgroups.open(cgroup)).dispose();
  });

  const show = () => world.json<Shown>('vm', 'show', 'one');
  /** The guest's look at the disk of that serial number. */
  const look = (id: string) =>
    `for d in /sys/block/vd*; do [ "$(cat $d/serial)" = ${id} ] && echo "at-$(head -c 5 /dev/\${d##*/})-end"; done; echo searched-$((6*7))`;

  test('its guest has the name and the key of its seed, and its processes are in groups of their own', async () => {
    await ask(
      vm.consoleSocket,
      'echo "$(hostname): $(cat /root/.ssh/authorized_keys)"',
      new RegExp(`from-seed: ${key}`),
    );
    assert.match(readFileSync(`/proc/${vm.pid}/cgroup`, 'utf8'), new RegExp(`:/.*${cgroup}/vm-one$`, 'm'));
    const { pid } = await world.json<{ pid: number }>('proxy', 'status');
    assert.match(readFileSync(`/proc/${pid}/cgroup`, 'utf8'), new RegExp(`:/.*${cgroup}/proxy$`, 'm'));
  });

  test('volumes come and go while it runs, stay over a suspension and the death of the proxy, and keep what was written', async () => {
    await world.json('vm', 'attach', 'one', 'data:1');
    await world.json('clone', 'create', 'data:1', '--name', 'mine', '--persistent');
    await world.json('vm', 'attach', 'one', '--clone', 'mine');
    await world.refuses(1, /'data' already/, 'vm', 'attach', 'one', 'data:1');
    await world.refuses(1, /disk of a VM/, 'vm', 'attach', 'one', '--clone', 'mine', '--name', 'again');
    await world.refuses(1, /kind 'kernel'|no image/, 'vm', 'attach', 'one', 'nothing:1');
    await ask(vm.consoleSocket, look('mine'), /at-volum-end/);
    const write = look('mine').replace('echo "at', 'printf wrote > /dev/${d##*/}; sync; echo "at');
    await ask(vm.consoleSocket, write, /at-wrote-end/);
    await world.refuses(2, /has volumes \(data, mine\)/, 'vm', 'checkpoint', 'one', '--to', 'warm:1');
    const nonce = await setNonce(vm);

    await world.json('vm', 'suspend', 'one');
    await world.refuses(1, /kept for the suspended VM 'one'/, 'clone', 'rm', 'mine');
    const [back] = await world.json<Shown[]>('vm', 'resume', 'one');
    assert.equal(await nonceOf(back!), nonce);
    assert.deepEqual(
      back!.volumes.map(({ name }) => name),
      ['data', 'mine'],
    );
    await ask(back!.consoleSocket, look('mine'), /at-wrote-end/);
    await killProxy(world);
    const { disk } = await world.json<{ disk: string }>('clone', 'show', 'mine');
    const detached = await world.json<Volume>('vm', 'detach', 'one', 'mine');
    assert.equal(detached.clone, 'mine');
    assert.equal(await world.succeeds('head', '-c', '5', disk), 'wrote');
    await ask(back!.consoleSocket, look('data'), /at-volum-end/);
    await world.json('vm', 'detach', 'one', 'data');
    await world.refuses(1, /no volume 'data'/, 'vm', 'detach', 'one', 'data');
    await world.json('clone', 'rm', 'mine');
  });

  test('its bounds can be set while it runs, and what the service spent on it is told', async () => {
    const limited = await world.json<Shown>('vm', 'limit', 'one', '--io-bytes', '1M', '--io-ops', '200');
    assert.deepEqual(limited.limits, { bytesPerSecond: MIB, operationsPerSecond: 200 });
    const before = (await show()).spent;
    const startMs = performance.now();
    await ask(
      vm.consoleSocket,
      'dd if=/dev/vda of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null; echo read-$((6*7))',
      /read-42/,
      { againMs: 30_000 },
    );
    assert.ok(performance.now() - startMs > 900, 'two mebibytes at one a second');
    const { spent } = await show();
    assert.ok(spent.readBytes - before.readBytes >= 2 * MIB, `${spent.readBytes} after ${before.readBytes}`);
    assert.ok(spent.reads > before.reads && spent.cpuSeconds > before.cpuSeconds);
    assert.deepEqual((await world.json<Shown>('vm', 'limit', 'one')).limits, {});
    await world.json('vm', 'stop', 'one', '--now');
    assert.deepEqual(await world.json('clone', 'ls'), []);
    for (const folder of (await Cgroups.open(cgroup)).folders) {
      assert.equal(existsSync(path.join(folder, 'proxy')), true);
      assert.equal(existsSync(path.join(folder, 'vm-one')), false);
    }
  });
});
