/** A checkpoint is resumed once when it is published, so that no other host is the first: through the real command. */
import assert from 'node:assert/strict';
import { globSync, readFileSync, rmSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { isRunning } from '../../src/core/linux.ts';
import { importSmall, killProxy, nonceOf, setNonce } from './vm-world.ts';
import type { Vm } from './vm-world.ts';
import { World } from './world.ts';
import type { CacheView, ServerHandle } from './world.ts';

interface Published {
  readonly digest: string;
  readonly rehearsal?: { readonly chunks?: number; readonly reason?: string };
}
suite('rehearsals', () => {
  const world = new World();
  let server: ServerHandle;
  let nonce = '';

  before(async () => {
    await importSmall(world);
    server = await world.server('--accept-uploads');
    await world.mount(server.url, server);
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'one');
    nonce = await setNonce(vm);
  });
  after(() => world.dispose());

  const publish = (...options: string[]) =>
    world.json<Published>('vm', 'checkpoint', 'one', '--to', 'warm:1', ...options);
  /** Whether the origin has a profile of resumes of that memory. (It may have one of the disk of the VM itself, which goes
   * on when it has been published.) */
  const isKnown = ({ digest }: Published) =>
    globSync(path.join(world.store, 'v1', 'profiles', '*', digest, 'resume.json')).length > 0;

  /** The rehearsal that runs now. */
  async function running(): Promise<Vm> {
    for (const endMs = performance.now() + 60_000; performance.now() < endMs; await sleep(10)) {
      const vm = (await world.json<Vm[]>('vm', 'ls')).find(({ id }) => id.startsWith('rehearsal-'));
      if (vm?.pid !== undefined) return vm;
    }
    return assert.fail('there is no rehearsal');
  }

  // Fails without `check` in checkpoints.ts: the name would be the checkpoint's, and its guest another process.
  test('the name of a disk is not given to a checkpoint, and nothing is done to the VM', async () => {
    const [before] = await world.json<Vm[]>('vm', 'ls');
    const taken = /small:1 is the name of an image of kind 'disk'/;
    await world.refuses(1, taken, 'vm', 'checkpoint', 'one', '--to', 'small:1');
    await world.refuses(2, /--memory and --vcpus/, 'vm', 'checkpoint', 'one', '--to', 'x:1', '--vcpus', '2');
    await world.refuses(1, /there is no VM 'nobody'/, 'vm', 'checkpoint', 'nobody', '--to', 'x:1');
    await world.refuses(2, /name must be up to \d+ lower-case/, 'vm', 'run', 'small:1', '--name', 'A/b');
    const key = ['--ssh-key', world.identity];
    await world.refuses(2, /other lines than public keys/, 'vm', 'run', 'small:1', ...key);
    const [after] = await world.json<Vm[]>('vm', 'ls');
    assert.equal(after!.pid, before!.pid);
  });

  test('where it is not wanted nothing is resumed, and nothing known', async () => {
    const published = await publish('--no-rehearsal');
    assert.equal(published.rehearsal, undefined);
    assert.equal(isKnown(published), false);
  });

  // Without the rule in `adopt` of machines.ts the successor goes on with it for ever.
  test('its networks lead nowhere, and it ends with the proxy that began it', async () => {
    const publishing = publish();
    const rehearsal = await running();
    const words = readFileSync(`/proc/${rehearsal.pid}/cmdline`, 'utf8').split('\0');
    assert.ok(words.includes('user,id=net0,restrict=on'), words.join(' '));
    await killProxy(world);
    const published = await publishing;
    assert.match(published.rehearsal!.reason!, /./);
    for (let left = 100; isRunning(rehearsal.pid) && left > 0; left--) await sleep(50);
    assert.equal(isRunning(rehearsal.pid), false);
    const vms = await world.json<Vm[]>('vm', 'ls');
    assert.deepEqual(
      vms.map(({ id }) => id),
      ['one'],
    );
    assert.equal((await world.json<unknown[]>('clone', 'ls')).length, 2, 'disk and memory of its origin');
    assert.equal(isKnown(published), false);
  });

  test('another host’s first fork finds ahead of it what its guest touches', async () => {
    const published = await publish();
    assert.ok(published.rehearsal!.chunks! > 0, JSON.stringify(published));
    assert.equal(isKnown(published), true);
    const [origin, ...others] = await world.json<Vm[]>('vm', 'ls');
    assert.equal(others.length, 0);
    assert.equal(await nonceOf(origin!), nonce);
    await world.json('vm', 'stop', 'one', '--now');
    await world.json('umount', world.mountpoint);

    rmSync(path.join(world.folder, 'cache'), { recursive: true });
    await world.mount(server.url, server);
    const [fork] = await world.json<Vm[]>('vm', 'fork', 'warm:1', '--name', 'first');
    assert.equal(await nonceOf(fork!), nonce);
    const { images } = await world.json<CacheView>('cache', 'status');
    const memory = images.find(({ names }) => names.includes('warm:1'))!;
    assert.ok(memory.prefetchedChunks >= 0.9 * memory.touchedChunks, JSON.stringify(memory));
    assert.ok(memory.missedChunks <= 0.1 * memory.touchedChunks, JSON.stringify(memory));
    await world.json('vm', 'stop', fork!.id, '--now');
    await world.json('umount', world.mountpoint);
  });

  test('a proxy that records no starts says so, and has published all the same', async () => {
    await world.mount(server.url, server, '--no-profile');
    await world.json('vm', 'run', 'small:1', '--name', 'one');
    const outcome = await world.run('vm', 'checkpoint', 'one', '--to', 'warm:2');
    assert.equal(outcome.code, 0);
    assert.match(outcome.stdout, /^warm:2 is [0-9a-f]{64}\n.*\nnot rehearsed: .*--no-profile/);
    await world.json('vm', 'stop', 'one', '--now');
    await world.json('umount', world.mountpoint);
  });

  test('where no uploads are taken, the VM is not held up for one', async () => {
    const closed = await world.server();
    await world.mount(closed.url, closed);
    const { pid } = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'two');
    await world.refuses(1, /takes no uploads/, 'vm', 'checkpoint', 'two', '--to', 'two:1');
    assert.equal((await world.json<Vm>('vm', 'show', 'two')).pid, pid);
    await world.json('vm', 'stop', 'two', '--now');
  });
});
