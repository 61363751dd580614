/**
 * A broker over three hosts, each a network namespace with an address, a proxy, a cache and a mount of its own, and one
 * image server behind the ssh tunnel; users ask through the real command, and real guests boot.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, suite, test } from 'node:test';
import type { HostInfo, ImageInfo, JobInfo, VmInfo } from '../../src/broker/index.ts';
import { ask } from './console.ts';
import { eventually, Grid, runningCopies } from './grid.ts';

const HOSTS = ['one', 'two', 'three'];
const LONG = process.env['GRIDVFS_LONG'] === '1' ? false : 'a long test';

suite('a broker over three hosts', () => {
  const grid = new Grid(HOSTS);
  const { world } = grid;
  before(() => grid.start());
  after(() => grid.stop());

  const vmOf = (which: string) => grid.ask<VmInfo>('ada', 'vm', which);
  /** Gives the guest something that only its memory has. */
  const setNonce = async (vm: VmInfo) => {
    const nonce = randomBytes(8).toString('hex');
    await ask(vm.console!, `N=${nonce}; echo set-$((6*7))`, /set-42/);
    return nonce;
  };
  const nonceOf = async (vm: VmInfo) => (await ask(vm.console!, 'echo "=$N="', /=(\w+)=/)).slice(1, -1);
  /** Its console is known with its host's next report. */
  const withConsole = async (which: string) => {
    await eventually(async () => (await vmOf(which)).console !== undefined);
    return vmOf(which);
  };

  test('four clones are requested, booted, listed, reached, suspended, resumed on another host, stopped and accounted', async () => {
    const job = await grid.ask<JobInfo>(
      ...(['ada', 'request', 'small:1', '--count', '4', '--memory', '128M'] as const),
      ...['--name', 'web', '--policy', 'spread'],
    );
    assert.equal(job.state, 'done');
    const hostsUsed = [...new Set(job.vms.map(({ host }) => host!))].toSorted();
    assert.deepEqual(hostsUsed, HOSTS.toSorted(), JSON.stringify(job));
    for (const { name } of job.vms) {
      const vm = await withConsole(name);
      const word = vm.id.replaceAll(/\D/g, '');
      assert.match(await ask(vm.console!, `ping ${word}`, /pong \d+(?=\r?\n)/), /pong \d+/);
    }
    const local = await Promise.all(
      HOSTS.map((host) => world.json<{ id: string }[]>('vm', 'ls', '--proxy', host)),
    );
    const listed = await grid.ask<VmInfo[]>('ada', 'vms');
    assert.deepEqual(
      local.flatMap((vms) => vms.map(({ id }) => id)).toSorted(),
      listed.map(({ placedAs }) => placedAs!).toSorted(),
    );
    assert.deepEqual(await grid.ask('bob', 'vms'), []);
    await world.refuses(1, /no VM 'web-1'/, 'broker', 'stop', 'web-1', ...grid.as('bob'));
    await world.refuses(1, /no VM 'web-1'/, 'broker', 'suspend', 'web-1', ...grid.as('bob'));
    await world.refuses(1, /role 'agent' cannot/, 'broker', 'vms', ...grid.as('hosts'));

    const first = await vmOf('web-1');
    const nonce = await setNonce(first);
    await grid.ask('ada', 'suspend', 'web-1');
    assert.equal((await vmOf('web-1')).state, 'suspended');
    await eventually(() => runningCopies(first.id).length === 0);
    const elsewhere = HOSTS.find((host) => host !== first.host)!;
    await grid.ask('ada', 'resume', 'web-1', '--host', elsewhere);
    const resumed = await withConsole('web-1');
    assert.equal(resumed.host, elsewhere);
    assert.equal(await nonceOf(resumed), nonce);

    await grid.ask('ada', 'stop', ...job.vms.map(({ name }) => name), '--grace', '0');
    assert.deepEqual(await grid.ask('ada', 'vms'), []);
    const usage = await grid.ask<{ vm: string; host: string; running: boolean; storedBytes: number }[]>(
      'ada',
      'usage',
    );
    assert.equal(usage.length, 5);
    assert.ok(usage.every(({ running }) => !running));
    const ofFirst = usage.filter(({ vm }) => vm === first.id);
    assert.deepEqual(
      ofFirst.map(({ host, storedBytes }) => [host, storedBytes > 0]),
      [
        [first.host, true],
        [elsewhere, false],
      ],
    );
    const hosts = await grid.ask<HostInfo[]>('ada', 'hosts');
    assert.deepEqual(
      hosts.map(({ vms, future }) => [vms, future.memoryBytes]),
      HOSTS.map(() => [0, 2 ** 30]),
    );
  });

  test(
    'a VM moves and keeps its memory; its disk becomes a version of its user’s own, which boots',
    { skip: LONG },
    async () => {
      await grid.ask('ada', 'request', 'small:1', '--memory', '128M', '--name', 'mover');
      const before = await withConsole('mover');
      const nonce = await setNonce(before);
      await ask(before.console!, 'echo mine > /root/mine; sync; echo kept-$((6*7))', /kept-42/);
      await grid.ask('ada', 'move', 'mover');
      const moved = await withConsole('mover');
      assert.notEqual(moved.host, before.host);
      assert.equal(await nonceOf(moved), nonce);
      await grid.ask('ada', 'commit', 'mover', 'ada-small:1', '--label', 'os=small');
      await grid.ask('ada', 'stop', 'mover', '--grace', '0');
      const mine = async (who: string) =>
        (await grid.ask<ImageInfo[]>(who, 'images')).filter(({ image }) => image === 'ada-small');
      await eventually(async () => (await mine('ada')).length === 1);
      assert.equal((await mine('ada'))[0]!.owner, 'ada');
      assert.deepEqual(await mine('bob'), []);
      await grid.ask('ada', 'request', 'ada-small:1', '--memory', '128M', '--name', 'child');
      const child = await withConsole('child');
      assert.equal(await ask(child.console!, 'echo "=$(cat /root/mine)="', /=mine=/), '=mine=');
      await grid.ask('ada', 'image', 'share', 'ada-small', 'bob');
      assert.equal((await mine('bob')).length, 1);
      await grid.ask('ada', 'stop', 'child', '--grace', '0');
    },
  );

  test(
    'the second request for an image lands on the host that has it warm, says so, and starts as a local one does',
    { skip: LONG },
    async (t) => {
      const request = async (...more: string[]) =>
        (await grid.ask<JobInfo>('ada', 'request', '--os', 'small', '--memory', '128M', ...more)).vms[0]!;
      const first = await request('--kernel', '>=6 <7');
      await grid.ask('ada', 'stop', first.id, '--grace', '0');
      const warm: number[] = [];
      const local: number[] = [];
      for (let round = 0; round < 5; round++) {
        local.push(await grid.startLocally());
        world.dropPageCache();
        const vm = await request('--name', 'warm');
        assert.match(vm.reason!, /[1-9]\d* bytes of the image warm/);
        warm.push(vm.timeline!['readyMs']! / 1000);
        await grid.ask('ada', 'stop', 'warm', '--grace', '0');
      }
      const median = (values: number[]) => values.toSorted((a, b) => a - b)[values.length >> 1]!;
      const ratio = median(warm) / median(local);
      const text = (values: number[]) => values.map((value) => value.toFixed(2)).join(' ');
      t.diagnostic(`warm ${text(warm)} s, local ${text(local)} s, ratio ${ratio.toFixed(3)}`);
      // 1.1 on a machine that does nothing else; others may run beside this.
      assert.ok(ratio < 1.5, String(ratio));
    },
  );

  test('a broker that is killed and started again has the same VMs', { skip: LONG }, async () => {
    await grid.ask('ada', 'request', 'small:1', '--memory', '128M', '--name', 'stays');
    await grid.stopBroker('SIGKILL');
    await grid.startBroker();
    assert.equal((await vmOf('stays')).state, 'running');
    await grid.ask('ada', 'stop', 'stays', '--grace', '0');
  });

  test(
    'a host that is cut off: its VM goes on elsewhere from its last checkpoint, and at no moment do two copies run',
    { skip: LONG },
    async () => {
      await grid.ask('ada', 'request', 'small:1', '--memory', '128M', '--name', 'kept', '--restart');
      const vm = await withConsole('kept');
      const nonce = await setNonce(vm);
      await grid.ask('ada', 'checkpoint', 'kept');
      let most = 0;
      let looks = 0;
      const watch = setInterval(() => {
        looks++;
        most = Math.max(most, runningCopies(vm.id).length);
      }, 20);
      try {
        grid.setLink(vm.host!, 'down');
        await eventually(async () => {
          const now = await vmOf('kept');
          return now.state === 'running' && now.host !== vm.host;
        });
        const moved = await withConsole('kept');
        assert.equal(await nonceOf(moved), nonce);
        grid.setLink(vm.host!, 'up');
        await eventually(async () => {
          const there = await world.json<{ id: string }[]>('vm', 'ls', '--proxy', vm.host!);
          return !there.some(({ id }) => id.startsWith(vm.id));
        });
        assert.equal(runningCopies(vm.id).length, 1);
      } finally {
        clearInterval(watch);
      }
      assert.equal(most, 1, `${looks} looks`);
      await grid.ask('ada', 'stop', 'kept', '--grace', '0');
    },
  );
});
