/**
 * A workspace over hosts of this machine, each with a proxy, cache and mount of its own, one image server behind the ssh
 * tunnel and one broker: real guests on a virtual network that spans the hosts, asked for and ended by one command.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { buildGuest, guestCacheFolder } from '../../bench/guest/build.ts';
import type { HostInfo, WorkspaceInfo } from '../../src/broker/index.ts';
import { World } from './world.ts';

const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
const LONG = process.env['GRIDVFS_LONG'] === '1';
const HOSTS = LONG ? ['one', 'two', 'three'] : ['one', 'two'];
const COUNT = LONG ? 4 : 2;

suite(`a workspace of ${COUNT} machines over ${HOSTS.length} hosts`, () => {
  const world = new World();
  const socket = path.join(world.folder, 'broker.sock');
  const tokenOf = (who: string) => path.join(world.folder, `${who}.token`);
  const of = (what: string, host: string) => path.join(world.folder, `${what}-${host}`);
  const as = (who: string) => ['--broker', `unix:${socket}`, '--token-file', tokenOf(who)];
  let broker: ChildProcess;

  before(async () => {
    const guest = await buildGuest({ guest: 'small', folder: path.join(guestCacheFolder(), 'small') });
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json(
      ...['store', 'import', world.store, guest.disk, 'small:1', '--kernel', guest.kernel],
      ...['--initrd', guest.initrd, '--label', `boot.cmdline=${guest.commandLine}`],
      ...['--label', `boot.ready=${guest.readyText}`],
    );
    const server = await world.server();
    broker = spawn(
      process.execPath,
      [MAIN, 'broker', 'run', '--state-dir', path.join(world.folder, 'broker'), '--socket', socket, '--json'],
      { stdio: ['ignore', 'pipe', 'ignore'], env: world.environment },
    );
    await new Promise((resolve, reject) => {
      createInterface({ input: broker.stdout! }).once('line', resolve);
      broker.once('exit', () => reject(new Error('the broker ended before it was ready')));
    });
    const operator = path.join(world.folder, 'broker', 'operator.token');
    for (const [who, role] of [
      ['ada', 'user'],
      ['bob', 'user'],
      ['hosts', 'agent'],
    ] as const) {
      const { token } = await world.json<{ token: string }>(
        ...['broker', 'token', 'create', who, '--role', role],
        ...['--broker', `unix:${socket}`, '--token-file', operator],
      );
      writeFileSync(tokenOf(who), token + '\n', { mode: 0o600 });
    }
    for (const host of HOSTS) {
      mkdirSync(of('mnt', host));
      await world.json(
        ...['mount', server.url, of('mnt', host), '--name', host, '--cache-dir', of('cache', host)],
        ...['--state-dir', of('state', host), '--identity', world.identity],
        ...['--host-key', server.fingerprint, '--guest-memory', '1G', '--broker-host', host],
        ...['--broker', `unix:${socket}`, '--token-file', tokenOf('hosts'), '--network', 'lan'],
      );
    }
    await eventually(async () => {
      const images = await world.json<{ hosts: number }[]>('broker', 'images', ...as('ada'));
      return images.some(({ hosts }) => hosts === HOSTS.length);
    });
  });
  after(async () => {
    for (const host of HOSTS) await world.run('umount', of('mnt', host), '--force');
    if (broker.exitCode === null && broker.signalCode === null) {
      const ended = new Promise((resolve) => broker.once('exit', resolve));
      broker.kill('SIGTERM');
      await ended;
    }
    await world.dispose();
  });

  test('machines on several hosts reach each other and nobody else; ended, all is released and accounted', async () => {
    const request = ['small:1', '--memory', '128M', '--policy', 'spread'];
    const made = await world.json<WorkspaceInfo>(
      ...['workspace', 'request', ...request, '--name', 'lab', '--count', String(COUNT), '--network', 'lab'],
      ...as('ada'),
    );
    assert.equal(made.state, 'running');
    assert.ok(new Set(made.machines.map(({ host }) => host)).size > 1);
    const other = await world.json<WorkspaceInfo>(
      ...['workspace', 'request', ...request, '--name', 'other', '--network', 'others', ...as('bob')],
    );
    await world.refuses(
      1,
      /network 'lab' belongs to another user/,
      ...['workspace', 'request', 'small:1', '--network', 'lab', ...as('bob')],
    );
    const lease = 'ifconfig eth1 up; udhcpc -i eth1 -s /etc/udhcpc.sh -n -q; ifconfig eth1';
    for (const vm of [...made.machines, ...other.machines]) {
      await ask(vm.console!, lease, new RegExp(`inet addr:${vm.address!.replaceAll('.', '\\.')}\\b`));
    }
    const [first, ...rest] = made.machines;
    for (const vm of rest) {
      await ask(first!.console!, `busybox ping -c 2 -W 5 ${vm.address}`, /[12] packets received/);
    }
    await ask(rest.at(-1)!.console!, '(echo from-the-other | nc -l -p 90 &) > /dev/null; echo up', /\nup/);
    await ask(first!.console!, `nc -w 5 ${rest.at(-1)!.address} 90 < /dev/null`, /from-the-other/);
    // One of another network takes an address of this one: it finds nobody there.
    const intruder = other.machines[0]!.console!;
    await ask(
      intruder,
      `ifconfig eth1 10.64.0.77 netmask 255.255.255.0; ifconfig eth1`,
      /inet addr:10\.64\.0\.77/,
    );
    await ask(
      intruder,
      `busybox ping -c 2 -W 2 ${first!.address}`,
      /2 packets transmitted, 0 packets received/,
    );

    const shown = await world.run('workspace', 'show', 'lab', ...as('ada'));
    assert.match(shown.stdout, /lab-1 +running +\S+ +10\.64\.0\.2 /);
    for (const [who, name] of [
      ['ada', 'lab'],
      ['bob', 'other'],
    ] as const) {
      await world.json('workspace', 'end', name, ...as(who));
    }
    assert.deepEqual(await world.json('workspace', 'ls', ...as('ada')), []);
    const usage = await world.json<{ running: boolean }[]>('broker', 'usage', ...as('ada'));
    assert.deepEqual(
      usage.map(({ running }) => running),
      Array.from({ length: COUNT }, () => false),
    );
    const hosts = await world.json<HostInfo[]>('broker', 'hosts', ...as('ada'));
    assert.ok(hosts.every(({ vms, future }) => vms === 0 && future.memoryBytes === 2 ** 30));
  });
});

/** What the guest's shell says to a command, up to what is looked for; asked again while it is not. */
async function ask(console: string, command: string, answer: RegExp): Promise<void> {
  const connection = net.connect(console);
  let text = '';
  connection.on('data', (piece: Buffer) => (text += piece.toString('latin1')));
  try {
    await new Promise((resolve, reject) => connection.once('connect', resolve).once('error', reject));
    for (let turn = 0; turn < 30; turn++) {
      text = '';
      connection.write(`${command}\n`);
      for (let wait = 0; wait < 150; wait++) {
        await sleep(40);
        if (answer.test(text)) return;
      }
    }
    assert.fail(`no ${answer} to ${command}: ${text.slice(-300)}`);
  } finally {
    connection.destroy();
  }
}

async function eventually(what: () => Promise<boolean>): Promise<void> {
  const endMs = performance.now() + 200_000;
  while (!(await what())) {
    if (performance.now() > endMs) assert.fail('it did not happen in time');
    await sleep(50);
  }
}
