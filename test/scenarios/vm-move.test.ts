/** A VM on two hosts of one store: moved through a stock sshd, after a resume too, and base checkpoints made on the one. */
import assert from 'node:assert/strict';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { startSshd } from '../../bench/peers/sshd.ts';
import type { Sshd } from '../../bench/peers/sshd.ts';
import { isRunning } from '../../src/core/linux.ts';
import { ask } from './console.ts';
import { importSmall, nonceOf, setNonce } from './vm-world.ts';
import type { Suspended, Vm } from './vm-world.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';
const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');

suite('a VM on two hosts', { skip: LONG ? false : 'a long test' }, () => {
  const first = new World();
  const second = World.onSecondHost(first);
  let server: ServerHandle;
  let sshd: Sshd;

  before(async () => {
    await importSmall(first);
    server = await first.server('--accept-uploads');
    await first.mount(server.url, server);
    await second.mount(server.url, server);
    sshd = await startSshd(path.join(first.folder, 'sshd'));
  });
  after(async () => {
    await sshd.stop();
    await second.dispose();
    await first.dispose();
  });

  /** Options of a move to the host that `world` is. */
  const to = (world: World) => [
    ...['--to', `${sshd.user}@127.0.0.1`],
    ...[
      '--rsh',
      `ssh -F /dev/null -i ${sshd.identity} -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -p ${sshd.port}`,
    ],
    '--remote-command',
    `env GRIDVFS_RUNTIME_DIR=${world.environment['GRIDVFS_RUNTIME_DIR']} ${process.execPath} ${MAIN}`,
  ];

  test('it moves there and back as the machine that it is, with its memory and its disk', async () => {
    const vm = await first.json<Vm>('vm', 'run', 'small:1', '--name', 'walker', '--hostname', 'walker');
    const nonce = await setNonce(vm);
    await ask(vm.consoleSocket, 'echo here > /root/where; sync; echo written-$((6*7))', /written-42/);
    const moved = await first.json<Vm>('vm', 'move', 'walker', ...to(second));
    assert.equal(isRunning(vm.pid), false);
    assert.deepEqual(await first.json('vm', 'ls'), []);
    assert.deepEqual(await first.json('clone', 'ls'), []);
    assert.equal(await nonceOf(moved), nonce);
    // No fork: it was told nothing of another name.
    await ask(
      moved.consoleSocket,
      'cat /root/where; hostname; ls /run/identity',
      /here\s+walker\s+ls: .*No such file/,
    );
    await ask(moved.consoleSocket, 'echo there > /root/where; sync; echo written-$((6*7))', /written-42/);
    // What it changed since is all that a suspension writes, and all that moves.
    const [suspended] = await second.json<Suspended[]>('vm', 'suspend', 'walker');
    assert.ok(suspended!.memoryWrittenBytes < 32 * 1024 * 1024, `${suspended!.memoryWrittenBytes}`);
    const back = await second.json<Vm>('vm', 'move', 'walker', ...to(first));
    assert.equal(await nonceOf(back), nonce);
    await ask(back.consoleSocket, 'cat /root/where', /^there\r?$/m);
    assert.deepEqual(await second.json('vm', 'ls'), []);
    await first.json('vm', 'stop', 'walker', '--now');
  });

  test('where the other host refuses it or cannot be reached, it goes on where it was', async () => {
    const vm = await first.json<Vm>('vm', 'run', 'small:1', '--name', 'stays');
    const nonce = await setNonce(vm);
    await first.refuses(
      1,
      /unreachable/,
      'vm',
      'move',
      'stays',
      '--to',
      '127.0.0.1',
      '--rsh',
      'ssh -F /dev/null -o BatchMode=yes -p 1',
    );
    await second.json('vm', 'run', 'small:1', '--name', 'stays');
    await first.refuses(1, /there is a VM 'stays'/, 'vm', 'move', 'stays', ...to(second));
    await second.json('vm', 'stop', 'stays', '--now');
    const now = await first.json<Vm>('vm', 'show', 'stays');
    assert.equal(
      now.state === 'suspended' ? 'suspended' : await nonceOf(now),
      now.state === 'suspended' ? 'suspended' : nonce,
    );
    await first.json('vm', 'stop', 'stays', '--now');
  });

  test('a base checkpoint is made by one command, used where it fits, on any host, and not where it does not', async () => {
    await first.json('vm', 'checkpoint', '--base', 'small:1');
    assert.deepEqual(await first.json('vm', 'ls'), []);
    const vms = await second.json<Vm[]>(
      'vm',
      'run',
      'small:1',
      '--from-checkpoint',
      '--count',
      '2',
      '--name',
      'quick',
    );
    for (const vm of vms) {
      assert.equal(vm.image, 'small.base:1');
      await ask(vm.consoleSocket, 'echo "$(hostname) is up"', new RegExp(`${vm.id} is up`));
    }
    await second.json('vm', 'stop', ...vms.map(({ id }) => id), '--now');
    const larger = await second.run(
      'vm',
      'run',
      'small:1',
      '--from-checkpoint',
      '--memory',
      '160M',
      '--json',
    );
    assert.match(
      larger.stderr,
      /booting: small.base:1 does not fit: its checkpoint.memory-mib is 128, not 160/,
    );
    const booted = JSON.parse(larger.stdout) as Vm;
    assert.equal(booted.image, 'small:1');
    await second.json('vm', 'stop', booted.id, '--now');
  });
});
