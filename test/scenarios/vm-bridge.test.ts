/**
 * VMs with an interface of their own in a bridge of their host, which is a network namespace here: it and everything in
 * it goes with the test. In the long run; needs root.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { isRoot } from '../../src/core/linux.ts';
import { ask } from './console.ts';
import { importSmall, killProxy, nonceOf, setNonce } from './vm-world.ts';
import type { Vm } from './vm-world.ts';
import { World } from './world.ts';

const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
const LONG = process.env['GRIDVFS_LONG'] === '1';

suite('VMs in a bridge of their host', { skip: LONG && isRoot() ? false : 'a long test, as root' }, () => {
  const world = new World();
  let namespace: ChildProcess;

  const inside = (...command: string[]) =>
    world.succeeds('nsenter', `--net=/proc/${namespace.pid}/ns/net`, ...command);
  /** The interfaces that are in the bridge. */
  const ports = async () =>
    (JSON.parse(await inside('ip', '-json', 'link', 'show', 'master', 'br0')) as { ifname?: string }[])
      .flatMap(({ ifname }) => ifname ?? [])
      .toSorted();
  const give = (vm: Vm, address: string) =>
    ask(
      vm.consoleSocket,
      `until [ -d /sys/class/net/eth0 ]; do sleep 1; done; ifconfig eth0 ${address} netmask 255.255.255.0; echo up-$((6*7))`,
      /up-42/,
      { againMs: 30_000 },
    );
  const reaches = (vm: Vm, address: string) =>
    ask(vm.consoleSocket, `/bin/ping -c 3 -W 5 ${address}`, /[1-3] packets received/, { againMs: 30_000 });

  before(async () => {
    await importSmall(world);
    namespace = spawn('unshare', ['--net', 'sh', '-c', 'echo ready; read over'], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    await once(namespace.stdout!, 'data');
    await inside('ip', 'link', 'add', 'br0', 'type', 'bridge');
    await inside('ip', 'address', 'add', '10.88.0.1/24', 'dev', 'br0');
    await inside('ip', 'link', 'set', 'br0', 'up');
    await inside(
      process.execPath,
      ...[MAIN, 'mount', world.store, world.mountpoint, ...world.proxyOptions()],
    );
  });
  after(async () => {
    await world.dispose();
    const ended = once(namespace, 'exit');
    namespace.stdin!.end();
    await ended;
  });

  test('they reach each other and the host, also after a suspension and the death of the proxy, and leave no interface', async () => {
    const run = (name: string) => world.json<Vm>('vm', 'run', 'small:1', '--name', name, '--bridge', 'br0');
    const one = await run('one');
    const two = await run('two');
    assert.equal((await ports()).length, 2);
    await give(one, '10.88.0.11');
    await give(two, '10.88.0.12');
    await reaches(one, '10.88.0.12');
    await reaches(two, '10.88.0.1');

    const nonce = await setNonce(one);
    await world.json('vm', 'suspend', 'one');
    assert.equal((await ports()).length, 1);
    const [back] = await world.json<Vm[]>('vm', 'resume', 'one');
    assert.equal(await nonceOf(back!), nonce);
    await reaches(back!, '10.88.0.12');

    await killProxy(world);
    await reaches(two, '10.88.0.11');
    await world.json('vm', 'stop', 'one', 'two', '--now');
    assert.deepEqual(await ports(), []);
  });

  test('a bridge that is not there is refused with the reason, and nothing of the VM is left', async () => {
    await world.refuses(
      1,
      /no bridge 'br9'; `ip link/,
      'vm',
      'run',
      'small:1',
      '--name',
      'lost',
      '--bridge',
      'br9',
    );
    assert.deepEqual(await world.json('vm', 'ls'), []);
    assert.deepEqual(await world.json('clone', 'ls'), []);
    assert.doesNotMatch(await inside('ip', 'link'), / gv[0-9a-f]{10}/);
  });
});
