/** What operators prepare: hosts that fetch an image ahead, and sources that are looked at on a schedule. */
import assert from 'node:assert/strict';
import { after, before, suite, test } from 'node:test';
import type { ImageInfo, JobInfo, ScheduleInfo } from '../../src/broker/index.ts';
import { Databases, eventually, version } from './harness.ts';
import { scene } from './scene.ts';

suite('images that are fetched ahead', () => {
  const databases = new Databases('sqlite');
  before(() => databases.start());
  after(() => databases.stop());

  test('as many hosts as asked for fetch a version, and the job is done when they have it', async () => {
    await using stack = new AsyncDisposableStack();
    const { running, user, hosts } = await scene(stack, databases, ['a', 'b', 'c']);
    const operator = await running.as('root', 'operator');
    await assert.rejects(user.call('POST', '/v1/images/debian/warm', { version: '12' }), { code: 'denied' });
    const { id } = await operator.call<JobInfo>('POST', '/v1/images/debian/warm', {
      version: '12',
      hosts: 2,
    });
    const job = await eventually(async () => {
      const now = await operator.call<JobInfo>('GET', `/v1/jobs/${id}`);
      return now.state !== 'running' && now;
    });
    assert.deepEqual([job.state, job.done, job.total], ['done', 2, 2]);
    assert.deepEqual(
      hosts.map(({ warmed }) => warmed.length),
      [1, 1, 0],
    );
    await assert.rejects(operator.call('POST', '/v1/images/debian/warm', { version: '13' }), {
      code: 'not-found',
    });
  });

  test('a schedule has the newest version of an image fetched ahead, each once', async () => {
    await using stack = new AsyncDisposableStack();
    const { running, user, hosts } = await scene(stack, databases, ['a', 'b']);
    const operator = await running.as('root', 'operator');
    const schedule = { image: 'debian', everyMs: 10_000, hosts: 1 };
    await assert.rejects(user.call('POST', '/v1/schedules', schedule), { code: 'denied' });
    const { id } = await operator.call<ScheduleInfo>('POST', '/v1/schedules', schedule);
    const [first] = hosts;
    await eventually(() => first!.warmed.length === 1);
    const newer = { ...version('debian', '13'), created: '2026-02-01T00:00:00.000Z' };
    // One after the other: whoever tells of it alone is who can fetch it.
    for (const [index, host] of hosts.entries()) {
      host.versions = [...host.versions, newer];
      host.refresh();
      await eventually(async () => {
        const images = await user.call<ImageInfo[]>('GET', '/v1/images');
        return images.some((image) => image.manifest === newer.manifest && image.hosts === index + 1);
      });
      await eventually(() => first!.warmed.length === 2);
    }
    assert.deepEqual(first!.warmed, ['debian:12', 'debian:13']);
    assert.deepEqual(hosts[1]!.warmed, []);
    const [listed] = await operator.call<ScheduleInfo[]>('GET', '/v1/schedules');
    assert.equal(listed?.warmed, 'debian:13');
    await operator.call('DELETE', `/v1/schedules/${id}`);
    assert.deepEqual(await operator.call('GET', '/v1/schedules'), []);
  });

  test('when a schedule is due, what the source has meanwhile is seen at once', async () => {
    await using stack = new AsyncDisposableStack();
    const { running, user, hosts } = await scene(stack, databases, ['a']);
    const operator = await running.as('root', 'operator');
    hosts[0]!.versions = [...hosts[0]!.versions, version('fedora', '40')];
    await operator.call('POST', '/v1/schedules', { image: 'fedora', everyMs: 10_000 });
    await eventually(async () =>
      (await user.call<ImageInfo[]>('GET', '/v1/images')).some(({ image }) => image === 'fedora'),
    );
  });
});
