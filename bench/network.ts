/**
 * Virtual networks: what the switch carries, in megabits a second, in one run, interleaved, medians.
 *
 * processes: two programs that speak QEMU's format, through one host's switch, and through two hosts' switches with a
 *   channel of an ssh tunnel, or a broker that both reach by TLS, between them. All of these are processes of their own.
 * guests: two small guests (emulated) that have a network device for each of these, and one more for QEMU's own socket
 *   netdev between them. What is measured is a TCP connection's bytes, from one guest's dd to the other's, until
 *   the other has had all; `ratio` is to QEMU's own netdev with the same frame size in the same run.
 */
import { spawn, spawnSync } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { table } from '../src/cli/kit.ts';
import { freePort } from '../src/core/ports.ts';
import { buildGuest, guestCacheFolder } from './guest/build.ts';
import type { BuiltGuest } from './guest/build.ts';
import { startService } from './lib/child.ts';
import type { Service } from './lib/child.ts';
import { hostFacts, median } from './lib/facts.ts';

const { values } = parseArgs({
  options: {
    runs: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '2' },
    only: { type: 'string' },
    json: { type: 'string' },
  },
});
const runs = Number(values.runs);
const seconds = Number(values.seconds);
const folder = mkdtempSync(path.join(os.tmpdir(), 'gridvfs-network-'));
const say = (text: string) => process.stderr.write(`${text}\n`);
const at = (name: string) => path.join(folder, name);

interface Row {
  case: string;
  subject: string;
  frameBytes: number;
  value: number;
  unit: 'Mbit/s';
  runs: number[];
  ratio?: number;
}

const services: Service[] = [];
const machines: ChildProcess[] = [];
const start = async (role: string, name: string) => {
  const service = await startService('bench/lib/network-part.ts', [role, name]);
  services.push(service);
  return service;
};
const tell = (service: Service, command: object) => service.ask(JSON.stringify(command));

/** What lies between two machines, by network. */
const WAYS = [
  ['near', 'one switch'],
  ['far', 'two switches, ssh tunnel'],
  ['star', 'two switches, broker by TLS'],
] as const;

