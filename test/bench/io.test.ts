/** Traces, their replay, and `gridvfs bench io` as a user runs it over the small guest. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, suite, test } from 'node:test';
import fc from 'fast-check';
import { replayOnce } from '../../bench/io-scene.ts';
import type { Scene } from '../../bench/io-scene.ts';
import { startProgram } from '../../bench/peers/program.ts';
import {
  chunksTouched,
  DEPTH_MAX,
  encodeTrace,
  parseTrace,
  SECTOR_BYTES,
  summaryOf,
} from '../../bench/traces/format.ts';
import type { Boot, Trace } from '../../bench/traces/format.ts';
import { readsOfLog } from '../../bench/traces/nbdkit-log.ts';
import { piecesOf, replay } from '../../bench/traces/replay.ts';
import { sha256 } from '../../src/core/bytes.ts';
import { GridError } from '../../src/core/errors.ts';
import { World } from '../scenarios/world.ts';

const isLong = process.env['GRIDVFS_LONG'] === '1';

const SIZE_SECTORS = 1000;
const IDENTITY = { hostname: 'a', macAddress: '52:54:00:00:00:01', machineId: 'm', accelerator: 'tcg' };
const READ = fc
  .tuple(
    fc.integer({ min: 0, max: SIZE_SECTORS - 1 }),
    fc.integer({ min: 1, max: 64 }),
    fc.integer({ min: 1, max: 8 }),
  )
  .map(([first, sectors, depth]) => ({
    offsetBytes: first * SECTOR_BYTES,
    lengthBytes: Math.min(sectors, SIZE_SECTORS - first) * SECTOR_BYTES,
    depth,
  }));
const BOOT = fc.array(READ, { maxLength: 20 }).map((reads): Boot => ({ identity: IDENTITY, reads }));
const TRACE = fc.array(BOOT, { minLength: 1, maxLength: 3 }).map((boots): Trace => ({
  guest: 'g',
  disk: 'ab'.repeat(32),
  sizeBytes: SIZE_SECTORS * SECTOR_BYTES,
  latencyMs: 30,
  qemu: 'q',
  boots,
}));

suite('traces', () => {
  test('what is encoded is parsed to the same', () => {
    fc.assert(fc.property(TRACE, (trace) => assert.deepEqual(parseTrace(encodeTrace(trace)), trace)));
  });

  test('a damaged trace is refused with a line number, or is another valid trace; nothing else is thrown', () => {
    const damage = fc.tuple(
      TRACE,
      fc.nat(),
      fc.constantFrom('', '\n', ' ', '0', '9', '-', '{', 'boot '),
      fc.nat(4),
    );
    fc.assert(
      fc.property(damage, ([trace, at, text, removed]) => {
        const whole = encodeTrace(trace);
        const from = at % whole.length;
        try {
          const parsed = parseTrace(whole.slice(0, from) + text + whole.slice(from + removed));
          for (const { reads } of parsed.boots)
            for (const { offsetBytes, lengthBytes, depth } of reads)
              assert.ok(offsetBytes + lengthBytes <= parsed.sizeBytes && depth >= 1 && depth <= DEPTH_MAX);
        } catch (error) {
          assert.ok(error instanceof GridError, String(error));
          if (error.code === 'bad-format') assert.match(error.message, /^trace, line \d+: /);
        }
      }),
      { numRuns: 500 },
    );
  });

  test('the log of nbdkit gives reads in order with their depth, without those of what was just written', () => {
    const line = (text: string) => `2026-01-01 00:00:00.000000 connection=1 ${text}\n`;
    const log =
      line('Connect export="" tls=0 size=0x80000000 write=1') +
      line('Read id=1 offset=0x1000 count=0x2000 ...') +
      line('Read id=2 offset=0x8000 count=0x1000 ...') +
      line('...Read id=1 return=0') +
      line('Write id=3 offset=0x10000 count=0x2000 fua=0 ...') +
      line('Read id=4 offset=0x10000 count=0x2000 ...') +
      line('Read id=5 offset=0x11000 count=0x2000 ...') +
      line('...Read id=2 return=0') +
      line('...Read id=5 return=0') +
      line('Read id=6 offset=0x0 count=0x200 ...');
    assert.deepEqual(
      readsOfLog(log).map(({ offsetBytes, lengthBytes, depth }) => [offsetBytes, lengthBytes, depth]),
      [
        [0x1000, 0x2000, 1],
        [0x8000, 0x1000, 2],
        [0x11000, 0x2000, 2],
        [0, 0x200, 1],
      ],
    );
  });

  test('the trace that ships is small, and of two boots that touch much the same', () => {
    const file = path.resolve(import.meta.dirname, '../../bench/traces/debian-boot.trace');
    assert.ok(statSync(file).size <= 100_000);
    const { boots } = parseTrace(readFileSync(file, 'utf8'));
    assert.equal(boots.length, 2);
    for (const name of ['hostname', 'macAddress', 'machineId'] as const)
      assert.notEqual(boots[0]!.identity[name], boots[1]!.identity[name]);
    assert.ok(boots.every((boot) => summaryOf(boot).reads > 500 && summaryOf(boot).depthMax > 1));
    const profile = new Set(chunksTouched(boots[0]!, 256 * 1024));
    const touched = chunksTouched(boots[1]!, 256 * 1024);
    assert.ok(touched.filter((index) => profile.has(index)).length > touched.length * 0.9);
  });
});

suite('a replay', () => {
  test('keeps the order, fills each recorded depth and never goes over it', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(READ, { minLength: 1, maxLength: 40 }),
        fc.infiniteStream(fc.nat(3)),
        async (reads, turns) => {
          const order: number[] = [];
          let underWay = 0;
          const deepest = await replay(reads, async (index) => {
            order.push(index);
            underWay++;
            assert.ok(
              underWay <= reads[index]!.depth,
              `${underWay} under way at depth ${reads[index]!.depth}`,
            );
            for (let turn = turns.next().value as number; turn >= 0; turn--) await new Promise(setImmediate);
            underWay--;
          });
          assert.deepEqual(order, [...reads.keys()]);
          assert.equal(underWay, 0);
          assert.ok(deepest <= Math.max(...reads.map(({ depth }) => depth)));
        },
      ),
      { numRuns: 50 },
    );
    const four = Array.from({ length: 8 }, () => ({ offsetBytes: 0, lengthBytes: 1, depth: 4 }));
    assert.equal(await replay(four, () => new Promise((resolve) => setImmediate(resolve))), 4);
  });

  test('ends with the first failure, after what was under way', async () => {
    const reads = Array.from({ length: 6 }, () => ({ offsetBytes: 0, lengthBytes: 1, depth: 2 }));
    const begun: number[] = [];
    let ended = 0;
    const replaying = replay(reads, async (index) => {
      begun.push(index);
      await new Promise(setImmediate);
      ended++;
      if (index === 1) throw new Error('broken');
    });
    await assert.rejects(replaying, /broken/);
    assert.ok(begun.length < 6 && ended === begun.length);
  });

  suite('of a file and of an NBD server', () => {
    const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-replay-'));
    after(() => rmSync(folder, { recursive: true, force: true }));
    const disk = path.join(folder, 'disk.raw');
    const content = Buffer.from(
      Array.from({ length: SIZE_SECTORS * SECTOR_BYTES }, (_, at) => (at * 7919) >> 5),
    );
    writeFileSync(disk, content);
    const boot: Boot = {
      identity: IDENTITY,
      reads: [
        [0, 8, 1],
        [100, 200, 1],
        [8, 1, 2],
        [900, 100, 3],
        [0, 8, 1],
      ].map(([first, sectors, depth]) => ({
        offsetBytes: first! * SECTOR_BYTES,
        lengthBytes: sectors! * SECTOR_BYTES,
        depth: depth!,
      })),
    };
    const traceFile = path.join(folder, 'trace');
    const head = { guest: 'g', disk: sha256(content), sizeBytes: content.length, latencyMs: 0, qemu: 'q' };
    writeFileSync(traceFile, encodeTrace({ ...head, boots: [{ identity: IDENTITY, reads: [] }, boot] }));
    const memory = Buffer.alloc(summaryOf(boot).bytes);
    for (const [index, piece] of piecesOf(boot, memory).entries())
      content.copy(piece, 0, boot.reads[index]!.offsetBytes);
    const { signal } = new AbortController();
    const scene = { folder, traceFile, expected: sha256(memory), signal } as unknown as Scene;

    test('gives the bytes of a file, and a single wrong one is noticed', async () => {
      const { seconds } = await replayOnce(scene, { file: disk });
      assert.ok(seconds > 0);
      const damaged = Buffer.from(content);
      damaged[150 * SECTOR_BYTES]! ^= 1;
      const other = path.join(folder, 'damaged.raw');
      writeFileSync(other, damaged);
      await assert.rejects(
        replayOnce(scene, { file: other }),
        (error) => (error as GridError).code === 'corrupt',
      );
    });

    test('says why it could not read', async () => {
      await assert.rejects(replayOnce(scene, { file: path.join(folder, 'none') }), /ENOENT/);
      await assert.rejects(replayOnce(scene, { nbd: path.join(folder, 'none') }), /libnbd: cannot connect/);
    });

    test('gives the same through NBD with reads under way at once', async () => {
      const socket = path.join(folder, 'nbd.sock');
      const command = ['nbdkit', '--foreground', '--readonly', '--unix', socket, 'file', disk];
      const server = await startProgram({ command, isReady: () => readdirSync(folder).includes('nbd.sock') });
      try {
        await replayOnce(scene, { nbd: socket });
      } finally {
        await server.stop();
      }
    });
  });
});

suite('gridvfs bench io', () => {
  const world = new World();
  const main = path.resolve(import.meta.dirname, '../../src/main.ts');
  const environment = { ...process.env, TMPDIR: world.folder };
  const bench = (...args: string[]) => ['bench', 'io', '--guest', 'small', '--link', '4ms,200mbit', ...args];
  const leftFolders = () => readdirSync(world.folder).filter((name) => name.startsWith('gridvfs-'));
  const nothingLeft = () => {
    assert.deepEqual(leftFolders(), []);
    assert.deepEqual(world.mountsLeft(), []);
    assert.deepEqual(world.processesLeft(), []);
  };
  after(() => world.dispose());

  test('has a row for each subject and peer with its command line, and leaves nothing', async () => {
    const file = path.join(world.folder, 'rows.json');
    const child = spawn(process.execPath, [main, ...bench('--runs', '1', '--no-profile', '--json', file)], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: environment,
    });
    let said = '';
    child.stdout.on('data', (part: Buffer) => (said += part.toString('utf8')));
    child.stderr.on('data', (part: Buffer) => (said += part.toString('utf8')));
    assert.equal(await new Promise((resolve) => child.once('close', resolve)), 0, said);
    const { rows, touched } = JSON.parse(readFileSync(file, 'utf8')) as {
      rows: { subject: string; value: number; linkBytes?: number; commands?: string[]; version?: string }[];
      touched: { storedBytes: number };
    };
    const of = (subject: string) => rows.find((row) => row.subject === subject)!;
    const peers = ['nbdkit', 'rclone', 'scp', 'sshfs', 'zstd|ssh'];
    const own = ['grid-cold', 'grid-restart', 'grid-warm', 'limit', 'local'];
    assert.deepEqual(rows.map((row) => row.subject).toSorted(), [...own, ...peers].toSorted());
    for (const name of peers) {
      const { commands, version, linkBytes } = of(name);
      assert.ok(commands!.length > 0 && version!.length > 0 && linkBytes! > 0, JSON.stringify(of(name)));
      for (const command of commands!) assert.ok(said.includes(command), 'the command line was printed');
    }
    assert.ok(of('grid-cold').linkBytes! >= touched.storedBytes);
    // Nobody who has nothing of the image yet can be faster than the link.
    for (const subject of ['grid-cold', ...peers]) assert.ok(of(subject).value > of('limit').value, subject);
    nothingLeft();
  });

  test(
    'Ctrl-C while a peer is mounted leaves nothing running, mounted or on the disk',
    { skip: !isLong && 'a long test' },
    async () => {
      const child = spawn(
        process.execPath,
        [main, ...bench('--runs', '1', '--no-profile', '--peers', 'sshfs')],
        {
          stdio: ['ignore', 'ignore', 'pipe'],
          env: environment,
          detached: true,
        },
      );
      let said = '';
      child.stderr.on('data', (part: Buffer) => (said += part.toString('utf8')));
      const ended = new Promise<number | null>((resolve) => child.once('close', resolve));
      while (!world.mountsLeft().some((line) => line.includes('fuse.sshfs'))) {
        assert.equal(child.exitCode, null, said);
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      process.kill(-child.pid!, 'SIGINT');
      assert.notEqual(await ended, 0, said);
      nothingLeft();
    },
  );

  test('a peer that is not installed fails the bench before anything starts, and names its package', async () => {
    const outcome = await new Promise<{ code: number | null; said: string }>((resolve) => {
      const child = spawn(process.execPath, [main, ...bench('--peers', 'rclone')], {
        stdio: ['ignore', 'ignore', 'pipe'],
        env: { ...environment, PATH: path.join(world.folder, 'no-programs') },
      });
      let said = '';
      child.stderr.on('data', (part: Buffer) => (said += part.toString('utf8')));
      child.once('close', (code) => resolve({ code, said }));
    });
    assert.equal(outcome.code, 1);
    assert.match(outcome.said, /^gridvfs bench io: not installed: .*rclone.*--install/);
    nothingLeft();
  });

  test('refuses nonsense with a line that says what to write', async () => {
    await world.refuses(2, /write RTT,RATE/, 'bench', 'io', '--link', '30ms');
    await world.refuses(2, /there are all, none, sshfs/, 'bench', 'io', '--peers', 'nfs');
    await world.refuses(2, /write boot or fuse/, 'bench', 'io', '--case', 'net');
  });
});
