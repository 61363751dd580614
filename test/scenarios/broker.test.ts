/**
 * A broker over three hosts of this machine, each with a proxy, cache and mount of its own, and one image server
 * behind the ssh tunnel; users ask through the real command, and real guests boot.
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
import type { HostInfo, JobInfo, VmInfo } from '../../src/broker/index.ts';
import { World } from './world.ts';

const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
const HOSTS = ['one', 'two', 'three'];

suite('a broker over three hosts', () => {
  const world = new World();
  const socket = path.join(world.folder, 'broker.sock');
  const tokens = (who: string) => path.join(world.folder, `${who}.token`);
  const mountpoint = (host: string) => path.join(world.folder, `mnt-${host}`);
  let broker: ChildProcess;

  async function startBroker(): Promise<void> {
    broker = spawn(
      process.execPath,
      [MAIN, 'broker', 'run', '--state-dir', path.join(world.folder, 'broker'), '--socket', socket, '--json'],
      { stdio: ['ignore', 'pipe', 'ignore'], env: world.environment },
    );
    await new Promise((resolve, reject) => {
      createInterface({ input: broker.stdout! }).once('line', resolve);
      broker.once('exit', () => reject(new Error('the broker ended before it was ready')));
    });
  }
  const stopBroker = async (signal: NodeJS.Signals) => {
    const ended = new Promise((resolve) => broker.once('exit', resolve));
    broker.kill(signal);
    await ended;
  };
  const as = (who: string) => ['--broker', `unix:${socket}`, '--token-file', tokens(who)];
  const ask = <T>(who: string, ...args: string[]) => world.json<T>('broker', ...args, ...as(who));

  before(async () => {
    const guest = await buildGuest({ guest: 'small', folder: path.join(guestCacheFolder(), 'small') });
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json(
      ...[
        'store',
        'import',
        world.store,
        guest.disk,
        'small:1',
        '--kernel',
        guest.kernel,
        '--initrd',
        guest.initrd,
      ],
      ...['--label', `boot.cmdline=${guest.commandLine}`, '--label', `boot.ready=${guest.readyText}`],
      ...['--label', 'os=small', '--label', 'kernel=6.1.0'],
    );
    const server = await world.server();
    await startBroker();
    const operator = [
      '--broker',
      `unix:${socket}`,
      '--token-file',
      path.join(world.folder, 'broker', 'operator.token'),
    ];
    for (const [who, role] of [
      ['ada', 'user'],
      ['bob', 'user'],
      ['hosts', 'agent'],
    ] as const) {
      const { token } = await world.json<{ token: string }>(
        'broker',
        'token',
        'create',
        who,
        '--role',
        role,
        ...operator,
      );
      writeFileSync(tokens(who), token + '\n', { mode: 0o600 });
    }
    for (const host of HOSTS) {
      mkdirSync(mountpoint(host));
      const of = (what: string) => path.join(world.folder, `${what}-${host}`);
      await world.json(
        ...[
          'mount',
          server.url,
          mountpoint(host),
          '--name',
          host,
          '--cache-dir',
          of('cache'),
          '--state-dir',
          of('state'),
        ],
        ...['--identity', world.identity, '--host-key', server.fingerprint, '--guest-memory', '1G'],
        ...[
          '--broker',
          `unix:${socket}`,
          '--token-file',
          tokens('hosts'),
          '--broker-host',
          host,
          '--network',
          'lan',
        ],
      );
    }
    await eventually(async () => {
      const images = await ask<{ hosts: number }[]>('ada', 'images');
      return images.find(({ hosts }) => hosts === HOSTS.length) !== undefined;
    });
  });
  after(async () => {
    for (const host of HOSTS) await world.run('umount', mountpoint(host), '--force');
    if (broker.exitCode === null && broker.signalCode === null) await stopBroker('SIGTERM');
    await world.dispose();
  });

  test('the second request for an image lands on the host that has it warm, and says so', async () => {
    const first = (
      await ask<JobInfo>('ada', 'request', '--os', 'small', '--kernel', '>=6 <7', '--memory', '128M')
    ).vms[0]!;
    assert.equal(first.state, 'running');
    assert.ok(first.fetchedBytes! > 0 && first.timeline!['readyMs']! > 0);
    await ask('ada', 'stop', first.id, '--grace', '0');
    const second = (await ask<JobInfo>('ada', 'request', 'small', '--memory', '128M', '--name', 'warm'))
      .vms[0]!;
    assert.equal(second.host, first.host);
    assert.match(second.reason!, /[1-9]\d* bytes of the image warm/);
    assert.ok(
      second.fetchedBytes! < first.fetchedBytes! / 10,
      `${second.fetchedBytes} of ${first.fetchedBytes}`,
    );
    await ask('ada', 'stop', 'warm', '--grace', '0');
  });

  test('four clones are requested, booted, listed, reached, stopped and accounted, and nobody else sees them', async () => {
    const job = await ask<JobInfo>(
      ...([
        'ada',
        'request',
        'small:1',
        '--count',
        '4',
        '--memory',
        '128M',
        '--name',
        'web',
        '--policy',
        'spread',
      ] as const),
    );
    assert.equal(job.state, 'done');
    assert.deepEqual(
      [...new Set(job.vms.map(({ host }) => host!))].toSorted(),
      HOSTS.toSorted(),
      JSON.stringify([job, await ask('ada', 'hosts')]),
    );
    for (const vm of job.vms) assert.match(await pong(vm.console!, vm.id), /pong/);
    const local = await Promise.all(
      HOSTS.map((host) => world.json<{ id: string }[]>('vm', 'ls', '--proxy', host)),
    );
    assert.deepEqual(
      local
        .flat()
        .map(({ id }) => id)
        .toSorted(),
      (await ask<VmInfo[]>('ada', 'vms')).map(({ placedAs }) => placedAs!).toSorted(),
    );
    assert.deepEqual(await ask('bob', 'vms'), []);
    await world.refuses(1, /no VM 'web-1'/, 'broker', 'stop', 'web-1', ...as('bob'));
    await world.refuses(1, /role 'agent' cannot/, 'broker', 'vms', ...as('hosts'));

    // A broker that is killed and started again has the same VMs.
    await stopBroker('SIGKILL');
    await startBroker();
    assert.equal((await ask<VmInfo[]>('ada', 'vms')).filter(({ state }) => state === 'running').length, 4);

    await ask('ada', 'stop', ...job.vms.map(({ name }) => name), '--grace', '0');
    assert.deepEqual(await ask('ada', 'vms'), []);
    const usage = await ask<{ running: boolean }[]>('ada', 'usage');
    assert.equal(usage.length, 6);
    assert.ok(usage.every(({ running }) => !running));
    const hosts = await ask<HostInfo[]>('ada', 'hosts');
    assert.deepEqual(
      hosts.map(({ vms, future }) => [vms, future.memoryBytes]),
      HOSTS.map(() => [0, 2 ** 30]),
    );
  });
});

/** What the guest answers on its console. */
async function pong(console: string, word: string): Promise<string> {
  const connection = net.connect(console);
  try {
    let text = '';
    connection.on('data', (part: Buffer) => (text += part.toString('utf8')));
    await new Promise((resolve, reject) => connection.once('connect', resolve).once('error', reject));
    connection.write(`ping ${word.replaceAll(/\D/g, '')}\n`);
    await eventually(async () => /pong \d+\r?\n/.test(text));
    return text;
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
