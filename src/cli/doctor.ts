/** gridvfs doctor: what this host can do, found by trying, and what to install where it cannot. */
import { spawnSync } from 'node:child_process';
import { accessSync, constants, existsSync, readFileSync } from 'node:fs';
import os from 'node:os';
import type { Command } from 'commander';
import { errnoOf } from '../core/errors.ts';
import { isRoot } from '../core/linux.ts';
import { loadFuseNative } from '../frontend/fuse/index.ts';
import { createContainers, createQemu } from '../vmm/index.ts';
import { jsonOption, show, verb } from './kit.ts';

type Verdict = 'ok' | 'limited' | 'missing';

interface Finding {
  readonly what: string;
  readonly verdict: Verdict;
  /** What was found. */
  readonly detail: string;
  /** What to do about it. */
  readonly advice?: string;
  /** What does not work without it. */
  readonly needed: 'mount' | 'vm' | 'import' | 'ssh' | 'speed';
}

export function doctorVerb(): Command {
  return verb(
    'doctor',
    'Say what this host can do (FUSE, KVM, QEMU, ssh) and what to install. Exit code 1 when mounting is impossible.',
    ['gridvfs doctor'],
  )
    .addOption(jsonOption())
    .action(async (options: { json?: boolean }) => {
      const findings = [
        node(),
        kernel(),
        fuse(),
        fuseNative(),
        privilege(),
        await qemu(),
        kvm(),
        await containers(),
        qemuImg(),
        ssh(),
      ];
      show(options, { findings }, () =>
        findings
          .map(
            ({ what, verdict, detail, advice }) =>
              `${verdict.padEnd(8)}${what}: ${detail}${advice === undefined ? '' : `\n          → ${advice}`}`,
          )
          .join('\n'),
      );
      if (findings.some(({ verdict, needed }) => verdict === 'missing' && needed === 'mount'))
        process.exitCode = 1;
    });
}

function node(): Finding {
  return { what: 'node', verdict: 'ok', detail: `${process.version} on ${os.arch()}`, needed: 'mount' };
}

/** FUSE passthrough came with Linux 6.9. */
function kernel(): Finding {
  const [major = 0, minor = 0] = os.release().split('.').map(Number);
  const passthrough = major > 6 || (major === 6 && minor >= 9);
  return {
    what: 'kernel',
    verdict: passthrough ? 'ok' : 'limited',
    detail: os.release(),
    needed: 'speed',
    ...(passthrough
      ? {}
      : { advice: 'Linux 6.9 or newer lets wholly local images be read at the speed of the disk' }),
  };
}

function fuse(): Finding {
  const found = { what: 'fuse', needed: 'mount' as const };
  if (!existsSync('/dev/fuse')) {
    return {
      ...found,
      verdict: 'missing',
      detail: '/dev/fuse is not there',
      advice: 'modprobe fuse; in a container, pass --device /dev/fuse',
    };
  }
  try {
    accessSync('/dev/fuse', constants.R_OK | constants.W_OK);
  } catch (error) {
    return {
      ...found,
      verdict: 'missing',
      detail: `/dev/fuse cannot be opened (${errnoOf(error) ?? 'refused'})`,
      advice: 'chmod 666 /dev/fuse (udev does so on most hosts), or run as root',
    };
  }
  return { ...found, verdict: 'ok', detail: '/dev/fuse can be opened' };
}

/** The other driver: nobody needs it where the first works. */
function fuseNative(): Finding {
  const found = { what: 'fuse-native', needed: 'speed' as const };
  try {
    loadFuseNative();
  } catch (error) {
    return {
      ...found,
      verdict: 'limited',
      detail: 'the portable driver cannot be loaded; the kernel driver does not need it',
      advice: (error as Error).message,
    };
  }
  return {
    ...found,
    verdict: 'ok',
    detail:
      'the portable driver (--driver fuse-native) can be loaded; it has no passthrough, no requests over 128 KiB, no hole punching, and its mount ends with its proxy',
  };
}

/** Root mounts by itself; users through fusermount3, with less. */
function privilege(): Finding {
  const found = { what: 'privilege', needed: 'mount' as const };
  if (isRoot()) return { ...found, verdict: 'ok', detail: 'root' };
  const user = `user ${os.userInfo().username}`;
  const helper = firstLine('fusermount3', ['--version']);
  if (helper === undefined) {
    return {
      ...found,
      verdict: 'missing',
      detail: `${user}, and no fusermount3`,
      advice: 'apt-get install fuse3, or run as root',
    };
  }
  return {
    ...found,
    verdict: 'limited',
    detail: `${user}: mounts through ${helper}, without passthrough, and for this user alone unless /etc/fuse.conf says user_allow_other`,
    advice: 'run as root for passthrough',
  };
}

async function qemu(): Promise<Finding> {
  const { usable, accelerator, reason } = await createQemu({ accelerator: 'auto' }).probe();
  const version = firstLine('qemu-system-x86_64', ['--version']);
  return usable
    ? {
        what: 'qemu',
        verdict: 'ok',
        detail: `${version ?? 'found'}, VMs run under ${accelerator ?? 'tcg'}`,
        needed: 'vm',
      }
    : {
        what: 'qemu',
        verdict: 'missing',
        detail: reason ?? 'not found',
        advice: 'apt-get install qemu-system-x86',
        needed: 'vm',
      };
}

/** /dev/kvm alone proves nothing: under some hosts it opens and then hangs stock kernels. */
function kvm(): Finding {
  const flags = /\b(vmx|svm)\b/.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1];
  if (flags !== undefined && existsSync('/dev/kvm'))
    return { what: 'kvm', verdict: 'ok', detail: `/dev/kvm, ${flags}`, needed: 'speed' };
  return {
    what: 'kvm',
    verdict: 'limited',
    detail: existsSync('/dev/kvm')
      ? '/dev/kvm is there, but the processor shows neither vmx nor svm'
      : '/dev/kvm is not there',
    advice: 'VMs run under emulation (TCG), several times slower; use a host with hardware virtualization',
    needed: 'speed',
  };
}

/** For `vm run --vmm container`. */
async function containers(): Promise<Finding> {
  const found = { what: 'containers', needed: 'vm' as const };
  const { usable, reason = '' } = await createContainers().probe();
  if (usable)
    return { ...found, verdict: 'ok', detail: firstLine('systemd-nspawn', ['--version']) ?? reason };
  return {
    ...found,
    verdict: 'limited',
    detail: reason,
    advice: 'as root: apt-get install systemd-container; only --vmm container needs it',
  };
}

function qemuImg(): Finding {
  const version = firstLine('qemu-img', ['--version']);
  return version !== undefined
    ? { what: 'qemu-img', verdict: 'ok', detail: version, needed: 'import' }
    : {
        what: 'qemu-img',
        verdict: 'limited',
        detail: 'not found: only raw images can be imported',
        advice: 'apt-get install qemu-utils',
        needed: 'import',
      };
}

function ssh(): Finding {
  const version = firstLine('ssh', ['-V']);
  return {
    what: 'ssh',
    verdict: 'ok',
    detail:
      version === undefined
        ? 'built in (no OpenSSH client here, none is needed)'
        : `built in; this host also has ${version}`,
    needed: 'ssh',
  };
}

function firstLine(command: string, args: string[]): string | undefined {
  const result = spawnSync(command, args, { encoding: 'utf8', timeout: 5000 });
  if (result.error || result.status !== 0) return undefined;
  return (result.stdout || result.stderr).split('\n')[0];
}
