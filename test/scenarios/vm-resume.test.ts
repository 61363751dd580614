/**
 * Suspended VMs and checkpoints through the real command: a nonce that only the guest's memory holds proves that it
 * went on, and did not boot again.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { openSync, closeSync, readdirSync, readFileSync, writeSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { isRunning } from '../../src/core/linux.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

interface Vm {
  id: string;
  pid: number;
  clone: string;
  state: string;
  consoleSocket: string;
}
interface Suspended {
  id: string;
  memoryWrittenBytes: number;
}

suite('suspended VMs and checkpoints', () => {
  const world = new World();
  let server: ServerHandle;

  before(async () => {
    await world.storeWithGuest();
    server = await world.server('--accept-uploads');
    await world.mount(server.url, server);
  });
  after(() => world.dispose());

  /** Gives the guest something that only its memory has; what it answers to `ask`. */
  const setNonce = async (vm: Vm) => {
    const nonce = randomBytes(8).toString('hex');
    await ask(vm.consoleSocket, `N=${nonce}; echo set-$((6*7))`, /set-42/);
    return nonce;
  };
  const nonceOf = async (vm: Vm) => (await ask(vm.consoleSocket, 'echo "=$N="', /=(\w+)=/)).slice(1, -1);

  test('a suspended VM goes on where it was, again after its proxy was stopped, and writes what changed', async () => {
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'one');
    const nonce = await setNonce(vm);
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

    for (let round = 0; round < 1; round++) {
      const [again] = await world.json<Suspended[]>('vm', 'suspend', 'one');
      assert.ok(again!.memoryWrittenBytes < first!.memoryWrittenBytes / 2, `${again!.memoryWrittenBytes}`);
      const [back] = await world.json<Vm[]>('vm', 'resume', 'one');
      assert.equal(await nonceOf(back!), nonce);
    }
    await world.json('vm', 'suspend', 'one');
    await world.json('vm', 'stop', 'one');
    assert.deepEqual(await world.json('vm', 'ls'), []);
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });

  test('forks of a published checkpoint answer with its nonce, are machines of their own, and fork again', async () => {
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'origin');
    const nonce = await setNonce(vm);
    // What a guest does that wants to know who it is: waits for the line on its second port.
    await ask(
      vm.consoleSocket,
      '(read -r L < /dev/ttyS1; echo "$L" > /run/identity) & echo waits-$((6*7))',
      /waits-42/,
    );
    await world.json('vm', 'checkpoint', 'origin', '--to', 'warm:1');
    const [origin] = (await world.json<Vm[]>('vm', 'ls')).filter(({ id }) => id === 'origin');
    assert.equal(await nonceOf(origin!), nonce);
    await world.json('vm', 'stop', 'origin', '--now');

    const forks = await world.json<Vm[]>('vm', 'fork', 'warm:1', '--count', '2', '--name', 'fork');
    assert.deepEqual(
      forks.map(({ id }) => id),
      ['fork-1', 'fork-2'],
    );
    for (const fork of forks) assert.equal(await nonceOf(fork), nonce);
    const identities = new Set<string>();
    for (const fork of forks) {
      const line = await ask(fork.consoleSocket, 'cat /run/identity', /\{"event":"fork",.*\}/);
      const identity = JSON.parse(line) as { name: string; instanceId: string; macAddress: string };
      assert.equal(identity.name, fork.id);
      identities.add(identity.instanceId).add(identity.macAddress);
    }
    assert.equal(identities.size, 2 * forks.length);
    // Each has a disk of its own.
    for (const fork of forks)
      await ask(fork.consoleSocket, `echo ${fork.id} > /root/me; sync; echo done-$((6*7))`, /done-42/);
    for (const fork of forks)
      await ask(fork.consoleSocket, 'echo "me $(cat /root/me)"', new RegExp(`me ${fork.id}`));

    // A fork of a fork: its memory is a layer over the first checkpoint's.
    const [second] = forks;
    const newer = await setNonce(second!);
    await world.json('vm', 'checkpoint', 'fork-1', '--to', 'warm:2');
    await world.json('vm', 'stop', 'fork-1', 'fork-2', '--now');
    const child = await world.json<Vm>('vm', 'run', '--from-checkpoint', 'warm:2', '--name', 'child');
    assert.equal(await nonceOf(child), newer);
    await ask(child.consoleSocket, 'echo "me $(cat /root/me)"', /me fork-1/);
    await world.json('vm', 'stop', 'child', '--now');
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });

  test('a VM and a suspended VM go on when the proxy is killed and its successor takes the mount over', async () => {
    const running = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'runs');
    await world.json('vm', 'run', 'small:1', '--name', 'sleeps');
    const nonce = await setNonce(running);
    await world.json('vm', 'suspend', 'sleeps');
    const { pid } = await world.json<{ pid: number }>('proxy', 'status');
    process.kill(pid, 'SIGKILL');
    // Without Machines.adopt the successor knows no VM, and discards the clones of this one.
    const successor = await untilAnother(pid);
    assert.notEqual(successor, pid);
    assert.equal(isRunning(running.pid), true);
    assert.equal(await nonceOf(running), nonce);
    await ask(running.consoleSocket, 'echo more > /root/more; sync; echo written-$((6*7))', /written-42/);
    const states = (await world.json<Vm[]>('vm', 'ls')).map(({ id, state }) => `${id} ${state}`);
    assert.deepEqual(states.toSorted(), ['runs running', 'sleeps suspended']);
    await world.json('vm', 'suspend', 'runs');
    const [back] = await world.json<Vm[]>('vm', 'resume', 'runs');
    assert.equal(await nonceOf(back!), nonce);
    await world.json('vm', 'stop', 'runs', 'sleeps', '--now');
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });

  /** The pid of the proxy that has taken over from `pid`. */
  async function untilAnother(pid: number): Promise<number> {
    for (const endMs = performance.now() + 120_000; performance.now() < endMs;) {
      const { code, stdout } = await world.run('proxy', 'status', '--json');
      const now = code === 0 ? (JSON.parse(stdout) as { pid: number }).pid : pid;
      if (now !== pid) return now;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    return pid;
  }

  test('what is not as it was suspended is refused with the reason, and stays suspended', async () => {
    await world.json<Vm>('vm', 'run', 'small:1', '--name', 'hurt');
    await world.json('vm', 'suspend', 'hurt');
    const layers = path.join(world.folder, 'state', 'layers');
    const layerOf = async (clone: string) =>
      path.join(layers, (await world.json<{ layers: string[] }>('clone', 'show', clone)).layers.at(-1)!);
    const disk = path.join(await layerOf('hurt-disk'), 'data');
    const times = path.join(world.folder, 'times');
    await world.succeeds('touch', '-r', disk, times);
    await world.succeeds('touch', disk);
    await world.refuses(1, /disk, clone 'hurt-disk', is not as it was.*wrong-base/, 'vm', 'resume', 'hurt');
    await world.succeeds('touch', '-r', times, disk);

    const memory = path.join(await layerOf('hurt-memory'), 'data');
    const fd = openSync(memory, 'r+');
    writeSync(fd, 'damage', 64 * 1024 * 1024);
    closeSync(fd);
    await world.refuses(1, /its memory, clone 'hurt-memory', is damaged.*corrupt/, 'vm', 'resume', 'hurt');
    const file = path.join(world.folder, 'state', 'vms', 'hurt');
    const bytes = readFileSync(file);
    assert.equal(bytes.toString('latin1', 0, 8), 'GVFSCKPT');
    const [listed] = await world.json<Vm[]>('vm', 'ls');
    assert.equal(listed?.state, 'suspended');
    await world.refuses(2, /no checkpoint but of kind 'disk'/, 'vm', 'run', '--from-checkpoint', 'small:1');
    await world.json('vm', 'stop', 'hurt');
    assert.deepEqual(readdirSync(path.join(world.folder, 'state', 'vms')), []);
  });
});

/** Says a line on a serial console and waits for the answer; again when the shell did not listen yet. */
function ask(socketPath: string, line: string, answer: RegExp): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = net.connect(socketPath);
    let text = '';
    const say = () => socket.write(`${line}\n`);
    const again = setInterval(say, 5_000);
    const late = setTimeout(() => socket.destroy(new Error(`no answer to '${line}', only: ${text}`)), 30_000);
    socket.on('connect', say);
    socket.on('data', (part) => {
      text += part.toString('utf8');
      const match = answer.exec(text);
      if (!match) return;
      socket.destroy();
      resolve(match[0]);
    });
    socket.on('error', reject);
    socket.on('close', () => {
      clearTimeout(late);
      clearInterval(again);
    });
  });
}
