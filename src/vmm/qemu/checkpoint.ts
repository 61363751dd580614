/**
 * A paused machine to files and back. Its memory is copied beside the device state, never through it: QEMU's
 * `xen-save-devices-state` (which needs no Xen) writes all devices and no memory, some 150 KB in milliseconds, and
 * that is loaded by the ordinary incoming migration. So a machine whose memory was mapped privately from an image is
 * captured like one that was booted; an ordinary migration would pull the whole image through the stream. Memory
 * beside the guest's own (firmware, option ROMs) has what QEMU put there at the start, from its own files.
 */
import { execFile } from 'node:child_process';
import { copyFile, readFile, rm, stat } from 'node:fs/promises';
import { once } from 'node:events';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGridError, GridError } from '../../core/errors.ts';
import { MIB } from '../../core/limits.ts';
import type { MachineCompatibility, MachineDescription } from '../../core/machine.ts';
import type { Accelerator } from './accelerator.ts';
import { INCOMING_SOCKET, processorOf } from './command-line.ts';
import type { QmpClient } from './qmp.ts';
import { connectSocket } from '../socket.ts';

/** A gibibyte takes about a second; a mount that does not answer must not hold a suspend for ever. */
const COPY_TIMEOUT_MS = 600_000;
const LOAD_TIMEOUT_MS = 60_000;
const LOAD_LOOK_MS = 2;
/** A machine with many disks has a few hundred KB. */
export const DEVICE_STATE_BYTES_MAX = 64 * MIB;
/** What QEMU writes it to, in the machine's folder: it reaches nothing else by a name that we give it. No name of a caller's. */
const STATE_FILE = 'device.state.written';

/** Writes the device state of a paused machine to `file`. */
export async function saveDeviceState(qmp: QmpClient, folder: string, file: string): Promise<void> {
  const written = path.join(folder, STATE_FILE);
  try {
    await qmp.execute('xen-save-devices-state', { filename: STATE_FILE, live: false });
    await copyFile(written, file);
  } finally {
    await rm(written, { force: true });
  }
}

/** Loads a device state into a QEMU that waits for it. Throws bad-format when QEMU does not take it. */
export async function loadDeviceState(qmp: QmpClient, folder: string, state: Uint8Array): Promise<void> {
  await qmp.execute('migrate-incoming', { uri: `unix:${INCOMING_SOCKET}` });
  const socket = await connectSocket(path.join(folder, INCOMING_SOCKET));
  try {
    // QEMU may close first when it does not like what it reads; its own word counts.
    socket.on('error', () => undefined);
    socket.end(state);
    const deadlineMs = performance.now() + LOAD_TIMEOUT_MS;
    for (;;) {
      const answer = (await qmp.execute('query-migrate')) as { status?: string; 'error-desc'?: string };
      if (answer.status === 'completed') return;
      if (answer.status === 'failed') {
        throw new GridError(
          'bad-format',
          `QEMU does not take the device state: ${answer['error-desc'] ?? 'no reason'}`,
        );
      }
      if (performance.now() > deadlineMs)
        throw new GridError('timeout', 'QEMU does not end reading the device state');
      await sleep(LOAD_LOOK_MS);
    }
  } catch (error) {
    // QEMU ends when it cannot read one, with the reason.
    if (!(error instanceof GridError) || error.code !== 'vm-failed') throw error;
    throw new GridError('bad-format', `QEMU does not take the device state: ${error.message}`, {
      cause: error,
    });
  } finally {
    socket.destroy();
  }
}

/** Bounded, whole. Throws not-found, bad-format. */
export async function readDeviceState(file: string): Promise<Buffer> {
  try {
    const { size } = await stat(file);
    if (size === 0 || size > DEVICE_STATE_BYTES_MAX)
      throw new GridError('bad-format', `the device state ${file} has ${size} bytes`);
    return await readFile(file);
  } catch (error) {
    throw asGridError(error, `the device state ${file} cannot be read`);
  }
}

/** Copies the memory of a paused machine (see memory-copy.ts). Resolves with the bytes written. */
export async function copyMemory(
  pid: number,
  description: MachineDescription,
  target: string,
  image: string | undefined,
): Promise<number> {
  const program = path.join(import.meta.dirname, `memory-copy${path.extname(import.meta.filename)}`);
  const args = [
    program,
    String(pid),
    String(description.memoryBytes),
    target,
    ...(image === undefined ? [] : [image]),
  ];
  const child = execFile(process.execPath, args, { timeout: COPY_TIMEOUT_MS, killSignal: 'SIGKILL' });
  let [output, errors] = ['', ''];
  child.stdout!.on('data', (text: string) => (output += text));
  child.stderr!.on('data', (text: string) => (errors += text));
  const [code] = (await once(child, 'close')) as [number | null];
  if (code === 0) return (JSON.parse(output) as { writtenBytes: number }).writtenBytes;
  const noSpace = /ENOSPC/.test(errors);
  throw new GridError(
    noSpace ? 'no-space' : 'local-io',
    `the memory of ${description.name} cannot be written to ${target}: ${errors.trim().split('\n').at(-1) || 'it took too long'}`,
  );
}

/** What a machine that runs now can be loaded into again. */
export async function compatibilityOf(
  qmp: QmpClient,
  accelerator: Accelerator,
): Promise<MachineCompatibility> {
  const type = (await qmp.execute('qom-get', { path: '/machine', property: 'type' })) as string;
  const { qemu } = (await qmp.execute('query-version')) as {
    qemu: Record<'major' | 'minor' | 'micro', number>;
  };
  return {
    vmm: 'qemu',
    machine: type.replace(/-machine$/, ''),
    version: `${qemu.major}.${qemu.minor}.${qemu.micro}`,
    accelerator,
    processor: await processorFor(accelerator),
  };
}

/** The guest saw the host's own processor under KVM. */
async function processorFor(accelerator: Accelerator): Promise<string> {
  if (accelerator === 'tcg') return processorOf(accelerator);
  const model = /^model name\s*:\s*(.+)$/m.exec(await readFile('/proc/cpuinfo', 'utf8'));
  return `${processorOf(accelerator)}: ${model?.[1] ?? 'unknown'}`;
}

/** Refuses what was captured elsewhere and cannot run here; the machine type is QEMU's own to refuse. */
export async function checkCompatibility(
  captured: MachineCompatibility,
  here: Accelerator,
  name: string,
): Promise<void> {
  const refuse = (what: string, was: string, is: string): never => {
    throw new GridError('unsupported', `${name} was captured with ${what} ${was}; here it would be ${is}`);
  };
  if (captured.vmm !== 'qemu') refuse('the Vmm', captured.vmm, 'qemu');
  // The machine type becomes part of an option.
  if (!/^[a-z0-9.-]+$/.test(captured.machine)) {
    throw new GridError('bad-format', `${name} was captured with a malformed machine type`);
  }
  if (captured.accelerator !== here) refuse('accelerator', captured.accelerator, here);
  const processor = await processorFor(here);
  if (captured.processor !== processor) refuse('processor', captured.processor, processor);
}
