/** What keeps a rehearsal apart from everybody; the whole of it is in test/scenarios/vm-rehearsal.test.ts. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { isolated } from '../../src/agent/machine-description.ts';
import { MIB } from '../../src/core/limits.ts';
import type { MachineDescription } from '../../src/core/machine.ts';
import { checkDescription } from '../../src/vmm/description.ts';

const description: MachineDescription = {
  name: 'web',
  vcpus: 1,
  memoryBytes: 64 * MIB,
  disks: [{ path: '/disk', format: 'raw', readOnly: false }],
  macAddress: '52:54:00:00:00:02',
  network: 'user',
};

test('a machine on a bridge of its host is not rehearsed: its frames would be seen there', () => {
  const bridged = { ...description, network: { bridge: 'br0' } };
  assert.throws(() => isolated(bridged), { code: 'unsupported', message: /br0/ });
  assert.throws(() => checkDescription({ ...bridged, isolated: true }), { code: 'bad-request' });
  checkDescription(bridged);
  for (const network of ['user', 'none'] as const) {
    const apart = isolated({ ...description, network });
    assert.equal(apart.isolated, true);
    checkDescription(apart);
  }
});
