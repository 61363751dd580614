/**
 * The full guest: Debian 12 with everything of priority important, systemd to multi-user.target, sshd, networkd,
 * and the stock cloud kernel, on a 2 GiB ext4 disk; made by mmdebstrap, which needs root. Kernel and modules are
 * those of the disk; the initramfs is ours (the guest has none of its own: it would be 15 MB that nobody reads).
 *
 * Ready means that multi-user.target is reached. On ttyS0 root is logged in; `ping WORD` answers `pong WORD` there.
 * Timers that would go off in the first minutes of an image's life are off, and ssh host keys are made at the first
 * start, so that no two machines share them. Built twice from the same archive, it is the same to the last byte.
 */
import { chmod, cp, mkdir, readdir, rm, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { GridError } from '../../src/core/errors.ts';
import { GIB, MIB } from '../../src/core/limits.ts';
import { isRoot } from '../../src/core/linux.ts';
import { ANSWER, SEED } from './answer.ts';
import type { Recipe } from './build.ts';
import { EPOCH_SECONDS, makeDisk, run } from './host.ts';
import { rootInitramfs } from './initramfs.ts';

const SUITE = 'bookworm';
const READY = 'guest-ready: debian';
const PACKAGES = [
  ...['linux-image-cloud-amd64', 'systemd-sysv', 'dbus', 'openssh-server', 'busybox-static'],
  'qemu-guest-agent',
];

const FILES: Record<string, string> = {
  'etc/hostname': 'guest\n',
  'etc/hosts': '127.0.0.1 localhost\n127.0.1.1 guest\n',
  'etc/fstab': '/dev/vda / ext4 errors=remount-ro 0 1\n',
  // The name server of QEMU's user network.
  'etc/resolv.conf': 'nameserver 10.0.2.3\n',
  'etc/systemd/network/50-dhcp.network': '[Match]\nName=en*\n\n[Network]\nDHCP=yes\n',
  'etc/systemd/system/guest-ready.service': `[Unit]
Description=Say on the console that multi-user.target is reached
DefaultDependencies=no
After=multi-user.target
Conflicts=shutdown.target

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo "${READY}" > /dev/ttyS0'
`,
  'etc/systemd/system/answer.service': `[Unit]
Description=Answer the host on ttyS1

[Service]
ExecStart=/bin/sh /usr/local/sbin/answer
`,
  'etc/systemd/system/seed.service': `[Unit]
Description=Take host name and keys from a seed
ConditionPathExistsGlob=/dev/vd[b-z]
Before=ssh.service

[Service]
Type=oneshot
ExecStart=/bin/sh /usr/local/sbin/seed
`,
  'usr/local/sbin/answer': ANSWER,
  'usr/local/sbin/seed': `for disk in /dev/vd[b-z]; do
  blkid -o value -s LABEL $disk | grep -qx cidata || continue
  mount -t iso9660 -o ro $disk /mnt && sh /usr/local/sbin/take-seed; umount /mnt
done
`,
  'usr/local/sbin/take-seed': SEED,
  'etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf': `[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I vt102
`,
  'etc/systemd/system/ssh.service.d/keys.conf': `[Service]
ExecStartPre=
ExecStartPre=/bin/sh -c 'test -e /etc/ssh/ssh_host_ed25519_key || ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key'
ExecStartPre=/usr/sbin/sshd -t
`,
  'etc/ssh/sshd_config.d/keys.conf': 'HostKey /etc/ssh/ssh_host_ed25519_key\n',
  'etc/profile.d/console.sh': `if [ "$(tty)" = /dev/ttyS0 ]; then
  PS1='# '
  ping() { echo "pong $*"; }
  [ -z "$BASH_VERSION" ] || bind 'set enable-bracketed-paste off'
fi
`,
};

/** Units started by a link in a folder NAME.wants. */
const WANTED: Record<string, string> = {
  'etc/systemd/system/multi-user.target.wants/answer.service': '/etc/systemd/system/answer.service',
  'etc/systemd/system/multi-user.target.wants/seed.service': '/etc/systemd/system/seed.service',
  'etc/systemd/system/multi-user.target.wants/guest-ready.service': '/etc/systemd/system/guest-ready.service',
  'etc/systemd/system/multi-user.target.wants/systemd-networkd.service':
    '/lib/systemd/system/systemd-networkd.service',
};

const REMOVED = [
  // Its disk is no LVM volume, and networkd does what ifupdown would.
  'etc/systemd/system/multi-user.target.wants/e2scrub_reap.service',
  'etc/systemd/system/multi-user.target.wants/networking.service',
  'etc/systemd/system/network-online.target.wants/networking.service',
  'etc/systemd/system/timers.target.wants',
  'var/cache/ldconfig/aux-cache',
  'var/lib/dbus/machine-id',
  'var/log/apt',
  'var/log/alternatives.log',
  'var/log/bootstrap.log',
  'var/log/dpkg.log',
];

export const debian: Recipe = {
  name: 'debian',
  commandLine: 'console=ttyS0 rw quiet',
  readyText: READY,
  memoryBytes: 512 * MIB,

  async make(context, folder) {
    if (!isRoot()) {
      throw new GridError('unsupported', 'the debian guest needs root to be made (mmdebstrap, device files)');
    }
    const root = path.join(context.temporary, 'root');
    context.progress('installing Debian with mmdebstrap (about a minute)');
    await run(
      context,
      'mmdebstrap',
      ['--quiet', '--mode=root', '--variant=important', `--include=${PACKAGES.join(',')}`, SUITE, root],
      // The kernel package's hook makes no initramfs then.
      { env: { SOURCE_DATE_EPOCH: String(EPOCH_SECONDS), INITRD: 'No' } },
    );
    const query = ['--admindir', path.join(root, 'var/lib/dpkg'), '-W', '-f', '${Package} ${Version}\\n'];
    const versions = (await run(context, 'dpkg-query', query)).trim().split('\n');

    context.progress('making the disk');
    for (const name of REMOVED) await rm(path.join(root, name), { recursive: true, force: true });
    const keys = (await readdir(path.join(root, 'etc/ssh'))).filter((name) => name.startsWith('ssh_host_'));
    for (const name of keys) await rm(path.join(root, 'etc/ssh', name));
    for (const [name, text] of Object.entries(FILES)) {
      const file = path.join(root, name);
      await mkdir(path.dirname(file), { recursive: true });
      await rm(file, { force: true });
      await writeFile(file, text);
      await chmod(file, 0o644);
    }
    for (const [name, target] of Object.entries(WANTED)) {
      await symlink(target, path.join(root, name));
    }
    // Empty: each machine gives itself an identity at its first start.
    await writeFile(path.join(root, 'etc/machine-id'), '');

    const kernel = (await readdir(path.join(root, 'boot'))).find((name) => name.startsWith('vmlinuz-'));
    if (kernel === undefined) throw new GridError('bad-format', 'the guest has no kernel in /boot');
    await cp(path.join(root, 'boot', kernel), path.join(folder, 'kernel'));
    const modules = path.join(root, 'lib/modules', kernel.replace('vmlinuz-', ''));
    await writeFile(path.join(folder, 'initrd'), rootInitramfs(path.join(root, 'bin/busybox'), modules));
    await makeDisk(context, path.join(folder, 'disk.raw'), root, {
      sizeBytes: 2 * GIB,
      label: 'debian',
      uuid: '5f1c2d64-0b5b-4c55-9c7e-2a3c5a6d0002',
      journalBytes: 64 * MIB,
    });
    return Object.fromEntries(versions.map((line) => line.split(' ') as [string, string]));
  },
};
