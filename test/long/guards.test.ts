/**
 * A crash or fault test is worth something only if it fails without the line that it guards. Here each of these lines
 * is taken out, one at a time, in a copy of the tree, and its test has to fail there; unchanged, it has to pass. Only in
 * the long run: it takes each test's time twice.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';

const ROOT = path.resolve(import.meta.dirname, '..', '..');
const LONG = process.env['GRIDVFS_LONG'] === '1';
/** A test that hangs without its line fails too. */
const STUCK_MS = 90_000;

interface Guard {
  /** What would be lost with it. */
  readonly what: string;
  readonly file: string;
  /** Stands there once. */
  readonly line: string;
  readonly instead?: string;
  readonly test: string;
  /** Of the test's name. */
  readonly name: string;
}

const GUARDS: readonly Guard[] = [
  {
    what: 'cached data reaches the disk before the map names it',
    file: 'cache/commits.ts',
    line: 'await syncData(files.dataFd);',
    test: 'test/cache/crash.test.ts',
    name: 'whose data is gone',
  },
  {
    what: 'the map forgets what is evicted before its space goes',
    file: 'cache/image-disk.ts',
    line: 'victims.map((index) => ({ index, record: 0n })),',
    instead: '[],',
    test: 'test/cache/crash.test.ts',
    name: 'after kill -9 at',
  },
  {
    what: 'and forgets it on the disk too',
    file: 'cache/image-disk.ts',
    line: 'await syncData(mapFd);\n    } catch (error) {\n      // The space',
    instead: '} catch (error) {\n      // The space',
    test: 'test/cache/crash.test.ts',
    name: 'in the middle of evictions',
  },
  {
    what: 'a failed sync takes back what it was for',
    file: 'cache/commits.ts',
    line: 'for (const { index } of [...batch, ...this.#waiting]) this.#context.lost(index);',
    test: 'test/cache/crash.test.ts',
    name: 'when a sync fails',
  },
  {
    what: 'eviction waits for readers',
    file: 'cache/image-file.ts',
    line: 'await this.#context.quiet.quiet();',
    test: 'test/cache/eviction.test.ts',
    name: 'threads that read the file themselves',
  },
  {
    what: 'a full disk is said',
    file: 'cache/image-file.ts',
    line: 'space.failed(error, `cannot write ${this.#disk.folder}/data`);',
    test: 'test/cache/space.test.ts',
    name: 'a full tmpfs makes reads pass through',
  },
  {
    what: 'records that a full disk refused are written later',
    file: 'cache/commits.ts',
    line: 'this.#waiting.push(...batch);',
    test: 'test/cache/space.test.ts',
    name: 'records that a full disk refuses',
  },
  {
    what: 'a disk that has space again is said to be well',
    file: 'cache/space.ts',
    line: 'this.#failure = undefined;',
    test: 'test/cache/space.test.ts',
    name: 'a full tmpfs makes reads pass through',
  },
  {
    what: 'a worker hashes before it shows a byte',
    file: 'src/core/direct-io.ts',
    line: 'if (chunkHash(scratch.subarray(0, lengthBytes)) !== expected) return false;',
    test: 'test/cache/checking.test.ts',
    name: 'of damaged chunks a worker shows no byte',
  },
  {
    what: 'the main thread hashes too',
    file: 'cache/image-disk.ts',
    line: 'return chunkHash(plain) === record ? plain : undefined;',
    instead: 'return plain;',
    test: 'test/cache/damage.test.ts',
    name: 'bits flipped anywhere in data and map',
  },
  {
    what: 'what comes over the wire is checked',
    file: 'src/core/chunk.ts',
    line: ' || sha256(plain) !== ref.digest',
    test: 'test/proxy/chain-faults.test.ts',
    name: 'in (replies|chunk objects)',
  },
  {
    what: 'reads that were cut off are asked again',
    file: 'proxy/remote-source.ts',
    line: "if (reason.blame === 'tunnel') {\n      this.#requeue(batch);",
    instead: "if (reason.blame === 'tunnel') {",
    test: 'test/proxy/chain-faults.test.ts',
    name: 'is a pause, not an error',
  },
  {
    what: 'an endpoint that was killed is connected to again',
    file: 'proxy/remote-source.ts',
    line: 'void this.#recover();',
    test: 'test/proxy/faults.test.ts',
    name: 'an endpoint killed in the middle of batches',
  },
  {
    what: 'what was given up is not tried on',
    file: 'proxy/remote-source.ts',
    line: 'if (this.#waiters.size === 0) this.#fetches.length = this.#demand.length = this.#bulk.length = 0;',
    test: 'test/proxy/faults.test.ts',
    name: 'a link that stays cut',
  },
  {
    what: 'another source is asked',
    file: 'proxy/failover.ts',
    line: 'if (signal?.aborted || !worthAnother(error)) throw error;',
    instead: 'throw error;',
    test: 'test/proxy/chain-faults.test.ts',
    name: 'the first of two sources dies',
  },
  {
    what: 'a source that is down is looked for',
    file: 'proxy/failover.ts',
    line: "this.#onEvent({ type: 'lost', message: `${member.name} is left out: ${error.message}` });\n    this.#probe(member);",
    test: 'test/proxy/failover.test.ts',
    name: 'the first is asked again',
  },
  {
    what: 'a source that lies is put aside',
    file: 'proxy/failover.ts',
    line: 'this.#putAside(member, `chunk ${ref.digest.slice(0, 12)}`);',
    test: 'test/proxy/failover.test.ts',
    name: 'one that sends wrong bytes is put aside',
  },
  {
    what: 'every ssh key can be read',
    file: 'proxy/ssh-key.ts',
    line: 'if (isWhole(keys.private) && isWhole(keys.public)) return keys;',
    instead: 'return keys;',
    test: 'test/proxy/keys.test.ts',
    name: 'every key that is made',
  },
  {
    what: 'a collection waits for what imports found',
    file: 'src/store/gc.ts',
    line: 'if (!dryRun) writeFileSync(this.#store.layout.swept, randomUUID());',
    test: 'test/store/gc.test.ts',
    name: 'an import that found chunks',
  },
  {
    what: 'and for what they stored',
    file: 'src/store/gc.ts',
    line: 'Math.min(this.#graceSinceMs, tendWriters(this.#store.layout, !dryRun))',
    instead: 'this.#graceSinceMs',
    test: 'test/store/gc.test.ts',
    name: 'however long the import stands still',
  },
  {
    what: 'an import that was killed goes on',
    file: 'src/store/import.ts',
    line: 'if (this.#isBatchFull()) this.#startFlush();',
    test: 'test/store/resume.test.ts',
    name: 'an import killed',
  },
  {
    what: 'flushed blocks are on the disk',
    file: 'src/image/layer.ts',
    line: 'await fdatasyncAsync(this.#files.dataFd);',
    test: 'test/image/power-loss.test.ts',
    name: 'power loss leaves each block',
  },
  {
    what: 'and the map that names them',
    file: 'src/image/layer.ts',
    line: 'await fdatasyncAsync(this.#files.durableFd);',
    test: 'test/image/power-loss.test.ts',
    name: 'power loss leaves each block',
  },
  {
    what: 'a trimmed block is not published by a write',
    file: 'src/core/direct-io.ts',
    line: 'if (this.#claims[i] === 1) Atomics.store(this.#blockStates!, first + i, BLOCK_DATA);',
    instead: 'Atomics.store(this.#blockStates!, first + i, BLOCK_DATA);',
    test: 'test/core/direct-io.test.ts',
    name: 'is not published by that write',
  },
];

