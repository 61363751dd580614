/**
 * Records the trace of a guest's boots: `node bench/traces/record.ts --guest debian --out FILE`.
 *
 * QEMU runs with the very arguments that gridvfs gives it, but for the disk's file, which is nbdkit with three
 * filters: log (what is asked, when, and when it was answered), delay, and cow (the guest's writes are thrown away).
 * The delay is there because a guest asks more at once of a slow disk than of a fast one: its read-ahead and its
 * parallel services pile up while the first read is under way. A trace from a disk of microseconds would be one
 * read after the other, which is not what a disk behind a link is asked.
 *
 * A boot ends TAIL_MS after the guest said that it is ready. Between boots the host name, the MAC and the machine id
 * change, and the seed comes from the host's generator.
 */
import { randomBytes } from 'node:crypto';
import { spawn } from 'node:child_process';
import { mkdir, mkdtemp, open, readFile, rename, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { GridError } from '../../src/core/errors.ts';
import { createQemu } from '../../src/vmm/index.ts';
import { CONSOLE_LOG, qemuArguments } from '../../src/vmm/qemu/command-line.ts';
import { ConsoleWatch, lastWords } from '../../src/vmm/console.ts';
import { buildGuest, guestCacheFolder } from '../guest/build.ts';
import type { BuiltGuest, GuestName } from '../guest/build.ts';
import { hostFacts } from '../lib/facts.ts';
import { startProgram } from '../peers/program.ts';
import { encodeTrace, parseTrace } from './format.ts';
import type { Boot, BootIdentity, Trace } from './format.ts';
import { readsOfLog } from './nbdkit-log.ts';

const LATENCY_MS = 30;
/** A guest's services read a little on while the last of them reports ready. */
export const TAIL_MS = 3_000;
const READY_TIMEOUT_MS = 600_000;

/** Two machines that never were one. */
const MACHINES = [
  { hostname: 'alder', macAddress: '52:54:00:a1:00:01' },
  { hostname: 'birch-02', macAddress: '52:54:00:b2:00:02' },
] as const;

async function recordBoot(
  guest: BuiltGuest,
  identity: BootIdentity,
  folder: string,
  signal: AbortSignal,
): Promise<Boot> {
  await using stack = new AsyncDisposableStack();
  await mkdir(folder);
  const socket = path.join(folder, 'disk.sock');
  const log = path.join(folder, 'disk.log');
  const nbdkit = await startProgram({
    command: [
      ...['nbdkit', '--foreground', '--unix', socket, '--filter=log', '--filter=delay', '--filter=cow'],
      ...['file', guest.disk, `logfile=${log}`, `rdelay=${LATENCY_MS}ms`],
    ],
    isReady: async () => (await readFile(log, 'utf8').catch(() => '')).includes('Ready'),
  });
  stack.defer(() => nbdkit.stop());
  const args = qemuArguments(
    {
      name: identity.hostname,
      vcpus: 1,
      memoryBytes: guest.memoryBytes,
      disks: [{ path: guest.disk, format: 'raw', readOnly: false }],
      boot: {
        kernel: guest.kernel,
        initrd: guest.initrd,
        commandLine: `${guest.commandLine} systemd.hostname=${identity.hostname} systemd.machine_id=${identity.machineId}`,
      },
      macAddress: identity.macAddress,
      network: 'user',
      readyText: guest.readyText,
    },
    { accelerator: identity.accelerator === 'kvm' ? 'kvm' : 'tcg' },
  );
  const at = args.indexOf('-blockdev') + 1;
  const disk = JSON.parse(args[at]!) as Record<string, unknown>;
  args[at] = JSON.stringify({ ...disk, file: { driver: 'nbd', server: { type: 'unix', path: socket } } });
  const consoleLog = path.join(folder, CONSOLE_LOG);
  await writeFile(consoleLog, '');
  const messages = await open(path.join(folder, 'qemu.log'), 'w');
  stack.defer(() => messages.close());
  const qemu = spawn('qemu-system-x86_64', args, {
    cwd: folder,
    detached: true,
    stdio: ['ignore', messages.fd, messages.fd],
  });
  const ended = new Promise<void>((resolve, reject) => {
    qemu.once('error', reject);
    qemu.once('exit', () => resolve());
  });
  stack.defer(async () => {
    qemu.kill('SIGKILL');
    await ended;
  });
  const watch = new ConsoleWatch(consoleLog, guest.readyText);
  stack.defer(() => watch.close());
  const outcome = await Promise.race([
    watch.outcome,
    ended,
    sleep(READY_TIMEOUT_MS, undefined, { signal, ref: false }),
  ]);
  if (outcome !== 'ready') {
    const words = (await lastWords(path.join(folder, 'qemu.log'), 2)) || (await lastWords(consoleLog, 2));
    throw new GridError(
      'vm-failed',
      `${guest.name} did not boot for the trace: ${words || 'it said nothing'}`,
    );
  }
  await sleep(TAIL_MS, undefined, { signal });
  qemu.kill('SIGKILL');
  await ended;
  await nbdkit.stop();
  return { identity, reads: readsOfLog(await readFile(log, 'utf8')) };
}

/** Boots the guest twice and returns the trace of both. Throws unsupported, vm-failed; abort rejects. */
export async function recordTrace(
  guest: BuiltGuest,
  options: { readonly progress: (line: string) => void; readonly signal: AbortSignal },
): Promise<Trace> {
  const { accelerator, usable, reason } = await createQemu({ accelerator: 'auto' }).probe();
  if (!usable) throw new GridError('unsupported', `no VM can run here: ${reason ?? 'no reason given'}`);
  const folder = await mkdtemp(path.join(os.tmpdir(), 'gridvfs-trace-'));
  try {
    const boots: Boot[] = [];
    for (const [index, machine] of MACHINES.entries()) {
      options.progress(`trace: booting ${guest.name} as ${machine.hostname} over a disk of ${LATENCY_MS} ms`);
      const identity: BootIdentity = {
        ...machine,
        machineId: randomBytes(16).toString('hex'),
        accelerator: accelerator ?? 'tcg',
      };
      boots.push(await recordBoot(guest, identity, path.join(folder, String(index)), options.signal));
    }
    return {
      guest: guest.name,
      disk: guest.sha256.disk,
      sizeBytes: guest.sizeBytes,
      latencyMs: LATENCY_MS,
      qemu: hostFacts('').qemu,
      boots,
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

async function traceIn(file: string, guest: BuiltGuest): Promise<Trace | undefined> {
  const text = await readFile(file, 'utf8').catch(() => undefined);
  if (text === undefined) return undefined;
  const trace = parseTrace(text);
  return trace.disk === guest.sha256.disk ? trace : undefined;
}

/**
 * The trace of this very disk and where it lies: the one that ships with the bench, or one recorded here before,
 * or one recorded now and kept beside the guest.
 */
export async function traceOf(
  guest: BuiltGuest,
  options: { readonly progress: (line: string) => void; readonly signal: AbortSignal },
): Promise<{ trace: Trace; file: string; origin: 'shipped' | 'kept' | 'recorded' }> {
  const shipped = path.join(import.meta.dirname, `${guest.name}-boot.trace`);
  const kept = path.join(path.dirname(guest.folder), `${guest.name}-boot.trace`);
  for (const [file, origin] of [
    [shipped, 'shipped'],
    [kept, 'kept'],
  ] as const) {
    const trace = await traceIn(file, guest);
    if (trace) return { trace, file, origin };
  }
  const trace = await recordTrace(guest, options);
  await writeTrace(kept, trace);
  return { trace, file: kept, origin: 'recorded' };
}

async function writeTrace(file: string, trace: Trace): Promise<void> {
  await writeFile(`${file}.new`, encodeTrace(trace));
  await rename(`${file}.new`, file);
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: { guest: { type: 'string', default: 'debian' }, out: { type: 'string' } },
  });
  if (values.guest !== 'small' && values.guest !== 'debian') throw new RangeError('--guest small|debian');
  const name: GuestName = values.guest;
  const aborter = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => aborter.abort());
  const progress = (line: string) => void process.stderr.write(`${line}\n`);
  const folder = path.join(guestCacheFolder(), name);
  const guest = await buildGuest({ guest: name, folder, signal: aborter.signal, progress });
  const trace = await recordTrace(guest, { progress, signal: aborter.signal });
  const out = values.out ?? path.join(import.meta.dirname, `${name}-boot.trace`);
  await writeTrace(out, trace);
  progress(`${out}: ${trace.boots.map((boot) => `${boot.reads.length} reads`).join(', ')}`);
}

if (import.meta.main) await main();
