/** The proxy dies or is replaced under load: programs on the mount see a pause, no error and no wrong byte. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { isRunning, mount, unmount } from '../../src/core/linux.ts';
import { MIB } from '../../src/core/limits.ts';
import { World } from './world.ts';
import type { ProxyHandle } from './world.ts';

const LOAD = path.join(import.meta.dirname, 'load.ts');

/** No machine is so slow. */
const STUCK_MS = 180_000;

const LONG_MS = 60_000;
const LONG_PAUSE_MS = 5_000;
/** On a machine that others use too. */
const TIMES_MIN = 5;

/** A program of load.ts that works on the mount. */
class Load {
  readonly #child;
  #dots = 0;
  #said = '';
  #last = '';
  #ended = false;

  constructor(world: World, ...args: string[]) {
    this.#child = spawn(process.execPath, [LOAD, ...args], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: world.environment,
    });
    this.#child.stdout.on('data', (part: Buffer) => {
      this.#dots += part.length;
      this.#last = part.toString('latin1');
    });
    this.#child.stderr.on('data', (part: Buffer) => (this.#said += part.toString('utf8')));
    this.#child.once('exit', () => (this.#ended = true));
  }

  /** Resolves when it has done something from now on; what it is waiting in now does not count. */
  async goesOn(): Promise<void> {
    const endMs = performance.now() + STUCK_MS;
    for (const aimed = this.#dots + 3; this.#dots < aimed; await sleep(5)) {
      assert.ok(performance.now() < endMs, 'it waits for ever');
      assert.equal(this.#ended, false, `it ended: ${this.#said}`);
    }
  }

  /** Has it compare everything and end; what it said last. */
  async finish(): Promise<string> {
    const closed = once(this.#child, 'close');
    this.#child.stdin.end();
    const [code] = (await closed) as [number | null];
    assert.equal(code, 0, this.#said);
    return this.#last.trim();
  }

  kill(): void {
    this.#child.kill('SIGKILL');
  }
}

suite('a proxy that dies under load', () => {
  const world = new World();
  const raw = path.join(world.folder, 'disk.raw');
  const other = path.join(world.folder, 'other.raw');
  const whole = path.join(world.mountpoint, 'images', 'whole', '1', 'disk.raw');
  const served = path.join(world.mountpoint, 'images', 'served', '1', 'disk.raw');
  /** Of fusectl: a folder for each connection. */
  const connections = path.join(world.folder, 'connections');
  const loads: Load[] = [];
  const load = (...args: string[]) => {
    const started = new Load(world, ...args);
    loads.push(started);
    return started;
  };
  interface Status extends ProxyHandle {
    mount: { passthroughOpens: number };
  }
  const status = () => world.json<Status>('proxy', 'status');

  /** What the kernel waits for, as it says itself. */
  const inFlight = () => {
    const device = world
      .mountsLeft()
      .find((line) => line.includes('fuse.gridvfs'))!
      .split(' ')[2]!;
    return Number(readFileSync(path.join(connections, device.split(':')[1]!, 'waiting'), 'utf8'));
  };

  before(async () => {
    mkdirSync(connections);
    mount('none', connections, 'fusectl', 0, '');
    writeFileSync(raw, randomBytes(16 * MIB));
    writeFileSync(other, randomBytes(16 * MIB));
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json('store', 'import', world.store, raw, 'whole:1');
    await world.json('store', 'import', world.store, other, 'served:1');
  });
  after(async () => {
    for (const each of loads) each.kill();
    unmount(connections, 0);
    await world.dispose();
  });

  // Meant for `askAgain` in mount.ts: without it whoever waited would wait for ever.
  test('kill -9 is a pause for readers of all kinds and for a writer, also where a tag has moved', async (t) => {
    await world.mount(world.store);
    // Read once, so all of it is here; and opened again then, so the kernel reads it by itself.
    await world.succeeds('cmp', raw, whole);
    const passing = load('read', whole, raw);
    const reading = load('direct', served, other);
    const { disk } = await world.json<{ disk: string }>('clone', 'create', 'whole:1', '--name', 'work');
    const writing = load('write', disk);
    for (const each of loads) await each.goesOn();
    const passthroughOpens = (await status()).mount.passthroughOpens;
    t.diagnostic(`opens by passthrough: ${passthroughOpens}`);
    let waited = 0;
    for (let round = 0; round < 2; round++) {
      if (round === 1) await world.json('store', 'import', world.store, raw, 'served:1', '--replace');
      const { pid } = await status();
      process.kill(pid, 'SIGKILL');
      while (isRunning(pid)) await sleep(5);
      if (inFlight() > 0) waited++;
      for (const each of [reading, writing, passing]) await each.goesOn();
      assert.notEqual((await status()).pid, pid);
      await world.succeeds('cmp', raw, whole);
    }
    assert.ok(waited > 0, 'something waited for the proxy when it was killed');
    for (const each of loads) await each.finish();
    await world.json('clone', 'rm', 'work');
    await world.json('umount', world.mountpoint);
  });

  const isLong = process.env['GRIDVFS_LONG'] === '1';
  for (const [what, direct, way] of [
    ['kill -9', 0, 'kill'],
    ['kill -9, past the page cache', 1, 'kill'],
    ['proxy upgrade', 0, 'upgrade'],
    ['proxy upgrade, past the page cache', 1, 'upgrade'],
  ] as const) {
    test(`a minute of verified random writes to a clone under ${what}`, { skip: !isLong }, async (t) => {
      const name = `fio-${way}-${direct}`;
      await world.mount(world.store);
      // The next test mounts too, whatever becomes of this one.
      t.after(() => world.run('umount', world.mountpoint, '--force'));
      const { disk } = await world.json<{ disk: string }>('clone', 'create', 'whole:1', '--name', name);
      // Open before every kill and opened again after it, both read by the kernel itself.
      await world.succeeds('cmp', raw, whole);
      const passing = load('read', whole, raw);
      await passing.goesOn();
      assert.ok((await status()).mount.passthroughOpens > 0, 'no passthrough');
      const fio = world.program(
        'fio',
        ...['--name=verify', `--filename=${disk}`, '--rw=randwrite', '--bs=4k', '--ioengine=psync'],
        ...[
          '--numjobs=4',
          '--offset_increment=4M',
          '--io_size=4M',
          '--size=4M',
          `--direct=${direct}`,
          '--thread',
        ],
        ...['--verify=crc32c', '--verify_backlog=64', '--loops=100000', `--runtime=${LONG_MS / 1000}`],
        ...['--time_based', '--allow_file_create=0', '--verify_state_save=0'],
      );
      let dueMs = performance.now();
      const isOver = () => {
        dueMs += LONG_PAUSE_MS;
        return Promise.race([fio.then(() => true), sleep(Math.max(0, dueMs - performance.now()), false)]);
      };
      let [times, waited] = [0, 0];
      while (!(await isOver())) {
        if (way === 'upgrade') await world.json('proxy', 'upgrade');
        else {
          const { pid } = await status();
          // Stopped wherever it is, and killed when somebody waits for it: a kill while fio only compares would
          // show nothing.
          process.kill(pid, 'SIGSTOP');
          const endMs = performance.now() + LONG_PAUSE_MS;
          while (inFlight() === 0 && performance.now() < endMs) await nextTurn();
          // Nobody in seconds: fio is about to end.
          if (inFlight() === 0) {
            process.kill(pid, 'SIGCONT');
            break;
          }
          process.kill(pid, 'SIGKILL');
          while (isRunning(pid)) await sleep(1);
          if (inFlight() > 0) waited++;
        }
        times++;
        await world.succeeds('cmp', raw, whole);
        await passing.goesOn();
      }
      assert.ok((await status()).mount.passthroughOpens > 0, 'the last proxy opened by passthrough too');
      await passing.finish();
      const { code, stdout, stderr } = await fio;
      t.diagnostic(`${times} times, ${waited} of them with requests in flight`);
      assert.equal(code, 0, stderr + stdout);
      assert.ok(times >= TIMES_MIN, `${times} times only`);
      if (way === 'kill') assert.ok(waited >= 0.9 * times, `${waited} of ${times} kills met a request`);
      await world.json('clone', 'rm', name);
      await world.json('umount', world.mountpoint);
    });
  }

  test('an upgrade gives the mount to a new process, and readers see no error', async (t) => {
    await world.mount(world.store);
    const reading = load('read', whole, raw);
    const { disk } = await world.json<{ disk: string }>('clone', 'create', 'whole:1', '--name', 'up');
    const writing = load('write', disk);
    for (const each of [reading, writing]) await each.goesOn();
    const first = await world.json<{ from: number; to: number }>('proxy', 'upgrade');
    const { pid } = await status();
    assert.equal(pid, first.to);
    assert.equal(isRunning(first.from), false);
    for (const each of [reading, writing]) await each.goesOn();
    await reading.finish();
    t.diagnostic(`of a reader and writer of a clone: ${await writing.finish()}`);
    await world.json('clone', 'rm', 'up');
    await world.json('umount', world.mountpoint);
  });
});
