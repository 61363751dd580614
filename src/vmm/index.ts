/** The machines: what runs them, behind the `Vmm` contract of src/core/machine.ts. QEMU is the one there is. */
export { createQemu, type QemuOptions } from './qemu/qemu.ts';
export { connectSocket } from './qemu/socket.ts';
