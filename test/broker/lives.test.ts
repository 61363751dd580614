/** What users do to VMs that run, on both databases: suspend, resume, move, checkpoint, commit, and stops meanwhile. */
import assert from 'node:assert/strict';
import { after, before, suite, test } from 'node:test';
import type { HostInfo, ImageInfo, JobInfo } from '../../src/broker/index.ts';
import { GridError } from '../../src/core/errors.ts';
import { GIB } from '../../src/core/limits.ts';
import { Databases, DIALECTS, eventually, version } from './harness.ts';
import { scene } from './scene.ts';

const QUICK_LEASE = { leaseMs: 1_500, marginMs: 1_000 };
/** Reports as often, and nobody is taken for silent on a machine under load. */
const QUICK_REPORTS = { leaseMs: 1_500, marginMs: 60_000 };

for (const dialect of DIALECTS) {
  suite(`the lives of VMs on ${dialect}`, () => {
    const databases = new Databases(dialect);
    before(() => databases.start());
    after(() => databases.stop());

    test('a VM is suspended, resumed on another host with its memory, moved back, stopped, and each part is accounted', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, request, act, vm, hostOf } = await scene(stack, databases, ['a', 'b']);
      const first = await request({ memoryBytes: GIB, name: 'web' });
      const home = hostOf(first);
      const other = hosts.find((host) => host !== home)!;
      home.machines.contents.set(first.placedAs!, 'nonce');
      const suspended = await act('web', 'suspend');
      assert.equal(suspended.state, 'done', JSON.stringify(suspended));
      const asleep = await vm('web');
      assert.deepEqual([asleep.state, asleep.host, asleep.placed], ['suspended', undefined, undefined]);
      // What is on the first host's disk is thrown away once the checkpoint is in the store.
      await eventually(() => home.machines.vms.size === 0);
      const free = (await user.call<HostInfo[]>('GET', '/v1/hosts')).map(({ future }) => future.memoryBytes);
      assert.deepEqual(free, [16 * GIB, 16 * GIB]);

      const suspendedMs = Date.now();
      const resumed = await act('web', 'resume', { host: other.facts.host });
      assert.equal(resumed.state, 'done', JSON.stringify(resumed));
      const there = await vm('web');
      assert.equal(there.host, other.facts.host);
      // What it waited for a host is counted from its resumption. Fails without asked_ms in #begin.
      assert.ok(Date.parse(there.asked) >= suspendedMs && there.placed! >= there.asked);
      assert.equal(other.machines.contents.get(there.placedAs!), 'nonce');

      const moved = await act('web', 'move');
      assert.deepEqual([moved.state, moved.result], ['done', { host: home.facts.host }]);
      const back = await vm('web');
      assert.equal(back.host, home.facts.host);
      assert.equal(home.machines.contents.get(back.placedAs!), 'nonce');
      await eventually(() => other.machines.vms.size === 0);

      await user.call('POST', '/v1/vms/web/stop', {});
      await eventually(async () => (await user.call<unknown[]>('GET', '/v1/vms')).length === 0);
      const usage = await user.call<{ host: string; running: boolean; storedBytes: number }[]>(
        'GET',
        '/v1/usage',
      );
      assert.deepEqual(
        usage.map(({ host, running, storedBytes }) => [host, running, storedBytes]),
        [
          [home.facts.host, false, 1000],
          [other.facts.host, false, 1000],
          [home.facts.host, false, 0],
        ],
      );
    });

    test('what a VM cannot do now is refused, and the same call under one key is one job', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, request, act } = await scene(stack, databases, ['a']);
      await request({ name: 'one' });
      await assert.rejects(act('one', 'resume'), { code: 'in-use' });
      await assert.rejects(act('one', 'move', { host: 'nowhere' }), { code: 'not-found' });
      // Fails without checkElsewhere: it would be suspended, and wait for a host that nobody has.
      await assert.rejects(user.call('POST', '/v1/vms/one/move', {}), {
        code: 'in-use',
        message: /no host is up but 'a-/,
      });
      const suspend = () =>
        user.call<JobInfo>('POST', '/v1/vms/one/suspend', {}, { headers: { 'idempotency-key': 'k' } });
      const jobs = await Promise.all([suspend(), suspend()]);
      assert.equal(jobs[0].id, jobs[1].id);
      await eventually(
        async () => (await user.call<JobInfo>('GET', `/v1/jobs/${jobs[0].id}`)).state === 'done',
      );
      assert.equal((await suspend()).id, jobs[0].id);
      await assert.rejects(act('one', 'suspend'), { code: 'in-use' });
      // A suspended one is stopped at once.
      await user.call('POST', '/v1/vms/one/stop', {});
      assert.deepEqual(await user.call('GET', '/v1/vms'), []);
    });

    test('a VM that cannot be suspended runs on, one that no host resumes stays suspended', async () => {
      await using stack = new AsyncDisposableStack();
      const { request, act, vm, hostOf } = await scene(stack, databases, ['a']);
      const one = await request({ name: 'one' });
      const { machines } = hostOf(one);
      machines.publishFailure = new GridError('denied', 'takes no uploads');
      const failed = await act('one', 'suspend');
      assert.deepEqual([failed.state, failed.error?.code], ['failed', 'denied']);
      assert.equal((await vm('one')).state, 'running');
      assert.deepEqual(machines.running(), [one.placedAs]);
      machines.publishFailure = undefined;
      assert.equal((await act('one', 'suspend')).state, 'done');
      machines.failure = new GridError('bad-request', 'another processor');
      const resumed = await act('one', 'resume');
      assert.deepEqual([resumed.state, resumed.error?.code], ['failed', 'bad-request']);
      assert.equal((await vm('one')).state, 'suspended');
      machines.failure = undefined;
      assert.equal((await act('one', 'resume')).state, 'done');
    });

    test('with checkpoints, a VM whose host falls silent goes on from the last one', async () => {
      await using stack = new AsyncDisposableStack();
      const { hosts, request, act, vm, hostOf } = await scene(stack, databases, ['a', 'b'], QUICK_LEASE);
      const one = await request({ name: 'one', restart: true });
      const from = hostOf(one);
      const to = hosts.find((host) => host !== from)!;
      from.machines.contents.set(one.placedAs!, 'early');
      assert.equal((await act('one', 'checkpoint')).state, 'done');
      assert.deepEqual(from.machines.running(), [one.placedAs]);
      from.machines.contents.set(one.placedAs!, 'later');
      from.cable!.cut();
      const moved = await eventually(async () => {
        const now = await vm('one');
        return now.state === 'running' && now.host === to.facts.host && now;
      });
      assert.equal(to.machines.contents.get(moved.placedAs!), 'early');
      from.cable!.mend();
      await eventually(() => from.machines.vms.size === 0);
    });

    test('a host that is cut off while it makes a checkpoint does not go on with a VM that runs elsewhere by then', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, request, vm, hostOf } = await scene(stack, databases, ['a', 'b'], QUICK_LEASE);
      const one = await request({ name: 'one', restart: true });
      const from = hostOf(one);
      const to = hosts.find((host) => host !== from)!;
      const store = Promise.withResolvers<void>();
      from.machines.publishing = store.promise;
      await user.call('POST', '/v1/vms/one/checkpoint', {});
      await eventually(() => from.machines.vms.get(one.placedAs!)?.state === 'suspended');
      from.cable!.cut();
      await eventually(
        async () => (await vm('one')).host === to.facts.host && to.machines.running().length === 1,
      );
      // Guarded by mayGoOn in OrderWork's #goOn: without it the old copy runs again here.
      let both = 0;
      from.machines.onStart = () => both++;
      store.reject(new GridError('unreachable', 'the store is cut off as well'));
      await new Promise((resolve) => setTimeout(resolve, 500));
      from.cable!.mend();
      await eventually(() => from.machines.vms.size === 0);
      assert.equal(both, 0);
      assert.equal(to.machines.running().length, 1);
    });

    test('a VM that waits for a host with room can be told another', async () => {
      await using stack = new AsyncDisposableStack();
      const { user, hosts, request, act, vm, hostOf } = await scene(stack, databases, ['a', 'b']);
      const big = { memoryBytes: 12 * GIB };
      const one = await request({ name: 'one', ...big });
      assert.equal(one.state, 'running');
      await act('one', 'suspend');
      await request({ name: 'two', ...big });
      const taken = hostOf(await vm('two'));
      const free = hosts.find((host) => host !== taken)!;
      const first = await user.call<JobInfo>('POST', '/v1/vms/one/resume', { host: taken.facts.host });
      await eventually(async () => /is not up, or not one that/.test((await vm('one')).reason ?? ''));
      assert.equal((await act('one', 'resume', { host: free.facts.host })).state, 'done');
      assert.equal((await vm('one')).host, free.facts.host);
      assert.equal((await user.call<JobInfo>('GET', `/v1/jobs/${first.id}`)).state, 'done');
    });

    test('a VM that was suspended on its host by hand becomes a checkpoint that others can resume', async () => {
      await using stack = new AsyncDisposableStack();
      const { request, act, vm, hostOf } = await scene(stack, databases, ['a'], QUICK_REPORTS);
      const one = await request({ name: 'one' });
      await hostOf(one).machines.suspend(one.placedAs!);
      await eventually(async () => (await vm('one')).state === 'suspended');
      assert.equal((await act('one', 'resume')).state, 'done');
    });

    test('a commit makes a version that is its user’s own, and nobody else’s until it is shared', async () => {
      await using stack = new AsyncDisposableStack();
      const { running, user, hosts, request, act } = await scene(stack, databases, ['a'], QUICK_REPORTS);
      await request({ name: 'one' });
      const bob = await running.as('bob');
      const commit = (reference: string) => act('one', 'commit', { reference });
      await assert.rejects(commit('debian:13'), { code: 'denied' });
      await assert.rejects(commit('g0123456789ab:1'), { code: 'bad-request' });
      const made = await commit('ada-tools:1');
      assert.equal(made.state, 'done', JSON.stringify(made));
      hosts[0]!.versions = [...hosts[0]!.versions, version('ada-tools', '1')];
      hosts[0]!.refresh();
      const seen = async (client: typeof user) =>
        (await client.call<ImageInfo[]>('GET', '/v1/images')).find(({ image }) => image === 'ada-tools');
      const [mine] = [await eventually(() => seen(user))];
      assert.equal(mine.owner, 'ada');
      assert.equal(await seen(bob), undefined);
      await assert.rejects(bob.call('POST', '/v1/vms', { image: 'ada-tools' }), { code: 'not-found' });
      await user.call('PATCH', '/v1/images/ada-tools', { share: ['bob'] });
      await bob.call('POST', '/v1/vms', { image: 'ada-tools' });
      await assert.rejects(commit('ada-tools:1'), { code: 'exists' });
    });
  });
}
