/**
 * Workspaces over hosts that are network namespaces, each with a proxy, cache and mount of its own, one image server
 * behind the ssh tunnel and one broker reached by TLS: real guests on a virtual network that spans the hosts, with data
 * volumes, asked for, suspended, resumed elsewhere, moved and ended by one command each.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { HostInfo, VmInfo, VolumeInfo, WorkspaceInfo } from '../../src/broker/index.ts';
import { ask as askOnce } from './console.ts';
import { eventually, Grid, runningCopies } from './grid.ts';

const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'main.ts');
const LONG = process.env['GRIDVFS_LONG'] === '1';
const HOSTS = LONG ? ['one', 'two', 'three'] : ['one', 'two'];
/** Of the gibibyte that each host has for guests, so that two or one of them fill it but for a small one. */
const [COUNT, MEMORY, PER_HOST] = LONG ? [4, '440M', 2] : [2, '600M', 1];
const KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample ada@desk';

/** For a guest's shell: does it with $d, the device of the volume. */
const onVolume = (name: string, command: string) =>
  `for s in /sys/block/vd*; do d=/dev/\${s##*/}; [ "$(cat $s/serial)" = ${name} ] && { ${command}; }; done`;
const textOf = (name: string) => onVolume(name, 'echo "=$(head -c 12 $d)="');

