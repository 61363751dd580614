/** Networks, and links that operators tell of: queries with a scope go by them. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import type { Answer, NetworkInfo } from '../../src/broker/index.ts';
import { Databases, eventually } from './harness.ts';
import { scene } from './scene.ts';

const databases = new Databases('sqlite');
before(() => databases.start());
after(() => databases.stop());

test('a link that an operator tells of brings the hosts beyond it into the scope of a query', async () => {
  await using stack = new AsyncDisposableStack();
  const { running, user } = await scene(stack, databases, ['a', 'b'], undefined, (name) => ({
    networks: [`lan-${name}`],
  }));
  const operator = await running.as('root', 'operator');
  const near = async () =>
    (
      await user.call<Answer>('POST', '/v1/query', {
        find: 'hosts',
        limit: 10,
        scope: { network: 'lan-a', hops: 1 },
      })
    ).sets.length;
  await eventually(async () => (await user.call<NetworkInfo[]>('GET', '/v1/networks')).length === 2);
  assert.equal(await near(), 1);
  await assert.rejects(user.call('PUT', '/v1/links', { a: 'lan-a', b: 'lan-b' }), { code: 'denied' });
  await assert.rejects(operator.call('PUT', '/v1/links', { a: 'lan-a', b: 'lan-c' }), { code: 'not-found' });
  await operator.call('PUT', '/v1/links', { a: 'lan-b', b: 'lan-a', roundTripMs: 12 });
  assert.equal(await near(), 2);
  assert.deepEqual(
    (await user.call<NetworkInfo[]>('GET', '/v1/networks')).map(({ id, hosts, links }) => [id, hosts, links]),
    [
      ['lan-a', 1, [{ to: 'lan-b', roundTripMs: 12 }]],
      ['lan-b', 1, [{ to: 'lan-a', roundTripMs: 12 }]],
    ],
  );
  await operator.call('DELETE', '/v1/links/lan-a/lan-b');
  assert.equal(await near(), 1);
});
