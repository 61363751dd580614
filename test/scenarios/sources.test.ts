/** A host with two sources for one store, and its metrics, through the real command. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { freePort } from '../../src/core/ports.ts';
import { World } from './world.ts';
import type { ServerHandle } from './world.ts';

interface Status {
  readonly sources: readonly { name: string; state?: string; down?: string; chunksReceived?: number }[];
}

suite('two sources for one store', () => {
  const world = new World();
  const raw = path.join(world.folder, 'disk.raw');
  const disk = path.join(world.mountpoint, 'images', 'disk', '1', 'disk.raw');
  let servers: ServerHandle[];

  before(async () => {
    writeFileSync(raw, randomBytes(12 * MIB));
    assert.equal((await world.run('store', 'init', world.store)).code, 0);
    await world.json('store', 'import', world.store, raw, 'disk:1');
    servers = [await world.server(), await world.server()];
  });
  after(() => world.dispose());

  // Fails without `also` in openSources (src/cli/daemon.ts): the read waits for the first, which does not come back.
  test('when the first goes away the second serves the rest; status, /metrics and /healthz say so', async () => {
    const [first, second] = servers as [ServerHandle, ServerHandle];
    const port = await freePort();
    const at = `127.0.0.1:${port}`;
    await world.json(
      ...['mount', first.url, world.mountpoint, ...world.proxyOptions(first)],
      ...['--also', second.url, '--metrics', at],
    );
    await world.succeeds('cmp', '-n', String(2 * MIB), raw, disk);
    await first.stop();
    await world.succeeds('cmp', raw, disk);

    const { sources } = await world.json<Status>('proxy', 'status');
    assert.equal(sources.length, 2);
    assert.equal(sources[0]!.state, 'down');
    assert.ok(sources[0]!.down);
    assert.equal(sources[1]!.state, 'up');
    assert.ok(sources[1]!.chunksReceived! > 0);

    const metrics = await (await fetch(`http://${at}/metrics`)).text();
    const valueOf = (name: string) =>
      Number(new RegExp(`^${name}(?:\\{[^}]*\\})? ([0-9.e+]+)$`, 'm').exec(metrics)?.[1]);
    assert.ok(valueOf('gridvfs_cache_fetched_chunks_total') >= 48, metrics);
    for (const { name } of sources) assert.ok(metrics.includes(name), `${name} is in no label`);
    const health = (await (await fetch(`http://${at}/healthz`)).json()) as {
      status: string;
      reasons: string[];
    };
    assert.equal(health.status, 'degraded');
    assert.ok(
      health.reasons.some((reason) => reason.includes(sources[0]!.name)),
      JSON.stringify(health),
    );

    await world.json('umount', world.mountpoint);
    await assert.rejects(fetch(`http://${at}/metrics`));
  });

  test('an address for the metrics that is taken, or none at all, leaves nothing mounted', async () => {
    const [, second] = servers as [ServerHandle, ServerHandle];
    const taken = new URL(second.url).port;
    const mount = (...options: string[]) => [
      ...['mount', second.url, world.mountpoint, ...world.proxyOptions(second)],
      ...options,
    ];
    await world.refuses(1, /cannot listen on/, ...mount('--metrics', `127.0.0.1:${taken}`));
    await world.refuses(2, /metrics/, ...mount('--metrics', 'nonsense'));
    assert.deepEqual(world.mountsLeft(), []);
  });
});
