/** The interface of the host that is the other end of a machine's network device: made for it, put into a bridge. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { GridError } from '../../core/errors.ts';

const IP_TIMEOUT_MS = 10_000;

/** Named after the address, so that whoever adopts or ends the machine knows it. */
export function tapOf(macAddress: string): string {
  return `gv${macAddress.toLowerCase().replaceAll(':', '').slice(-10)}`;
}

async function ip(...args: string[]): Promise<string> {
  try {
    return (await promisify(execFile)('ip', args, { timeout: IP_TIMEOUT_MS })).stdout;
  } catch (error) {
    const { stderr } = error as { stderr?: string };
    throw new GridError('unsupported', `ip ${args.join(' ')}: ${stderr?.trim() || String(error)}`, {
      cause: error,
    });
  }
}

/** Throws not-found where there is no such bridge, and unsupported with ip's words: no permission, no ip. */
export async function makeTap(bridge: string, macAddress: string): Promise<string> {
  // Not by /sys, which is of the network namespace that it was mounted in.
  const bridges = JSON.parse((await ip('-json', 'link', 'show', 'type', 'bridge')) || '[]') as object[];
  if (!bridges.some((one) => 'ifname' in one && one.ifname === bridge)) {
    const list = '`ip link show type bridge` lists those that are there';
    throw new GridError('not-found', `this host has no bridge '${bridge}'; ${list}`);
  }
  const name = tapOf(macAddress);
  await ip('tuntap', 'add', 'dev', name, 'mode', 'tap');
  try {
    await ip('link', 'set', 'dev', name, 'master', bridge, 'up');
    return name;
  } catch (error) {
    await removeTap(macAddress);
    throw error;
  }
}

/** Removes it if it is there. */
export async function removeTap(macAddress: string): Promise<void> {
  await ip('link', 'delete', 'dev', tapOf(macAddress)).catch(() => undefined);
}
