/** Virtual networks of a host; see switch.ts. */
export { Networks } from './networks.ts';
export type { NetworkStatus } from './networks.ts';
export type { DhcpOptions, Lease } from './dhcp.ts';
export type { Counters, PortKind } from './switch.ts';
