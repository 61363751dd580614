/** What is put off is done when somebody needs it, once, and is not forgotten when it fails. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { PutOff } from '../../src/agent/put-off.ts';

test('it is done when it is needed, once; what is dropped is not done', async () => {
  const putOff = new PutOff(() => undefined);
  const done: string[] = [];
  const sync = (name: string) => async () => void done.push(name);
  putOff.add('a', sync('a'));
  putOff.add('b', sync('b'));
  await putOff.drop('b');
  await Promise.all([putOff.done('a'), putOff.done('a'), putOff.done('b'), putOff.done('unknown')]);
  assert.deepEqual(done, ['a']);
  putOff.add('c', sync('c'));
  await putOff.close();
  assert.deepEqual(done, ['a', 'c']);
});

test('who needs it waits for what is under way', async () => {
  const putOff = new PutOff(() => undefined);
  const gate = Promise.withResolvers<void>();
  putOff.add('a', () => gate.promise);
  let over = 0;
  const both = [putOff.done('a'), putOff.done('a')].map((one) => one.then(() => over++));
  await new Promise(setImmediate);
  assert.equal(over, 0);
  gate.resolve();
  await Promise.all(both);
  assert.equal(over, 2);
});

test('one that failed is still to be done', async () => {
  const failures: string[] = [];
  const putOff = new PutOff((name, error) => failures.push(`${name}: ${String(error)}`));
  let attempts = 0;
  putOff.add('a', async () => {
    if (++attempts < 3) throw new Error('the disk is full');
  });
  await assert.rejects(putOff.done('a'), /full/);
  await assert.rejects(putOff.done('a'), /full/);
  await putOff.done('a');
  assert.equal(attempts, 3);
  putOff.add('b', async () => {
    throw new Error('gone');
  });
  await putOff.close();
  assert.deepEqual(failures, ['b: Error: gone']);
});

// Without the second #drop of `drop`, what fails because its thing is gone would be tried again.
test('what is dropped while it is under way is waited for, and is over however it ends', async () => {
  const putOff = new PutOff(() => undefined);
  const gate = Promise.withResolvers<void>();
  let attempts = 0;
  putOff.add('a', () => {
    attempts++;
    return gate.promise;
  });
  const asked = putOff.done('a');
  let dropped = false;
  const dropping = putOff.drop('a').then(() => (dropped = true));
  await new Promise(setImmediate);
  assert.ok(!dropped);
  gate.reject(new Error('gone'));
  await assert.rejects(asked, /gone/);
  await dropping;
  await putOff.done('a');
  assert.equal(attempts, 1);
});
