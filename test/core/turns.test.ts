/** One thing after the other, several things at once. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Turns } from '../../src/core/turns.ts';

test('what is asked for one thing comes in its order, also after a failure; other things do not wait', async () => {
  const turns = new Turns();
  const gate = Promise.withResolvers<void>();
  const said: string[] = [];
  const first = turns.run('a', async () => {
    await gate.promise;
    said.push('a1');
    throw new Error('no');
  });
  const second = turns.run('a', async () => said.push('a2'));
  await turns.run('b', async () => said.push('b'));
  assert.deepEqual(turns.names(), ['a']);
  gate.resolve();
  await assert.rejects(first, /no/);
  await second;
  assert.deepEqual(said, ['b', 'a1', 'a2']);
  await turns.over();
  assert.deepEqual(turns.names(), []);
});
