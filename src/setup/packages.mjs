/** Debian 12 packages by what needs them; `gridvfs doctor` names them too. */
export const PACKAGES = {
  /** The pinned Node itself. */
  node: ['libatomic1'],
  /** Hosts that mount images and run guests, and the demo's guest builder. */
  run: [
    'fuse3',
    'qemu-system-x86',
    'qemu-utils',
    'seabios',
    'ipxe-qemu',
    'ovmf',
    'systemd-container',
    'e2fsprogs',
    'busybox-static',
    'mmdebstrap',
    'cpio',
    'kmod',
    'zstd',
    'xz-utils',
  ],
  /** The tests: a stock sshd and a stock client to try it with, a stock web server, the peers of the benches, a
   * database server for the broker, a browser for its page, and what the fuse-native driver is linked against. */
  test: [
    ...['openssh-server', 'openssh-client', 'fio', 'xfsprogs', 'nginx-light', 'openssl'],
    ...['sshfs', 'rclone', 'nbdkit', 'libnbd-bin', 'libfuse2', 'postgresql', 'chromium'],
  ],
};
