/**
 * The conformance suite of `Vmm`: real guests, booted from a copy-on-write overlay of the small guest's disk. What
 * it checks of the guest needs only a Linux with a root shell on the first serial console.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import type { BuiltGuest } from '../../bench/guest/build.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { GridError, type ErrorCode } from '../../src/core/errors.ts';
import { MIB } from '../../src/core/limits.ts';
import type { Machine, MachineAbility, MachineDescription, Vmm } from '../../src/core/machine.ts';
import { Shell } from './vmm-shell.ts';

/** Generous: an emulated guest on a busy machine with two cores. It boots in about 3 s. */
const READY_MS = 60_000;

const isAlive = (pid: number) => {
  // A process that has ended and is not yet waited for still has its folder in /proc.
  const stat = existsSync(`/proc/${pid}/stat`) ? readFileSync(`/proc/${pid}/stat`, 'utf8') : ') Z';
  return !/\) Z/.test(stat);
};

export function failsWith(code: ErrorCode, text: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof GridError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, text);
    return true;
  };
}

export function vmmSuite(name: string, vmm: Vmm, guestOf: () => Promise<BuiltGuest>): void {
  describe(`${name} as a Vmm`, () => {
    const temporary = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-vmm-'));
    const machines: Machine[] = [];
    const lacks = (ability: MachineAbility) => vmm.lacks.has(ability);
    /** The words with which a Vmm that lacks it refuses what the suite would try. */
    const skip = (...abilities: MachineAbility[]) =>
      abilities.some(lacks) ? `${name} lacks ${abilities.filter(lacks).join(', ')}` : false;
    const format = lacks('qcow2') ? ('raw' as const) : ('qcow2' as const);
    let guest: BuiltGuest;
    let folders = 0;

    before(async () => {
      guest = await guestOf();
    });
    after(async () => {
      for (const machine of machines) await machine.stop(0);
      rmSync(temporary, { recursive: true, force: true });
    });

    const newFolder = (folderName = `machine-${++folders}`) => {
      const folder = path.join(temporary, folderName);
      mkdirSync(folder);
      return folder;
    };
    const newOverlay = (fileName = `overlay-${++folders}.qcow2`) => {
      const overlay = path.join(temporary, fileName);
      if (lacks('qcow2')) execFileSync('cp', ['--sparse=always', guest.disk, overlay]);
      else execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', guest.disk, overlay]);
      return overlay;
    };
    const describeMachine = (
      disk: string,
      changes: Partial<MachineDescription> = {},
    ): MachineDescription => ({
      name: 'suite, guest',
      vcpus: 1,
      memoryBytes: guest.memoryBytes,
      disks: [{ path: disk, format, readOnly: false }],
      ...(lacks('boot')
        ? {}
        : { boot: { kernel: guest.kernel, initrd: guest.initrd, commandLine: guest.commandLine } }),
      macAddress: '52:54:00:00:00:01',
      network: lacks('network') ? 'none' : 'user',
      readyText: guest.readyText,
      ...changes,
    });
    const start = async (description: MachineDescription, folder: string) => {
      const machine = await vmm.start(description, folder);
      machines.push(machine);
      return machine;
    };
    /** Logs stay; the process and the sockets are gone. */
    const assertNothingLeft = (folder: string, pid: number) => {
      assert.ok(!isAlive(pid), `process ${pid} still runs`);
      const left = readdirSync(folder).filter((file) => !file.endsWith('.log'));
      assert.deepEqual(left, []);
    };
    const pidOf = (machine: Machine) => {
      const { pid } = machine.status();
      assert.ok(pid !== undefined && isAlive(pid));
      return pid;
    };

    test('probe says that this host can run it, with which accelerator and why', async () => {
      const probe = await vmm.probe();
      assert.equal(probe.usable, true);
      assert.ok(probe.accelerator !== undefined && probe.reason !== undefined && probe.reason !== '');
    });

    test('a guest boots, answers, and what it synced survives when its process is killed', async () => {
      const nonce = randomBytes(8).toString('hex');
      const overlay = newOverlay('over,lay = 1.qcow2');
      const folder = newFolder();
      const machine = await start(describeMachine(overlay), folder);
      assert.equal(machine.status().state, 'starting');
      await assert.rejects(vmm.start(describeMachine(overlay), folder), failsWith('in-use', /still runs in/));
      const pid = pidOf(machine);
      await machine.ready(READY_MS);
      await machine.ready(0);
      const { state, startedMs, readyMs, accelerator } = machine.status();
      assert.equal(state, 'running');
      assert.ok(startedMs! > 0 && readyMs! > startedMs!, `${startedMs} ${readyMs}`);
      assert.ok(accelerator !== undefined);
      assert.ok(readFileSync(machine.consoleLog, 'utf8').includes(guest.readyText));

      const shell = await Shell.open(machine);
      assert.equal(await shell.ask(`ping ${nonce}`, /pong (\w+)/), nonce);
      await shell.ask(`echo ${nonce} > /root/nonce && sync && echo done-$((6*7))`, /done-42/);
      shell.close();
      process.kill(pid, 'SIGKILL');
      const end = await machine.ended;
      assert.equal(end.state, 'failed');
      assert.match(end.reason!, /SIGKILL/);
      assert.equal(end.pid, undefined);
      assertNothingLeft(folder, pid);

      const again = await start(describeMachine(overlay), newFolder('long-'.repeat(40)));
      await again.ready(READY_MS);
      const second = await Shell.open(again);
      assert.equal(await second.ask('cat /root/nonce', /^([0-9a-f]{16})\r?$/m), nonce);
      second.close();
      const secondPid = pidOf(again);
      await again.stop(30_000);
      const { state: endState, reason } = await again.ended;
      assert.deepEqual({ endState, reason }, { endState: 'stopped', reason: undefined });
      // The kernel's last word.
      if (!lacks('boot')) assert.match(readFileSync(again.consoleLog, 'utf8'), /Power down/);
      assertNothingLeft(path.dirname(again.consoleLog), secondPid);
      await again.stop(0);
    });

    /** Files for a capture; the memory file is as large as the memory and holds zeros. */
    const newFiles = () => {
      const files = {
        memory: path.join(temporary, `memory-${++folders}`),
        deviceState: path.join(temporary, `state-${folders}`),
      };
      writeFileSync(files.memory, '');
      truncateSync(files.memory, guest.memoryBytes);
      return files;
    };

    test(
      'a captured guest goes on where it was, again and again, and each capture writes what changed',
      { skip: skip('capture') },
      async () => {
        const overlay = newOverlay();
        const description = describeMachine(overlay);
        const booted = await start(description, newFolder());
        await booted.ready(READY_MS);
        const nonce = randomBytes(8).toString('hex');
        // Nothing but the memory of the shell knows it; the file system in memory has a check of its own.
        const say = async (machine: Machine, line: string, answer: RegExp) => {
          const shell = await Shell.open(machine);
          const said = await shell.ask(line, answer);
          shell.close();
          return said;
        };
        const fill =
          'dd if=/dev/urandom of=/run/fill bs=1M count=8 2>/dev/null; md5sum < /run/fill > /run/sum';
        await say(booted, `N=${nonce}; ${fill}; echo set-$((6*7))`, /set-42/);
        const files = newFiles();
        const first = await booted.capture(files);
        assert.equal(booted.status().state, 'paused');
        await booted.stop(0);
        assert.equal((await booted.ended).state, 'stopped');
        assert.ok(first.memoryWrittenBytes > 8 * MIB && first.memoryWrittenBytes <= guest.memoryBytes);
        let { compatibility } = first;
        for (let round = 0; round < 2; round++) {
          const folder = newFolder();
          const image = sha256(readFileSync(files.memory));
          const machine = await vmm.resume(description, folder, files, compatibility);
          machines.push(machine);
          assert.equal(machine.status().state, 'paused');
          await machine.proceed();
          assert.equal(machine.status().state, 'running');
          const answer = await say(
            machine,
            'echo "$N-$(md5sum < /run/fill | cmp - /run/sum && echo same)"',
            /\w{16}-same/,
          );
          assert.equal(answer, `${nonce}-same`);
          assert.equal(
            await say(machine, `echo ${round} > /root/round && sync && cat /root/round`, /^(\d)\r?$/m),
            `${round}`,
          );
          assert.equal(sha256(readFileSync(files.memory)), image, 'the image is mapped privately');
          const again = await machine.capture(files);
          ({ compatibility } = again);
          assert.ok(again.memoryWrittenBytes > 0 && again.memoryWrittenBytes < first.memoryWrittenBytes / 2);
          // It can also go on after a capture, and be ended in any state.
          await machine.proceed();
          await say(machine, 'ping on', /pong on/);
          const end = await machine.capture(files);
          ({ compatibility } = end);
          const pid = pidOf(machine);
          await machine.stop(0);
          assertNothingLeft(folder, pid);
        }
      },
    );

    test(
      'what cannot be resumed is refused with the reason, and leaves nothing',
      { skip: skip('capture') },
      async () => {
        const description = describeMachine(newOverlay());
        const home = newFolder();
        const machine = await start(description, home);
        await machine.ready(READY_MS);
        // A name that an implementation may have in mind for itself.
        const files = { ...newFiles(), deviceState: path.join(home, 'device.state') };
        const { compatibility } = await machine.capture(files);
        await machine.stop(0);
        assert.ok(existsSync(files.deviceState));
        const refuses = async (
          code: ErrorCode,
          text: RegExp,
          changes: Partial<typeof compatibility>,
          changedFiles: Partial<typeof files> = {},
          changedDescription: Partial<MachineDescription> = {},
        ) => {
          const folder = newFolder();
          await assert.rejects(
            vmm.resume(
              { ...description, ...changedDescription },
              folder,
              { ...files, ...changedFiles },
              { ...compatibility, ...changes },
            ),
            failsWith(code, text),
          );
          assert.deepEqual(
            readdirSync(folder).filter((file) => !file.endsWith('.log')),
            [],
          );
        };
        await refuses('unsupported', /Vmm/, { vmm: 'other' });
        await refuses('unsupported', /accelerator/, { accelerator: 'other' });
        await refuses('unsupported', /processor/, { processor: 'other' });
        await refuses('vm-failed', /unsupported machine type/, { machine: 'pc-i440fx-99.9' });
        const short = path.join(temporary, 'short');
        copyFileSync(files.memory, short);
        truncateSync(short, guest.memoryBytes - MIB);
        await refuses('vm-failed', /does not match|size/, {}, { memory: short });
        const cut = path.join(temporary, 'cut');
        writeFileSync(cut, readFileSync(files.deviceState).subarray(0, -2000));
        await refuses('bad-format', /device state/, {}, { deviceState: cut });
        writeFileSync(cut, '');
        await refuses('bad-format', /0 bytes/, {}, { deviceState: cut });
        await refuses('not-found', /nowhere/, {}, { deviceState: '/nowhere' });
        // Another machine than the one that was captured: a device is missing.
        await refuses('bad-format', /device state/, {}, {}, { network: 'none' });
      },
    );

    test('a guest that powers down by itself is stopped, not failed', async () => {
      const folder = newFolder();
      const machine = await start(describeMachine(newOverlay(), { network: 'none' }), folder);
      const pid = pidOf(machine);
      await machine.ready(READY_MS);
      const shell = await Shell.open(machine);
      await shell.ask('ping awake', /pong awake/);
      shell.send('poweroff -f');
      const { state, reason } = await machine.ended;
      shell.close();
      assert.deepEqual({ state, reason }, { state: 'stopped', reason: undefined });
      assertNothingLeft(folder, pid);
    });

    test('stop without grace ends a booting guest at once, and who waits for it is told', async () => {
      const folder = newFolder();
      const machine = await start(describeMachine(newOverlay()), folder);
      const pid = pidOf(machine);
      const waiting = assert.rejects(machine.ready(READY_MS), failsWith('vm-failed', /before it was ready/));
      const startMs = performance.now();
      await machine.stop(0);
      assert.ok(performance.now() - startMs < 10_000);
      await waiting;
      assert.equal((await machine.ended).state, 'stopped');
      assertNothingLeft(folder, pid);
    });

    test('stop without grace overtakes a stop that still waits for the guest', async () => {
      const folder = newFolder();
      const machine = await start(describeMachine(newOverlay(), { readyText: 'x' }), folder);
      const patient = machine.stop(60_000);
      const startMs = performance.now();
      await Promise.all([machine.stop(0), patient]);
      assert.ok(performance.now() - startMs < 10_000);
      assertNothingLeft(folder, 0);
    });

    test(
      'a guest that does not get ready in time is a timeout with the console’s last words',
      { skip: skip('boot') },
      async () => {
        const folder = newFolder();
        const boot = { kernel: guest.kernel, initrd: guest.initrd, commandLine: 'console=ttyS0' };
        const machine = await start(describeMachine(newOverlay(), { boot, readyText: 'never said' }), folder);
        const pid = pidOf(machine);
        while (!/\[ +\d+\.\d+\]/.test(readFileSync(machine.consoleLog, 'utf8'))) {
          await new Promise((resolve) => setTimeout(resolve, 50));
        }
        await assert.rejects(
          machine.ready(200),
          failsWith('timeout', /did not say "never said" within 200 ms; .*last words: .*\[ +\d+\.\d+\]/),
        );
        assert.equal(machine.status().state, 'starting');
        await machine.stop(0);
        assertNothingLeft(folder, pid);
      },
    );

    test('a kernel panic is noticed at once', { skip: skip('boot') }, async () => {
      const folder = newFolder();
      const boot = { kernel: guest.kernel, commandLine: 'console=ttyS0 root=/dev/none' };
      const machine = await start(describeMachine(newOverlay(), { boot }), folder);
      const startMs = performance.now();
      await assert.rejects(
        machine.ready(READY_MS),
        failsWith('vm-failed', /gave up: Kernel panic - not syncing: VFS/),
      );
      assert.ok(performance.now() - startMs < READY_MS / 2);
      await machine.stop(0);
    });

    test('a disk that is not there is vm-failed with the reason, and leaves nothing', async () => {
      const folder = newFolder();
      await assert.rejects(
        vmm.start(describeMachine('/nowhere/disk.qcow2'), folder),
        failsWith(
          'vm-failed',
          /suite, guest[^{]*\/nowhere\/disk\.qcow2.*[Nn]o such file or directory|no such file or directory.*\/nowhere\/disk/,
        ),
      );
      assert.deepEqual(
        readdirSync(folder).filter((file) => !file.endsWith('.log')),
        [],
      );
    });

    test('a raw image declared as qcow2 is refused, not guessed at', { skip: skip('qcow2') }, async () => {
      const raw = path.join(temporary, 'plain.raw');
      writeFileSync(raw, Buffer.alloc(64 * 1024));
      await assert.rejects(
        vmm.start(describeMachine(raw), newFolder()),
        failsWith('vm-failed', /qcow2 format/),
      );
    });

    test('a disk that another machine writes to is refused, and the reason names it', async () => {
      const overlay = newOverlay();
      const first = await start(describeMachine(overlay, { readyText: 'x' }), newFolder());
      await assert.rejects(
        vmm.start(describeMachine(overlay), newFolder()),
        failsWith('vm-failed', /lock.*another process using the image \[.*overlay/),
      );
      await first.stop(0);
    });

    test('a malformed description is refused at the door', async () => {
      const good = describeMachine('/disk');
      const bad: [Partial<MachineDescription>, RegExp][] = [
        [{ name: '' }, /name/],
        [{ name: 'a\nb' }, /name/],
        [{ vcpus: 0 }, /vcpus/],
        [{ vcpus: 1.5 }, /vcpus/],
        [{ memoryBytes: 1 * MIB }, /memory/],
        [{ memoryBytes: 64 * MIB + 1 }, /memory/],
        [{ disks: [{ path: 'relative', format: 'raw', readOnly: false }] }, /absolute/],
        [{ disks: [{ path: '/disk', format: 'vmdk' as 'raw', readOnly: false }] }, /vmdk/],
        [{ macAddress: '01:00:00:00:00:01' }, /MAC/],
        [{ macAddress: '52:54:00,x=y' }, /MAC/],
        [{ network: 'tap' as 'none' }, /network/],
        [{ readyText: '' }, /readyText/],
        [{ boot: { kernel: 'vmlinuz', commandLine: '' } }, /absolute/],
        [{ boot: { kernel: '/vmlinuz', commandLine: 'x'.repeat(4000) } }, /command line/],
      ];
      const folder = newFolder();
      for (const [change, text] of bad) {
        await assert.rejects(vmm.start({ ...good, ...change }, folder), failsWith('bad-request', text));
      }
      assert.deepEqual(readdirSync(folder), []);
      await assert.rejects(vmm.start(good, '/nowhere/at/all'), failsWith('not-found', /\/nowhere/));
    });

    test('a machine’s logs are for their owner only', async () => {
      const folder = newFolder();
      const machine = await start(describeMachine(newOverlay()), folder);
      await assert.rejects(machine.stop(-1), failsWith('bad-request', /graceMs/));
      assert.equal(statSync(machine.consoleLog).mode & 0o077, 0);
      await machine.stop(0);
    });
  });
}
