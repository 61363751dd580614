/**
 * Eight forks of one large checkpoint at once: each is itself, and costs what it changed. In the long run. What the host
 * pays is read from the control group of the proxy and its VMs, which has the kernel's memory for them too (page tables,
 * stacks) and nothing of who else runs on this machine, which /proc/meminfo would have.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { MIB } from '../../src/core/limits.ts';
import { Cgroups } from '../../src/vmm/index.ts';
import { ask } from './console.ts';
import { anonymousBytes, dirtyMemoryBytes, importSmall, setNonce } from './vm-world.ts';
import type { Vm } from './vm-world.ts';
import { World } from './world.ts';

const LONG = process.env['GRIDVFS_LONG'] === '1';

const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(1)} MB`;

interface Charged {
  /** Memory of processes, shared memory, and the kernel's own for them. */
  readonly givenAway: number;
  /** Pages of files, of which there is one for all who read them. */
  readonly filePages: number;
}

/** What a control group and those below it are charged with. */
function chargedTo(folder: string): Charged {
  const stat = readFileSync(path.join(folder, 'memory.stat'), 'utf8');
  const of = (name: string) => Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(stat)![1]);
  const first = path.join(folder, 'memory.kmem.usage_in_bytes');
  if (!existsSync(first))
    return { givenAway: of('anon') + of('shmem') + of('kernel'), filePages: of('file') - of('shmem') };
  const kernel = Number(readFileSync(first, 'utf8'));
  const shared = of('total_shmem');
  return { givenAway: of('total_rss') + shared + kernel, filePages: of('total_cache') - shared };
}

suite('many forks', { skip: LONG ? false : 'minutes; in the long run' }, () => {
  const world = new World();
  const FORKS = 8;
  const cgroup = `gridvfs-test-${randomBytes(4).toString('hex')}`;

  before(async () => {
    await importSmall(world);
  });
  after(async () => {
    await world.dispose();
    await (await Cgroups.open(cgroup)).dispose();
  });

  test(`${FORKS} forks of one checkpoint of 512 MB: each itself, with memory for what it changed, each page fetched once`, async (t) => {
    const server = await world.server('--accept-uploads');
    await world.mount(server.url, server, '--no-profile', '--cgroup', cgroup);
    const { folders } = await Cgroups.open(cgroup);
    const group = folders.find((folder) => existsSync(path.join(folder, 'memory.stat')));
    if (group === undefined) return t.skip('no control groups of memory are mounted here');
    const vm = await world.json<Vm>('vm', 'run', 'small:1', '--name', 'origin', '--memory', '512M');
    const nonce = await setNonce(vm);
    await ask(
      vm.consoleSocket,
      'dd if=/dev/urandom of=/run/fill bs=1M count=200 2>/dev/null; md5sum < /run/fill > /run/sum; echo filled-$((6*7))',
      /filled-42/,
      { lateMs: 120_000, againMs: 120_000 },
    );
    await world.json('vm', 'suspend', 'origin');
    await world.json('vm', 'checkpoint', 'origin', '--to', 'big:1');
    await world.json('vm', 'stop', 'origin', '--now');
    interface Status {
      pid: number;
      cache: { fetchedChunks: number; fetchedPlainBytes: number };
    }
    const present = async () => {
      const { images } = await world.json<{ images: { presentChunks: number }[] }>('cache', 'status');
      return images.reduce((sum, image) => sum + image.presentChunks, 0);
    };
    const before = { chunks: await present(), ...(await world.json<Status>('proxy', 'status')) };
    const proxyBefore = anonymousBytes(before.pid);
    const chargedBefore = chargedTo(group);
    const startMs = performance.now();
    const forks = await world.json<Vm[]>('vm', 'fork', 'big:1', '--count', String(FORKS), '--name', 'fork');
    const startedMs = performance.now() - startMs;
    // All of them read all that was put into memory.
    const answers = await Promise.all(
      forks.map(({ consoleSocket }) =>
        ask(
          consoleSocket,
          'echo "=$N=$(md5sum < /run/fill | cmp - /run/sum && echo same)="; cat /run/identity',
          /=(\w+)=same=\s+\{"event":"fork",.*\}/,
          { lateMs: 240_000, againMs: 240_000 },
        ),
      ),
    );
    const answeredMs = performance.now() - startMs;
    const identities = answers.map((answer, at) => {
      assert.ok(answer.startsWith(`=${nonce}=same=`), answer);
      const said = JSON.parse(/\{.*\}/.exec(answer)![0]) as {
        name: string;
        instanceId: string;
        macAddress: string;
      };
      assert.equal(said.name, forks[at]!.id);
      return said;
    });
    for (const key of ['name', 'instanceId', 'macAddress'] as const)
      assert.equal(new Set(identities.map((each) => each[key])).size, FORKS);
    const charged = chargedTo(group);
    const used = charged.givenAway - chargedBefore.givenAway;
    const filePages = charged.filePages - chargedBefore.filePages;
    const now = { chunks: await present(), ...(await world.json<Status>('proxy', 'status')) };
    const proxyGrown = anonymousBytes(now.pid) - proxyBefore;
    const dirty = forks.map(({ pid }) => dirtyMemoryBytes(pid));
    const own = forks.map(({ pid }) => anonymousBytes(pid));
    const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0);
    t.diagnostic(
      `${FORKS} forks started in ${(startedMs / 1000).toFixed(1)} s, answered with 200 MB read after ${(answeredMs / 1000).toFixed(1)} s; ` +
        `per fork: ${megabytes(sum(dirty) / FORKS)} of memory dirty, ${megabytes(sum(own) / FORKS)} anonymous in its process, ` +
        `${megabytes((used - proxyGrown) / FORKS)} more charged (proxy ${megabytes(proxyGrown)} more); ` +
        `pages of files ${megabytes(filePages)} more in all`,
    );
    const fetched = now.cache.fetchedChunks - before.cache.fetchedChunks;
    t.diagnostic(`${fetched} chunks fetched, ${now.chunks - before.chunks} are here now`);
    assert.ok(sum(dirty) / FORKS < 64 * MIB, 'pages of the base are shared');
    assert.ok(
      used - proxyGrown <= 1.1 * sum(own),
      `${used} used, ${proxyGrown} by the proxy, ${sum(own)} own`,
    );
    // As the mount shows them, and as the cache has them; eight of the former would be five times as much.
    const arrived = now.cache.fetchedPlainBytes - before.cache.fetchedPlainBytes;
    assert.ok(filePages <= 2.2 * arrived, `${filePages} bytes of pages of files, of ${arrived} that came`);
    assert.ok(fetched <= now.chunks - before.chunks, 'each chunk is fetched once');
    await world.json('vm', 'stop', ...forks.map(({ id }) => id), '--now');
    assert.deepEqual(await world.json('clone', 'ls'), []);
  });
});
