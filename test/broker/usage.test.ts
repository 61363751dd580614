/** What was used, by VM, workspace, user and data volume; what users may have of volumes; and what the command says of it. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { BrokerClient } from '../../src/agent/broker-client.ts';
import type { QuotaInfo, UsageBy, VolumeInfo, WorkspaceInfo } from '../../src/broker/index.ts';
import { MIB } from '../../src/core/limits.ts';
import { DIALECTS, eventually, version } from './harness.ts';
import { northAndSouth } from './scene.ts';

const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
const run = promisify(execFile);

/** What takes milliseconds: without the line that it guards, a test is to fail soon. */
const GUARD_MS = 20_000;

type Row = Record<string, number> & { name: string; owner: string; there: boolean };

for (const dialect of DIALECTS) {
  suite(`quotas and accounts (${dialect})`, () => {
    const grid = northAndSouth(dialect, [version('small', '1')]);
    const usage = (user: BrokerClient, by: UsageBy) => user.call<Row[]>('GET', `/v1/usage?by=${by}`);
    const runs = async (user: BrokerClient, name: string, more: object = {}) => {
      await user.call('POST', '/v1/workspaces', { image: 'small', name, ...more });
      return eventually(async () => {
        const one = await user.call<WorkspaceInfo>('GET', `/v1/workspaces/${name}`);
        return one.state === 'running' && one;
      });
    };

    test('volumes beyond their owner’s quota are refused with what is allowed, used and asked for', async () => {
      const [ada, operator] = [await grid.running.as('ada'), await grid.running.as('root', 'operator')];
      await operator.call('PUT', '/v1/quotas/ada', { volumeBytes: 8 * MIB });
      const make = (name: string, sizeBytes: number) => ada.call('POST', '/v1/volumes', { name, sizeBytes });
      await make('first', 6 * MIB);
      const refused = (more: number) => ({
        code: 'no-space',
        message: new RegExp(
          `quota of 'ada' is ${8 * MIB} bytes of data volumes: ${6 * MIB} are in use, and this asks for ${more * MIB} more`,
        ),
      });
      // Fails without checkQuota in VolumeCatalog.create.
      await assert.rejects(make('second', 4 * MIB), refused(4));
      await eventually(async () => (await ada.call<VolumeInfo>('GET', '/v1/volumes/first')).state === 'free');
      const grow = (sizeBytes: number) => ada.call('POST', '/v1/volumes/first/grow', { sizeBytes });
      // Fails without checkQuota in resize.
      await assert.rejects(grow(9 * MIB), refused(3));
      // An operator who grows it takes of its owner's.
      await assert.rejects(
        operator.call('POST', `/v1/volumes/${encodeURIComponent('ada/first')}/grow`, { sizeBytes: 9 * MIB }),
        refused(3),
      );
      const quota = await ada.call<QuotaInfo>('GET', '/v1/quota');
      assert.deepEqual([quota.volumeBytes, quota.used.volumeBytes], [8 * MIB, 6 * MIB]);
      await make('second', 2 * MIB);
      await operator.call('PUT', '/v1/quotas/ada', { volumeBytes: MIB });
      // One who has more than a lowered quota can still have machines.
      await runs(ada, 'still');
      await ada.call('POST', '/v1/workspaces/still/end', {});
      await ada.call('DELETE', '/v1/volumes/second');
      await ada.call('DELETE', '/v1/volumes/first');
      assert.equal((await ada.call<QuotaInfo>('GET', '/v1/quota')).used.volumeBytes, 0);
    });

    test('a volume is accounted at each of its sizes for as long as it had it, and no longer than it is there', async () => {
      const [bob, other] = [await grid.running.as('bob'), await grid.running.as('other')];
      await bob.call('POST', '/v1/volumes', { name: 'data', sizeBytes: 2 * MIB });
      await eventually(async () => (await bob.call<VolumeInfo>('GET', '/v1/volumes/data')).state === 'free');
      const account = async () => (await usage(bob, 'volume')).find(({ name }) => name === 'data')!;
      await sleep(300);
      const small = await account();
      assert.deepEqual([small.sizeBytes, small.there, small.owner], [2 * MIB, true, 'bob']);
      assert.ok(small.seconds! >= 0.3);
      const close = (a: number, b: number) => assert.ok(Math.abs(a - b) <= b * 1e-6, `${a} is not ${b}`);
      close(small.byteSeconds!, small.seconds! * 2 * MIB);
      // Fails without noteVolumeSize in resize: all of its time would be at one size.
      await bob.call('POST', '/v1/volumes/data/grow', { sizeBytes: 64 * MIB });
      await sleep(300);
      const grown = await account();
      const byteSeconds = grown.byteSeconds! - small.byteSeconds!;
      assert.ok(byteSeconds >= 0.3 * 64 * MIB && grown.byteSeconds! < grown.seconds! * 64 * MIB);
      await bob.call('DELETE', '/v1/volumes/data');
      const gone = await account();
      await sleep(20);
      // Fails without noteVolumeSize in VolumeCatalog.remove.
      assert.deepEqual(await account(), gone);
      assert.equal(gone.there, false);
      assert.deepEqual(await usage(other, 'volume'), []);
      const [sum] = await usage(bob, 'user');
      assert.deepEqual([sum!.volumes, sum!.volumeByteSeconds], [1, gone.byteSeconds]);
    });

    test('what hosts spent on machines is on the account of each, of its workspace and of its user', async () => {
      const [eve, operator] = [await grid.running.as('eve'), await grid.running.as('root', 'operator')];
      const { id, machines } = await runs(eve, 'lab', { count: 2, policy: 'spread', memoryBytes: 64 * MIB });
      const spend = async (seconds: readonly number[], totals: readonly number[]) => {
        for (const [index, { host, placedAs }] of machines.entries()) {
          const at = grid.hosts.find(({ facts }) => facts.host === host)!;
          at.cpuSeconds.set(placedAs!, seconds[index]!);
          at.refresh();
        }
        await eventually(async () => {
          const rows = await usage(eve, 'vm');
          return machines.every((vm, index) =>
            rows.some((row) => row.name === vm.name && row.cpuSeconds === totals[index]),
          );
        }, GUARD_MS);
      };
      await spend([1.5, 0.25], [1.5, 0.25]);
      // A proxy that has started again counts from the beginning. Fails without the CASE in noteCpu.
      await spend([0.5, 0.75], [2, 0.75]);
      await eve.call('POST', '/v1/workspaces/lab/end', {});
      await eventually(async () => (await usage(eve, 'vm')).every((row) => !row.running));
      const rows = await usage(eve, 'vm');
      assert.ok(rows.every((row) => String(row.workspace) === 'lab'));
      const total = (field: string) => rows.reduce((sum, row) => sum + row[field]!, 0);
      for (const [by, of] of [
        ['workspace', { workspace: id, name: 'lab', owner: 'eve' }],
        ['user', { user: 'eve', volumes: 0, volumeByteSeconds: 0, volumeStoredBytes: 0 }],
      ] as const) {
        const { seconds, memoryByteSeconds, ...sums } = (await usage(eve, by))[0]!;
        assert.deepEqual(sums, {
          ...of,
          ...{ vms: 2, fetchedBytes: 0, storedBytes: 0, cpuSeconds: 2.75, running: false },
        });
        assert.ok(Math.abs(seconds! - total('seconds')) < 1e-6);
        assert.ok(Math.abs(memoryByteSeconds! - seconds! * 64 * MIB) < 1);
      }
      // Operators see everybody's.
      const users = (await usage(operator, 'user')).map((row) => String(row.user));
      assert.ok(['ada', 'bob', 'eve'].every((name) => users.includes(name)));
      await assert.rejects(eve.call('GET', '/v1/usage?by=planet'), { code: 'bad-request' });
    });

    test('the command says what becomes of connections, quotas and accounts', async () => {
      const operator = await grid.running.as('root', 'operator');
      const made = await grid.running.broker.access.create('gil', 'user');
      const gil = grid.running.client(made.token);
      const tokenFile = path.join(path.dirname(grid.running.socket), 'gil.token');
      writeFileSync(tokenFile, made.token, { mode: 0o600 });
      const command = async (...args: string[]) => {
        const to = ['--broker', `unix:${grid.running.socket}`, '--token-file', tokenFile];
        return (await run(process.execPath, [MAIN, ...args, ...to])).stdout;
      };
      await runs(gil, 'near', { network: 'ours' });
      await runs(gil, 'alone');
      // These fail without `notes` in actionVerb.
      const outside = 'connections with the outside are over';
      assert.match(
        await command('workspace', 'suspend', 'near'),
        new RegExp(`\nconnections on network 'ours' go on with their machines; ${outside}\n$`),
      );
      assert.match(
        await command('workspace', 'move', 'alone'),
        new RegExp(`\n${outside}: its machines are on no network of their own\n$`),
      );
      assert.doesNotMatch(await command('workspace', 'resume', 'near'), /connections/);
      await operator.call('PUT', '/v1/quotas/gil', { machines: 4, volumeBytes: 2 ** 40 });
      assert.equal(
        await command('workspace', 'quota'),
        `gil: 2 of 4 machines, 2 of any vcpus, 1.00 GiB of any memory, 0 B of 1024.00 GiB data volumes\n`,
      );
      assert.match(await command('broker', 'usage', '--by', 'workspace'), /^WORKSPACE +ID.*\nnear +w/);
      for (const name of ['near', 'alone']) await command('workspace', 'end', name);
    });
  });
}
