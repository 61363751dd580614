/**
 * A guest that does nothing but install files on its disk, for tests that kill it: Debian's stock cloud kernel and an
 * initial RAM disk with busybox, which mounts /dev/vda as the file system that `fs=` on its command line names. On
 * ttyS0 is a root shell; `install-files FIRST` then writes as a package manager does (under another name, fsync, rename,
 * fsync of the folder; busybox's `sync FILE`) and says `+NUMBER` for each file that is durable, `-NUMBER` before one is removed.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { run, unpackPackages } from '../../bench/guest/host.ts';
import { cpioArchive, moduleChain } from '../../bench/guest/initramfs.ts';
import type { ArchiveEntry } from '../../bench/guest/initramfs.ts';

export const READY = 'guest-ready: writer';
const FOLDER = 0o040755;
const PROGRAM = 0o100755;

const INIT = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin PS1='# '
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in $(cat /modules); do insmod /lib/$module; done
while [ ! -b /dev/vda ]; do usleep 10000; done
for word in $(cat /proc/cmdline); do case $word in fs=*) fs=\${word#fs=};; esac; done
mount -t $fs -o noatime /dev/vda /m && echo "${READY}" || echo "guest: /dev/vda cannot be mounted"
exec sh
`;

const INSTALL = `#!/bin/sh
n=$1
for i in 0 1 2 3 4 5 6 7; do [ -d /m/d$i ] || mkdir /m/d$i; done
sync /m
while :; do
  d=/m/d$((n % 8))
  yes $n | head -c $((n * 7919 % 60000 + 1)) > $d/f$n.new
  sync $d/f$n.new && mv $d/f$n.new $d/f$n && sync $d && echo "+$n" || exit 1
  yes scratch | head -c 40000 > /m/scratch
  if [ $((n % 3)) = 0 ] && [ $n -gt $(($1 + 10)) ]; then
    echo "-$((n - 10))"
    rm /m/d$(((n - 10) % 8))/f$((n - 10))
  fi
  n=$((n + 1))
done
`;

/** Puts `kernel` and `initrd` into `folder`. */
export async function makeWriterGuest(folder: string): Promise<{ kernel: string; initrd: string }> {
  const context = { temporary: folder, signal: new AbortController().signal, progress: () => {} };
  const unpacked = path.join(folder, 'unpacked');
  await mkdir(unpacked, { recursive: true });
  let release = '';
  await unpackPackages(
    context,
    async (apt) => {
      const name = /Depends: (linux-image-\S+)/.exec(
        await apt(['apt-cache', 'depends', 'linux-image-cloud-amd64']),
      )![1]!;
      release = name.replace('linux-image-', '');
      return [name, 'busybox-static'];
    },
    unpacked,
  );
  const modulesFolder = path.join(unpacked, 'lib/modules', release);
  const modules = moduleChain(modulesFolder, ['virtio_pci', 'virtio_blk', 'crc32c_generic', 'ext4', 'xfs']);
  const program = async (name: string, source: string | Promise<Buffer>): Promise<ArchiveEntry> => ({
    path: name,
    mode: PROGRAM,
    data: Buffer.from(await source),
  });
  const initrd = path.join(folder, 'initrd');
  await writeFile(
    initrd,
    cpioArchive([
      ...['bin', 'dev', 'lib', 'm', 'proc'].map((name) => ({
        path: name,
        mode: FOLDER,
        data: Buffer.alloc(0),
      })),
      await program('bin/busybox', readFile(path.join(unpacked, 'bin/busybox'))),
      await program('init', INIT),
      await program('bin/install-files', INSTALL),
      await program('modules', modules.map((file) => path.basename(file)).join('\n')),
      ...(await Promise.all(modules.map((file) => program(`lib/${path.basename(file)}`, readFile(file))))),
    ]),
  );
  const kernel = path.join(folder, 'kernel');
  await run(context, 'cp', [path.join(unpacked, 'boot', `vmlinuz-${release}`), kernel]);
  return { kernel, initrd };
}
