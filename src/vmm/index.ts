/** The machines: what runs them, behind the `Vmm` contract of src/core/machine.ts. QEMU is the default. */
export { createQemu, type QemuOptions } from './qemu/qemu.ts';
export { connectSocket } from './socket.ts';
export { createContainers } from './container/container.ts';
export { Cgroups } from './cgroups.ts';
export { createMachines } from './any.ts';
