/** Workspaces: asked for, listed, refused, ended together; their network, their quota and their accounts. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import http from 'node:http';
import { suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { QuotaInfo, WorkspaceInfo } from '../../src/broker/index.ts';
import { usageOf } from '../../src/broker/usage.ts';
import { csvOf } from '../../src/broker/workspace-routes.ts';
import { GIB } from '../../src/core/limits.ts';
import { Networks } from '../../src/network/index.ts';
import { DIALECTS, eventually, version } from './harness.ts';
import type { Running } from './harness.ts';
import { northAndSouth } from './scene.ts';

/** What takes milliseconds: without what it guards, a test is to fail soon. */
const GUARD_MS = 20_000;

for (const dialect of DIALECTS) {
  suite(`workspaces (${dialect})`, () => {
    const relay = new Networks('broker', () => {}, { relay: true });
    const grid = northAndSouth(dialect, [version('small', '1')], { relay });
    const { hosts } = grid;

    const when = (user: Awaited<ReturnType<Running['as']>>, id: string, state: WorkspaceInfo['state']) =>
      eventually(async () => {
        const one = await user.call<WorkspaceInfo>('GET', `/v1/workspaces/${id}`);
        return one.state === state && one;
      });

    test('one request makes machines with addresses on one network; one end releases all and is accounted', async () => {
      const [ada, bob] = [await grid.running.as('ada'), await grid.running.as('bob')];
      const request = { image: 'small', count: 4, name: 'lab', network: 'lab', policy: 'spread' };
      const key = { headers: { 'idempotency-key': 'lab-1' } };
      const made = await ada.call<WorkspaceInfo>('POST', '/v1/workspaces', request, key);
      const again = await ada.call<WorkspaceInfo>('POST', '/v1/workspaces', request, key);
      assert.equal(again.id, made.id);
      const one = await when(ada, 'lab', 'running');
      assert.deepEqual(
        one.machines.map(({ name, address }) => [name, address]),
        [1, 2, 3, 4].map((index) => [`lab-${index}`, `10.64.0.${index + 1}`]),
      );
      assert.equal(new Set(one.machines.map(({ host }) => host)).size, 2);
      for (const vm of one.machines) assert.ok(vm.placed !== undefined && vm.timeline!['readyMs']! > 0);
      const segments = hosts.flatMap(({ machines }) =>
        machines.requests.flatMap((each) => each.segments ?? []),
      );
      assert.deepEqual(
        segments.map(({ network, server }) => [network, server]),
        Array.from({ length: 4 }, () => ['lab', '10.64.0.1/24']),
      );
      assert.equal(new Set(segments.map(({ macAddress }) => macAddress)).size, 4);
      assert.ok(segments.every(({ macAddress }) => /^52(:[0-9a-f]{2}){5}$/.test(macAddress)));

      assert.deepEqual(await bob.call('GET', '/v1/workspaces'), []);
      await assert.rejects(bob.call('POST', '/v1/workspaces/lab/end', {}), { code: 'not-found' });
      await assert.rejects(bob.call('POST', '/v1/workspaces', { image: 'small', network: 'lab' }), {
        code: 'denied',
        message: /network 'lab' belongs to another user/,
      });
      // What was refused left nothing behind.
      assert.deepEqual(await bob.call('GET', '/v1/vms?all=true'), []);
      await assert.rejects(ada.call('POST', '/v1/workspaces', request), {
        code: 'exists',
        message: /you have a workspace 'lab' already/,
      });

      // A second workspace on the same network gets other addresses.
      const more = await ada.call<WorkspaceInfo>('POST', '/v1/workspaces', {
        ...{ image: 'small', name: 'more', network: 'lab' },
      });
      assert.equal(more.machines[0]!.address, '10.64.0.6');
      await ada.call('POST', '/v1/workspaces/more/end', {});

      await ada.call('POST', '/v1/workspaces/lab/end', {});
      await when(ada, made.id, 'ended');
      await eventually(() => hosts.every(({ machines }) => machines.vms.size === 0));
      assert.deepEqual(await ada.call('GET', '/v1/workspaces'), []);
      assert.equal((await ada.call<unknown[]>('GET', '/v1/workspaces?all=true')).length, 2);
      const usage = await ada.call<{ running: boolean }[]>('GET', '/v1/usage');
      assert.ok(usage.length >= 4 && usage.every((row) => !row.running));
    });

    test('suspended, resumed and moved as a whole, each machine goes on with what it had in its memory', async () => {
      const hal = await grid.running.as('hal');
      const asked = { image: 'small', count: 2, name: 'pair', policy: 'spread' };
      await hal.call('POST', '/v1/workspaces', asked);
      const machinesAt = (host: string) => hosts.find(({ facts }) => facts.host === host)!.machines;
      for (const vm of (await when(hal, 'pair', 'running')).machines)
        machinesAt(vm.host!).contents.set(vm.placedAs!, vm.name);
      const act = (verb: string, body: object = {}) => hal.call('POST', `/v1/workspaces/pair/${verb}`, body);
      const goOnAt = async (host: string) => {
        const { machines } = await when(hal, 'pair', 'running');
        assert.deepEqual(
          machines.map((vm) => [vm.host, machinesAt(host).contents.get(vm.placedAs!)]),
          machines.map(({ name }) => [host, name]),
        );
      };
      // Of what none of them can do, the reason is told.
      await assert.rejects(act('resume'), {
        code: 'in-use',
        message: /only one that is suspended can do this/,
      });
      await act('suspend');
      await when(hal, 'pair', 'suspended');
      await eventually(() => hosts.every(({ machines }) => machines.vms.size === 0));
      await assert.rejects(act('move'), { code: 'in-use' });
      await act('resume', { host: 'south' });
      await goOnAt('south');
      // Fails without `avoid` in Lives.#begin: one of the two comes back to where most memory is free.
      await act('move');
      await goOnAt('north');
      await act('move', { host: 'south' });
      await goOnAt('south');
      await act('end');
      await eventually(() => hosts.every(({ machines }) => machines.vms.size === 0));
    });

    test('a workspace over quota is refused with what is allowed, used and asked for, and takes nothing', async () => {
      const [carl, operator] = [await grid.running.as('carl'), await grid.running.as('root', 'operator')];
      await operator.call('PUT', '/v1/quotas/carl', { machines: 3, memoryBytes: 2 * GIB });
      await assert.rejects(carl.call('PUT', '/v1/quotas/carl', {}), { code: 'denied' });
      await carl.call('POST', '/v1/workspaces', { image: 'small', count: 2, name: 'first' });
      // Fails without checkQuota in Requests.submit.
      await assert.rejects(carl.call('POST', '/v1/workspaces', { image: 'small', count: 2 }), {
        code: 'no-space',
        message: /quota of 'carl' is 3 machines: 2 are in use, and this asks for 2 more/,
      });
      await assert.rejects(carl.call('POST', '/v1/vms', { image: 'small', memoryBytes: 2 * GIB }), {
        code: 'no-space',
        message: /bytes of memory/,
      });
      const quota = await carl.call<QuotaInfo>('GET', '/v1/quota');
      assert.deepEqual([quota.machines, quota.used.machines], [3, 2]);
      assert.equal((await carl.call<unknown[]>('GET', '/v1/vms?all=true')).length, 2);
      await carl.call('POST', '/v1/workspaces/first/end', {});
      await when(carl, (await carl.call<WorkspaceInfo[]>('GET', '/v1/workspaces?all=true'))[0]!.id, 'ended');
      await carl.call('POST', '/v1/workspaces', { image: 'small', count: 3, name: 'second' });
      await carl.call('POST', '/v1/workspaces/second/end', {});
    });

    test('a workspace whose time is over is ended by the broker, one that was extended is not', async () => {
      const dora = await grid.running.as('dora');
      for (const name of ['short', 'long']) {
        await dora.call('POST', '/v1/workspaces', { image: 'small', name, lifetimeMs: 1_500 });
      }
      const extended = await dora.call<WorkspaceInfo>('POST', '/v1/workspaces/long/extend', {
        lifetimeMs: 3_600_000,
      });
      assert.ok(Date.parse(extended.ends!) > Date.now() + 3_000_000);
      // Fails without the look at ends_ms in extend: it would end sooner.
      await assert.rejects(dora.call('POST', '/v1/workspaces/long/extend', { lifetimeMs: 60_000 }), {
        code: 'bad-request',
        message: /'long' lives until \S+Z already/,
      });
      await eventually(async () => (await dora.call<unknown[]>('GET', '/v1/workspaces')).length === 1);
      await sleep(200);
      assert.equal((await dora.call<WorkspaceInfo>('GET', '/v1/workspaces/long')).ends, extended.ends);
      await dora.call('POST', '/v1/workspaces/long/end', {});
    });

    test('a command is run in each guest, and what became of it is kept; a seed goes to each host', async () => {
      const fay = await grid.running.as('fay');
      const commandOf = async (name: string, command: string, more: object = {}) => {
        await fay.call('POST', '/v1/workspaces', { image: 'small', name, command, ...more });
        return eventually(async () => {
          const { machines } = await fay.call<WorkspaceInfo>('GET', `/v1/workspaces/${name}`);
          const all = machines.map((vm) => vm.command!);
          return all.every(({ exitCode, error }) => exitCode !== undefined || error !== undefined) && all;
        });
      };
      const seed = { sshKeys: ['ssh-ed25519 AAAA fay'], userData: '#cloud-config\n' };
      assert.deepEqual(await commandOf('works', 'echo', { count: 2, ...seed }), [
        { command: 'echo', exitCode: 0, output: 'did echo\n' },
        { command: 'echo', exitCode: 0, output: 'did echo\n' },
      ]);
      const sent = hosts
        .flatMap(({ machines }) => machines.requests)
        .filter((one) => one.sshKeys !== undefined);
      assert.deepEqual(
        sent
          .toSorted((a, b) => (a.hostName! < b.hostName! ? -1 : 1))
          .map(({ sshKeys, userData, hostName }) => ({ sshKeys, userData, hostName })),
        ['works-1', 'works-2'].map((hostName) => ({ ...seed, hostName })),
      );
      assert.deepEqual(await commandOf('breaks', 'fails'), [
        { command: 'fails', exitCode: 3, output: 'did fails\n' },
      ]);
      assert.deepEqual(await commandOf('mute', 'cannot'), [
        { command: 'cannot', error: 'nothing there takes commands' },
      ]);
      await fay.call('POST', '/v1/workspaces', { image: 'small', name: 'endless', command: 'hangs' });
      const { id } = await when(fay, 'endless', 'running');
      // Lists are of what is there, not of what it said.
      const listed = (await fay.call<WorkspaceInfo[]>('GET', '/v1/workspaces')).find(
        ({ name }) => name === 'breaks',
      );
      assert.deepEqual(listed!.machines[0]!.command, { command: 'fails', exitCode: 3 });
      for (const name of ['works', 'breaks', 'mute', 'endless'])
        await fay.call('POST', `/v1/workspaces/${name}/end`, {});
      const ended = await when(fay, id, 'ended');
      assert.match(ended.machines[0]!.command!.error!, /stopped before it was over/);
    });

    test('a user’s stream reaches the own guest by way of its host, and nobody else’s', async () => {
      const [gil, other] = [await grid.running.as('gil'), await grid.running.as('other')];
      await gil.call('POST', '/v1/workspaces', { image: 'small', name: 'shell' });
      const { machines } = await when(gil, 'shell', 'running');
      const open = (client: typeof gil, which: string, port = 22) =>
        client.upgrade(`/v1/vms/${which}/connect?port=${port}`, 'gridvfs-stream');
      const stream = await open(gil, 'shell');
      stream.write('hello\n');
      let heard = '';
      for await (const part of stream) {
        heard += String(part);
        if (heard.endsWith('hello\n')) break;
      }
      assert.equal(heard, `${machines[0]!.placedAs} 22\nhello\n`);
      await assert.rejects(open(other, 'shell'), { code: 'not-found' });
      await assert.rejects(open(other, machines[0]!.id), { code: 'not-found' });
      await assert.rejects(open(gil, 'shell', 23), { code: 'vm-failed', message: /no such network/ });
      await assert.rejects(open(gil, 'shell', 70_000), { code: 'bad-request' });
      const agent = await grid.running.as('hosts', 'agent');
      await assert.rejects(open(agent, 'shell'), { code: 'denied' });
      // Its console is nobody else's either; what is typed goes to the one that is open.
      const route = '/v1/vms/shell/console';
      const type = (client: typeof gil, text: string) => client.call('POST', route, { text });
      await assert.rejects(type(gil, 'x'), { code: 'closed', message: /no console of VM 'shell' open/ });
      await assert.rejects(other.call('GET', route), { code: 'not-found' });
      await assert.rejects(agent.call('GET', route), { code: 'denied' });
      const { token } = await grid.running.broker.access.create('gil', 'user');
      const look = async () => {
        const headers = { authorization: `Bearer ${token}` };
        const call = http
          .get({ socketPath: grid.running.socket, path: route, headers })
          .on('error', () => {});
        const [said] = (await once(call, 'response')) as [http.IncomingMessage];
        const seen = { call, words: '', isOver: false };
        said.on('data', (part: Buffer) => (seen.words += String(part))).on('error', () => {});
        said.once('close', () => (seen.isOver = true));
        return seen;
      };
      const first = await look();
      const watch = await look();
      // One looks at a time. Fails without the end of the other in openConsole.
      await eventually(() => first.isOver, GUARD_MS);
      await type(gil, 'typed\n');
      await eventually(() => watch.words === `${machines[0]!.placedAs} 0\ntyped\n`, GUARD_MS);
      await assert.rejects(type(other, 'x'), { code: 'not-found' });
      // Gone with who looks. Fails without the end of `far` when `raw` has closed.
      watch.call.destroy();
      await eventually(
        () =>
          type(gil, 'x').then(
            () => false,
            () => true,
          ),
        GUARD_MS,
      );
      const guess = `/v1/agent/streams/${'0'.repeat(32)}?host=${machines[0]!.host}`;
      await assert.rejects(agent.upgrade(guess, 'gridvfs-stream'), { code: 'denied' });
      await gil.call('POST', '/v1/workspaces/shell/end', {});
    });

    test('a trunk is for hosts that carry a machine of the network, under their own token', async () => {
      const eve = await grid.running.as('eve');
      await eve.call('POST', '/v1/workspaces', { image: 'small', name: 'w', network: 'eves' });
      const { machines } = await when(eve, 'w', 'running');
      const carrier = machines[0]!.host!;
      const other = hosts.find(({ facts }) => facts.host !== carrier)!.facts.host;
      const agent = await grid.running.as('hosts', 'agent');
      const open = (client: typeof agent, network: string, host: string) =>
        client.upgrade(`/v1/agent/trunks/${network}?host=${host}`, 'gridvfs-trunk');
      await assert.rejects(open(agent, 'eves', other), { code: 'denied' });
      await assert.rejects(open(agent, 'nothing', carrier), { code: 'denied' });
      await assert.rejects(open(eve, 'eves', carrier), { code: 'denied' });
      await assert.rejects(open(await grid.running.as('stranger', 'agent'), 'eves', carrier), {
        code: 'denied',
      });
      const near = new Networks(carrier, () => {});
      try {
        assert.equal(await near.join('eves', await open(agent, 'eves', carrier)), 'broker');
      } finally {
        near.closeAll();
      }
      await eve.call('POST', '/v1/workspaces/w/end', {});
    });

    test('accounts are exported as CSV, with names that a spreadsheet takes for nothing else', async () => {
      const rows = await usageOf(grid.running.broker.db, { user: 'ada', role: 'user' });
      assert.ok(rows.length > 0 && csvOf(rows).startsWith('vm,generation,name,workspace,owner,host,'));
      assert.equal(csvOf([{ a: '=1+1', b: 'x,"y"\n', c: -5 }]), `a,b,c\r\n'=1+1,"x,""y""\n",-5\r\n`);
      const operator = await grid.running.as('root', 'operator');
      assert.ok((await operator.call<unknown[]>('GET', '/v1/usage')).length >= rows.length);
    });
  });
}
