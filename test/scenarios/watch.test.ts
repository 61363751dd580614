/** What an operator sees of a mount at work: `proxy status --watch`, and the times of requests on /metrics. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, suite, test } from 'node:test';
import type { Watched } from '../../src/cli/watch.ts';
import { MIB } from '../../src/core/limits.ts';
import { World } from './world.ts';

const BYTES = 8 * MIB;
/** Far more than an overloaded machine needs to copy so little. */
const LINES_MAX = 200;

suite('a mount that is watched', () => {
  const world = new World();
  const raw = path.join(world.folder, 'image.raw');
  const image = path.join(world.mountpoint, 'images', 'test', '1', 'disk.raw');
  const clone = path.join(world.mountpoint, 'clones', 'work', 'disk.raw');
  let runtime = '';

  before(async () => {
    writeFileSync(raw, randomBytes(BYTES));
    await world.succeeds(process.execPath, path.resolve('src/main.ts'), 'store', 'init', world.store);
    await world.json('store', 'import', world.store, raw, 'test:1');
    ({ runtime } = await world.mount(world.store));
    await world.json('clone', 'create', 'test:1', '--name', 'work', '--persistent');
  });
  after(() => world.dispose());

  test('every request of an interval is in its line, by image and clone', async () => {
    const child = spawn(
      process.execPath,
      ['src/main.ts', 'proxy', 'status', '--watch', '--interval', '200ms', '--json'],
      { env: world.environment, stdio: ['ignore', 'pipe', 'inherit'] },
    );
    const ended = once(child, 'exit');
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const next = async () => JSON.parse(((await lines.next()) as { value: string }).value) as Watched;
    await next();
    // Holds the clone open until its standard input ends: the figures of a clone end with its last close.
    const writer = spawn(
      'sh',
      [
        '-c',
        'exec 3<>"$1" && dd if="$0" of="$1" bs=1M conv=notrunc,fsync status=none && read end',
        raw,
        clone,
      ],
      { stdio: ['pipe', 'inherit', 'inherit'] },
    );
    const written = once(writer, 'exit');
    await world.succeeds('cmp', raw, image);
    const sums = { images: 0, misses: 0, clones: 0, total: 0 };
    for (let line = 0; line < LINES_MAX && (sums.images < BYTES || sums.clones < BYTES); line++) {
      const { seconds, total, rows } = await next();
      assert.ok(total.inFlightRequests >= 0 && total.inFlightChunks >= 0);
      sums.total += (total.readBytesPerSecond + total.writeBytesPerSecond) * seconds;
      for (const row of rows) {
        if (row.kind === 'clone') {
          assert.equal(row.name, 'work');
          sums.clones += Math.round(row.writeBytesPerSecond * seconds);
        } else {
          assert.equal(row.name, 'test:1');
          sums.images += Math.round(row.readBytesPerSecond * seconds);
          sums.misses += Math.round(row.missesPerSecond! * seconds);
        }
      }
    }
    assert.deepEqual([sums.images, sums.clones], [BYTES, BYTES]);
    assert.ok(sums.total >= 2 * BYTES - 1, `${sums.total}`);
    assert.ok(sums.misses > 0, 'the image was cold');
    writer.stdin.end('end\n');
    assert.deepEqual(await written, [0, null]);
    child.kill('SIGINT');
    assert.deepEqual(await ended, [0, null]);
  });

  test('people get a table, and intervals without --watch are a mistake', async () => {
    const { code, stdout } = await world.run(
      'proxy',
      'status',
      '--watch',
      '--interval',
      '100ms',
      '--count',
      '2',
    );
    assert.equal(code, 0);
    assert.equal(stdout.match(/^WHAT +NAME +READS\/S/gm)?.length, 2, stdout);
    assert.match(stdout, /^in flight: \d+ requests, \d+ chunks$/m);
    await world.refuses(2, /go with --watch/, 'proxy', 'status', '--count', '2');
    await world.refuses(2, /at least 100ms/, 'proxy', 'status', '--watch', '--interval', '1ms');
  });

  test('each operation has a histogram on /metrics, by who answered it', async () => {
    await world.succeeds('ls', '-l', path.dirname(image));
    await world.succeeds('cmp', raw, clone);
    const text = await new Promise<string>((resolve, reject) => {
      http.get({ socketPath: path.join(runtime, 'control.sock'), path: '/metrics' }, (response) => {
        let all = '';
        response.on('data', (part: Buffer) => (all += part.toString('utf8')));
        response.on('end', () => resolve(all));
        response.on('error', reject);
      });
    });
    const countOf = (operation: string, answeredBy: string) => {
      const name = 'gridvfs_mount_request_duration_seconds_count';
      const line = text
        .split('\n')
        .find((one) => one.startsWith(`${name}{operation="${operation}",answered_by="${answeredBy}"}`));
      return Number(line?.split(' ')[1] ?? 0);
    };
    for (const operation of ['lookup', 'getattr', 'open', 'readdir', 'read', 'fsync'])
      assert.ok(countOf(operation, 'main') > 0, operation);
    assert.ok(countOf('write', 'worker') > 0);
    // A time that was taken from another clock, or never set, would be hours.
    const seconds = [...text.matchAll(/_request_duration_seconds_sum\{[^}]*\} (\S+)/g)].map((match) =>
      Number(match[1]),
    );
    assert.ok(seconds.length > 5 && seconds.every((one) => one >= 0 && one < 600), seconds.join(' '));
  });
});