describe('without its line a test fails', { skip: !LONG }, () => {
  let copy = '';

  before(() => {
    copy = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-guards-'));
    for (const name of [
      'src',
      'proxy',
      'cache',
      'bench',
      'test',
      'package.json',
      'tsconfig.json',
      'README.md',
    ])
      cpSync(path.join(ROOT, name), path.join(copy, name), { recursive: true });
    symlinkSync(path.join(ROOT, 'node_modules'), path.join(copy, 'node_modules'));
  });
  after(() => rmSync(copy, { recursive: true, force: true }));

  /** Runs one test in the copy; what it printed, and whether it passed. */
  async function run(file: string, name: string): Promise<{ passed: boolean; said: string }> {
    const { GRIDVFS_LONG: _, NODE_TEST_CONTEXT: __, ...env } = process.env;
    const args = ['--test', `--test-name-pattern=${name}`, '--test-reporter=tap', file];
    const child = spawn(process.execPath, args, {
      cwd: copy,
      env,
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let said = '';
    for (const stream of [child.stdout, child.stderr])
      stream.on('data', (part: Buffer) => (said = (said + part.toString('utf8')).slice(-20_000)));
    const stuck = setTimeout(() => process.kill(-child.pid!, 'SIGKILL'), STUCK_MS);
    const code = await new Promise<number | null>((resolve) => child.once('close', resolve));
    clearTimeout(stuck);
    // A pattern that meets no test would pass, too.
    const tests = Number(/^# pass (\d+)$/m.exec(said)?.[1] ?? 0);
    return { passed: code === 0 && tests > 0 && !/^ok .*# SKIP needs/m.test(said), said };
  }

  const unchanged = new Map<string, Promise<{ passed: boolean; said: string }>>();

  for (const guard of GUARDS) {
    test(`${guard.what} (${guard.file})`, async () => {
      const place = path.join(copy, guard.file);
      const text = readFileSync(place, 'utf8');
      assert.equal(text.split(guard.line).length, 2, `${guard.file} has it once: ${guard.line}`);
      const key = `${guard.test} ${guard.name}`;
      if (!unchanged.has(key)) unchanged.set(key, run(guard.test, guard.name));
      const before = await unchanged.get(key)!;
      assert.ok(before.passed, `unchanged, it does not pass: ${before.said}`);
      try {
        writeFileSync(
          place,
          text.replace(guard.line, () => guard.instead ?? ''),
        );
        const { passed } = await run(guard.test, guard.name);
        assert.equal(passed, false, `${guard.test} passes without: ${guard.line}`);
      } finally {
        writeFileSync(place, text);
      }
    });
  }
});
