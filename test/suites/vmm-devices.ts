/**
 * The conformance suite of `Vmm` for what machines have beside their system disk: data disks that come and go, bounds on
 * what all disks do, a seed. One guest for all of it.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import type { BuiltGuest } from '../../bench/guest/build.ts';
import { MIB } from '../../src/core/limits.ts';
import type { Machine, MachineAbility, MachineDescription, Vmm } from '../../src/core/machine.ts';
import { failsWith } from './vmm.ts';
import { Shell } from './vmm-shell.ts';

const READY_MS = 60_000;
const DETACH_MS = 20_000;

export function vmmDevicesSuite(name: string, vmm: Vmm, guestOf: () => Promise<BuiltGuest>): void {
  describe(`${name} as a Vmm: disks, bounds, seed`, () => {
    const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-vmm-'));
    const seed = { instanceId: 'suite-1', hostName: 'seeded', sshKeys: ['ssh-ed25519 AAAA one@here'] };
    let description: MachineDescription;
    let machine: Machine;
    let folders = 0;
    const lacks = (ability: MachineAbility) => vmm.lacks.has(ability);

    const newFolder = () => {
      const folder = path.join(temporary, `machine-${++folders}`);
      mkdirSync(folder);
      return folder;
    };
    const newDisk = (text: string) => {
      const disk = path.join(temporary, `data-${++folders}.raw`);
      writeFileSync(disk, text);
      truncateSync(disk, 8 * MIB);
      return disk;
    };
    const say = async (line: string, answer: RegExp) => {
      const shell = await Shell.open(machine);
      try {
        return await shell.ask(line, answer);
      } finally {
        shell.close();
      }
    };
    /** Says what the disk of that name begins with, if the guest has it: a virtio disk by its serial number, a container's
     * by the node that it is given. `first` is done to the disk before. */
    const look = (id: string, first = ':') => {
      const said = `${first}; echo "at-$(head -c 5 $d)-end"`;
      return lacks('boot')
        ? `d=/dev/volumes/${id}; [ -b $d ] && { ${said}; }; echo searched`
        : `for s in /sys/block/vd*; do d=/dev/\${s##*/}; [ "$(cat $s/serial)" = ${id} ] && { ${said}; }; done; echo searched`;
    };

    before(async () => {
      const guest = await guestOf();
      const overlay = path.join(temporary, 'overlay.qcow2');
      if (lacks('qcow2')) execFileSync('cp', ['--sparse=always', guest.disk, overlay]);
      else execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', guest.disk, overlay]);
      description = {
        name: 'devices',
        vcpus: 1,
        memoryBytes: guest.memoryBytes,
        disks: [{ path: overlay, format: lacks('qcow2') ? 'raw' : 'qcow2', readOnly: false }],
        ...(lacks('boot')
          ? {}
          : { boot: { kernel: guest.kernel, initrd: guest.initrd, commandLine: guest.commandLine } }),
        macAddress: '52:54:00:00:00:05',
        network: lacks('network') ? 'none' : 'user',
        readyText: guest.readyText,
        seed,
      };
      machine = await vmm.start(description, newFolder());
      await machine.ready(READY_MS);
    });
    after(async () => {
      await machine.stop(0);
      rmSync(temporary, { recursive: true, force: true });
    });

    test('a guest has the name and the keys of its seed', { skip: lacks('boot') }, async () => {
      const said = await say(
        'echo "$(hostname) $(cat /run/instance-id) $(cat /root/.ssh/authorized_keys)"',
        /seeded suite-1 ssh-ed25519 AAAA one@here/,
      );
      assert.ok(said.length > 0);
    });

    test('a disk is attached while the guest runs, found by its name, written to, and detached', async () => {
      const disk = newDisk('first');
      await machine.attach({ id: 'data', path: disk, format: 'raw', readOnly: false });
      await assert.rejects(
        machine.attach({ id: 'data', path: disk, format: 'raw', readOnly: false }),
        failsWith('exists', /'data'/),
      );
      await say(look('data'), /at-first-end/);
      const onIt = look('data', 'printf other > $d; sync');
      await say(onIt, /at-other-end/);
      const second = newDisk('secnd');
      await machine.attach({ id: 'fixed', path: second, format: 'raw', readOnly: true });
      await say(look('fixed'), /at-secnd-end/);
      assert.deepEqual(
        machine.description.disks.slice(1).map(({ id }) => id),
        ['data', 'fixed'],
      );
      await machine.detach('data', DETACH_MS);
      assert.equal(readFileSync(disk).toString('latin1', 0, 5), 'other');
      const said = await say(`${look('data')}-$((6*7))`, /(?:at-\S*-end\s+)?searched-42/);
      assert.doesNotMatch(said, /at-/, 'the guest still has it');
      await assert.rejects(machine.detach('data', DETACH_MS), failsWith('not-found', /'data'/));
      // Its place is free again.
      await machine.attach({ id: 'data', path: newDisk('third'), format: 'raw', readOnly: false });
      await say(look('data'), /at-third-end/);
    });

    test('a disk that is not there is refused, and the machine is as before', async () => {
      const before = machine.description;
      await assert.rejects(
        machine.attach({ id: 'none', path: '/nowhere/data.raw', format: 'raw', readOnly: false }),
        failsWith('vm-failed', /nowhere/),
      );
      assert.deepEqual(machine.description, before);
      await say('ping on', /pong on/);
    });

    test(
      'a captured machine has its attached disks again, at the same place',
      { skip: vmm.lacks.has('capture') },
      async () => {
        const files = { memory: path.join(temporary, 'memory'), deviceState: path.join(temporary, 'state') };
        writeFileSync(files.memory, '');
        truncateSync(files.memory, description.memoryBytes);
        await say('N=kept; echo set-$((6*7))', /set-42/);
        const { compatibility } = await machine.capture(files);
        const now = machine.description;
        await machine.stop(0);
        machine = await vmm.resume(now, newFolder(), files, compatibility);
        await machine.proceed();
        await say(`echo "$N"; ${look('data')}`, /kept\s+at-third-end/);
        await machine.detach('data', DETACH_MS);
        await machine.attach({ id: 'more', path: newDisk('fifth'), format: 'raw', readOnly: false });
        await say(look('more'), /at-fifth-end/);
      },
    );

    test(
      'what the disks do is bounded, the bounds change while the guest runs, and go',
      { skip: vmm.lacks.has('limits') },
      async () => {
        await assert.rejects(
          machine.setLimits({ bytesPerSecond: 0 }),
          failsWith('bad-request', /bytesPerSecond/),
        );
        let times = 0;
        const seconds = async (megabytes: number) => {
          const startMs = performance.now();
          // Typed again meanwhile, it is done again: each has a mark of its own.
          const mark = ++times;
          await say(
            `dd if=/dev/vda of=/dev/null bs=1M count=${megabytes} iflag=direct 2>/dev/null; echo read-$((${mark}*7))`,
            new RegExp(`read-${mark * 7}\\b`),
          );
          return (performance.now() - startMs) / 1000;
        };
        await machine.setLimits({ bytesPerSecond: 2 * MIB });
        assert.deepEqual(machine.description.limits, { bytesPerSecond: 2 * MIB });
        // The first tenth of a second's worth or so comes at once.
        const bounded = await seconds(6);
        assert.ok(bounded > 2, `6 MiB at 2 MiB/s took ${bounded} s`);
        await machine.setLimits({});
        const free = await seconds(6);
        assert.ok(free < bounded / 2, `6 MiB without bounds took ${free} s, bounded ${bounded} s`);
      },
    );
  });
}
