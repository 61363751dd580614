/** QEMU through the Vmm suite, and what is QEMU's alone: its choice of accelerator, machines left by a dead process. */
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { buildGuest, guestCacheFolder } from '../../bench/guest/build.ts';
import { createQemu } from '../../src/vmm/index.ts';
import { chooseAccelerator } from '../../src/vmm/qemu/accelerator.ts';
import { vmmDevicesSuite } from '../suites/vmm-devices.ts';
import { failsWith, vmmSuite } from '../suites/vmm.ts';

const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-qemu-'));
after(() => rmSync(temporary, { recursive: true, force: true }));

const smallGuest = () => buildGuest({ guest: 'small', folder: path.join(guestCacheFolder(), 'small') });
vmmSuite('qemu', createQemu(), smallGuest);
vmmDevicesSuite('qemu', createQemu(), smallGuest);

test('where QEMU is not installed, probe and start name the Debian package', async () => {
  const qemu = createQemu({ binary: 'qemu-system-of-nobody' });
  const probe = await qemu.probe();
  assert.equal(probe.usable, false);
  assert.match(probe.reason!, /qemu-system-x86/);
  const description = {
    name: 'none',
    vcpus: 1,
    memoryBytes: 64 * 1024 * 1024,
    disks: [{ path: '/dev/null', format: 'raw' as const, readOnly: true }],
    macAddress: '52:54:00:00:00:02',
    network: 'none' as const,
  };
  await assert.rejects(qemu.start(description, temporary), failsWith('unsupported', /qemu-system-x86/));
});

test('KVM is chosen only where the processor has vmx or svm, unless the operator says otherwise', async () => {
  const flags = /^flags\s*:.*\b(?:vmx|svm)\b/m.test(readFileSync('/proc/cpuinfo', 'utf8'));
  const { accelerator, reason } = await chooseAccelerator('auto');
  if (!flags) assert.equal(accelerator, 'tcg');
  else if (accelerator === 'tcg') assert.match(reason, /\/dev\/kvm/);
  assert.equal((await chooseAccelerator('kvm')).accelerator, 'kvm');
  assert.equal((await chooseAccelerator('tcg')).accelerator, 'tcg');
  assert.equal((await createQemu({ accelerator: 'kvm' }).probe()).accelerator, 'kvm');
});

/** A machine in `folder`, started by a process that is killed then. */
async function startByAnother(folder: string, then: string) {
  const disk = path.join(temporary, 'orphan.raw');
  writeFileSync(disk, '');
  truncateSync(disk, 1024 * 1024);
  const description = {
    name: 'orphan',
    vcpus: 1,
    memoryBytes: 64 * 1024 * 1024,
    disks: [{ path: disk, format: 'raw' as const, readOnly: true }],
    macAddress: '52:54:00:00:00:03',
    network: 'none' as const,
  };
  const program = `
    const { createQemu } = await import(${JSON.stringify(path.resolve('src/vmm/index.ts'))});
    const machine = await createQemu().start(${JSON.stringify(description)}, ${JSON.stringify(folder)});
    ${then}
    console.log(machine.status().pid, machine.status().state);
    setInterval(() => undefined, 1000);`;
  const daemon = spawn(process.execPath, ['--input-type=module', '-e', program], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const line = await Promise.race([once(daemon.stdout, 'data'), once(daemon, 'exit')]);
  const [pid, state] = String(line[0]).trim().split(' ');
  daemon.kill('SIGKILL');
  await once(daemon, 'exit');
  return { pid, state, description };
}

test('a machine outlives a killed daemon, is adopted by the next one, and its end is noticed', async () => {
  const folder = mkdtempSync(path.join(temporary, 'orphan-'));
  const { pid, state, description } = await startByAnother(folder, '');
  // Without a readyText nothing better is known than that it runs.
  assert.equal(state, 'running');
  assert.ok(existsSync(`/proc/${pid}/exe`), 'QEMU went with the daemon');
  // Adopted twice: the second time by whoever comes after one that let go of it.
  const adopted = await createQemu().adopt(folder);
  assert.deepEqual([adopted?.status().pid, adopted?.status().state], [Number(pid), 'running']);
  await assert.rejects(createQemu().start(description, folder), failsWith('in-use', /still runs/));
  process.kill(Number(pid), 'SIGKILL');
  const { state: end, reason } = await adopted!.ended;
  assert.equal(end, 'failed');
  assert.match(reason!, /QEMU ended/);
  assert.equal(await createQemu().adopt(folder), undefined);
  assert.deepEqual(readdirSync(folder).toSorted(), ['console.log', 'qemu.log']);
});

test('a paused machine whose daemon was killed is adopted as it is, stops when it is told, and endLost ends another', async () => {
  const folder = mkdtempSync(path.join(temporary, 'paused-'));
  const { pid } = await startByAnother(folder, "await machine.execute('stop');");
  const adopted = (await createQemu().adopt(folder))!;
  assert.equal(adopted.status().state, 'paused');
  await adopted.proceed();
  assert.equal(adopted.status().state, 'running');
  await adopted.stop(0);
  assert.equal((await adopted.ended).state, 'stopped');
  assert.ok(!existsSync(`/proc/${pid}/exe`));
  await startByAnother(folder, '');
  assert.equal(await createQemu().endLost(folder), true);
  assert.deepEqual(readdirSync(folder).toSorted(), ['console.log', 'qemu.log']);
  assert.equal(await createQemu().endLost(folder), false);
});

test('endLost leaves a foreign process alone that has got the number of the machine', async () => {
  const folder = mkdtempSync(path.join(temporary, 'reused-'));
  const other = spawn('sleep', ['60'], { cwd: folder });
  try {
    await new Promise<void>((resolve, reject) => {
      execFile('sh', ['-c', `echo ${other.pid} > qemu.pid`], { cwd: folder }, (error) =>
        error === null ? resolve() : reject(error),
      );
    });
    assert.equal(await createQemu().endLost(folder), false);
    assert.equal(other.exitCode, null);
    assert.ok(existsSync(`/proc/${other.pid}/exe`));
  } finally {
    other.kill('SIGKILL');
  }
});
