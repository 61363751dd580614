/** What this process sees mounted, from /proc/self/mountinfo (proc(5)), and without touching what is mounted. */

export const MOUNTINFO = '/proc/self/mountinfo';

export interface MountEntry {
  /** Unique among the mounts that exist now. */
  readonly id: number;
  /** `major:minor`, also the name of the mount's backing device info in /sys/class/bdi. */
  readonly device: string;
  readonly mountpoint: string;
  readonly type: string;
  /** The `fsName` of `mountTree`. */
  readonly source: string;
  readonly readOnly: boolean;
}

/** All of them, in the order they were made: where two are in one place, the later covers the other. */
export function parseMountinfo(mountinfo: string): MountEntry[] {
  return mountinfo.split('\n').flatMap((line) => parseLine(line) ?? []);
}

/** The mount that a path (absolute, without symbolic links) is on. */
export function mountOf(file: string, mounts: readonly MountEntry[]): MountEntry | undefined {
  const holds = ({ mountpoint }: MountEntry) =>
    `${file}/`.startsWith(mountpoint === '/' ? '/' : `${mountpoint}/`);
  let found: MountEntry | undefined;
  for (const entry of mounts)
    if (holds(entry) && entry.mountpoint.length >= (found?.mountpoint.length ?? 0)) found = entry;
  return found;
}

/** "36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw": proc(5). */
function parseLine(line: string): MountEntry | undefined {
  const [front, back] = line.split(' - ');
  const [id, , device, , mountpoint, options] = front!.split(' ');
  const [type, source] = (back ?? '').split(' ');
  if (!id || !device || !mountpoint || !options || !type || source === undefined) return undefined;
  return {
    id: Number(id),
    device,
    mountpoint: unescape(mountpoint),
    type,
    source: unescape(source),
    readOnly: options.split(',').includes('ro'),
  };
}

/** Blank, tab, newline and backslash are octal in the file. */
function unescape(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
}
