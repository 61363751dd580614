/** Names of proxies from their mount points, and room for their sockets. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { nameOfMountpoint, proxyPaths } from '../../src/cli/paths.ts';
import { GridError } from '../../src/core/errors.ts';
import { isName } from '../../src/core/manifest.ts';

test('a plain mount point gives a plain name', () => {
  assert.equal(nameOfMountpoint('/mnt/grid'), 'mnt-grid');
  assert.equal(nameOfMountpoint('/mnt/grid/'), 'mnt-grid');
  assert.equal(nameOfMountpoint('/'), 'root');
});

test('mount points whose names would lose something keep apart, and every name can be one', () => {
  const odd = [
    '/mnt/Grid',
    '/mnt/grid',
    '/mnt/gr id',
    '/mnt/gr_id',
    '/mnt/gr!d',
    '/mnt/.x',
    '/.x',
    '/_',
    '/ä',
    '/ö',
  ];
  const long = ['a', 'b'].map((letter) => `/mnt/${letter}${'/deep'.repeat(60)}`);
  const names = [...odd, ...long].map(nameOfMountpoint);
  assert.equal(new Set(names).size, names.length, names.join(' '));
  for (const name of names) {
    assert.ok(isName(name), name);
    assert.ok(name.length <= 40, name);
  }
});

test('a name whose sockets would not fit into a socket address is refused at once', () => {
  assert.throws(
    () => proxyPaths('n'.repeat(100)),
    (error) => error instanceof GridError && error.code === 'bad-request' && /too long/.test(error.message),
  );
});
