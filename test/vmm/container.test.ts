/** Containers through the Vmm suites, where they apply; and what is theirs alone: one outlives its daemon. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { randomBytes } from 'node:crypto';
import { existsSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { buildGuest, guestCacheFolder } from '../../bench/guest/build.ts';
import { isRoot } from '../../src/core/linux.ts';
import { treesOf } from '../../src/vmm/cgroups.ts';
import { Cgroups, createContainers } from '../../src/vmm/index.ts';
import { vmmDevicesSuite } from '../suites/vmm-devices.ts';
import { failsWith, vmmSuite } from '../suites/vmm.ts';

const smallGuest = () => buildGuest({ guest: 'small', folder: path.join(guestCacheFolder(), 'small') });
const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-container-'));
after(() => rmSync(temporary, { recursive: true, force: true }));

/** Below `pid`, the first process of another process namespace: that of the container. */
async function waitForInside(pid: number): Promise<number> {
  const ours = readlinkSync('/proc/self/ns/pid');
  for (const endMs = performance.now() + 20_000; ; await sleep(50)) {
    for (const of = [pid]; of.length > 0;) {
      const one = of.shift()!;
      try {
        if (readlinkSync(`/proc/${one}/ns/pid`) !== ours) return one;
        const children = readFileSync(`/proc/${one}/task/${one}/children`, 'utf8');
        of.push(...children.split(' ').filter(Boolean).map(Number));
      } catch {
        // It has ended meanwhile.
      }
    }
    assert.ok(performance.now() < endMs, 'nothing runs inside the container');
  }
}

if (isRoot()) {
  vmmSuite('container', createContainers(), smallGuest);
  vmmDevicesSuite('container', createContainers(), smallGuest);

  test('a container outlives a killed daemon, is adopted by the next one, and leaves no mount and no loop device', async (t) => {
    const guest = await smallGuest();
    const disk = path.join(temporary, 'disk.raw');
    execFileSync('cp', ['--sparse=always', guest.disk, disk]);
    const folder = mkdtempSync(path.join(temporary, 'machine-'));
    const description = {
      name: 'orphan',
      vcpus: 1,
      memoryBytes: guest.memoryBytes,
      disks: [{ path: disk, format: 'raw' as const, readOnly: false }],
      macAddress: '52:54:00:00:00:07',
      network: 'none' as const,
    };
    const program = `
      const { createContainers } = await import(${JSON.stringify(path.resolve('src/vmm/index.ts'))});
      const machine = await createContainers().start(${JSON.stringify(description)}, ${JSON.stringify(folder)});
      console.log(machine.status().pid);
      setInterval(() => undefined, 1000);`;
    const daemon = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const pid = Number(String((await once(daemon.stdout, 'data'))[0]));
    daemon.kill('SIGKILL');
    await once(daemon, 'exit');
    assert.ok(existsSync(`/proc/${pid}/exe`), 'the container went with the daemon');
    const adopted = (await createContainers().adopt(folder))!;
    t.after(() => adopted.stop(0).catch(() => undefined)); // also where something below fails
    assert.deepEqual([adopted.status().state, adopted.status().pid], ['running', pid]);
    await assert.rejects(createContainers().start(description, folder), failsWith('in-use', /still runs/));

    // What runs inside was there before its machine was put into a group. Fails without the loop over children in
    // Cgroups.place: the supervisor alone would be in it.
    const inside = await waitForInside(pid);
    const trees = treesOf(readFileSync('/proc/self/mounts', 'utf8'));
    if (trees.length > 0) {
      const name = `gridvfs-test-${randomBytes(4).toString('hex')}`;
      const groups = await Cgroups.open(name);
      t.after(async () => {
        await groups.remove('vm-orphan');
        await groups.dispose();
        for (const group of groups.folders) assert.equal(existsSync(group), false);
      });
      await groups.place('vm-orphan', pid);
      for (const one of [pid, inside]) {
        const lines = readFileSync(`/proc/${one}/cgroup`, 'utf8').split('\n');
        const own = lines.filter((line) => line.endsWith(`/${name}/vm-orphan`));
        assert.equal(own.length, trees.length, `process ${one}: ${lines.join(' ')}`);
      }
    }
    await adopted.stop(0);
    assert.equal((await adopted.ended).state, 'stopped');
    assert.deepEqual(
      readdirSync(folder).filter((name) => !name.endsWith('.log')),
      [],
    );
    assert.ok(
      !execFileSync('losetup', ['--list', '--output', 'BACK-FILE'], { encoding: 'utf8' }).includes(disk),
    );
    assert.ok(!readFileSync('/proc/self/mountinfo', 'utf8').includes(folder));
    await assert.rejects(
      createContainers().start({ ...description, network: 'user' }, folder),
      failsWith('unsupported', /no network/),
    );
  });
}