/** Two hosts, with a tunnel between them for network `far` and a broker in the middle for `star`. */
async function startHosts(): Promise<[Service, Service]> {
  const [one, two] = [await start('host', 'one'), await start('host', 'two')];
  const { port } = await tell(two, { listen: true });
  await tell(one, { connect: { port, network: 'far' } });
  const [key, cert] = [at('broker.key'), at('broker.crt')];
  const made = spawnSync('openssl', [
    ...['req', '-x509', '-nodes', '-days', '2', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1'],
    ...['-subj', '/CN=broker', '-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', key, '-out', cert],
  ]);
  if (made.status !== 0) throw new Error(`openssl: ${String(made.stderr)}`);
  const broker = await start('broker', 'broker');
  const served = await tell(broker, { serve: { network: 'star', key, cert } });
  for (const host of [one, two]) await tell(host, { reach: { port: served['port'], network: 'star', cert } });
  return [one, two];
}

const MACS = ['52:54:00:00:00:01', '52:54:00:00:00:02'] as const;

async function processes(one: Service, two: Service): Promise<Row[]> {
  const subjects: { name: string; source: Service; sink: Service }[] = [];
  for (const [network, name] of WAYS) {
    const other = network === 'near' ? one : two;
    const [source, sink] = [at(`${network}-a`), at(`${network}-b`)];
    const pair = { name, source: await start('machine', source), sink: await start('machine', sink) };
    await tell(one, { plug: { network, machine: 'source', socket: source } });
    await tell(other, { plug: { network, machine: 'sink', socket: sink } });
    await tell(pair.sink, { say: MACS[1] });
    subjects.push(pair);
  }
  await sleep(500);
  const measured = new Map<string, number[]>();
  for (let run = 0; run < runs; run++) {
    for (const frameBytes of [1514, 9014]) {
      for (const { name, source, sink } of subjects) {
        const before = Number((await tell(sink, { count: true }))['received']);
        const startMs = performance.now();
        await tell(source, { send: { to: MACS[1], from: MACS[0], seconds, frameBytes } });
        const after = Number((await tell(sink, { count: true }))['received']);
        const value = ((after - before) * 8) / (performance.now() - startMs) / 1000;
        const key = JSON.stringify([name, frameBytes]);
        measured.set(key, [...(measured.get(key) ?? []), value]);
        say(`processes, ${name}, ${frameBytes}: ${value.toFixed(0)} Mbit/s`);
        await sleep(100);
      }
    }
  }
  return [...measured].map(([key, all]) => {
    const [subject, frameBytes] = JSON.parse(key) as [string, number];
    return { case: 'processes', subject, frameBytes, value: median(all), unit: 'Mbit/s', runs: all };
  });
}

/** A guest's console. */
class Console {
  readonly #socket: net.Socket;
  #text = '';

  constructor(socket: net.Socket) {
    this.#socket = socket;
    socket.on('data', (piece: Buffer) => (this.#text += piece.toString('latin1')));
  }

  static async open(file: string): Promise<Console> {
    for (let attempt = 0; ; attempt++) {
      const socket = net.connect(file);
      try {
        await new Promise((resolve, reject) => socket.once('connect', resolve).once('error', reject));
        return new Console(socket);
      } catch (error) {
        if (attempt > 200) throw error;
        await sleep(50);
      }
    }
  }

  async seen(text: string, timeoutMs = 60_000): Promise<void> {
    const endMs = performance.now() + timeoutMs;
    while (!this.#text.includes(text)) {
      if (performance.now() > endMs)
        throw new Error(`no '${text}'; the guest said ${this.#text.slice(-400)}`);
      await sleep(2);
    }
  }

  #count = 0;

  /** Runs a command, waits for its end, and gives what was seen until then, the command itself among it. */
  async run(command: string, timeoutMs?: number): Promise<string> {
    const mark = `end-${this.#count++}`;
    this.#text = '';
    // In two parts, so that the echo of the line is not taken for its output.
    this.#socket.write(`${command}; echo "${mark.slice(0, 3)}""${mark.slice(3)}"\n`);
    await this.seen(mark, timeoutMs);
    return this.#text;
  }
}

function startGuest(guest: BuiltGuest, index: number, netdevs: readonly string[]): Promise<Console> {
  const console = at(`console-${index}`);
  const args = [
    ...['-nodefaults', '-display', 'none', '-machine', 'pc,usb=off', '-accel', 'tcg,thread=multi'],
    ...['-cpu', 'max,la57=off', '-m', '128M', '-kernel', guest.kernel, '-initrd', guest.initrd],
    ...['-append', guest.commandLine, '-drive', `file=${guest.disk},format=raw,if=virtio,snapshot=on`],
    ...['-chardev', `socket,id=console,path=${console},server=on,wait=off`, '-serial', 'chardev:console'],
    ...netdevs.flatMap((netdev, at) => [
      '-netdev',
      `${netdev},id=net${at}`,
      '-device',
      `virtio-net-pci,netdev=net${at},mac=52:54:00:00:0${at}:0${index + 1}`,
    ]),
  ];
  machines.push(spawn('qemu-system-x86_64', args, { stdio: ['ignore', 'ignore', 'inherit'] }));
  return Console.open(console);
}

/** What a guest's device has had, headers included. */
async function receivedBytes(guest: Console, device: number): Promise<number> {
  const text = await guest.run(`echo "had=$(cat /sys/class/net/eth${device}/statistics/rx_bytes)="`);
  return Number(/had=(\d+)=/.exec(text)?.[1]);
}

/** For one measurement. */
const MEGABYTES = 32;

async function guests(one: Service, two: Service): Promise<Row[]> {
  const guest = await buildGuest({
    guest: 'small',
    folder: path.join(guestCacheFolder(), 'small'),
    progress: say,
  });
  const port = await freePort();
  const stream = (name: string) => `stream,server=on,addr.type=unix,addr.path=${at(name)}`;
  const consoles: Console[] = [];
  for (const [index, own] of [
    `socket,listen=127.0.0.1:${port}`,
    `socket,connect=127.0.0.1:${port}`,
  ].entries()) {
    const ways = WAYS.map(([network]) => [network, `${network}-guest-${index}`] as const);
    consoles.push(await startGuest(guest, index, [own, ...ways.map(([, name]) => stream(name))]));
    for (const [network, name] of ways) {
      const host = network === 'near' || index === 0 ? one : two;
      await tell(host, { plug: { network, machine: `guest-${index}`, socket: at(name) } });
    }
  }
  const [near, far] = consoles as [Console, Console];
  for (const [index, console] of consoles.entries()) {
    await console.seen(guest.readyText, 120_000);
    await sleep(2_000); // its network modules come after that line
    await console.run('killall udhcpc; true');
    for (const at of [0, ...WAYS.keys().map((way) => way + 1)]) {
      await console.run(`ifconfig eth${at} 10.9.${at}.${index + 1} netmask 255.255.255.0 up`);
    }
  }
  const subjects = ['QEMU socket netdev', ...WAYS.map(([, subject]) => subject)];
  const measured = new Map<string, number[]>();
  for (let run = 0; run < runs; run++) {
    for (const mtu of [1500, 9000]) {
      for (const [at, subject] of subjects.entries()) {
        for (const console of consoles) await console.run(`ifconfig eth${at} mtu ${mtu}`);
        // dd on the sockets themselves: nc would carry some kilobytes a call, and be what is measured.
        const before = await receivedBytes(far, at);
        const received = far.run('nc -l -p 5000 -e dd of=/dev/null bs=64k', 120_000);
        await sleep(300);
        const bytes = MEGABYTES * 2 ** 20;
        const startMs = performance.now();
        await near.run(`nc 10.9.${at}.2 5000 -e dd if=/dev/zero bs=64k count=${bytes / 65_536}`, 120_000);
        await received;
        const elapsedMs = performance.now() - startMs;
        const came = (await receivedBytes(far, at)) - before;
        if (came < bytes) throw new Error(`over ${subject} came ${came} bytes of ${bytes}`);
        const value = (bytes * 8) / elapsedMs / 1000;
        const key = JSON.stringify([subject, mtu + 14]);
        measured.set(key, [...(measured.get(key) ?? []), value]);
        say(`guests, ${subject}, ${mtu + 14}: ${value.toFixed(0)} Mbit/s`);
      }
    }
  }
  const rows = [...measured].map(([key, all]): Row => {
    const [subject, frameBytes] = JSON.parse(key) as [string, number];
    return { case: 'guests', subject, frameBytes, value: median(all), unit: 'Mbit/s', runs: all };
  });
  for (const row of rows) {
    const own = rows.find((one) => one.frameBytes === row.frameBytes && one.subject === subjects[0])!;
    if (own !== row) row.ratio = median(row.runs.map((value, run) => value / own.runs[run]!));
  }
  return rows;
}

try {
  const [one, two] = await startHosts();
  const rows: Row[] = [];
  if (values.only !== 'guests') rows.push(...(await processes(one, two)));
  if (values.only !== 'processes') rows.push(...(await guests(one, two)));
  process.stdout.write(
    table(
      ['CASE', 'SUBJECT', 'FRAME', 'MBIT/S', 'OF QEMU'],
      rows.map((row) => [
        row.case,
        row.subject,
        row.frameBytes,
        row.value.toFixed(0),
        row.ratio?.toFixed(2) ?? '-',
      ]),
    ) + '\n',
  );
  if (values.json !== undefined) {
    writeFileSync(values.json, JSON.stringify({ schema: 1, host: hostFacts('tcg'), rows }, null, 2) + '\n');
  }
} finally {
  for (const machine of machines) machine.kill('SIGKILL');
  for (const service of services) await service.stop().catch(() => undefined);
  rmSync(folder, { recursive: true, force: true });
}
process.exit(process.exitCode ?? 0);
