/** Control groups: which trees there are, and a process that is put into them. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, readFileSync } from 'node:fs';
import { test } from 'node:test';
import { Cgroups, treesOf } from '../../src/vmm/cgroups.ts';
import { failsWith } from '../suites/vmm.ts';

test('of version 1 each tree with a controller that matters counts, once', () => {
  const mounts = [
    'cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0',
    'cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0',
    'cgroup /sys/fs/cgroup/freezer cgroup rw,freezer 0 0',
    'cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0',
    'cgroup2 /nowhere/unified cgroup2 rw 0 0',
    'tmpfs /tmp tmpfs rw 0 0',
  ];
  assert.deepEqual(treesOf(mounts.join('\n')), [
    { root: '/sys/fs/cgroup/cpu,cpuacct', version: 1 },
    { root: '/sys/fs/cgroup/memory', version: 1 },
  ]);
});

test('a process and what it has started are in its group in all trees, and a group goes when its process has ended', async (t) => {
  const trees = treesOf(readFileSync('/proc/self/mounts', 'utf8'));
  if (trees.length === 0) return t.skip('no control groups are mounted here');
  await assert.rejects(Cgroups.open('../up'), failsWith('bad-request', /no path/));
  const name = `gridvfs-test-${randomBytes(4).toString('hex')}`;
  const groups = await Cgroups.open(name);
  const child = spawn('sh', ['-c', 'sleep 60 & echo $!; wait'], { stdio: ['ignore', 'pipe', 'inherit'] });
  const grandchild = Number(String((await once(child.stdout, 'data'))[0]));
  try {
    assert.equal(groups.folders.length, trees.length);
    await groups.place('vm-one', child.pid!);
    for (const folder of groups.folders)
      assert.deepEqual(
        readFileSync(`${folder}/vm-one/cgroup.procs`, 'utf8')
          .trim()
          .split('\n')
          .map(Number)
          .toSorted((a, b) => a - b),
        [child.pid!, grandchild].toSorted((a, b) => a - b),
      );
  } finally {
    process.kill(grandchild, 'SIGKILL');
    child.kill('SIGKILL');
    await once(child, 'exit');
    await groups.remove('vm-one');
    await groups.dispose();
  }
  for (const folder of groups.folders) assert.equal(existsSync(folder), false);
});
