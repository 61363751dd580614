/**
 * What VMs live through, at length: a hundred suspensions under a writer, forks of forks, the death of their proxy at every
 * moment, a tunnel that is cut for a minute, and what is not as it was. All in the long run; vm-resume.test.ts has the
 * short of it, vm-forks.test.ts many forks at once.
 */
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { encodeCheckpoint, parseCheckpoint } from '../../src/agent/checkpoint-file.ts';
import type { CheckpointFacts } from '../../src/agent/checkpoint-file.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { ChunkTable } from '../../src/core/chunk-table.ts';
import { MIB } from '../../src/core/limits.ts';
import { isRunning } from '../../src/core/linux.ts';
import { parseManifest } from '../../src/core/manifest.ts';
import { openStore } from '../../src/store/index.ts';
import { ask } from './console.ts';
import { dirtyMemoryBytes, importSmall, killProxy, nonceOf, setNonce } from './vm-world.ts';
import type { Suspended, Vm } from './vm-world.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';
const CYCLES = 100;
const CUT_MS = 60_000;

/**
 * Runs in the guest until it is killed: writes files and memory, and checks both, and what it once put into memory. What is
 * wrong is a line in /run/bad.
 */
const WRITER = [
  'dd if=/dev/urandom of=/run/fill bs=1M count=8 2>/dev/null; md5sum < /run/fill > /run/fs; touch /run/bad;',
  'W() { i=0; while :; do i=$((i+1)); f=/root/f$((i%8));',
  'dd if=/dev/urandom of=/run/m bs=64k count=4 2>/dev/null; md5sum < /run/m > /run/s; cp /run/m $f; sync;',
  'md5sum < $f | cmp -s - /run/s || echo file $i >> /run/bad; md5sum < /run/m | cmp -s - /run/s || echo memory $i >> /run/bad;',
  'md5sum < /run/fill | cmp -s - /run/fs || echo fill $i >> /run/bad; echo $i > /run/n; done; };',
].join(' ');

