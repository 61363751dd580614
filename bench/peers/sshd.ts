/**
 * A stock OpenSSH server on loopback for the peers to reach through the link: keys, port and configuration of its
 * own, nothing of the host's. As root, or as any user for that user alone.
 */
import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { freePort } from '../../src/core/ports.ts';
import { runProgram, startProgram } from './program.ts';

export interface Sshd {
  readonly port: number;
  readonly user: string;
  /** Private key that it lets in. */
  readonly identity: string;
  /** `ssh-ed25519 AAAA…`, for a known_hosts line. */
  readonly hostKey: string;
  stop(): Promise<void>;
}

/** `folder` is made and holds all of it; `listen` is the address it is reached at. Throws local-io with sshd's last words. */
export async function startSshd(folder: string, listen = '127.0.0.1'): Promise<Sshd> {
  await mkdir(folder, { mode: 0o700 });
  const hostKey = path.join(folder, 'host_key');
  const identity = path.join(folder, 'id_ed25519');
  for (const file of [hostKey, identity])
    await runProgram(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', '', '-f', file]);
  const authorized = path.join(folder, 'authorized_keys');
  await writeFile(authorized, await readFile(`${identity}.pub`));
  await chmod(authorized, 0o600);
  const port = await freePort();
  const config = path.join(folder, 'sshd_config');
  const lines = [
    `Port ${port}`,
    `ListenAddress ${listen}`,
    `HostKey ${hostKey}`,
    `AuthorizedKeysFile ${authorized}`,
    'PidFile none',
    'PermitRootLogin prohibit-password',
    'PasswordAuthentication no',
    'KbdInteractiveAuthentication no',
    'UsePAM no',
    // The folder may be below /tmp, which everybody can write.
    'StrictModes no',
    'Subsystem sftp internal-sftp',
  ];
  await writeFile(config, lines.join('\n') + '\n');
  if (process.getuid?.() === 0) await mkdir('/run/sshd', { recursive: true, mode: 0o755 });
  const server = await startProgram({
    command: ['/usr/sbin/sshd', '-D', '-e', '-f', config],
    isReady: () => answers(port),
  });
  return {
    port,
    user: os.userInfo().username,
    identity,
    hostKey: (await readFile(`${hostKey}.pub`, 'utf8')).trim(),
    stop: () => server.stop(),
  };
}

function answers(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect(port, '127.0.0.1');
    socket.once('data', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
  });
}
