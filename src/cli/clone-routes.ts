/** Where a clone is: on the control socket, and for other programs. */
import path from 'node:path';

export const routeOf = (id: string, action = '') => `/v1/clones/${encodeURIComponent(id)}${action}`;

/** The file of a clone's disk. */
export const diskOf = (proxy: { mountpoint: string }, id: string) =>
  path.join(proxy.mountpoint, 'clones', id, 'disk.raw');
