/** The broker with its hosts, on both databases: requests, placement, ends, silence, restarts. */
import assert from 'node:assert/strict';
import { after, before, suite, test } from 'node:test';
import type { HostInfo, ImageInfo, JobInfo, VmInfo } from '../../src/broker/index.ts';
import { GridError } from '../../src/core/errors.ts';
import { GIB, MIB } from '../../src/core/limits.ts';
import { Databases, DIALECTS, eventually, startBroker, TestHost } from './harness.ts';
import { DEBIAN, scene } from './scene.ts';

const QUICK_LEASE = { leaseMs: 1_500, marginMs: 1_000 };

for (const dialect of DIALECTS) {
  suite(`a broker on ${dialect}`, () => {
    const databases = new Databases(dialect);
    before(() => databases.start());
    after(() => databases.stop());

    test('four VMs are requested, placed, listed, stopped and accounted, and the promise is whole again', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, settled } = await scene(stack, databases, ['a', 'b']);
      const accepted = await user.call<JobInfo>('POST', '/v1/vms', {
        count: 4,
        name: 'web',
        os: 'debian',
        kernel: '>=6.1 <7',
        libraries: { libc: '>=2.30' },
        memoryBytes: GIB,
        policy: 'spread',
      });
      assert.equal(accepted.total, 4);
      const done = await settled(accepted.id);
      assert.equal(done.state, 'done');
      assert.deepEqual(
        done.vms.map(({ name }) => name),
        ['web-1', 'web-2', 'web-3', 'web-4'],
      );
      assert.deepEqual(
        hosts.map(({ machines }) => machines.vms.size),
        [2, 2],
      );
      assert.deepEqual(done.vms[0]?.timeline, { clonedMs: 1, startedMs: 2, readyMs: 3 });
      const free = async () =>
        (await user.call<HostInfo[]>('GET', '/v1/hosts')).map(({ future }) => [
          future.memoryBytes / GIB,
          future.vcpus,
        ]);
      assert.deepEqual(await free(), [
        [14, 62],
        [14, 62],
      ]);
      for (const { name } of done.vms) await user.call('POST', `/v1/vms/${name}/stop`, {});
      await eventually(async () => (await user.call<VmInfo[]>('GET', '/v1/vms')).length === 0);
      assert.deepEqual(await free(), [
        [16, 64],
        [16, 64],
      ]);
      assert.deepEqual(
        hosts.map(({ machines }) => machines.vms.size),
        [0, 0],
      );
      const usage = await user.call<{ running: boolean; seconds: number }[]>('GET', '/v1/usage');
      assert.equal(usage.length, 4);
      assert.ok(usage.every(({ running, seconds }) => !running && seconds > 0));
    });

    test('the same request under one idempotency key is one job; another request under it is refused', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, settled } = await scene(stack, databases, ['a']);
      const send = (count: number) =>
        user.call<JobInfo>(
          'POST',
          '/v1/vms',
          { count, image: 'debian:12' },
          { headers: { 'idempotency-key': 'k' } },
        );
      const answers = await Promise.all([send(2), send(2), send(2)]);
      assert.equal(new Set(answers.map(({ id }) => id)).size, 1);
      await settled(answers[0].id);
      assert.equal(hosts[0]!.machines.started.length, 2);
      await assert.rejects(send(3), { code: 'exists' });
    });

    test('what nothing serves is refused with the reason; what has no room waits for it', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, settled } = await scene(stack, databases, ['a']);
      await assert.rejects(user.call('POST', '/v1/vms', { kernel: '>=7' }), (error: GridError) => {
        assert.equal(error.code, 'not-found');
        assert.match(error.message, /debian:12 has kernel 6\.1\.0, not >=7/);
        return true;
      });
      const big = await user.call<JobInfo>('POST', '/v1/vms', { image: 'debian', memoryBytes: 12 * GIB });
      await settled(big.id);
      const second = await user.call<JobInfo>('POST', '/v1/vms', { image: 'debian', memoryBytes: 12 * GIB });
      await eventually(async () =>
        /room/.test((await user.call<JobInfo>('GET', `/v1/jobs/${second.id}`)).vms[0]?.reason ?? ''),
      );
      await user.call('POST', `/v1/vms/${big.vms[0]!.id}/stop`, {});
      assert.equal((await settled(second.id)).state, 'done');
    });

    test('the host that has an image warm gets the next VM of it, and the answer says so', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, settled } = await scene(stack, databases, ['a', 'b', 'c'], {
        leaseMs: 3_000,
        marginMs: 30_000,
      });
      hosts[1]!.warmBytes[DEBIAN[0]!.manifest] = 80 * MIB;
      const explained = await eventually(async () => {
        const now = await user.call<{ choice: { host: string }; hosts: { why: string }[] }>(
          'POST',
          '/v1/vms/explain',
          {
            image: 'debian',
          },
        );
        // Before its report it may be the one with the least load.
        return now.hosts[0]!.why.includes('83886080 bytes of the image warm') && now;
      });
      assert.equal(explained.choice.host, hosts[1]!.facts.host);
      const { id } = await user.call<JobInfo>('POST', '/v1/vms', { image: 'debian' });
      const [vm] = (await settled(id)).vms;
      assert.equal(vm?.host, hosts[1]!.facts.host);
      assert.match(vm?.reason ?? '', /83886080 bytes of the image warm/);
    });

    test('a VM that a host cannot start goes to another', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, settled } = await scene(stack, databases, ['a', 'b']);
      hosts[0]!.machines.failure = new GridError('vm-failed', 'no such luck');
      const { id } = await user.call<JobInfo>('POST', '/v1/vms', {
        image: 'debian',
        count: 2,
        policy: 'spread',
      });
      const done = await settled(id);
      assert.deepEqual(
        done.vms.map(({ host }) => host),
        [hosts[1]!.facts.host, hosts[1]!.facts.host],
      );
    });

    test('a silent host: its VM with a restart policy runs elsewhere, never in both places; the other is lost and found', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, request } = await scene(stack, databases, ['a', 'b'], QUICK_LEASE);
      const moved = await request({ restart: true });
      const from = hosts.find(({ facts }) => facts.host === moved.host)!;
      const to = hosts.find((host) => host !== from)!;
      const stays = await eventually(async () => {
        const vm = await request({ policy: 'pack' });
        return vm.host === from.facts.host && vm;
      });
      // At every look, at most one host lets a copy run. Guarded by the SIGSTOP in BrokerLink's #enforce.
      let both = 0;
      const copies = (host: TestHost) =>
        host.machines.running().filter((name) => name.startsWith(moved.id)).length;
      const watch = setInterval(() => (both += copies(from) > 0 && copies(to) > 0 ? 1 : 0), 2);
      stack.defer(() => clearInterval(watch));
      // The partition: the host's machines run on, and nothing it says gets through.
      from.cable!.cut();
      await eventually(() => copies(to) === 1);
      assert.equal(copies(from), 0, 'paused before it was placed again');
      await eventually(
        async () => (await user.call<VmInfo>('GET', `/v1/vms/${moved.id}`)).state === 'running',
      );
      assert.equal((await user.call<VmInfo>('GET', `/v1/vms/${stays.id}`)).state, 'lost');
      from.cable!.mend();
      await eventually(
        async () => (await user.call<VmInfo>('GET', `/v1/vms/${stays.id}`)).state === 'running',
      );
      await eventually(() => ![...from.machines.vms.keys()].some((name) => name.startsWith(moved.id)));
      assert.equal(both, 0);
      assert.equal(copies(to), 1);
      assert.ok(from.machines.running().some((name) => name.startsWith(stays.id)));
    });

    test('what was accepted is carried out once by the broker that starts next', async () => {
      await using stack = new AsyncDisposableStack();
      const database = await databases.fresh();
      const first = await startBroker(database, databases.folder);
      const agentToken = (await first.broker.access.create('hosts', 'agent')).token;
      const userToken = (await first.broker.access.create('ada', 'user')).token;
      const host = new TestHost(`r-${dialect}`, databases.folder, DEBIAN).connect(first.client(agentToken));
      const user = first.client(userToken);
      await eventually(async () => (await user.call<ImageInfo[]>('GET', '/v1/images')).length > 0);
      await host.close();
      const { id } = await user.call<JobInfo>('POST', '/v1/vms', { image: 'debian', count: 3 });
      await first.close();
      const second = await startBroker(database, databases.folder);
      stack.defer(() => second.close());
      host.connect(second.client(agentToken));
      stack.defer(() => host.close());
      const again = second.client(userToken);
      const done = await eventually(async () => {
        const now = await again.call<JobInfo>('GET', `/v1/jobs/${id}`);
        return now.state !== 'running' && now;
      });
      assert.equal(done.state, 'done');
      assert.deepEqual(
        [...host.machines.vms.keys()].toSorted(),
        done.vms.map(({ placedAs }) => placedAs!).toSorted(),
      );
      assert.equal(host.machines.started.length, 3);
    });
  });
}
