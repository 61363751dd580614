/**
 * The small guest: Debian's stock cloud kernel, busybox on an ext4 root on /dev/vda. Its init mounts nothing but
 * what it needs, starts a web server whose page lies on the disk, reads the page through it, appends a line to a
 * file and syncs it, and then says that it is ready. No padding: the modules it loads are the modules it has.
 * It takes host name and keys from a seed (a disk with the label cidata), and answers on ttyS1 (src/agent/vm-answer.ts).
 * On ttyS0 is a root shell; `ping WORD` answers `pong WORD`. The power button (system_powerdown) shuts it down.
 */
import { chmod, cp, mkdir, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { GridError } from '../../src/core/errors.ts';
import { MIB } from '../../src/core/limits.ts';
import { ANSWER, SEED } from './answer.ts';
import type { Recipe } from './build.ts';
import { makeDisk, run, unpackPackages } from './host.ts';
import { moduleChain, rootInitramfs } from './initramfs.ts';

const READY = 'guest-ready: small';

/** Loaded from the disk once it is the root: the power button, and after the ready line entropy and network. */
const BUTTON_MODULES = ['button', 'evdev'];
/** For a seed. */
const SEED_MODULES = ['isofs'];
const LATER_MODULES = ['virtio_rng', 'virtio_net', 'af_packet'];

const INITTAB = `::sysinit:/etc/init.d/rcS
ttyS0::respawn:-/bin/sh
::restart:/sbin/init
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
`;

const START = `#!/bin/sh
mount -t sysfs sys /sys
mount -t tmpfs run /run
load() { for module in $(cat $1); do insmod /lib/modules/$module 2>/dev/null; done; }
load /etc/modules.button
acpid
ifconfig lo up
/etc/answer.sh &
for disk in /dev/vd[b-z]; do
  # The volume's name, where ISO 9660 has it.
  [ "$(dd if=$disk bs=1 skip=32808 count=6 2>/dev/null)" = cidata ] || continue
  load /etc/modules.seed
  mount -t iso9660 -o ro $disk /mnt && /etc/seed.sh && umount /mnt
done
httpd -h /srv/www
page=$(wget -q -O - http://127.0.0.1/index.html)
if [ "$page" = "$(cat /srv/www/index.html)" ] && [ -n "$page" ]; then
  echo "boot $(cat /proc/sys/kernel/random/boot_id)" >> /var/log/boots && sync && echo "${READY}"
else
  echo "guest: the service does not answer"
fi
(load /etc/modules.later; [ -d /sys/class/net/eth0 ] && udhcpc -i eth0 -b -S -s /etc/udhcpc.sh >/dev/null 2>&1) &
`;

const NETWORK = `#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ifconfig $interface $ip netmask $subnet
route add default gw $router
echo "nameserver $dns" > /run/resolv.conf
`;

const PROFILE = `export PATH=/bin:/sbin HOME=/root PS1='# '
ping() { echo "pong $*"; }
`;

export const small: Recipe = {
  name: 'small',
  // no_timer_check: without KVM on a busy host the kernel's test of the timer interrupt gives up, and the guest panics.
  commandLine: 'console=ttyS0 rw quiet no_timer_check',
  readyText: READY,
  memoryBytes: 128 * MIB,

  async make(context, folder) {
    const unpacked = path.join(context.temporary, 'unpacked');
    context.progress('downloading the Debian cloud kernel and busybox');
    let kernelPackage = '';
    const packages = await unpackPackages(
      context,
      async (apt) => {
        const depends = await apt(['apt-cache', 'depends', 'linux-image-cloud-amd64']);
        const name = /Depends: (linux-image-\S+)/.exec(depends)?.[1];
        if (name === undefined) throw new GridError('not-found', 'apt knows no linux-image-cloud-amd64');
        kernelPackage = name;
        return [name, 'busybox-static'];
      },
      unpacked,
    );
    const release = kernelPackage.replace('linux-image-', '');
    const modulesFolder = path.join(unpacked, 'lib/modules', release);
    const busybox = path.join(unpacked, 'bin/busybox');

    context.progress('making the disk');
    await cp(path.join(unpacked, 'boot', `vmlinuz-${release}`), path.join(folder, 'kernel'));
    await writeFile(path.join(folder, 'initrd'), rootInitramfs(busybox, modulesFolder));
    const root = path.join(context.temporary, 'root');
    for (const name of ['bin', 'dev', 'etc/acpi/PWRF', 'etc/init.d', 'lib/modules', 'proc', 'root', 'run']) {
      await mkdir(path.join(root, name), { recursive: true });
    }
    for (const name of ['mnt', 'sbin', 'srv/www', 'sys', 'tmp', 'usr', 'var/log']) {
      await mkdir(path.join(root, name), { recursive: true });
    }
    await cp(busybox, path.join(root, 'bin/busybox'));
    const applets = (await run(context, busybox, ['--list-full'])).trim().split('\n');
    for (const applet of new Set(applets.map((each) => path.basename(each)))) {
      if (applet !== 'busybox') await symlink('busybox', path.join(root, 'bin', applet));
    }
    await symlink('../bin/busybox', path.join(root, 'sbin/init'));
    const listOf = async (names: readonly string[]) => {
      const files = moduleChain(modulesFolder, names);
      for (const file of files) await cp(file, path.join(root, 'lib/modules', path.basename(file)));
      return files.map((file) => path.basename(file) + '\n').join('');
    };
    const files: Record<string, string> = {
      'etc/inittab': INITTAB,
      'etc/modules.button': await listOf(BUTTON_MODULES),
      'etc/modules.later': await listOf(LATER_MODULES),
      'etc/modules.seed': await listOf(SEED_MODULES),
      'etc/profile': PROFILE,
      'etc/passwd': 'root::0:0:root:/root:/bin/sh\n',
      'etc/group': 'root:x:0:\n',
      'srv/www/index.html': 'This page is on the disk.\n',
    };
    const programs: Record<string, string> = {
      'etc/answer.sh': ANSWER,
      'etc/init.d/rcS': START,
      'etc/seed.sh': SEED,
      'etc/udhcpc.sh': NETWORK,
      'etc/acpi/PWRF/00000080': '#!/bin/sh\npoweroff\n',
    };
    await symlink('/run/resolv.conf', path.join(root, 'etc/resolv.conf'));
    for (const [name, text] of Object.entries({ ...files, ...programs })) {
      await writeFile(path.join(root, name), text);
      await chmod(path.join(root, name), name in programs ? 0o755 : 0o644);
    }
    await makeDisk(context, path.join(folder, 'disk.raw'), root, {
      sizeBytes: 64 * MIB,
      label: 'small',
      uuid: '5f1c2d64-0b5b-4c55-9c7e-2a3c5a6d0001',
      journalBytes: 4 * MIB,
    });
    return packages;
  },
};
