/**
 * A program of its own beside each container, at home in its folder: `supervisor` reads run.json there. It holds what
 * must outlive the daemon and what the daemon must not do itself (the disk may lie on a mount that it serves):
 *
 *   the disk      locked, mounted at `root` through a loop device, in a mount namespace that ends with this process
 *   the console   a pseudoterminal; console.sock gives it to one client at a time, console.log has all it said
 *   the container systemd-nspawn, which ends with this process as well; up.json says its pid, exit.json how it ended
 */
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import {
  closeSync,
  constants,
  createReadStream,
  mkdirSync,
  openSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { GridError } from '../../core/errors.ts';
import { exitNow, ioctl, tryLock } from '../../core/linux.ts';
import { CONSOLE_LOG, CONSOLE_SOCKET, EXIT_FILE, ROOT, RUN_FILE, UP_FILE } from './folder.ts';
import type { ContainerExit, ContainerRun } from './folder.ts';

/** Linux's asm-generic/ioctls.h. */
const TIOCSPTLCK = 0x40045431;
const TIOCGPTN = 0x80045430;
const LOOK_MS = 5;
const UNMOUNT_TURNS = 100;
const UNMOUNT_TURN_MS = 20;

/** A pseudoterminal: our end, and the path of the other. */
function openTerminal(): { master: number; slave: string } {
  const master = openSync('/dev/ptmx', constants.O_RDWR | constants.O_NOCTTY);
  ioctl(master, TIOCSPTLCK, Buffer.alloc(4));
  const number = Buffer.alloc(4);
  ioctl(master, TIOCGPTN, number);
  return { master, slave: `/dev/pts/${number.readUInt32LE()}` };
}

function serveConsole(master: number): void {
  const log = openSync(CONSOLE_LOG, 'a', 0o600);
  let client: net.Socket | undefined;
  const server = net.createServer((socket) => {
    client?.destroy();
    client = socket;
    socket.on('data', (bytes: Buffer) => void writeSync(master, bytes));
    socket.on('error', () => socket.destroy());
    socket.once('close', () => {
      if (client === socket) client = undefined;
    });
  });
  server.listen(CONSOLE_SOCKET);
  const reading = createReadStream('', { fd: master, autoClose: false });
  reading.on('data', (bytes) => {
    writeSync(log, bytes as Buffer);
    client?.write(bytes);
  });
  reading.on('error', () => undefined);
}

function put(file: string, value: unknown): void {
  writeFileSync(`${file}.new`, JSON.stringify(value), { mode: 0o600 });
  renameSync(`${file}.new`, file);
}

/** systemd powers off on SIGRTMIN+4, busybox on SIGUSR2. */
function powerSignal(): string {
  try {
    return readlinkSync(`${ROOT}/sbin/init`).includes('systemd') ? 'SIGRTMIN+4' : 'SIGUSR2';
  } catch {
    return 'SIGRTMIN+4';
  }
}

/** `losetup` and `mount` say what is wrong in their last line. */
function run(program: string, args: readonly string[]): string {
  try {
    return execFileSync(program, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
  } catch (error) {
    const words = (error as { stderr?: string }).stderr?.trim().split('\n').at(-1);
    throw new GridError('vm-failed', `${program}: ${words || String(error)}`, { cause: error });
  }
}

function start(): void {
  const { disk, name, hostName, readOnly } = JSON.parse(readFileSync(RUN_FILE, 'utf8')) as ContainerRun;
  const lock = openSync(disk, 'r');
  if (!tryLock(lock)) {
    throw new GridError('vm-failed', `cannot lock the disk: another process using the image [${disk}]`);
  }
  mkdirSync(ROOT, { recursive: true });
  run('mount', ['-o', readOnly ? 'loop,ro' : 'loop', disk, ROOT]);
  const { master, slave } = openTerminal();
  serveConsole(master);
  // Held open: without it our end would fail whenever no shell has the other one.
  const other = openSync(slave, constants.O_RDWR | constants.O_NOCTTY);
  const child = spawn(
    'systemd-nspawn',
    [
      ...['--quiet', '--register=no', '--keep-unit', '--directory', ROOT, '--machine', name],
      ...[
        '--hostname',
        hostName,
        '--private-network',
        '--console=pipe',
        '--link-journal=no',
        '--timezone=off',
      ],
      ...['--resolv-conf=off', `--kill-signal=${powerSignal()}`],
      ...['--bind', `${slave}:/dev/console`, '--bind', `${slave}:/dev/ttyS0`],
      // Not --boot, which asks for an os-release.
      '/sbin/init',
    ],
    { stdio: [other, other, 'inherit'] },
  );
  child.once('error', (error) => end({ code: null, signal: null, reason: error.message }));
  let first: number | undefined;
  const look = setInterval(() => {
    first = firstProcessOf(child.pid!);
    if (first === undefined) return;
    clearInterval(look);
    put(UP_FILE, { pid: child.pid, first });
  }, LOOK_MS);
  child.once('exit', (code, signal) => {
    clearInterval(look);
    // It outlives a systemd-nspawn that was killed, and all processes of the container go with it.
    if (first !== undefined) killFirst(first);
    end({ code, signal });
  });
}

/** The container's first process: the child of systemd-nspawn that is number 1 in a pid namespace of its own. */
function firstProcessOf(pid: number): number | undefined {
  try {
    const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8')
      .trim()
      .split(' ')
      .filter(Boolean);
    return children
      .map(Number)
      .find((one) => /^NSpid:.*\s1$/m.test(readFileSync(`/proc/${one}/status`, 'utf8')));
  } catch {
    return undefined; // on its way in or out
  }
}

/** Unless its number belongs to another process by now. */
function killFirst(pid: number): void {
  try {
    if (/^NSpid:.*\s1$/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))) process.kill(pid, 'SIGKILL');
  } catch {
    // It is gone.
  }
}

function end(exit: ContainerExit): never {
  // The container's last processes may still be on their way out; what stays goes with this mount namespace.
  for (let turn = 0; turn < UNMOUNT_TURNS; turn++) {
    if (spawnSync('umount', [ROOT], { stdio: 'ignore' }).status === 0 || !isMounted()) break;
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, UNMOUNT_TURN_MS);
  }
  put(EXIT_FILE, exit);
  // A thread waits in a read of the terminal, for which process.exit would wait.
  exitNow(0);
  throw new GridError('bug', 'a process outlived its end');
}

function isMounted(): boolean {
  const place = path.resolve(ROOT);
  return readFileSync('/proc/self/mounts', 'utf8')
    .split('\n')
    .some((line) => line.split(' ')[1] === place);
}

// The container's processes write to the terminal for as long as they live.
for (const signal of ['SIGHUP', 'SIGINT', 'SIGTERM'] as const) process.on(signal, () => undefined);
rmSync(CONSOLE_SOCKET, { force: true });
closeSync(openSync(CONSOLE_LOG, 'w', 0o600));
try {
  start();
} catch (error) {
  end({ code: null, signal: null, reason: error instanceof Error ? error.message : String(error) });
}