const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(1)} MB`;
const median = (values: readonly number[]) =>
  values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;

suite('what VMs live through', { skip: LONG ? false : 'minutes; in the long run' }, () => {
  const world = new World();
  let server: ServerHandle;

  before(async () => {
    await importSmall(world);
    server = await world.server('--accept-uploads');
    await world.mount(server.url, server);
  });
  after(() => world.dispose());

  const resumeOne = async (id: string) => (await world.json<Vm[]>('vm', 'resume', id))[0]!;

  test(`${CYCLES} suspensions under a writer: no byte of memory or file differs, and each writes what was dirty`, async (t) => {
    await world.json('clone', 'create', 'small:1', '--name', 'kept', '--persistent');
    let vm = await world.json<Vm>('vm', 'run', '--clone', 'kept', '--name', 'writer');
    const nonce = await setNonce(vm);
    await ask(vm.consoleSocket, `${WRITER} W & echo writes-$((6*7))`, /writes-42/, { againMs: 120_000 });
    const written: number[] = [];
    const paused: number[] = [];
    const resumed: number[] = [];
    let bootBytes = 0;
    let count = 0;
    for (let cycle = 0; cycle < CYCLES; cycle++) {
      const dirty = cycle === 0 ? 0 : dirtyMemoryBytes(vm.pid);
      const [suspended] = await world.json<Suspended[]>('vm', 'suspend', 'writer');
      if (cycle === 0) bootBytes = suspended!.memoryWrittenBytes;
      else {
        written.push(suspended!.memoryWrittenBytes);
        // The guest goes on between the two looks.
        const more = suspended!.memoryWrittenBytes - dirty;
        assert.ok(more >= 0 && more < 48 * MIB, `${suspended!.memoryWrittenBytes} written of ${dirty} dirty`);
      }
      paused.push(suspended!.pausedMs);
      vm = await resumeOne('writer');
      resumed.push(vm.timeline.startedMs);
      assert.equal(await nonceOf(vm), nonce);
      const at = await ask(vm.consoleSocket, 'echo "n $(cat /run/n) bad $(cat /run/bad)."', /n \d+ bad .*\./);
      assert.match(at, /bad \.$/, `cycle ${cycle}`);
      const now = Number(/\d+/.exec(at)![0]);
      assert.ok(now >= count, `the writer went back from ${count} to ${now}`);
      count = now;
    }
    t.diagnostic(
      `first suspension ${megabytes(bootBytes)}, later ones ${megabytes(median(written))} (median), paused ${median(paused).toFixed(0)} ms, ` +
        `resumed in ${median(resumed).toFixed(0)} ms (median of ${CYCLES}), ${count} rounds of the writer`,
    );
    assert.ok(count > CYCLES, 'the writer went on between the suspensions');
    await world.json('vm', 'stop', 'writer');
    const { disk } = await world.json<{ disk: string }>('clone', 'show', 'kept');
    const copy = path.join(world.folder, 'copy.raw');
    await world.succeeds('cp', '--sparse=always', disk, copy);
    await world.succeeds('e2fsck', '-f', '-n', copy);
    await world.json('clone', 'rm', 'kept');
  });

  test('forks of a fork, and of a VM that was suspended and resumed, go on where each was', async () => {
    const first = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'first');
    const nonce = await setNonce(first);
    const fill = 'dd if=/dev/urandom of=/run/fill bs=1M count=16 2>/dev/null; echo filled-$((6*7))';
    await ask(first.consoleSocket, fill, /filled-42/);
    await world.json('vm', 'suspend', 'first');
    await resumeOne('first');
    await world.json('vm', 'checkpoint', 'first', '--to', 'warm:1');
    assert.equal(await nonceOf(await world.json<Vm>('vm', 'show', 'first')), nonce);
    await world.json('vm', 'stop', 'first', '--now');

    const fork = await world.json<Vm>('vm', 'run', '--from-checkpoint', 'warm:1', '--name', 'fork');
    assert.equal(await nonceOf(fork), nonce);
    const newer = await setNonce(fork);
    await ask(fork.consoleSocket, 'echo fork > /root/me; sync; echo done-$((6*7))', /done-42/);
    // Its memory is a layer over the first checkpoint's.
    await world.json('vm', 'checkpoint', 'fork', '--to', 'warm:2');
    await world.json('vm', 'stop', 'fork', '--now');
    const children = await world.json<Vm[]>('vm', 'fork', 'warm:2', '--count', '2', '--name', 'child');
    for (const child of children) {
      assert.equal(await nonceOf(child), newer);
      await ask(child.consoleSocket, 'echo "me $(cat /root/me)"', /me fork/);
    }
    await world.json('vm', 'suspend', 'child-1');
    assert.equal(await nonceOf(await resumeOne('child-1')), newer);
    await world.json('vm', 'stop', 'child-1', 'child-2', '--now');
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });

  test('VMs, suspended and running, go on when the proxy is killed, replaced, and killed while one resumes', async () => {
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'runs');
    await world.json('vm', 'run', 'small:1', '--name', 'sleeps');
    const nonce = await setNonce(vm);
    await world.json('vm', 'suspend', 'sleeps');
    for (const how of ['kill -9', 'upgrade']) {
      // Without Machines.adopt the successor knows no VM, and discards the clones of this one.
      if (how === 'upgrade') await world.json('proxy', 'upgrade');
      else await killProxy(world);
      assert.equal(isRunning(vm.pid), true);
      assert.equal(await nonceOf(vm), nonce);
      await ask(vm.consoleSocket, 'echo more > /root/more; sync; echo written-$((6*7))', /written-42/);
      const states = (await world.json<Vm[]>('vm', 'ls')).map(({ id, state }) => `${id} ${state}`);
      assert.deepEqual(states.toSorted(), ['runs running', 'sleeps suspended']);
    }
    // The guest's pages come through the proxy that dies.
    for (const delayMs of [0, 300, 600, 900, 1_200]) {
      await world.json('vm', 'suspend', 'runs');
      world.dropPageCache();
      const resuming = world.run('vm', 'resume', 'runs', '--json');
      await sleep(delayMs);
      await killProxy(world);
      const { code } = await resuming;
      const { state } = await world.json<Vm>('vm', 'show', 'runs');
      assert.ok(state === 'running' || (state === 'suspended' && code !== 0), `${state}, ${code}`);
      const now = state === 'running' ? await world.json<Vm>('vm', 'show', 'runs') : await resumeOne('runs');
      assert.equal(await nonceOf(now), nonce);
      await ask(now.consoleSocket, 'cat /root/more', /^more\r?$/m);
    }
    await world.json('vm', 'stop', 'runs', 'sleeps', '--now');
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });

  test('a tunnel that is cut for a minute is a pause for a resumed guest whose pages are not here', async () => {
    await world.json('umount', world.mountpoint);
    await world.succeeds('rm', '-r', path.join(world.folder, 'cache'));
    await world.mount(server.url, server, '--no-profile');
    const booted = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'booted');
    await setNonce(booted);
    const write = () =>
      ask(booted.consoleSocket, 'date > /root/d; sync; echo written-$((6*7))', /written-42/);
    await write();
    const fork = await world.json<Vm>('vm', 'run', '--from-checkpoint', 'warm:2', '--name', 'fork');
    process.kill(server.pid, 'SIGSTOP');
    const startMs = performance.now();
    let answeredMs = 0;
    try {
      // All of it lies in pages that are not here.
      const wait = ask(fork.consoleSocket, 'md5sum /run/fill', /^[0-9a-f]{32} /m, {
        lateMs: 3 * CUT_MS,
        againMs: 3 * CUT_MS,
      }).then(() => (answeredMs = performance.now() - startMs));
      wait.catch(() => undefined);
      for (let at = 0; performance.now() - startMs < CUT_MS; at++) {
        assert.match(await ask(booted.consoleSocket, `ping ${at}`, new RegExp(`pong ${at}`)), /pong/);
        await write();
        await sleep(2_000);
      }
      process.kill(server.pid, 'SIGCONT');
      await wait;
      assert.ok(answeredMs > CUT_MS, `it answered after ${answeredMs} ms, so nothing of it was missing`);
    } finally {
      process.kill(server.pid, 'SIGCONT');
    }
    assert.equal((await world.json<Vm>('vm', 'show', 'fork')).state, 'running');
    await world.json('vm', 'stop', 'fork', 'booted', '--now');
  });

  test('what is not what was suspended or published is refused or fails with the reason; none boots instead', async () => {
    await world.json<Vm>('vm', 'run', 'small:1', '--name', 'hurt');
    await world.json('vm', 'suspend', 'hurt');
    const file = path.join(world.folder, 'state', 'vms', 'hurt');
    const whole = readFileSync(file);
    const checkpoint = parseCheckpoint(whole, 'it');
    const refuses = async (message: RegExp, changed: Partial<CheckpointFacts>) => {
      await world.json('umount', world.mountpoint);
      writeFileSync(file, encodeCheckpoint({ ...checkpoint, facts: { ...checkpoint.facts, ...changed } }));
      await world.mount(server.url, server);
      await world.refuses(1, message, 'vm', 'resume', 'hurt');
      assert.equal((await world.json<Vm>('vm', 'show', 'hurt')).state, 'suspended');
    };
    const { compatibility, description } = checkpoint.facts;
    await refuses(/base.*wrong-base/, { base: sha256(Buffer.from('another base')) });
    await refuses(/machine type.*vm-failed/, {
      compatibility: { ...compatibility, machine: 'pc-i440fx-99.9' },
    });
    await refuses(/accelerator.*unsupported/, { compatibility: { ...compatibility, accelerator: 'other' } });
    await refuses(/device state.*bad-format/, { description: { ...description, network: 'none' } });
    await refuses(/memory/, { description: { ...description, memoryBytes: 64 * MIB } });
    await world.json('umount', world.mountpoint);
    const damaged = Buffer.from(whole);
    damaged[whole.length - 100]! ^= 1;
    writeFileSync(file, damaged);
    await world.mount(server.url, server);
    await world.refuses(1, /no VM 'hurt' is suspended/, 'vm', 'resume', 'hurt');
    await world.json('umount', world.mountpoint);
    writeFileSync(file, whole);
    await world.mount(server.url, server);
    await resumeOne('hurt');
    await world.json('vm', 'suspend', 'hurt');
    // A guest that answers, but not as the one that was suspended.
    await world.json('umount', world.mountpoint);
    const again = parseCheckpoint(readFileSync(file), 'it');
    assert.match(again.facts.nonce!, /^[0-9a-f]{32}$/);
    writeFileSync(file, encodeCheckpoint({ ...again, facts: { ...again.facts, nonce: '0'.repeat(32) } }));
    await world.mount(server.url, server);
    await world.refuses(1, /not the one that was captured.*vm-failed/, 'vm', 'resume', 'hurt');
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });

  /** Resolves with the VM's reason when it has failed. */
  const failure = async (id: string, withinMs: number) => {
    for (const endMs = performance.now() + withinMs; performance.now() < endMs; await sleep(200)) {
      const vm = (await world.json<Vm[]>('vm', 'ls')).find((one) => one.id === id);
      if (vm?.state === 'failed') return vm.reason!;
    }
    return assert.fail(`${id} has not failed within ${withinMs} ms`);
  };

  test('damaged memory at the origin, and an origin that is gone, end the resumed VM with the reason', async () => {
    const store = await openStore(world.store);
    const tags = await store.listTags();
    const digest = tags.find(({ name, version }) => name === 'warm' && version === '1')!.manifest;
    const { table } = parseManifest(await store.readManifest(digest), digest);
    const chunks = [...ChunkTable.parse(await store.readTable(table), table).entries()];
    await store.close();
    const coldMount = async (...options: string[]) => {
      await world.json('umount', world.mountpoint);
      await world.succeeds('rm', '-r', path.join(world.folder, 'cache'));
      await world.mount(server.url, server, '--no-profile', '--no-read-around', ...options);
    };
    await coldMount('--reconnect-timeout', '5s');
    const orphan = await world.json<Vm>('vm', 'run', '--from-checkpoint', 'warm:1', '--name', 'orphan');
    await server.stop();
    await assert.rejects(
      ask(orphan.consoleSocket, 'md5sum /run/fill', /^[0-9a-f]{32} /m, { lateMs: 60_000 }),
    );
    assert.match(await failure('orphan', 60_000), /a page of its memory image .* cannot be read/);
    await world.refuses(1, /unreachable|tunnel-lost/, 'vm', 'run', '--from-checkpoint', 'warm:2');
    server = await world.server('--accept-uploads');

    await coldMount('--reconnect-timeout', '5s');
    for (const chunk of chunks) {
      const file = path.join(world.store, 'v1', 'chunks', chunk.digest.slice(0, 2), chunk.digest);
      const bytes = readFileSync(file);
      bytes[bytes.length >> 1]! ^= 1;
      writeFileSync(file, bytes);
    }
    const begun = await world.run(
      'vm',
      'run',
      '--from-checkpoint',
      'warm:1',
      '--name',
      'damaged',
      '--no-wait',
    );
    // QEMU itself reads some of it, the guest the rest.
    const why = begun.code === 0 ? await failure('damaged', 60_000) : begun.stderr;
    assert.match(why, /a page of its memory image .* cannot be read/);
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });
});
