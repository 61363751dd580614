/** The front end that users talk to; see broker.ts. */
export { Broker } from './broker.ts';
export type { BrokerOptions } from './broker.ts';
export { serveBroker } from './server.ts';
export type { BrokerServer, ServeOptions } from './server.ts';
export type { HostInfo } from './hosts.ts';
export type { ImageInfo } from './images.ts';
export type { JobInfo, VmInfo, VmRequest } from './requests.ts';
export type { Answer, Query } from './query/index.ts';
export type { Explanation } from './placement.ts';
export type { Role, TokenInfo } from './access.ts';
export { ROLES } from './access.ts';
export { POLICIES } from './policies/hosts.ts';
export type { ScheduleInfo } from './warming.ts';
export type { WorkspaceInfo, WorkspaceRequest } from './workspaces.ts';
export type { VolumeUse } from './volumes.ts';
export type { VolumeInfo, VolumeRequest } from './volume-catalog.ts';
export type { QuotaInfo } from './quotas.ts';
export type { NetworkInfo } from './topology.ts';
