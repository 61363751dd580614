/** What is mounted where, from the kernel's own words. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { mountOf, parseMountinfo } from '../../src/core/mountinfo.ts';

const MOUNTS = parseMountinfo(
  [
    '22 1 254:0 / / rw,relatime - ext4 /dev/vda rw',
    '30 22 0:40 / /srv/vm rw,nosuid shared:5 - fuse.gridvfs ssh://host/store rw,user_id=0',
    '31 30 0:41 / /srv/vm/inner ro - tmpfs none rw',
    '32 22 0:42 / /srv/with\\040blank rw - fuse.gridvfs other rw',
    '33 22 254:1 / /covered rw - fuse.gridvfs below rw',
    '34 33 254:2 / /covered rw - xfs /dev/vdb rw',
    'not a line of it',
    '',
  ].join('\n'),
);

test('a path is on the nearest mount above it, and of two in one place on the later', () => {
  const typeOf = (file: string) => mountOf(file, MOUNTS)?.type;
  assert.equal(typeOf('/etc/passwd'), 'ext4');
  assert.equal(typeOf('/srv/vm'), 'fuse.gridvfs');
  assert.equal(typeOf('/srv/vm/images/debian/12/disk.raw'), 'fuse.gridvfs');
  assert.equal(typeOf('/srv/vm/inner/a'), 'tmpfs');
  assert.equal(typeOf('/srv/vmware/a'), 'ext4', 'a name that only begins like it');
  assert.equal(typeOf('/srv/with blank/a'), 'fuse.gridvfs');
  assert.equal(typeOf('/covered/a'), 'xfs');
  assert.equal(mountOf('/a', []), undefined);
});

test('what is told of a mount', () => {
  assert.equal(MOUNTS.length, 6);
  assert.deepEqual(MOUNTS[1], {
    ...{ id: 30, device: '0:40', mountpoint: '/srv/vm', type: 'fuse.gridvfs' },
    ...{ source: 'ssh://host/store', readOnly: false },
  });
  assert.equal(MOUNTS[2]!.readOnly, true);
});
