/**
 * The initramfs of both guests: busybox, the kernel modules that stand between the kernel and /dev/vda, and one
 * script that mounts it and hands over. Written here (cpio "newc", not compressed) instead of by initramfs-tools:
 * 2 MB instead of 30, and nothing to unpack on an emulated processor. Same input, same bytes.
 */
import { readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';

export interface ArchiveEntry {
  readonly path: string;
  /** File type and permissions as in st_mode, e.g. 0o100755. */
  readonly mode: number;
  /** A file's bytes or a symbolic link's target; empty for a directory. */
  readonly data: Buffer;
}

const FOLDER = 0o040755;
const PROGRAM = 0o100755;
const FILE = 0o100644;
const LINK = 0o120777;

/**
 * A cpio archive in "newc" format (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst): per
 * entry "070701" and 13 numbers of eight hex digits, the name with its NUL padded to 4, the data padded to 4; at
 * the end an entry named TRAILER!!!. Owner, time and device are 0.
 */
export function cpioArchive(entries: readonly ArchiveEntry[]): Buffer {
  const parts: Buffer[] = [];
  let lengthBytes = 0;
  const push = (bytes: Buffer) => {
    const padding = -(lengthBytes + bytes.length) & 3;
    parts.push(bytes, Buffer.alloc(padding));
    lengthBytes += bytes.length + padding;
  };
  const add = (entry: ArchiveEntry, inode: number) => {
    const name = Buffer.from(entry.path + '\0');
    const links = entry.mode === FOLDER ? 2 : 1;
    const numbers = [inode, entry.mode, 0, 0, links, 0, entry.data.length, 0, 0, 0, 0, name.length, 0];
    const header = '070701' + numbers.map((number) => number.toString(16).padStart(8, '0')).join('');
    push(Buffer.concat([Buffer.from(header), name]));
    push(entry.data);
  };
  entries.forEach((entry, index) => add(entry, index + 1));
  add({ path: 'TRAILER!!!', mode: 0, data: Buffer.alloc(0) }, 0);
  return Buffer.concat(parts);
}

/** The file of each module in /lib/modules/VERSION, by name with '-' as '_'. */
function moduleFiles(modulesFolder: string): Map<string, string> {
  const files = readdirSync(modulesFolder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith('.ko'))
    .map((entry) => path.join(entry.parentPath, entry.name));
  return new Map(files.map((file) => [path.basename(file, '.ko').replaceAll('-', '_'), file]));
}

/**
 * Files of the named modules and all they depend on, in the order in which insmod takes them. Dependencies are
 * read from the modules themselves ("depends=" in section .modinfo), so no depmod is needed. A module that is
 * built into the kernel has no file and is left out.
 */
export function moduleChain(modulesFolder: string, names: readonly string[]): string[] {
  const files = moduleFiles(modulesFolder);
  const chain = new Set<string>();
  const visit = (name: string) => {
    const file = files.get(name.replaceAll('-', '_'));
    if (file === undefined || chain.has(file)) return;
    const text = readFileSync(file).toString('latin1');
    const depends = /\0depends=([^\0]*)\0/.exec(text)?.[1] ?? '';
    for (const dependency of depends.split(',').filter((each) => each !== '')) visit(dependency);
    chain.add(file);
  };
  names.forEach(visit);
  return [...chain];
}

/** /dev/vda becomes the root, mounted for writing; without it the console says so and the machine powers off. */
const INIT = `#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
for module in $($b cat /modules); do $b insmod /lib/$module; done
n=0
while [ ! -b /dev/vda ] && [ $n -lt 1000 ]; do $b usleep 10000; n=$((n+1)); done
if ! $b mount -t ext4 -o rw /dev/vda /root; then
  echo "guest: /dev/vda cannot be mounted as the ext4 root"
  $b sleep 1
  exec $b poweroff -f
fi
$b mount --move /dev /root/dev
$b mount --move /proc /root/proc
exec $b switch_root /root /sbin/init
`;

/** The whole initramfs: `busybox` is the file of a static busybox, `modulesFolder` is /lib/modules/VERSION. */
export function rootInitramfs(busybox: string, modulesFolder: string): Buffer {
  const modules = moduleChain(modulesFolder, ['virtio_pci', 'virtio_blk', 'ext4', 'crc32c_generic']);
  const nothing = Buffer.alloc(0);
  return cpioArchive([
    ...['bin', 'dev', 'lib', 'proc', 'root'].map((name) => ({ path: name, mode: FOLDER, data: nothing })),
    { path: 'bin/busybox', mode: PROGRAM, data: readFileSync(busybox) },
    { path: 'bin/sh', mode: LINK, data: Buffer.from('busybox') },
    { path: 'init', mode: PROGRAM, data: Buffer.from(INIT) },
    {
      path: 'modules',
      mode: FILE,
      data: Buffer.from(modules.map((file) => path.basename(file)).join('\n') + '\n'),
    },
    ...modules.map((file) => ({
      path: `lib/${path.basename(file)}`,
      mode: FILE,
      data: readFileSync(file),
    })),
  ]);
}