suite(`a workspace of ${COUNT} machines over ${HOSTS.length} hosts`, () => {
  const grid = new Grid(HOSTS, ['boot.shell=ttyS0']);
  const { world } = grid;
  before(() => grid.start());
  after(() => grid.stop());

  const workspace = (who: string, ...args: string[]) =>
    world.json<WorkspaceInfo>('workspace', ...args, ...grid.as(who));
  const volume = (...args: string[]) => world.json<VolumeInfo>('volume', ...args, ...grid.as('ada'));
  const ask = (vm: VmInfo, line: string, answer: RegExp) =>
    askOnce(vm.console!, line, answer, { lateMs: 120_000 });
  /** Also saved: nobody writes to it. */
  const free = async (name: string) => {
    let one: VolumeInfo | undefined;
    await eventually(async () => (one = await volume('show', name)).state === 'free');
    return one!;
  };
  /** Consoles are known with their hosts' next reports. */
  const machinesOf = async (who: string, name: string) => {
    let machines: WorkspaceInfo['machines'] = [];
    await eventually(async () => {
      ({ machines } = await workspace(who, 'show', name));
      return machines.every((vm) => vm.state === 'running' && vm.console !== undefined);
    });
    return machines;
  };

  test('machines on several hosts share a volume and a network that nobody else is on; what they said is kept', async () => {
    const key = path.join(world.folder, 'key.pub');
    writeFileSync(key, `${KEY}\n`);
    await Promise.all(['tables', 'home'].map((name) => volume('create', name, '--size', '4M')));
    const small = ['request', 'small:1', '--memory', '128M', '--name'];
    const write = `${onVolume('tables', 'printf shared-words > $d')}; sync; cat /root/.ssh/*; hostname; exit 7`;
    const [made] = await Promise.all([
      workspace('ada', ...small, 'prep', '--volume', 'tables', '--ssh-key', key, '--command', write),
      workspace('bob', ...small, 'other', '--network', 'others'),
    ]);
    assert.deepEqual(
      made.machines.map(({ command }) => [command?.exitCode, command?.output]),
      [[7, `${KEY}\nprep\n`]],
    );
    await world.refuses(
      1,
      /'tables' is attached writable to VM 'prep'/,
      ...['workspace', 'request', 'small:1', '--volume', 'tables', ...grid.as('ada')],
    );
    await workspace('ada', 'end', 'prep');
    assert.equal((await free('tables')).version, 2);

    await workspace(
      ...([
        'ada',
        'request',
        'small:1',
        '--name',
        'lab',
        '--count',
        String(COUNT),
        '--network',
        'lab',
      ] as const),
      ...['--memory', MEMORY, '--policy', 'pack', '--volume', 'tables:ro', '--command', textOf('tables')],
    );
    const machines = await machinesOf('ada', 'lab');
    const hosts = machines.map(({ host }) => host!).toSorted();
    assert.equal(new Set(hosts).size, COUNT / PER_HOST);
    for (const vm of machines) assert.deepEqual(vm.command?.output, '=shared-words=\n');
    const [other] = await machinesOf('bob', 'other');
    for (const [message, ...args] of [
      [/network 'lab' belongs to another user/, '--network', 'lab'],
      [/no volume 'ada\/tables' of yours/, '--volume', 'ada/tables:ro'],
    ] as const) {
      await world.refuses(1, message, 'workspace', 'request', 'small:1', ...args, ...grid.as('bob'));
    }
    const lease = 'ifconfig eth1 up; udhcpc -i eth1 -s /etc/udhcpc.sh -n -q; ifconfig eth1';
    await Promise.all(
      [...machines, other!].map((vm) =>
        ask(vm, lease, new RegExp(`inet addr:${vm.address!.replaceAll('.', '\\.')}\\b`)),
      ),
    );
    const [first, ...rest] = machines;
    const last = rest.at(-1)!;
    for (const vm of rest) await ask(first!, `busybox ping -c 2 -W 5 ${vm.address}`, /[12] packets received/);
    await ask(last, '(echo from-the-other | nc -l -p 90 &) > /dev/null; echo up', /\nup/);
    await ask(first!, `nc -w 5 ${last.address} 90 < /dev/null`, /from-the-other/);
    await ask(first!, onVolume('tables', 'echo x > $d || echo refused'), /\nrefused/);
    // One of another network takes an address of this one: it finds nobody there.
    const taken = first!.address!.replace(/\d+$/, '77');
    await ask(other!, `ifconfig eth1 ${taken} netmask 255.255.255.0; ifconfig eth1`, /addr:10\.\S+\.77\b/);
    await ask(
      other!,
      `busybox ping -c 2 -W 2 ${first!.address}`,
      /2 packets transmitted, 0 packets received/,
    );
    await workspace('bob', 'end', 'other');

    // The guest has no ssh server: what stands at its port echoes.
    await ask(
      last,
      'ifconfig eth0 up; udhcpc -i eth0 -s /etc/udhcpc.sh -n -q; ifconfig eth0',
      /addr:10\.0\.2\.15/,
    );
    await ask(last, '(nc -l -p 22 -e cat &) > /dev/null; echo e-$((6*7))', /e-42/);
    const client = spawn(process.execPath, [MAIN, 'workspace', 'connect', last.name, ...grid.as('ada')], {
      stdio: ['pipe', 'pipe', 'inherit'],
      env: world.environment,
    });
    client.stdin.write('by-way-of-the-broker\n');
    const signal = AbortSignal.timeout(60_000);
    const [echo] = (await once(client.stdout, 'data', { signal })) as [Buffer];
    assert.equal(echo.toString(), 'by-way-of-the-broker\n');
    client.stdin.end();
    await once(client, 'exit', { signal });

    // Its console, with what it said before anybody looked.
    const terminal = spawn(process.execPath, [MAIN, 'workspace', 'console', last.name, ...grid.as('ada')], {
      stdio: ['pipe', 'pipe', 'inherit'],
      env: world.environment,
    });
    let heard = '';
    terminal.stdout.on('data', (text: Buffer) => (heard += String(text)));
    terminal.stdin.write('echo con-$((6*7))\n');
    await eventually(() => heard.includes('con-42'), 60_000);
    assert.match(heard, /e-42/);
    terminal.stdin.end();
    await once(terminal, 'exit', { signal: AbortSignal.timeout(60_000) });

    const shown = await world.run('workspace', 'show', 'lab', ...grid.as('ada'));
    assert.match(shown.stdout, /volume tables: lab-1 \(ro\), lab-2 \(ro\)/);
    assert.match(shown.stdout, /lab-1 +running +\S+ +10\.64\.\d\.2 /);
    assert.match(shown.stdout, /lab-1: .* ended with exit code 0\n=shared-words=\n/);
  });

  test('a volume comes to a machine that runs, is kept as it is at a moment, and is saved when it goes', async () => {
    await volume('attach', 'home', 'lab-1');
    const [one] = await machinesOf('ada', 'lab');
    const write = (text: string) =>
      ask(one!, `${onVolume('home', `printf ${text} > $d`)}; sync; echo w-$((6*7))`, /w-42/);
    await write('at-a-moment-');
    assert.equal((await volume('snapshot', 'home')).version, 2);
    await write('after-moment');
    await volume('detach', 'home', 'lab-1');
    assert.equal((await free('home')).version, 3);
    const look = `${onVolume('home', 'echo th-$((6*7))')}; echo gone-$((6*7))`;
    assert.doesNotMatch(await ask(one!, look, /[^]*gone-42/), /th-42/);
    if (!LONG) return;
    await volume('create', 'moment', '--from', 'home', '--version', '2');
    for (const [name, text] of [
      ['home', /=after-moment=/],
      ['moment', /=at-a-moment-=/],
    ] as const) {
      await volume('attach', name, 'lab-1', '--read-only');
      await ask(one!, textOf(name), text);
      await volume('detach', name, 'lab-1');
    }
    await world.json('volume', 'rm', 'moment', ...grid.as('ada'));
  });

  suite('the lives of its machines together', { skip: LONG ? false : 'long tests' }, () => {
    const numberOf = async (vm: VmInfo, command: string) =>
      Number((await ask(vm, `echo "=$(${command})="`, /=\d+=/)).slice(1, -1));
    const ticks = (vm: VmInfo) => numberOf(vm, 'wc -l < /run/got');
    const count = (vm: VmInfo) => numberOf(vm, 'cat /run/n');

    before(async () => {
      await volume('attach', 'home', 'lab-1');
      const machines = await machinesOf('ada', 'lab');
      const [one, two] = machines as [VmInfo, VmInfo];
      for (const vm of machines) {
        const counter = '(n=0; while :; do n=$((n+1)); echo $n > /run/n; sleep 1; done) &';
        await ask(vm, `echo ${vm.name} > /root/mine; sync; ${counter} echo c-$((6*7))`, /c-42/);
      }
      // What listens keeps its own end open, or it would be over with the first line.
      await ask(one, '(sleep 9999 | nc -l -p 91 > /run/got &) > /dev/null 2>&1; echo l-$((6*7))', /l-42/);
      const say = `while :; do echo tick; sleep 1; done | nc ${machines[0]!.address} 91`;
      await ask(two, `(${say} &) > /dev/null; echo t-$((6*7))`, /t-42/);
      await eventually(async () => (await ticks(one)) > 2);
    });

    /** Does it, and looks whether all goes on from where it was. */
    const goesOn = async (text: string, what: () => Promise<void>) => {
      const before = await machinesOf('ada', 'lab');
      await ask(before[0]!, `${onVolume('home', `printf ${text} > $d`)}; sync; echo w-$((6*7))`, /w-42/);
      const startMs = performance.now();
      const counts = new Map<string, number>();
      for (const vm of before) counts.set(vm.id, await count(vm));
      const ticked = await ticks(before[0]!);
      await what();
      const now = await machinesOf('ada', 'lab');
      for (const vm of now) {
        const [was, is] = [counts.get(vm.id)!, await count(vm)];
        // It went on from where it was: no more than it can have counted since, and not from the start.
        const most = was + (performance.now() - startMs) / 1000 + 2;
        assert.ok(is >= was && is <= most, `${vm.name}: ${is} after ${was}, at most ${most}`);
        await eventually(async () => (await count(vm)) > is);
        assert.equal(await ask(vm, 'echo "=$(cat /root/mine)="', /=lab-\d=/), `=${vm.name}=`);
        await ask(vm, textOf('tables'), /=shared-words=/);
      }
      // The connection between two of them that was open before.
      await eventually(async () => (await ticks(now[0]!)) > ticked + 2);
      await ask(now[0]!, textOf('home'), new RegExp(`=${text}=`));
      return { before, now };
    };

    test('suspended and resumed with two members on another host: counters, connections, files and volumes go on', async () => {
      let third = '';
      const { now } = await goesOn('written-once', async () => {
        const machines = await machinesOf('ada', 'lab');
        const { code, stdout } = await world.run('workspace', 'suspend', 'lab', ...grid.as('ada'));
        assert.equal(code, 0);
        assert.match(stdout, /^lab \(\w+\) +suspended /);
        assert.match(
          stdout,
          /\nconnections on network 'lab' go on with their machines; .* outside are over$/m,
        );
        await eventually(() => machines.every(({ id }) => runningCopies(id).length === 0));
        assert.equal((await volume('show', 'home')).unsaved, false);
        await sleep(2_000);
        const [one] = machines as [VmInfo];
        third = HOSTS.find((host) => !machines.some((vm) => vm.host === host))!;
        for (const vm of [one, machines.find(({ host }) => host !== one.host)!])
          await grid.ask('ada', 'resume', vm.name, '--host', third);
        assert.equal((await workspace('ada', 'resume', 'lab')).state, 'running');
      });
      assert.equal(now.filter(({ host }) => host === third).length, 2);
    });

    test('moved by one command, each of its machines is on another host and goes on', async () => {
      const { before, now } = await goesOn('written-more', async () => {
        assert.equal((await workspace('ada', 'move', 'lab')).state, 'running');
      });
      for (const [index, vm] of now.entries()) assert.notEqual(vm.host, before[index]!.host, vm.name);
    });

    test('the volume that one wrote to is read by another when it was let go', async () => {
      await volume('detach', 'home', 'lab-1');
      await free('home');
      await volume('attach', 'home', 'lab-2', '--read-only');
      const [, two] = await machinesOf('ada', 'lab');
      await ask(two!, textOf('home'), /=written-more=/);
    });
  });

  test('ended, all of it is released and accounted', async () => {
    await workspace('ada', 'end', 'lab');
    assert.deepEqual(await world.json('workspace', 'ls', ...grid.as('ada')), []);
    const usage = await grid.ask<{ running: boolean; seconds: number; cpuSeconds: number }[]>('ada', 'usage');
    assert.ok(usage.length > COUNT && usage.every(({ running, seconds }) => !running && seconds > 0));
    // Fails without `spent` in linkToBroker.
    assert.ok(
      usage.every(({ cpuSeconds }) => cpuSeconds > 0),
      JSON.stringify(usage),
    );
    const [lab] = (
      await grid.ask<{ name: string; vms: number; storedBytes: number }[]>(
        'ada',
        'usage',
        '--by',
        'workspace',
      )
    ).filter(({ name }) => name === 'lab');
    assert.equal(lab!.vms, COUNT);
    const volumes = await grid.ask<{ name: string; byteSeconds: number; storedBytes: number }[]>(
      ...(['ada', 'usage', '--by', 'volume'] as const),
    );
    for (const name of ['tables', 'home']) {
      const one = volumes.find((each) => each.name === name)!;
      assert.ok(one.byteSeconds > 4 * 2 ** 20 && one.storedBytes > 0, JSON.stringify(volumes));
    }
    const hosts = await grid.ask<HostInfo[]>('ada', 'hosts');
    assert.ok(hosts.every(({ vms, future }) => vms === 0 && future.memoryBytes === 2 ** 30));
    for (const name of ['tables', 'home']) {
      assert.equal((await volume('show', name)).state, 'free');
      await world.json('volume', 'rm', name, ...grid.as('ada'));
    }
    // What hosts had of them goes with them.
    await eventually(async () => {
      const clones = await Promise.all(
        HOSTS.map((host) => world.json<unknown[]>('clone', 'ls', '--proxy', host)),
      );
      return clones.flat().length === 0;
    });
  });
});
