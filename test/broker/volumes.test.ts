/** Data volumes: made, grown, shared, written by one, kept when the VM goes, saved before anybody else may write. */
import assert from 'node:assert/strict';
import { suite, test } from 'node:test';
import type { BrokerClient } from '../../src/agent/broker-client.ts';
import type {
  HostInfo,
  JobInfo,
  VolumeInfo,
  VolumeRequest,
  VolumeUse,
  WorkspaceInfo,
} from '../../src/broker/index.ts';
import { GridError } from '../../src/core/errors.ts';
import { MIB } from '../../src/core/limits.ts';
import { DIALECTS, eventually, version } from './harness.ts';
import type { TestHost } from './harness.ts';
import { northAndSouth } from './scene.ts';
import type { TableVolumes } from './table-volumes.ts';

/** What takes milliseconds: without the line that it guards, a test is to fail soon, not to wait on. */
const GUARD_MS = 20_000;

for (const dialect of DIALECTS) {
  suite(`data volumes (${dialect})`, () => {
    const versions = [version('small', '1'), { ...version('tables', '7'), kind: 'data', sizeBytes: MIB }];
    const grid = northAndSouth(dialect, versions, { leaseTimes: { leaseMs: 2_000, marginMs: 500 } });
    const { hosts } = grid;

    const volumesOf = (host: string): TableVolumes =>
      hosts.find(({ facts }) => facts.host === host)!.machines.volumes;
    const volume = (user: BrokerClient, name: string) => user.call<VolumeInfo>('GET', `/v1/volumes/${name}`);
    const make = async (user: BrokerClient, request: VolumeRequest) => {
      await user.call('POST', '/v1/volumes', request);
      return eventually(async () => {
        const one = await volume(user, request.name);
        return one.state !== 'making' && one;
      });
    };
    const request = async (user: BrokerClient, name: string, more: object) => {
      await user.call('POST', '/v1/workspaces', { image: 'small', name, ...more });
      return eventually(async () => {
        const one = await user.call<WorkspaceInfo>('GET', `/v1/workspaces/${name}`);
        return one.state === 'running' && one;
      });
    };
    const end = (user: BrokerClient, name: string) => user.call('POST', `/v1/workspaces/${name}/end`, {});
    const free = (user: BrokerClient, name: string) =>
      eventually(async () => (await volume(user, name)).state === 'free');
    const done = (user: BrokerClient, job: JobInfo) =>
      eventually(async () => {
        const now = await user.call<JobInfo>('GET', `/v1/jobs/${job.id}`);
        return now.state !== 'running' && now;
      });
    const writeTo = async (user: BrokerClient, name: string, text: string) => {
      const { id, host } = await volume(user, name);
      volumesOf(host!).clones.get(id)!.content = text;
    };

    test('what one machine writes stays when it goes, and the next one goes on with it where the bytes are', async () => {
      const ada = await grid.running.as('ada');
      const made = await make(ada, { name: 'home', sizeBytes: 4 * MIB });
      assert.deepEqual([made.state, made.version, made.sizeBytes], ['free', 1, 4 * MIB]);
      await assert.rejects(ada.call('POST', '/v1/volumes', { name: 'home', sizeBytes: MIB }), {
        code: 'exists',
      });
      await request(ada, 'one', { volumes: [{ volume: 'home' }] });
      await writeTo(ada, 'home', 'first');
      await end(ada, 'one');
      await free(ada, 'home');
      const saved = await volume(ada, 'home');
      assert.deepEqual([saved.version, saved.unsaved, saved.attached], [2, false, []]);
      for (const name of ['two', 'three', 'four']) {
        const { machines } = await request(ada, name, { volumes: [{ volume: 'home' }], policy: 'spread' });
        const [vm] = machines;
        assert.equal(vm!.host, saved.host);
        assert.equal(volumesOf(vm!.host!).seen(vm!.placedAs!, 'home'), 'first');
        await end(ada, name);
        await free(ada, 'home');
      }
      // Nothing new was written: no version came of it.
      assert.equal((await volume(ada, 'home')).version, 2);
    });

    test('a machine goes where the bytes of its volumes are, even where the image is warmer elsewhere', async () => {
      const ada = await grid.running.as('ada');
      const [north, south] = hosts as [TestHost, TestHost];
      const warm = async (host: TestHost, manifest: string, bytes: number) => {
        host.warmBytes[manifest] = bytes;
        host.refresh();
        await eventually(async () =>
          (await ada.call<HostInfo[]>('GET', '/v1/hosts')).some(
            ({ id, warmBytes }) => id === host.facts.host && warmBytes[manifest] === bytes,
          ),
        );
      };
      const placed = async (name: string, volumes: VolumeUse[]) => {
        const { machines } = await request(ada, name, { volumes });
        return machines[0]!;
      };
      await warm(north, versions[0]!.manifest, 8 * MIB);
      await make(ada, { name: 'big', sizeBytes: 64 * MIB });
      const reader = [{ volume: 'big', readOnly: true }];
      const first = await placed('first', reader);
      assert.equal(first.host, 'north');
      const { manifest } = north.machines.volumes.attached.get(first.placedAs!)![0]!;
      await end(ada, 'first');
      // What a reader has is in its host's cache. Fails without `volumeBytes` in `warm` of rankHosts.
      await warm(south, manifest, 32 * MIB);
      assert.equal((await placed('second', reader)).host, 'south');
      await end(ada, 'second');
      await free(ada, 'big');

      // What a writer wrote is in the clone that its host keeps. Fails without `carried` in volumeBytesOn.
      south.machines.volumes.savedBytes = 32 * MIB;
      assert.equal((await placed('writes', [{ volume: 'big' }])).host, 'south');
      await writeTo(ada, 'big', 'much');
      await end(ada, 'writes');
      await free(ada, 'big');
      await warm(south, manifest, 0);
      const again = await placed('again', [{ volume: 'big' }]);
      assert.deepEqual([again.host, volumesOf('south').seen(again.placedAs!, 'big')], ['south', 'much']);
      await end(ada, 'again');
      await free(ada, 'big');
      await warm(north, versions[0]!.manifest, 0);
    });

    test('one machine at a time writes, any number reads what was saved last, on any host', async () => {
      const ada = await grid.running.as('ada');
      await make(ada, { name: 'shared', image: 'tables:7', sizeBytes: 2 * MIB });
      await request(ada, 'writer', { volumes: [{ volume: 'shared' }] });
      // Each fails without its check in claimVolumes.
      await assert.rejects(
        ada.call('POST', '/v1/workspaces', { image: 'small', volumes: [{ volume: 'shared' }] }),
        { code: 'in-use', message: /attached writable to VM 'writer': one VM at a time writes/ },
      );
      await assert.rejects(
        ada.call('POST', '/v1/workspaces', { image: 'small', count: 2, volumes: [{ volume: 'home' }] }),
        { code: 'bad-request', message: /writable to 2 machines.*home:ro/ },
      );
      await assert.rejects(
        ada.call('POST', '/v1/workspaces', { image: 'small', restart: true, volumes: [{ volume: 'home' }] }),
        { code: 'bad-request', message: /would be lost/ },
      );
      assert.equal((await ada.call<WorkspaceInfo[]>('GET', '/v1/workspaces')).length, 1);
      await writeTo(ada, 'shared', 'second');
      const snapshot = await done(ada, await ada.call<JobInfo>('POST', '/v1/volumes/shared/snapshot', {}));
      assert.equal(snapshot.state, 'done');
      assert.deepEqual(
        [(await volume(ada, 'shared')).version, (await volume(ada, 'shared')).unsaved],
        [2, true],
      );
      await writeTo(ada, 'shared', 'third');
      const { machines } = await request(ada, 'readers', {
        ...{ count: 4, policy: 'spread', volumes: [{ volume: 'shared', readOnly: true }] },
      });
      assert.equal(new Set(machines.map(({ host }) => host)).size, 2);
      for (const { host, placedAs } of machines)
        assert.equal(volumesOf(host!).seen(placedAs!, 'shared'), 'second');
      await assert.rejects(ada.call('POST', '/v1/volumes/shared/grow', { sizeBytes: 8 * MIB }), {
        code: 'in-use',
      });
      await assert.rejects(ada.call('DELETE', '/v1/volumes/shared'), { code: 'in-use' });
      await end(ada, 'writer');
      await end(ada, 'readers');
      await free(ada, 'shared');
      const versions = (await volume(ada, 'shared')).versions;
      assert.deepEqual(
        versions.map((one) => one.version),
        [1, 2, 3],
      );
      await ada.call('POST', '/v1/volumes', { name: 'old', from: 'shared', version: 2 });
      await ada.call('POST', '/v1/volumes/old/grow', { sizeBytes: 8 * MIB });
      const copy = await request(ada, 'copied', { volumes: [{ volume: 'old' }] });
      const [vm] = copy.machines;
      const carried = volumesOf(vm!.host!).attached.get(vm!.placedAs!)![0]!;
      assert.deepEqual([carried.sizeBytes, carried.readOnly], [8 * MIB, false]);
      assert.equal(volumesOf(vm!.host!).seen(vm!.placedAs!, 'old'), 'second');
      await end(ada, 'copied');
    });

    test('a volume comes to a machine that runs and goes from it, and what was written is saved', async () => {
      const ada = await grid.running.as('ada');
      await make(ada, { name: 'hot', sizeBytes: MIB });
      const { machines } = await request(ada, 'runs', {});
      const [vm] = machines;
      const attach = async (body: object) =>
        done(ada, await ada.call<JobInfo>('POST', '/v1/volumes/hot/attach', { vm: 'runs', ...body }));
      assert.equal((await attach({})).state, 'done');
      await assert.rejects(ada.call('POST', '/v1/volumes/hot/attach', { vm: 'runs' }), { code: 'in-use' });
      assert.equal(volumesOf(vm!.host!).seen(vm!.placedAs!, 'hot'), '');
      await writeTo(ada, 'hot', 'warm');
      const job = await ada.call<JobInfo>('POST', '/v1/volumes/hot/detach', { vm: 'runs' });
      assert.equal((await done(ada, job)).state, 'done');
      await free(ada, 'hot');
      assert.equal((await volume(ada, 'hot')).version, 2);
      volumesOf(vm!.host!).failure = new GridError('local-io', 'the disk is broken');
      const failed = await attach({ readOnly: true });
      assert.deepEqual([failed.state, failed.error?.message], ['failed', 'the disk is broken']);
      volumesOf(vm!.host!).failure = undefined;
      assert.deepEqual((await volume(ada, 'hot')).attached, []);
      await end(ada, 'runs');
    });

    test('suspended with its machine, it goes on with it on another host, and nobody else writes meanwhile', async () => {
      const ada = await grid.running.as('ada');
      await make(ada, { name: 'kept', sizeBytes: MIB });
      const { machines } = await request(ada, 'sleeper', { volumes: [{ volume: 'kept' }] });
      const from = machines[0]!.host!;
      await writeTo(ada, 'kept', 'before');
      await ada.call('POST', '/v1/workspaces/sleeper/suspend', {});
      const when = (state: string) =>
        eventually(async () => {
          const one = await ada.call<WorkspaceInfo>('GET', '/v1/workspaces/sleeper');
          return one.state === state && one;
        });
      await when('suspended');
      assert.equal((await volume(ada, 'kept')).unsaved, false);
      await assert.rejects(
        ada.call('POST', '/v1/workspaces', { image: 'small', volumes: [{ volume: 'kept' }] }),
        { code: 'in-use' },
      );
      const to = hosts.find(({ facts }) => facts.host !== from)!.facts.host;
      await ada.call('POST', '/v1/workspaces/sleeper/resume', { host: to });
      const [vm] = (await when('running')).machines;
      assert.equal(vm!.host, to);
      assert.equal(volumesOf(to).seen(vm!.placedAs!, 'kept'), 'before');
      // Fails without orderDrop in bindTo: what is left there would be of an earlier time.
      const { id } = await volume(ada, 'kept');
      await eventually(() => !volumesOf(from).clones.has(id), GUARD_MS);
      await writeTo(ada, 'kept', 'after');
      await end(ada, 'sleeper');
      await free(ada, 'kept');
      assert.equal((await volume(ada, 'kept')).version, 3);
    });

    test('what a silent host has and nobody else is waited for, unless its owner gives it up', async () => {
      const ada = await grid.running.as('ada');
      await make(ada, { name: 'risky', sizeBytes: MIB });
      const { machines } = await request(ada, 'falls', { volumes: [{ volume: 'risky' }] });
      const host = hosts.find(({ facts }) => facts.host === machines[0]!.host)!;
      await writeTo(ada, 'risky', 'unsaved');
      host.cable!.cut();
      await eventually(
        async () =>
          (await ada.call<WorkspaceInfo>('GET', '/v1/workspaces/falls')).machines[0]!.state === 'lost',
      );
      await end(ada, 'falls');
      assert.equal((await volume(ada, 'risky')).state, 'saving');
      await ada.call('POST', '/v1/workspaces', {
        image: 'small',
        name: 'waits',
        volumes: [{ volume: 'risky' }],
      });
      const waits = () => ada.call<WorkspaceInfo>('GET', '/v1/workspaces/waits');
      // Fails without the look at `unsaved` in volumesToPlace.
      await eventually(
        async () => /is being saved first/.test((await waits()).machines[0]!.reason ?? ''),
        GUARD_MS,
      );
      host.cable!.mend();
      const [vm] = (
        await eventually(async () => {
          const one = await waits();
          return one.state === 'running' && one;
        })
      ).machines;
      assert.equal(volumesOf(vm!.host!).seen(vm!.placedAs!, 'risky'), 'unsaved');
      await end(ada, 'waits');
      await free(ada, 'risky');

      await request(ada, 'falls2', { volumes: [{ volume: 'risky' }] });
      await writeTo(ada, 'risky', 'worse');
      const second = hosts.find(({ facts }) => facts.host === vm!.host)!;
      second.cable!.cut();
      await eventually(
        async () =>
          (await ada.call<WorkspaceInfo>('GET', '/v1/workspaces/falls2')).machines[0]!.state === 'lost',
      );
      await assert.rejects(ada.call('POST', '/v1/volumes/risky/revert', {}), { code: 'in-use' });
      await end(ada, 'falls2');
      await ada.call('POST', '/v1/volumes/risky/revert', {});
      const after = await request(ada, 'again', { volumes: [{ volume: 'risky' }] });
      const [again] = after.machines;
      assert.equal(volumesOf(again!.host!).seen(again!.placedAs!, 'risky'), 'unsaved');
      second.cable!.mend();
      await eventually(async () =>
        (await ada.call<{ state: string }[]>('GET', '/v1/hosts')).every(({ state }) => state === 'up'),
      );
      await end(ada, 'again');
    });

    test('another user sees and reads it only when it is shared, and never writes', async () => {
      const [ada, bob] = [await grid.running.as('ada'), await grid.running.as('bob')];
      await make(ada, { name: 'mine', sizeBytes: MIB });
      const ask = (which: string, readOnly = true) =>
        bob.call('POST', '/v1/workspaces', { image: 'small', volumes: [{ volume: which, readOnly }] });
      await assert.rejects(ask('mine'), { code: 'not-found' });
      await assert.rejects(ask('ada/mine'), { code: 'not-found' });
      assert.deepEqual(await bob.call('GET', '/v1/volumes'), []);
      await ada.call('POST', '/v1/volumes/mine/share', { users: ['bob'] });
      assert.equal((await bob.call<unknown[]>('GET', '/v1/volumes')).length, 1);
      await assert.rejects(ask('ada/mine', false), {
        code: 'denied',
        message: /shared with you for reading/,
      });
      for (const verb of ['grow', 'revert', 'share', 'snapshot'] as const) {
        const body = { grow: { sizeBytes: 2 * MIB }, share: { users: ['eve'] }, revert: {}, snapshot: {} }[
          verb
        ];
        await assert.rejects(bob.call('POST', `/v1/volumes/ada%2Fmine/${verb}`, body), { code: 'denied' });
      }
      await assert.rejects(bob.call('DELETE', '/v1/volumes/ada%2Fmine'), { code: 'denied' });
      const { machines } = await request(bob, 'reads', { volumes: [{ volume: 'ada/mine', readOnly: true }] });
      assert.equal(volumesOf(machines[0]!.host!).seen(machines[0]!.placedAs!, 'mine'), '');
      await end(bob, 'reads');
      await free(ada, 'mine');
      await ada.call('POST', '/v1/volumes/mine/unshare', { users: ['bob'] });
      await assert.rejects(ask('ada/mine'), { code: 'not-found' });
      await assert.rejects(ada.call('POST', '/v1/volumes', { name: 'x', image: 'nothing:1' }), {
        code: 'not-found',
      });
      await ada.call('DELETE', '/v1/volumes/mine');
      await assert.rejects(volume(ada, 'mine'), { code: 'not-found' });
    });
  });
}
